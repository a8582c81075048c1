"""What tells batches apart that need a check each: shapes, and the graph behind the outputs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastproj.trak import batches

# Operations by tensors of indices, which may bring rows into another order: those that read there,
# and those that write there.
READING = ("Gather", "Index", "IndexSelect", "MaskedSelect", "Take", "UnsafeIndex")
WRITING = (
    "IndexAdd",
    "IndexCopy",
    "IndexFill",
    "IndexPut",
    "IndexPutImpl",
    "IndexReduce",
    "MaskedScatter",
    "Scatter",
    "ScatterAdd",
    "ScatterReduce",
    "UnsafeIndexPut",
)
MOVING = {f"{name}Backward{number}" for name in READING + WRITING for number in range(3)}


def structure_of(batch: tuple[Any, ...], out: Tensor) -> tuple[int, list[Tensor]]:
    """A hash of a batch's shapes and of the autograd graph behind its outputs; the graph's leaves.

    An operation counts with all that it saves, except tensors and sizes: dimensions, indices,
    steps, flags. So a branch that rolls or transposes differently is another structure. Of tensors
    of indices counts what ``moved`` says.
    """
    shapes = tuple((tuple(t.shape), t.dtype) for t in batches.leaves(batch))
    if out.grad_fn is None:
        return hash((shapes, 0)), []
    nodes: list[Any] = [out.grad_fn]
    places: dict[Any, int] = {out.grad_fn: 0}
    kinds, leaves = [], []
    for node in nodes:  # which grows
        name = node.name()
        kind: list[Any] = [name]
        for below, output in node.next_functions:
            if below is not None and below not in places:
                places[below] = len(nodes)
                nodes.append(below)
            kind.append(None if below is None else (places[below], output))
        if name == "torch::autograd::AccumulateGrad":
            leaves.append(node.variable)
        else:
            of_kind: Any = type(node)
            kind += (repr(getattr(node, saved)) for saved in attributes_of(of_kind))
            if name in MOVING:
                kind += moved(node, batches.size(batch))
            elif name.startswith("SegmentReduce"):
                kind += (repr(ends.tolist()) for ends in segments_of(node))
        kinds.append(tuple(kind))
    return hash((shapes, tuple(kinds))), leaves


@cache
def attributes_of(kind: Any) -> list[str]:
    """The names of what an operation's node saves, except tensors and sizes of tensors.

    The sizes that a tensor is split into stay: they are the numbers of rows that samples have.
    """
    names = {name for name in dir(kind) if name.startswith("_saved_")}
    return sorted(
        name
        for name in names
        if "_raw" + name not in names | set(dir(kind))
        and ("split" in name or not name.endswith(("sizes", "size")))
    )


def segments_of(node: Any) -> Iterator[Tensor]:
    """The lengths or the offsets of the segments that ``segment_reduce`` reduces."""
    return (t for t in (node._saved_lengths, node._saved_offsets) if t is not None)


def moved(node: Any, size: int) -> Iterator[Hashable]:
    """How an operation by indices brings the rows of samples into another order or number.

    Yields nothing where it leaves them in place: indices 0, 1 .. size - 1 along the samples, as in
    ``h[torch.arange(B), lengths]``, or indices along other dimensions. The samples are a dimension
    of length ``size``, or a part of one whose length is a multiple of it, most likely the first.
    Which one is not known, so others of such a length may count too: that costs checks alone.
    """
    if size < 2:
        return
    shape, along = indices_of(node)
    if not shape:
        return
    exact = [(dim, index) for dim, index in along if shape[dim] == size]
    order = torch.arange(size, device="cpu")
    if any(torch.equal(index.flatten(), order) for _, index in exact):
        return
    kept = [dim for dim in range(len(shape)) if dim not in dict(along)]
    if not exact and any(shape[d] == size or (d == 0 and shape[d] % size == 0) for d in kept):
        return
    for dim, index in exact or along:
        if shape[dim] % size == 0:
            samples = index.div(shape[dim] // size, rounding_mode="floor")
            yield dim, tuple(index.shape), samples.numpy().tobytes()


def indices_of(node: Any) -> tuple[tuple[int, ...], list[tuple[int, Tensor]]]:
    """The shape that an operation reads or writes by indices, and the indices by dimension."""
    name = node.name().partition("Backward")[0]
    if hasattr(node, "_saved_self_sym_sizes"):
        shape = tuple(node._saved_self_sym_sizes)
    elif name in READING:
        shape = tuple(node._saved_self.shape)
    else:
        shape = tuple(node._input_metadata[0].shape)
    if name == "Take":
        shape = (math.prod(shape),)
    if hasattr(node, "_saved_index"):
        dim = getattr(node, "_saved_dim", 0)
        dim -= 2**64 if dim >= 2**63 else 0  # -1 comes without its sign
        return shape, [(dim % max(len(shape), 1), node._saved_index.cpu())]
    if hasattr(node, "_saved_mask"):
        return shape, list(enumerate(node._saved_mask.expand(shape).cpu().nonzero(as_tuple=True)))
    along: list[tuple[int, Tensor]] = []
    dim = 0
    for index in node._saved_indices:
        found = [index]
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            found = index.nonzero(as_tuple=True)
        along += ((dim + k, part.cpu()) for k, part in enumerate(found) if part is not None)
        dim += len(found)
    return shape, along
