"""Gradients that no process has whole: DTensors of FSDP2, tensor or expert parallelism.

Each rank projects the shards that it holds with the rows of ``R`` that belong to them, and the
results are summed. ``R`` is a function of the row's number, so no rank needs another's gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from fastproj.checks import describe
from fastproj.projector import Projector


def project_sharded(
    projector: Projector, grads: Mapping[str, Tensor], model_id: int = 0, *, batched: bool = True
) -> Tensor:
    """``projector.project`` of the full gradients, of which this rank has a part.

    All ranks of the tensors' meshes call it, with the same names in the same order.

    Parameters
    ----------
    projector : of the full gradients' grad_dim.
    grads : DTensors [B, *shape of the parameter], in the order of the parameters; sharded on any
        dimension but the first, evenly or not, replicated, or partial sums, on meshes of any
        number of dimensions. Plain tensors are the same on every rank.
    model_id : as for ``Projector.project``.
    batched : False where the tensors have no batch dimension, such as ``param.grad``: B = 1.

    Returns
    -------
    Tensor [B, proj_dim], the same on every rank. It is what one process would get, to rounding
    (exactly where sums are exact, as for small integers under Rademacher).

    Raises
    ------
    ValueError
        For gradients that aren't grad_dim in all, tensors sharded over samples, or a placement
        that is none of the above.
    """
    named = {name: g if batched else g.unsqueeze(0) for name, g in grads.items()}
    size = sum(math.prod(g.shape[1:]) for g in named.values())
    if size != projector.grad_dim:
        raise ValueError(
            f"project_sharded: received gradients of P={size} in all; expected the projector's "
            f"grad_dim {projector.grad_dim}"
        )
    groups: dict[Any, list[tuple[int, str, Tensor]]] = {}
    offset = 0
    for name, g in named.items():
        mesh = g.device_mesh if isinstance(g, DTensor) else None
        groups.setdefault(mesh, []).append((offset, name, g))
        offset += math.prod(g.shape[1:])

    total: Tensor | None = None
    for mesh, members in groups.items():
        part: Tensor | None = None
        for start, name, g in members:
            for row, piece in pieces(name, g):
                part = projector.project(
                    piece, model_id, row_offset=start + row, out=part, accumulate=part is not None
                )
        if part is None:  # this rank has no row of these
            first = members[0][2]
            like = first.to_local() if isinstance(first, DTensor) else first
            dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
            part = torch.zeros(first.shape[0], projector.proj_dim, dtype=dtype, device=like.device)
        if mesh is not None:
            for dim in range(mesh.ndim):
                dist.all_reduce(part, group=mesh.get_group(dim))
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def pieces(name: str, g: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(row, [B, rows]): what this rank contributes of a parameter's gradients, run by run."""
    if not isinstance(g, DTensor):
        yield 0, g.reshape(g.shape[0], -1)
        return
    factor = 1.0
    coordinate = g.device_mesh.get_coordinate()
    if coordinate is None:
        return
    for dim, placement in enumerate(g.placements):
        if placement.is_replicate():
            if coordinate[dim] != 0:
                return  # another rank has the same
        elif placement.is_partial():
            kind = getattr(placement, "reduce_op", "sum")
            if kind not in ("sum", "avg"):
                raise ValueError(
                    f"project_sharded: received {name!r} with placement {placement}; expected "
                    "Shard, Replicate, or Partial sums or averages"
                )
            factor /= g.device_mesh.size(dim) if kind == "avg" else 1
        elif not hasattr(placement, "dim"):
            raise ValueError(
                f"project_sharded: received {name!r} with placement {placement}; expected Shard, "
                "Replicate or Partial"
            )
        elif placement.dim % g.dim() == 0:
            raise ValueError(
                f"project_sharded: received {name!r} {describe(g)} sharded over samples "
                f"({placement}); expected the batch dimension whole: shard the samples out by "
                "inds= instead"
            )
    local = g.to_local()
    if local.numel() == 0:
        return
    if factor != 1.0:
        local = local * factor
    yield from runs(local, [local_places(g, dim) for dim in range(1, g.dim())], g.shape[1:])


def local_places(g: DTensor, dim: int) -> np.ndarray[Any, Any]:
    """Which of a dimension's global places this rank has, in the order that it has them.

    A sharded dimension is cut as by ``torch.chunk``, mesh dimension by mesh dimension. Where FSDP
    shards what tensor parallelism has sharded before (torch's strided shards), that comes later.
    """
    places = np.arange(g.shape[dim])
    mesh, coordinate = g.device_mesh, g.device_mesh.get_coordinate()
    assert coordinate is not None
    sharding = [i for i, p in enumerate(g.placements) if getattr(p, "dim", None) == dim]
    plain = [i for i in sharding if type(g.placements[i]) is Shard]
    strided = [i for i in sharding if i not in plain]
    for i in strided:
        factor = getattr(g.placements[i], "split_factor", None)
        if len(strided) > 1 or factor != math.prod(mesh.size(j) for j in plain if j > i):
            raise ValueError(
                f"project_sharded: received placements {g.placements} on a mesh of "
                f"{tuple(mesh.shape)}; expected plain shards, or at most one strided over the "
                "mesh dimensions after it, as FSDP2 over tensor parallelism makes them"
            )
    for i in [*plain, *strided]:
        step = -(-len(places) // mesh.size(i))
        places = places[coordinate[i] * step : (coordinate[i] + 1) * step]
    return places


def runs(
    local: Tensor, places: list[np.ndarray[Any, Any]], shape: torch.Size
) -> Iterator[tuple[int, Tensor]]:
    """(first row, [B, rows]) of each run of consecutive rows in a local block [B, ...].

    places : for each of the block's dimensions after the first, the global places it has.
    """
    outer = len(places)
    while outer and len(places[outer - 1]) == shape[outer - 1]:
        outer -= 1  # whole dimensions at the end
    inner = math.prod(shape[outer:])
    rows = np.zeros(1, np.int64)
    for size, here in zip(shape[:outer], places[:outer], strict=True):
        rows = (rows[:, None] * size + here).reshape(-1)
    flat = local.reshape(local.shape[0], -1)  # [B, len(rows) * inner]
    edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for begin, end in pairwise(edges):
        yield int(rows[begin]) * inner, flat[:, begin * inner : end * inner]
