"""Launches as Triton's runtime takes them, up to the point where a GPU would run them.

A stand-in for the driver says that there is an H100. So the arguments, their types and what is
compiled for which of them are checked without one.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastproj.call import Call
from fastproj.kernels import config, launch, plan, project, sjlt
from fastproj.spec import MatrixKey

KERNELS = [
    launch.project_rademacher_kernel,
    launch.project_gaussian_kernel,
    project.reduce_kernel,
    launch.project_transpose_kernel,
    launch.matrix_kernel,
    sjlt.project_sjlt_kernel,
    sjlt.project_transpose_sjlt_kernel,
    sjlt.matrix_sjlt_kernel,
]


class StandIn:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


Launched = list[tuple[str, tuple[int, ...], dict[str, Any]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The launches of a test: kernel, grid, arguments. Kernels are compiled, not run."""
    calls: Launched = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        calls.append((self.__name__, grid, dict(zip(self.arg_names, args, strict=False)) | kwargs))
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(launch, "device_facts", lambda _: launch.Device("sm_90", 132, "wgmma"))
    for kernel in KERNELS:  # what is compiled here is not for a GPU of this machine
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    attribute = next(name for name in ("_active", "active") if name in vars(driver))
    monkeypatch.setattr(driver, attribute, StandIn())
    return calls


def variants(kernel: JITFunction) -> int:
    return sum(len(cache[0]) for cache in kernel.device_caches.values())


