"""How tensor cores add, bit for bit: they cut where ordinary units round.

A step takes some products and the accumulator. Each is aligned to the largest exponent among them
and cut, toward zero, some bits below it; the cut values are added exactly, and the sum is cut to
float32. A product is not normalised: its exponent is the sum of its factors'. From Xie, Wang, Yang
and Yang, MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and Matrix Cores (arXiv 2511.10909;
checked there bit by bit against the GPUs), in agreement with Fasi, Higham, Mikaitis and Pranesh,
Numerical behavior of NVIDIA tensor cores (PeerJ CS 7, e330, 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Unit:
    """products : 16-bit products of one step. bits : kept below the largest exponent."""

    products: int
    bits: int


AMPERE = Unit(8, 24)  # and Ada
HOPPER = Unit(16, 25)  # mma.sync and wgmma; and Blackwell
EXACT = Unit(16, 0)  # no unit: sums as float64 makes them, rounded once a step

_LEAST = -126  # the exponent of zero, and of what bf16 and float32 hold below 2^-126


def _exponent(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """floor(log2 |x|), at least _LEAST."""
    return ((x.view(np.uint32) >> 23 & 255).astype(np.int32) - 127).clip(_LEAST)


def _cut(x: NDArray[np.float64]) -> Floats:
    """To float32, toward zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def multiply(a: Floats, b: Floats, c: Floats, unit: Unit) -> Floats:
    """c [..., m, n] + a [..., m, k] @ b [..., k, n] as ``unit`` computes it, finite values only.

    a, b : bf16 values, or fp16 ones that are normal, in float32; k a multiple of unit.products.
    """
    a, b, c = (np.ascontiguousarray(x, dtype=np.float32) for x in (a, b, c))
    a_exponent, b_exponent = _exponent(a), _exponent(b)
    for start in range(0, a.shape[-1], unit.products):
        step = slice(start, start + unit.products)
        x = (
            a[..., :, step, None].astype(np.float64) * b[..., None, step, :]
        )  # [..., m, products, n]
        if unit == EXACT:
            c = (x.sum(axis=-2) + c).astype(np.float32)
            continue
        exponent = a_exponent[..., :, step, None] + b_exponent[..., None, step, :]
        largest = np.where(x == 0, _LEAST, exponent).max(axis=-2)
        largest = np.maximum(largest, _exponent(c))  # [..., m, n]
        scale = np.exp2((unit.bits - largest).astype(np.float64))
        kept = np.trunc(x * scale[..., None, :]).sum(axis=-2) + np.trunc(c * scale)
        c = _cut(kept / scale)
    return c


def terms_of(x: Floats, count: int) -> list[Floats]:
    """float32 as bf16 terms, the largest first: cut off, but the last of one or two is rounded."""
    found: list[Floats] = []
    for left in reversed(range(count)):
        bits = x.view(np.uint32)
        if left == 0 and count < 3:
            bits = bits + 0x7FFF + (bits >> 16 & 1)
        found.append((bits & np.uint32(0xFFFF0000)).view(np.float32))
        x = x - found[-1]
    return found


def project(
    left: Sequence[Floats], right: Floats, fold_rows: int, unit: Unit, tile_rows: int = 64
) -> Floats:
    """Sum of ``term [B, P] @ right [P, K]`` over the terms, in the order in which kernels add it.

    A tile of rows is added up for one term after another, in the order of ``left``. Every
    ``fold_rows`` the accumulator is added to the sum [B, K] in float32, and starts anew.
    """
    rows, tiles = right.shape[0], fold_rows // tile_rows
    folds = -(-rows // fold_rows)
    padding = folds * fold_rows - rows
    right = np.pad(right, ((0, padding), (0, 0))).reshape(folds, tiles, tile_rows, -1)
    terms = [np.pad(term, ((0, 0), (0, padding))) for term in left]
    terms = [term.reshape(-1, folds, tiles, tile_rows).transpose(1, 2, 0, 3) for term in terms]
    part = np.zeros((folds, terms[0].shape[2], right.shape[3]), dtype=np.float32)
    for tile in range(tiles):
        for term in terms:
            part = multiply(term[:, tile], right[:, tile], part, unit)
    total = np.zeros(part.shape[1:], dtype=np.float32)
    for each in part:
        total = total + each
    return total
