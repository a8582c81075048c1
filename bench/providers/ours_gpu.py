"""fastproj on a GPU: the cuda and triton backends at each precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

import fastproj
from bench.providers.base import Case, Inputs, Prepared, Provider, too_slow
from bench.providers.ours import DENSE, DENSE_SECONDS
from fastproj.backends import cuda, registry
from fastproj.backends.measured import BACKENDS

PRECISIONS = ("highest", "high", "medium")
# A result worse than this is wrong, not rounded. Sums of 16-bit products are cut, not rounded, by
# the tensor cores, up to 2048 rows in one accumulator.
BOUNDS = {"highest": 2e-6, "high": 6e-5, "medium": 1.6e-2}
BOUND_16_BIT = 2e-5
PROBE_ROWS = 1 << 18


def name_of(backend: str, precision: str = "highest") -> str:
    """The name in the table; 16-bit gradients are timed at "highest", which changes nothing."""
    return f"fastproj {backend} {precision}"


def providers() -> list[Provider]:
    """One for each backend and precision."""
    return [
        Provider(
            name_of(backend, precision), partial(prepare, backend=backend, precision=precision)
        )
        for backend in BACKENDS
        for precision in PRECISIONS
    ]


def sparse_providers() -> list[Provider]:
    """For kind sjlt: each backend, and the dense Rademacher kernel of the first."""
    sparse = [
        Provider(name_of(backend), partial(prepare, backend=backend, precision="highest"))
        for backend in BACKENDS
    ]
    return [*sparse, Provider(f"{name_of(BACKENDS[0])}{DENSE}", prepare_dense)]


def prepare_dense(case: Case, inputs: Inputs) -> Prepared | str:
    """``prepare`` of the same case with kind rademacher."""
    dense = inputs.as_dense(DENSE_SECONDS)
    return prepare(*dense, backend=BACKENDS[0], precision="highest")


def ladder() -> list[Provider]:
    """One for each family of CUDA kernels."""
    return [
        Provider(
            name_of(f"cuda {variant}"),
            partial(prepare, backend="cuda", precision="highest", variant=variant),
        )
        for variant in cuda.VARIANTS
        if variant != "auto"
    ]


def prepare(
    case: Case, inputs: Inputs, *, backend: str, precision: str, variant: str = "auto"
) -> Prepared | str:
    """A projection of the case, unscaled; of fewer rows where it would take too long."""
    reason = registry.unavailable(backend)
    if reason is not None:
        return f"not usable: {reason}"
    if precision != "highest" and (case.dtype != torch.float32 or case.kind == "sjlt"):
        return "precision only matters for float32 and dense matrices"
    if variant == "sm90" and torch.cuda.get_device_capability() != (9, 0):
        return "needs a GPU of compute capability 9.0"
    project = partial(
        fastproj.project,
        proj_dim=case.cols,
        kind=case.kind,
        block=case.block or None,
        scale=None,
        precision=precision,
        backend=backend,
    )
    around = nullcontext if variant == "auto" else partial(cuda.force_variant, variant)
    rows = affordable_rows(case, inputs, project, around)
    note = case.cut if rows == case.rows else f"fewer rows: {too_slow(case)}"
    call = partial(project, inputs.grads(rows))
    bound = BOUNDS[precision] if case.dtype == torch.float32 else BOUND_16_BIT
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), bound, note, around)


def affordable_rows(
    case: Case,
    inputs: Inputs,
    project: Callable[[Tensor], Tensor],
    around: Callable[[], AbstractContextManager[None]],
) -> int:
    """All rows of the case, or as many as fit into max_seconds, judged by a smaller call."""
    probe = inputs.grads(min(case.rows, PROBE_ROWS))
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with around():
        project(probe)  # compiles, where that is done at the first call
        start.record()
        project(probe)
        stop.record()
    stop.synchronize()
    return min(case.rows, int(probe.shape[1] * 1e3 * case.max_seconds / start.elapsed_time(stop)))
