"""Where the parts of per-sample gradients go: into a projection, or side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastproj.factored import FactoredProjector, Sides
from fastproj.projector import Projector
from fastproj.trak.gradients import base
from fastproj.trak.gradients.parts import Part, Piece, Product, Watched, Workspace
from fastproj.trak.gradients.proof import (
    Asked,
    Evened,
    Known,
    Split,
    is_finite,
    wide,
)
from fastproj.trak.gradients.running import norm, norms, rounding_share
from fastproj.trak.gradients.scales import for_each, unscaled

# Numbers of a sample that wait until one call projects them. Compressed gradients of a layer are so
# few that the calls would take longer than the arithmetic.
GATHERED = 1 << 16

# Of a gradient's numbers: factors of a product are kept up to this share. At the end they are
# copied side by side, and both together are then no more than a sum of gradients would be.
KEPT_SHARE = 0.5


class Sink(Protocol):
    """Takes parts in any order."""

    def add(self, name: str, part: Part) -> None:
        """One more part of the gradient by the parameter ``name``."""

    def flush(self) -> None:
        """Use what was kept for parts that did not come. More may come, before another flush."""


class CollectingSink:
    """The gradients themselves: name -> [B, *shape]."""

    def __init__(self, params: Mapping[str, Tensor], size: int) -> None:
        self.grads = {name: p.new_zeros(size, *p.shape) for name, p in params.items()}

    def add(self, name: str, part: Part) -> None:
        """Add a part to what is there."""
        flat = self.grads[name].view(len(self.grads[name]), -1)  # [B, numel]
        for piece in part.pieces():
            piece.add_to(flat)

    def flush(self) -> None:
        """Nothing was kept."""


class ProjectingSink:
    """Their projection, [B, proj_dim]: each piece is projected with its row offset and let go.

    The matrix of a parameter costs as much as its gradients to multiply by, so those of a
    parameter that is used several times are summed first, for as many as GRAD_BYTES allow. Where
    all are products of factors that are small beside them, as of a layer that is called once for
    each position, the factors are put side by side instead: the sum of the products is the product
    of these, and is formed piece by piece.

    Parameters
    ----------
    projector : a ``Projector`` or ``FactoredProjector``, or a ``ScaledProjector`` of one.
    uses : how many parts there will be of a parameter, at most; but for those of embeddings, which
        are a few rows and not worth a sum.
    work : memory for the pieces of gradients.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        size: int,
        projector: Any,
        model_id: int,
        uses: Mapping[str, int],
        work: Workspace | None = None,
    ) -> None:
        self.model_id = model_id
        self.work = Workspace() if work is None else work
        self.sides: dict[str, Sides] = {}
        projector, factors = unscaled(projector)
        outer = projector
        if isinstance(projector, FactoredProjector):
            outer = projector.outer
            self.sides = {name: projector.sides(name, model_id) for name in params}
            rows = {name: projector.inner_rows(name) for name in params}
            self.sizes = {name: where.stop - where.start for name, where in rows.items()}
            self.offsets = {name: where.start for name, where in rows.items()}
        else:
            self.sizes = {name: p.numel() for name, p in params.items()}
            starts = accumulate(self.sizes.values(), initial=0)
            self.offsets = dict(zip(self.sizes, starts, strict=False))
        self.projectors = for_each(outer, factors, list(params))
        first = next(iter(params.values()))
        wide = any(p.dtype == torch.float64 for p in params.values())
        self.out = first.new_zeros(
            size, projector.proj_dim, dtype=torch.float64 if wide else torch.float32
        )
        self.to_come: dict[str, int] = {}  # parts, of the parameters whose parts are summed
        left = base.GRAD_BYTES
        for name, count in uses.items():
            needed = size * self.sizes[name] * self.out.element_size()
            if count > 1 and needed <= left:
                self.to_come[name] = count
                left -= needed
        self.sums: dict[str, Tensor] = {}
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {}  # factors of products to be summed
        self.waiting: list[Waiting] = []
        self.gathered = 0  # numbers of a sample that wait

    def add(self, name: str, part: Part) -> None:
        """Project a part piece by piece, or add it to those to be projected with the last one."""
        if name not in self.to_come or part.few_rows:
            self._project_part(name, part)
            return
        sides = self.sides.get(name)
        if sides is not None or not part.as_product(partial(self._keep, name)):
            for piece in part.pieces() if sides is None else part.compressed(sides):
                if name not in self.sums:
                    self.sums[name] = piece.values.new_zeros(len(self.out), self.sizes[name])
                piece.add_to(self.sums[name])
        self.to_come[name] -= 1
        if not self.to_come[name]:
            self._project_sum(name)

    def flush(self) -> None:
        """Project what waits, and the sums of which fewer parts came."""
        for name in {**self.sums, **self.kept}:
            self._project_sum(name)
        self._project_waiting()

    def _keep(self, name: str, left: Tensor, right: Tensor) -> bool:
        """Keep the factors of a product, if those of all calls will be small beside the gradient.

        The calls to come are taken to be like this one.
        """
        kept = self.kept.get(name, [])
        numbers = (left.numel() + right.numel()) * self.to_come[name]
        numbers += sum(one.numel() + other.numel() for one, other in kept)
        if numbers > KEPT_SHARE * len(self.out) * self.sizes[name]:
            return False
        # Copies: they may be views of much larger tensors, and be written to later.
        self.kept[name] = [*kept, (left.clone(), right.clone())]
        return True

    def _project_sum(self, name: str) -> None:
        """Project what was summed up of the gradient by one parameter."""
        if name in self.sums:
            self._project(name, Piece(0, self.sums.pop(name)))
        if name in self.kept:
            lefts, rights = zip(*self.kept.pop(name), strict=True)
            self._project_part(name, Product(torch.cat(lefts, 1), torch.cat(rights, 1), self.work))

    def _project_part(self, name: str, part: Part) -> None:
        """Project a part as it comes."""
        sides = self.sides.get(name)
        if sides is None and part.as_product(partial(self._add_product, name)):
            return
        for piece in part.pieces() if sides is None else part.compressed(sides):
            self._project(name, piece)

    def _add_product(self, name: str, left: Tensor, right: Tensor) -> bool:
        offset = self.offsets[name]
        return self.projectors[name].add_product(
            left, right, self.model_id, row_offset=offset, out=self.out
        )

    def _project(self, name: str, piece: Piece) -> None:
        values = piece.values
        if self.out.dtype == torch.float64:
            values = values.double()
        offset, projector = self.offsets[name] + piece.start, self.projectors[name]
        if isinstance(piece.rows, Tensor):
            part = projector.project(values, self.model_id, row_offset=offset)  # [b, k]
            self.out.index_add_(0, piece.rows, part)
        elif self.sides and piece.rows == slice(None) and values.shape[1] < GATHERED:
            self.waiting.append(Waiting(offset, projector, values.clone()))  # it may be reused
            self.gathered += values.shape[1]
            if self.gathered >= GATHERED:
                self._project_waiting()
        else:
            out = self.out[piece.rows]
            projector.project(values, self.model_id, row_offset=offset, out=out, accumulate=True)

    def _project_waiting(self) -> None:
        """Project what waits: neighbours among the rows of the matrix in one call."""
        self.gathered = 0
        self.waiting.sort(key=lambda one: one.offset)
        while self.waiting:
            run = [self.waiting.pop(0)]
            while self.waiting and run[-1].is_followed_by(self.waiting[0]):
                run.append(self.waiting.pop(0))
            values = torch.cat([one.values for one in run], 1)
            first = run[0]
            first.projector.project(
                values, self.model_id, row_offset=first.offset, out=self.out, accumulate=True
            )


