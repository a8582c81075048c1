"""What the operations must give, from the stored matrix: the other side of the comparisons.

KINDS are the dense ones; test_sjlt.py has the sparse kind.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastproj.spec import MatrixKey, matrix_block

KINDS = ["rademacher", "gaussian"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# batch, rows, proj_dim, row_offset: ragged tiles of every kernel, a block number beyond 32 bits
SHAPES = [
    (1, 1, 1, 0),
    (3, 700, 65, 5),
    (8, 1500, 130, 2**41 - 700),
    (13, 1537, 257, 1),
    (70, 600, 64, 3),
    (5, 9000, 100, 0),
    (2, 513, 2500, 511),
]


def stored(
    rows: int,
    cols: int,
    seed: int = 0,
    kind: str = "rademacher",
    stream: int = 0,
    row_offset: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    block: int = 0,
) -> Tensor:
    """R[row_offset : row_offset + rows, :cols], from the spec page."""
    key = MatrixKey(kind, seed, stream, block)
    entries = matrix_block(key, row_offset, row_offset + rows, 0, cols)
    return torch.from_numpy(entries).to(device, dtype)


def integers(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, exact in every dtype, whose sums of up to 2^20 are exact in float32."""
    values = np.random.default_rng(seed).integers(-8, 9, size=shape)
    return torch.from_numpy(values).to(dtype)


def normals(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the float64 truth."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def blocked_matmul(a: Tensor, b: Tensor, rows: int = 512) -> Tensor:
    """a @ b in its own dtype, blocks of rows of b one after another.

    torch's matmul sums so for some shapes and in one accumulator for others; this is the better
    one: at 10^6 rows in float32 its error is 1e-6, that of one accumulator 2e-5.
    """
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for start in range(0, a.shape[1], rows):
        total += a[:, start : start + rows] @ b[start : start + rows]
    return total


def matmul_bound(a: Tensor, b: Tensor, unit: float = 2.0**-24) -> Tensor:
    """An entrywise bound on |fl(a @ b) - a @ b| for any order of sums in arithmetic of ``unit``.

    gamma_n |a| |b|, Higham, Accuracy and Stability of Numerical Algorithms, section 3.5; two more
    roundings for a scale and for storing.
    """
    n = a.shape[1] + 2
    return n * unit / (1 - n * unit) * (a.double().abs() @ b.double().abs())
