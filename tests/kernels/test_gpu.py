"""The cases of the interpreter on a GPU, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu

if torch.cuda.is_available():
    from torch import Tensor

    import fastproj
    from fastproj.kernels import config
    from tests.dense import integers, normals, relative_error, stored
    from tests.kernels.cases import *  # noqa: F403  every case, collected here with the mark
    from tests.kernels.cases_sjlt import *  # noqa: F403

KINDS = ["rademacher", "gaussian"]


def triton_project(grads: Tensor | list[Tensor], columns: int, **options: object) -> Tensor:
    return fastproj.project(grads, columns, **{"scale": None, "backend": "triton", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_rows_do_not_depend_on_the_batch(dtype: str, kind: str) -> None:
    """Bitwise, across all batch buckets and launches."""
    grads = normals((200, 40_000)).to("cuda", getattr(torch, dtype))
    whole = triton_project(grads, 640, kind=kind, precision="highest", row_offset=100)
    for rows in (slice(0, 1), slice(5, 21), slice(3, 35), slice(60, 124), slice(100, 200)):
        part = triton_project(grads[rows], 640, kind=kind, precision="highest", row_offset=100)
        assert torch.equal(part, whole[rows]), rows


def test_pinned_configurations_agree() -> None:
    """Tiles change nothing: the same sums in the same order."""
    grads = normals((64, 30_000)).to("cuda", torch.bfloat16)
    expected = triton_project(grads, 512)
    for pins in (
        {"BLOCK_K": 128, "num_warps": 4},
        {"BLOCK_B": 32, "STEP_ROWS": 512},
        {"num_stages": 3},
    ):
        with config.pin(**pins):
            assert torch.equal(triton_project(grads, 512), expected), pins


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
def test_stream_and_graph(kind: str) -> None:
    """Runs on the current stream without synchronising, and can be captured."""
    grads = integers((16, 70_000)).to("cuda")
    expected = triton_project(grads, 256, kind=kind)
    out = torch.zeros_like(expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_project(grads, 256, kind=kind, out=out)
    stream.synchronize()
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_project(grads, 256, kind=kind, out=out)
    grads.mul_(2)
    graph.replay()
    assert torch.equal(out, 2 * expected)


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
def test_no_synchronisation(kind: str) -> None:
    grads = normals((16, 70_000)).to("cuda")
    triton_project(grads, 256, kind=kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_project(grads, 256, kind=kind)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_device() -> None:
    """The guard: tensors on a device that is not the current one. With one GPU it is that one."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    grads = integers((4, 5000)).to(device)
    truth = grads.double() @ stored(5000, 64, device=str(device))
    assert torch.equal(triton_project(grads, 64).double(), truth)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
@pytest.mark.parametrize("shape", [(8, 4096), (128, 4096), (512, 8192), (1, 100_000)], ids=str)
def test_memory(shape: tuple[int, int], kind: str) -> None:
    """Under 64 MiB beyond input and output."""
    B, K = shape
    grads = normals((B, 60_000)).to("cuda", torch.bfloat16)
    out = torch.empty((B, K), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    triton_project(grads, K, kind=kind, out=out)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 64 << 20


def test_all_of_more_than_2_31_columns() -> None:
    """All of one: its last tile lies beyond what 32 bits count."""
    columns = 2**31 + 60
    row = fastproj.matrix(slice(5, 6), columns, dtype=torch.int8, device="cuda", backend="triton")
    for start in (0, 2**31 - 40, columns - 40):
        key = fastproj.spec.MatrixKey("rademacher", 0, 0)
        expected = fastproj.spec.matrix_block(key, 5, 6, start, start + 40)
        assert row[:, start : start + 40].tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "block"), [("rademacher", 0), ("sjlt", 16), ("sjlt", 4096)])
def test_more_than_2_31_elements(kind: str, block: int) -> None:
    B, P = 3, 2**30
    grads = torch.zeros((B, P), dtype=torch.bfloat16, device="cuda")
    columns = torch.tensor([0, 5, 2**29 + 1, P - 1], device="cuda")
    grads[:, columns] = torch.arange(1, B * 4 + 1, device="cuda").reshape(B, 4).bfloat16()
    truth = sum(
        grads[:, p : p + 1].double()
        @ stored(1, 64, kind=kind, block=block, row_offset=p, device="cuda")
        for p in columns.tolist()
    )
    result = triton_project(grads, 64, kind=kind, block=block or None)
    assert torch.equal(result.double(), truth)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_long_sums_do_not_drift(precision: str) -> None:
    """P = 10^8, all terms of one sign in one column's order: the worst case for an accumulator."""
    P, K = 10**8, 16
    generator = torch.Generator("cuda").manual_seed(0)
    grads = torch.rand((2, P), generator=generator, device="cuda")
    truth = torch.zeros((2, K), dtype=torch.float64, device="cuda")
    for start in range(0, P, 2**22):
        part = grads[:, start : start + 2**22]
        r = fastproj.matrix(
            slice(start, start + part.shape[1]), K, dtype=torch.float64, device="cuda"
        )
        truth += part.double() @ r
    error = relative_error(triton_project(grads, K, precision=precision), truth)
    torch_error = relative_error(
        sum(
            grads[:, s : s + 2**22]
            @ fastproj.matrix(slice(s, min(P, s + 2**22)), K, device="cuda", backend="triton")
            for s in range(0, P, 2**22)
        ),
        truth,
    )
    assert error <= (2 * torch_error if precision == "highest" else 2.0**-15)
