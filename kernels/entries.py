"""Blocks of R itself, written out."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .generate import gaussian_tile, load_table, operand_column, rademacher_tile, sign_mask, words

_VARYING = [
    "n_rows",
    "n_cols",
    "stride_p",
    "stride_k",
    "origin",
    "col_offset",
    "block",
    "tag",
    "signs",
    "stream_id",
    "seed_low",
    "seed_high",
]


@triton.jit
def store_tile(out_ptr, r, p, n_rows, n_cols, stride_p, stride_k, BLOCK_K: tl.constexpr):
    """out[p : p + 64, this program's columns] = r.T, where that lies inside of out."""
    p = p + tl.arange(0, 64)
    k = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    pointers = out_ptr + (p[None, :] * stride_p.to(tl.int64) + k[:, None] * stride_k.to(tl.int64))
    inside = (k < n_cols)[:, None] & ((p >= 0) & (p < n_rows))[None, :]
    tl.store(pointers, r.to(tl.float32).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_VARYING)
def matrix_kernel(
    out_ptr,  # [n_rows, n_cols]
    table_ptr,  # [512] magnitudes, as uint16 bits of bf16
    n_rows: tl.int64,
    n_cols: tl.int64,
    stride_p: tl.int64,
    stride_k: tl.int64,
    origin: tl.int64,  # out's row at the first row of panel 0; negative when out starts inside it
    col_offset: tl.int64,
    block,
    tag,
    signs,  # 0x80008000: see generate.sign_mask
    stream_id,
    seed_low,
    seed_high,
    GAUSSIAN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """out = a block of R. Grid: column tiles, panels of 512 rows."""
    panel = tl.program_id(1)
    if GAUSSIAN:
        order = operand_column(BLOCK_K, NUM_WARPS)
    else:
        order = tl.arange(0, BLOCK_K)
    column = (tl.program_id(0) * BLOCK_K + order + col_offset).to(tl.uint32)[:, None]
    p = origin.to(tl.int64) + panel.to(tl.int64) * 512
    if GAUSSIAN:
        table = load_table(table_ptr)
        for tile in range(8):
            r = gaussian_tile(
                block + (panel * 16 + tile * 2),
                column,
                tag,
                stream_id,
                seed_low,
                seed_high,
                table,
                table_ptr,
                tl.bfloat16,
                BLOCK_K,
                NUM_WARPS,
            )
            store_tile(out_ptr, r, p + tile * 64, n_rows, n_cols, stride_p, stride_k, BLOCK_K)
    else:
        mask = sign_mask(signs, tag >> 31)  # n_cols may reach 2^32, a Rademacher tag 2^30
        w0, w1, w2, w3 = words(block + panel, column, tag, stream_id, seed_low, seed_high)
        for tile in tl.static_range(8):
            if tile // 2 == 0:
                word = w0
            elif tile // 2 == 1:
                word = w1
            elif tile // 2 == 2:
                word = w2
            else:
                word = w3
            r = rademacher_tile(word, tile % 2 * 8, mask, tl.bfloat16, BLOCK_K)
            store_tile(out_ptr, r, p + tile * 64, n_rows, n_cols, stride_p, stride_k, BLOCK_K)
