"""Per-sample gradients by module hooks: one forward, one backward, layer by layer."""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastproj.factored import FactoredProjector
from fastproj.memory import is_out_of_memory
from fastproj.trak import batches
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads, Looked, dense
from fastproj.trak.gradients.functional import FunctionalGradientComputer
from fastproj.trak.gradients.layout import SHARED, SIZES, UNCLEAR, HooksError, tree_dims
from fastproj.trak.gradients.local import warn_loop
from fastproj.trak.gradients.loop import IterativeGradientComputer
from fastproj.trak.gradients.parts import Piece, Workspace
from fastproj.trak.gradients.proof import (
    Evened,
    Split,
    asking,
    known_sums,
    worth_a_proof,
)
from fastproj.trak.gradients.recorder import Folded, Layout, Owned, Recorder, Seen, last_of
from fastproj.trak.gradients.replay import Replay
from fastproj.trak.gradients.rules import rule_for
from fastproj.trak.gradients.running import norm, tf32_eps, wide_sums
from fastproj.trak.gradients.scales import projects_pieces, unscaled
from fastproj.trak.gradients.sinks import (
    Check,
    CollectingSink,
    ModuleSink,
    NoSink,
    ProjectingSink,
    RowSink,
    Sink,
)
from fastproj.trak.gradients.structure import structure_of
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.tasks.base import has_batched_outputs

SPLITS = 4  # in which a batch is checked again before its gradients are called wrong
SAME = 1e-4  # relative difference of outputs that may be rounding
ALONE_FIRST = 4  # samples of the first batch that are checked each by itself
STRUCTURES = 1 << 16  # remembered at most
PLANS = 256  # remembered at most; each batch with a list of texts has one of its own
CALL_ENTRIES = 1 << 16  # projecting so many entries costs as much as one more call
FEW = 2 / 3  # of the samples: a forward and backward of these cost less than a backward of all
MANY_STRUCTURES = 32  # checked before a warning that every other batch has a structure of its own
MANY_CALLS = 64  # of a parameter in a forward: 16 bits lose a percent of their sum


Rows = tuple[int | None, ...]  # of a task's outputs: the arguments of a slice
EVERY: Rows = (None,)
FIRST: Rows = (1,)
OTHERS: Rows = (1, None)

logger = logging.getLogger("fastproj.trak")


class Forward(NamedTuple):
    """One forward of a batch with hooks listening.

    structure : a hash of its shapes and control flow.
    leaves : of the graph behind ``out``.
    folded : outputs of modules whose rows are to be those of the samples that they count to.
    """

    plan: Plan
    recorder: Recorder
    out: Tensor
    structure: int
    leaves: list[Tensor]
    folded: list[Folded]


@dataclass
class Plan:
    """How the gradient of a model comes about, for samples of one shape."""

    hooked: list[Owned]  # those without a layout were not called for the sample that was tried
    layouts: dict[str, list[Layout]]  # of each hooked module, call by call
    rest: list[str] = field(default_factory=list)  # parameters that hooks can't see


