"""The launch that adds up partial results."""

from __future__ import annotations

from torch import Tensor

from . import config
from .arguments import double_bits
from .project import reduce_kernel

BLOCK = 512  # columns to a program


def reduce(workspace: Tensor, out: Tensor, slots: int, scale: float, accumulate: bool) -> None:
    """out [B, K] = (or +=) scale * the sum of the first slots of workspace [slots, rows, width]."""
    B, K = out.shape
    _, rows, width = workspace.shape
    reduce_kernel[(-(-K // BLOCK), B)](
        workspace,
        out,
        K,
        width,
        rows * width,
        out.stride(0),
        out.stride(1),
        slots,
        double_bits(scale),
        ACCUMULATE=accumulate,
        BLOCK=BLOCK,
        num_warps=4,
        **config.OPTIONS,
    )
