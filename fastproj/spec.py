"""Spec v1: the projection matrix, in NumPy. This page is the truth; every backend reproduces it.

``R[p, k]`` is a pure function of ``(kind, seed, stream, p, k)``: 64-bit row ``p``, 32-bit column
``k``, 64-bit ``seed``, 32-bit ``stream``. Entries are unscaled: +1 / -1, or exact bf16 values with
mean 0 and variance 0.9999. One column of one row block (512 rows Rademacher, 32 rows Gaussian)
takes four Philox4x32-10 calls, one for each ``lane``; a call gives the words ``w[0..3]``.

Bits of the row number, high to low::

    Rademacher   block = p >> 9 | word: 2 bits | bit: 4 bits | lane: 2 bits | half: 1 bit
    Gaussian     block = p >> 5 | word: 2 bits               | lane: 2 bits | half: 1 bit

    counter = (block & 0xffffffff, k, (block >> 32) << 8 | kind << 2 | lane, stream)
    u16     = w[word] >> 16 * half & 0xffff
    Rademacher entry = +1 if (u16 >> bit & 1) == 0 else -1
    Gaussian entry   = T[(u16 >> 7 & 255) << 1 | u16 >> 1 & 1], negative if bit 15 of u16 is set
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastproj.gauss_table import GAUSS_TABLE_V1

SPEC_VERSION = 1
KINDS = ("rademacher", "gaussian")  # a kind's number in the counter is its place here
ROW_BLOCK_BITS = {"rademacher": 9, "gaussian": 5}  # log2 of the rows that share a block number
MAX_ROWS = 1 << 56  # rows p < 2^56, far inside what the counter can hold
MAX_COLS = 1 << 32  # columns k < 2^32

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


@dataclass(frozen=True)
class MatrixKey:
    """What names one infinite matrix: ``kind`` (of KINDS), ``seed`` < 2^64, ``stream`` < 2^32."""

    kind: str
    seed: int
    stream: int


def philox4x32_10(
    counter: tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike, npt.ArrayLike],
    key: tuple[int, int],
) -> npt.NDArray[np.uint64]:
    """Ten rounds of Philox-4x32 (Salmon et al., SC 2011).

    counter : four arrays of 32-bit values that broadcast together, to shape S.
    key : two 32-bit integers.
    Returns the four output words, each below 2^32, uint64 ``[4, *S]``.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        m0 = np.uint64(0xD2511F53) * c0
        m1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (m1 >> _SHIFT32) ^ c1 ^ np.uint64(k0),
            m1 & _MASK32,
            (m0 >> _SHIFT32) ^ c3 ^ np.uint64(k1),
            m0 & _MASK32,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


@lru_cache(maxsize=1)
def gauss_table() -> npt.NDArray[np.float32]:
    """The magnitudes T, float32 ``[512]``: RMS of |z| in 512 equiprobable bins, rounded to bf16."""
    bits = np.frombuffer(bytes.fromhex(GAUSS_TABLE_V1), dtype=">u2").astype(np.uint32)
    table = (bits << np.uint32(16)).view(np.float32)
    table.flags.writeable = False
    return table


@lru_cache(maxsize=1)
def gauss_map() -> npt.NDArray[np.float32]:
    """The Gaussian entry for every 16-bit code, float32 ``[65536]``."""
    u16 = np.arange(1 << 16)
    magnitude = gauss_table()[(u16 >> 7 & 255) << 1 | u16 >> 1 & 1]
    entries = np.where(u16 >> 15 == 1, -magnitude, magnitude)
    entries.flags.writeable = False
    return entries


def matrix_block(
    key: MatrixKey, row_start: int, row_stop: int, col_start: int, col_stop: int
) -> npt.NDArray[np.int8] | npt.NDArray[np.float32]:
    """The block ``R[row_start:row_stop, col_start:col_stop]``, unscaled, C-ordered.

    Returns int8 (Rademacher) or float32 (Gaussian) ``[rows, cols]``.
    Rows are below MAX_ROWS, columns below MAX_COLS; memory is a small multiple of the result.
    """
    bits = ROW_BLOCK_BITS[key.kind]
    first, last = row_start >> bits, (row_stop - 1 >> bits) + 1
    block = np.arange(first, max(first, last), dtype=np.uint64)[:, None, None]
    lane = np.arange(4, dtype=np.uint64)[:, None]
    column = np.arange(col_start, col_stop, dtype=np.uint64)
    tag = np.uint64(KINDS.index(key.kind) << 2)
    words = philox4x32_10(
        (block & _MASK32, column, (block >> _SHIFT32) << np.uint64(8) | tag | lane, key.stream),
        (key.seed & 0xFFFFFFFF, key.seed >> 32),
    )  # [word, block, lane, column]
    halves = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)]).astype(np.uint16)
    u16 = np.ascontiguousarray(halves.transpose(2, 1, 3, 0, 4))  # [block, word, lane, half, column]
    if key.kind == "gaussian":
        entries = gauss_map()[u16]
    else:
        bit = np.arange(16, dtype=np.uint16)[:, None, None, None]
        negative = u16[:, :, None] >> bit & np.uint16(1)  # [block, word, bit, lane, half, column]
        entries = np.int8(1) - (negative << np.uint16(1)).astype(np.int8)
    rows = entries.reshape(block.size << bits, column.size)
    skip = row_start - (first << bits)
    return np.ascontiguousarray(rows[skip : skip + row_stop - row_start])
