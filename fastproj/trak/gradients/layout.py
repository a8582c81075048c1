"""Which dimension of a tensor inside a model counts the samples, from two batch sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SIZES = (2, 3)  # the batches that are tried


class HooksError(RuntimeError):
    """Module hooks can't give the per-sample gradients of this model; another computer may."""


class FuncError(RuntimeError):
    """``torch.func`` can't follow this model; another gradient computer may."""


class BatchDim(NamedTuple):
    """Dimension ``dim`` counts the samples; a folded one has several rows for each of them."""

    dim: int
    folded: bool


SHARED = None  # the same tensor for all samples
UNCLEAR = BatchDim(-1, False)


def batch_dim(two: torch.Size, three: torch.Size) -> BatchDim | None:
    """The batch dimension of a tensor that has these shapes in batches of 2 and 3."""
    if len(two) != len(three):
        return UNCLEAR
    varying = [dim for dim, sizes in enumerate(zip(two, three, strict=True)) if len(set(sizes)) > 1]
    if not varying:
        return SHARED
    if len(varying) > 1:
        return UNCLEAR
    dim = varying[0]
    found = two[dim], three[dim]
    if found == SIZES:
        return BatchDim(dim, False)
    if found[0] * SIZES[1] == found[1] * SIZES[0]:
        return BatchDim(dim, True)
    return UNCLEAR


def tree_shapes(tree: Any) -> list[torch.Size | None]:
    """The shapes of the leaves of a nest; None for what is no tensor."""
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(tree)]


def tree_dims(
    two: list[torch.Size | None], three: list[torch.Size | None]
) -> list[BatchDim | None]:
    """The batch dimensions of the leaves of a nest; SHARED for what is no tensor."""
    if len(two) != len(three):
        return [UNCLEAR]
    dims: list[BatchDim | None] = []
    for a, b in zip(two, three, strict=True):
        if a is None or b is None:
            dims.append(SHARED if a is b else UNCLEAR)
        else:
            dims.append(batch_dim(a, b))
    return dims


def by_sample(t: Tensor, where: BatchDim, size: int) -> Tensor:
    """``t`` with the samples first: [B, ...], or [B, rows of a sample, ...] of a folded one."""
    count = t.shape[where.dim]
    t = t.movedim(where.dim, 0)
    if where.folded:
        if count % size:
            raise HooksError(f"a dimension of {count} doesn't hold {size} samples")
        return t.unflatten(0, (size, count // size))
    if count != size:
        raise HooksError(f"a dimension of {count} isn't one of {size} samples")
    return t