def test_project_compiles_once_for_a_bucket(launched: Launched) -> None:
    """Seeds, offsets, sizes, batches and strides compile nothing new: 1, 16 and 2^40 included."""
    for B, P, offset, seed, stream in (
        (16, 70_000, 0, 1, 0),
        (5, 60_000, 48, 16, 1),
        (1, 65_536, 2**40, 2**63 + 7, 2**31),
    ):
        grads = torch.empty((B, P), dtype=torch.bfloat16)
        key = MatrixKey("rademacher", seed, stream)
        launch.project([grads], torch.empty((B, 256)), Call(key, offset))
    names = [name for name, _, _ in launched]
    assert names.count("reduce_kernel") == 3
    assert variants(project.reduce_kernel) == 1
    # whole panels, and those that the piece fills in part
    assert variants(launch.project_rademacher_kernel) == 2
    name, grid, arguments = launched[0]
    assert name == "project_rademacher_kernel"
    assert arguments["ALIGNED"] == 16
    assert arguments["n_panels"] == 70_000 // plan.PANEL
    assert grid == (2, 1, -(-arguments["n_panels"] // arguments["panels_per_split"]))


def test_other_kernels(launched: Launched) -> None:
    for kind in ("rademacher", "gaussian"):
        for key in (MatrixKey(kind, 1, 2), MatrixKey(kind, 2**64 - 1, 2**32 - 1)):
            for B, n, row in ((3, 1000, 100), (1, 1, 0), (16, 2000, 2**50)):
                y = torch.empty((B, 70))
                launch.project_transpose(
                    y, torch.empty((B, n)), Call(key, row, 0.5, precision="high")
                )
            for n, m, column in ((100, 1, 2**32 - 1), (1, 300, 0)):
                launch.matrix(torch.empty((n, m)), Call(key, 5), column)
    assert variants(launch.project_transpose_kernel) == 2
    assert variants(launch.matrix_kernel) == 2


def test_sparse_kernels(launched: Launched) -> None:
    """One variant for a block, dtype and batch bucket, whatever seeds, offsets and sizes; no tables
    and no memory but the workspace and the output.
    """
    for B, P, offset, seed, stream in (
        (8, 70_000, 0, 1, 0),
        (5, 61_440, 48, 16, 1),
        (6, 65_536, 2**40, 2**64 - 1, 2**32 - 1),
    ):
        grads = torch.empty((B, P), dtype=torch.bfloat16)
        call = Call(MatrixKey("sjlt", seed, stream, 64), offset)
        launch.project([grads], torch.empty((B, 256)), call)
        launch.project_transpose(torch.empty((B, 256)), torch.empty((B, P)), call)
        launch.matrix(torch.empty((100, 65)), call, 2**32 - 65)
    assert variants(sjlt.project_sjlt_kernel) == 2  # whole panels, and those filled in part
    assert variants(sjlt.project_transpose_sjlt_kernel) == 1
    assert variants(sjlt.matrix_sjlt_kernel) == 1
    name, grid, arguments = launched[0]
    assert name == "project_sjlt_kernel"
    assert not arguments["MASKED"]
    assert arguments["n_panels"] == 70_000 // 256
    assert grid == (1, 1, -(-arguments["n_panels"] // arguments["panels_per_split"]))
    used = {name for name, _, _ in launched}
    assert used == {
        "project_sjlt_kernel",
        "project_transpose_sjlt_kernel",
        "matrix_sjlt_kernel",
        "reduce_kernel",
    }


def test_pairs_of_rows(launched: Launched) -> None:
    """Two rows of 16 bits are one load where every row of G lets it; nowhere else."""
    out = torch.empty((4, 64))

    def pairs(grads: torch.Tensor, offset: int = 0) -> bool:
        launched.clear()
        launch.project([grads], out, Call(MatrixKey("sjlt", 0, 0, 16), offset))
        (whole,) = [call for _, _, call in launched if call.get("MASKED") is False]
        return whole["PAIRS"]

    flat = torch.empty((4, 4000), dtype=torch.bfloat16)
    assert pairs(flat)
    assert pairs(flat.half())
    assert pairs(flat[:, 1:], 1)  # a tile starts at an even place again
    assert not pairs(flat[:, 1:], 0)
    assert not pairs(flat, 1)
    assert not pairs(torch.empty((4, 3999), dtype=torch.bfloat16))
    assert not pairs(flat.T.contiguous().T)
    assert not pairs(flat.float())


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grids_stay_within_their_limits(launched: Launched, kind: str, dtype: torch.dtype) -> None:
    """The second dimension of a grid has at most 65535 programs: more samples, more launches."""
    B = {torch.float32: 33 * 65535, torch.float64: 4 * 65535 + 7}[dtype]
    y, out = torch.empty((B, 1), dtype=dtype), torch.empty((B, 2), dtype=dtype)
    launch.project_transpose(
        y, out, Call(MatrixKey(kind, 1, 2, 16 * (kind == "sjlt")), 0, 0.5, precision="high")
    )
    grids = [grid for _, grid, _ in launched]
    assert len(grids) > 1
    assert max(grid[1] for grid in grids) <= 65535
    assert sum(arguments["B"] for _, _, arguments in launched) == B
    starts = [arguments["out_ptr"].data_ptr() for _, _, arguments in launched]
    sizes = [arguments["B"] * 2 * dtype.itemsize for _, _, arguments in launched]
    assert starts == [out.data_ptr() + sum(sizes[:i]) for i in range(len(sizes))]


def test_unaligned(launched: Launched) -> None:
    """Slices of a flat gradient at their own offsets are aligned again; odd strides are not."""
    flat = torch.empty((4, 40_000), dtype=torch.bfloat16)
    out = torch.empty((4, 64))
    key = MatrixKey("rademacher", 0, 0)
    launch.project([flat[:, 77:]], out, Call(key, 77))
    launch.project([flat[:, 77:]], out, Call(key, 78))
    launch.project(
        [torch.empty((4, 30_001), dtype=torch.bfloat16)], out, Call(key, precision="high")
    )
    launch.project([flat.T.contiguous().T], out, Call(key))
    main = [call[2] for call in launched if call[0] != "reduce_kernel" and not call[2]["MASKED"]]
    assert [(call["ALIGNED"], call["CONTIGUOUS"]) for call in main] == [
        (16, True),
        (1, True),
        (1, True),
        (1, False),
    ]


def test_pin_reaches_the_kernel(launched: Launched) -> None:
    grads = torch.empty((64, 4096), dtype=torch.bfloat16)
    with config.pin(BLOCK_K=128, num_warps=4):
        launch.project(
            [grads], torch.empty((64, 512)), Call(MatrixKey("rademacher", 0, 0), precision="high")
        )
    _, grid, arguments = launched[0]
    assert (arguments["BLOCK_K"], arguments["num_warps"], arguments["NUM_WARPS"]) == (128, 4, 4)
    assert grid[0] == 4
