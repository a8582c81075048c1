"""The CUDA backend on a GPU: what the emulation and the generic tests of tests/ can't show.

The generic tests (tests/test_ops.py and others) run on the CUDA backend too where there is a GPU.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import lru_cache

import numpy as np
import pytest
import torch

import fastproj
from fastproj.backends import cuda
from fastproj.call import Call
from fastproj.spec import MatrixKey, matrix_block
from tests.dense import DTYPES, KINDS, SHAPES, matmul_bound

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=f"cuda: {cuda.unavailable()}"),
]

PRECISIONS = ["highest", "high", "medium"]
LARGE = [(200, 2048, 512, 0), (33, 100_000, 768, 8)]


def variants() -> list[str]:
    """The kernel families that this GPU runs."""
    if not torch.cuda.is_available():
        return ["auto"]
    ninety = torch.cuda.get_device_capability() == (9, 0)
    return ["simple", "sm80", "sm90"] if ninety else ["simple", "sm80"]


@pytest.fixture(params=variants())
def variant(request):
    with cuda.force_variant(request.param):
        yield request.param


def run(grads, proj_dim, key, *, row_offset=0, precision="highest", out=None, **options):
    """Project on the GPU; the result starts as NaN, so that what is not written shows."""
    pieces = grads if isinstance(grads, list) else [grads]
    if out is None:
        dtype = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
        out = torch.full((pieces[0].shape[0], proj_dim), torch.nan, dtype=dtype, device="cuda")
    cuda.project(pieces, out, Call(key, row_offset, precision=precision, **options))
    return out


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """Memory that torch hands out next holds NaN."""
    torch.full((128 << 20,), 0xFF, dtype=torch.uint8, device="cuda")


@lru_cache(maxsize=8)  # NumPy needs seconds for the large ones, which several tests share
def entries(key, row_offset, rows, proj_dim):
    """The NumPy truth, in float32, which holds every entry."""
    block = matrix_block(key, row_offset, row_offset + rows, 0, proj_dim)
    return torch.from_numpy(np.asarray(block, dtype=np.float32))


def exact(grads, proj_dim, key, *, row_offset=0):
    """In float64 on the NumPy truth, on the CPU."""
    return grads.cpu().double() @ entries(key, row_offset, grads.shape[1], proj_dim).double()


def integers(*shape, dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).to(device, dtype)


# ---------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_matrix_is_the_spec(kind, dtype):
    if (kind, dtype) == ("gaussian", torch.int8):
        dtype = torch.float32
    key = MatrixKey(kind, 2**63 + 5, 77)
    for rows, cols, row_offset, col_offset in (
        (700, 130, 5, 3),
        (33, 1, 2**41 - 10, 2**32 - 65),
        (1025, 64, 511, 0),
    ):
        out = torch.full((cols, rows), 99, dtype=dtype, device="cuda").t()
        cuda.matrix(out, Call(key, row_offset), col_offset)
        block = matrix_block(key, row_offset, row_offset + rows, col_offset, col_offset + cols)
        assert torch.equal(out.cpu().double(), torch.from_numpy(block).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_entry(variant, kind, precision, dtype):
    """One-hot rows give single entries of R, in fragments of every kernel and at large offsets."""
    key = MatrixKey(kind, 2**64 - 1, 2**32 - 1)
    for row_offset in (0, 505, 2**37 - 300, 2**41 - 300, 2**50):
        eye = torch.eye(600, dtype=dtype, device="cuda")
        got = run(eye, 300, key, row_offset=row_offset, precision=precision)
        block = matrix_block(key, row_offset, row_offset + 600, 0, 300)
        assert torch.equal(got.cpu().double(), torch.from_numpy(block).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_small_integers_are_exact(variant, shape, dtype):
    batch, rows, proj_dim, row_offset = shape
    key = MatrixKey("rademacher", 3, 2**32 - 1)
    grads = integers(batch, rows, dtype=dtype)
    expected = exact(grads, proj_dim, key, row_offset=row_offset)
    for precision in PRECISIONS:
        got = run(grads, proj_dim, key, row_offset=row_offset, precision=precision)
        assert torch.equal(got.cpu().double(), expected)


@pytest.mark.parametrize("batch", [1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch_tile(variant, batch, dtype):
    key = MatrixKey("rademacher", 1, 2)
    grads = integers(batch, 4096, dtype=dtype)
    expected = exact(grads, 1024, key)
    for precision in PRECISIONS if dtype == torch.float32 else ("highest",):
        got = run(grads, 1024, key, precision=precision)
        assert torch.equal(got.cpu().double(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [512, 100_000])
def test_error_against_float64(variant, kind, dtype, rows):
    """Errors no larger than twice those of a torch matmul of the same dtype with a stored R;
    float64: within the bound of any order of sums.
    """
    key = MatrixKey(kind, 5, 0)
    grads = torch.randn(32, rows, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    block = entries(key, 0, rows, 256)
    expected = grads.cpu().double() @ block.double()

    def error(value):
        return ((value.cpu().double() - expected).norm() / expected.norm()).item()

    if dtype == torch.float64:  # the truth is no better than that
        bound = 2 * matmul_bound(grads.cpu(), block, 2.0**-53)
        assert ((run(grads, 256, key).cpu() - expected).abs() <= bound).all()
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    stored = grads @ block.to("cuda", dtype)
    assert error(run(grads, 256, key)) <= 2 * error(stored)
    if dtype == torch.float32:
        assert error(run(grads, 256, key, precision="high")) < 2.0**-16
        assert error(run(grads, 256, key, precision="medium")) < 2.0**-8


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_values_pass_through(variant, precision):
    key = MatrixKey("rademacher", 9, 0)
    grads = torch.zeros(6, 700, device="cuda")
    grads[0, 5] = torch.finfo(torch.float32).max
    grads[1, 699] = torch.inf
    grads[2, 3] = torch.nan
    grads.view(torch.int32)[3, 77] = 0x7F800001
    grads[4, 1], grads[4, 2] = torch.inf, -torch.inf
    grads[5, 0] = 1e-30
    got = run(grads, 40, key, precision=precision).cpu()
    block = torch.from_numpy(matrix_block(key, 0, 700, 0, 40)).float()
    assert got[0].isfinite().all()
    assert torch.equal(got[0].sign(), block[5])
    assert torch.equal(got[1], torch.inf * block[699])
    assert got[2].isnan().all()
    assert got[3].isnan().all()
    assert torch.equal(got[4].isnan(), block[1] == block[2])
    assert torch.equal(got[5].sign(), block[0])


# ---------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(variant, dtype):
    key = MatrixKey("rademacher", 4, 4)
    base = integers(40, 2120, dtype=dtype)
    layouts = {
        "dense": base[:, :2112].contiguous(),
        "narrowed": base[:, :2000],
        "moved by one": base[:, 1:1900],
        "odd row": integers(40, 1901, dtype=dtype),
        "transposed": integers(1900, 40, dtype=dtype).t(),
        "every third": base[:, ::3],
        "every second sample": base[::2],
        "one sample for all": base[:1].expand(40, -1),
        "rows that overlap": base[0].as_strided((40, 1000), (16, 1)),
        "one sample": base[:1, :1999],
    }
    for name, grads in layouts.items():
        for row_offset in (0, 8, 77):
            got = run(grads, 300, key, row_offset=row_offset)
            expected = exact(grads, 300, key, row_offset=row_offset)
            assert torch.equal(got.cpu().double(), expected), (name, row_offset)


def test_out_strides_scale_and_accumulate(variant):
    key = MatrixKey("rademacher", 4, 4)
    for batch, rows in ((5, 300), (20, 200_000)):
        grads = integers(batch, rows)
        room = torch.full((600, 2 * batch), 7.0, device="cuda")
        out = room[::2, ::2].t()
        run(grads, 300, key, out=out, scale=0.25, accumulate=True)
        expected = 7 + 0.25 * exact(grads, 300, key)
        assert torch.equal(out.cpu().double(), expected)
        room[::2, ::2] = 7
        assert (room == 7).all()


def test_pieces(variant):
    key = MatrixKey("rademacher", 8, 1)
    grads = integers(9, 5000)
    pieces = list(grads.split([1, 7, 500, 12, 4480], dim=1))
    assert torch.equal(run(pieces, 200, key, row_offset=3), run(grads, 200, key, row_offset=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "cols", "rows", "row_offset"),
    [(1, 1, 1, 0), (35, 130, 700, 2**41 - 300), (64, 1000, 5000, 77)],
    ids=str,
)
def test_project_transpose(kind, dtype, batch, cols, rows, row_offset):
    key = MatrixKey(kind, 11, 12)
    y = integers(batch, cols, dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((rows, batch), torch.nan, dtype=kept, device="cuda").t()
    cuda.project_transpose(y, out, Call(key, row_offset, 0.5))
    block = torch.from_numpy(
        np.asarray(matrix_block(key, row_offset, row_offset + rows, 0, cols), dtype=np.float64)
    )
    expected = 0.5 * (y.cpu().double() @ block.t())
    if kind == "rademacher":
        assert torch.equal(out.cpu().double(), expected)
    else:
        bound = 2.0**-20 * (y.cpu().double().abs() @ block.abs().t()) + 1e-12
        assert ((out.cpu().double() - expected).abs() <= bound).all()


# ---------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time(variant, kind, dtype):
    key = MatrixKey(kind, 1, 1)
    grads = torch.randn(50, 300_000, device="cuda").to(dtype)
    first = run(grads, 512, key)
    for _ in range(5):
        assert torch.equal(run(grads, 512, key), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(variant, kind, dtype):
    key = MatrixKey(kind, 1, 1)
    grads = torch.randn(200, 100_000, device="cuda").to(dtype)
    for precision in PRECISIONS if dtype == torch.float32 else ("highest",):
        whole = run(grads, 700, key, precision=precision)
        for part in (slice(0, 1), slice(5, 21), slice(30, 62), slice(64, 128), slice(1, 150)):
            assert torch.equal(run(grads[part], 700, key, precision=precision), whole[part])


def test_current_stream_without_synchronising():
    """Work waits for what was queued on the caller's stream before it, and the call returns."""
    key = MatrixKey("rademacher", 2, 3)
    grads = integers(16, 100_000)
    expected = exact(grads, 256, key)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(grads)
    run(late, 256, key)  # a first call loads the kernels, which may take longer than the sleep
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(grads)
        out = run(late, 256, key)
        assert not stream.query()
    stream.synchronize()
    assert torch.equal(out.cpu().double(), expected)


