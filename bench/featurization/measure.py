"""Measuring providers on one workload: one in a process of its own, or several in turn."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
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
    row = empty(provider, workload, sizes)
    return row | noted(provider, lambda: measured(provider, workload, sizes))


def empty(provider: str, workload: str, sizes: Sizes) -> Row:
    """The row of a provider before anything was measured."""
    row: Row = {"workload": workload, "provider": provider, **sizes._asdict(), "note": ""}
    return row | {"seconds": []}


def noted(provider: str, call: Callable[[], Row]) -> Row:
    """What ``call`` returns, or a note that says why it returned nothing."""
    try:
        return call()
    except Unsupported as reason:
        return {"note": f"missing: {reason}", "missing": True}
    except ImportError as reason:
        install = PROVIDERS[provider].install
        cure = f"; python -m pip install {install}" if install else ""
        return {"note": f"missing: {reason}{cure}", "missing": True}
    except (MemoryError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        # One that fails must not cost the other rows.
        text = " ".join(str(error).split())[:300]
        return {"note": f"FAILED: {type(error).__name__}: {text}"}


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


def work_in_turn(providers: Sequence[str], workload: str, sizes: Sizes) -> list[Row]:
    """The rows of several providers that take turns in one process, in an order that changes.

    So what slows the machine down for a while does so for all of them. A plain forward and
    backward takes turns too. Peaks of memory would be those of all together: there are none.
    """
    kind = WORKLOADS[workload]
    count = (MOST_WARM_UP + sizes.repeats) * sizes.batch
    rows = {name: empty(name, workload, sizes) for name in providers}
    calls: dict[str, Callable[[Batch], Any]] = {}
    model = kind.model(sizes.quick)
    plain = steps(model)
    of_plain: list[float] = []

    def batch(number: int) -> Batch:
        return kind.batch(sizes.batch, sizes.length, number, sizes.quick)

    def prepare(name: str, folder: Path) -> Row:
        folder.mkdir()
        first = batch(0)
        job = Job(kind, kind.model(sizes.quick), first, count, sizes.proj_dim, str(folder))
        prepared = PROVIDERS[name].prepare(job)
        for number in range(prepared.warm_up):
            prepared.call(batch(number))
        calls[name] = prepared.call
        return {"dims": prepared.dims, "details": prepared.details}

    def one(name: str, number: int) -> Row:
        took = timed(calls[name], batch(number))
        return {"seconds": [*rows[name]["seconds"], took]}

    with tempfile.TemporaryDirectory() as folder:
        for name in providers:
            rows[name] |= noted(name, partial(prepare, name, Path(folder, name)))
        plain(batch(0))
        order = random.Random(0)
        for number in range(sizes.repeats):
            for name in order.sample([*providers, ""], len(providers) + 1):
                if not name:
                    of_plain.append(timed(plain, batch(number)))
                    model.zero_grad(set_to_none=True)
                elif not rows[name]["note"]:
                    rows[name] |= noted(name, partial(one, name, MOST_WARM_UP + number))
    for row in rows.values():
        if row["note"]:
            row["seconds"] = []
            continue
        row |= {
            "parameters": sum(p.numel() for p in model.parameters()),
            "plain_seconds": of_plain,
            "samples_per_second": sizes.batch / median(row["seconds"]),
            "times": median(row["seconds"]) / median(of_plain),
            "peak_mib": None,
            "memory_times": None,
            "norm_ratio": None,
        }
    return list(rows.values())


def timed(call: Any, batch: Batch) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(batch)
    return time.perf_counter() - start
