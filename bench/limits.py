"""What a table of rates doesn't show: memory, latency, drift of long sums, and quiet threads."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

import fastproj
from bench.providers.base import float64_product, relative_error
from bench.record import end_with, in_fresh_process
from fastproj.spec import KINDS

MIB = 2**20


def memory_growth(rows: int = 10**7, batch: int = 8, cols: int = 4096) -> dict[str, Any]:
    """Growth of the peak resident set in one call, beyond input and output, in MiB per kind.

    Each kind is measured in a process of its own, in its first call.
    """
    growth: dict[str, Any] = {"rows": rows, "batch": batch, "cols": cols}
    for kind in tqdm(KINDS, desc="memory", leave=False, disable=None):
        growth[kind] = in_fresh_process("limits", "memory", kind, rows, batch, cols)
    return growth


def _memory_in_this_process(kind: str, rows: int, batch: int, cols: int) -> float | None:
    """MiB by which one call raises the resident set at its highest; None where Linux isn't."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def kib(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    grads = torch.ones(batch, rows)  # [B, P]
    out = torch.zeros(batch, cols)  # [B, K]
    clear.write_text("5")  # the peak starts again from the present size
    before = kib("VmRSS:")
    fastproj.project(grads, cols, kind=kind, out=out)
    return (kib("VmHWM:") - before) * 1024 / MIB


def call_latency(cols: int = 512, calls: int = 3000) -> dict[str, float]:
    """Microseconds of project([1, 1000], cols), Python included: median and 99th percentile."""
    grads = torch.randn(1, 1000)
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        fastproj.project(grads, cols)
        seconds.append(time.perf_counter() - start)
    ordered = sorted(seconds[calls // 10 :])
    return {"median": 1e6 * median(ordered), "p99": 1e6 * ordered[int(0.99 * len(ordered))]}


def drift(rows: int = 10**8, cols: int = 512, checked: int = 8) -> float:
    """Relative error of a long sum: B = 1, fp32 inputs of mean 1 and deviation 1, "highest"."""
    grads = torch.empty(1, rows).normal_(generator=torch.Generator().manual_seed(2)).add_(1.0)
    result = fastproj.project(grads, cols, scale=None, precision="highest")
    columns = slice(0, min(checked, cols))
    return relative_error(result[:, columns], float64_product(grads, columns, "rademacher"))


def matmul_between_calls(size: int = 1024, turns: int = 30) -> dict[str, float]:
    """Milliseconds of a torch matmul alone, and right after a projection, at the median."""
    a, b = torch.randn(2, size, size)
    grads = torch.randn(8, 65536)

    def timed(before: Callable[[], object]) -> float:
        seconds = []
        for _ in range(turns):
            before()
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        return 1e3 * median(seconds)

    def project() -> object:
        return fastproj.project(grads, 512)

    for _ in range(3):
        project()
        timed(lambda: None)
    return {"alone": timed(lambda: None), "between": timed(project)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one measurement by name, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["memory", "latency", "drift", "threads", "all"])
    parser.add_argument("values", nargs="*", help="memory: kind, rows, batch and cols, in-process")
    options = parser.parse_args(argv)
    if options.values and (options.which, len(options.values)) != ("memory", 4):
        parser.error(
            f"received {options.which} {' '.join(options.values)}; values go with memory, as in "
            "`memory sjlt 1000000 8 4096`"
        )
    if options.values:
        kind, rows, batch, cols = options.values
        print(json.dumps(_memory_in_this_process(kind, int(rows), int(batch), int(cols))))
        return 0
    measurements: dict[str, Callable[[], object]] = {
        "memory": memory_growth,
        "latency": call_latency,
        "drift": drift,
        "threads": matmul_between_calls,
    }
    names = [name for name in measurements if options.which in (name, "all")]
    for name in tqdm(names, desc="limits", leave=False, disable=None):
        tqdm.write(f"{name:<10}{measurements[name]()}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    end_with(main)
