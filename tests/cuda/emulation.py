"""The CUDA kernels on the host: builds tests/cuda/emulate.cpp and calls it through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tests import ROOT

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
}
KINDS = {"rademacher": 0, "gaussian": 1, "sjlt": 2}
VARIANTS = {"auto": 0, "simple": 1, "sm80": 2, "sm90": 3}
LOADERS = ("tma", "cp.async", "vector", "scalar", "elements", "words")

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
                (
                    "dtype kind stream accumulate terms variant multiprocessors order truncate"
                    " arch block_log2"
                ).split()
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
        + [(name, _int32) for name in ("dtype kind stream terms variant order block_log2".split())]
    )


class _Matrix(ctypes.Structure):
    _fields_ = (
        [("out", _pointer)]
        + [(name, _int64) for name in ("rows", "cols", "stride_n", "stride_m")]
        + [("seed", ctypes.c_uint64), ("row_offset", _int64), ("col_offset", _int64)]
        + [(name, _int32) for name in ("dtype kind stream order block_log2".split())]
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
    workspace_bytes: int
    # of kind sjlt; block_b is 0 then
    groups: int = 0
    samples: int = 0
    staged: int = 0
    threads: int = 0
    stage_tiles: int = 0
    stages: int = 0
    shared_bytes: int = 0


_library: ContextVar[ctypes.CDLL | None] = ContextVar("library", default=None)


def compile_shared(
    root: Path, sources: list[Path], output: Path, flags: Sequence[str] = ()
) -> None:
    """Compile units of the source tree `root` for the host into the shared library `output`."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [
        shutil.which("c++") or shutil.which("g++") or "c++"
    ]
    command = [*compiler, "-std=c++17", "-O2", "-fPIC", "-shared", "-DFASTPROJ_EMULATE"]
    command += [f"-I{root / 'csrc'}", f"-I{root / 'csrc' / 'cuda'}", f"-I{root / 'tests' / 'cuda'}"]
    command += [
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-clobbered",
        "-Wno-psabi",
    ]
    command += [*flags, "-x", "c++", *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_library(root: Path, output: Path) -> None:
    """Compile the emulation of the source tree `root` into the shared library `output`."""
    compile_shared(root, [root / "tests" / "cuda" / "emulate.cpp"], output)


def cuda_headers() -> Path | None:
    """The folder of cuda.h: that of the toolkit, or of Triton's wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home, "include") for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)


@cache
def _build() -> Path | AssertionError:
    """Build once for each state of the sources, in build/emulation; or why that failed."""
    here = Path(__file__).resolve().parent
    sources = sorted([*(ROOT / "csrc").glob("*.hpp"), *(ROOT / "csrc" / "cuda").glob("*.[hc]*")])
    sources += [here / "emulator.hpp", here / "emulate.cpp"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"emulate-{digest}.so"
    if not output.exists():
        partial = folder / f"emulate-{digest}.{os.getpid()}.partial"
        try:
            compile_library(ROOT, partial)
        except AssertionError as error:
            return error
        partial.replace(output)
    return output


@cache
def library() -> ctypes.CDLL:
    """The emulation."""
    built = _build()
    if isinstance(built, AssertionError):
        raise built
    return ctypes.CDLL(str(built))


def change_source(folder: Path, file: str, old: str, new: str) -> None:
    """A copy of the sources in `folder`, in which `old` reads `new` in csrc/cuda/`file`."""
    for part in ("csrc", "tests/cuda"):
        shutil.copytree(ROOT / part, folder / part)
    source = folder / "csrc" / "cuda" / file
    text = source.read_text()
    assert old in text, f"{file} no longer reads {old!r}"
    source.write_text(text.replace(old, new))


@contextmanager
def changed_source(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Within the block, calls run a build in which `old` reads `new` in csrc/cuda/`file`."""
    change_source(folder, file, old, new)
    compile_library(folder, folder / "changed.so")
    token = _library.set(ctypes.CDLL(str(folder / "changed.so")))
    try:
        yield
    finally:
        _library.reset(token)


def _call(function: str, argument: ctypes.Structure, *more: object) -> None:
    message = ctypes.create_string_buffer(4096)
    code = getattr(_library.get() or library(), function)(
        ctypes.byref(argument), *more, message, len(message)
    )
    if code != 0:
        raise EmulationError(message.value.decode())


def log2(block: int) -> int:
    """``block_log2`` of a MatrixKey; 0 for the dense kinds."""
    return block.bit_length() - 1 if block else 0


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
    arch: int = 90,
    block: int = 0,
) -> tuple[Tensor, Plan]:
    """``scale * grads [B, P] @ R[row_offset : row_offset + P, :proj_dim]`` and the plan.

    ``order`` seeds the order in which threads run; ``truncate`` makes sums of products cut to fp32
    as tensor cores do. Poisons the result with NaN first unless ``accumulate``.
    """
    dtype = torch.float64 if grads.dtype == torch.float64 else torch.float32
    if out is None:
        out = torch.full((grads.shape[0], proj_dim), float("nan"), dtype=dtype)
    argument = _Project(
        grads.data_ptr(), *grads.shape, *grads.stride(), out.data_ptr(), proj_dim, *out.stride(),
        seed, row_offset, scale, DTYPES[grads.dtype], KINDS[kind], stream, int(accumulate), terms,
        VARIANTS[variant], multiprocessors, order, int(truncate), arch, log2(block),
    )  # fmt: skip
    return out, _plan(argument, plan_only=False)


