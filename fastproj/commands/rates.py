"""How fast this machine is at what TRAK does, measured in about a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import fastproj
from fastproj.backends import measured, registry

ENOUGH = 0.05  # seconds that a call must take for its time to mean something
LARGEST = 1 << 26  # bytes of gradients in a call, and of their projection
MOST = 1 << 30  # bytes of one projected gradient: more is not tried
FIRST = 512  # rows of the first call, a panel; each further call has twice as many
REFERENCE_ENTRIES = 1 << 19  # of R in the reference backend's first call: it makes them one by one
SIDE = 1024  # of the matrices that are multiplied and factored


@dataclass(frozen=True)
class Rate:
    """Entries of G that a backend projects in a second, or why it projects none."""

    backend: str
    entries: float
    reason: str = ""


def seconds_of(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The shortest of some calls, after one that isn't counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def projection_rates(rows: int, cols: int, kind: str, block: int | None, batch: int) -> list[Rate]:
    """Rates of projecting float32 gradients [batch, rows] to ``cols`` columns, by backend.

    Calls grow until they take ENOUGH; the rate is that of the last.
    """
    return [projection_rate(name, rows, cols, kind, block, batch) for name in registry.NAMES]


def projection_rate(
    backend: str, rows: int, cols: int, kind: str, block: int | None, batch: int
) -> Rate:
    """The rate of one backend, at the batch, or one whose gradients and projection are no larger
    than LARGEST.
    """
    device = "cuda" if backend in measured.BACKENDS else "cpu"
    reason = registry.unavailable(backend)
    if reason is None:
        reason = registry.load(backend).unsupported(device, torch.float32, kind)
    if reason is None and 4 * cols > MOST:
        reason = f"not tried: one projected gradient takes {4 * cols} bytes"
    if reason is None and backend == "reference" and cols > 8 * REFERENCE_ENTRIES:
        reason = f"not tried: it makes the {cols} entries of a row of R one by one"
    if reason is not None:
        return Rate(backend, 0.0, reason)
    batch = min(batch, max(1, LARGEST // (4 * max(cols, FIRST))))
    part = min(FIRST, rows)
    if backend == "reference":
        part = max(1, min(part, REFERENCE_ENTRIES // cols))
    while True:
        grads = torch.randn(batch, part, device=device)  # [B, P']

        def call(grads: Tensor = grads) -> Tensor:
            return fastproj.project(grads, cols, kind=kind, block=block, backend=backend)

        seconds = seconds_of(call, device, repeats=1)
        if seconds >= ENOUGH or part == rows or 8 * batch * part > LARGEST:
            return Rate(backend, batch * part / seconds)
        part = min(2 * part, rows)


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product on the CPU."""
    left, right = (torch.randn(SIDE, SIDE, dtype=dtype, device="cpu") for _ in range(2))
    return 2.0 * SIDE**3 / seconds_of(lambda: left @ right, "cpu")


def cholesky_rate() -> float:
    """float64 operations a second of a Cholesky factor on the CPU."""
    matrix = torch.eye(SIDE, dtype=torch.float64, device="cpu") * SIDE + 1.0
    return SIDE**3 / 3 / seconds_of(lambda: torch.linalg.cholesky(matrix), "cpu")
