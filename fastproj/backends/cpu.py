"""The CPU backend: hands tensors to ``fastproj._cpu`` as pointers, shapes and strides.

The instruction set is the best one that the machine has; ``FASTPROJ_CPU_ISA`` or ``force_isa``
names another. R is the same under all sets. Sums differ by rounding.
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
from fastproj.call import Call, view

NAME = "cpu"
ISA_VARIABLE = "FASTPROJ_CPU_ISA"

_forced_isa: ContextVar[str | None] = ContextVar("fastproj_forced_isa", default=None)


@lru_cache(maxsize=1)
def _module() -> ModuleType:
    """The compiled module. Raises ImportError where there is none."""
    import fastproj._cpu

    built.warn_of_outdated(NAME)
    return fastproj._cpu


def unavailable() -> str | None:
    """None when the compiled module is there, else the reason and the fix."""
    try:
        _module()
    except ImportError as error:
        advice = "install a C++17 compiler (e.g. `apt-get install g++`) and reinstall fastproj"
        return built.absent(NAME, error, advice)
    return None


def unsupported(device_type: str, dtype: torch.dtype, kind: str) -> str | None:
    """None for CPU tensors, else the reason."""
    return None if device_type == "cpu" else f"it takes CPU tensors, not {device_type} ones"


@lru_cache(maxsize=1)
def isas() -> dict[str, str]:
    """Instruction sets from the least to the best: "" when usable here, else the reason."""
    found: dict[str, str] = {} if unavailable() else _module().isas()
    return found


@lru_cache(maxsize=8)
def _isa_index(name: str | None) -> int:
    """Position of a named set (None: the best usable one) in ``isas()``.

    Raises
    ------
    ValueError
        The name is unknown, or this machine lacks the set.
    """
    known = isas()
    usable = [isa for isa, reason in known.items() if not reason]
    if name is None:
        return list(known).index(usable[-1])
    if name not in usable:
        reason = known.get(name, "there is no instruction set of that name")
        raise ValueError(
            f"{ISA_VARIABLE}: received {name!r}: {reason}; "
            f"usable on this machine: {', '.join(usable)}"
        )
    return list(known).index(name)


def _isa() -> int:
    return _isa_index(_forced_isa.get() or os.environ.get(ISA_VARIABLE) or None)


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Within the block, calls from this context use the named instruction set.

    Raises
    ------
    ValueError
        The name is unknown, or this machine lacks the set.
    """
    _isa_index(name)
    token = _forced_isa.set(name)
    try:
        yield
    finally:
        _forced_isa.reset(token)


def describe() -> dict[str, str]:
    """The instruction set in use, those usable and not, and the number of threads."""
    known = isas()
    try:
        isa = list(known)[_isa()]
    except ValueError as error:  # a bad FASTPROJ_CPU_ISA: say so where people look for the cause
        isa = f"none: {error}"
    return {
        "isa": isa,
        "usable": ", ".join(name for name, reason in known.items() if not reason),
        "not usable": "; ".join(f"{name}: {reason}" for name, reason in known.items() if reason),
        "threads": str(torch.get_num_threads()),
    }


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""
    _module().project(
        [view(g) for g in pieces], view(out), call.numbers(), _isa(), torch.get_num_threads()
    )


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""
    y = y.to(out.dtype)  # exact: to float32 from half precision, [B, K] only
    _module().project_transpose(view(y), view(out), call.numbers(), _isa(), torch.get_num_threads())


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""
    _module().matrix(view(out), call.numbers(), col_offset, _isa(), torch.get_num_threads())
