"""The CUDA kernels on the host: builds tests/cuda/emulate.cpp and calls it through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
}
KINDS = {"rademacher": 0, "gaussian": 1}
VARIANTS = {"auto": 0, "simple": 1, "sm80": 2, "sm90": 3}
LOADERS = ("tma", "cp.async", "vector", "scalar")

_int64, _int32, _pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p


class _Project(ctypes.Structure):
    _fields_ = (
        [("grads", _pointer)]
        + [(name, _int64) for name in ("batch", "rows", "stride_b", "stride_p")]
        + [("out", _pointer)]
        + [(name, _int64) for name in ("cols", "out_stride_b", "out_stride_k")]
        + [("seed", ctypes.c_uint64), ("row_offset", _int64), ("scale", ctypes.c_double)]
        + [
            (name, _int32)
            for name in (
                "dtype kind stream accumulate terms variant multiprocessors order truncate".split()
            )
        ]
    )


class _Transpose(ctypes.Structure):
    _fields_ = (
        [("y", _pointer)]
        + [(name, _int64) for name in ("batch", "cols", "y_stride_b", "y_stride_k")]
        + [("out", _pointer)]
        + [(name, _int64) for name in ("rows", "out_stride_b", "out_stride_p")]
        + [("seed", ctypes.c_uint64), ("row_offset", _int64), ("scale", ctypes.c_double)]
        + [(name, _int32) for name in ("dtype", "kind", "stream", "terms", "variant", "order")]
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        [("out", _pointer)]
        + [(name, _int64) for name in ("rows", "cols", "stride_n", "stride_m")]
        + [("seed", ctypes.c_uint64), ("row_offset", _int64), ("col_offset", _int64)]
        + [(name, _int32) for name in ("dtype", "kind", "stream", "order")]
    )


class EmulationError(RuntimeError):
    """What the emulated machine refused."""


@dataclass(frozen=True)
class Plan:
    """What the planner chose for a call."""

    variant: str
    block_b: int
    loader: str
    cluster: int
    splits: int
    batch_chunk: int


def compile_library(source: Path, output: Path, *flags: str) -> None:
    """Compile `source` for the emulation into the shared library `output`."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or "c++"
    ]
    command = [*compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-DFASTPROJ_EMULATE"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", f"-I{ROOT / 'tests' / 'cuda'}"]
    command += [
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
        "-Wno-psabi",
    ]
    done = subprocess.run(
        [*command, *flags, str(source), "-o", str(output)], capture_output=True, text=True
    )
    if done.returncode != 0:
        raise AssertionError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


@cache
def library() -> ctypes.CDLL:
    """The emulation, built once for each state of the sources; kept in build/emulation."""
    here = Path(__file__).resolve().parent
    sources = sorted([*(ROOT / "csrc").glob("*.hpp"), *(ROOT / "csrc" / "cuda").glob("*.[hc]*")])
    sources += [here / "emulator.hpp", here / "emulate.cpp"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"emulate-{digest}.so"
    if not output.exists():
        partial = folder / f"emulate-{digest}.{os.getpid()}.so"
        compile_library(here / "emulate.cpp", partial)
        partial.replace(output)
    return ctypes.CDLL(str(output))


def _call(function: str, argument: ctypes.Structure, *more: object) -> None:
    message = ctypes.create_string_buffer(4096)
    code = getattr(library(), function)(ctypes.byref(argument), *more, message, len(message))
    if code != 0:
        raise EmulationError(message.value.decode())


def project(
    grads: Tensor,
    proj_dim: int,
    *,
    kind: str,
    seed: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    scale: float = 1.0,
    terms: int = 3,
    variant: str = "auto",
    out: Tensor | None = None,
    accumulate: bool = False,
    multiprocessors: int = 4,
    order: int = 1,
    truncate: bool = True,
) -> tuple[Tensor, Plan]:
    """``scale * grads [B, P] @ R[row_offset : row_offset + P, :proj_dim]`` and the plan.

    ``order`` seeds the order in which threads run; ``truncate`` makes sums of products cut to fp32
    as tensor cores do. Poisons the result with NaN first unless ``accumulate``.
    """
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.full((grads.shape[0], proj_dim), float("nan"), dtype=dtype)
    facts = (_int64 * 6)()
    argument = _Project(
        grads.data_ptr(), *grads.shape, *grads.stride(), out.data_ptr(), proj_dim, *out.stride(),
        seed, row_offset, scale, DTYPES[grads.dtype], KINDS[kind], stream, int(accumulate), terms,
        VARIANTS[variant], multiprocessors, order, int(truncate),
    )  # fmt: skip
    _call("emulated_project", argument, facts)
    names = {number: name for name, number in VARIANTS.items()}
    plan = Plan(names[facts[0]], facts[1], LOADERS[facts[2]], facts[3], facts[4], facts[5])
    return out, plan


def project_transpose(
    y: Tensor,
    rows: int,
    *,
    kind: str,
    seed: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    scale: float = 1.0,
    terms: int = 3,
    variant: str = "auto",
    out: Tensor | None = None,
    order: int = 1,
) -> Tensor:
    """``scale * y [B, K] @ R[row_offset : row_offset + rows, :K].T``"""
    if out is None:
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        out = torch.full((y.shape[0], rows), float("nan"), dtype=dtype)
    argument = _Transpose(
        y.data_ptr(), *y.shape, *y.stride(), out.data_ptr(), rows, *out.stride(),
        seed, row_offset, scale, DTYPES[y.dtype], KINDS[kind], stream, terms, VARIANTS[variant],
        order,
    )  # fmt: skip
    _call("emulated_transpose", argument)
    return out


def matrix(
    out: Tensor,
    *,
    kind: str,
    seed: int = 0,
    stream: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """``out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]``"""
    argument = _Matrix(
        out.data_ptr(), *out.shape, *out.stride(), seed, row_offset, col_offset,
        DTYPES[out.dtype], KINDS[kind], stream, 1,
    )  # fmt: skip
    _call("emulated_matrix", argument)
    return out
