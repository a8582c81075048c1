"""From tensors to kernel launches: on the current stream, without synchronising.

Every function takes checked tensors (``ops`` checks) and writes its whole output. Nothing but the
workspace is allocated (at most plan.WORKSPACE_BYTES, from torch's allocator), so after a first call
that compiles, calls can be captured in a CUDA graph.
"""

from __future__ import annotations

import itertools
import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastproj.call import Call, terms_of
from fastproj.spec import MatrixKey, gauss_table

from . import config, plan
from .entries import matrix_kernel
from .project import project_gaussian_kernel, project_rademacher_kernel, reduce_kernel
from .transpose import project_transpose_kernel

# Decided when Triton is imported: TRITON_INTERPRET=1 runs kernels in NumPy, on CPU tensors.
INTERPRETED = not isinstance(reduce_kernel, triton.runtime.jit.JITFunction)

REDUCE_BLOCK = 512
MAX_GRID = 65535  # programs in the second dimension of a grid


@dataclass(frozen=True)
class Device:
    """What the choice of tiles depends on."""

    arch: str
    multiprocessors: int
    unit: str  # the kernels' UNIT


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


def _guard(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _double_bits(value: float) -> int:
    """The bits of a float64 as an integer: Triton passes a float itself as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _seed(key: MatrixKey) -> dict[str, int]:
    return {
        "signs": plan.signed32(0x80008000),
        "stream_id": plan.signed32(key.stream),
        "seed_low": plan.signed32(key.seed),
        "seed_high": plan.signed32(key.seed >> 32),
    }


def _alignment(piece: Tensor, origin: int) -> int:
    """Bytes to which every row of ``piece`` is aligned at every panel's start: 16, 8, 4 or 1."""
    size = piece.element_size()
    address = piece.data_ptr() + origin * size
    stride = piece.stride(0) * size
    return next((n for n in (16, 8, 4) if address % n == 0 and stride % n == 0), 1)


cached_plan = lru_cache(maxsize=256)(
    lambda sizes, *rest: plan.plan(list(sizes), *rest)  # the same layers come again and again
)


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""
    with _guard(out):
        for b in range(0, out.shape[0], plan.MAX_BATCH):
            rows = [piece[b : b + plan.MAX_BATCH] for piece in pieces]
            for k in range(0, out.shape[1], plan.MAX_COLUMNS):
                part = out[b : b + plan.MAX_BATCH, k : k + plan.MAX_COLUMNS]
                _project_part(rows, part, call, k)


def _project_part(pieces: list[Tensor], out: Tensor, call: Call, col_offset: int) -> None:
    """``project`` for at most plan.MAX_BATCH rows and plan.MAX_COLUMNS columns."""
    key, row_offset, scale, accumulate, precision = call
    B, K = out.shape
    dtype = pieces[0].dtype
    terms = terms_of(dtype, precision)
    facts = device_facts(out.device)
    name = str(dtype).removeprefix("torch.")
    configs = {
        direct: config.choose(facts.arch, name, key.kind, terms, B, K, direct)
        for direct in (True, False)
    }
    row_tiles = -(-B // configs[True].BLOCK_B)
    width = -(-K // 256) * 256
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    groups = cached_plan(
        tuple(piece.shape[1] for piece in pieces),
        row_offset,
        K,
        key.kind,
        facts.multiprocessors,
        sum_dtype.itemsize,
    )
    slots = max(sum(launch.splits for launch in group) for group in groups)
    rows = row_tiles * configs[True].BLOCK_B
    workspace = out.new_empty((max(slots, 1), rows, width), dtype=sum_dtype)
    table = magnitudes(out.device, dtype == torch.float16)
    kernel = project_gaussian_kernel if key.kind == "gaussian" else project_rademacher_kernel
    for group in groups:
        for launch in group:
            piece = pieces[launch.piece]
            contiguous = piece.stride(1) == 1 or piece.shape[1] == 1
            whole = contiguous and not launch.masked
            aligned = _alignment(piece, launch.origin) if whole else 1
            chosen = configs[aligned > 1]
            counter = plan.Counter.at(key.kind, launch.panel * plan.PANEL)
            kernel[(-(-K // chosen.BLOCK_K), row_tiles, launch.splits)](
                piece,
                workspace,
                table,
                B,
                piece.stride(0),
                piece.stride(1),
                launch.origin,
                piece.shape[1],
                col_offset,
                counter.block,
                counter.tag,
                **_seed(key),
                slot=launch.slot,
                width=width,
                n_panels=launch.count,
                panel_step=launch.step,
                panels_per_split=launch.per_split,
                BLOCK_B=chosen.BLOCK_B,
                BLOCK_K=chosen.BLOCK_K,
                STEP_ROWS=chosen.STEP_ROWS,
                TERMS=terms,
                CONTIGUOUS=contiguous,
                ALIGNED=aligned,
                MASKED=launch.masked,
                UNIT=facts.unit,
                NUM_WARPS=chosen.num_warps,
                num_warps=chosen.num_warps,
                num_stages=chosen.num_stages,
                **config.OPTIONS,
            )
        reduce_kernel[(-(-K // REDUCE_BLOCK), B)](
            workspace,
            out,
            K,
            width,
            rows * width,
            out.stride(0),
            out.stride(1),
            sum(launch.splits for launch in group),
            _double_bits(scale),
            ACCUMULATE=accumulate,
            BLOCK=REDUCE_BLOCK,
            num_warps=4,
            **config.OPTIONS,
        )
        accumulate = True


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    key, row_offset, scale, _, precision = call
    n_rows = out.shape[1]
    dtype = str(y.dtype).removeprefix("torch.")
    block_b, block_k, num_warps = config.choose_transpose(dtype, key.kind, out.shape[0])
    block_rows = 64 if key.kind == "gaussian" else 512
    most = MAX_GRID * block_b
    with _guard(out):
        table = magnitudes(out.device, y.dtype == torch.float16)
        pairs = [(y[b : b + most], out[b : b + most]) for b in range(0, out.shape[0], most)]
        spans = list(plan.whole_counters(key.kind, row_offset, row_offset + n_rows))
        for (some_y, some_out), (start, stop) in itertools.product(pairs, spans):
            B = some_out.shape[0]
            first = start // block_rows
            counter = plan.Counter.at(key.kind, first * block_rows)
            project_transpose_kernel[(-(-stop // block_rows) - first, -(-B // block_b))](
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
                first * block_rows - row_offset,
                _double_bits(scale),
                counter.block,
                counter.tag,
                **_seed(key),
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
    block_k, num_warps = 64, 4
    most = MAX_GRID * plan.PANEL
    with _guard(out):
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
                    **_seed(key),
                    GAUSSIAN=key.kind == "gaussian",
                    BLOCK_K=block_k,
                    NUM_WARPS=num_warps,
                    num_warps=num_warps,
                    **config.OPTIONS,
                )
