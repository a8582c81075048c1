"""Launches of the epilogue that sketches products as they form."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.call import Call

from . import config, plan
from .arguments import MAX_GRID, guard, seeds
from .launch_reduce import reduce
from .product import project_product_kernel

BLOCK_M = 16  # rows of the gradient to a unit
SPLITS = 32  # whatever the batch and the device: sums keep their order
BLOCKS = (64, 1024)  # of kind sjlt: of a larger tile's columns, few read what a program holds
MOST_STRETCH = 512  # columns of the gradient to a program: with 1024, sm_90 has too few registers
BLOCK_T = {"float32": 16, "bfloat16": 32, "float16": 32}  # summands to a step, by dtype


def unsupported(left: Tensor, right: Tensor, call: Call) -> str | None:
    """None when ``project_product`` takes [B, T, m] and [B, T, n], else the reason."""
    key = call.key
    if key.kind != "sjlt" or not BLOCKS[0] <= key.block <= BLOCKS[1]:
        return f"it takes kind='sjlt' with a block from {BLOCKS[0]} to {BLOCKS[1]}"
    if left.dtype != right.dtype or name_of(left.dtype) not in BLOCK_T:
        return f"it takes two factors of one dtype, not {left.dtype} and {right.dtype}"
    if any(t.stride(2) != 1 and t.shape[2] > 1 for t in (left, right)):
        return "it takes factors whose last dimension is dense"
    rows = left.shape[2] * right.shape[2]
    if rows >= 2**31 or left.shape[1] == 0:
        return "it takes up to 2^31 entries of a sample and at least one summand"
    period = key.block << 32
    # Rows of padding and the tile after the last are numbered, too.
    reach = rows + BLOCK_M * right.shape[2] + 2 * key.block
    if call.row_offset // period != (call.row_offset + reach) // period:
        return "it doesn't take rows on both sides of a multiple of 2^32 tiles"
    return None


def name_of(dtype: torch.dtype) -> str:
    """A dtype as the tables here and in config name it."""
    return str(dtype).removeprefix("torch.")


def stretch_of(block: int) -> int:
    """Columns of the gradient to a unit."""
    return min(block, MOST_STRETCH)


def part_of(stretch: int) -> int:
    """Columns of R at a time: what stands beside the gradient in a program's registers."""
    return max(64, stretch // 4)


def warps_of(stretch: int) -> int:
    """Warps of a program: at most 32 entries of the gradient to a thread."""
    return max(4, stretch // 64)


def precision_of(dtype: torch.dtype, call: Call) -> str:
    """How float32 factors are multiplied: the precisions of ``project``, as Triton calls them."""
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[call.precision]


def project_product(left: Tensor, right: Tensor, out: Tensor, call: Call, unit: str) -> None:
    """out [B, K] = (or +=) scale * flatten(left^T right) @ R[row_offset : row_offset + m n].

    left [B, T, m] and right [B, T, n] of one dtype, the last dimension dense; out of float32.
    unit : of the device, see config.unit; "interpreter" under Triton's.
    """
    key = call.key
    size, steps, m = left.shape
    n, K = right.shape[2], out.shape[1]
    block, log2 = key.block, key.block.bit_length() - 1
    stretch = stretch_of(block)
    units = -(-m // BLOCK_M) * -(-n // stretch)
    per_split = -(-units // SPLITS)
    splits = -(-units // per_split)
    width = plan.padded(K, block)
    most = max(1, min(MAX_GRID, plan.WORKSPACE_BYTES // (4 * splits * width)))
    counter = plan.Counter.at(key.kind, call.row_offset, block)
    place = call.row_offset % block
    with guard(out):
        for b in range(0, size, most):
            rows = slice(b, min(size, b + most))
            some_left, some_right, some_out = left[rows], right[rows], out[rows]
            count = some_out.shape[0]
            workspace = out.new_empty((splits, count, width), dtype=torch.float32)
            project_product_kernel[(splits, count)](
                some_left,
                some_right,
                workspace,
                m,
                n,
                steps,
                *some_left.stride()[:2],
                *some_right.stride()[:2],
                place,
                counter.block,
                counter.tag,
                **seeds(key),
                width=width,
                n_units=units,
                units_per_split=per_split,
                LOG2=log2,
                STRETCH=stretch,
                PART=part_of(stretch),
                BLOCK_T=BLOCK_T[name_of(left.dtype)],
                ALIGNED=place % stretch == 0 and n % stretch == 0,
                PRECISION=precision_of(left.dtype, call),
                UNIT=unit,
                num_warps=warps_of(stretch),
                num_stages=2,
                **config.OPTIONS,
            )
            reduce(workspace, some_out, splits, call.scale, call.accumulate)
