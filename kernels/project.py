"""out = G @ R: partial sums over ranges of rows, then one sum of the partial sums.

``project_*_kernel`` writes ``workspace[slot, b, k]`` = the sum over the 512-row panels of one
range; ``reduce_kernel`` adds the slots in order. There are no atomics, so the result is the same
from run to run. Neither the ranges nor the order in which a range is summed depend on B, so a
sample's result does not depend on the samples beside it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .generate import (
    gaussian_tile,
    load_table,
    operand_column,
    rademacher_tile,
    sign_mask,
    words,
)

# Values that vary from call to call: specialising on them would compile a kernel for each.
_VARYING = [
    "B",
    "stride_b",
    "stride_p",
    "origin",
    "n_rows",
    "col_offset",
    "block",
    "tag",
    "signs",
    "stream_id",
    "seed_low",
    "seed_high",
    "slot",
    "n_panels",
    "panel_step",
    "panels_per_split",
]


@triton.jit
def truncated(x):
    """x with its lower 16 bits cleared, in float32: the first 8 bits of its significand, exact."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def as_bf16(x):
    """A float32 whose lower 16 bits are 0, as bf16."""
    bits = x.to(tl.uint32, bitcast=True)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(x, UNIT: tl.constexpr):
    """x to the nearest bf16. The interpreter's own conversion cuts off."""
    if UNIT == "interpreter":
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        return as_bf16(truncated(tl.where(x == x, nearest, float("nan"))))
    else:
        return x.to(tl.bfloat16)


@triton.jit
def unless_near_largest(x, LIMIT: tl.constexpr, size):
    """x, but cut off where LIMIT < size < infinity: there, rounding it would give infinity."""
    return tl.where((size > LIMIT) & (size != float("inf")), truncated(x), x)


@triton.jit
def widened(x):
    """bf16 or fp16 to float32. The interpreter's own conversion is wrong below 2^-126."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def product(r, g, total, UNIT: tl.constexpr):
    """total [BLOCK_K, BLOCK_B] + r [BLOCK_K, n] @ g [BLOCK_B, n].T on tensor cores."""
    if UNIT == "interpreter":  # it would multiply the bits of bf16
        r = widened(r)
        g = widened(g)
    return tl.dot(r, tl.trans(g), total)


@triton.jit
def once(x, UNIT: tl.constexpr):
    """x (16-bit), through a move that the compiler takes for a side effect, so that x is made once.

    For mma.sync the compiler would otherwise move the work that makes x behind the exchange of x
    between threads. There each warp of the program would repeat it.
    """
    if UNIT == "mma":
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return x


@triton.jit
def split_product(r, g, total, TERMS: tl.constexpr, UNIT: tl.constexpr):
    """The same for a g of float32 (as 1, 2 or 3 bf16 terms), bf16, fp16 or float64.

    Three terms are cut off, not rounded, so their sum is exactly g (except for bits below 2^-133,
    which bf16 lacks). The last of one or two terms is rounded, to 2^-8 or 2^-16 of g. The first
    term holds an infinity alone. Small terms are added first, because later sums are cut at larger
    steps.
    """
    if g.dtype == tl.float64:
        entries = r.to(tl.float32).to(tl.float64)
        total += tl.sum(entries[:, None, :] * g[None, :, :], axis=2)
    elif g.dtype == tl.float32:
        size = tl.abs(g)
        if TERMS == 1:
            g = unless_near_largest(g, 3.3895313892515355e38, size)
            total = product(r, once(rounded(g, UNIT), UNIT), total, UNIT)
        else:
            high = truncated(g)
            rest = tl.where(size == float("inf"), 0.0, g - high)
            if TERMS == 2:
                last = rounded(unless_near_largest(rest, 3.4028e38, size), UNIT)
                total = product(r, once(last, UNIT), total, UNIT)
            else:
                middle = truncated(rest)
                last = as_bf16(truncated(rest - middle))
                total = product(r, once(last, UNIT), total, UNIT)
                total = product(r, once(as_bf16(middle), UNIT), total, UNIT)
            total = product(r, once(as_bf16(high), UNIT), total, UNIT)
    else:
        total = product(r, g, total, UNIT)
    return total


@triton.jit
def row_pointers(
    g_ptr,
    B,
    stride_b,
    stride_p,
    origin,
    BLOCK_B: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointers to the first 64 columns of G's tile, at panel 0, ``[BLOCK_B, 64]``; 64-bit.

    Rows past B repeat row B - 1, so loads need no mask. The results of these rows are never read.
    """
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    b = tl.minimum(b, B - 1).to(tl.int64)[:, None]
    p = tl.arange(0, 64)[None, :]
    if CONTIGUOUS:
        first = g_ptr + (b * stride_b + origin)
        if ALIGNED > 1:
            first = tl.multiple_of(first, (ALIGNED, ALIGNED))
        return first + p
    else:
        return g_ptr + (b * stride_b + (origin + p) * stride_p.to(tl.int64))


