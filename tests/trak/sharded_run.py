"""Gradients as DTensors in several processes, projected and compared with the full ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastproj
from fastproj.trak.sharded import project_sharded
from tests.trak.distributed_run import launch

SHAPES = {"a": (7, 5), "b": (3,), "c": (2, 3, 4), "d": ()}
P = 7 * 5 + 3 + 2 * 3 * 4 + 1
B, K = 4, 9


def start(rank: int, size: int, port: int) -> None:
    """A gloo group."""
    launch(rank, size, port)
    dist.init_process_group("gloo")


def full(integers: bool) -> dict[str, torch.Tensor]:
    """Per-sample gradients that no rank would have whole."""
    generator = torch.Generator().manual_seed(0)
    grads = {name: torch.randn(B, *s, generator=generator) for name, s in SHAPES.items()}
    return {name: (8 * g).round() if integers else g for name, g in grads.items()}


def placements(rank: int, size: int, port: int, mesh_shape: list[int]) -> None:
    """Every placement of each tensor on a mesh: uneven shards, empty ones, replicas, sums."""
    from itertools import product

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    start(rank, size, port)
    mesh = init_device_mesh("cpu", tuple(mesh_shape))
    projector = fastproj.Projector(P, K, seed=3, scale=None)
    grads = full(integers=True)
    exact = projector.project(grads, 2)
    count = 0
    for name, g in grads.items():
        choices = [Replicate(), *(Shard(dim) for dim in range(1, g.dim()))]
        for chosen in product(choices, repeat=mesh.ndim):
            there = {**grads, name: distribute_tensor(g, mesh, chosen)}
            assert torch.equal(project_sharded(projector, there, 2), exact), (name, chosen)
            count += 1
        for reduce_op, value in (("sum", torch.where(torch.tensor(rank == 0), g, 0.0)), ("avg", g)):
            partial = DTensor.from_local(value, mesh, [Partial(reduce_op)] * mesh.ndim)
            there = {**grads, name: partial}
            torch.testing.assert_close(project_sharded(projector, there, 2), exact)
    everything = {
        n: distribute_tensor(g, mesh, [Shard(min(1, g.dim() - 1))] * mesh.ndim)
        if g.dim() > 1
        else g
        for n, g in grads.items()
    }
    assert torch.equal(project_sharded(projector, everything, 2), exact)
    real = full(integers=False)
    sharded = {
        n: distribute_tensor(g, mesh, [Shard(1)] * mesh.ndim) if g.dim() > 1 else g
        for n, g in real.items()
    }
    torch.testing.assert_close(
        project_sharded(projector, sharded, 2), projector.project(real, 2), rtol=1e-5, atol=1e-5
    )
    of, largest = [Shard(0)] * mesh.ndim, [Partial("max")] * mesh.ndim
    for wrong, message in (
        ({**grads, "a": distribute_tensor(grads["a"], mesh, of)}, "over samples"),
        ({name: grads[name] for name in ("a", "b")}, "grad_dim"),
        ({**grads, "b": DTensor.from_local(grads["b"], mesh, largest)}, "sums"),
    ):
        with pytest.raises(ValueError, match=message):
            project_sharded(projector, wrong, 2)
    print("placements", count)


def model(hidden: int) -> nn.Sequential:
    """Weights with sizes that 2 and 3 don't divide."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 5))


def fsdp(rank: int, size: int, port: int, tensor_parallel: bool) -> None:
    """Gradients of a model under fully_shard, sample by sample, beside those of the whole model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, size, port)
    hidden = 12 if tensor_parallel else 7  # torch's tensor parallelism wants an even number
    whole, sharded = model(hidden), model(hidden)
    mesh: Any = init_device_mesh("cpu", (size,))
    if tensor_parallel:
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(sharded, mesh["tp"], plan)
        mesh = mesh["dp"]
    fully_shard(sharded, mesh=mesh)
    grad_dim = sum(p.numel() for p in whole.parameters())
    projector = fastproj.Projector(grad_dim, K)
    for row in torch.randn(3, 6, generator=torch.Generator().manual_seed(1)):
        features = []
        for net, project in ((whole, projector.project), (sharded, project_sharded)):
            net.zero_grad()
            net(row[None]).logsumexp(1).sum().backward()
            named = {name: p.grad for name, p in net.named_parameters()}
            if net is whole:
                features.append(project([g.unsqueeze(0) for g in named.values()]))
            else:
                features.append(project(projector, named, batched=False))
        torch.testing.assert_close(*features, rtol=1e-5, atol=1e-6)
    print({str(g.placements) for g in named.values()})
