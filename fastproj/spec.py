"""Spec v1: the projection matrix, in NumPy. This page is the truth; every backend reproduces it.

``R[p, k]`` is a pure function of ``(kind, seed, stream, p, k)``, and of ``block`` for kind sjlt:
64-bit row ``p``, 32-bit column ``k``, 64-bit ``seed``, 32-bit ``stream``. Entries are unscaled:
+1 / -1 (Rademacher), exact bf16 values with mean 0 and variance 0.9999 (Gaussian), +1 / 0 / -1
(sjlt).

The dense kinds. One column of one row block (512 rows Rademacher, 32 rows Gaussian) takes four
Philox4x32-10 calls, one for each ``lane``; a call gives the words ``w[0..3]``.

Bits of the row number, high to low::

    Rademacher   block = p >> 9 | word: 2 bits | bit: 4 bits | lane: 2 bits | half: 1 bit
    Gaussian     block = p >> 5 | word: 2 bits               | lane: 2 bits | half: 1 bit

    counter = (block & 0xffffffff, k, (block >> 32) << 8 | kind << 2 | lane, stream)
    u16     = w[word] >> 16 * half & 0xffff
    Rademacher entry = +1 if (u16 >> bit & 1) == 0 else -1
    Gaussian entry   = T[(u16 >> 7 & 255) << 1 | u16 >> 1 & 1], negative if bit 15 of u16 is set

Kind sjlt, a sparse Johnson-Lindenstrauss matrix (the block construction of Kane and Nelson, JACM
2014). R is tiled by signed permutation matrices of block x block, block = 2^(m + 4): each row has
one entry in every ``block`` columns, each column one in every ``block`` rows. In tile (t, c), 16
neighbouring columns 16 h + i read 16 neighbouring rows, xor-ed among each other::

    t, c = p // block, k // block      h = k % block // 16      i = k % 16
    tag = (t >> 32) << 8 | m << 4 | 2 << 2        mask = 2^m - 1        s = (m + 1) >> 1
    a, b, d, e = philox(t & 0xffffffff, c, tag, stream)
    x = (h * (a | 1) + b) & mask;  x ^= x >> s;  x = (x * (d | 1) + e) & mask;  x ^= x >> s
    u = philox(t & 0xffffffff, k >> 6, tag | 1, stream)[k >> 4 & 3]
    sjlt entry = (-1 if u >> i & 1 else +1) if p % block == 16 * x + (i ^ u >> 16 & 15) else 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastproj.gauss_table import GAUSS_TABLE_V1

SPEC_VERSION = 1
KINDS = ("rademacher", "gaussian", "sjlt")  # a kind's number in the counter is its place here
ROW_BLOCK_BITS = {"rademacher": 9, "gaussian": 5}  # log2 of the rows that share a block number
MIN_BLOCK, MAX_BLOCK = 1 << 4, 1 << 16  # of kind sjlt
MAX_ROWS = 1 << 56  # rows p < 2^56, far inside what the counter can hold
MAX_COLS = 1 << 32  # columns k < 2^32

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)


@dataclass(frozen=True)
class MatrixKey:
    """What names one infinite matrix: ``kind`` (of KINDS), ``seed`` < 2^64, ``stream`` < 2^32.

    ``block`` is of kind sjlt alone: a power of two, MIN_BLOCK .. MAX_BLOCK; 0 for the others.
    """

    kind: str
    seed: int
    stream: int
    block: int = 0


def default_block(proj_dim: int) -> int:
    """The block that kind sjlt has where none is given: four to eight entries a row.

    The power of two at or below ``proj_dim / 4``, between MIN_BLOCK and MAX_BLOCK.
    """
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << proj_dim.bit_length() >> 3))


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

    Returns int8 (Rademacher, sjlt) or float32 (Gaussian) ``[rows, cols]``.
    Rows are below MAX_ROWS, columns below MAX_COLS; memory is a small multiple of the result.
    """
    if key.kind == "sjlt":
        return _sjlt_block(key, row_start, row_stop, col_start, col_stop)
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


