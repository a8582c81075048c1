"""Parts of per-sample gradients as hooks find them: products that need not be formed whole.

``Part.pieces`` gives the gradient by a parameter piece by piece, each formed when its turn comes.
For a ``FactoredProjector``, ``Part.compressed`` gives the gradient as the parameter's ``Sides``
compress it: the factors of a product are compressed before they are multiplied.

A piece may lie in a workspace. Use it before you ask for the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastproj.factored import Sides, looked_up_product, multiplied

# Of gradients formed at once: they stay in a cache until they are projected. On a CPU, 1 to 64 MiB
# cost the same to within 3 % (GPT of 36M, T = 128, B = 8).
PIECE_BYTES = 4 * 1024 * 1024
PATCH_BYTES = 8 * 1024 * 1024  # patches of images held at once by a convolution
GPU_TIMES = 4  # as much on a GPU, where calls cost more than memory


def piece_bytes(like: Tensor) -> int:
    """PIECE_BYTES on the device of a tensor."""
    return PIECE_BYTES * (1 if like.device.type == "cpu" else GPU_TIMES)


class Workspace:
    """Memory that is used again and again: fresh pages cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, use: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor for ``use``; what it held before is lost."""
        key = use, like.dtype, like.device
        count = math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < count:
            self._buffers.pop(key, None)
            self._buffers[key] = like.new_empty(count)
        return self._buffers[key][:count].view(shape)


Take = Callable[[Tensor, Tensor], bool]  # of the factors [B, T, m] and [B, T, n] of a product


class Part(Protocol):
    """A summand of the gradient by one parameter."""

    @property
    def few_rows(self) -> bool:
        """Whether it is of a few rows of a large table."""

    def as_product(self, take: Take) -> bool:
        """Give a product's factors to ``take``. False where there are none or it takes none."""

    def pieces(self) -> Iterator[Piece]:
        """The summand, as pieces of the flattened gradient."""

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """The summand compressed by the sides of the parameter, as flattened pieces."""


class Piece(NamedTuple):
    """Entries ``start .. start + n`` of the flattened gradient by one parameter.

    ``values`` are [b, n], of the samples ``rows``: a slice, or their numbers [b]. A piece of a
    parameter of two or more dimensions holds whole rows of it.
    """

    start: int
    values: Tensor
    rows: Tensor | slice = slice(None)

    @property
    def few_rows(self) -> bool:
        """It is, where samples are numbered."""
        return isinstance(self.rows, Tensor)

    def add_to(self, grads: Tensor) -> None:
        """Add it to the flattened gradients of all samples, [B, numel]."""
        target = grads[:, self.start : self.start + self.values.shape[1]]
        if isinstance(self.rows, Tensor):
            target.index_add_(0, self.rows, self.values)
        else:
            target[self.rows] += self.values

    def as_product(self, take: Take) -> bool:
        """It is none."""
        return False

    def pieces(self) -> Iterator[Piece]:
        """Itself."""
        yield self

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """Both sides applied to what is formed."""
        start, values = sides.of_rows(self.start, self.values)
        yield Piece(start, values, self.rows)


