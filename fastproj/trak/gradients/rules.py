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

from fastproj.trak.gradients.parts import Lookup, Part, Patches, Piece, Product, Workspace

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


def embedding(layer: Any, ids: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = W[ids]``: the rows that a sample looks up, except that of padding."""
    size, width = g.shape[0], g.shape[-1]
    ids, g = ids.reshape(size, -1), g.reshape(size, -1, width)  # [B, T], [B, T, width]
    counted = torch.ones_like(ids, dtype=torch.bool)
    if layer.padding_idx is not None:
        counted = ids != layer.padding_idx
    yield "weight", Lookup(ids, g, counted)


def layer_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = xhat * w + b``, xhat normalised over the last dimensions."""
    shape = layer.normalized_shape
    last = x.dim() - len(shape)
    if "weight" in names:
        xhat = F.layer_norm(x, shape, None, None, layer.eps)
        yield "weight", Piece(0, middle_sum(g * xhat, last))
    if "bias" in names:
        yield "bias", Piece(0, middle_sum(g, last))


def rms_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = x / rms(x) * w`` over the last dimensions."""
    xhat = F.rms_norm(x, layer.normalized_shape, None, layer.eps)
    yield "weight", Piece(0, middle_sum(g * xhat, x.dim() - len(layer.normalized_shape)))


def middle_sum(t: Tensor, last: int) -> Tensor:
    """The sum over dimensions 1 .. last - 1, flattened to [B, n]."""
    return (t.sum(tuple(range(1, last))) if last > 1 else t).flatten(1)


def batch_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
    """``y = (x - mean) / sqrt(var + eps) * w + b`` with the running mean and variance."""
    g = by_channel(g)
    if "weight" in names:
        scale = torch.rsqrt(layer.running_var + layer.eps)
        xhat = (by_channel(x) - layer.running_mean[:, None]) * scale[:, None]
        yield "weight", Piece(0, (g * xhat).sum((1, 3)))
    if "bias" in names:
        yield "bias", Piece(0, g.sum((1, 3)))


def group_norm(layer: Any, x: Tensor, g: Tensor, names: set[str], work: Workspace) -> Parts:
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
    """The rule of one sort of layer.

    names : the parameters that the rule knows.
    least : the smallest number of dimensions of a sample-first input.
    by_rows : the rule takes [B, n, ...] of a layer whose first dimension is its batch.
    """

    parts: Rule
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
