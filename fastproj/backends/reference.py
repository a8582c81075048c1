"""The reference backend: blocks of R from ``spec``, multiplied in float64. Slow, short, exact.

``precision`` is accepted and changes nothing: every product and sum is made in float64. Memory
beyond input and output is a few blocks of at most 2^19 entries, and a few rows of at most
BLOCK_COLS for each sample. Runs on any device: a block is made on the CPU and moved to where the
input is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastproj.call import Call
from fastproj.spec import MatrixKey, matrix_block

NAME = "reference"
BLOCK_ROWS = 512
BLOCK_COLS = 1024


def unavailable() -> str | None:
    """None: it needs only torch and NumPy."""
    return None


def unsupported(device_type: str, dtype: torch.dtype, kind: str) -> str | None:
    """None where the device can multiply in float64, else the reason."""
    return "mps has no float64; move the tensor to cpu" if device_type == "mps" else None


def describe() -> dict[str, str]:
    """What it would use here."""
    return {
        "speed": "50 (gaussian) to thousands of times (sjlt) slower than cpu",
        "arithmetic": "float64",
        "matrix": "NumPy",
        "threads": str(torch.get_num_threads()),
    }


def _spans(size: int, step: int, origin: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) covering 0..size, cut where ``origin`` + position is a multiple of step."""
    start = 0
    while start < size:
        stop = min(size, start + step - (origin + start) % step)
        yield start, stop
        start = stop


def _block(key: MatrixKey, row: int, rows: int, col: int, cols: int, like: Tensor) -> Tensor:
    """R[row : row + rows, col : col + cols] in float64 on the device of ``like``."""
    block = matrix_block(key, row, row + rows, col, col + cols)
    return torch.from_numpy(block).to(like.device, torch.float64)


def _product(x: Tensor, block: Tensor, kind: str) -> Tensor:
    """``x @ block``; of the sparse kind only what isn't zero is multiplied, so NaN stays there."""
    if kind != "sjlt":
        return x @ block
    rows, cols = block.nonzero(as_tuple=True)
    y = x.new_zeros((x.shape[0], block.shape[1]))
    step = max(1, BLOCK_ROWS * BLOCK_COLS // max(1, len(rows)))  # samples at a time
    for part, sums in zip(x.split(step), y.split(step), strict=True):
        sums.index_add_(1, cols, part[:, rows] * block[rows, cols])
    return y


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""
    for col, col_stop in _spans(out.shape[1], BLOCK_COLS):
        total = out.new_zeros((out.shape[0], col_stop - col), dtype=torch.float64)
        row = call.row_offset
        for piece in pieces:
            for p, p_stop in _spans(piece.shape[1], BLOCK_ROWS, row):
                block = _block(call.key, row + p, p_stop - p, col, col_stop - col, piece)
                total += _product(piece[:, p:p_stop].double(), block, call.key.kind)
            row += piece.shape[1]
        total *= call.scale
        if call.accumulate:
            total += out[:, col:col_stop]
        out[:, col:col_stop] = total


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    for p, p_stop in _spans(out.shape[1], BLOCK_ROWS, call.row_offset):
        total = out.new_zeros((out.shape[0], p_stop - p), dtype=torch.float64)
        for col, col_stop in _spans(y.shape[1], BLOCK_COLS):
            block = _block(call.key, call.row_offset + p, p_stop - p, col, col_stop - col, y)
            total += _product(y[:, col:col_stop].double(), block.T, call.key.kind)
        out[:, p:p_stop] = total * call.scale


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    for p, p_stop in _spans(out.shape[0], BLOCK_ROWS, call.row_offset):
        for col, col_stop in _spans(out.shape[1], BLOCK_COLS):
            out[p:p_stop, col:col_stop] = _block(
                call.key, call.row_offset + p, p_stop - p, col_offset + col, col_stop - col, out
            )
