"""Kind sjlt on a GPU: what the emulation can't show. See test_gpu.py for the dense kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproj.backends import cuda
from fastproj.call import Call
from fastproj.spec import MatrixKey, default_block, matrix_block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.unavailable() is not None, reason=f"cuda: {cuda.unavailable()}"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def sjlt(block):
    return MatrixKey("sjlt", 2**63 + 5, 77, block)


def run(grads, proj_dim, key, row_offset=0, out=None, **options):
    """Project on the GPU; the result starts as NaN."""
    if out is None:
        dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
        out = torch.full((grads.shape[0], proj_dim), torch.nan, dtype=dtype, device="cuda")
    cuda.project([grads], out, Call(key, row_offset, **options))
    return out


def integers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).to("cuda", dtype)


def entries(key, first, rows, cols):
    block = matrix_block(key, first, first + rows, 0, cols)
    return torch.from_numpy(np.asarray(block, dtype=np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "rows", "cols", "block", "row_offset"),
    [
        (1, 1, 1, 16, 0),
        (2, 700, 130, 32, 5),
        (9, 3000, 1030, 128, 2**41 - 700),
        (5, 2100, 2100, 1024, 8),
        (3, 1000, 300, 2**16, 2**16 - 400),
    ],
    ids=str,
)
def test_sjlt_small_integers_are_exact(dtype, batch, rows, cols, block, row_offset):
    """Dense rows and such that start anywhere; the adjoint of the result."""
    key = sjlt(block)
    truth = entries(key, row_offset, rows, cols)
    for start in (0, 1, 2):
        grads = integers(batch, rows + start, dtype=dtype)[:, start:]
        got = run(grads, cols, key, row_offset)
        assert torch.equal(got.cpu().double(), grads.cpu().double() @ truth)
    y = integers(batch, cols, dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((batch, rows), torch.nan, dtype=kept, device="cuda")
    cuda.project_transpose(y, out, Call(key, row_offset))
    assert torch.equal(out.cpu().double(), y.cpu().double() @ truth.t())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_sjlt_matrix_is_the_spec(dtype):
    for block, row, column in ((16, 5, 3), (2**12, 2**41 - 10, 2**32 - 200)):
        out = torch.full((130, 70), 99, dtype=dtype, device="cuda").t()
        cuda.matrix(out, Call(sjlt(block), row), column)
        truth = matrix_block(sjlt(block), row, row + 70, column, column + 130)
        assert torch.equal(out.cpu().double(), torch.from_numpy(truth).double())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [1024, 4096, 30_000])
def test_sjlt_rows_do_not_depend_on_the_batch(dtype, cols):
    key = sjlt(default_block(cols))
    grads = torch.randn(33, 500_000, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    whole = run(grads, cols, key)
    for part in (slice(0, 1), slice(5, 7), slice(8, 31)):
        assert torch.equal(run(grads[part], cols, key), whole[part])
    for _ in range(3):
        assert torch.equal(run(grads, cols, key), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sjlt_in_a_cuda_graph(dtype):
    key = sjlt(256)
    static = torch.zeros(16, 50_000, device="cuda", dtype=dtype)
    out = torch.empty(16, 1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, 1024, key, out=out)
    for seed in range(3):
        static.copy_(torch.randn(16, 50_000, generator=torch.Generator().manual_seed(seed)))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, run(static, 1024, key))
