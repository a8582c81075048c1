"""torch.matmul with R drawn by torch in blocks of rows, each used once and dropped.

This is how packages project without a kernel of their own: R costs time, but no memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.providers.base import (
    CHECK_COLUMNS,
    DENSE_KINDS,
    Case,
    Inputs,
    Prepared,
    Provider,
    relative_error,
)

NAME = "torch.matmul R in blocks"
BLOCK_BYTES = 256 << 20  # of R, as large as helps
MOST_ROWS = 10**6  # enough for a rate: drawing takes far longer than multiplying


def providers() -> list[Provider]:
    """One."""
    return [Provider(NAME, prepare)]


def draw(rows: int, cols: int, kind: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A block of a matrix of its own, [rows, cols]."""
    block = torch.empty((rows, cols), dtype=dtype, device=generator.device)
    if kind == "gaussian":
        return block.normal_(generator=generator)
    if kind == "rademacher":
        return block.random_(0, 2, generator=generator).mul_(2).sub_(1)
    raise ValueError(f"draw: received kind={kind!r}; expected rademacher or gaussian")


def prepare(case: Case, inputs: Inputs) -> Prepared | str:
    """A projection of the case, or of its first rows."""
    if case.kind not in DENSE_KINDS:
        return "draws dense matrices only"
    rows = min(case.rows, MOST_ROWS)
    step = max(1, BLOCK_BYTES // (case.dtype.itemsize * case.cols))
    grads = inputs.grads(rows)  # [B, p]

    def project(first: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Columns from ``first`` on, summed in ``dtype``."""
        generator = torch.Generator(case.device).manual_seed(0)
        total = torch.zeros((case.batch, case.cols - first), dtype=dtype, device=case.device)
        for start in range(0, rows, step):
            part = grads[:, start : start + step]
            block = draw(part.shape[1], case.cols, case.kind, case.dtype, generator)[:, first:]
            if dtype == torch.float64:
                part, block = part.double(), block.double()
            total += part @ block
        return total

    def error(result: Tensor) -> float:
        width = min(CHECK_COLUMNS, case.cols)
        return relative_error(result[:, -width:], project(case.cols - width, torch.float64))

    note = "draws its own R" if rows == case.rows else "fewer rows: a rate needs no more"
    bound = 1.6e-2 if case.dtype != torch.float32 else 4e-3  # float32: TF32 may be on
    return Prepared(project, rows, case.flops(rows), error, bound, note)
