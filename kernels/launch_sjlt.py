"""Launches of the sparse kind's kernels; ``launch`` calls this.

Nothing is allocated here. So after a first call, which compiles, calls can be captured in a CUDA
graph.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from fastproj.call import Call

from . import config, plan
from .arguments import MAX_GRID, alignment, double_bits, guard, seeds
from .config import Config
from .sjlt import matrix_sjlt_kernel, project_sjlt_kernel, project_transpose_sjlt_kernel


def project_panels(
    piece: Tensor,
    workspace: Tensor,
    launch: plan.Launch,
    call: Call,
    chosen: Config,
    K: int,
    col_offset: int,
) -> None:
    """workspace ``[slots, rows, width]`` from ``launch.slot`` on = partial sums of piece @ R.

    The sums are those of columns col_offset .. col_offset + K of R. More columns are written, up to
    whole tiles.
    """
    key = call.key
    counter = plan.Counter.at(
        key.kind, launch.panel * plan.panel_rows(key.kind, key.block), key.block
    )
    dense = piece.stride(1) == 1 or piece.shape[1] == 1
    halves = piece.element_size() == 2 and alignment(piece, launch.origin) >= 4
    project_sjlt_kernel[
        (-(-K // chosen.BLOCK_K), workspace.shape[1] // chosen.BLOCK_B, launch.splits)
    ](
        piece,
        workspace,
        piece.shape[0],
        piece.stride(0),
        piece.stride(1),
        launch.origin,
        piece.shape[1],
        col_offset,
        counter.block,
        counter.tag,
        **seeds(key),
        slot=launch.slot,
        width=workspace.shape[2],
        n_panels=launch.count,
        panel_step=launch.step,
        panels_per_split=launch.per_split,
        LOG2=key.block.bit_length() - 1,
        BLOCK_B=chosen.BLOCK_B,
        BLOCK_K=chosen.BLOCK_K,
        UNIT_STRIDE=dense,
        MASKED=launch.masked,
        PAIRS=dense and halves and not launch.masked,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        **config.OPTIONS,
    )


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    key, row_offset = call.key, call.row_offset
    n_rows = out.shape[1]
    block_b, rows, num_warps = config.choose_transpose_sjlt(
        str(y.dtype).removeprefix("torch."), out.shape[0], key.block
    )
    most = MAX_GRID * block_b
    with guard(out):
        pairs = [(y[b : b + most], out[b : b + most]) for b in range(0, out.shape[0], most)]
        spans = list(plan.whole_counters(key.kind, row_offset, row_offset + n_rows, key.block))
        for (some_y, some_out), (start, stop) in itertools.product(pairs, spans):
            B = some_out.shape[0]
            first = start // rows
            counter = plan.Counter.at(key.kind, start, key.block)
            project_transpose_sjlt_kernel[(-(-stop // rows) - first, -(-B // block_b))](
                some_y,
                some_out,
                B,
                y.shape[1],
                min(n_rows, stop - row_offset),
                y.stride(0),
                y.stride(1),
                out.stride(0),
                out.stride(1),
                first * rows - row_offset,
                double_bits(call.scale),
                counter.block,
                counter.tag,
                **seeds(key),
                part=first % (key.block // rows),
                LOG2=key.block.bit_length() - 1,
                BLOCK_B=block_b,
                ROWS=rows,
                num_warps=num_warps,
                num_stages=1,
                **config.OPTIONS,
            )


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    key, row_offset = call.key, call.row_offset
    rows, num_warps = config.choose_matrix_sjlt(key.block)
    tiles = -(-(col_offset % 64 + out.shape[1]) // 64)
    most = MAX_GRID * rows
    with guard(out):
        for begin, end in plan.whole_counters(
            key.kind, row_offset, row_offset + out.shape[0], key.block
        ):
            for start in range(begin // rows * rows, end, most):
                stop = min(end, start + most)
                counter = plan.Counter.at(key.kind, start, key.block)
                matrix_sjlt_kernel[(tiles, -(-(stop - start) // rows))](
                    out,
                    stop - row_offset,
                    out.shape[1],
                    out.stride(0),
                    out.stride(1),
                    start - row_offset,
                    col_offset,
                    counter.block,
                    counter.tag,
                    **seeds(key),
                    part=start // rows % (key.block // rows),
                    LOG2=key.block.bit_length() - 1,
                    ROWS=rows,
                    num_warps=num_warps,
                    **config.OPTIONS,
                )
