"""out = scale * y @ R.T: the adjoint of ``project``, a program for each tile of rows of R."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .generate import gaussian_tile, load_table, operand_column, rademacher_panel, sign_mask, words
from .project import split_product

_VARYING = [
    "B",
    "K",
    "n_rows",
    "stride_yb",
    "stride_yk",
    "stride_ob",
    "stride_op",
    "origin",
    "scale",
    "block",
    "tag",
    "signs",
    "stream_id",
    "seed_low",
    "seed_high",
]


@triton.jit(do_not_specialize=_VARYING)
def project_transpose_kernel(
    y_ptr,  # [B, K]
    out_ptr,  # [B, n_rows]
    table_ptr,  # [512] magnitudes, as uint16 bits of R's dtype
    B,
    K,
    n_rows: tl.int64,
    stride_yb: tl.int64,
    stride_yk: tl.int64,
    stride_ob: tl.int64,
    stride_op: tl.int64,
    origin: tl.int64,  # out's column at the first row of tile 0; negative when out starts inside it
    scale: tl.int64,  # the bits of a float64
    block,  # spec block number of the first row, low 32 bits
    tag,
    signs,  # 0x80008000: see generate.sign_mask
    stream_id,
    seed_low,
    seed_high,
    GAUSSIAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TERMS: tl.constexpr,
    UNIT: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Grid: tiles of R's rows (512 Rademacher, 64 Gaussian), row tiles of y."""
    ROWS: tl.constexpr = 64 if GAUSSIAN else 512
    DTYPE: tl.constexpr = tl.float16 if y_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    SUM: tl.constexpr = out_ptr.dtype.element_ty
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = (b < B)[:, None]
    y_rows = y_ptr + b.to(tl.int64)[:, None] * stride_yb.to(tl.int64)
    mask = sign_mask(signs, B >> 31)
    i = tl.program_id(0)
    total = tl.zeros((ROWS, BLOCK_B), SUM)
    if GAUSSIAN:
        table = load_table(table_ptr)
        order = operand_column(BLOCK_K, NUM_WARPS)
    else:
        order = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        column = (order + start).to(tl.uint32)[:, None]
        if GAUSSIAN:
            r = gaussian_tile(
                block + i * 2,
                column,
                tag,
                stream_id,
                seed_low,
                seed_high,
                table,
                table_ptr,
                DTYPE,
                BLOCK_K,
                NUM_WARPS,
            )
        else:
            w0, w1, w2, w3 = words(block + i, column, tag, stream_id, seed_low, seed_high)
            r = rademacher_panel(w0, w1, w2, w3, mask, DTYPE, BLOCK_K)
        k = tl.arange(0, BLOCK_K) + start
        y = tl.load(
            y_rows + k.to(tl.int64)[None, :] * stride_yk.to(tl.int64),
            mask=inside & (k < K)[None, :],
            other=0.0,
        )
        # Summed by themselves and then added: the error of long sums stays bounded.
        part = tl.zeros((ROWS, BLOCK_B), SUM)
        total += split_product(tl.trans(r), y, part, TERMS, UNIT)
    total *= scale.to(tl.int64).to(tl.float64, bitcast=True).to(SUM)
    p = origin.to(tl.int64) + i.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pointers = out_ptr + (
        b.to(tl.int64)[None, :] * stride_ob.to(tl.int64) + p[:, None] * stride_op.to(tl.int64)
    )
    tl.store(pointers, total, mask=(b < B)[None, :] & ((p >= 0) & (p < n_rows))[:, None])