class Waiting(NamedTuple):
    """Values [B, n] to be projected from row ``offset`` on."""

    offset: int
    projector: Projector
    values: Tensor

    def is_followed_by(self, other: Waiting) -> bool:
        """Whether one call can project both."""
        end = self.offset + self.values.shape[1]
        return end == other.offset and self.projector is other.projector


class ModuleSink:
    """A projection for each module, in ``outs``: what it adds to the projection of all."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        size: int,
        projector: Any,
        model_id: int,
        uses: Mapping[str, int],
        work: Workspace | None = None,
    ) -> None:
        self._sinks = {
            module: ProjectingSink(params, size, projector, model_id, uses, work)
            for module in modules_of(params)
        }
        self.outs = [sink.out for sink in self._sinks.values()]

    def add(self, name: str, part: Part) -> None:
        """Project a part with others of its module."""
        self._sinks[module_of(name)].add(name, part)

    def flush(self) -> None:
        """Project what waits."""
        for sink in self._sinks.values():
            sink.flush()


def module_of(name: str) -> str:
    """The module that a parameter belongs to; the model itself is ""."""
    return name.rpartition(".")[0]


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules that parameters belong to, each once, in the order of their first."""
    return list(dict.fromkeys(map(module_of, names)))


class RowSink:
    """Passes on the parts of one row of outputs, and lets a check of all rows see them."""

    def __init__(self, sink: Sink, check: Check, row: int) -> None:
        self.sink = sink
        self.check = check
        self.row = row

    def add(self, name: str, part: Part) -> None:
        """One more part of the gradient by the parameter ``name``."""
        self.sink.add(name, Watched(part, partial(self.check.subtract, name, row=self.row)))

    def flush(self) -> None:
        """As of the sink."""
        self.sink.flush()


