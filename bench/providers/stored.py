"""torch.matmul: with R in memory (generation free, memory not), and its peak on a large square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

import fastproj
from bench.providers.base import DENSE_KINDS, Case, Inputs, Prepared, Provider, relative_error

BOUNDS = {"fp32": 1e-5, "tf32": 4e-3, "bf16": 1.6e-2}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "tf32")}  # arithmetic that is worth comparing


def peak_name(arithmetic: str) -> str:
    """The name in the table of torch's peak."""
    return f"torch peak {arithmetic}"


def stored_name(arithmetic: str) -> str:
    """The name in the table of a product with R in memory."""
    return f"torch.matmul stored R {arithmetic}"


def providers(device: str) -> list[Provider]:
    """The peaks, then the stored matrices."""
    names = NAMES[device]
    peaks = [Provider(peak_name(name), partial(prepare_peak, arithmetic=name)) for name in names]
    stored = [
        Provider(stored_name(name), partial(prepare_stored, arithmetic=name)) for name in names
    ]
    return [*peaks, *stored]


@contextmanager
def arithmetic_of(name: str) -> Iterator[None]:
    """Within the block, CUDA matmuls of float32 use TF32 if that is the name, else they don't."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@lru_cache(maxsize=2)
def squares(size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Two square matrices of standard normal numbers."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, size, size, generator=generator).to(device, dtype)
    return a, b


def prepare_peak(case: Case, inputs: Inputs, *, arithmetic: str) -> Prepared | str:
    """A square product: the most that this torch gets out of this machine."""
    size, dtype = case.square, DTYPES[arithmetic]
    a, b = squares(size, dtype, case.device)

    def error(result: Tensor) -> float:
        return relative_error(result[:, :8], a.double() @ b[:, :8].double())

    call = partial(torch.matmul, a, b, out=torch.empty_like(a))
    note = f"{size} x {size} x {size}"
    around = partial(arithmetic_of, arithmetic)
    return Prepared(call, size, 2.0 * size**3, error, BOUNDS[arithmetic], note, around)


def prepare_stored(case: Case, inputs: Inputs, *, arithmetic: str) -> Prepared | str:
    """grads @ R with the same R in memory; fewer rows where R would not fit."""
    if case.kind not in DENSE_KINDS:
        return "stores dense matrices only"
    dtype = DTYPES[arithmetic]
    if arithmetic == "tf32" and case.dtype != torch.float32:
        return "timed in float32 only"
    rows = min(case.rows, case.stored_bytes // (dtype.itemsize * case.cols))
    if rows < 1:
        return "skipped: one row of R is larger than --stored-gib"
    grads = inputs.grads(rows).to(dtype)  # [B, p]
    matrix = fastproj.matrix(rows, case.cols, kind=case.kind, dtype=dtype, device=case.device)
    gib = dtype.itemsize * case.cols * case.rows / 2**30
    note = "" if rows == case.rows else f"fewer rows: all of R would take {gib:.3g} GiB"
    call = partial(torch.matmul, grads, matrix)
    bound = BOUNDS[arithmetic]
    around = partial(arithmetic_of, arithmetic)
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), bound, note, around)
