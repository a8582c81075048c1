"""The sparse kind on GPUs: gathers in a fixed order, no atomics (spec v1; see ``fastproj.spec``).

R is tiled by signed permutation matrices of ``2^LOG2`` rows and columns. 16 neighbouring columns, a
chunk, read 16 neighbouring rows, xor-ed among each other. A *packed chunk* holds in 32 bits what
that takes: bits 0..3 what rows are xor-ed by, 4..15 the number of the 16 rows in their tile, 16..31
the signs of the columns. So column ``k`` reads row ``(packed ^ (k & 15)) & 0xffff`` of its tile.

A program makes the packed chunks of four tiles of rows at a time, so that Philox calls fill its
threads, and shares them among the samples of its batch tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .generate import philox4x32_10
from .project import widened

_VARYING = [
    "B",
    "stride_b",
    "stride_p",
    "origin",
    "n_rows",
    "col_offset",
    "tile",
    "tag",
    "stream_id",
    "seed_low",
    "seed_high",
    "slot",
    "n_panels",
    "panel_step",
    "panels_per_split",
]
_VARYING_TRANSPOSE = [
    "B",
    "K",
    "n_rows",
    "stride_yb",
    "stride_yk",
    "stride_ob",
    "stride_op",
    "origin",
    "scale",
    "tile",
    "tag",
    "stream_id",
    "seed_low",
    "seed_high",
    "part",
]
_VARYING_MATRIX = [
    "n_rows",
    "n_cols",
    "stride_p",
    "stride_k",
    "origin",
    "col_offset",
    "tile",
    "tag",
    "stream_id",
    "seed_low",
    "seed_high",
    "part",
]


@triton.jit
def tile_words(tile, column, tag, which, stream_id, seed_low, seed_high):
    """Philox words of tiles of rows (uint32) and ``column``, which broadcast together."""
    zero = (tile ^ tile) + (column ^ column)
    return philox4x32_10(
        tile + zero,
        column + zero,
        (tag.to(tl.uint32) | which) + zero,
        stream_id.to(tl.uint32) + zero,
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def mixed(x, LOG2: tl.constexpr):
    """One step of the permutation, its own inverse."""
    return x ^ (x >> ((LOG2 - 3) // 2))


@triton.jit
def row_chunks(h, a, b, d, e, LOG2: tl.constexpr):
    """Which 16 rows of a tile the chunks ``h`` of a tile's columns read."""
    MASK: tl.constexpr = (1 << (LOG2 - 4)) - 1
    if LOG2 == 4:
        return (h ^ h) + (a ^ a)
    else:
        x = mixed((h * (a | 1) + b) & MASK, LOG2)
        return mixed((x * (d | 1) + e) & MASK, LOG2)


@triton.jit
def inverse(odd):
    """The multiplicative inverse of an odd number modulo 2^32 (Newton's iteration)."""
    x = odd * 3 ^ 2  # right in 5 bits
    for _ in tl.static_range(3):
        x = x * (2 - odd * x)
    return x


@triton.jit
def column_chunks(x, a, b, d, e, LOG2: tl.constexpr):
    """The chunk of columns that reads the 16 rows ``x``: the inverse of row_chunks."""
    MASK: tl.constexpr = (1 << (LOG2 - 4)) - 1
    if LOG2 == 4:
        return (x ^ x) + (a ^ a)
    else:
        h = ((mixed(x, LOG2) - e) * inverse(d | 1)) & MASK
        return ((mixed(h, LOG2) - b) * inverse(a | 1)) & MASK


@triton.jit
def packed_chunk(u, h, a, b, d, e, LOG2: tl.constexpr):
    """Chunk ``h`` of a tile's columns, packed; u : its word of signs."""
    return (u << 16) | (row_chunks(h, a, b, d, e, LOG2) << 4) | ((u >> 16) & 15)


