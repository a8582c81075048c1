"""From tensors to kernel launches: on the current stream, without synchronising.

Every function takes tensors that ``ops`` has checked, and writes its whole output. Nothing but the
workspace is allocated (at most plan.WORKSPACE_BYTES, from torch's allocator). So after a first
call, which compiles, calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fastproj.call import Call, terms_of
from fastproj.spec import gauss_table

from . import config, launch_sjlt, plan
from .arguments import MAX_GRID, alignment, double_bits, guard, seeds
from .entries import matrix_kernel
from .launch_reduce import reduce
from .project import project_gaussian_kernel, project_rademacher_kernel
from .transpose import project_transpose_kernel

# Decided when Triton is imported: TRITON_INTERPRET=1 runs kernels in NumPy, on CPU tensors.
INTERPRETED = not isinstance(matrix_kernel, triton.runtime.jit.JITFunction)

SIGNS = plan.signed32(0x80008000)  # of the dense kernels
_PROJECT = {"rademacher": project_rademacher_kernel, "gaussian": project_gaussian_kernel}


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    arch: str
    multiprocessors: int
    unit: str  # the matrix unit, UNIT in the kernels


@lru_cache(maxsize=64)
def device_facts(device: torch.device) -> Device:
    """Architecture and multiprocessors of a device; stand-ins under the interpreter."""
    if device.type == "cpu":
        return Device("sm_90", 2, "interpreter")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
    else:
        arch = f"sm_{properties.major}{properties.minor}"
    return Device(arch, properties.multi_processor_count, config.unit(arch))


@lru_cache(maxsize=64)
def magnitudes(device: torch.device, half: bool) -> Tensor:
    """The 512 Gaussian magnitudes on ``device``, as the bits of fp16 or bf16, int16."""
    table = torch.from_numpy(gauss_table().copy())
    return table.to(torch.float16 if half else torch.bfloat16).view(torch.int16).to(device)


cached_plan = lru_cache(maxsize=256)(
    lambda sizes, *rest: plan.plan(list(sizes), *rest)  # layers of the same sizes come again
)


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""
    kind, block = call.key.kind, call.key.block
    facts = device_facts(out.device)
    most = plan.max_columns(kind)
    with guard(out):
        for k in range(0, out.shape[1], most):
            part = out[:, k : k + most]
            item = sum_dtype(pieces[0].dtype).itemsize
            room = plan.room(kind, part.shape[1], facts.multiprocessors, item, block)
            for b in range(0, out.shape[0], room.batch):
                rows = [piece[b : b + room.batch] for piece in pieces]
                _project_part(rows, part[b : b + room.batch], call, k, room.width)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What values of ``dtype`` are summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _project_part(
    pieces: list[Tensor], out: Tensor, call: Call, col_offset: int, width: int
) -> None:
    """``project`` for the rows and columns of one launch; width : of a partial result."""
    key = call.key
    B, K = out.shape
    dtype = pieces[0].dtype
    terms = terms_of(dtype, call.precision)
    facts = device_facts(out.device)
    name = str(dtype).removeprefix("torch.")
    configs = {
        direct: config.choose(facts.arch, name, key.kind, terms, B, K, direct)
        for direct in (True, False)
    }
    sums = sum_dtype(dtype)
    groups = cached_plan(
        tuple(piece.shape[1] for piece in pieces),
        call.row_offset,
        K,
        key.kind,
        facts.multiprocessors,
        sums.itemsize,
        key.block,
    )
    slots = max(sum(launch.splits for launch in group) for group in groups)
    rows = -(-B // configs[True].BLOCK_B) * configs[True].BLOCK_B
    workspace = out.new_empty((max(slots, 1), rows, width), dtype=sums)
    accumulate = call.accumulate
    for group in groups:
        for launch in group:
            piece = pieces[launch.piece]
            if key.kind == "sjlt":
                launch_sjlt.project_panels(
                    piece, workspace, launch, call, configs[not launch.masked], K, col_offset
                )
            else:
                _project_panels(piece, workspace, launch, call, configs, K, col_offset)
        slots = sum(launch.splits for launch in group)
        reduce(workspace, out, slots, call.scale, accumulate)
        accumulate = True


def _project_panels(
    piece: Tensor,
    workspace: Tensor,
    launch: plan.Launch,
    call: Call,
    configs: dict[bool, config.Config],
    K: int,
    col_offset: int,
) -> None:
    """workspace ``[slots, rows, width]`` from ``launch.slot`` on = partial sums of piece @ R.

    configs : by whether G can be copied to shared memory as it is.
    """
    key = call.key
    kernel = _PROJECT[key.kind]
    facts = device_facts(piece.device)
    contiguous = piece.stride(1) == 1 or piece.shape[1] == 1
    whole = contiguous and not launch.masked
    aligned = alignment(piece, launch.origin) if whole else 1
    chosen = configs[aligned > 1]
    counter = plan.Counter.at(key.kind, launch.panel * plan.PANEL)
    kernel[(-(-K // chosen.BLOCK_K), workspace.shape[1] // chosen.BLOCK_B, launch.splits)](
        piece,
        workspace,
        magnitudes(piece.device, piece.dtype == torch.float16),
        piece.shape[0],
        piece.stride(0),
        piece.stride(1),
        launch.origin,
        piece.shape[1],
        col_offset,
        counter.block,
        counter.tag,
        signs=SIGNS,
        **seeds(key),
        slot=launch.slot,
        width=workspace.shape[2],
        n_panels=launch.count,
        panel_step=launch.step,
        panels_per_split=launch.per_split,
        BLOCK_B=chosen.BLOCK_B,
        BLOCK_K=chosen.BLOCK_K,
        STEP_ROWS=chosen.STEP_ROWS,
        TERMS=terms_of(piece.dtype, call.precision),
        CONTIGUOUS=contiguous,
        ALIGNED=aligned,
        MASKED=launch.masked,
        UNIT=facts.unit,
        NUM_WARPS=chosen.num_warps,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        **config.OPTIONS,
    )


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    key, row_offset, scale, _, precision = call
    if key.kind == "sjlt":
        launch_sjlt.project_transpose(y, out, call)
        return
    n_rows = out.shape[1]
    dtype = str(y.dtype).removeprefix("torch.")
    block_b, block_k, num_warps = config.choose_transpose(dtype, key.kind, out.shape[0])
    tile_rows = 64 if key.kind == "gaussian" else 512
    most = MAX_GRID * block_b
    with guard(out):
        table = magnitudes(out.device, y.dtype == torch.float16)
        pairs = [(y[b : b + most], out[b : b + most]) for b in range(0, out.shape[0], most)]
        spans = list(plan.whole_counters(key.kind, row_offset, row_offset + n_rows))
        for (some_y, some_out), (start, stop) in itertools.product(pairs, spans):
            B = some_out.shape[0]
            first = start // tile_rows
            counter = plan.Counter.at(key.kind, first * tile_rows)
            project_transpose_kernel[(-(-stop // tile_rows) - first, -(-B // block_b))](
                some_y,
                some_out,
                table,
                B,
                y.shape[1],
                min(n_rows, stop - row_offset),
                y.stride(0),
                y.stride(1),
                out.stride(0),
                out.stride(1),
                first * tile_rows - row_offset,
                double_bits(scale),
                counter.block,
                counter.tag,
                signs=SIGNS,
                **seeds(key),
                GAUSSIAN=key.kind == "gaussian",
                BLOCK_B=block_b,
                BLOCK_K=block_k,
                TERMS=terms_of(y.dtype, precision),
                UNIT=device_facts(out.device).unit,
                NUM_WARPS=num_warps,
                num_warps=num_warps,
                num_stages=2,
                **config.OPTIONS,
            )


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    key, row_offset = call.key, call.row_offset
    if key.kind == "sjlt":
        launch_sjlt.matrix(out, call, col_offset)
        return
    block_k, num_warps = 64, 4
    most = MAX_GRID * plan.PANEL
    with guard(out):
        table = magnitudes(out.device, False)
        for begin, end in plan.whole_counters(key.kind, row_offset, row_offset + out.shape[0]):
            aligned = begin // plan.PANEL * plan.PANEL
            for first in range(aligned, end, most):
                stop = min(end, first + most)
                counter = plan.Counter.at(key.kind, first)
                grid = (-(-out.shape[1] // block_k), -(-(stop - first) // plan.PANEL))
                matrix_kernel[grid](
                    out,
                    table,
                    stop - row_offset,
                    out.shape[1],
                    out.stride(0),
                    out.stride(1),
                    first - row_offset,
                    col_offset,
                    counter.block,
                    counter.tag,
                    signs=SIGNS,
                    **seeds(key),
                    GAUSSIAN=key.kind == "gaussian",
                    BLOCK_K=block_k,
                    NUM_WARPS=num_warps,
                    num_warps=num_warps,
                    **config.OPTIONS,
                )
