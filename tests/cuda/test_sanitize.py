"""Every kernel once, on problems small enough for compute-sanitizer: `make gpu-more`.

Tiles, loaders, splits, clusters and ragged edges as in real use; sums of small integers are exact,
so results count too. Triton's kernels run here as well, where Triton is usable.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from fastproj.backends import cuda, registry
from fastproj.call import Call
from fastproj.spec import MatrixKey, matrix_block

pytestmark = pytest.mark.gpu

KINDS = ["rademacher", "gaussian"]
INPUTS = [
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
    (torch.float32, "highest"),
    (torch.float32, "high"),
    (torch.float32, "medium"),
]
BATCHES = (3, 20, 50, 70)  # every BLOCK_B of every family, and two tiles
ROWS, COLS, ROW_OFFSET = 1608, 300, 77
SEED, STREAM = 2**63 + 5, 2**31 - 1


def usable(backend: str, variant: str = "auto") -> None:
    """Skips, with the reason, what this machine can't run."""
    reason = registry.unavailable(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if variant == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def integers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).to("cuda", dtype)


def check(got: torch.Tensor, left: torch.Tensor, right: torch.Tensor, kind: str) -> None:
    """``got`` is left @ right: exactly for +-1, else to the rounding of cut sums."""
    left, right = left.cpu().double(), right.double()
    if kind == "rademacher":
        assert torch.equal(got.cpu().double(), left @ right)
    else:
        bound = 2.0**-19 * (left.abs() @ right.abs()) + 1e-12
        assert ((got.cpu().double() - left @ right).abs() <= bound).all()


@lru_cache(maxsize=8)  # for NumPy, hundreds of times the same
def entries(kind: str, rows: int, cols: int) -> torch.Tensor:
    block = matrix_block(MatrixKey(kind, SEED, STREAM), ROW_OFFSET, ROW_OFFSET + rows, 0, cols)
    return torch.from_numpy(np.asarray(block, dtype=np.float64))


def project(
    backend: str, grads: torch.Tensor, cols: int, kind: str, precision: str
) -> torch.Tensor:
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    out = torch.full((grads.shape[0], cols), torch.nan, dtype=dtype, device="cuda")
    call = Call(MatrixKey(kind, SEED, STREAM), ROW_OFFSET, precision=precision)
    registry.load(backend).project([grads], out, call)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["simple", "sm80", "sm90"])
def test_cuda_projection(variant: str, kind: str) -> None:
    """Aligned and odd rows through every loader."""
    usable("cuda", variant)
    for dtype, precision in [*INPUTS, (torch.float64, "highest")]:
        for batch in BATCHES:
            for grads in (
                integers(batch, ROWS, dtype=dtype),
                integers(batch, ROWS + 8, dtype=dtype)[:, 3:-5],
                integers(batch, ROWS + 1, dtype=dtype)[:, 1:],
            ):
                with cuda.force_variant(variant):
                    got = project("cuda", grads, COLS, kind, precision)
                check(got, grads, entries(kind, ROWS, COLS), kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_blocks_that_take_several_items(dtype: torch.dtype) -> None:
    """More work items than blocks, in clusters of two: rings and phases go round."""
    usable("cuda")
    rows, cols = 9000, 2048
    grads = integers(20, rows, dtype=dtype)
    got = project("cuda", grads, cols, "rademacher", "highest")
    check(got, grads, entries("rademacher", rows, cols), "rademacher")


@pytest.mark.parametrize("block", [16, 64, 1024, 2**16])
def test_cuda_sjlt(block: int) -> None:
    """Every loader, rows of a block, and what the adjoint and the matrix touch."""
    usable("cuda")
    key = MatrixKey("sjlt", SEED, STREAM, block)
    call = Call(key, ROW_OFFSET)
    truth = matrix_block(key, ROW_OFFSET, ROW_OFFSET + ROWS, 0, COLS)
    right = torch.from_numpy(np.asarray(truth, dtype=np.float64))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        for batch in (1, 5):
            for start in (0, 2, 3):
                grads = integers(batch, ROWS + 8, dtype=dtype)[:, start : start + ROWS]
                out = torch.full((batch, COLS), torch.nan, dtype=kept, device="cuda")
                registry.load("cuda").project([grads], out, call)
                check(out, grads, right, "rademacher")
        y = integers(5, COLS, dtype=dtype)
        out = torch.full((5, ROWS), torch.nan, dtype=kept, device="cuda")
        registry.load("cuda").project_transpose(y, out, call)
        check(out, y, right.T, "rademacher")
    block_of_r = torch.full((ROWS, COLS), torch.nan, device="cuda")
    registry.load("cuda").matrix(block_of_r, call, 0)
    assert torch.equal(block_of_r.cpu().double(), right)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_and_matrix(backend: str, kind: str) -> None:
    usable(backend)
    call = Call(MatrixKey(kind, SEED, STREAM), ROW_OFFSET)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        y = integers(35, 130, dtype=dtype)
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        out = torch.full((35, 700), torch.nan, dtype=kept, device="cuda")
        registry.load(backend).project_transpose(y, out, call)
        check(out, y, entries(kind, 700, 130).T, kind)
    block = torch.full((700, 130), torch.nan, device="cuda")
    registry.load(backend).matrix(block, call, 0)
    assert torch.equal(block.cpu().double(), entries(kind, 700, 130))


@pytest.mark.parametrize("kind", KINDS)
def test_triton_projection(kind: str) -> None:
    usable("triton")
    for dtype, precision in INPUTS[::2]:
        for grads in (
            integers(20, ROWS, dtype=dtype),
            integers(20, ROWS + 1, dtype=dtype)[:, 1:],
        ):
            got = project("triton", grads, COLS, kind, precision)
            check(got, grads, entries(kind, ROWS, COLS), kind)