class NoSink:
    """Takes parts that nobody wants but to look at."""

    def add(self, name: str, part: Part) -> None:
        """Form it, and let go of it."""
        for _ in part.pieces():
            pass

    def flush(self) -> None:
        """Nothing was kept."""


class Check:
    """Compares the weighted sum of all gradients with plain autograd's.

    ``subtract`` takes the gradients that are checked. Plain autograd's are known before, or added
    afterwards by ``add_plain``, which takes less memory: the sum grows while a graph is let go of.

    Attributes
    ----------
    sizes : [rows, B], float64: the norm of each gradient, as if its pieces were orthogonal.
    finite : [B], bool: whether a sample's gradient is, as far as that was looked at.
    """

    def __init__(
        self, split: Split, params: Mapping[str, Tensor], rows: int, known: Known | None = None
    ) -> None:
        self.split = split
        self.params = params
        self.known = known
        self.finite = torch.ones_like(split.weights, dtype=torch.bool)
        self.norms: dict[str, float] = {}  # of the sums
        self.left: dict[str, Tensor] = {}
        if known is not None:
            self.norms = {name: norm(g) for name, g in known.sums.items()}
            self.left = {name: g.view(-1) for name, g in known.sums.items()}
        self.sizes = split.weights.new_zeros(rows, len(split.weights))

    def subtract(self, name: str, piece: Piece, row: int) -> None:
        """Subtract the samples' part from what is expected."""
        values, weights = piece.values, self.split.weights_of(row)
        samples = piece.rows
        weights = weights[samples]
        self.sizes[row, samples] = torch.hypot(self.sizes[row, samples], norms(values))
        if self.known is not None and self.known.infinite:
            counts = self.known.counts[samples]
            self.finite[samples] &= torch.isfinite(values).all(1)
            values, weights = values[counts], weights[counts]  # 0 times inf would be NaN
        dtype = wide(values)
        part = weights.to(dtype) @ values.to(dtype)
        if name not in self.left:
            self.left[name] = part.new_zeros(self.params[name].numel())
        self.left[name][piece.start : piece.start + len(part)] -= part

    def add_plain(self, gradient_of: Asked) -> set[str]:
        """Add plain autograd's gradients. Returns the names of the parameters that they are by.

        ``finite`` becomes False where they or the sums are not.
        """
        self.norms = {name: norm(g) for name, g in self.left.items()}
        if not all(map(math.isfinite, self.norms.values())):
            self.finite[:] = False
        found = set()

        def add(name: str, g: Tensor) -> None:
            found.add(name)
            if name not in self.left:
                self.left[name] = torch.zeros(g.numel(), dtype=wide(g), device=g.device)
            self.left[name] += g.reshape(-1)
            if not is_finite(g):
                self.finite[:] = False

        for samples in self.split.parts:
            if self.finite.all():
                gradient_of(samples, add)
        return found

    def wrong(self, eps: float = 0.0) -> list[str]:
        """The parameters whose gradient isn't the known one, by more than rounding.

        eps : of the coarsest dtype that the model computed in, if that isn't its parameters'.

        Gradients that are not finite by autograd either are no fault of the hooks: the check of
        features names such samples.
        """
        if self.known is not None:
            overflowing = [name for name, size in self.norms.items() if not math.isfinite(size)]
            if overflowing:
                return overflowing if self.finite.all() else []
            if bool((self.finite & ~self.known.counts).any()):
                return self.known.infinite
        total = sum(size**2 for size in self.norms.values()) ** 0.5
        found = []
        for name, left in self.left.items():
            share = rounding_share(eps, self.params[name].dtype)
            allowed = share * (self.norms.get(name, 0.0) + 0.1 * total) + self.split.noise
            if not norm(left) <= allowed:
                found.append(name)
        return found

    def evened(self, eps: float = 0.0) -> Evened | None:
        """The factors of a second sum, where gradients are lost in this one beside larger ones.

        eps : as for ``wrong``.
        """
        dtypes = (p.dtype for p in self.params.values())
        eps = max(eps, *(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes)))
        counts = torch.ones_like(self.finite) if self.known is None else self.known.counts
        return Evened.of(self.sizes, counts, eps)