def in_new_thread(work):
    """What `work` returns, or raises, in a thread that has not used CUDA yet; the same variant."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(copy_context().run, work).result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_first_projection_of_a_thread(variant, dtype):
    """The first thing that a thread does with CUDA: it has no context of its own accord."""
    key = MatrixKey("rademacher", 2, 3)
    grads, out = integers(16, 4096, dtype=dtype), torch.empty(16, 512, device="cuda")
    out = out.double() if dtype == torch.float64 else out
    expected = run(grads, 512, key)  # the main thread has loaded the kernels
    torch.cuda.synchronize()
    in_new_thread(lambda: run(grads, 512, key, out=out))
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_first_other_call_of_a_thread():
    call = Call(MatrixKey("rademacher", 2, 3))
    y, out = integers(16, 256), torch.empty(16, 4096, device="cuda")
    block = torch.empty(512, 64, device="cuda")

    def adjoint():
        cuda.project_transpose(y, out, call)

    def matrix():
        cuda.matrix(block, call, 0)

    for work, result in ((adjoint, out), (matrix, block)):
        work()
        torch.cuda.synchronize()
        expected = result.clone()
        result.fill_(torch.nan)
        torch.cuda.synchronize()
        in_new_thread(work)
        torch.cuda.synchronize()
        assert torch.equal(result, expected)


def test_first_projection_in_a_backward_pass():
    """autograd calls it from a thread of its own."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, grads):
            ctx.save_for_backward(grads)
            return grads.float().sum()

        @staticmethod
        def backward(ctx, upstream):
            (grads,) = ctx.saved_tensors
            threads.append(threading.get_ident())
            results.append(run(grads, 512, MatrixKey("rademacher", 2, 3)))
            return upstream.to(grads.dtype).expand_as(grads)

    threads, results = [], []
    grads = integers(16, 4096, dtype=torch.bfloat16).requires_grad_()
    expected = run(grads.detach(), 512, MatrixKey("rademacher", 2, 3))
    Sum.apply(grads).backward()
    assert threads != [threading.get_ident()]
    assert torch.equal(results[0], expected)


