"""torch.matmul: with R in memory (generation free, memory not), and its peak on a large square."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

import fastproj
from providers.base import Case, Inputs, Prepared, Provider, relative_error

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def peak_name(dtype: torch.dtype) -> str:
    """The name in the table of torch's peak."""
    return f"torch peak {NAMES[dtype]}"


def providers() -> list[Provider]:
    """The peaks, then the stored matrices."""
    peaks = [Provider(peak_name(dtype), partial(prepare_peak, dtype=dtype)) for dtype in NAMES]
    stored = [
        Provider(f"torch.matmul stored R {name}", partial(prepare_stored, dtype=dtype))
        for dtype, name in NAMES.items()
    ]
    return [*peaks, *stored]


@lru_cache(maxsize=2)
def squares(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two square matrices of standard normal numbers."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, size, size, generator=generator).to(dtype)
    return a, b


def prepare_peak(case: Case, inputs: Inputs, *, dtype: torch.dtype) -> Prepared | str:
    """A square product: the most that this torch gets out of this machine."""
    size = case.square
    a, b = squares(size, dtype)

    def error(result: Tensor) -> float:
        return relative_error(result[:, :8], a.double() @ b[:, :8].double())

    call = partial(torch.matmul, a, b, out=torch.empty(size, size, dtype=dtype))
    return Prepared(call, size, 2.0 * size**3, error, BOUNDS[dtype], f"{size} x {size} x {size}")


def prepare_stored(case: Case, inputs: Inputs, *, dtype: torch.dtype) -> Prepared | str:
    """grads @ R with the same R in memory; fewer rows where R would not fit."""
    size = torch.empty(0, dtype=dtype).element_size()
    rows = min(case.rows, case.stored_bytes // (size * case.cols))
    if rows < 1:
        return "one row of R is larger than --stored-gib"
    grads = inputs.grads(rows).to(dtype)  # [B, p]
    matrix = fastproj.matrix(rows, case.cols, kind=case.kind, dtype=dtype)  # [p, K]
    note = "" if rows == case.rows else "fewer rows: R would not fit"
    call = partial(torch.matmul, grads, matrix)
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), BOUNDS[dtype], note)
