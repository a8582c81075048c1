"""Hooks on modules: what goes in and out of them, and what follows for their parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from fastproj.trak.gradients.attention import no_fast_path
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads
from fastproj.trak.gradients.layout import SHARED, BatchDim, HooksError, by_sample, tree_shapes
from fastproj.trak.gradients.local import local_gradients
from fastproj.trak.gradients.parts import Part, Workspace
from fastproj.trak.gradients.rules import rule_for
from fastproj.trak.gradients.sinks import Sink
from fastproj.trak.tasks.training import SeveralOutputs

Dims = list[BatchDim | None]

WIDTH = 64  # entries of a row that are compared
ROUNDING, FAINT = 1e-2, 1e-4  # of a row, and of the largest: what is not called a difference


@dataclass
class Owned:
    """A module with parameters to differentiate by: their names in it, and in the model."""

    path: str
    module: nn.Module
    names: dict[str, str]


@dataclass
class Layout:
    """The batch dimensions of one call of a module; ``written`` is which outputs are written to by
    later operations.
    """

    inputs: Dims
    outputs: Dims
    written: list[bool]


class Seen(NamedTuple):
    """What is noted of one call of a module: the shapes of the leaves, and which outputs have been
    written to since.
    """

    inputs: list[torch.Size | None]
    outputs: list[torch.Size | None]
    written: list[bool]


class Folded(NamedTuple):
    """An output of a module with a dimension of ``rows``, several of each sample."""

    edge: GradientEdge
    dim: BatchDim
    rows: int


def last_of(folded: list[Folded]) -> list[Folded]:
    """Those that no later one with as many rows depends on."""
    below: dict[int, set[Any]] = {}
    kept = []
    for f in reversed(folded):
        nodes = below.setdefault(f.rows, set())
        if f.edge.node in nodes:
            continue
        kept.append(f)
        found = [f.edge.node]
        while found:
            node = found.pop()
            if node not in nodes:
                nodes.add(node)
                found += (next_ for next_, _ in node.next_functions if next_ is not None)
    return kept


class Recorder:
    """Hooks on modules, for one forward and backward of one batch.

    With layouts of None only what goes in and out of the modules is noted.
    """

    def __init__(
        self,
        hooked: list[Owned],
        size: int,
        layouts: dict[str, list[Layout]] | None,
        warned: set[str] | None = None,
        work: Workspace | None = None,
    ) -> None:
        self.hooked = hooked
        self.size = size
        self.layouts = layouts
        self.warned = set() if warned is None else warned
        self.work = Workspace() if work is None else work
        self._seen: dict[str, list[tuple[list[torch.Size | None], list[Any]]]] = {}
        self.uses: Counter[str] = Counter()
        self.eps = 0.0  # of the coarsest dtype that the model computed in
        self.repeated: list[Tensor] = []  # outputs that were shared, one for each sample
        self.folded: list[Folded] = []  # outputs with several rows of a sample in one dimension
        self.divided = True  # whether the rows of these are of the samples that they count to
        self._calls: Counter[str] = Counter()
        self._anchors: dict[Any, Tensor] = {}
        self._sink: Sink | None = None
        self._last = True  # whether no other row of outputs is to come
        self._handles: list[Any] = []
        self._listening = False

    def __enter__(self) -> Recorder:
        for owned in self.hooked:
            hook = self._hook_for(owned)
            self._handles.append(
                owned.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.repeated.clear()  # a graph that its own hooks lead to is never freed
        self.folded.clear()

    def outputs(
        self, computer: AbstractGradientComputer, weights: Grads, batch: tuple[Any, ...]
    ) -> Tensor:
        """The outputs of each sample of a batch, [1, B] or more, with hooks listening."""
        with torch.enable_grad(), no_fast_path(), self._listen():
            out = computer.outputs(weights, batch)
        if isinstance(computer.task, SeveralOutputs):
            return out
        if out.shape != (self.size,):
            raise HooksError(
                f"hooks: {type(computer.task).__name__}.outputs returned {list(out.shape)} for a "
                f"batch of {self.size}; expected [{self.size}]"
            )
        return out.unsqueeze(0)

    def backward(
        self, outputs: Tensor, leaves: list[Tensor], sinks: list[Sink], folded: list[Folded]
    ) -> None:
        """The backward of the sum of each row of ``outputs``, [rows, B], into that row's sink.

        leaves : of the graph behind ``outputs``: anchors, and inputs that the model differentiates
            by.
        folded : outputs of modules; ``divided`` says afterwards whether their rows are those of the
            samples that they count to.
        """
        self.repeated.clear()  # their memory
        if not leaves:
            return
        factors = factors_for(outputs[0])
        scaled: dict[Folded, Tensor] = {}
        plain: dict[Folded, Tensor] = {}
        if folded:
            edges = [f.edge for f in folded]
            grads = torch.autograd.grad(
                outputs[0], edges, factors, allow_unused=True, retain_graph=True
            )
            pairs = zip(folded, grads, strict=True)
            scaled = {f: thin(g, f.dim, self.size) for f, g in pairs if g is not None}
            del grads, pairs

        def note(f: Folded, grads: tuple[Tensor | None, ...]) -> None:
            g = grads[f.edge.output_nr]
            if g is not None:
                plain[f] = thin(g, f.dim, self.size)

        handles = [f.edge.node.register_prehook(partial(note, f)) for f in folded]
        for number, (out, sink) in enumerate(zip(outputs, sinks, strict=True), 1):
            self._sink, self._last = sink, number == len(sinks)
            torch.autograd.grad(
                out, leaves, torch.ones_like(out), allow_unused=True, retain_graph=not self._last
            )
            sink.flush()  # before the next row has as much to keep
            while handles:
                handles.pop().remove()
        self.divided = all(
            is_scaled(scaled[f], g, factors) for f, g in plain.items() if f in scaled
        )

    def seen(self) -> dict[str, list[Seen]]:
        """All calls of each module, where only these were noted. Lets go of what they returned."""
        found = {
            path: [
                Seen(inputs, tree_shapes(leaves), written_to(leaves)) for inputs, leaves in calls
            ]
            for path, calls in self._seen.items()
        }
        self._seen.clear()
        return found

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within the block, calls of the modules go unheard."""
        listening, self._listening = self._listening, False
        try:
            yield
        finally:
            self._listening = listening

    @contextmanager
    def _listen(self) -> Iterator[None]:
        self._listening = True
        try:
            yield
        finally:
            self._listening = False

    def _hook_for(self, owned: Owned) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not self._listening:  # a module that is run again for its gradients
                return None
            number = self._calls[owned.path]
            self._calls[owned.path] += 1
            if self.layouts is None:
                output = pytree.tree_map(self._copied, output)
                seen = tree_shapes((args, kwargs)), pytree.tree_leaves(output)
                self._seen.setdefault(owned.path, []).append(seen)
                return output
            layouts = self.layouts.get(owned.path, [])
            if number >= len(layouts):
                raise HooksError(
                    f"hooks: {owned.path or 'the model'} was called more often than for the sample "
                    "that was tried"
                )
            return self._follow(owned, layouts[number], args, kwargs, output)

        return hook

    def _copied(self, t: Any) -> Any:
        """A copy of an output, as part of a graph even where no input is."""
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        if t.requires_grad:
            return t.clone()
        key = t.device, t.dtype
        if key not in self._anchors:
            zero = torch.zeros((), device=t.device, dtype=t.dtype)
            self._anchors[key] = zero.requires_grad_()
        return t + self._anchors[key]

    def _anchored(self, t: Any, written: bool) -> Any:
        """An output, as part of a graph even where no input is.

        It is a copy where it isn't part of one, and where it is a view that is written to later:
        that would hide the gradient by it.
        """
        if isinstance(t, Tensor) and t.requires_grad and not (written and t._is_view()):
            return t
        return self._copied(t)

    def _follow(self, owned: Owned, layout: Layout, args: Any, kwargs: Any, output: Any) -> Any:
        """Note a call, and wait for the gradient by its output."""
        leaves, spec = pytree.tree_flatten(output)
        if len(leaves) != len(layout.outputs):
            raise HooksError(f"hooks: {owned.path} returned other things than when tried")
        leaves = list(map(self._anchored, leaves, layout.written))
        tensors: list[Tensor] = []
        places: list[int] = []
        dims: list[BatchDim] = []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad:
                continue
            where = layout.outputs[i]
            if where is SHARED:  # as embeddings of positions are: one for each sample
                own = leaf.shape[1:] if leaf.shape[0] == 1 else leaf.shape
                leaves[i] = leaf = leaf.expand(self.size, *own).contiguous()
                self.repeated.append(leaf)
                where = BatchDim(0, False)
            if where.folded and self.size > 1 and leaf.grad_fn is not None:
                edge = GradientEdge(leaf.grad_fn, leaf.output_nr)
                self.folded.append(Folded(edge, where, leaf.shape[where.dim]))
            tensors.append(leaf)
            places.append(i)
            dims.append(where)
        call = Call(
            owned,
            layout.inputs,
            layout.outputs,
            (args, kwargs),
            self.size,
            len(leaves),
            places,
            self.warned,
            self.work,
            autocast_of(leaves),
            torch.get_default_device(),
        )
        if not looks_up(owned):
            self.uses.update(owned.names.values())

        def done(*grads: Tensor | None) -> None:
            if self._sink is None:  # the model takes gradients within its forward
                return
            given = [
                None if g is None else by_sample(g, where, self.size)
                for g, where in zip(grads, dims, strict=True)
            ]
            found = [torch.finfo(g.dtype).eps for g in given if g is not None]
            if found:
                self.eps = max(self.eps, *found)
                for name, part in call.parts(given):
                    self._sink.add(owned.names[name], part)
            if self._last:
                call.arguments = ((), {})  # let go of the activations

        # ``done`` must not lead to ``tensors``: a graph that its own hooks lead to is never freed.
        if len(tensors) == 1:
            tensors[0].register_hook(done)
        elif tensors:
            for i, leaf in zip(places, Together.apply(done, *tensors), strict=True):
                leaves[i] = leaf
        return pytree.tree_unflatten(leaves, spec)


