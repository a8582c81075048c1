"""FactoredProjector: gradients compressed on both sides of each parameter, then projected.

A linear layer's gradient by its weight [O, I] is a product, ``sum_t g_t a_t^T``. Both factors are
compressed before they are multiplied: ``sum_t (L^T g_t)(A^T a_t)^T`` with random L [O, r] and
A [I, r]. This costs ``2 T (O r + I r + r^2)`` operations instead of ``2 T O I`` and a projection of
O I numbers. The r x r numbers of each layer are then projected to ``proj_dim`` like any gradient.
Inner products of gradients keep their expectation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj import checks, ops
from fastproj.projector import Projector

SIDES_SEED = 0x9E3779B97F4A7C15  # xor-ed with the seed, it is the seed of the sides
SIDES_KIND = "rademacher"
MAX_FACTORED = 1 << 16  # r is below


@dataclass(frozen=True)
class Side:
    """A random matrix [size, r] of one side of a parameter: rows of one that all sides share.

    Its entries are +-1 / sqrt(r), rows ``first .. first + size`` of the Rademacher matrix with the
    seed ``seed ^ SIDES_SEED``.
    """

    first: int
    size: int
    rank: int
    seed: int
    stream: int
    backend: str | None

    @property
    def _matrix(self) -> dict[str, Any]:
        return {"kind": SIDES_KIND, "seed": self.seed, "stream": self.stream}

    def apply(self, x: Tensor, start: int = 0) -> Tensor:
        """x [..., n] times rows ``start .. start + n`` of it, [..., r], float32 or float64."""
        made = ops.project(
            x.reshape(-1, x.shape[-1]),
            self.rank,
            row_offset=self.first + start,
            backend=self.backend,
            **self._matrix,
        )
        return made.view(*x.shape[:-1], self.rank)

    def matrix(self, like: Tensor) -> Tensor:
        """All of it, [size, r], on the device of ``like``, float32 or float64 as ``apply`` has."""
        rows = slice(self.first, self.first + self.size)
        return self._scaled(rows, like)

    def rows(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Some rows of it by number, int64 [n]; as ``matrix``."""
        return self._scaled(numbers + self.first, like)

    def _scaled(self, rows: slice | Tensor, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        made = ops.matrix(rows, self.rank, dtype=dtype, device=like.device, **self._matrix)
        return made.mul_(self.rank**-0.5)


@dataclass(frozen=True)
class Sides:
    """What compresses the gradient [rows, cols] of one parameter; None leaves a side alone."""

    rows: int
    cols: int
    left: Side | None = None
    right: Side | None = None

    def of_left(self, x: Tensor) -> Tensor:
        """[..., rows] compressed."""
        return x if self.left is None else self.left.apply(x)

    def of_right(self, x: Tensor) -> Tensor:
        """[..., cols] compressed."""
        return x if self.right is None else self.right.apply(x)

    def of_rows(self, start: int, values: Tensor) -> tuple[int, Tensor]:
        """Entries ``start ..`` [b, n] of the flattened gradient, whole rows of it, compressed.

        Returns the place in the flattened result where they begin, and the values [b, m].
        """
        if (self.left is None and self.right is None) or not values.shape[1]:
            return start, values
        first = start // self.cols
        grads = values.unflatten(1, (-1, self.cols))
        grads = grads if self.right is None else self.right.apply(grads)  # [b, some rows, r]
        if self.left is None:
            return first * grads.shape[2], grads.flatten(1)
        return 0, self.left.apply(grads.transpose(1, 2), first).transpose(1, 2).flatten(1)


class FactoredProjector:
    """A projection of gradients that compresses both sides of each parameter first.

    A parameter of shape [m, ...] is taken as a matrix [m, n]. Its gradient G is replaced by
    ``L^T G A``, with random L [m, r] and A [n, r] of entries +-1 / sqrt(r). A side that is not
    larger than r is left alone, and so is a parameter of one dimension. Then all are projected from
    ``inner_dim`` to ``proj_dim`` dimensions, as ``fastproj.Projector`` does. The map is linear,
    depends on shapes, seed and model_id alone, and keeps inner products in expectation.

    ``TRAKer`` calls ``project`` of a subclass that overrides it, with whole gradients.

    Parameters
    ----------
    shapes : name -> shape of each parameter, in order; or a module, for all of its parameters.
    factored : r, 1 <= r < 65,536, the size that sides are compressed to.
    proj_dim : K, 1 <= K <= 2^32.
    seed, kind, block, scale, precision, backend : of the matrix [inner_dim, proj_dim], as in
        ``fastproj.Projector``. Sides are drawn from another seed that follows from this one.

    Attributes
    ----------
    grad_dim : P, the number of entries of a gradient.
    inner_dim : the number of entries of a compressed gradient.

    Raises
    ------
    TypeError, ValueError
        For a configuration that can't work here.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]] | nn.Module,
        factored: SupportsIndex,
        proj_dim: SupportsIndex,
        seed: SupportsIndex = 0,
        kind: str = "sjlt",
        *,
        block: SupportsIndex | None = None,
        scale: str | float | None = "jl",
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.shapes = checked_shapes(shapes)
        self.factored = checks.check_integer(
            "FactoredProjector", "factored", factored, 1, MAX_FACTORED
        )
        self.grad_dim = sum(math.prod(shape) for shape in self.shapes.values())
        self._places: dict[str, tuple[int, int, int]] = {}  # first left row, right row, inner row
        sides = inner = 0
        for name, shape in self.shapes.items():
            self._places[name] = sides, sides + rows_cols(shape)[0], inner
            sides += sum(rows_cols(shape))
            inner += math.prod(self._inner_shape(name))
        self.inner_dim = inner
        self.outer = Projector(
            inner,
            proj_dim,
            seed,
            kind,
            block=block,
            scale=scale,
            precision=precision,
            backend=backend,
        )
        self.proj_dim, self.seed = self.outer.proj_dim, self.outer.seed
        self.kind, self.block = self.outer.kind, self.outer.block

    def _inner_shape(self, name: str) -> tuple[int, int]:
        rows, cols = rows_cols(self.shapes[name])
        if len(self.shapes[name]) < 2:
            return rows, cols
        return min(rows, self.factored), min(cols, self.factored)

    def sides(self, name: str, model_id: int = 0) -> Sides:
        """What is applied to the gradient by one parameter, with the matrices of ``model_id``."""
        rows, cols = rows_cols(self.shapes[name])
        kept = self._inner_shape(name)
        seed = self.seed ^ SIDES_SEED

        def side(first: int, size: int, left: int) -> Side | None:
            if left == size:
                return None
            return Side(first, size, self.factored, seed, model_id, self.outer.backend)

        left, right, _ = self._places[name]
        return Sides(rows, cols, side(left, rows, kept[0]), side(right, cols, kept[1]))

    def inner_rows(self, name: str) -> slice:
        """The places of one parameter's compressed gradient among the ``inner_dim`` numbers."""
        start = self._places[name][2]
        return slice(start, start + math.prod(self._inner_shape(name)))

    def project(
        self,
        grads: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
        model_id: SupportsIndex = 0,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Whole gradients, compressed and projected, [B, proj_dim].

        Parameters
        ----------
        grads : a dict of [B, *shape] by name, a sequence of them in the order of ``shapes``, or
            flat ones [B, grad_dim].
        model_id : the stream of all matrices, 0 <= model_id < 2^32.
        out : as in ``fastproj.project``.

        Raises
        ------
        TypeError, ValueError
            For gradients of other names or shapes, before ``out`` is touched.
        """
        function = "FactoredProjector.project"
        model_id = checks.check_integer(function, "model_id", model_id, 0, checks.MAX_STREAM)
        found = self._by_name(function, grads)
        pieces = [
            self.sides(name, model_id).of_rows(0, flattened(g))[1] for name, g in found.items()
        ]
        return self.outer.project(one_dtype(pieces), model_id, out=out)

    def project_pairs(
        self,
        pairs: Mapping[str, tuple[Tensor, Tensor] | Tensor],
        model_id: SupportsIndex = 0,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """The same from the factors of gradients, which are never formed, [B, proj_dim].

        The result of a sample may depend on the batch size by rounding, which that of ``project``
        does not: PyTorch multiplies the two compressed factors, as it likes for their number.

        Parameters
        ----------
        pairs : by name, for each parameter of ``shapes``: a pair (left [B, T, m], right [B, T, n])
            whose gradient is ``sum_t left[b, t] right[b, t]^T``. For ``nn.Linear`` these are the
            gradients by its output, and its inputs. For an embedding [V, n], left may be the row
            numbers [B, T], int64. Instead of a pair: the gradient itself, [B, *shape].
        model_id, out : as in ``project``.

        Raises
        ------
        TypeError, ValueError
            For other names or shapes, before ``out`` is touched.
        """
        function = "FactoredProjector.project_pairs"
        model_id = checks.check_integer(function, "model_id", model_id, 0, checks.MAX_STREAM)
        if not isinstance(pairs, Mapping):
            raise TypeError(
                f"{function}: received pairs of type {type(pairs).__name__}; expected a dict by "
                f"name of pairs of tensors, for each of the {len(self.shapes)} names of shapes, "
                f"such as {next(iter(self.shapes))!r}"
            )
        self._check_names(function, "pairs", pairs)
        found: dict[str, tuple[Tensor, ...]] = {}
        for name in self.shapes:
            pair = pairs[name]
            if isinstance(pair, Tensor):
                self._check_shape(function, name, pair)
                found[name] = (pair,)
            else:
                found[name] = self._factors(function, name, pair)
        check_alike(
            function,
            {
                f"pairs[{name!r}]" + (f"[{place}]" if len(parts) > 1 else ""): part
                for name, parts in found.items()
                for place, part in enumerate(parts)
                if not (len(parts) > 1 and place == 0 and is_numbers(part))
            },
        )
        pieces = []
        for name, parts in found.items():
            sides = self.sides(name, model_id)
            if len(parts) > 1:
                pieces.append(self._product(parts[0], parts[1], sides))
            else:
                pieces.append(sides.of_rows(0, flattened(parts[0]))[1])
        return self.outer.project(one_dtype(pieces), model_id, out=out)

    def _factors(self, function: str, name: str, pair: Any) -> tuple[Tensor, Tensor]:
        """The two factors of a gradient, checked against its shape."""
        rows, cols = rows_cols(self.shapes[name])
        tensors = isinstance(pair, (tuple, list)) and [isinstance(t, Tensor) for t in pair]
        if tensors != [True, True]:
            of = f" of {', '.join(type(t).__name__ for t in pair)}" if tensors else ""
            raise TypeError(
                f"{function}: received {name!r}: {type(pair).__name__}{of}; expected a pair of "
                "tensors (left [B, T, m], right [B, T, n]), or a gradient [B, *shape]"
            )
        left, right = pair
        looked_up = is_numbers(left)
        if looked_up:
            left = left.long()  # PyTorch has no minimum of uint16
        whole = [*left.shape, rows] if looked_up else list(left.shape)
        if len(whole) != 3 or list(right.shape) != [*whole[:2], cols] or whole[2] != rows:
            hint = ""
            if left.dim() == right.dim() == 2 and list(left.shape) == [len(right), rows]:
                hint = " (of one position: left.unsqueeze(1) and right.unsqueeze(1))"
            elif list(right.shape) == [*left.shape[:2], rows] and left.shape[2:] == (cols,):
                hint = " (the same two in the other order)"
            raise ValueError(
                f"{function}: received {name!r}: {checks.describe(left)} and "
                f"{checks.describe(right)}; expected [B, T, {rows}] (or row numbers [B, T], "
                f"int64) and [B, T, {cols}]{hint}"
            )
        if left.device != right.device:
            raise ValueError(
                f"{function}: received {name!r}: {checks.describe(left)} and "
                f"{checks.describe(right)}; expected one device throughout"
            )
        if looked_up and left.numel() and not 0 <= left.min() <= left.max() < rows:
            raise ValueError(
                f"{function}: received {name!r} with row numbers from {int(left.min())} to "
                f"{int(left.max())}; expected 0 <= row < {rows}"
            )
        return left, right

    def _product(self, left: Tensor, right: Tensor, sides: Sides) -> Tensor:
        """The compressed gradient of a pair of factors, [B, inner]."""
        right = sides.of_right(right)
        if not is_numbers(left):
            return multiplied(sides.of_left(left), right)
        if sides.left is not None:
            return looked_up_product(sides.left, left, right)
        return multiplied(F.one_hot(left.long(), sides.rows).to(right.dtype), right)

    def _by_name(self, function: str, grads: Any) -> dict[str, Tensor]:
        """Gradients [B, *shape] by name, in the order of ``shapes``; each checked."""
        if isinstance(grads, Tensor):
            if grads.dim() != 2 or grads.shape[1] != self.grad_dim:
                raise ValueError(
                    f"{function}: received grads {checks.describe(grads)}; expected "
                    f"[B, grad_dim = {self.grad_dim}]"
                )
            checks.check_input(function, "grads", grads)
            sizes = [math.prod(shape) for shape in self.shapes.values()]
            return dict(zip(self.shapes, grads.split(sizes, 1), strict=True))
        if not isinstance(grads, Mapping):
            if isinstance(grads, str) or not isinstance(grads, Iterable):
                raise TypeError(
                    f"{function}: received grads of type {type(grads).__name__}; expected a dict "
                    f"of [B, *shape] by name, a sequence of them, or [B, {self.grad_dim}]"
                )
            grads = list(grads)
            if len(grads) != len(self.shapes):
                raise ValueError(
                    f"{function}: received {len(grads)} gradients; expected {len(self.shapes)}, "
                    "one for each parameter"
                )
            grads = dict(zip(self.shapes, grads, strict=True))
        self._check_names(function, "grads", grads)
        for name in self.shapes:
            self._check_shape(function, name, grads[name])
        check_alike(function, {f"grads[{name!r}]": grads[name] for name in self.shapes})
        return {name: grads[name] for name in self.shapes}

    def _check_names(self, function: str, what: str, given: Mapping[str, Any]) -> None:
        odd = [name for name in given if name not in self.shapes]
        if odd:
            raise ValueError(
                f"{function}: received {what} with {odd[0]!r}; expected the {len(self.shapes)} "
                f"names of shapes, such as {next(iter(self.shapes))!r}"
            )
        lacking = [name for name in self.shapes if name not in given]
        if lacking:
            raise ValueError(
                f"{function}: received {what} without {lacking[0]!r}; expected all "
                f"{len(self.shapes)} names of shapes (zeros where a gradient is zero)"
            )

    def _check_shape(self, function: str, name: str, g: Any) -> None:
        if not isinstance(g, Tensor):
            raise TypeError(
                f"{function}: received {name!r}: {type(g).__name__}; expected a tensor [B, *shape]"
            )
        if tuple(g.shape[1:]) != self.shapes[name]:
            raise ValueError(
                f"{function}: received {name!r}: {checks.describe(g)}; expected "
                f"[B, {', '.join(map(str, self.shapes[name]))}]"
            )

    def __repr__(self) -> str:
        return (
            f"FactoredProjector({len(self.shapes)} parameters, factored={self.factored}, "
            f"grad_dim={self.grad_dim}, inner_dim={self.inner_dim}, outer={self.outer!r})"
        )


def checked_shapes(shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by name, of a dict or a module. Raises TypeError or ValueError."""
    function = "FactoredProjector"
    if isinstance(shapes, nn.Module):
        shapes = {name: () if lazy(p) else p.shape for name, p in shapes.named_parameters()}
    if not isinstance(shapes, Mapping) or not shapes:
        raise TypeError(
            f"{function}: received shapes={shapes!r:.80}; expected a dict of shapes by "
            "name, such as {'weight': (64, 32)}, or a module that has parameters"
        )
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, str | Tensor) or not isinstance(shape, Iterable):
            cure = f" (tuple({name}.shape))" if isinstance(shape, Tensor) else ""
            raise TypeError(
                f"{function}: received shapes[{name!r}] of type {type(shape).__name__}; expected a "
                f"tuple of sizes, such as (64, 32){cure}"
            )
        found[name] = tuple(
            checks.check_integer(function, f"shapes[{name!r}]", n, 0, 1 << 56) for n in shape
        )
    if sum(sum(rows_cols(shape)) for shape in found.values()) > 1 << 56:
        raise ValueError(
            f"{function}: received shapes with more than 2^56 rows and columns in all; expected "
            "parameters that fit in memory"
        )
    return found


def lazy(p: Tensor) -> bool:
    """Whether a parameter has no shape yet. Raises ValueError where that is so."""
    if not nn.parameter.is_lazy(p):
        return False
    raise ValueError(
        "FactoredProjector: received a module with a lazy parameter, which has no shape yet; "
        "expected one that has seen a batch: call it once"
    )


def is_numbers(t: Tensor) -> bool:
    """Whether a factor is numbers of rows of a table."""
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def check_alike(function: str, given: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError unless all are strided, of one batch size, on one device."""
    first = next(iter(given))
    for name, t in given.items():
        checks.check_input(function, name, t)
        if len(t) != len(given[first]) or t.device != given[first].device:
            raise ValueError(
                f"{function}: received {first} {checks.describe(given[first])} but {name} "
                f"{checks.describe(t)}; expected one batch size and device throughout"
            )


def flattened(g: Tensor) -> Tensor:
    """[B, ...] as [B, n], also where B = 0."""
    return g.unsqueeze(1) if g.dim() == 1 else g.flatten(1)


def rows_cols(shape: Sequence[int]) -> tuple[int, int]:
    """The parameter's shape as that of a matrix; one of one dimension is a column."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """``left[b]^T @ right[b]`` [B, m n] of [B, T, m] and [B, T, n], in float32 or float64.

    Sums over positions in 16 bits would lose digits, and overflow in float16.
    """
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    with torch.autocast(left.device.type, enabled=False):
        return torch.bmm(left.transpose(1, 2).to(dtype), right.to(dtype)).flatten(1)


def looked_up_product(
    side: Side, ids: Tensor, right: Tensor, counted: Tensor | None = None
) -> Tensor:
    """The same where ``left`` is a row of a side for each of ids [B, T], or zero (``counted``)."""
    numbers, inverse = ids.long().unique(return_inverse=True)
    left = side.rows(numbers, right)[inverse]  # [B, T, r]
    if counted is not None:
        left = left * counted.unsqueeze(2)
    return multiplied(left, right)


def one_dtype(pieces: list[Tensor]) -> list[Tensor]:
    """All in the widest dtype among them: sides give float32 where others may be 16 bits."""
    wide = pieces[0].dtype
    for piece in pieces:
        wide = torch.promote_types(wide, piece.dtype)
    return [piece.to(wide) for piece in pieces]
