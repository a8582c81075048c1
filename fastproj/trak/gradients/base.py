"""What every gradient computer does: one model, one task, the parameters to differentiate by."""

from __future__ import annotations

import difflib
import logging
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastproj.checks import listed
from fastproj.factored import one_dtype
from fastproj.trak import batches
from fastproj.trak.gradients.running import (
    forgetful,
    in_graphs,
    modules_named_twice,
    norm,
    plainly,
    restored,
    rounding_share,
    wide_sums,
)
from fastproj.trak.gradients.structure import structure_of
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.precision import full_precision
from fastproj.trak.tasks.base import Batch, BatchedModelOutput, Terms, definer, run
from fastproj.trak.tasks.training import SeveralOutputs, TrainingOutput

REPEATED = 4  # samples of a batch whose outputs are computed twice
GRAD_BYTES = 512 * 1024 * 1024  # per-sample gradients held at once, unless one sample needs more
TRAINABLE = "trainable"  # as grad_wrt: the parameters that have requires_grad

Looked = TypeVar("Looked")

logger = logging.getLogger("fastproj.trak")

Grads = dict[str, Tensor]


class AbstractGradientComputer(ABC):
    """Per-sample gradients of one model under one task.

    Parameters
    ----------
    model : the module; its parameters at the time of ``load_model_params`` are differentiated at.
        A parameter that several modules share counts once, under its first name.
    task : an ``AbstractModelOutput``.
    grad_dim : P, the number of gradient entries per sample (sum over the chosen parameters).
    dtype : accepted for TRAK's sake; gradients come in the dtype of the parameters.
    device : where batches and gradients are.
    grad_wrt : names of the parameters to differentiate by, or None for all.

    Attributes
    ----------
    trusting : whether gradients may be used that were checked in some of the batches only.
    on_trust : whether the last result of ``project`` is such.
    when_disproved : called when a check fails: results on trust may be wrong.
    """

    trusting: bool = True
    on_trust: bool = False
    when_disproved: Callable[[], None] | None = None
    task: Any

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        self.task = task
        self.device = device
        self.names = parameter_names(model, grad_wrt)
        self.grad_dim = grad_dim
        self.said: set[str] = set()  # what a user has been told
        self.load_model_params(model)

    def sibling(self, task: Any) -> AbstractGradientComputer:
        """Such a computer for another task of the same model. A user is told nothing twice."""
        made = type(self)(self.model, task, self.grad_dim, None, self.device, self.names)
        made.said = self.said
        return made

    def load_model_params(self, model: nn.Module) -> None:
        """Use the parameters and buffers that ``model`` has now."""
        self.model = model
        params = dict(model.named_parameters())
        self.chosen = {name: params[name].detach() for name in self.names}
        # Parameters: where a forward takes one out and registers it again, as that of peft's
        # target_parameters does, a tensor would be a buffer of the model afterwards. The model's
        # own where they are frozen, because quantized ones have attributes (bitsandbytes).
        self.fixed = {
            name: nn.Parameter(p.detach(), requires_grad=False) if p.requires_grad else p
            for name, p in params.items()
            if name not in self.chosen
        }
        self.buffers = dict(model.named_buffers())
        self._named_twice = modules_named_twice(model)
        self._keepers = [  # PyTorch's own modules keep nothing
            m for m in model.modules() if not type(m).__module__.startswith("torch.nn.")
        ]
        self._dependent = False  # whether f of any sample has been seen to depend on them
        self._mixes: bool | None = None  # whether f of a sample depends on the others of its batch

    def compute_per_sample_grad(self, batch: tuple[Any, ...]) -> Grads:
        """The gradients of all samples: name -> [B, *shape of the parameter]."""
        return self.compute_rows(batch)[0]

    def compute_rows(self, batch: tuple[Any, ...]) -> list[Grads]:
        """``compute_per_sample_grad`` for each output of the task, from one forward.

        A task has one output; ``SeveralOutputs`` has several.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has neither compute_rows nor compute_per_sample_grad"
        )

    @classmethod
    def gives_rows(cls) -> bool:
        """Whether ``compute_rows`` can be used. A subclass may override
        ``compute_per_sample_grad`` alone, which knows one output.
        """
        return definer(cls, "compute_rows") <= definer(cls, "compute_per_sample_grad")

    def project(self, batch: tuple[Any, ...], projector: Any, model_id: int) -> Tensor:
        """``projector.project`` of the gradients of all samples, [B, proj_dim]."""
        return self.project_rows(batch, projector, model_id)[0]

    def project_rows(self, batch: tuple[Any, ...], projector: Any, model_id: int) -> list[Tensor]:
        """``project`` for each output of the task, from one forward."""
        self.on_trust = False
        self.check_dependence(batch)
        chunks = [
            [projector.project(with_one_dtype(grads), model_id=model_id) for grads in rows]
            for rows in self.iter_rows(batch)
        ]
        return [torch.cat(parts).detach() for parts in zip(*chunks, strict=True)]

    def project_drawn(
        self, batch: tuple[Any, ...], chosen: Tensor, projector: Any, model_id: int
    ) -> tuple[Tensor, list[Tensor]]:
        """``project_rows`` of a ``TrainingOutput`` whose drawn rows are wanted of some samples.

        Parameters
        ----------
        batch : of B samples, the noise last.
        chosen : bool [B], which samples.

        Returns
        -------
        The first output of all samples, [B, proj_dim], and the others of the b that are chosen,
        [b, proj_dim] each.
        """
        *given, noise = batch
        undrawn = batch if noise.shape[1] == 0 else (*given, noise[:, :0])
        if not chosen.any():
            return self.project_rows(undrawn, projector, model_id)[0], []
        if chosen.all():
            features, *drawn = self.project_rows(batch, projector, model_id)
            return features, drawn
        features, *drawn = self.project_rows(batches.select(batch, chosen), projector, model_id)
        on_trust = self.on_trust
        (others,) = self.project_rows(batches.select(undrawn, ~chosen), projector, model_id)
        self.on_trust |= on_trust
        every = features.new_empty(len(chosen), features.shape[1])
        every[chosen], every[~chosen] = features, others
        return every, drawn

    def iter_rows(self, batch: tuple[Any, ...]) -> Iterator[list[Grads]]:
        """``compute_rows`` in chunks of samples, in order, of at most GRAD_BYTES where possible."""
        step = self.samples_at_once(batch)
        for start in range(0, batches.size(batch), step):
            part = batches.select(batch, slice(start, start + step))
            if self.gives_rows():
                yield self.compute_rows(part)
            else:
                yield [self.compute_per_sample_grad(part)]

    def check_dependence(self, batch: tuple[Any, ...]) -> None:
        """Raise ValueError if f of no sample depends on the parameters, or if it is random; once
        per checkpoint.
        """
        rows = range(0 if self._dependent else batches.size(batch))
        for row in rows:
            gradient = self.gradients_of(batch, row)[0]
            if any(g is not None for g in gradient.values()):
                self.check_repeats(batch)
                self._dependent = True
                return
        if rows:
            raise self.no_dependence()

    @property
    def task_name(self) -> str:
        """The class of the caller's task, for messages."""
        task = self.task.task if isinstance(self.task, SeveralOutputs) else self.task
        return type(task).__name__

    def no_dependence(self) -> ValueError:
        """The error where f doesn't depend on the parameters."""
        return ValueError(
            f"TRAKer: the output of {self.task_name} doesn't depend on any of the "
            f"{len(self.names)} parameters that gradients are taken by (such as "
            f"{self.names[0]!r}); expected a task that calls the model it is given, not another "
            "module, without no_grad, detach or argmax, and grad_wrt that the model uses"
        )

    def in_graph(
        self, made: Callable[[Grads, Batch], Tensor], chosen: Grads, batch: Batch
    ) -> Tensor:
        """``made(chosen, batch)``, outputs with a graph; checked where nothing is known yet of what
        f depends on.
        """
        with torch.enable_grad():
            if self._dependent:
                return made(chosen, batch)
            own = self.model.named_parameters()
            with in_graphs(p for name, p in own if name in self.chosen):
                out = made(chosen, batch)
            self.check_leaves(structure_of(batch, out)[1])
        return out

    def check_leaves(self, leaves: Iterable[Tensor]) -> None:
        """Raise ValueError where the model's own parameters are among the leaves of a graph.

        Outputs are computed with others in their place, by which gradients are taken. Where a
        forward gets at a parameter past its module, that part of the gradient is lost.
        """
        reached = {id(leaf) for leaf in leaves}
        own = self.model.named_parameters()
        past = [name for name, p in own if name in self.chosen and id(p) in reached]
        if past:
            module, _, name = past[0].rpartition(".")
            raise ValueError(
                f"TRAKer: the outputs of {self.task_name} depend on {listed(past)} past the module "
                "that has it: by a list or variable that holds the parameter, or by a tensor that "
                "an earlier call has made of it. That part of the gradient would be lost; expected "
                f"a forward that reads it from {module or 'the model'} each time, as in "
                f"self.{name}, getattr(self, {name!r}) or nn.ParameterList"
            )

    def check_repeats(self, batch: tuple[Any, ...], eps: float = 0.0) -> None:
        """Raise RandomNumbersError if f differs from one call to the next, and its gradient by more
        than rounding: the kernels of a GPU may add in any order.

        eps : of the coarsest dtype that the model computes in, if that isn't its parameters'.
        """
        params = list(self.chosen.values())
        if any(p.is_cuda for p in params):  # autocast inside of the model is not seen here
            eps = max(eps, torch.finfo(torch.bfloat16).eps)
        share = rounding_share(eps, *(p.dtype for p in params))
        for row in range(min(batches.size(batch), REPEATED)):
            one = batches.select(batch, slice(row, row + 1))
            with torch.no_grad():
                first, again = (self.output_alone(self.chosen, one) for _ in range(2))
            if torch.equal(first, again):
                continue
            left = total = 0.0
            for pair in zip(*(self.gradients_of(batch, row) for _ in range(2)), strict=True):
                for name, p in self.chosen.items():
                    a, b = (torch.zeros_like(p) if g[name] is None else g[name] for g in pair)
                    left += norm(a - b) ** 2
                    total += norm(a) ** 2 + norm(b) ** 2
            if left > share**2 * total:
                raise RandomNumbersError(
                    "TRAKer: outputs differ from one call to the next, with the same sample and "
                    "parameters: the model or the task draws random numbers, or keeps something "
                    "from call to call; expected F.dropout(x, p, training=self.training), whose "
                    "default is training=True, dropout_p=0.0 in attention, and other random "
                    "numbers as a part of the batch"
                )

    def samples_at_once(self, batch: tuple[Any, ...]) -> int:
        """How many samples' gradients fit into GRAD_BYTES; at least one."""
        per_sample = sum(p.numel() * p.element_size() for p in self.chosen.values())
        if isinstance(self.task, SeveralOutputs):
            per_sample *= self.task.rows_at_most(batch)
        return max(1, GRAD_BYTES // max(1, per_sample))

    def compute_terms(self, batch: tuple[Any, ...]) -> Terms:
        """What the samples say of the likelihood of their labels, for a ``TrainingOutput``.

        Of each sample alone where the model mixes them, as gradients are.
        """
        terms = self._look(batch, self._terms)  # which checks labels
        if not self.mixes(batch):
            return terms
        return Terms(*map(torch.cat, zip(*map(self._terms, singles(batch)), strict=True)))

    def compute_loss_grad(self, batch: tuple[Any, ...]) -> Tensor:
        """Q of each sample: the task's ``get_out_to_loss_grad``.

        Of each sample alone where the model mixes them, as gradients are.
        """
        q = self._look(batch, self._loss_grad)
        if not self.mixes(batch):
            return q
        return torch.cat([self._loss_grad(one).reshape(-1) for one in singles(batch)])

    def _look(self, batch: tuple[Any, ...], look: Callable[[tuple[Any, ...]], Looked]) -> Looked:
        """``look(batch)``; a subclass may keep its forward for the gradients."""
        return look(batch)

    def mixes(self, batch: tuple[Any, ...]) -> bool:
        """Whether outputs of a task of batches depend on the other samples: looked at once for each
        checkpoint, at the first and the last sample of a batch.
        """
        task, parts = self.task, batch
        if isinstance(task, TrainingOutput):
            task, parts = task.task, batch[:-1]
        size = batches.size(parts)
        single = isinstance(task, BatchedModelOutput) and not isinstance(task, SeveralOutputs)
        if self._mixes is None and size > 1 and single:
            ends = [batches.select(parts, slice(r, r + 1)) for r in (0, size - 1)]
            with torch.no_grad(), full_precision():  # TF32 may round batches of one otherwise
                every, *alone = (
                    self._of_task(task.outputs, self.chosen, some).reshape(-1)
                    for some in (parts, *ends)
                )
            share = rounding_share(0.0, every.dtype, *(p.dtype for p in self.chosen.values()))
            apart = float((torch.cat([every[:1], every[-1:]]) - torch.cat(alone)).abs().max())
            mixes = apart > share * float(every.abs().max())
            if mixes:  # or random
                self.check_repeats(batch)
            self._mixes = mixes
            if mixes and "mixes" not in self.said:
                self.said.add("mixes")
                logger.warning(
                    "TRAKer: the outputs of %s depend on the other samples of a batch; each sample "
                    "is computed alone",
                    self.task_name,
                )
        return bool(self._mixes)

    def _terms(self, batch: tuple[Any, ...]) -> Terms:
        with torch.no_grad():
            terms: Terms = self._of_task(self.task.terms, self.chosen, batch)
        return terms

    def _loss_grad(self, batch: tuple[Any, ...]) -> Tensor:
        out: Tensor = self._of_task(self.task.get_out_to_loss_grad, self.chosen, batch)
        return out

    def outputs(self, chosen: Grads, batch: tuple[Any, ...]) -> Tensor:
        """f of each sample as a function of the chosen parameters, [B]; for batched tasks."""
        out: Tensor = self._of_task(self.task.outputs, chosen, batch)
        return out

    def output(self, chosen: Grads, *sample: Any) -> Tensor:
        """f of one sample as a function of the chosen parameters, a scalar."""
        out: Tensor = self._of_task(self.task.get_output, chosen, *sample)
        return out

    def outputs_now(self, batch: tuple[Any, ...]) -> Tensor:
        """f of each sample of a batch, [B], with the parameters that were loaded."""
        with torch.no_grad():
            if isinstance(self.task, BatchedModelOutput):
                return self.outputs(self.chosen, batch).reshape(-1)
            alone = [self.output_alone(self.chosen, one) for one in singles(batch)]
        return torch.stack([out.reshape(()) for out in alone])

    def output_alone(self, chosen: Grads, batch: tuple[Any, ...]) -> Tensor:
        """f of the sample of a batch of one, a scalar; of ``SeveralOutputs``, [rows]."""
        method = getattr(self.task, "get_output", None)
        if getattr(method, "__func__", None) is not BatchedModelOutput.get_output:
            return self.output(chosen, *batches.select(batch, 0))
        # The batch dimension stays: some parts of a batch can't get it back.
        out = self.outputs(chosen, batch)
        return out.reshape(-1) if isinstance(self.task, SeveralOutputs) else out.reshape(())

    def _of_task(self, method: Callable[..., Any], chosen: Grads, *args: Any) -> Any:
        """A method of the task with these parameters, on a copy of its arguments."""
        with plainly(), restored(self._named_twice), forgetful(self._keepers):
            return run(method, self.model, {**self.fixed, **chosen}, self.buffers, *own(args))

    def gradients_of(self, batch: tuple[Any, ...], row: int) -> list[dict[str, Tensor | None]]:
        """The gradients of one sample's outputs by plain autograd; None where an output doesn't
        depend on a parameter.
        """
        chosen = {name: p.clone().requires_grad_() for name, p in self.chosen.items()}
        one = batches.select(batch, slice(row, row + 1))
        outputs = self.in_graph(self.output_alone, chosen, one)
        with torch.enable_grad():
            found: list[dict[str, Tensor | None]] = []
            for out in outputs.reshape(-1):
                if not out.requires_grad:
                    found.append(dict.fromkeys(chosen))
                    continue
                last = len(found) + 1 == outputs.numel()
                with wide_sums(chosen.values()):
                    grads = torch.autograd.grad(
                        out, list(chosen.values()), allow_unused=True, retain_graph=not last
                    )
                parts = zip(chosen, grads, strict=True)
                found.append({n: None if g is None else dense(g) for n, g in parts})
        return found


def singles(batch: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Each sample of a batch, as a batch of one."""
    for row in range(batches.size(batch)):
        yield batches.select(batch, slice(row, row + 1))


def own(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy of a batch: models may write to their inputs, and it is run several times."""
    copy: tuple[Any, ...] = batches.map_leaves(torch.clone, batch)
    return copy


def with_one_dtype(grads: Grads) -> Grads:
    """Gradients of several dtypes in the one that holds them all exactly."""
    return dict(zip(grads, one_dtype(list(grads.values())), strict=True))


def dense(g: Tensor) -> Tensor:
    """A gradient as a dense tensor; those of embeddings may be sparse."""
    if not g.is_sparse:
        return g
    return g.to(torch.promote_types(g.dtype, torch.float32)).to_dense().to(g.dtype)


def parameter_names(model: nn.Module, grad_wrt: Iterable[str] | str | None) -> list[str]:
    """The names of ``grad_wrt`` (None: all) in the order of ``model.named_parameters()``.

    "trainable" is those that have ``requires_grad``.

    Raises ValueError for a name that the model lacks, or when nothing is left.
    """
    known = [name for name, _ in model.named_parameters()]
    if grad_wrt == TRAINABLE:
        grad_wrt = [name for name, p in model.named_parameters() if p.requires_grad]
        if not grad_wrt:
            raise ValueError(
                'TRAKer: received grad_wrt="trainable" with a model of which no parameter has '
                "requires_grad; expected requires_grad_(True) on those that were trained, or their "
                "names (None is all parameters)"
            )
    if isinstance(grad_wrt, str):
        raise TypeError(
            f"TRAKer: received grad_wrt={grad_wrt!r}, a string; expected a list of parameter "
            'names, or "trainable"'
        )
    if isinstance(grad_wrt, nn.Module) or not isinstance(grad_wrt, Iterable | None):
        raise TypeError(
            f"TRAKer: received grad_wrt of type {type(grad_wrt).__name__}; expected names from "
            f"model.named_parameters(), such as [{', '.join(map(repr, known[:3]))}]"
        )
    given = known if grad_wrt is None else list(grad_wrt)
    odd = [name for name in given if not isinstance(name, str)]
    if odd:
        raise TypeError(
            f"TRAKer: received grad_wrt with {type(odd[0]).__name__} in it; expected names from "
            f"model.named_parameters(), such as {', '.join(map(repr, known[:3]))}"
        )
    wanted = set(given)
    unknown = sorted(wanted - set(known))
    if unknown:
        shared = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        if unknown[0] in shared:
            first = first_name(model, unknown[0])
            raise ValueError(
                f"TRAKer: received grad_wrt with {unknown[0]!r}, which the model shares with "
                f"{first!r}; expected {first!r}, the name that it counts under"
            )
        near = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.3) or known[:3]
        raise ValueError(
            f"TRAKer: received grad_wrt with {', '.join(map(repr, unknown[:5]))}; expected names "
            f"from model.named_parameters(), such as {', '.join(map(repr, near))}"
        )
    names = [name for name in known if name in wanted]
    if not names:
        raise ValueError(
            f"TRAKer: received {'a model' if grad_wrt is None else 'grad_wrt'} without parameters; "
            "expected at least one to take gradients by"
        )
    params = dict(model.named_parameters())
    whole = [name for name in names if not params[name].is_floating_point()]
    if whole:
        raise ValueError(
            f"TRAKer: received {'a model' if grad_wrt is None else 'grad_wrt'} with "
            f"{', '.join(map(repr, whole[:5]))} of dtype {params[whole[0]].dtype}, which has no "
            "real gradient; expected grad_wrt that names floating-point parameters only"
        )
    return names


def first_name(model: nn.Module, name: str) -> str:
    """The name that a shared parameter has in ``model.named_parameters()``."""
    shared = dict(model.named_parameters(remove_duplicate=False))[name]
    return next(first for first, p in model.named_parameters() if p is shared)
