"""Timing providers side by side, and the table of it."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from bench.providers import Case, Inputs, Prepared, Provider
from fastproj.memory import is_out_of_memory

FLUSH_BYTES = 1 << 30  # beyond any GPU's L2
# Torch's threads sleep some milliseconds after its last operation, and the next one waits for them
# to wake: 8 ms on a virtual machine of two cores. In a program that computes they are awake.
WAKING_ENTRIES = 1 << 20


@dataclass
class Row:
    """One provider on one case; ``seconds`` is empty when there is nothing to report.

    ``rows`` are those that were timed, ``case_rows`` those of the case.
    """

    provider: str
    kind: str
    batch: int
    rows: int
    cols: int
    dtype: str = "float32"
    case_rows: int = 0
    block: int = 0
    flops: float = 0.0
    moved_bytes: float = 0.0
    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")
    note: str = ""
    wrong: bool = False

    @property
    def rate(self) -> float:
        """GF/s at the median time; 0 when there is none."""
        return 1e-9 * self.flops / median(self.seconds) if self.seconds else 0.0

    @property
    def entries_per_second(self) -> float:
        """Entries of the gradients at the median time; 0 when there is none."""
        return self.batch * self.rows / median(self.seconds) if self.seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes moved in a second at the median time; 0 when there is none."""
        return self.moved_bytes / median(self.seconds) if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the result file."""
        middle = median(self.seconds) if self.seconds else None
        error = self.error if math.isfinite(self.error) else None  # JSON has no other numbers
        plain = {**asdict(self), "error": error}
        return {
            **plain,
            "median_seconds": middle,
            "gflops": self.rate,
            "bytes_per_second": self.bandwidth,
        }


def wall_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, by the clock, with the threads of torch's pool awake."""
    torch.zeros(WAKING_ENTRIES)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class GpuTimer:
    """Seconds of one call on the current GPU's stream, by events, with nothing of it in the L2.

    Reading other memory empties the cache. Writing it would leave up to a whole L2 (50 MB) for the
    timed call to write back: a third of what some calls read. To read also takes longer than Python
    takes to queue the call, so that the GPU does not wait for Python between the events.
    """

    def __init__(self) -> None:
        most = torch.cuda.mem_get_info()[0] // 16
        self.room = torch.zeros(min(FLUSH_BYTES, most) // 4, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.room.sum()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return 1e-3 * start.elapsed_time(stop)


def time_case(case: Case, providers: Sequence[Provider], repeats: int) -> list[Row]:
    """Rows of one case: all providers prepared, checked and warmed up, then timed in turns.

    Turns, so that a machine which slows down or speeds up does so for all of them alike.
    """
    seconds_of = GpuTimer() if case.device == "cuda" else wall_seconds
    inputs = Inputs(case)
    rows: list[Row] = []
    ready: list[tuple[Prepared, Row]] = []
    label = f"{case.kind} B={case.batch}"
    for provider in tqdm(providers, desc=f"{label} check", leave=False, disable=None):
        dtype = str(case.dtype).removeprefix("torch.")
        facts = (case.kind, case.batch, case.rows, case.cols, dtype, case.rows, case.block)
        row = Row(provider.name, *facts)
        rows.append(row)
        try:
            prepared = provider.prepare(case, inputs)
            if isinstance(prepared, str):
                row.note = prepared
                continue
            row.rows, row.flops, row.note = prepared.rows, prepared.flops, prepared.note
            row.moved_bytes = (
                case.read_bytes(prepared.rows)
                if prepared.moved_bytes is None
                else prepared.moved_bytes
            )
            with prepared.around():
                row.error = prepared.error(prepared.call())
        except Exception as error:  # Triton's own are no RuntimeErrors
            if is_out_of_memory(error):
                row.note = "skipped: its memory does not fit"
                continue
            # A kernel that fails must not cost the other rows.
            row.wrong = True
            row.note = f"FAILED: {' '.join(str(error).split())[:200]}"
            continue
        if not row.error <= prepared.bound:
            row.wrong = True
            row.note = f"WRONG: error {row.error:.1e}, allowed {prepared.bound:.1e}; not timed"
            continue
        ready.append((prepared, row))
    gc.collect()
    for _ in tqdm(range(repeats), desc=f"{label} time", leave=False, disable=None):
        for prepared, row in ready:
            with ExitStack() as stack:
                stack.enter_context(prepared.around())
                row.seconds.append(seconds_of(prepared.call))
    return rows


def table_of(rows: Sequence[Row], peaks: Sequence[str]) -> str:
    """The rows of one case, with ratios to the peaks measured in the same turns."""
    first = rows[0]
    rates = [next((row.rate for row in rows if row.provider == name), 0.0) for name in peaks]
    heads = "".join(f"{'x ' + name.removeprefix('torch '):>13}" for name in peaks)
    lines = [f"\n{first.kind}, {first.dtype}, B = {first.batch}, K = {first.cols}"]
    lines.append(f"{'':<30}{'P':>10}{'ms':>11}{'GF/s':>9}{heads}{'rel. error':>12}")
    for row in rows:
        if not row.seconds:
            lines.append(f"{row.provider:<30}{row.note}")
            continue
        ratios = "".join(f"{row.rate / rate:>13.2f}" if rate else f"{'-':>13}" for rate in rates)
        lines.append(
            f"{row.provider:<30}{row.rows:>10}{1e3 * median(row.seconds):>11.2f}{row.rate:>9.1f}"
            f"{ratios}{row.error:>12.1e}  {row.note}".rstrip()
        )
    return "\n".join(lines)
