"""The targets of the project, each with the figure measured on this machine.

On a machine without AMX the rows that ask for it show the best instruction set there and judge
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench import limits
from bench.providers import Case, all_providers
from bench.providers.basic_projector import NAME as TRAK
from bench.providers.ours import name_of, usable_isas
from bench.providers.stored import peak_name
from bench.timing import Row, table_of, time_case
from fastproj.spec import KINDS

FP32, BF16 = peak_name("fp32"), peak_name("bf16")
PASS, FAIL, NOT_HERE = "PASS", "FAIL", "N-A"


@dataclass
class Target:
    """One line of the list: ``figure`` must be at least, or below, ``bound``."""

    what: str
    figure: float | None
    bound: float
    at_least: bool
    judged: bool = True
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL, or N-A where the machine lacks what the target asks for."""
        if self.figure is None or not self.judged:
            return NOT_HERE
        met = self.figure >= self.bound if self.at_least else self.figure < self.bound
        return PASS if met else FAIL

    def line(self) -> str:
        """What, measured, target, verdict."""
        figure = "-" if self.figure is None else f"{self.figure:.3g}"
        sign = ">=" if self.at_least else "<"
        return f"{self.verdict:<5}{self.what:<62}{figure:>9}  {sign} {self.bound:<8.3g}{self.note}"


def run_acceptance(
    make_case: Callable[[str, int], Case], repeats: int, *, small: bool
) -> tuple[list[Row], list[Target]]:
    """Time what the targets need, print each table, then the list of targets."""
    isas = usable_isas()
    best = isas[-1]
    names = {FP32, BF16, TRAK, name_of("medium", best)}
    names |= {name_of("highest", isa) for isa in isas if isa != "portable"}
    names.add(name_of("highest", best))
    chosen = [provider for provider in all_providers() if provider.name in names]
    rows: list[Row] = []
    for kind, batches in (("rademacher", (8, 32, 64, 128)), ("gaussian", (32,))):
        for batch in batches:
            found = time_case(make_case(kind, batch), chosen, repeats)
            print(table_of(found, (FP32, BF16)), flush=True)
            rows += found
    targets = [*rate_targets(rows, isas), *limit_targets(small)]
    print(list_of(targets))
    return rows, targets


def list_of(targets: Sequence[Target]) -> str:
    """The targets, a line for each."""
    head = "\n     target" + " " * 52 + " measured  wanted"
    return "\n".join([head, *(target.line() for target in targets)])


def rate_targets(rows: Sequence[Row], isas: Sequence[str]) -> list[Target]:
    """Targets that are ratios of rates of one run."""
    table = {(row.kind, row.batch, row.provider): row for row in rows}
    best, amx = isas[-1], "amx" in isas
    targets: list[Target] = []

    def ratio(what: str, kind: str, batch: int, ours: str, other: str, bound: float) -> Target:
        a, b = table.get((kind, batch, ours)), table.get((kind, batch, other))
        figure = a.rate / b.rate if a and b and a.rate and b.rate else None
        return Target(f"{what}, B = {batch}", figure, bound, at_least=True)

    def needs_amx(target: Target) -> None:
        target.judged = amx
        target.note = "" if amx else f"needs AMX; measured with {best}"
        targets.append(target)

    highest, medium = name_of("highest", best), name_of("medium", best)
    for batch, peak, trak in ((32, 3.0, 150.0), (8, 2.0, 400.0)):
        against = "highest against torch fp32 peak"
        needs_amx(ratio(against, "rademacher", batch, highest, FP32, peak))
        against = "highest against TRAK rademacher"
        needs_amx(ratio(against, "rademacher", batch, highest, TRAK, trak))
    errors = [row.error for row in rows if row.provider == highest and row.kind == "rademacher"]
    worst = max(errors, default=None)
    targets.append(Target("highest, relative error, all B", worst, 1e-6, at_least=False))
    for batch in (32, 128):
        against = "medium against torch bf16 peak"
        needs_amx(ratio(against, "rademacher", batch, medium, BF16, 1.2))
    for isa, bound in (("avx512", 1.3), ("avx2", 0.5)):
        for batch in (8, 32, 64):
            what = f"{isa} highest against torch fp32 peak"
            ours = name_of("highest", isa)
            target = ratio(what, "rademacher", batch, ours, FP32, bound)
            target.note = "" if isa in isas else f"needs {isa}"
            targets.append(target)
    targets.append(
        ratio("gaussian highest against TRAK normal", "gaussian", 32, highest, TRAK, 25.0)
    )
    return targets


def limit_targets(small: bool) -> list[Target]:
    """Targets on memory, latency, drift and threads; ``small`` shrinks the two large problems."""
    growth = limits.memory_growth(rows=10**6 if small else 10**7)
    note = "P = 1e6 (quick)" if small else ""
    targets = [
        Target(
            f"memory beyond input and output, {kind}, MiB",
            growth[kind],
            64.0,
            at_least=False,
            note=note or "P = 1e7, B = 8, K = 4096",
        )
        for kind in KINDS
    ]
    latency = limits.call_latency()
    targets.append(
        Target(
            "call on [1, 1000], K = 512, microseconds",
            latency["median"],
            100.0,
            at_least=False,
            note=f"99th percentile {latency['p99']:.0f}",
        )
    )
    error = limits.drift(rows=10**6 if small else 10**8)
    size = note or "P = 1e8, B = 1, K = 512"
    what = "relative error of a long sum of mean 1, highest"
    targets.append(Target(what, error, 1e-5, at_least=False, note=size))
    times = limits.matmul_between_calls()
    kept = times["alone"] / times["between"]
    what = "torch matmul speed kept between calls"
    targets.append(Target(what, kept, 0.9, at_least=True, note="1024 cubed"))
    return targets


def as_dicts(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Plain values for the result file."""
    return [{**asdict(target), "verdict": target.verdict} for target in targets]
