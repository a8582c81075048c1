"""Where the pieces of per-sample gradients go: into a projection, or side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastproj.projector import Projector
from fastproj.trak.gradients import base
from fastproj.trak.gradients.proof import Proof, wide


class Piece(NamedTuple):
    """Entries ``start .. start + n`` of the flattened gradient by one parameter.

    ``values`` are [b, n], of the samples ``rows`` [b], or of all where that is None. A gradient is
    the sum of the pieces that are given for it; where there are none it is zero.
    """

    start: int
    values: Tensor
    rows: Tensor | None = None


class Sink(Protocol):
    """Takes pieces in any order."""

    def add(self, name: str, piece: Piece) -> None:
        """One more piece of the gradient by the parameter ``name``."""

    def close(self) -> None:
        """There are no more pieces."""


class CollectingSink:
    """The gradients themselves: name -> [B, *shape]."""

    def __init__(self, params: Mapping[str, Tensor], size: int) -> None:
        self.grads = {name: p.new_zeros(size, *p.shape) for name, p in params.items()}

    def add(self, name: str, piece: Piece) -> None:
        """Add a piece to what is there."""
        flat = self.grads[name].view(len(self.grads[name]), -1)  # [B, numel]
        target = flat[:, piece.start : piece.start + piece.values.shape[1]]
        if piece.rows is None:
            target += piece.values
        else:
            target.index_add_(0, piece.rows, piece.values)

    def close(self) -> None:
        """Nothing is left to do."""


class ProjectingSink:
    """Their projection, [B, proj_dim]: each piece is projected with its row offset and let go.

    The matrix of a parameter costs as much as its gradients to multiply by, so those of a
    parameter that is used several times (``uses``) are summed first where GRAD_BYTES allow it.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        size: int,
        projector: Projector,
        model_id: int,
        uses: Mapping[str, int],
    ) -> None:
        self.projector = projector
        self.model_id = model_id
        self.offsets = {}
        offset = 0
        for name, p in params.items():
            self.offsets[name] = offset
            offset += p.numel()
        first = next(iter(params.values()))
        wide = any(p.dtype == torch.float64 for p in params.values())
        self.out = first.new_zeros(
            size, projector.proj_dim, dtype=torch.float64 if wide else torch.float32
        )
        summed = [
            name
            for name, count in uses.items()
            if count > 1
            and size * params[name].numel() * params[name].element_size() <= base.GRAD_BYTES
        ]
        self.params = {name: params[name] for name in summed}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, piece: Piece) -> None:
        """Project a piece, or add it to those to be projected at the end."""
        if name in self.params and piece.rows is None:
            if name not in self.sums:
                self.sums[name] = piece.values.new_zeros(len(self.out), self.params[name].numel())
            self.sums[name][:, piece.start : piece.start + piece.values.shape[1]] += piece.values
        else:
            self._project(name, piece)

    def close(self) -> None:
        """Project the sums."""
        for name in list(self.sums):
            self._project(name, Piece(0, self.sums.pop(name)))

    def _project(self, name: str, piece: Piece) -> None:
        values = piece.values
        if self.out.dtype == torch.float64:
            values = values.double()
        offset = self.offsets[name] + piece.start
        if piece.rows is None:
            self.projector.project(
                values, self.model_id, row_offset=offset, out=self.out, accumulate=True
            )
        else:
            part = self.projector.project(values, self.model_id, row_offset=offset)  # [b, k]
            self.out.index_add_(0, piece.rows, part)


class RowSink:
    """Passes on the pieces of one row of outputs, and its share of them to a check of all rows."""

    def __init__(self, sink: Sink, check: CheckingSink, share: float) -> None:
        self.sink = sink
        self.check = check
        self.share = share

    def add(self, name: str, piece: Piece) -> None:
        """One more piece of the gradient by the parameter ``name``."""
        self.sink.add(name, piece)
        self.check.add(name, piece._replace(values=piece.values * self.share))

    def close(self) -> None:
        """There are no more pieces."""
        self.sink.close()


class NoSink:
    """Takes pieces that nobody wants."""

    def add(self, name: str, piece: Piece) -> None:
        """Let go of it."""

    def close(self) -> None:
        """Nothing is left to do."""


class CheckingSink:
    """Passes pieces on, and compares the weighted sum of all gradients with a known one."""

    def __init__(self, sink: Sink, proof: Proof, params: Mapping[str, Tensor]) -> None:
        self.sink = sink
        self.proof = proof
        self.params = params
        self.finite = torch.ones_like(proof.counts)  # [B], whether a sample's gradient is
        self.sizes = {name: norm(g) for name, g in proof.sums.items()}
        self.left = {name: g.view(-1) for name, g in proof.sums.items()}

    def add(self, name: str, piece: Piece) -> None:
        """Subtract the samples' part from what is expected."""
        self.sink.add(name, piece)
        values, weights, counts = piece.values, self.proof.weights, self.proof.counts
        if piece.rows is not None:
            weights, counts = weights[piece.rows], counts[piece.rows]
        if self.proof.infinite:
            finite = torch.isfinite(values).all(1)
            self.finite[slice(None) if piece.rows is None else piece.rows] &= finite
            values, weights = values[counts], weights[counts]  # 0 times inf would be NaN
        dtype = wide(values)
        part = weights.to(dtype) @ values.to(dtype)
        if name not in self.left:  # f of this batch doesn't depend on it
            self.left[name] = part.new_zeros(self.params[name].numel())
        self.left[name][piece.start : piece.start + len(part)] -= part

    def close(self) -> None:
        """There are no more pieces."""
        self.sink.close()

    def wrong(self, eps: float = 0.0) -> list[str]:
        """The parameters whose gradient isn't the known one, by more than rounding.

        eps : of the coarsest dtype that the model computed in, if its parameters' is not.

        Samples whose gradients are not finite by either are another's to name; where there are too
        many of them, so is the batch.
        """
        overflowing = [name for name, size in self.sizes.items() if not math.isfinite(size)]
        if overflowing:
            return overflowing if self.finite.all() else []
        if bool((self.finite & ~self.proof.counts).any()):
            return self.proof.infinite
        total = sum(size**2 for size in self.sizes.values()) ** 0.5
        found = []
        for name, left in self.left.items():
            # Of a gradient's norm; float64 models take float32's, as T5's softmax does.
            own = max(torch.finfo(d).eps for d in (torch.float32, self.params[name].dtype))
            share = min(
                3 * max(eps, own) ** 0.5, 0.1
            )  # 1e-3 in float32; of 16 bits, 0.04 has been seen
            if not norm(left) <= share * (self.sizes.get(name, 0.0) + 0.1 * total):
                found.append(name)
        return found


def norm(t: Tensor) -> float:
    """The norm of a tensor of any magnitude: squares of 1e-25 or 1e25 are not float32's."""
    return float(torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float64)))