def matrix_rows(
    key: MatrixKey, rows: npt.NDArray[np.uint64], col_start: int, col_stop: int
) -> npt.NDArray[np.int8] | npt.NDArray[np.float32]:
    """``R[rows, col_start:col_stop]`` for row numbers ``rows`` [n] in any order.

    As ``matrix_block``, but memory is up to 160 bytes for each entry. A Philox call is made once
    for all rows that it serves.
    """
    if key.kind == "sjlt":
        block = np.uint64(key.block)
        tiles, tile = np.unique(rows // block, return_inverse=True)
        k = np.arange(col_start, col_stop, dtype=np.uint64)
        row, sign = sjlt_entries(key, tiles[:, None], k)
        return np.where(row[tile] == (rows % block)[:, None], sign[tile], np.int8(0))
    one, three = np.uint64(1), np.uint64(3)
    bits = np.uint64(ROW_BLOCK_BITS[key.kind])
    calls, call = np.unique(rows >> bits << np.uint64(2) | rows >> one & three, return_inverse=True)
    block, lane = (calls >> np.uint64(2))[:, None], (calls & three)[:, None]
    tag = np.uint64(KINDS.index(key.kind) << 2)
    words = philox4x32_10(
        (
            block & _MASK32,
            np.arange(col_start, col_stop, dtype=np.uint64),
            (block >> _SHIFT32) << np.uint64(8) | tag | lane,
            key.stream,
        ),
        (key.seed & 0xFFFFFFFF, key.seed >> 32),
    )  # [word, call, column]
    word = (rows >> bits - np.uint64(2) & three).astype(np.int64)
    half = (rows & one) << np.uint64(4)
    u16 = words[word, call] >> half[:, None] & np.uint64(0xFFFF)  # [row, column]
    if key.kind == "gaussian":
        return np.asarray(gauss_map()[u16])
    bit = rows >> np.uint64(3) & np.uint64(15)
    return np.int8(1) - np.int8(2) * (u16 >> bit[:, None] & one).astype(np.int8)


def _sjlt_block(
    key: MatrixKey, row_start: int, row_stop: int, col_start: int, col_stop: int
) -> npt.NDArray[np.int8]:
    """``matrix_block`` of kind sjlt: the one entry that each column has in each tile of rows."""
    out = np.zeros((max(0, row_stop - row_start), col_stop - col_start), dtype=np.int8)
    k = np.arange(col_start, col_stop, dtype=np.uint64)
    for tile in range(row_start // key.block, -(-row_stop // key.block)):
        row, sign = sjlt_entries(key, tile, k)
        place = row.astype(np.int64) + tile * key.block - row_start
        inside = (place >= 0) & (place < len(out))
        out[place[inside], np.flatnonzero(inside)] = sign[inside]
    return out


def sjlt_entries(
    key: MatrixKey, tile: int | npt.NDArray[np.uint64], k: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int8]]:
    """Where columns ``k`` [n] have their entry in rows ``tile * block ..`` of kind sjlt, its sign.

    Returns rows within the tile, 0 <= row < block, and +1 / -1; each [n], or [tiles, n] for
    ``tile`` [tiles, 1].
    """
    one, four, sixteen = np.uint64(1), np.uint64(4), np.uint64(16)
    m = key.block.bit_length() - 5
    mask, s = np.uint64((1 << m) - 1), np.uint64((m + 1) >> 1)
    tile = np.asarray(tile, dtype=np.uint64)
    t = tile & _MASK32
    tag = (tile >> _SHIFT32) << np.uint64(8) | np.uint64(m << 4 | KINDS.index(key.kind) << 2)
    philox_key = key.seed & 0xFFFFFFFF, key.seed >> 32
    columns, column = np.unique(k >> np.uint64(m + 4), return_inverse=True)
    a, b, d, e = philox4x32_10((t, columns, tag, key.stream), philox_key)[..., column]
    x = ((k >> four & mask) * (a | one) + b) & mask
    x ^= x >> s
    x = (x * (d | one) + e) & mask
    x ^= x >> s
    quads, quad = np.unique(k >> np.uint64(6), return_inverse=True)
    words = philox4x32_10((t, quads, tag | one, key.stream), philox_key)
    u = np.moveaxis(words, 0, -1)[..., quad, (k >> four & np.uint64(3)).astype(np.int64)]
    i = k & np.uint64(15)
    row = sixteen * x + (i ^ (u >> sixteen & np.uint64(15)))
    return row, np.int8(1) - np.int8(2) * (u >> i & one).astype(np.int8)
