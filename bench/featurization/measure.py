"""Measuring one provider on one workload, in a process of its own."""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Any, NamedTuple

from bench.featurization import memory
from bench.featurization.job import Job, Unsupported
from bench.featurization.providers import PROVIDERS
from bench.featurization.workloads import WORKLOADS, Batch, steps

Row = dict[str, Any]

MOST_WARM_UP = 4  # calls of a provider that don't count


class Sizes(NamedTuple):
    """Samples of a batch, their length, K, timed calls, threads, and whether models are tiny."""

    batch: int
    length: int
    proj_dim: int
    repeats: int
    threads: int
    quick: bool


def work(provider: str, workload: str, sizes: Sizes) -> Row:
    """The row of a provider, or a row with a note that says why there is none.

    Each call on a batch comes with a plain forward and backward of the same batch, before it, so
    that a machine which slows down or speeds up does so for both. The first calls don't count.
    """
    row: Row = {"workload": workload, "provider": provider, **sizes._asdict(), "note": ""}
    row["seconds"] = []
    try:
        return {**row, **measured(provider, workload, sizes)}
    except Unsupported as reason:
        return {**row, "note": f"missing: {reason}", "missing": True}
    except ImportError as reason:
        install = PROVIDERS[provider].install
        cure = f"; python -m pip install {install}" if install else ""
        return {**row, "note": f"missing: {reason}{cure}", "missing": True}
    except (MemoryError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        # One that fails must not cost the other rows.
        text = " ".join(str(error).split())[:300]
        return {**row, "note": f"FAILED: {type(error).__name__}: {text}"}


def measured(provider: str, workload: str, sizes: Sizes) -> Row:
    """Times, memory and what the features say."""
    kind = WORKLOADS[workload]
    model = kind.model(sizes.quick)

    def batch(number: int) -> Batch:
        return kind.batch(sizes.batch, sizes.length, number, sizes.quick)

    plain = steps(model)
    memory.begin()
    for _ in range(2):
        plain(batch(0))
    plain_peak = memory.peak_mib()
    model.zero_grad(set_to_none=True)

    number = 0
    seconds: list[float] = []
    of_plain: list[float] = []
    warm_up: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        most = MOST_WARM_UP + sizes.repeats  # calls
        count = most * sizes.batch
        job = Job(kind, model, batch(0), count, sizes.proj_dim, folder)
        memory.begin()
        prepared = PROVIDERS[provider].prepare(job)
        peak = memory.peak_mib()
        repeats = min(sizes.repeats, prepared.repeats or sizes.repeats)
        for number in range(prepared.warm_up + repeats):
            one = batch(number)
            if number >= prepared.warm_up:
                of_plain.append(timed(plain, one))
            model.zero_grad(set_to_none=True)
            memory.begin()
            took = timed(prepared.call, one)
            peak = max(peak, memory.peak_mib())
            (seconds if number >= prepared.warm_up else warm_up).append(took)
        ratio = None if prepared.check is None else prepared.check(one)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "dims": prepared.dims,
        "seconds": seconds,
        "plain_seconds": of_plain,
        "warm_up_seconds": warm_up,
        "samples_per_second": sizes.batch / median(seconds),
        "times": median(seconds) / median(of_plain),
        "peak_mib": peak,
        "plain_peak_mib": plain_peak,
        "memory_times": peak / plain_peak,
        "norm_ratio": ratio,
        "details": prepared.details,
    }


def timed(call: Any, batch: Batch) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(batch)
    return time.perf_counter() - start