class HookGradientComputer(AbstractGradientComputer):
    """One forward and one backward for a batch; each layer's gradients are formed and let go.

    Every module that has parameters is hooked. Its input and the gradient by its output give the
    per-sample gradients of its parameters: by a formula for common layers (``rules``), by
    ``torch.func.vmap`` of that module alone for others. With a ``fastproj.Projector``, each is
    projected at its row offset and freed. So at most one layer's gradients are in memory, and often
    less: large layers come in pieces, embeddings with the rows that are looked up. With a
    ``fastproj.FactoredProjector``, those of linear layers, convolutions without groups and
    embeddings are formed only in batches that are checked.
    The gradients of a module that is called several times, and of a shared parameter, are summed.
    Where a parameter is used outside of its module's forward, and that module is never called, a
    module above it takes its place, at last the whole model under ``torch.func``. A log line says
    so. Where it is called as well, the check against autograd fails.

    The task must be a ``BatchedModelOutput``. Batches of 2 and 3 copies of a sample show where the
    batch dimension is inside the model. A module that other samples call more often is an error.
    After each ``load_model_params``, the first batch of each structure (shapes, control flow) is
    checked against plain autograd, and now and then a later one (``proof``). A batch of one sample
    gets plain autograd's gradients, but for a ``fastproj.FactoredProjector``.

    Raises
    ------
    HooksError
        Where the gradients can't be had this way, or don't agree with autograd's.
    """

    def load_model_params(self, model: nn.Module) -> None:
        """Use the parameters and buffers that ``model`` has now."""
        super().load_model_params(model)
        if not has_batched_outputs(self.task):
            raise HooksError(
                f"hooks: {type(self.task).__name__} gives the output of one sample only; expected "
                "a BatchedModelOutput that says by outputs(...), of a batch, what f is"
            )
        # A layer without inputs has a weight without entries: there is no gradient to find.
        self._owned = owned_modules(model, {n for n, p in self.chosen.items() if p.numel()})
        self._used: set[str] = set()  # what f of some batch has been seen to depend on
        self._structures: set[tuple[Rows, int]] = set()  # of batches that were checked
        self._ahead: tuple[list[Any], Forward] | None = None
        self._batches = {False: 0, True: 0}  # so far by hooks; of drawn rows alone
        self._checks = 0
        self._plans: dict[Any, Plan] = {}
        self._factored = False  # whether the projector of the last batch compresses both sides
        if not hasattr(self, "_work"):
            self._work = Workspace()

    # ---- the two results ------------------------------------------------------------------------

    def compute_rows(self, batch: tuple[Any, ...]) -> list[Grads]:
        """Of each output of a sample, name -> [B, *shape of the parameter]."""
        size = batches.size(batch)
        sinks: list[CollectingSink] = []

        def sink(_: Counter[str]) -> Sink:
            sinks.append(CollectingSink(self.chosen, size))
            return sinks[-1]

        self._run(batch, sink)
        return [sink.grads for sink in sinks]

    def project_rows(self, batch: tuple[Any, ...], projector: Any, model_id: int) -> list[Tensor]:
        """``projector.project`` of the gradients of each output of the samples, [B, proj_dim]."""
        if not self._takes(projector):  # whole gradients
            return super().project_rows(batch, projector, model_id)
        return self._project(batch, projector, model_id, EVERY)

    def project_drawn(
        self, batch: tuple[Any, ...], chosen: Tensor, projector: Any, model_id: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The first output of all samples and the others of those that are chosen.

        The first has the forward that ``compute_terms`` has kept. Where few samples are chosen, the
        others have a forward and backward of these alone; where many are, a backward of all.
        """
        own = type(self).project_rows is HookGradientComputer.project_rows
        if not (own and self._takes(projector)):
            return super().project_drawn(batch, chosen, projector, model_id)
        count = int(chosen.sum())
        if count >= FEW * len(chosen):
            features, *drawn = self._project(batch, projector, model_id, EVERY)
            return features, [rows[chosen] for rows in drawn]
        (features,) = self._project(batch, projector, model_id, FIRST)
        if not count:
            return features, []
        on_trust = self.on_trust
        some = batches.select(batch, chosen)
        drawn = self._project(some, projector, model_id, OTHERS)
        self.on_trust |= on_trust
        return features, drawn

    def _takes(self, projector: Any) -> bool:
        """Whether parts of gradients can go to a projector."""
        return projects_pieces(projector) and self.gives_rows()

    def _project(
        self,
        batch: tuple[Any, ...],
        projector: Any,
        model_id: int,
        rows: Rows,
    ) -> list[Tensor]:
        """The projections of some outputs of the samples, [B, proj_dim] each."""
        self.on_trust = False
        self._factored = isinstance(unscaled(projector)[0], FactoredProjector)
        sinks: list[ProjectingSink] = []

        def sink(uses: Counter[str]) -> Sink:
            size = batches.size(batch)
            sinks.append(ProjectingSink(self.chosen, size, projector, model_id, uses, self._work))
            return sinks[-1]

        self._run(batch, sink, rows)
        return [sink.out for sink in sinks]

    def project_modules(
        self, batch: tuple[Any, ...], projector: Any, model_id: int
    ) -> list[Tensor]:
        """What each of ``modules_of`` the parameters adds to ``project``, [B, proj_dim] each."""
        self.on_trust = False
        self._factored = isinstance(unscaled(projector)[0], FactoredProjector)
        sinks: list[ModuleSink] = []

        def sink(uses: Counter[str]) -> Sink:
            size = batches.size(batch)
            sinks.append(ModuleSink(self.chosen, size, projector, model_id, uses, self._work))
            return sinks[-1]

        self._run(batch, sink)
        return sinks[0].outs

    # ---- beside the gradients -------------------------------------------------------------------

    def _look(self, batch: tuple[Any, ...], look: Callable[[tuple[Any, ...]], Looked]) -> Looked:
        """``look(batch)``, on what the model returns in a forward that is kept for ``_run``.

        ``look`` runs before anything else uses the outputs, because it checks labels. Its result
        has the same bits whether or not the batch is checked: with gradients and without, PyTorch
        may round differently.
        """
        self._ahead = None
        if self._is_plain(batch) or not self.trusting:
            return look(batch)
        replay = Replay(self.model)
        found: list[Looked] = []

        def first(recorder: Recorder) -> None:
            with recorder.deaf(), replay.playing():
                found.append(look(batch))

        try:
            made = self._forward(batch, replay, first)
        except Exception as error:  # one of hooks comes again where gradients are asked for
            if is_out_of_memory(error):
                raise
            return look(batch)
        if not found:  # the task doesn't call the model itself
            found.append(look(batch))
        self._ahead = pytree.tree_leaves(batch), made
        return found[-1]

    def _forward_ahead(self, batch: tuple[Any, ...]) -> Forward | None:
        """What ``_look`` has kept of this batch; it is given once."""
        kept, self._ahead = self._ahead, None
        if kept is None:
            return None
        leaves = pytree.tree_leaves(batch)
        same = len(leaves) == len(kept[0]) and all(map(operator.is_, leaves, kept[0]))
        return kept[1] if same else None

    # ---- one batch ------------------------------------------------------------------------------

    def _run(
        self,
        batch: tuple[Any, ...],
        make_sink: Callable[[Counter[str]], Sink],
        rows: Rows = EVERY,
    ) -> None:
        """Send the pieces of all gradients of a batch to sinks, one for each output of a sample.

        rows : which outputs of a sample.
        """
        made = self._forward_ahead(batch)
        one = batches.size(batch) == 1
        if one and made is None and not self._is_plain(batch) and self.trusting:
            made = self._forward_of_one(batch)
        if one and made is None:
            self._single(batch, make_sink, rows)
            return
        self.on_trust = True
        if not self.trusting:
            raise HooksError(
                "hooks: gradients of this checkpoint have failed a check before; expected "
                'gradient_computer="auto", "func" or "loop"'
            )
        self._batches[rows == OTHERS] += 1
        made = made or self._forward(batch)
        self._warn_sums(made.recorder.uses)
        structure = rows, made.structure
        check = None
        if worth_a_proof(self._batches[rows == OTHERS]) or structure not in self._structures:
            check = Check(self._split(batch), self.chosen, len(made.out[slice(*rows)]))
        eps = self._backward(batch, made, rows, make_sink, check)
        divided = made.recorder.divided
        del made  # before plain autograd needs the memory
        if check is not None:
            proved = self._is_proved(batch, rows, check, eps)
        else:  # samples may have other numbers of rows than in the batch that was checked
            proved = divided or self._is_proved_apart(batch, rows, None)
        if proved:
            self._remember(structure)

    def _backward(
        self,
        batch: tuple[Any, ...],
        made: Forward,
        rows: Rows,
        make_sink: Callable[[Counter[str]], Sink],
        check: Check | None,
    ) -> float:
        """The backwards of a forward. Returns the eps of the coarsest dtype in them."""
        out = made.out[slice(*rows)]
        sinks = [make_sink(made.recorder.uses) for _ in out]
        folded = made.folded
        if check is not None:
            sinks, folded = [RowSink(sink, check, row) for row, sink in enumerate(sinks)], []
        made.recorder.backward(out, made.leaves, sinks, folded)
        for number, name, values in self._rest(made.plan.rest, batch, rows):
            sinks[number].add(name, Piece(0, values))
        if made.plan.rest:
            for sink in sinks:
                sink.flush()
        frozen = (p.dtype for p in self.fixed.values() if p.is_floating_point())  # under adapters
        eps = (torch.finfo(dtype).eps for dtype in frozen)
        params = [*self.chosen.values(), *self.fixed.values()]
        return max(made.recorder.eps, tf32_eps(params), *eps)

    def _warn_sums(self, uses: Counter[str]) -> None:
        """Say once where gradients of many uses of a parameter are added up in 16 bits."""
        many = {name: count for name, count in uses.items() if count > MANY_CALLS}
        many = {name: count for name, count in many.items() if self.chosen[name].itemsize == 2}
        if not many or "sums" in self.said:
            return
        self.said.add("sums")
        name = max(many, key=many.__getitem__)
        logger.warning(
            "the model uses %r %d times in a forward, and autograd adds up the gradients of all "
            "uses in %s, with any gradient_computer: they are off by a percent after some 100, by "
            "half after 1000; expected float32 parameters (model.float()), with torch.autocast in "
            "the model's forward for speed",
            name,
            many[name],
            str(self.chosen[name].dtype).removeprefix("torch."),
        )

    # ---- checks ---------------------------------------------------------------------------------

    def _split(self, batch: tuple[Any, ...], evened: Evened | None = None) -> Split:
        """How a batch is checked: each time in other parts."""
        self._checks += 1
        alone, size = ALONE_FIRST if self._checks == 1 else 1, batches.size(batch)
        if any(getattr(module, "scale_grad_by_freq", False) for module in self.model.modules()):
            alone = size  # autograd would count how often words are in the samples of a part
        device = next(iter(self.chosen.values())).device
        return Split.of(size, alone, self._checks, device, evened)

    def _is_proved(self, batch: tuple[Any, ...], rows: Rows, check: Check, eps: float) -> bool:
        """Compare with plain autograd; whether the gradients of all samples are finite.

        Raises HooksError where they are not the same.
        """
        found = check.add_plain(asking(self, batch, check.split, slice(*rows)))
        whole = bool(check.finite.all())
        evened = None
        if whole:
            self._note_dependence(found)
            self._judge(check, batch, rows, eps)
            evened = check.evened(eps)
        check.left.clear()  # before the same comes again
        if not whole or evened is not None:
            return self._is_proved_apart(batch, rows, evened)
        return True

    def _is_proved_apart(self, batch: tuple[Any, ...], rows: Rows, evened: Evened | None) -> bool:
        """The same where samples without a finite gradient have to be left out, or with the
        gradients brought to similar sizes. Plain autograd comes first, then hooks once more.
        """
        check, eps = self._check_again(batch, rows, evened)
        assert check.known is not None
        self._note_dependence(set(check.known.sums))
        self._judge(check, batch, rows, eps)
        return not check.known.infinite

    def _check_again(
        self, batch: tuple[Any, ...], rows: Rows, evened: Evened | None
    ) -> tuple[Check, float]:
        """A check in another split, and the eps of the coarsest dtype."""
        split = self._split(batch, evened)
        known = known_sums(split, asking(self, batch, split, slice(*rows)), self.names)
        made = self._forward(batch)
        check = Check(split, self.chosen, len(made.out[slice(*rows)]), known)
        return check, self._backward(batch, made, rows, lambda _: NoSink(), check)

    def _note_dependence(self, names: set[str]) -> None:
        """Raise ValueError if f of no batch so far depends on any parameter."""
        if not names and not self._dependent:
            raise self.no_dependence()
        self._dependent = True

    def _judge(self, check: Check, batch: tuple[Any, ...], rows: Rows, eps: float) -> None:
        """Raise HooksError unless the gradients are those that they were compared with, or
        RandomNumbersError where these are not the same twice.
        """
        wrong = check.wrong(eps)
        if wrong:
            try:
                self.check_repeats(batch, eps)
            except RandomNumbersError:
                if self._structures:  # else nothing rests on a check that passed
                    self._disprove()
                raise
            if self._is_switch(check, batch, rows):
                return
            self._disprove()
            raise HooksError(
                f"hooks: the gradient by {listed(wrong)} is not that of plain autograd; is the "
                "parameter used outside of its module's forward (use a module that shares it, such "
                "as nn.Linear for F.linear), are samples mixed, or does the model take gradients "
                "itself?"
            )

    def _is_switch(self, check: Check, batch: tuple[Any, ...], rows: Rows) -> bool:
        """Whether gradients differ by a unit that rounding switches on or off.

        Training leaves the inputs of some ReLUs at 0 but for rounding, which differs with the
        number of samples: such a unit may be on in a batch, and off in a part of it. Then outputs
        are the same in the batch and in the parts, as they aren't where samples are mixed, and the
        gradients are right in another split.
        """
        with torch.no_grad():
            whole = self.outputs(self.chosen, batch).reshape(-1, len(check.finite))[slice(*rows)]
            for samples in check.split.parts:
                alone = self.outputs(self.chosen, batches.select(batch, samples))
                alone, expected = alone.reshape(-1, len(samples))[slice(*rows)], whole[:, samples]
                if not torch.allclose(alone, expected, rtol=SAME, atol=SAME * norm(expected)):
                    return False
        checks = (self._check_again(batch, rows, check.split.evened) for _ in range(SPLITS))
        return any(not again.wrong(eps) for again, eps in checks)

    def _disprove(self) -> None:
        """Let earlier gradients of this checkpoint no longer count."""
        if self.when_disproved is not None:
            self.when_disproved()

    def _remember(self, structure: tuple[Rows, int]) -> None:
        """Note a structure that was checked, now or before."""
        if len(self._structures) >= STRUCTURES:  # those that are forgotten are checked again
            self._structures.clear()
        self._structures.add(structure)
        every, checked = sum(self._batches.values()), len(self._structures)
        if checked >= MANY_STRUCTURES and 2 * checked > every and "structures" not in self.said:
            self.said.add("structures")
            logger.warning(
                "hooks: %d of %d batches had shapes or a control flow that no batch before had, "
                "and were checked against plain autograd, which doubles what their gradients cost. "
                "Batches of one size and samples padded to a few lengths (multiples of 64, say) "
                "are checked once each",
                checked,
                every,
            )

    def _is_plain(self, batch: tuple[Any, ...]) -> bool:
        """Whether plain autograd is the better way: one sample has nothing to be told apart from.

        Not where both sides of a layer are compressed, for autograd would form its gradient.
        """
        return batches.size(batch) == 1 and not self._factored

    def _forward_of_one(self, batch: tuple[Any, ...]) -> Forward | None:
        """``_forward`` of one sample; None where only plain autograd can follow it."""
        try:
            return self._forward(batch)
        except Exception as error:  # the plan needs batches of two and three, this sample doesn't
            if is_out_of_memory(error):
                raise
            if "one" not in self.said:
                self.said.add("one")
                logger.warning(
                    "hooks: a batch of one sample forms its gradients whole, which takes longer "
                    "than factored ones: %s",
                    error,
                )
            return None

    def _single(
        self, batch: tuple[Any, ...], make_sink: Callable[[Counter[str]], Sink], rows: Rows
    ) -> None:
        """Send the gradients of a batch of one sample to sinks: plain autograd's, by parameter."""
        if not self._dependent:
            self.check_repeats(batch)
        chosen = {name: p.detach().requires_grad_() for name, p in self.chosen.items()}
        outputs = self.in_graph(self.outputs, chosen, batch)
        with torch.enable_grad():
            outputs = outputs.reshape(-1)[slice(*rows)]
        sinks: list[Sink] = []
        found = set()

        def arrived(name: str, leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None  # which lets go of it
            assert grad is not None
            found.add(name)
            for piece in whole_pieces(grad):
                sinks[-1].add(name, piece)

        if outputs.requires_grad:
            for name, leaf in chosen.items():
                leaf.register_post_accumulate_grad_hook(partial(arrived, name))
        for out in outputs:
            sinks.append(make_sink(Counter()))
            if outputs.requires_grad:
                kept = len(sinks) < len(outputs)
                with wide_sums(chosen.values()):
                    out.backward(inputs=list(chosen.values()), retain_graph=kept)
            sinks[-1].flush()
        if not found and not self._dependent:
            raise self.no_dependence()
        self._dependent = True

    def _use(self, names: set[str]) -> None:
        """Note that f depends on these parameters."""
        if names - self._used:
            self._used |= names
            self._plans.clear()

    def _forward(
        self,
        batch: tuple[Any, ...],
        replay: Replay | None = None,
        first: Callable[[Recorder], None] | None = None,
    ) -> Forward:
        """Run the task on a batch with hooks listening.

        replay, first : what notes the model's calls, and is called after the first of them.
        """
        if not self._used:  # one sample says most of it
            one = batches.select(batch, slice(0, 1))
            unused = self._not_used()
            out = self.in_graph(self.outputs, {**self.chosen, **unused}, one)
            self._use_reached(unused, structure_of(one, out)[1])
            del out
        while True:
            plan = self._plan(batch)
            unused = self._not_used()
            size = batches.size(batch)
            with (
                Recorder(plan.hooked, size, plan.layouts, self.said, self._work) as recorder,
                replay.recording(partial(first, recorder)) if replay and first else nullcontext(),
            ):
                out = recorder.outputs(self, {**self.chosen, **unused}, batch)
                folded = last_of(recorder.folded)
            structure, leaves = structure_of(batch, out)
            self.check_leaves(leaves)
            if not self._use_reached(unused, leaves):
                return Forward(plan, recorder, out, structure, leaves, folded)

    def _not_used(self) -> dict[str, Tensor]:
        """The parameters that f has not been seen to depend on; a graph shows it if it does."""
        return {
            name: p.detach().requires_grad_()
            for name, p in self.chosen.items()
            if name not in self._used
        }

    def _use_reached(self, unused: dict[str, Tensor], leaves: list[Tensor]) -> bool:
        """Note those among the leaves of a graph; whether there are any."""
        reached = {id(leaf) for leaf in leaves}
        found = {name for name, p in unused.items() if id(p) in reached}
        self._use(found)
        return bool(found)

    def _rest(
        self, names: list[str], batch: tuple[Any, ...], rows: Rows
    ) -> Iterator[tuple[int, str, Tensor]]:
        """(number among ``rows``, name, gradient [B, numel]) of parameters without a hook, from the
        whole model.
        """
        if not names:
            return
        computer: AbstractGradientComputer = FunctionalGradientComputer(
            self.model, self.task, grad_wrt=names
        )
        try:
            every = computer.compute_rows(batch)
        except (RuntimeError, ValueError, TypeError) as error:  # vmap can't follow the model
            alone = isinstance(error, TypeError) and len(names) == len(self.names)
            if alone or is_out_of_memory(error):  # nothing is left for hooks to do
                raise
            warn_loop(self.said, "the whole model", error)
            computer = IterativeGradientComputer(self.model, self.task, grad_wrt=names)
            every = computer.compute_rows(batch)
        for number, grads in enumerate(every[slice(*rows)]):
            for name, g in grads.items():
                yield number, name, g.flatten(1) if g.dim() > 1 else g.unsqueeze(1)

    # ---- what to hook ---------------------------------------------------------------------------

    def _plan(self, batch: tuple[Any, ...]) -> Plan:
        """The plan for samples of these shapes."""
        row = most_hidden(batch)
        key = shapes_of(batch), row is None
        if key not in self._plans:
            if len(self._plans) >= PLANS:  # those that are forgotten are made again
                self._plans.clear()
            self._plans[key] = self._make_plan(
                batches.select(batch, slice(row or 0, (row or 0) + 1))
            )
        return self._plans[key]

    def _make_plan(self, batch: tuple[Any, ...]) -> Plan:
        """Hook the modules whose every call has one batch dimension, and the parents of the others.

        The others are modules that make something all samples share (the position biases of T5),
        and those whose parameters another module reads (the output projection of
        ``nn.MultiheadAttention``). What gets to the top is left to ``torch.func``.
        """
        scripted = [o.path for o in self._owned if isinstance(o.module, torch.jit.ScriptModule)]
        if scripted:
            raise HooksError(
                f"hooks: received a model with {listed(scripted)} of torch.jit, which hooks can't "
                "follow; expected the modules that these were made of"
            )
        left: dict[str, Owned] = {}
        unused = []
        for owned in self._owned:
            names = {local: name for local, name in owned.names.items() if name in self._used}
            if names:
                left[owned.path] = Owned(owned.path, owned.module, names)
            else:
                unused.append(owned)
        calls, _ = self._try(unused, batch) if unused else ({}, [])
        idle = [owned for owned in unused if not calls[owned.path]]
        rest: set[str] = set()
        while True:
            layouts, failed = self._try(list(left.values()), batch)
            if not failed:
                failed = self._not_for_each(list(left.values()), layouts, batch)
            root = left.get("")
            if root is not None and ("" in failed or not rule_for(root.module, set(root.names))):
                rest |= set(left.pop("").names.values())
                failed = [*failed, ""]
            sound = {n for path in left if path not in failed for n in left[path].names.values()}
            for path in failed:
                if path in left:
                    # One that is never called may share a parameter with one that is.
                    seen_elsewhere = rest if layouts[path] else rest | sound
                    hand_up(left, path, self.model, seen_elsewhere)
            if not failed:
                break
        for path, owned in list(left.items()):  # the run of the whole model needs no addition
            owned.names = {local: name for local, name in owned.names.items() if name not in rest}
            if not owned.names:
                del left[path]
        unseen = [name for name in self.names if name in rest]
        if unseen and "rest" not in self.said:
            self.said.add("rest")
            logger.warning(
                "hooks: the gradient by %s takes another run of the whole model, by torch.func",
                listed(unseen),
            )
        return Plan([*left.values(), *idle], layouts, unseen)

    def _not_for_each(
        self, hooked: list[Owned], layouts: dict[str, list[Layout]], batch: tuple[Any, ...]
    ) -> list[str]:
        """The modules with an output that all samples share, where one for each sample won't do.

        The model may repeat such an output itself, or take row 0 of it.
        """
        shared = [owned for owned in hooked if shares(layouts[owned.path])]
        if not shared:
            return []
        copies = batches.select(batch, [0] * SIZES[0])
        exact = self.outputs(self.chosen, copies).reshape(-1, SIZES[0])

        def unfit(some: list[Owned]) -> bool:
            try:
                with Recorder(some, SIZES[0], layouts) as recorder:
                    out = recorder.outputs(self, self.chosen, copies)
                    if reaches_other_samples(out, recorder.repeated):
                        return True
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                if is_out_of_memory(error):
                    raise
                return True
            return not torch.allclose(out, exact, rtol=1e-3, atol=1e-5, equal_nan=True)

        return [owned.path for owned in shared if unfit([owned])] if unfit(shared) else []

    def _try(
        self, hooked: list[Owned], batch: tuple[Any, ...]
    ) -> tuple[dict[str, list[Layout]], list[str]]:
        """The layouts of all calls of these modules, and which of them can't be hooked."""
        calls = []
        for size in SIZES:
            copies = batches.select(batch, [0] * size)
            with Recorder(hooked, size, None) as recorder:
                recorder.outputs(self, self.chosen, copies)
                calls.append(recorder.seen())
        layouts: dict[str, list[Layout]] = {}
        failed = []
        for owned in hooked:
            two, three = (seen.get(owned.path, []) for seen in calls)
            found = [
                Layout(tree_dims(a.inputs, b.inputs), tree_dims(a.outputs, b.outputs), a.written)
                for a, b in zip(two, three, strict=False)
            ]
            layouts[owned.path] = found
            if not found or len(two) != len(three) or not all(map(sees_samples, found, two)):
                failed.append(owned.path)
        return layouts, failed


def sees_samples(layout: Layout, seen: Seen) -> bool:
    """Whether every tensor of a call has one batch dimension, or can be given one.

    Not where no output is a tensor: an object of the module's own may hold some.
    """
    if UNCLEAR in layout.inputs or UNCLEAR in layout.outputs:
        return False
    if all(shape is None for shape in seen.outputs):
        return False
    return all(
        where is not SHARED or shape is None or len(shape) > 1
        for where, shape in zip(layout.outputs, seen.outputs, strict=True)
    )


def shares(calls: list[Layout]) -> bool:
    """Whether some output of a module is the same for all samples."""
    return any(SHARED in layout.outputs for layout in calls)


def reaches_other_samples(out: Tensor, repeated: list[Tensor]) -> bool:
    """Whether an output of a sample, out [R, B], depends on the part [1, ...] of another one."""
    if not (out.requires_grad and repeated):
        return False
    for sample in range(out.shape[1]):
        parts = torch.autograd.grad(
            out[:, sample].sum(), repeated, allow_unused=True, retain_graph=True
        )
        for part in parts:
            if part is not None:
                others = torch.arange(len(part), device=part.device) != sample
                if bool(part[others].any()):
                    return True
    return False


def most_hidden(batch: tuple[Any, ...]) -> int | None:
    """The sample of which masks [B, T] of 0 and 1 hide the most; None where they hide nothing.

    Models may drop a mask that hides nothing, and then run other code: transformers' T5 does. A
    sample with padding runs the code of a batch with padding.
    """
    hidden: Tensor | None = None
    for t in batches.leaves(batch):
        if t.dim() == 2 and not t.is_floating_point() and not t.is_complex() and t.numel():
            low, high = t.aminmax()
            if int(low) == 0 and int(high) <= 1:
                zeros = (t == 0).sum(1)
                hidden = zeros if hidden is None else hidden + zeros
    return None if hidden is None else int(hidden.argmax())


def shapes_of(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Shapes and dtypes of a batch's samples; other parts count by their content."""
    return batches.structure(batch)


def owned_modules(model: nn.Module, chosen: set[str]) -> list[Owned]:
    """The modules that hold chosen parameters themselves, in the model's order."""
    first = {id(p): name for name, p in model.named_parameters()}
    found = []
    for path, module in model.named_modules():
        named = module.named_parameters(recurse=False, remove_duplicate=False)
        names = {local: first[id(p)] for local, p in named if first[id(p)] in chosen}
        if names:
            found.append(Owned(path, module, names))
    return found


def hand_up(left: dict[str, Owned], path: str, model: nn.Module, but: set[str]) -> None:
    """Give a module's parameters to its parent, except those in ``but``."""
    owned = left.pop(path)
    above, _, own = path.rpartition(".")
    names = {f"{own}.{local}": name for local, name in owned.names.items() if name not in but}
    if names:
        parent = left.setdefault(above, Owned(above, model.get_submodule(above), {}))
        parent.names.update(names)


def whole_pieces(grad: Tensor) -> Iterator[Piece]:
    """The gradient of one sample by one parameter; of an embedding's, the rows looked up."""
    grad = dense(grad)
    if not grad.numel():
        return
    flat = grad.reshape(len(grad), -1) if grad.dim() > 1 else grad.reshape(1, -1)
    width = flat.shape[1]
    rows = (flat != 0).any(1).nonzero().flatten().cpu().numpy()
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    if len(rows) * width + len(runs) * CALL_ENTRIES > flat.numel():
        runs = [np.arange(len(flat))]
    for run in runs:
        start = int(run[0])
        yield Piece(start * width, flat[start : start + len(run)].reshape(1, -1))


def listed(names: list[str]) -> str:
    """A few names, for messages."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[:5])) + more
