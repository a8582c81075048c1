"""The calls of LESS, GraSS and TRAK, as those codes make them, their probes included."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastproj import compat
from fastproj.compat import trak as ours
from tests.compat.packages import load
from tests.dense import integers, normals, stored

REAL = importlib.util.find_spec("fast_jl") is not None
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(REAL, reason="a real fast_jl is installed here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the callers' gradients are. They ask for a GPU's properties: without one, made up."""
    if request.param == "cpu":
        properties = SimpleNamespace(multi_processor_count=108)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(Tensor, "cuda", lambda self, *_: self)
    else:
        compat.install(shadow=True)
        return torch.device("cuda:0")
    compat.install()
    return torch.device(request.param)


def test_less(device: torch.device) -> None:
    """less/data_selection/collect_grad_reps.py: probe, then a projector for each dimension."""
    load("trak.projectors")
    ours.install()
    from trak.projectors import BasicProjector, CudaProjector, ProjectionType

    # The probe stands inside a bare `except:` that falls back to BasicProjector: nothing here may
    # raise, or the drop-in would never be used without anybody noticing.
    num_sms = torch.cuda.get_device_properties(device.index).multi_processor_count
    import fast_jl

    fast_jl.project_rademacher_8(torch.zeros(8, 1_000, device=device), 512, 0, num_sms)

    torch.manual_seed(0)
    model = torch.nn.Linear(40, 3).to(device, torch.bfloat16)
    size = sum(p.numel() for p in model.parameters())
    full_grads = [normals((size,), seed).to(device) for seed in range(5)]  # fewer than 16
    results: dict[type, list[Tensor]] = {}
    for projector in (CudaProjector, BasicProjector):
        projectors = [
            projector(
                grad_dim=size,
                proj_dim=dim,
                seed=0,
                proj_type=ProjectionType.rademacher,
                device=device,
                dtype=next(model.parameters()).dtype,
                block_size=128,
                max_batch_size=16,
            )
            for dim in (8192, 10)
        ]
        stacked = torch.stack(full_grads).to(torch.float16)
        results[projector] = [p.project(stacked, model_id=0).cpu() for p in projectors]
    exact = stacked.double().cpu() @ stored(size, 8192)
    for cuda, basic, dim in zip(*results.values(), (8192, 10), strict=True):
        torch.testing.assert_close(cuda.double(), exact[:, :dim], rtol=1e-5, atol=1e-4)
        assert basic.dtype == torch.bfloat16  # as LESS asked
        torch.testing.assert_close(basic.double(), exact[:, :dim], rtol=2.0**-8, atol=1e-4)
    unit = torch.nn.functional.normalize(results[CudaProjector][0], dim=1)
    assert torch.isfinite(unit).all()  # "NaN/zeros" of LESS's issues


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_grass(device: torch.device, bits: int, proj_type: str) -> None:
    """_dattri/func/projection.py: a probe on zeros, then getattr by batch size."""
    import fast_jl

    num_sms = torch.cuda.get_device_properties(device.index).multi_processor_count
    fast_jl.project_rademacher_8(torch.zeros(8, 1_000, device=device), 512, 0, num_sms)
    features, proj_dim, seed = integers((bits, 333)).to(device), 512, 5
    fn = getattr(fast_jl, f"project_{proj_type}_{bits}")
    ensembles = [fn(features, proj_dim, seed + int(1e4) * e, num_sms) for e in range(2)]
    kind = "gaussian" if proj_type == "normal" else proj_type
    for e, y in enumerate(ensembles):
        exact = features.double().cpu() @ stored(333, 512, 5 + 10_000 * e, kind)
        torch.testing.assert_close(y.double().cpu(), exact, rtol=1e-5, atol=1e-4)


def test_traks_probe_and_projectors(device: torch.device) -> None:
    """trak/traker.py on a GPU: ones(1, P), then one projector for each chunk with NumPy seeds."""
    import fast_jl

    sizes, proj_dim = [700, 300], 96
    gradient = torch.ones(1, sum(sizes), device=device).cuda()
    sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    fast_jl.project_rademacher_8(gradient, proj_dim, 0, sms)
    seeds = np.random.default_rng(0).integers(low=0, high=500, size=len(sizes))
    projectors = [
        ours.CudaProjector(
            grad_dim=size,
            proj_dim=proj_dim,
            seed=seeds[i],
            proj_type=ours.ProjectionType.rademacher,
            max_batch_size=32,
            dtype=torch.float16,
            device=str(device),
        )
        for i, size in enumerate(sizes)
    ]
    chunked = ours.ChunkedCudaProjector(projectors, 700, sizes, 32, str(device), torch.float16)
    grads = {
        "a": integers((40, 7, 100), dtype=torch.float16).to(device),
        "b": integers((40, 300), 1, torch.float16).to(device),
    }
    y = chunked.project(grads, model_id=1)
    assert y.dtype == torch.float16
    exact = sum(
        g.double().cpu().reshape(40, -1)
        @ stored(size, proj_dim, int(seed), stream=1, row_offset=row)
        for g, size, seed, row in zip(grads.values(), sizes, seeds, (0, 700), strict=True)
    )
    torch.testing.assert_close(y.double().cpu(), exact, rtol=2.0**-11, atol=0)
    y /= 3.0  # what TRAKer does with it
    metadata = {"JL dimension": chunked.proj_dim, "JL matrix type": chunked.proj_type}
    assert json.loads(json.dumps(metadata)) == {"JL dimension": 96, "JL matrix type": "rademacher"}


@pytest.mark.gpu
def test_traks_own_cuda_projector_on_ours() -> None:
    """TRAK's class unpatched, with our fast_jl under it."""
    theirs = load("trak.projectors")
    compat.install(shadow=True)
    grads = integers((5, 1000)).cuda()
    projector = theirs.CudaProjector(1000, 77, 3, theirs.ProjectionType.rademacher, "cuda:0", 32)
    y = projector.project(grads, model_id=2)
    assert torch.equal(y.double().cpu(), grads.double().cpu() @ stored(1000, 77, 20_003))