def _plan(argument: _Project, *, plan_only: bool) -> Plan:
    facts = (_int64 * 14)()
    _call("emulated_project", argument, facts, int(plan_only))
    names = {number: name for name, number in VARIANTS.items()}
    return Plan(names[facts[0]], facts[1], LOADERS[facts[2]], *facts[3:])


def plan(
    batch: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    kind: str = "rademacher",
    terms: int = 3,
    variant: str = "auto",
    stride_b: int | None = None,
    stride_p: int = 1,
    address: int = 256,
    row_offset: int = 0,
    multiprocessors: int = 132,
    arch: int = 90,
    block: int = 0,
) -> Plan:
    """What a call on a device with sm_90a code would use; nothing runs, no memory is needed."""
    argument = _Project(
        address, batch, rows, rows if stride_b is None else stride_b, stride_p, 0, cols, cols, 1,
        0, row_offset, 1.0, DTYPES[dtype], KINDS[kind], 0, 0, terms, VARIANTS[variant],
        multiprocessors, 0, 1, arch, log2(block),
    )  # fmt: skip
    return _plan(argument, plan_only=True)


def kernel_facts(variant: str, kind: str, operand: str, terms: int, block_b: int) -> dict[str, int]:
    """Dynamic shared memory, columns, stages and rows per fold of one instantiation."""
    facts = (_int64 * 4)()
    library().emulated_kernel(
        VARIANTS[variant], KINDS[kind], int(operand == "bf16"), terms, block_b, facts
    )
    return dict(zip(("shared", "columns", "stages", "fold"), facts, strict=True))


@dataclass
class Traffic:
    """8-byte stores to shared memory by 16 lanes at once, 16-byte reads of it by 8, and the
    wavefronts that they take (as many where no two lanes share a bank); 16-byte loads from global
    memory by 8 lanes, and the 32-byte sectors that they touch."""

    stores: int = 0
    store_wavefronts: int = 0
    reads: int = 0
    read_wavefronts: int = 0
    loads: int = 0
    sectors: int = 0


@contextmanager
def traffic() -> Iterator[Traffic]:
    """What calls within the block moved; filled in at its end."""
    counted, facts = Traffic(), (_int64 * 6)()
    count = (_library.get() or library()).emulated_traffic
    count(1, facts)
    try:
        yield counted
    finally:
        count(0, facts)
        vars(counted).update(zip(vars(counted), facts, strict=True))


def protect(address: int, length: int) -> int:
    """Makes memory that any access to ends the process; 0 when it is done."""
    return int(ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), 0))


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
    block: int = 0,
) -> Tensor:
    """``scale * y [B, K] @ R[row_offset : row_offset + rows, :K].T``"""
    if out is None:
        dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
        out = torch.full((y.shape[0], rows), float("nan"), dtype=dtype)
    argument = _Transpose(
        y.data_ptr(), *y.shape, *y.stride(), out.data_ptr(), rows, *out.stride(),
        seed, row_offset, scale, DTYPES[y.dtype], KINDS[kind], stream, terms, VARIANTS[variant],
        order, log2(block),
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
    block: int = 0,
) -> Tensor:
    """``out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]``"""
    argument = _Matrix(
        out.data_ptr(), *out.shape, *out.stride(), seed, row_offset, col_offset,
        DTYPES[out.dtype], KINDS[kind], stream, 1, log2(block),
    )  # fmt: skip
    _call("emulated_matrix", argument)
    return out