@triton.jit
def load_tile(
    pointers, row, stride_p, origin, n_rows, CONTIGUOUS: tl.constexpr, MASKED: tl.constexpr
):
    """G's tile ``[BLOCK_B, 64]`` that starts ``row`` rows after panel 0; 0 outside of G."""
    if CONTIGUOUS:
        pointers += row
    else:
        pointers += row * stride_p
    if MASKED:
        p = origin + row + tl.arange(0, 64)
        return tl.load(pointers, mask=((p >= 0) & (p < n_rows))[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_partial(workspace_ptr, total, slot, width, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr):
    """workspace[slot + split, b, k] = total, padding included; width is a multiple of BLOCK_K."""
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = (slot + tl.program_id(2)).to(tl.int64)
    base = workspace_ptr + split * (tl.num_programs(1) * BLOCK_B) * width
    tl.store(base + (b[None, :] * width + k[:, None]), total)


@triton.jit(do_not_specialize=_VARYING)
def project_rademacher_kernel(
    g_ptr,  # [B, P]
    workspace_ptr,  # [slots, row tiles * BLOCK_B, width]
    table_ptr,  # unused; every kind's kernel takes the same arguments
    B,
    stride_b: tl.int64,
    stride_p: tl.int64,
    origin: tl.int64,  # G's column at the first row of panel 0; negative when P starts inside it
    n_rows: tl.int64,  # P
    col_offset: tl.int64,
    block,  # block number of panel 0, low 32 bits
    tag,  # its high bits and the kind: see generate.words
    signs,  # 0x80008000: see generate.sign_mask
    stream_id,
    seed_low,
    seed_high,
    slot,  # of the first split
    width,  # of the workspace: K, padded
    n_panels,
    panel_step,  # panel i starts 512 * panel_step * i rows after panel 0
    panels_per_split,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_ROWS: tl.constexpr,  # rows to a loop iteration: 512, or 256 to hold fewer tiles of G
    TERMS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,  # stride_p is 1
    ALIGNED: tl.constexpr,  # bytes; every row of G at every panel's start is so aligned
    MASKED: tl.constexpr,  # panels reach outside of G
    UNIT: tl.constexpr,  # "wgmma", "mma", "mfma" or "interpreter"
    NUM_WARPS: tl.constexpr,
):
    """Partial sums of G @ R, R of +1 and -1. Grid: column tiles, row tiles, splits."""
    DTYPE: tl.constexpr = tl.float16 if g_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    SUM: tl.constexpr = workspace_ptr.dtype.element_ty
    STEPS: tl.constexpr = 512 // STEP_ROWS
    # Tensor cores cut their sums to float32, not round them; three terms promise its error.
    FOLD: tl.constexpr = 2 if TERMS == 3 else 4
    tl.static_assert(STEPS == 1 or STEPS == 2, "STEP_ROWS: expected 512 or 256")
    origin = origin.to(tl.int64)
    stride_b = stride_b.to(tl.int64)
    stride_p = stride_p.to(tl.int64)
    column = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K) + col_offset).to(tl.uint32)
    column = column[:, None]
    mask = sign_mask(signs, n_panels >> 31)
    pointers = row_pointers(g_ptr, B, stride_b, stride_p, origin, BLOCK_B, CONTIGUOUS, ALIGNED)
    first = tl.program_id(2) * panels_per_split
    last = tl.minimum(first + panels_per_split, n_panels)
    total = tl.zeros((BLOCK_K, BLOCK_B), SUM)
    w0 = tl.zeros((BLOCK_K, 4), tl.uint32)
    w1 = w0
    w2 = w0
    w3 = w0
    for step in range(first * STEPS, last * STEPS):
        panel = step // STEPS * panel_step
        if step % STEPS == 0:
            w0, w1, w2, w3 = words(block + panel, column, tag, stream_id, seed_low, seed_high)
        else:  # the second half of the panel
            w0 = w2
            w1 = w3
        row = panel.to(tl.int64) * 512 + step % STEPS * STEP_ROWS
        for tile in tl.static_range(STEP_ROWS // 64):
            # FOLD tiles are summed by themselves and then added: the error of long sums stays
            # bounded, and an accumulator that starts anew keeps ptxas from serialising wgmma.
            if tile % FOLD == 0:
                part = tl.zeros((BLOCK_K, BLOCK_B), SUM)
            if tile // 2 == 0:
                word = w0
            elif tile // 2 == 1:
                word = w1
            elif tile // 2 == 2:
                word = w2
            else:
                word = w3
            g = load_tile(pointers, row + tile * 64, stride_p, origin, n_rows, CONTIGUOUS, MASKED)
            r = rademacher_tile(word, tile % 2 * 8, mask, DTYPE, BLOCK_K)
            part = split_product(r, g, part, TERMS, UNIT)
            if tile % FOLD == FOLD - 1:
                total += part
    store_partial(workspace_ptr, total, slot, width, BLOCK_B, BLOCK_K)


@triton.jit(do_not_specialize=_VARYING)
def project_gaussian_kernel(
    g_ptr,
    workspace_ptr,
    table_ptr,  # [512] magnitudes, as uint16 bits of R's dtype
    B,
    stride_b: tl.int64,
    stride_p: tl.int64,
    origin: tl.int64,
    n_rows: tl.int64,
    col_offset: tl.int64,
    block,
    tag,
    signs,  # 0x80008000: see generate.sign_mask
    stream_id,
    seed_low,
    seed_high,
    slot,
    width,
    n_panels,
    panel_step,
    panels_per_split,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    TERMS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    UNIT: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):
    """Partial sums of G @ R, R Gaussian. Arguments and grid as for project_rademacher_kernel."""
    DTYPE: tl.constexpr = tl.float16 if g_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    SUM: tl.constexpr = workspace_ptr.dtype.element_ty
    STEPS: tl.constexpr = 512 // STEP_ROWS
    FOLD: tl.constexpr = 1 if TERMS == 3 else 2  # as above
    tl.static_assert(STEP_ROWS % 128 == 0, "STEP_ROWS: expected 128, 256 or 512")
    origin = origin.to(tl.int64)
    stride_b = stride_b.to(tl.int64)
    stride_p = stride_p.to(tl.int64)
    column = (tl.program_id(0) * BLOCK_K + operand_column(BLOCK_K, NUM_WARPS) + col_offset).to(
        tl.uint32
    )
    column = column[:, None]
    table = load_table(table_ptr)
    pointers = row_pointers(g_ptr, B, stride_b, stride_p, origin, BLOCK_B, CONTIGUOUS, ALIGNED)
    first = tl.program_id(2) * panels_per_split
    last = tl.minimum(first + panels_per_split, n_panels)
    total = tl.zeros((BLOCK_K, BLOCK_B), SUM)
    for step in range(first * STEPS, last * STEPS):
        panel = step // STEPS * panel_step
        row = panel.to(tl.int64) * 512 + step % STEPS * STEP_ROWS
        for tile in tl.static_range(STEP_ROWS // 64):
            if tile % FOLD == 0:
                part = tl.zeros((BLOCK_K, BLOCK_B), SUM)
            g = load_tile(pointers, row + tile * 64, stride_p, origin, n_rows, CONTIGUOUS, MASKED)
            r = gaussian_tile(
                block + panel * 16 + (step % STEPS * (STEP_ROWS // 32) + tile * 2),
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
            part = split_product(r, g, part, TERMS, UNIT)
            if tile % FOLD == FOLD - 1:
                total += part
    store_partial(workspace_ptr, total, slot, width, BLOCK_B, BLOCK_K)


@triton.jit(do_not_specialize=["K", "stride_b", "stride_k", "n_slots", "slot_size", "scale"])
def reduce_kernel(
    workspace_ptr,  # [slots, rows, width], slots * rows * width < 2^31
    out_ptr,  # [B, K]
    K,
    width,
    slot_size,  # rows * width
    stride_b: tl.int64,
    stride_k: tl.int64,
    n_slots,
    scale: tl.int64,  # the bits of a float64
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = (or +=) scale * sum of the slots, in their order. Grid: column tiles, rows."""
    SUM: tl.constexpr = workspace_ptr.dtype.element_ty
    b = tl.program_id(1)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    total = tl.zeros((BLOCK,), SUM)
    for slot in range(n_slots):
        pointers = workspace_ptr + (slot * slot_size + b * width) + k
        total += tl.load(pointers, mask=inside, other=0.0)
    total *= scale.to(tl.int64).to(tl.float64, bitcast=True).to(SUM)
    pointers = out_ptr + (
        b.to(tl.int64) * stride_b.to(tl.int64) + k.to(tl.int64) * stride_k.to(tl.int64)
    )
    if ACCUMULATE:
        total += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, total.to(out_ptr.dtype.element_ty), mask=inside)