@dataclass
class Product:
    """``left[b]^T @ right[b]`` of [B, T, m] and [B, T, n], for a parameter [m, n]."""

    left: Tensor
    right: Tensor
    work: Workspace
    few_rows: ClassVar[bool] = False

    def as_product(self, take: Take) -> bool:
        """Its two factors."""
        return take(self.left, self.right)

    def pieces(self) -> Iterator[Piece]:
        """Some rows of the [m, n] at a time."""
        size, _, m = self.left.shape
        n = self.right.shape[2]
        step = max(1, piece_bytes(self.right) // (size * n * self.right.element_size()))
        for start in range(0, m, step):
            part = self.left[:, :, start : start + step].transpose(1, 2)  # [B, step, T]
            values = self.work.take("gradients", self.right, size, part.shape[1], n)
            torch.bmm(part, self.right, out=values)
            yield Piece(start * n, values.view(size, -1))

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """The product of the two factors, compressed."""
        if sides.left is None and sides.right is None:
            yield from self.pieces()
            return
        yield Piece(0, multiplied(sides.of_left(self.left), sides.of_right(self.right)))


@dataclass
class Lookup:
    """The gradient by an embedding's table [V, width]: g [B, T, width] at the rows ids [B, T].

    ``counted`` [B, T] is which of them count.
    """

    ids: Tensor
    g: Tensor
    counted: Tensor
    few_rows: ClassVar[bool] = True

    def as_product(self, take: Take) -> bool:
        """It is none."""
        return False

    def pieces(self) -> Iterator[Piece]:
        """Only the rows that a sample looks up, each once; rows of zeros are left out.

        A piece is one row of the table, or neighbouring rows that the same samples look up.
        """
        ids, g, counted = self.ids, self.g, self.counted
        size, width = g.shape[0], g.shape[-1]
        sample = torch.arange(size, device=ids.device).unsqueeze(1)
        pair = (ids.long() * size + sample)[counted]  # sorted by row of the table, then by sample
        pairs, inverse = pair.unique(return_inverse=True)
        sums = g.new_zeros(len(pairs), width).index_add_(0, inverse, g[counted])
        kept = (sums != 0).any(1)
        pairs, sums = pairs[kept], sums[kept]
        if not len(pairs):
            return
        tokens, rows = (pairs // size).cpu().numpy(), pairs % size
        for token, count, start, stop in runs(tokens, rows.cpu().numpy()):
            samples = rows[start : start + (stop - start) // count]
            values = sums[start:stop].view(count, len(samples), width).transpose(0, 1)
            yield Piece(token * width, values.reshape(len(samples), -1), samples)

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """The rows of the left side that are looked up, times g."""
        if sides.left is None:  # a small table
            for piece in self.pieces():
                yield from piece.compressed(sides)
            return
        right = sides.of_right(self.g)
        yield Piece(0, looked_up_product(sides.left, self.ids, right, self.counted))


def runs(tokens: Any, rows: Any) -> Iterator[tuple[int, int, int, int]]:
    """(first token, number of tokens, start, stop) of neighbouring tokens of the same samples."""
    bounds = [0, *(np.flatnonzero(np.diff(tokens)) + 1).tolist(), len(tokens)]
    begin, count = 0, 0
    for i in range(len(bounds) - 1):
        start, stop = bounds[i], bounds[i + 1]
        count += 1
        more = (
            i + 2 < len(bounds)
            and tokens[stop] == tokens[start] + 1
            and np.array_equal(rows[start:stop], rows[stop : bounds[i + 2]])
        )
        if not more:
            yield int(tokens[begin]), count, begin, stop
            begin, count = stop, 0


def even_step(count: int, most: int) -> int:
    """The size of the fewest steps through ``count`` of at most ``most`` each."""
    return math.ceil(count / math.ceil(count / most))


@dataclass
class Patches:
    """The gradient by the kernel W [O, C / groups, *kernel] of a convolution of x [B, n, C, ...].

    g [B, n, O, ...] is the gradient by its output: that by W is g times the patches of x. A
    transposed convolution is one of the gradient by its output, whose output is its input.
    """

    layer: Any
    x: Tensor
    g: Tensor
    work: Workspace
    few_rows: ClassVar[bool] = False

    def as_product(self, take: Take) -> bool:
        """It is none."""
        return False

    def pieces(self) -> Iterator[Piece]:
        """Some output channels of one group at a time, or some whole groups; of some samples.

        Patches take longer to make than to multiply by a few channels. So they are made once for
        all channels, for as many samples as PATCH_BYTES hold.
        """
        layer = self.layer
        g = self.g.transpose(1, 2).flatten(2)  # [B, O, n L]
        size, out_channels, places = g.shape
        groups = layer.groups
        per_group = out_channels // groups
        fan_in = layer.weight[0].numel()  # C / groups * kernel
        g = g.view(size, groups, per_group, places)
        step = even_step(size, self.samples_at_once(groups * fan_in * places))
        channels = max(1, piece_bytes(g) // (step * fan_in * g.element_size()))
        group_step = max(1, channels // per_group)
        channel_step = min(per_group, channels)
        for begin in range(0, size, step):
            rows = slice(begin, min(begin + step, size))
            patches = self.patches(rows).transpose(2, 3)  # [b, groups, n L, fan_in]
            for group in range(0, groups, group_step):
                of_groups = slice(group, group + group_step)
                for channel in range(0, per_group, channel_step):
                    part = g[rows, of_groups, channel : channel + channel_step]  # [b, G, o, n L]
                    values = self.work.take("gradients", g, *part.shape[:3], fan_in)
                    torch.matmul(part, patches[:, of_groups], out=values)
                    first = (group * per_group + channel) * fan_in
                    yield Piece(first, values.view(len(part), -1), rows)

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """The right side applied to patches is a convolution with it in place of the kernel.

        Convolutions in groups are formed first: a group's kernel is small, and each has rows of its
        own on the left.
        """
        if sides.right is None or self.layer.groups > 1:
            for piece in self.pieces():
                yield from piece.compressed(sides)
            return
        kernel = sides.right.matrix(self.x).T.reshape(-1, *self.layer.weight.shape[1:])
        left = None if sides.left is None else sides.left.matrix(self.g).T
        size = len(self.x)
        step = self.samples_at_once(self.x[0].numel() + self.g[0].numel())
        found = [
            self._compressed(kernel, left, slice(start, start + step))
            for start in range(0, size, step)
        ]
        yield Piece(0, torch.cat(found))

    def _compressed(self, kernel: Tensor, left: Tensor | None, rows: slice) -> Tensor:
        """That of some samples, flattened."""
        layer, g, dims = self.layer, self.g[rows], len(self.layer.kernel_size)
        x = torch.convolution(
            self.padded(rows).to(kernel.dtype),
            kernel,
            None,
            layer.stride,
            [0] * dims,
            layer.dilation,
            False,
            [0] * dims,
            1,
        )  # [B n, r, ...]
        for dim, length in enumerate(g.shape[3:], 2):
            x = x.narrow(dim, 0, length)
        x = x.flatten(2)
        right = x.unflatten(0, g.shape[:2]).transpose(1, 2).flatten(2)  # [B, r, n L]
        g = g.transpose(1, 2).flatten(2).to(right.dtype)  # [B, O, n L]
        if left is not None:
            g = torch.matmul(left, g)
        return torch.bmm(g, right.transpose(1, 2)).flatten(1)

    def samples_at_once(self, entries: int) -> int:
        """How many samples PATCH_BYTES are, of which each has so many entries."""
        most = PATCH_BYTES * (1 if self.x.device.type == "cpu" else GPU_TIMES)
        return max(1, most // max(1, entries * self.x.element_size()))

    @property
    def are_inputs(self) -> bool:
        """Whether the patches are x itself: of a kernel of one place, which goes to all of them."""
        layer = self.layer
        return (
            all(n == 1 for n in (*layer.kernel_size, *layer.stride, self.x.shape[1]))
            and not any(layer._reversed_padding_repeated_twice)
            and self.x.shape[3:] == self.g.shape[3:]
        )

    def padded(self, rows: slice) -> Tensor:
        """x of some samples as the convolution sees it, [B n, C, ...]."""
        layer = self.layer
        x = self.x[rows].flatten(0, 1)
        if not any(layer._reversed_padding_repeated_twice):
            return x
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)

    def patches(self, rows: slice) -> Tensor:
        """The inputs of each output of some samples: [B, groups, fan_in, n places]."""
        layer, lengths = self.layer, self.g.shape[3:]
        if self.are_inputs:
            return self.x[rows].squeeze(1).flatten(2).unflatten(1, (layer.groups, -1))
        x = self.padded(rows).contiguous().unflatten(0, (-1, self.x.shape[1]))
        size, n, channels = x.shape[:3]
        strides = x.stride()[3:]
        view = x.as_strided(
            (size, channels, *layer.kernel_size, n, *lengths),
            (
                x.stride(0),
                x.stride(2),
                *(s * d for s, d in zip(strides, layer.dilation, strict=True)),
                x.stride(1),
                *(s * d for s, d in zip(strides, layer.stride, strict=True)),
            ),
        )
        patches = self.work.take("patches", x, *view.shape).copy_(view)
        return patches.view(size, layer.groups, -1, n * math.prod(lengths))


@dataclass
class Watched:
    """A part that is looked at, ``look(piece)``, when it has been used."""

    part: Part
    look: Callable[[Piece], None]

    @property
    def few_rows(self) -> bool:
        """As of the part."""
        return self.part.few_rows

    def as_product(self, take: Take) -> bool:
        """That of the part, which is formed besides."""
        if not self.part.as_product(take):
            return False
        for piece in self.part.pieces():
            self.look(piece)
        return True

    def pieces(self) -> Iterator[Piece]:
        """Those of the part."""
        for piece in self.part.pieces():
            yield piece
            self.look(piece)

    def compressed(self, sides: Sides) -> Iterator[Piece]:
        """That of the part, which is formed besides."""
        yield from self.part.compressed(sides)
        for piece in self.part.pieces():
            self.look(piece)
