"""Per-sample gradients of single layers, from the layer's input and the gradient by its output.

A rule takes the layer, its input x [B, ...] and g = df/dy [B, ...] with the samples first (by rows:
[B, n, ...], n rows of the layer's batch for each sample), and yields (name of the parameter in the
layer, Piece). It holds at most about PIECE_BYTES of gradients
at once: a large layer comes in pieces. What it yields may lie in the workspace, and is to be used
before the next is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.trak.gradients.sinks import Piece

PIECE_BYTES = 64 * 1024 * 1024
PATCH_BYTES = 32 * 1024 * 1024  # patches of images held at once by a convolution

Pieces = Iterator[tuple[str, Piece]]


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


Rule = Callable[[Any, Tensor, Tensor, set[str], Workspace], Pieces]


def linear(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = x W^T + b``, W [O, I]: the gradient by W is g^T x, summed over positions."""
    x, g = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), rows_of(g)  # [B, T, I], [B, T, O]
    if "weight" in names:
        yield from products("weight", g, x, work)
    if "bias" in names:
        yield "bias", Piece(0, g.sum(1))


def transposed_linear(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = x W + b``, W [I, O] (GPT-2's Conv1D): the gradient by W is x^T g."""
    x, g = rows_of(x), rows_of(g)
    if "weight" in names:
        yield from products("weight", x, g, work)
    if "bias" in names:
        yield "bias", Piece(0, g.sum(1))


def rows_of(t: Tensor) -> Tensor:
    """[B, ..., n] as [B, T, n]."""
    return t.flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)


def products(name: str, left: Tensor, right: Tensor, work: Workspace) -> Pieces:
    """``left[b]^T @ right[b]`` of [B, T, m] and [B, T, n], by pieces of rows of the [m, n]."""
    size, _, m = left.shape
    n = right.shape[2]
    step = max(1, PIECE_BYTES // (size * n * right.element_size()))
    for start in range(0, m, step):
        part = left[:, :, start : start + step].transpose(1, 2)  # [B, step, T]
        values = work.take("gradients", right, size, part.shape[1], n)
        torch.bmm(part, right, out=values)
        yield name, Piece(start * n, values.view(size, -1))


def convolution(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = conv(x, W) + b``, x [B, n, C, ...] in 1 to 3 dimensions: g times the patches of x."""
    g = g.transpose(1, 2).flatten(2)  # [B, O, n L]
    if "weight" in names:
        yield from kernel_gradients(layer, x, g, work)
    if "bias" in names:
        yield "bias", Piece(0, g.sum(2))


def kernel_gradients(layer: Any, x: Tensor, g: Tensor, work: Workspace) -> Pieces:
    """The gradient by W [O, C / groups, *kernel], by pieces of output channels or groups."""
    size, out_channels, places = g.shape
    groups = layer.groups
    fan_in = layer.weight[0].numel()  # C / groups * kernel
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x.flatten(0, 1), layer._reversed_padding_repeated_twice, mode=mode)
    x = padded.unflatten(0, x.shape[:2])
    g = g.view(size, groups, out_channels // groups, places)
    item = g.element_size()
    samples = max(1, PATCH_BYTES // (groups * fan_in * places * item))
    patches = None
    if samples >= size:  # patches of all samples, once for all pieces
        patches = patches_of(layer, x, work)
    channels = max(1, PIECE_BYTES // (size * fan_in * item))
    per_group = out_channels // groups
    # A piece is some channels of one group, or some whole groups.
    group_step = max(1, channels // per_group)
    channel_step = per_group if channels >= per_group else channels
    for group in range(0, groups, group_step):
        of_groups = slice(group, group + group_step)
        for channel in range(0, per_group, channel_step):
            part = g[:, of_groups, channel : channel + channel_step]  # [B, G, o, n L]
            values = work.take("gradients", g, *part.shape[:3], fan_in)
            for start in range(0, size, samples):
                rows = slice(start, start + samples)
                found = patches_of(layer, x[rows], work) if patches is None else patches
                torch.matmul(part[rows], found[:, of_groups].transpose(2, 3), out=values[rows])
            first = (group * per_group + channel) * fan_in
            yield "weight", Piece(first, values.view(size, -1))


def patches_of(layer: Any, x: Tensor, work: Workspace) -> Tensor:
    """The inputs of each output of a convolution of padded x: [B, groups, fan_in, n places]."""
    size, rows, channels = x.shape[:3]
    x = x.contiguous()
    lengths, strides = [], []
    for i, kernel in enumerate(layer.kernel_size):
        reach = layer.dilation[i] * (kernel - 1) + 1
        lengths.append((x.shape[3 + i] - reach) // layer.stride[i] + 1)
        strides.append(x.stride(3 + i))
    view = x.as_strided(
        (size, channels, *layer.kernel_size, rows, *lengths),
        (
            x.stride(0),
            x.stride(2),
            *(s * d for s, d in zip(strides, layer.dilation, strict=True)),
            x.stride(1),
            *(s * d for s, d in zip(strides, layer.stride, strict=True)),
        ),
    )
    patches = work.take("patches", x, *view.shape).copy_(view)
    return patches.view(size, layer.groups, -1, rows * math.prod(lengths))


def embedding(layer: Any, ids: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = W[ids]``: only the rows that a sample looks up, each once; rows of zeros are left out.

    A piece is one row of W, or neighbouring rows that the same samples look up.
    """
    size, width = g.shape[0], g.shape[-1]
    ids, g = ids.reshape(size, -1), g.reshape(size, -1, width)  # [B, T], [B, T, width]
    counted = torch.ones_like(ids, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = ids != layer.padding_idx
    sample = torch.arange(size, device=ids.device).unsqueeze(1)
    pair = (ids.long() * size + sample)[counted]  # sorted by row of W, then by sample
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
        yield "weight", Piece(token * width, values.reshape(len(samples), -1), samples)


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


def layer_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = xhat * w + b``, xhat normalised over the last dimensions."""
    shape = layer.normalized_shape
    last = x.dim() - len(shape)
    if "weight" in names:
        xhat = F.layer_norm(x, shape, None, None, layer.eps)
        yield "weight", Piece(0, middle_sum(g * xhat, last))
    if "bias" in names:
        yield "bias", Piece(0, middle_sum(g, last))


def rms_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = x / rms(x) * w`` over the last dimensions."""
    xhat = F.rms_norm(x, layer.normalized_shape, None, layer.eps)
    yield "weight", Piece(0, middle_sum(g * xhat, x.dim() - len(layer.normalized_shape)))


def middle_sum(t: Tensor, last: int) -> Tensor:
    """The sum over dimensions 1 .. last - 1, flattened to [B, n]."""
    return (t.sum(tuple(range(1, last))) if last > 1 else t).flatten(1)


def batch_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = (x - mean) / sqrt(var + eps) * w + b`` with the running mean and variance."""
    g = by_channel(g)
    if "weight" in names:
        scale = torch.rsqrt(layer.running_var + layer.eps)
        xhat = (by_channel(x) - layer.running_mean[:, None]) * scale[:, None]
        yield "weight", Piece(0, (g * xhat).sum((1, 3)))
    if "bias" in names:
        yield "bias", Piece(0, g.sum((1, 3)))


def group_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Pieces:
    """``y = xhat * w + b`` by channel, xhat normalised over groups of channels of a row."""
    g = by_channel(g)
    if "weight" in names:
        xhat = F.group_norm(x.flatten(0, 1), layer.num_groups, None, None, layer.eps)
        yield "weight", Piece(0, (g * by_channel(xhat.view(x.shape))).sum((1, 3)))
    if "bias" in names:
        yield "bias", Piece(0, g.sum((1, 3)))


def by_channel(t: Tensor) -> Tensor:
    """[B, n, C, ...] as [B, n, C, L]."""
    return t.unsqueeze(-1).flatten(3)


class LayerRule(NamedTuple):
    """How a kind of layer is seen to.

    names : the parameters that the rule knows.
    least : the smallest number of dimensions of a sample-first input.
    by_rows : the rule takes [B, n, ...] of a layer whose first dimension is its batch.
    """

    pieces: Rule
    names: frozenset[str]
    least: int
    by_rows: bool = False


BOTH = frozenset({"weight", "bias"})

# Layers by their forward, so that a subclass that changes it has no rule.
RULES: dict[Any, LayerRule] = {
    nn.Linear.forward: LayerRule(linear, BOTH, 2),
    nn.Conv1d.forward: LayerRule(convolution, BOTH, 4, by_rows=True),
    nn.Conv2d.forward: LayerRule(convolution, BOTH, 5, by_rows=True),
    nn.Conv3d.forward: LayerRule(convolution, BOTH, 6, by_rows=True),
    nn.LayerNorm.forward: LayerRule(layer_norm, BOTH, 2),
    nn.RMSNorm.forward: LayerRule(rms_norm, frozenset({"weight"}), 2),
    nn.GroupNorm.forward: LayerRule(group_norm, BOTH, 3, by_rows=True),
    nn.Embedding.forward: LayerRule(embedding, frozenset({"weight"}), 1),
}


def rule_for(layer: nn.Module, names: set[str]) -> LayerRule | None:
    """The rule for a layer by these of its parameters, or None.

    None also for a layer that its rule does not describe: a forward of its own, a parameter that
    is computed from others, batch statistics.
    """
    if "forward" in vars(layer) or not names <= set(layer._parameters):
        return None
    forward = type(layer).forward
    found = RULES.get(forward)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and forward is (
        nn.modules.batchnorm._BatchNorm.forward
    ):
        running = layer.track_running_stats
        found = LayerRule(batch_norm, BOTH, 3, by_rows=True) if running else None
    if type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils":
        found = LayerRule(transposed_linear, BOTH, 2)
    if isinstance(layer, nn.Embedding) and (layer.max_norm or layer.scale_grad_by_freq):
        found = None
    return found if found is not None and names <= found.names else None
