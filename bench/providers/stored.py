"""torch.matmul: with R in memory (generation free, memory not), and its peak on a large square."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import Tensor

import fastproj
from bench.providers.base import (
    DENSE_KINDS,
    Case,
    Inputs,
    Prepared,
    Provider,
    affordable_rows,
    relative_error,
    too_slow,
)

BOUNDS = {"fp32": 1e-5, "tf32": 4e-3, "bf16": 1.6e-2}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
# Small, because torch multiplies bf16 at 1 GF/s where the processor has no instructions for it.
PROBE_SIDE = 512
PROBE_ROWS = 1024
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


@lru_cache
def affordable_side(size: int, dtype: torch.dtype, max_seconds: float) -> int:
    """``size``, or half, a quarter .. of it, whose product on a CPU takes at most max_seconds."""
    side = min(size, PROBE_SIDE)
    a, b = squares(side, dtype, "cpu")
    tries = []
    for _ in range(3):  # the first may wait for threads that sleep
        start = time.perf_counter()
        torch.matmul(a, b)
        tries.append(time.perf_counter() - start)
    seconds = min(tries) * (size / side) ** 3
    while seconds > max_seconds and size > side:
        size, seconds = size // 2, seconds / 8
    return size


def prepare_peak(case: Case, inputs: Inputs, *, arithmetic: str) -> Prepared | str:
    """A square product: the most that this torch gets out of this machine."""
    size, dtype = case.square, DTYPES[arithmetic]
    if case.device == "cpu":
        size = affordable_side(size, dtype, case.max_seconds)
    a, b = squares(size, dtype, case.device)

    def error(result: Tensor) -> float:
        return relative_error(result[:, :8], a.double() @ b[:, :8].double())

    call = partial(torch.matmul, a, b, out=torch.empty_like(a))
    note = f"{size} x {size} x {size}" + (f": {too_slow(case)}" if size < case.square else "")
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
    matrix = fastproj.matrix(rows, case.cols, kind=case.kind, dtype=dtype, device=case.device)
    gib = dtype.itemsize * case.cols * case.rows / 2**30
    note = "" if rows == case.rows else f"fewer rows: all of R would take {gib:.3g} GiB"
    if case.device == "cpu":

        def product(grads: Tensor) -> Tensor:
            return grads.to(dtype) @ matrix[: grads.shape[1]]

        affordable = affordable_rows(case, inputs, product, PROBE_ROWS)
        if affordable < rows:
            rows, matrix = affordable, matrix[:affordable]
            note = f"fewer rows: {too_slow(case)}"
    grads = inputs.grads(rows).to(dtype)  # [B, p]
    call = partial(torch.matmul, grads, matrix)
    bound = BOUNDS[arithmetic]
    around = partial(arithmetic_of, arithmetic)
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), bound, note, around)
