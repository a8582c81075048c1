"""Tiles of R from Philox words, as Triton device functions (spec v1; see ``fastproj.spec``).

A Philox call belongs to one column and one ``lane`` = (row >> 1) & 3. Words are ``[BLOCK_K, 4]``,
with a column and a lane to each thread. A tile is ``[BLOCK_K, 64]``: 64 consecutive rows of R,
transposed, which is the A operand of the product. On tensor cores the thread that holds rows
``2 * lane + {0, 1}`` of a column is the one that computed the words, so a tile never leaves the
registers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

# Triton 3.3 fails on a gather that crosses warps: look-ups go to global memory there, slower.
GATHER = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 4))


@triton.jit
def wide_product(a, MULTIPLIER: tl.constexpr):
    """High and low 32 bits of a product: one IMAD.WIDE instead of a high and a low multiply."""
    product = a.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox-4x32 on uint32 counters and key; returns four words."""
    for _ in tl.static_range(10):
        high0, low0 = wide_product(c0, 0xD2511F53)
        high1, low1 = wide_product(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(block, column, tag, stream_id, seed_low, seed_high):
    """The four words of ``block`` (uint32) for ``column [BLOCK_K, 1]``, each ``[BLOCK_K, 4]``.

    tag : (block >> 32) << 8 | kind << 2, the third counter without its lane.
    """
    lane = tl.arange(0, 4).to(tl.uint32)[None, :]
    zero = column * 0 + lane * 0  # [BLOCK_K, 4]
    return philox4x32_10(
        block.to(tl.uint32) + zero,
        column + zero,
        (tag.to(tl.uint32) | lane) + zero,
        stream_id.to(tl.uint32) + zero,
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )


@triton.jit
def sign_mask(signs, opaque_zero):
    """``signs`` (0x80008000), as a value in a vector register, ``[1, 4]``.

    One three-input logic operation with the immediate ONES makes two entries. A mask that the
    compiler knew would be a second immediate, and a plain argument would be a constant-bank
    operand. Either would split the operation in two. So the compiler must not know that opaque_zero
    is 0.
    """
    lane = tl.arange(0, 4).to(tl.uint32)[None, :]
    return signs.to(tl.uint32) | (lane & opaque_zero.to(tl.uint32))


@triton.jit
def unpack(x, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint32 ``[BLOCK_K, n, 4]``, two 16-bit floats in each, low half first: ``[BLOCK_K, 8 n]``.

    In registers that is nothing at all.
    """
    low = (x & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = (x >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (BLOCK_K, x.shape[1] * 8))


@triton.jit
def operand_column(BLOCK_K: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Which column each position of a ``[BLOCK_K, 4]`` word tensor is: see operand_order."""
    i = tl.arange(0, BLOCK_K)
    ROUND: tl.constexpr = 16 * NUM_WARPS
    return i // ROUND * ROUND + i // 8 % NUM_WARPS * 16 + i // (8 * NUM_WARPS) % 2 * 8 + i % 8


@triton.jit
def operand_order(x, BLOCK_K: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Put positions (see operand_column) in the order of the columns.

    Triton lays a ``[BLOCK_K, 4]`` tensor out 8 columns to a warp, warp by warp; a tensor core
    operand has 16 to a warp. Reading the positions in another order makes the first layout the
    second, so no exchange through shared memory is needed. A table look-up stops the compiler from
    finding that by itself.
    """
    x = tl.reshape(x, (BLOCK_K // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3, 4)), (BLOCK_K, 4))


@triton.jit
def rademacher_tile(
    word, FIRST_BIT: tl.constexpr, mask, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The rows of bits FIRST_BIT .. FIRST_BIT + 7 of ``word``: one shift and one logic operation
    make two entries.
    """
    ONES: tl.constexpr = 0x3F803F80 if tl.bfloat16 == DTYPE else 0x3C003C00
    shift = (15 - FIRST_BIT - tl.arange(0, 8)).to(tl.uint32)
    x = (word[:, None, :] << shift[None, :, None]) & mask[:, None, :]  # [BLOCK_K, 8, 4]
    return unpack(x ^ ONES, DTYPE, BLOCK_K)


@triton.jit
def load_table(table_ptr):
    """The 512 magnitudes, from which look-ups gather through shared memory."""
    return tl.load(table_ptr + tl.arange(0, 512))


@triton.jit
def gaussian_tile(
    block,
    column,
    tag,
    stream_id,
    seed_low,
    seed_high,
    table,
    table_ptr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """The 64 rows of ``block`` and ``block + 1``; ``column`` stands in operand_column's order.

    table, table_ptr : the 512 magnitudes, as the bits of DTYPE; table from load_table.
    """
    a0, a1, a2, a3 = words(block, column, tag, stream_id, seed_low, seed_high)
    b0, b1, b2, b3 = words(block + 1, column, tag, stream_id, seed_low, seed_high)
    a0 = operand_order(a0, BLOCK_K, NUM_WARPS)
    a1 = operand_order(a1, BLOCK_K, NUM_WARPS)
    a2 = operand_order(a2, BLOCK_K, NUM_WARPS)
    a3 = operand_order(a3, BLOCK_K, NUM_WARPS)
    b0 = operand_order(b0, BLOCK_K, NUM_WARPS)
    b1 = operand_order(b1, BLOCK_K, NUM_WARPS)
    b2 = operand_order(b2, BLOCK_K, NUM_WARPS)
    b3 = operand_order(b3, BLOCK_K, NUM_WARPS)
    a = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    b = tl.join(tl.join(b0, b1), tl.join(b2, b3))
    x = tl.join(a, b)  # [BLOCK_K, lane, word & 1, word >> 1, block]
    x = tl.reshape(tl.permute(x, (0, 4, 3, 2, 1)), (BLOCK_K, 8, 4))  # rows 8 apart, lanes
    index = ((x >> 6) & 0x01FE01FE) | ((x >> 1) & 0x00010001)  # both halves at once
    index = tl.join(index & 0xFFFF, index >> 16).to(tl.int32)
    index = tl.reshape(index, (BLOCK_K * 64,))
    if GATHER:
        magnitude = tl.gather(table, index, 0)
    else:
        magnitude = tl.load(table_ptr + index)
    low, high = tl.split(tl.reshape(magnitude, (BLOCK_K, 8, 4, 2)).to(tl.uint32))
    return unpack(low | (high << 16) | (x & 0x80008000), DTYPE, BLOCK_K)


@triton.jit
def rademacher_panel(w0, w1, w2, w3, mask, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    """All 512 rows of a block, ``[BLOCK_K, 512]``, from its four words ``[BLOCK_K, 4]``."""
    ONES: tl.constexpr = 0x3F803F80 if tl.bfloat16 == DTYPE else 0x3C003C00
    w = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [BLOCK_K, lane, word & 1, word >> 1]
    w = tl.reshape(tl.permute(w, (0, 3, 2, 1)), (BLOCK_K, 4, 4))  # [BLOCK_K, word, lane]
    shift = (15 - tl.arange(0, 16)).to(tl.uint32)
    x = (w[:, :, None, :] << shift[None, None, :, None]) & mask[:, None, None, :]
    return unpack(tl.reshape(x ^ ONES, (BLOCK_K, 64, 4)), DTYPE, BLOCK_K)