@triton.jit
def packed_chunks(
    tile,
    column,
    tag,
    stream_id,
    seed_low,
    seed_high,
    LOG2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):
    """The packed chunks of columns ``column ..`` of tiles ``tile ..``, ``[BLOCK_K / 32, TILES]``.

    column : uint32, a multiple of 64. Two neighbouring chunks stand in 64 bits, the first one low.
    A thread makes the four chunks of 64 columns of a tile, the words of their tile included:
    nothing is exchanged among threads before the end, and there in one step.
    """
    t = (tile + tl.arange(0, TILES).to(tl.uint32))[None, :]
    quad = (column // 64 + tl.arange(0, BLOCK_K // 64).to(tl.uint32))[:, None]
    u0, u1, u2, u3 = tile_words(t, quad, tag, 1, stream_id, seed_low, seed_high)
    c = (quad << 6) >> LOG2
    a, b, d, e = tile_words(t, c, tag, 0, stream_id, seed_low, seed_high)
    h = quad << 2
    u0 = packed_chunk(u0, h, a, b, d, e, LOG2)
    u1 = packed_chunk(u1, h | 1, a, b, d, e, LOG2)
    if LOG2 == 5:  # 64 columns are two tiles'
        a, b, d, e = tile_words(t, c | 1, tag, 0, stream_id, seed_low, seed_high)
    u2 = packed_chunk(u2, h | 2, a, b, d, e, LOG2)
    u3 = packed_chunk(u3, h | 3, a, b, d, e, LOG2)
    low = u0.to(tl.uint64) | (u1.to(tl.uint64) << 32)
    high = u2.to(tl.uint64) | (u3.to(tl.uint64) << 32)
    u = tl.join(low, high)  # [BLOCK_K / 64, tile, pair]
    return tl.reshape(tl.permute(u, (0, 2, 1)), (BLOCK_K // 32, TILES))


@triton.jit
def by_column(packed, BLOCK_K: tl.constexpr):
    """Packed chunks ``[BLOCK_K / 16]``, repeated for each of their columns: ``[BLOCK_K]``."""
    chunks = tl.broadcast_to(packed[:, None], (BLOCK_K // 16, 16))
    return tl.reshape(chunks, (BLOCK_K,))


@triton.jit
def signed(value, negative):
    """-value where ``negative``."""
    return tl.where(negative, -value, value)


@triton.jit
def by_column_of_four(packed, BLOCK_K: tl.constexpr, REPEAT: tl.constexpr):
    """packed_chunks of four tiles to each tile's, repeated for a chunk's 16 columns or 8 pairs.

    Returns four of ``[BLOCK_K / 32 * REPEAT]``; one exchange among threads for all.
    """
    COLUMNS: tl.constexpr = BLOCK_K // 32 * REPEAT
    chunks = tl.broadcast_to(packed[:, None, :], (BLOCK_K // 32, REPEAT, 4))
    even, odd = tl.split(tl.reshape(chunks, (COLUMNS, 2, 2)))  # tiles 0, 2 and 1, 3
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def add_tile(
    part,
    base,
    p,
    first,
    last,
    stride_p,
    UNIT_STRIDE: tl.constexpr,
    MASKED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """part ``[BLOCK_B, COLUMNS]`` and each column's entry times its row of G.

    base : pointers to the tile's first row of the samples, ``[BLOCK_B, 1]``; p : packed chunks by
    column; first, last : the rows of the tile that G has, where MASKED.
    """
    i = (tl.arange(0, COLUMNS) & 15).to(tl.uint32)
    row = ((p ^ i) & 0xFFFF).to(tl.int32)  # 32-bit offsets from a 64-bit base
    if UNIT_STRIDE:
        pointers = base + row[None, :]
    else:
        pointers = base + (row.to(tl.int64) * stride_p)[None, :]
    if MASKED:
        g = tl.load(pointers, mask=((row >= first) & (row < last))[None, :], other=0.0)
    else:
        g = tl.load(pointers)
    # A product with +1 or -1 is exact: one fused multiply-add, no sign to flip before.
    sign = sign_of(p, i)
    if g.dtype == tl.float64:
        part += sign.to(tl.float64)[None, :] * g
    else:
        part += sign[None, :] * widened(g)
    return part


@triton.jit
def sign_of(p, i):
    """+1 or -1 for column ``i`` of packed chunks, float32."""
    return (((p << (15 - i)) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def add_tile_by_pairs(first, second, base, p, PAIRS: tl.constexpr):
    """``add_tile`` for columns 2 j and 2 j + 1 of a chunk, each ``[BLOCK_B, PAIRS]``, j = 0 .. 7.

    They read two neighbouring rows, in this order or the other: one load of 32 bits. base is
    aligned to it, and of 16-bit values.
    """
    DTYPE: tl.constexpr = base.dtype.element_ty
    i = (tl.arange(0, PAIRS) & 7).to(tl.uint32) * 2
    row = ((p ^ i) & 0xFFFE).to(tl.int32)
    both = tl.load((base + row[None, :]).to(tl.pointer_type(tl.uint32), bitcast=True))
    swap = ((p & 1) << 4)[None, :]
    both = (both << swap) | (both >> ((32 - swap) & 31))  # a rotation
    low = (both & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    first += sign_of(p, i)[None, :] * widened(low)
    second += sign_of(p, i + 1)[None, :] * widened(high)
    return first, second


@triton.jit(do_not_specialize=_VARYING)
def project_sjlt_kernel(
    g_ptr,  # [B, P]
    workspace_ptr,  # [slots, row tiles * BLOCK_B, width]
    B,
    stride_b: tl.int64,
    stride_p: tl.int64,
    origin: tl.int64,  # G's column at the first row of panel 0; negative when P starts inside it
    n_rows: tl.int64,  # P
    col_offset: tl.int64,
    tile,  # number of panel 0's first tile, low 32 bits: a multiple of 4
    tag,  # (tile >> 32) << 8 | (LOG2 - 4) << 4 | kind << 2
    stream_id,
    seed_low,
    seed_high,
    slot,  # of the first split
    width,  # of the workspace: K, padded
    n_panels,  # of four tiles
    panel_step,  # panel i starts 4 * panel_step * i tiles after panel 0
    panels_per_split,
    LOG2: tl.constexpr,  # of the tiles' rows and columns
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,  # stride_p is 1
    MASKED: tl.constexpr,  # panels reach outside of G
    PAIRS: tl.constexpr,  # G of 16 bits, not MASKED, its rows at every tile aligned to 4 bytes
):
    """Partial sums of G @ R. Grid: column tiles, row tiles, splits."""
    tl.static_assert(not PAIRS or (UNIT_STRIDE and not MASKED), "PAIRS: dense rows, no mask")
    SUM: tl.constexpr = workspace_ptr.dtype.element_ty
    ROWS: tl.constexpr = 1 << LOG2
    n_rows = n_rows.to(tl.int64)
    stride_p = stride_p.to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    b = tl.minimum(b, B - 1).to(tl.int64)[:, None]  # rows past B are never read
    samples = g_ptr + b * stride_b.to(tl.int64)
    column = (tl.program_id(0) * BLOCK_K + col_offset).to(tl.uint32)
    first = tl.program_id(2) * panels_per_split
    last = tl.minimum(first + panels_per_split, n_panels)
    # Columns of even chunks and of odd ones: both are in one word of packed_chunks. PAIRS: and of
    # those the even and the odd columns.
    REPEAT: tl.constexpr = 8 if PAIRS else 16
    COLUMNS: tl.constexpr = BLOCK_K // 32 * REPEAT
    total_even = tl.zeros((BLOCK_B, COLUMNS), SUM)
    total_odd = tl.zeros((BLOCK_B, COLUMNS), SUM)
    total_even_next = tl.zeros((BLOCK_B, COLUMNS), SUM)
    total_odd_next = tl.zeros((BLOCK_B, COLUMNS), SUM)
    for panel in range(first, last):
        t = panel * panel_step * 4
        packed = packed_chunks(
            tile.to(tl.uint32) + t.to(tl.uint32),
            column,
            tag,
            stream_id,
            seed_low,
            seed_high,
            LOG2,
            BLOCK_K,
            4,
        )
        p0, p1, p2, p3 = by_column_of_four(packed, BLOCK_K, REPEAT)
        # Four tiles are summed by themselves and then added: the error of long sums stays bounded.
        even = tl.zeros((BLOCK_B, COLUMNS), SUM)
        odd = tl.zeros((BLOCK_B, COLUMNS), SUM)
        even_next = tl.zeros((BLOCK_B, COLUMNS), SUM)
        odd_next = tl.zeros((BLOCK_B, COLUMNS), SUM)
        start = origin.to(tl.int64) + t.to(tl.int64) * ROWS
        for j in tl.static_range(4):
            if j == 0:
                p = p0
            elif j == 1:
                p = p1
            elif j == 2:
                p = p2
            else:
                p = p3
            row = start + j * ROWS
            if UNIT_STRIDE:
                base = samples + row
            else:
                base = samples + row * stride_p
            low = p.to(tl.uint32)
            high = (p >> 32).to(tl.uint32)
            if PAIRS:
                even, even_next = add_tile_by_pairs(even, even_next, base, low, COLUMNS)
                odd, odd_next = add_tile_by_pairs(odd, odd_next, base, high, COLUMNS)
            elif MASKED:
                if (row + ROWS > 0) & (row < n_rows):
                    a = tl.maximum(-row, 0).to(tl.int32)
                    z = tl.minimum(n_rows - row, ROWS).to(tl.int32)
                    even = add_tile(even, base, low, a, z, stride_p, UNIT_STRIDE, True, COLUMNS)
                    odd = add_tile(odd, base, high, a, z, stride_p, UNIT_STRIDE, True, COLUMNS)
            else:
                even = add_tile(even, base, low, 0, ROWS, stride_p, UNIT_STRIDE, False, COLUMNS)
                odd = add_tile(odd, base, high, 0, ROWS, stride_p, UNIT_STRIDE, False, COLUMNS)
        total_even += even
        total_odd += odd
        if PAIRS:
            total_even_next += even_next
            total_odd_next += odd_next
    split = (slot + tl.program_id(2)).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    i = tl.arange(0, COLUMNS)
    k = tl.program_id(0) * BLOCK_K + i // REPEAT * 32 + i % REPEAT * (16 // REPEAT)
    to = workspace_ptr + split * (tl.num_programs(1) * BLOCK_B) * width
    to += rows[:, None] * width + k[None, :]
    tl.store(to, total_even)
    tl.store(to + 16, total_odd)
    if PAIRS:
        tl.store(to + 1, total_even_next)
        tl.store(to + 17, total_odd_next)


@triton.jit(do_not_specialize=_VARYING_TRANSPOSE)
def project_transpose_sjlt_kernel(
    y_ptr,  # [B, K]
    out_ptr,  # [B, n_rows]
    B,
    K: tl.int64,
    n_rows: tl.int64,
    stride_yb: tl.int64,
    stride_yk: tl.int64,
    stride_ob: tl.int64,
    stride_op: tl.int64,
    origin: tl.int64,  # out's column at the first row of program 0; can be negative
    scale: tl.int64,  # the bits of a float64
    tile,  # of program 0
    tag,
    stream_id,
    seed_low,
    seed_high,
    part,  # rows // ROWS of its tile that stand before program 0's
    LOG2: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ROWS: tl.constexpr,  # rows to a program; a tile has a multiple of it
):
    """out = scale * y @ R.T. Grid: ROWS rows each, row tiles of y."""
    SUM: tl.constexpr = out_ptr.dtype.element_ty
    FOLD: tl.constexpr = 64
    PARTS: tl.constexpr = (1 << LOG2) // ROWS
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (b < B)[:, None]
    y_rows = y_ptr + b.to(tl.int64)[:, None] * stride_yb.to(tl.int64)
    part += tl.program_id(0)
    t = tile.to(tl.uint32) + (part // PARTS).to(tl.uint32)
    row = part % PARTS * ROWS + tl.arange(0, ROWS)  # within the tile
    x = (part % PARTS * (ROWS // 16) + tl.arange(0, ROWS // 16)).to(tl.uint32)
    total = tl.zeros((BLOCK_B, ROWS), SUM)
    some = tl.zeros((BLOCK_B, ROWS), SUM)
    tiles = (K.to(tl.int64) + (1 << LOG2) - 1) >> LOG2
    for c in range(tiles):
        c32 = tl.zeros((1,), tl.uint32) + c
        a, shift, d, e = tile_words(t, c32, tag, 0, stream_id, seed_low, seed_high)
        chunk = (c32 << (LOG2 - 4)) + column_chunks(x, a, shift, d, e, LOG2)
        u0, u1, u2, u3 = tile_words(t, chunk >> 2, tag, 1, stream_id, seed_low, seed_high)
        word = chunk & 3
        u = tl.where(word < 2, tl.where(word == 0, u0, u1), tl.where(word == 2, u2, u3))
        signs = by_column(u, ROWS)
        i = (row.to(tl.uint32) ^ (signs >> 16)) & 15  # the column within the chunk
        k = by_column(chunk, ROWS).to(tl.int64) * 16 + i.to(tl.int64)
        y = tl.load(
            y_rows + (k * stride_yk.to(tl.int64))[None, :],
            mask=inside & (k < K)[None, :],
            other=0.0,
        )
        if y.dtype != tl.float64:
            y = widened(y)
        some += signed(y, ((signs >> i) & 1)[None, :] != 0)
        if c % FOLD == FOLD - 1:
            total += some
            some = tl.zeros((BLOCK_B, ROWS), SUM)
    total += some
    total *= scale.to(tl.int64).to(tl.float64, bitcast=True).to(SUM)
    p = origin.to(tl.int64) + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pointers = out_ptr + (
        b.to(tl.int64)[:, None] * stride_ob.to(tl.int64) + (p * stride_op.to(tl.int64))[None, :]
    )
    tl.store(pointers, total, mask=inside & ((p >= 0) & (p < n_rows))[None, :])


@triton.jit(do_not_specialize=_VARYING_MATRIX)
def matrix_sjlt_kernel(
    out_ptr,  # [n_rows, n_cols]
    n_rows: tl.int64,
    n_cols: tl.int64,
    stride_p: tl.int64,
    stride_k: tl.int64,
    origin: tl.int64,  # out's row at the first row of the first programs; can be negative
    col_offset: tl.int64,  # out's column 0; this launch begins at its multiple of 64 below
    tile,  # of the first programs
    tag,
    stream_id,
    seed_low,
    seed_high,
    part,  # rows // ROWS of that tile that stand before theirs
    LOG2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out = a block of R. Grid: tiles of 64 columns, ROWS rows each."""
    PARTS: tl.constexpr = (1 << LOG2) // ROWS
    column = ((col_offset.to(tl.int64) >> 6) + tl.program_id(0)).to(tl.uint32) * 64
    part += tl.program_id(1)
    t = tile.to(tl.uint32) + (part // PARTS).to(tl.uint32)
    packed = packed_chunks(t, column, tag, stream_id, seed_low, seed_high, LOG2, 64, 1)
    packed = tl.reshape(tl.broadcast_to(packed[:, None, :], (2, 32, 1)), (64,))
    i = tl.arange(0, 64).to(tl.uint32)
    packed = (packed >> ((i & 16) * 2).to(tl.uint64)).to(tl.uint32)
    i &= 15
    negative = (((packed >> 16) >> i) & 1) != 0
    row = (part % PARTS * ROWS + tl.arange(0, ROWS)).to(tl.uint32)
    found = ((packed ^ i) & 0xFFFF)[None, :] == row[:, None]  # [ROWS, 64]
    r = tl.where(found, tl.where(negative, -1.0, 1.0)[None, :], 0.0)
    p = origin.to(tl.int64) + tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = column.to(tl.int64) - col_offset.to(tl.int64) + tl.arange(0, 64)
    pointers = out_ptr + (
        (p * stride_p.to(tl.int64))[:, None] + (k * stride_k.to(tl.int64))[None, :]
    )
    inside = ((p >= 0) & (p < n_rows))[:, None] & ((k >= 0) & (k < n_cols))[None, :]
    tl.store(pointers, r.to(out_ptr.dtype.element_ty), mask=inside)