def test_gradient_of_a_bf16_projection():
    """The adjoint in autograd's thread, and the projection again in its own backward pass."""
    y = fastproj.project(integers(8, 4096, dtype=torch.bfloat16), proj_dim=512, backend="cuda")
    grads = integers(8, 4096, dtype=torch.bfloat16).requires_grad_()
    fastproj.project(grads, proj_dim=512, backend="cuda").backward(torch.ones_like(y))
    ones = torch.ones(8, 512, device="cuda")
    expected = fastproj.project_transpose(ones, rows=slice(0, 4096), backend="cuda")
    torch.testing.assert_close(grads.grad, expected.to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(variant, dtype):
    key = MatrixKey("gaussian", 2, 3)
    grads = torch.randn(16, 50_000, device="cuda").to(dtype)
    static = grads.clone()
    out = torch.empty(16, 256, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, 256, key, out=out)
    for seed in range(3):
        fresh = torch.randn(16, 50_000, generator=torch.Generator().manual_seed(seed))
        static.copy_(fresh.to("cuda", dtype))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, run(static, 256, key))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_in_one_process(variant):
    key = MatrixKey("rademacher", 2, 3)
    results = []
    for index in (1, 0, 1):
        device = torch.device("cuda", index)
        grads = integers(16, 100_000).to(device)
        out = torch.full((16, 256), torch.nan, device=device)
        cuda.project([grads], out, Call(key, precision="high"))
        results.append(out.cpu())
        assert torch.cuda.current_device() == 0
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_no_allocation_beyond_the_workspace():
    """64 MiB at most, whatever the size."""
    key = MatrixKey("rademacher", 2, 3)
    for batch, rows, proj_dim in ((64, 1_000_000, 4096), (512, 500_000, 16384)):
        grads = torch.zeros(batch, rows, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(batch, proj_dim, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(grads, proj_dim, key, out=out)
        assert torch.cuda.max_memory_allocated() - before <= 64 << 20


# ---------------------------------------------------------------------------------------- sizes


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.mark.slow
@pytest.mark.skipif(free_bytes() < 12 << 30, reason="needs 12 GiB of GPU memory")
@pytest.mark.parametrize("batch", [1, 2])
def test_more_than_2_31_elements(variant, batch):
    """Rows beyond 2^31 in one sample, and offsets beyond 2^32 in the whole tensor."""
    rows = 2**31 + 1000 if batch == 1 else 2**31 + 8
    key = MatrixKey("rademacher", 6, 7)
    grads = torch.zeros(batch, rows, dtype=torch.bfloat16, device="cuda")
    places = [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, rows - 1]
    expected = torch.zeros(batch, 64, dtype=torch.float64)
    for sample in range(batch):
        for weight, place in enumerate(places, start=1):
            value = float(weight + 10 * sample)
            grads[sample, place] = value
            expected[sample] += (
                value * torch.from_numpy(matrix_block(key, place, place + 1, 0, 64))[0].double()
            )
    assert torch.equal(run(grads, 64, key).cpu().double(), expected)


@pytest.mark.slow
@pytest.mark.skipif(free_bytes() < 12 << 30, reason="needs 12 GiB of GPU memory")
def test_no_drift_at_10_to_the_8():
    """P = 10^8 against float64: error at most twice that of a torch fp32 sum of block products."""
    rows, proj_dim = 10**8, 16
    key = MatrixKey("rademacher", 6, 7)
    grads = torch.randn(4, rows, device="cuda")
    grads += 0.01
    expected = torch.zeros(4, proj_dim, dtype=torch.float64, device="cuda")
    single = torch.zeros(4, proj_dim, device="cuda")
    step = 10**6
    torch.backends.cuda.matmul.allow_tf32 = False
    for start in range(0, rows, step):
        block = torch.empty(step, proj_dim, device="cuda")
        cuda.matrix(block, Call(key, start), 0)
        piece = grads[:, start : start + step]
        expected += piece.double() @ block.double()
        single += piece @ block
    got = run(grads, proj_dim, key)
    error = (got.double() - expected).norm()
    assert error <= 2 * (single.double() - expected).norm()
