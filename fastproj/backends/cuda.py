"""The CUDA backend: hands tensors to ``fastproj._cuda`` as pointers, shapes and strides.

The kernels generate R in registers: see csrc/cuda/README.md. A call is queued on the current CUDA
stream of the tensors' device. It allocates only through torch, never synchronises, and can be
captured in a CUDA graph.

``FASTPROJ_CUDA_VARIANT`` (simple, sm80, sm90) or ``force_variant`` picks a kernel family. R is the
same under all families. Sums differ by rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from fastproj.backends import built
from fastproj.call import DTYPES, KIND_NUMBERS, TERMS, Call, view
from fastproj.spec import default_block

NAME = "cuda"
VARIANT_VARIABLE = "FASTPROJ_CUDA_VARIANT"
VARIANTS = ("auto", "simple", "sm80", "sm90")

_forced_variant: ContextVar[str | None] = ContextVar("fastproj_forced_variant", default=None)


@lru_cache(maxsize=1)
def _module() -> ModuleType:
    """The compiled module. Raises ImportError where there is none."""
    import fastproj._cuda

    built.warn_of_outdated(NAME)
    return fastproj._cuda


def not_built() -> str | None:
    """None where the compiled module is there, GPU or not, else the reason and the fix."""
    try:
        _module()
    except ImportError as error:
        advice = (
            "install the CUDA toolkit (nvcc 12.4 or newer) and reinstall fastproj; FASTPROJ_CUDA=1 "
            "makes a failure of that an error"
        )
        return built.absent(NAME, error, advice)
    return None


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """None when the compiled module is there and finds a GPU for it, else the reason and fix."""
    reason = not_built()
    if reason is not None:
        return reason
    extension = _module()
    count, problem = extension.count()
    if problem:
        return f"fastproj._cuda finds no GPU ({problem}); install an NVIDIA GPU and its driver"
    if not torch.cuda.is_available():
        return "this torch has no CUDA; install a CUDA build of torch"
    # Looking at a GPU makes a context there. So one that has a context comes first: that of the
    # tensors, which need not be the current one. Then the current one; others only if it won't do.
    current = torch.cuda.current_device()
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: False)  # torch's own
    first: str | None = None
    for index in sorted(range(count), key=lambda i: (not has_context(i), i != current)):
        with torch.cuda.device(index):  # to go back by itself would make one on the current GPU
            found = extension.gpu(index)["problem"]
        if not found:
            return None
        first = first or str(found)
    return first


def unsupported(device_type: str, dtype: torch.dtype, kind: str) -> str | None:
    """None for CUDA tensors, else the reason."""
    return None if device_type == "cuda" else f"it takes CUDA tensors, not {device_type} ones"


def _variant() -> str:
    """The kernel family asked for.

    Raises
    ------
    ValueError
        FASTPROJ_CUDA_VARIANT names none of VARIANTS.
    """
    name = _forced_variant.get() or os.environ.get(VARIANT_VARIABLE) or "auto"
    if name not in VARIANTS:
        raise ValueError(
            f"{VARIANT_VARIABLE}: received {name!r}; expected one of {', '.join(VARIANTS)}"
        )
    return name


@contextmanager
def force_variant(name: str) -> Iterator[None]:
    """Within the block, calls from this context use the named kernel family."""
    token = _forced_variant.set(name)
    try:
        _variant()
        yield
    finally:
        _forced_variant.reset(token)


def describe() -> dict[str, str]:
    """The GPUs, what the module was built with, and the kernel family in use."""
    extension = _module()
    count, problem = extension.count()
    build = extension.build()
    facts = {
        f"gpu {index}": f"{gpu['name']}, sm_{gpu['arch']}, {gpu['multiprocessors']} multiprocessors"
        + (f"; {gpu['problem']}" if gpu["problem"] else "")
        + ("; wgmma kernels" if gpu["sm90a"] else "; mma.sync kernels")
        for index, gpu in enumerate(map(extension.gpu, range(count)))
    }
    if problem:
        facts["gpus"] = f"none ({problem})"
    return {
        **facts,
        "built with": f"CUDA {build['toolkit']} for {build['architectures']}",
        "variant": _variant(),
    }


def plan(
    batch: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    kind: str = "rademacher",
    precision: str = "highest",
    *,
    arch: int = 90,
    multiprocessors: int = 132,
    aligned: bool = True,
    block: int = 0,
) -> dict[str, str]:
    """What a projection of grads ``[batch, rows]`` to ``cols`` columns would use; needs no GPU.

    arch : compute capability, e.g. 80 or 90.
    aligned : whether every row of the grads starts at a multiple of 16 bytes.
    block : of kind sjlt alone; 0 stands for the default for ``cols``.
    """
    if kind == "sjlt":
        block = block or default_block(cols)
    facts = _module().plan(
        batch, rows, cols, DTYPES[dtype], KIND_NUMBERS[kind], TERMS[precision], arch,
        multiprocessors, aligned, _variant(), block_log2=max(block.bit_length() - 1, 0),
    )  # fmt: skip
    return {name: str(value) for name, value in facts.items()}


def _index(t: Tensor) -> int:
    index = t.device.index
    return index if index is not None else torch.cuda.current_device()


def _cuda_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P].

    Pieces are projected one after another at their row offsets, each added to ``out``.
    """
    views = [view(g) for g in pieces if g.shape[1]]
    if not views:  # a sum of nothing
        if not call.accumulate:
            out.zero_()
        return
    extension, index = _module(), _index(out)
    arguments = views, view(out), call.numbers(), _variant()
    with torch.cuda.device(index):
        size = extension.project_workspace(index, *arguments)
        workspace = torch.empty(size, dtype=torch.uint8, device=out.device)
        extension.project(index, _cuda_stream(index), *arguments, workspace.data_ptr(), size)


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    if out.numel() == 0:
        return
    index = _index(out)
    with torch.cuda.device(index):
        _module().project_transpose(
            index, _cuda_stream(index), view(y), view(out), call.numbers(), _variant()
        )


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    if out.numel() == 0:
        return
    index = _index(out)
    with torch.cuda.device(index):
        _module().matrix(index, _cuda_stream(index), view(out), call.numbers(), col_offset)
