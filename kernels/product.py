"""The sparse kind as an epilogue: per-sample gradients that are products, sketched as they form.

The gradient by a linear layer is ``left[b].T @ right[b]``, [m, n]. A program forms 16 rows of it by
STRETCH columns on the matrix unit, and adds them to the projection from where they lie: nothing of
the gradient is written to memory. See ``kernels/sjlt.py`` for packed chunks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .project import widened
from .sjlt import packed_chunk, sign_of, tile_words

# What may be any number without another compilation.
_VARYING = [
    "M",
    "T",
    "stride_lb",
    "stride_lt",
    "stride_rb",
    "stride_rt",
    "row_offset",
    "tile",
    "tag",
    "stream_id",
    "seed_low",
    "seed_high",
    "n_units",
    "units_per_split",
]


@triton.jit
def packed_columns(
    tile,
    part,
    tag,
    stream_id,
    seed_low,
    seed_high,
    LOG2: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The packed chunks of columns ``part * COLUMNS ..``, repeated for columns.

    tile : uint32 ``[ROWS, 1]``, any tiles of rows; the result is ``[ROWS, COLUMNS]``.
    """
    QUADS: tl.constexpr = COLUMNS // 64
    quad = (part * QUADS + tl.arange(0, QUADS)).to(tl.uint32)[None, :]
    h = (quad << 2) & ((1 << (LOG2 - 4)) - 1)  # of four chunks within the tile
    column = tl.zeros((1, 1), tl.uint32) + (part * COLUMNS >> LOG2)
    u0, u1, u2, u3 = tile_words(tile, quad, tag, 1, stream_id, seed_low, seed_high)
    a, b, d, e = tile_words(tile, column, tag, 0, stream_id, seed_low, seed_high)
    u0 = packed_chunk(u0, h, a, b, d, e, LOG2)
    u1 = packed_chunk(u1, h | 1, a, b, d, e, LOG2)
    u2 = packed_chunk(u2, h | 2, a, b, d, e, LOG2)
    u3 = packed_chunk(u3, h | 3, a, b, d, e, LOG2)
    u = tl.join(tl.join(u0, u2), tl.join(u1, u3))
    u = tl.broadcast_to(tl.reshape(u, (ROWS, QUADS * 4))[:, :, None], (ROWS, QUADS * 4, 16))
    return tl.reshape(u, (ROWS, COLUMNS))


@triton.jit
def sketched(grad, first, count, packed, COLUMNS: tl.constexpr):
    """What the rows of one tile add to some of its columns, ``[COLUMNS]``.

    grad : ``[rows, STRETCH]``, each row a stretch of the flattened gradient.
    first : ``[rows, 1]``, where in the tile the stretch begins; may be negative.
    count : ``[rows, 1]``, how many of its entries there are.
    """
    i = tl.arange(0, COLUMNS)[None, :]
    i15 = (i & 15).to(tl.uint32)
    at = ((packed ^ i15) & 0xFFFF).to(tl.int32) - first
    there = (at >= 0) & (at < count)
    value = tl.gather(grad, tl.where(there, at, 0), 1)
    return tl.sum(tl.where(there, sign_of(packed, i15) * value, 0.0), 0)


@triton.jit(do_not_specialize=_VARYING)
def project_product_kernel(
    left_ptr,  # [B, T, M], the last dimension dense
    right_ptr,  # [B, T, N], likewise
    workspace_ptr,  # [splits, B, width] float32
    M,
    N,
    T,
    stride_lb: tl.int64,
    stride_lt: tl.int64,
    stride_rb: tl.int64,
    stride_rt: tl.int64,
    row_offset: tl.int64,  # within the first tile
    tile,  # number of the first tile, low 32 bits
    tag,
    stream_id,
    seed_low,
    seed_high,
    width,  # of the workspace: K, in whole tiles
    n_units,  # 16 rows by STRETCH columns each
    units_per_split,
    LOG2: tl.constexpr,
    STRETCH: tl.constexpr,  # at most 2^LOG2
    BLOCK_T: tl.constexpr,
    PART: tl.constexpr,  # columns of R at a time, at most 2^LOG2
    ALIGNED: tl.constexpr,  # no stretch reaches into the next tile
    PRECISION: tl.constexpr,  # of float32 products
    UNIT: tl.constexpr,
):
    """Partial sums of flatten(left[b].T @ right[b]) @ R. Grid: splits, samples."""
    BLOCK_M: tl.constexpr = 16
    TILE: tl.constexpr = 1 << LOG2
    sample = tl.program_id(1).to(tl.int64)
    left = left_ptr + sample * stride_lb.to(tl.int64)
    right = right_ptr + sample * stride_rb.to(tl.int64)
    first = tl.program_id(0) * units_per_split
    last = tl.minimum(first + units_per_split, n_units)
    stretches = (N + STRETCH - 1) // STRETCH
    j = tl.arange(0, STRETCH)
    to = workspace_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + sample) * width
    for unit in range(first, last):
        m = unit // stretches * BLOCK_M + tl.arange(0, BLOCK_M)
        start = unit % stretches * STRETCH
        n = start + j
        grad = tl.zeros((BLOCK_M, STRETCH), tl.float32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            of_left = left + t.to(tl.int64)[None, :] * stride_lt.to(tl.int64) + m[:, None]
            of_right = right + t.to(tl.int64)[:, None] * stride_rt.to(tl.int64) + n[None, :]
            a = tl.load(of_left, mask=(m < M)[:, None] & (t < T)[None, :], other=0.0)
            b = tl.load(of_right, mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
            if UNIT == "interpreter":  # it would multiply the bits of bf16
                grad += tl.dot(widened(a), widened(b), input_precision="ieee")
            else:
                grad = tl.dot(a, b, grad, input_precision=PRECISION)
        p = row_offset.to(tl.int64) + m.to(tl.int64) * N + start
        rows = (tile.to(tl.uint32) + (p >> LOG2).to(tl.uint32))[:, None]
        place = (p & (TILE - 1)).to(tl.int32)[:, None]
        count = tl.where(m < M, tl.minimum(N - start, STRETCH), 0)[:, None]
        for c in range(width // PART):
            packed = packed_columns(
                rows, c, tag, stream_id, seed_low, seed_high, LOG2, BLOCK_M, PART
            )
            some = sketched(grad, place, count, packed, PART)
            if not ALIGNED:  # the rest of the stretch lies in the next tile
                packed = packed_columns(
                    rows + 1, c, tag, stream_id, seed_low, seed_high, LOG2, BLOCK_M, PART
                )
                some += sketched(grad, place - TILE, count, packed, PART)
            pointers = to + c * PART + tl.arange(0, PART)
            # Not always by the thread that wrote it: the sum above has passed a barrier since, in
            # the gather among columns or in the sum over rows, whose threads lie in several warps.
            if unit > first:
                some += tl.load(pointers)
            tl.store(pointers, some)