class Together(torch.autograd.Function):
    """Copies of several tensors, and a call with the gradients by all of them at once.

    Copies, for one tensor may be made from another, whose gradient would hold its own.
    """

    @staticmethod
    def forward(ctx: Any, done: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[...] each, as they are."""
        ctx.done = done
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as they are; None by what nothing depends on."""
        ctx.done(*grads)
        return None, *grads


def written_to(leaves: list[Any]) -> list[bool]:
    """Which copies have been written to: their versions begin at 0."""
    return [isinstance(t, Tensor) and t.is_floating_point() and t._version > 0 for t in leaves]


def factors_for(out: Tensor) -> Tensor:
    """Factors [B] that differ among neighbours: powers of 2, so that gradients round alike."""
    number = torch.arange(len(out), device=out.device)
    return (2.0 ** (number % 5) * (1 - 2 * (number // 5 % 2))).to(out.dtype)


def thin(g: Tensor, dim: BatchDim, size: int) -> Tensor:
    """A gradient as [B, rows of a sample, n], with WIDTH entries of each row or fewer."""
    rows = by_sample(g, dim, size)
    if not rows.numel():
        return rows.new_empty(size, 0, 0)
    rows = rows.reshape(*rows.shape[:2], -1)
    return rows[..., :: -(-rows.shape[2] // WIDTH)].clone()


def is_scaled(scaled: Tensor, g: Tensor, factors: Tensor) -> bool:
    """Whether ``scaled`` is g [B, rows, n] times factors [B], but for rounding."""
    if not g.numel():
        return True
    expected = g * factors.to(g.dtype).view(-1, 1, 1)
    off, own = (t.abs().amax(2) for t in (scaled - expected, expected))
    return bool((off <= ROUNDING * own + FAINT * own.max()).all())


def looks_up(owned: Owned) -> bool:
    """Whether the gradient by a module's parameters is of a few of their rows."""
    rule = rule_for(owned.module, set(owned.names))
    return rule is not None and rule.looks_up


@dataclass
class Call:
    """One call of a module: its inputs, for the gradients of its parameters later."""

    owned: Owned
    dims: Dims
    outputs: Dims
    arguments: Any
    size: int
    n_outputs: int
    places: list[int]
    warned: set[str]
    work: Workspace
    autocast: torch.autocast
    device: torch.device  # the default one

    def parts(self, grads: list[Tensor | None]) -> Iterator[tuple[str, Part]]:
        """The per-sample gradients of the parameters from those by the outputs, [B, ...] each."""
        module, names = self.owned.module, set(self.owned.names)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise HooksError(f"hooks: {self.owned.path} is in training mode, where samples mix")
        leaves, _ = pytree.tree_flatten(self.arguments)
        rule = rule_for(module, names)
        single = len(leaves) == 1 and len(grads) == 1 and self.n_outputs == 1
        if rule is not None and single and grads[0] is not None:
            x, g = sample_first(leaves[0], self.dims[0], self.size), grads[0]
            if rule.by_rows:
                x, g = by_row(x, self.dims[0]), by_row(g, self.outputs[0])
            if x.dim() >= rule.least and (not rule.by_rows or x.dim() == g.dim()):
                x, g = in_one_dtype(module, names, x.detach(), g)
                yield from rule.parts(module, x, g, names, self.work)
                return
        arguments = [
            sample_first(leaf, where, self.size) if where is not SHARED else leaf
            for leaf, where in zip(leaves, self.dims, strict=True)
        ]
        with self.autocast, new_tensors_on(self.device):
            found = list(
                local_gradients(
                    module,
                    names,
                    arguments,
                    self.dims,
                    pytree.tree_structure(self.arguments),
                    self.places,
                    grads,
                    self.size,
                    self.warned,
                )
            )
        yield from found


def autocast_of(leaves: list[Any]) -> torch.autocast:
    """The autocast that is on now, where the outputs of a module are."""
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
    return torch.autocast(
        kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )


def new_tensors_on(device: torch.device) -> AbstractContextManager[Any]:
    """Torch's default device is ``device``. In a backward it is the CPU, whatever was set."""
    return nullcontext() if device == torch.get_default_device() else device


def in_one_dtype(module: nn.Module, names: set[str], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's input and the gradient by its output in the dtype that holds both and its
    parameters: under autocast they differ. Indices stay as they are.
    """
    dtype = reduce(torch.promote_types, (module.get_parameter(name).dtype for name in names))
    dtype = torch.promote_types(dtype, g.dtype)
    if x.is_floating_point():
        dtype = torch.promote_types(dtype, x.dtype)
        x = x.to(dtype)
    return x, g.to(dtype)


def by_row(t: Tensor, where: BatchDim | None) -> Tensor:
    """[B, n, ...] of a tensor with the samples first, n = 1 unless it was folded.

    0-dimensional where the layer's batch isn't its first dimension: its rule can't be used then.
    """
    if where is not SHARED and where.dim != 0:
        return t.new_empty(())
    return t if where is not SHARED and where.folded else t.unsqueeze(1)


def sample_first(t: Any, where: BatchDim | None, size: int) -> Tensor:
    """``t`` [B, ...] with the samples first; a shared [1, ...] is repeated."""
    if where is SHARED:
        return t.expand(size, *t.shape[1:]) if t.shape[0] == 1 else t.expand(size, *t.shape)
    return by_sample(t, where, size)
