"""The Triton backend: any GPU that Triton takes, NVIDIA or AMD; no compiler at install.

``FASTPROJ_TRITON_CONFIG`` or ``fastproj.kernels.config.pin`` fixes tile sizes: docs/triton.md. With
``TRITON_INTERPRET=1`` the kernels run in NumPy on CPU tensors. That is slow, and meant for
checking.
"""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch
from torch import Tensor

from fastproj.call import Call, terms_of
from fastproj.kernels import OLDEST_TRITON
from fastproj.spec import default_block

NAME = "triton"
_OLDEST = ".".join(map(str, OLDEST_TRITON))
_OLDEST_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors only."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_version() -> str | None:
    """The installed version, or None; does not import it. ROCm builds have names of their own."""
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-rocm"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def unavailable() -> str | None:
    """None when kernels can run on this machine, else the reason and the fix."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed; pip install 'triton>={_OLDEST}' (Linux)"
    found = _triton_version()
    numbers = re.match(r"(\d+)\.(\d+)", found or "")
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_TRITON:
        return (
            f"Triton {found} is too old (it keeps R out of registers); "
            f"pip install 'triton>={_OLDEST}' with the torch that goes with it"
        )
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return (
            "torch finds no GPU; install a CUDA or ROCm build of torch on a machine with one "
            "(TRITON_INTERPRET=1 runs the kernels on CPU tensors, for checking)"
        )
    if not torch.version.hip and torch.cuda.get_device_capability() < _OLDEST_CAPABILITY:
        return "the GPU is older than Ampere and multiplies no bf16; use backend='reference'"
    return None


def unsupported(device_type: str, dtype: torch.dtype, kind: str) -> str | None:
    """None when such input can be taken, else the reason."""
    wanted = "cpu" if _interpreted() else "cuda"
    if device_type != wanted:
        return f"it takes {wanted} tensors here, not {device_type} ones"
    if dtype not in _DTYPES and not (dtype == torch.int8 and kind in ("rademacher", "sjlt")):
        return f"it has no {str(dtype).removeprefix('torch.')}; use backend='reference'"
    return None


def _launch() -> ModuleType:
    """The module that imports Triton, imported by the first call."""
    from fastproj.kernels import launch

    return launch


def describe() -> dict[str, str]:
    """Triton's version, the devices, and the tiles for common shapes on the current device."""
    from fastproj.kernels import config

    facts = {"triton": _triton_version() or "unknown"}
    if _interpreted():
        return facts | {"device": "Triton's interpreter (NumPy)"}
    launch = _launch()
    for index in range(torch.cuda.device_count()):
        device = launch.device_facts(torch.device("cuda", index))
        facts[f"cuda:{index}"] = (
            f"{torch.cuda.get_device_name(index)}, {device.arch}, "
            f"{device.multiprocessors} multiprocessors"
        )
    arch = launch.device_facts(torch.device("cuda", torch.cuda.current_device())).arch
    for B in (16, 64):
        facts[f"tiles, bfloat16, B = {B}"] = str(
            config.choose(arch, "bfloat16", "rademacher", 1, B, 4096)
        )
    return facts


def plan(
    batch: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    kind: str = "rademacher",
    precision: str = "highest",
    *,
    block: int = 0,
    arch: str = "sm_90",
    multiprocessors: int = 132,
) -> dict[str, str]:
    """What a projection of dense, aligned grads ``[batch, rows]`` to ``cols`` columns would use.

    Needs neither a GPU nor Triton. block : of kind sjlt alone; 0 stands for the default for
    ``cols``.
    arch : such as "sm_90" or "gfx942".
    """
    from fastproj.kernels import config
    from fastproj.kernels import plan as planner

    if kind == "sjlt":
        block = block or default_block(cols)
    name = str(dtype).removeprefix("torch.")
    columns = min(cols, planner.max_columns(kind))
    terms = terms_of(dtype, precision)
    item = 8 if dtype == torch.float64 else 4
    room = planner.room(kind, columns, multiprocessors, item, block)
    samples = min(batch, room.batch)
    tiles = config.choose(arch, name, kind, terms, samples, columns)
    groups = planner.plan([rows], 0, columns, kind, multiprocessors, item, block)
    launch = max((launch for group in groups for launch in group), key=lambda each: each.count)
    row_tiles = -(-samples // tiles.BLOCK_B)
    slots = max(sum(each.splits for each in group) for group in groups)
    if kind == "sjlt":
        facts: dict[str, object] = {
            "block": block,
            "tiles per step": tiles.STEP_ROWS,
            "BLOCK_B": tiles.BLOCK_B,
            "BLOCK_K": tiles.BLOCK_K,
        }
    else:
        facts = {
            "matrix unit": config.unit(arch),
            "terms": terms,
            "BLOCK_B": tiles.BLOCK_B,
            "BLOCK_K": tiles.BLOCK_K,
            "rows per step": tiles.STEP_ROWS,
            "stages": tiles.num_stages,
        }
    facts |= {
        "warps": tiles.num_warps,
        "grid": f"{-(-columns // tiles.BLOCK_K)} x {row_tiles} x {launch.splits}",
        "splits of P": launch.splits,
        "samples per launch": samples,
        "workspace bytes": slots * row_tiles * tiles.BLOCK_B * room.width * item,
    }
    return {name: str(value) for name, value in facts.items()}


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""
    _launch().project(pieces, out, call)


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    _launch().project_transpose(y, out, call)


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    _launch().matrix(out, call, col_offset)


def project_product(left: Tensor, right: Tensor, out: Tensor, call: Call) -> bool:
    """out [B, K] = (or +=) the projection of left[b].T @ right[b], [m, n] row by row, as it forms.

    left [B, T, m], right [B, T, n]. Returns False, with nothing done, where the kernel can't take
    them. It has not been measured on a GPU yet, so ``registry.for_products`` waits to be asked.
    """
    if unsupported(left.device.type, left.dtype, call.key.kind) or out.dtype != torch.float32:
        return False
    from fastproj.kernels import launch_product

    if launch_product.unsupported(left, right, call) is not None:
        return False
    launch_product.project_product(left, right, out, call, _launch().device_facts(out.device).unit)
    return True
