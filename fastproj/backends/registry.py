"""Which backend runs a call: the one asked for, or else the first that can.

The order is cuda, triton, cpu, reference. Where both GPU backends were measured, the faster one
comes first (``measured``).

Every adapter module ``fastproj.backends.<name>`` has NAME, unavailable(), unsupported(),
project(), project_transpose(), matrix() and describe().
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fastproj.backends import built, measured
from fastproj.call import Call

NAMES = ("cuda", "triton", "cpu", "reference")  # in order of preference
ENVIRONMENT = "FASTPROJ_BACKEND"
# The backends that project products as they form, and what must be 1 for that: docs/triton.md.
PRODUCTS = {"triton": "FASTPROJ_TRITON_EPILOGUE"}

logger = logging.getLogger("fastproj")


class Backend(Protocol):
    """What an adapter module offers; nothing in it checks user arguments."""

    NAME: str

    def unavailable(self) -> str | None:
        """None where it can run on this machine, else the reason and the fix in one line."""

    def unsupported(self, device_type: str, dtype: torch.dtype, kind: str) -> str | None:
        """None where it takes such input, else the reason in one line."""

    def project(self, pieces: list[Tensor], out: Tensor, call: Call) -> None:
        """out [B, K] = (or +=) scale * cat(pieces, 1) [B, P] @ R[row_offset : row_offset + P]."""

    def project_transpose(self, y: Tensor, out: Tensor, call: Call) -> None:
        """out [B, n] = scale * y [B, K] @ R[row_offset : row_offset + n, :K].T"""

    def matrix(self, out: Tensor, call: Call, col_offset: int) -> None:
        """out [n, m] = R[row_offset : row_offset + n, col_offset : col_offset + m]"""

    def describe(self) -> dict[str, str]:
        """What it would use on this machine."""


@cache
def load(name: str) -> Backend:
    """The adapter module called ``name``.

    Raises ImportError where it is not part of this installation, ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"received backend={name!r}; expected one of {', '.join(NAMES)}")
    module: ModuleType = importlib.import_module(f"fastproj.backends.{name}")
    return cast(Backend, module)


@cache
def unavailable(name: str) -> str | None:
    """None where backend ``name`` can run on this machine, else the reason and the fix."""
    try:
        return load(name).unavailable()
    except ImportError as error:
        advice = built.among_sources() or "reinstall fastproj"
        return f"it can't be imported here ({error}); {advice}"


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, the preferred one first."""
    return [name for name in NAMES if unavailable(name) is None]


def check_usable(backend: str | None, said_by: str = "backend") -> None:
    """Raise ValueError unless ``backend`` is None or the name of one usable here.

    ``said_by`` is the argument or environment variable that named it.
    """
    if backend is None:
        return
    if backend not in NAMES:
        raise ValueError(
            f"received {said_by}={backend!r}; expected one of {', '.join(NAMES)}, or none"
        )
    reason = unavailable(backend)
    if reason is not None:
        raise ValueError(
            f"received {said_by}={backend!r}, which can't run here: {reason}. "
            f"Usable here: {', '.join(available_backends())}"
        )


def for_products(backend: str | None) -> Any:
    """The backend whose ``project_product(left, right, out, call)`` was asked for, or None.

    backend : the only one that may be used; None is any.
    """
    for name, variable in PRODUCTS.items():
        if backend in (None, name) and os.environ.get(variable) == "1" and not unavailable(name):
            return load(name)
    return None


def choose(
    device_type: str,
    dtype: torch.dtype,
    kind: str,
    backend: str | None = None,
    *,
    shape: Sequence[int] | None = None,
    precision: str = "highest",
    index: int | None = None,
) -> Backend:
    """The backend for such input: ``backend``, else $FASTPROJ_BACKEND, else the best that can.

    shape : (B, K) of a projection; None for an operation that is never measured.
    index : which GPU; None is the current one.

    Raises ValueError where the backend asked for is unknown, not usable here or can't take the
    input.
    """
    if backend:
        return _choose(device_type, dtype, kind, backend, "backend", None)
    asked = os.environ.get(ENVIRONMENT) or None
    hint = None
    if asked is None and shape is not None and device_type == "cuda" and min(shape) > 0:
        arch = measured.arch_of(torch.cuda.current_device() if index is None else index)
        batch, cols = shape
        hint = measured.look_up(arch, dtype, kind, precision, batch, cols)
    return _choose(device_type, dtype, kind, asked, ENVIRONMENT, hint)


def _refusal(name: str, device_type: str, dtype: torch.dtype, kind: str) -> str | None:
    """None where backend ``name`` takes such input here, else the reason.

    It asks about the input first. To ask whether a GPU can be used would start CUDA in this
    process, and then processes forked from it could not use CUDA.
    """
    try:
        return load(name).unsupported(device_type, dtype, kind) or unavailable(name)
    except ImportError:
        return unavailable(name)


@cache
def _choose(
    device_type: str,
    dtype: torch.dtype,
    kind: str,
    asked: str | None,
    asked_by: str,
    hint: measured.Hint | None,
) -> Backend:
    wanted = f"{kind} with {str(dtype).removeprefix('torch.')} on {device_type}"
    check_usable(asked, asked_by)
    passed_over: list[str] = []
    first = hint.backend if hint else None
    order = (asked,) if asked else sorted(NAMES, key=lambda name: name != first)  # a stable sort
    for name in order:
        reason = _refusal(name, device_type, dtype, kind)
        if reason is None:
            why = "asked for" if asked else "; ".join(passed_over) or "first in order"
            if hint and (name == first or first is None):
                why = hint.reason if name == first else f"{why}; {hint.reason}"
            slow = name == "reference" and not asked
            logger.log(
                logging.WARNING if slow else logging.INFO,
                "backend %s for %s (%s)%s",
                name,
                wanted,
                why,
                ": this one is slow, made for checking" if slow else "",
            )
            return load(name)
        passed_over.append(f"{name}: {reason}")
    raise ValueError(f"no backend takes {wanted}: {'; '.join(passed_over)}")
