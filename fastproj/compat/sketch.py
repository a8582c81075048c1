"""Sums over the matrix itself, a block of rows at a time: column norms and Gram matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fastproj

BLOCK = 1 << 24  # entries of R at a time: 128 MB in float64


def row_blocks(
    rows: int,
    cols: int,
    seed: int,
    kind: str,
    device: torch.device | str,
    block: int | None = None,
) -> Iterator[Tensor]:
    """``R[:rows, :cols]`` from top to bottom, in float64 blocks of at most BLOCK entries."""
    step = max(1, BLOCK // cols)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield fastproj.matrix(
            slice(start, stop), cols, seed, kind, block=block, dtype=torch.float64, device=device
        )


def column_squares(
    rows: int, cols: int, seed: int, kind: str, device: torch.device | str
) -> Tensor:
    """Squared norms [cols], float64, of the columns of R."""
    total = torch.zeros(cols, dtype=torch.float64, device=device)
    for part in row_blocks(rows, cols, seed, kind, device):
        total += part.square().sum(0)
    return total


def gram(rows: int, cols: int, seed: int, kind: str, block: int | None = None) -> Tensor:
    """``R.T @ R`` [cols, cols] for cols <= rows, else ``R @ R.T`` [rows, rows]; float64, cpu."""
    size = min(rows, cols)
    total = torch.zeros(size, size, dtype=torch.float64, device="cpu")
    if cols <= rows:
        for part in row_blocks(rows, cols, seed, kind, "cpu", block):
            total.addmm_(part.T, part)
    else:
        step = max(1, BLOCK // rows)
        for start in range(0, cols, step):
            columns = slice(start, min(cols, start + step))
            part = fastproj.matrix(
                rows, columns, seed, kind, block=block, dtype=torch.float64, device="cpu"
            )
            total.addmm_(part, part.T)
    return total
