"""What a provider gets and gives back."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

import fastproj

DENSE_KINDS = ("rademacher", "gaussian")
CHECK_COLUMNS = 16  # columns per checked slice: first, middle and last
CHECK_ROWS = 1 << 18  # rows of R held at once while checking


@dataclass(frozen=True)
class Case:
    """One problem: grads [batch, rows] @ R [rows, cols]."""

    batch: int
    rows: int
    cols: int
    kind: str
    dtype: torch.dtype
    stored_bytes: int  # a stored R may take this much
    trak_rows: int  # P for TRAK's BasicProjector, which is two orders slower
    max_seconds: float  # a call that would take longer gets fewer rows
    square: int = 4096  # size of the matrices that show torch's peak
    device: str = "cpu"
    cut: str = ""  # why rows are fewer than asked for
    block: int = 0  # of kind sjlt, else 0

    def flops(self, rows: int) -> float:
        """Multiplications and additions in a projection of ``rows`` rows; of sjlt, additions."""
        if self.kind == "sjlt":
            return 1.0 * self.batch * rows * self.cols / self.block
        return 2.0 * self.batch * rows * self.cols

    def read_bytes(self, rows: int) -> float:
        """Bytes of the gradients of ``rows`` rows."""
        return 1.0 * self.batch * rows * self.dtype.itemsize


@dataclass
class Prepared:
    """A call ready to be timed.

    ``rows`` says how much of the case it does; ``error`` maps a result to its relative error
    against float64, which must not exceed ``bound`` or no time is reported.
    """

    call: Callable[[], Tensor]
    rows: int
    flops: float
    error: Callable[[Tensor], float]
    bound: float
    note: str = ""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    moved_bytes: float | None = None  # read and written; None is those of the gradients alone


@dataclass(frozen=True)
class Provider:
    """A name for the table, and how to prepare a case (or the reason why it can't take it)."""

    name: str
    prepare: Callable[[Case, Inputs], Prepared | str]


@dataclass
class Inputs:
    """The gradients of a case and their float64 projections, made once and shared by providers."""

    case: Case
    _grads: Tensor | None = None
    _exact: dict[int, Tensor] = field(default_factory=dict)

    def grads(self, rows: int) -> Tensor:
        """Standard normal gradients [batch, rows], contiguous: the first rows of the case's."""
        if self._grads is None:
            generator = torch.Generator(self.case.device).manual_seed(0)
            shape = (self.case.batch, self.case.rows)
            grads = torch.empty(shape, dtype=self.case.dtype, device=self.case.device)
            self._grads = grads.normal_(generator=generator)  # [B, P]
        return self._grads[:, :rows].contiguous()

    def as_dense(self, max_seconds: float) -> tuple[Case, Inputs]:
        """The same gradients for a Rademacher matrix, in calls of at most ``max_seconds``."""
        seconds = min(max_seconds, self.case.max_seconds)
        case = replace(self.case, kind="rademacher", block=0, max_seconds=seconds)
        self.grads(1)  # made
        return case, Inputs(case, self._grads)

    def check_columns(self) -> list[slice]:
        """The columns on which results are checked."""
        cols = self.case.cols
        width = min(CHECK_COLUMNS, cols)
        starts = sorted({0, (cols - width) // 2, cols - width})
        return [slice(start, start + width) for start in starts]

    def exact(self, rows: int) -> Tensor:
        """The checked columns of grads[:, :rows] @ R in float64, [B, checked]."""
        if rows not in self._exact:
            grads = self.grads(rows)
            parts = [
                float64_product(grads, columns, self.case.kind, self.case.block)
                for columns in self.check_columns()
            ]
            self._exact[rows] = torch.cat(parts, dim=1)
        return self._exact[rows]

    def error(self, rows: int) -> Callable[[Tensor], float]:
        """Relative error of a result [B, K] against float64 on the checked columns."""

        def measure(result: Tensor) -> float:
            checked = torch.cat([result[:, columns] for columns in self.check_columns()], dim=1)
            return relative_error(checked, self.exact(rows))

        return measure


def affordable_rows(
    case: Case,
    inputs: Inputs,
    project: Callable[[Tensor], Tensor],
    probe_rows: int,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> int:
    """All rows of the case, or as many as fit into max_seconds, by a call on a CPU of few rows."""
    probe = inputs.grads(min(case.rows, probe_rows))
    with around():
        project(probe[:, :512])
        start = time.perf_counter()
        project(probe)
        seconds = time.perf_counter() - start
    return max(1, min(case.rows, int(probe.shape[1] * case.max_seconds / seconds)))


def too_slow(case: Case) -> str:
    """Why a call does less than the case asks for."""
    return f"a call may take {case.max_seconds:g} s"


def relative_error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the Frobenius norm."""
    return float((result.double() - exact).norm() / exact.norm())


def float64_product(grads: Tensor, columns: slice, kind: str, block: int = 0) -> Tensor:
    """grads [B, P] @ R[:P, columns] in float64, by pieces of R made on the CPU. [B, columns]"""
    shape = (grads.shape[0], columns.stop - columns.start)
    total = grads.new_zeros(shape, dtype=torch.float64)
    for start in range(0, grads.shape[1], CHECK_ROWS):
        stop = min(start + CHECK_ROWS, grads.shape[1])
        part = checked_part(start, stop, columns.start, columns.stop, kind, block)
        total += grads[:, start:stop].double() @ part.to(grads.device).double()
    return total


@lru_cache(maxsize=128)  # up to 8 MiB each, and the next case needs them again
def checked_part(start: int, stop: int, first: int, last: int, kind: str, block: int) -> Tensor:
    """R[start:stop, first:last], bf16 (exact), from a backend that is not being timed on a GPU."""
    rows, cols = slice(start, stop), slice(first, last)
    return fastproj.matrix(rows, cols, kind=kind, block=block or None, dtype=torch.bfloat16)
