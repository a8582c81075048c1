"""Per-sample gradients of single layers, from the layer's input and the gradient by its output.

A rule takes the layer, its input x [B, ...] and g = df/dy [B, ...] with the samples first (by rows:
[B, n, ...], n rows of the layer's batch for each sample), and yields (name of the parameter in the
layer, Part). Use each part before you ask for the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.trak.gradients.parts import (
    Lookup,
    Part,
    Patches,
    Piece,
    Product,
    Workspace,
    piece_bytes,
)

Parts = Iterator[tuple[str, Part]]

Rule = Callable[[Any, Tensor, Tensor, set[str], Workspace], Parts]


def linear(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = x W^T + b``, W [O, I]: the gradient by W is g^T x, summed over positions."""
    x, g = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), rows_of(g)  # [B, T, I], [B, T, O]
    if "weight" in names:
        yield "weight", Product(g, x, work)
    if "bias" in names:
        yield "bias", Piece(0, g.sum(1))


def transposed_linear(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = x W + b``, W [I, O] (GPT-2's Conv1D): the gradient by W is x^T g."""
    x, g = rows_of(x), rows_of(g)
    if "weight" in names:
        yield "weight", Product(x, g, work)
    if "bias" in names:
        yield "bias", Piece(0, g.sum(1))


def rows_of(t: Tensor) -> Tensor:
    """[B, ..., n] as [B, T, n]."""
    return t.flatten(1, -2) if t.dim() > 2 else t.unsqueeze(1)


def convolution(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = conv(x, W) + b``, x [B, n, C, ...] in 1 to 3 dimensions: g times the patches of x."""
    if "weight" in names:
        yield "weight", Patches(layer, x, g, work)
    if "bias" in names:
        yield "bias", Piece(0, g.transpose(1, 2).flatten(2).sum(2))


def transposed_convolution(
    layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace
) -> Parts:
    """``y`` of the transposed convolution, W [C, O / groups, ...]: x times the patches of g."""
    if "weight" in names:
        yield "weight", Patches(layer, g, x, work)
    if "bias" in names:
        yield "bias", Piece(0, g.transpose(1, 2).flatten(2).sum(2))


def embedding(layer: Any, ids: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = W[ids]``: the rows that a sample looks up, except that of padding."""
    size, width = g.shape[0], g.shape[-1]
    ids, g = ids.reshape(size, -1), g.reshape(size, -1, width)  # [B, T], [B, T, width]
    counted = torch.ones_like(ids, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = ids != layer.padding_idx
    yield "weight", Lookup(ids, g, counted)


def embedding_bag(layer: Any, ids: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = W[ids].sum(-2)`` or the mean, ids [B, n, L]: each row looked up has the bag's g."""
    counted = torch.ones_like(ids, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = ids != layer.padding_idx
    if layer.mode == "mean":
        g = g / counted.sum(-1, keepdim=True).clamp(min=1)
    g = g.unsqueeze(-2).expand(*ids.shape, -1).flatten(1, 2)  # [B, n L, width]
    yield "weight", Lookup(ids.flatten(1), g, counted.flatten(1))


def layer_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = xhat * w + b``, xhat normalised over the last dimensions."""
    shape = layer.normalized_shape
    last = x.dim() - len(shape)

    def by_weight(x: Tensor, g: Tensor) -> Tensor:
        return middle_sum(F.layer_norm(x, shape, None, None, layer.eps).mul_(g), last)

    if "weight" in names:
        yield "weight", Piece(0, in_parts(by_weight, x, g))
    if "bias" in names:
        yield "bias", Piece(0, middle_sum(g, last))


def rms_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = x / rms(x) * w`` over the last dimensions."""
    shape = layer.normalized_shape

    def by_weight(x: Tensor, g: Tensor) -> Tensor:
        return middle_sum(F.rms_norm(x, shape, None, layer.eps).mul_(g), x.dim() - len(shape))

    yield "weight", Piece(0, in_parts(by_weight, x, g))


def middle_sum(t: Tensor, last: int) -> Tensor:
    """The sum over dimensions 1 .. last - 1, flattened to [B, n]."""
    return (t.sum(tuple(range(1, last))) if last > 1 else t).flatten(1)


def batch_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = (x - mean) / sqrt(var + eps) * w + b`` with the running mean and variance."""
    scale = torch.rsqrt(layer.running_var + layer.eps)[:, None]

    def by_weight(x: Tensor, g: Tensor) -> Tensor:
        xhat = (by_channel(x) - layer.running_mean[:, None]).mul_(scale)
        return xhat.mul_(by_channel(g)).sum((1, 3))

    if "weight" in names:
        yield "weight", Piece(0, in_parts(by_weight, x, g))
    if "bias" in names:
        yield "bias", Piece(0, by_channel(g).sum((1, 3)))


def group_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = xhat * w + b`` by channel, xhat normalised over groups of channels of a row."""

    def by_weight(x: Tensor, g: Tensor) -> Tensor:
        xhat = F.group_norm(x.flatten(0, 1), layer.num_groups, None, None, layer.eps)
        return by_channel(xhat.view(x.shape).mul_(g)).sum((1, 3))

    if "weight" in names:
        yield "weight", Piece(0, in_parts(by_weight, x, g))
    if "bias" in names:
        yield "bias", Piece(0, by_channel(g).sum((1, 3)))


def in_parts(by_weight: Callable[[Tensor, Tensor], Tensor], x: Tensor, g: Tensor) -> Tensor:
    """``by_weight(x, g)`` of some samples at a time: what is made on the way stays in a cache."""
    step = max(1, piece_bytes(x) // max(1, x[0].numel() * x.element_size()))
    parts = zip(x.split(step), g.split(step), strict=True)
    return torch.cat([by_weight(*part) for part in parts])


def by_channel(t: Tensor) -> Tensor:
    """[B, n, C, ...] as [B, n, C, L]."""
    return t.unsqueeze(-1).flatten(3)


class LayerRule(NamedTuple):
    """The rule of one sort of layer.

    names : the parameters that the rule knows.
    least : the smallest number of dimensions of a sample-first input.
    by_rows : the rule takes [B, n, ...] of a layer whose first dimension is its batch.
    looks_up : the gradients are of a few rows of a table.
    """

    parts: Rule
    names: frozenset[str]
    least: int
    by_rows: bool = False
    looks_up: bool = False


BOTH, WEIGHT = frozenset({"weight", "bias"}), frozenset({"weight"})

# Layers by their forward, so that a subclass that changes it has no rule.
RULES: dict[Any, LayerRule] = {
    nn.Linear.forward: LayerRule(linear, BOTH, 2),
    nn.Conv1d.forward: LayerRule(convolution, BOTH, 4, by_rows=True),
    nn.Conv2d.forward: LayerRule(convolution, BOTH, 5, by_rows=True),
    nn.Conv3d.forward: LayerRule(convolution, BOTH, 6, by_rows=True),
    nn.ConvTranspose1d.forward: LayerRule(transposed_convolution, BOTH, 4, by_rows=True),
    nn.ConvTranspose2d.forward: LayerRule(transposed_convolution, BOTH, 5, by_rows=True),
    nn.ConvTranspose3d.forward: LayerRule(transposed_convolution, BOTH, 6, by_rows=True),
    nn.LayerNorm.forward: LayerRule(layer_norm, BOTH, 2),
    nn.RMSNorm.forward: LayerRule(rms_norm, WEIGHT, 2),
    nn.GroupNorm.forward: LayerRule(group_norm, BOTH, 3, by_rows=True),
    nn.Embedding.forward: LayerRule(embedding, WEIGHT, 1, looks_up=True),
    nn.EmbeddingBag.forward: LayerRule(embedding_bag, WEIGHT, 3, by_rows=True, looks_up=True),
}

# What forwards of convolutions call; a subclass may change that alone.
CONVOLVING = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)}


def rule_for(layer: nn.Module, names: set[str]) -> LayerRule | None:
    """The rule for a layer by these of its parameters, or None.

    None also for a layer that its rule does not describe: a forward of its own, a parameter that
    is computed from others, batch statistics.
    """
    if "forward" in vars(layer) or not names <= set(layer._parameters):
        return None
    convolve: Any = getattr(layer, "_conv_forward", None)
    if convolve is not None and getattr(convolve, "__func__", None) not in CONVOLVING:
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
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and (
        layer.max_norm or layer.scale_grad_by_freq or getattr(layer, "mode", None) == "max"
    ):
        found = None
    return found if found is not None and names <= found.names else None
