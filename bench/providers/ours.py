"""fastproj at each precision, on each instruction set that this machine has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

import fastproj
from bench.providers.base import Case, Inputs, Prepared, Provider
from fastproj.backends import cpu

PRECISIONS = ("highest", "high", "medium")
PROBE_ROWS = 16384
DENSE = " rademacher"  # ends the name of the dense kernel beside kind sjlt
DENSE_SECONDS = 1.0  # of one of its calls
# A result worse than this is wrong, not rounded: docs/projection.md with a margin of four.
BOUNDS = {"highest": 2e-6, "high": 6e-5, "medium": 1.6e-2}


def usable_isas() -> list[str]:
    """Instruction sets that can run here, from the least to the best."""
    return [name for name, reason in cpu.isas().items() if not reason]


def name_of(precision: str, isa: str) -> str:
    """The name in the table."""
    return f"fastproj {precision} {isa}"


def providers(precisions: Sequence[str] = PRECISIONS) -> list[Provider]:
    """One per precision and instruction set, the best set first."""
    if cpu.unavailable() is not None:
        return [Provider("fastproj", lambda case, inputs: str(cpu.unavailable()))]
    return [
        Provider(name_of(precision, isa), partial(prepare, precision=precision, isa=isa))
        for isa in reversed(usable_isas())
        for precision in precisions
    ]


def dense_providers() -> list[Provider]:
    """The dense Rademacher kernel on the best set, on the gradients of a case of kind sjlt."""
    if cpu.unavailable() is not None:
        return []
    isa = usable_isas()[-1]
    return [Provider(f"{name_of('highest', isa)}{DENSE}", partial(prepare_dense, isa=isa))]


def prepare_dense(case: Case, inputs: Inputs, *, isa: str) -> Prepared | str:
    """``prepare`` of the same case with kind rademacher; of fewer rows: a rate needs no more."""
    return prepare(*inputs.as_dense(DENSE_SECONDS), precision="highest", isa=isa)


def prepare(case: Case, inputs: Inputs, *, precision: str, isa: str) -> Prepared | str:
    """A projection of the case, unscaled; of fewer rows where it would take too long."""
    if precision != "highest" and (case.dtype != torch.float32 or case.kind == "sjlt"):
        return "precision only matters for float32 and dense matrices"
    project = partial(
        fastproj.project,
        proj_dim=case.cols,
        kind=case.kind,
        block=case.block or None,
        scale=None,
        precision=precision,
        backend="cpu",
    )
    force = partial(cpu.force_isa, isa)
    rows = affordable_rows(case, inputs, project, force)
    note = "" if rows == case.rows else f"fewer rows: a call may take {case.max_seconds:g} s"
    call = partial(project, inputs.grads(rows))
    bound = 1e-13 if case.dtype == torch.float64 else BOUNDS[precision]
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), bound, note, force)


def affordable_rows(
    case: Case,
    inputs: Inputs,
    project: Callable[[Tensor], Tensor],
    force: Callable[[], AbstractContextManager[None]],
) -> int:
    """All rows of the case, or as many as fit into max_seconds, judged by a smaller call."""
    probe = inputs.grads(min(case.rows, PROBE_ROWS))
    with force():
        project(probe[:, :512])
        start = time.perf_counter()
        project(probe)
        seconds = time.perf_counter() - start
    return min(case.rows, max(1, int(probe.shape[1] * case.max_seconds / seconds)))
