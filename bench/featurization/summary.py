"""The table of bench.featurize, and what is asked of its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.featurization.providers import PROVIDERS
from bench.featurization.workloads import WORKLOADS
from bench.targets import Target

Row = dict[str, Any]

TIMES = (  # of a plain forward and backward, at most
    ("sjlt", 2.2, ""),
    ("sjlt", 1.7, "fused with the gradient's formation"),
    ("factored-64", 1.35, ""),
)
MEMORY = 1.3  # times plain's, at most
OFF = 0.5  # what |phi|^2 / |g|^2 may differ from 1 by: chance is below 0.25 for the smallest r


def table(rows: Sequence[Row]) -> str:
    """The rows of one workload and K as lines."""
    first = rows[0]
    kind = WORKLOADS[first["workload"]]
    parameters = next((row["parameters"] for row in rows if row["seconds"]), 0)
    lines = [
        f"\n{kind.what}{' (tiny)' if first['quick'] else ''}, {parameters:,} parameters, "
        f"K = {first['proj_dim']}, batches of {first['batch']}, length {first['length']}, "
        f"{first['threads']} threads",
        f"{'':<34}{'numbers':>9}{'samples/s':>11}{'s/batch':>9}{'x plain':>9}{'peak MiB':>10}"
        f"{'x plain':>9}{'|phi|²/|g|²':>13}",
    ]
    return "\n".join([*lines, *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One provider."""
    label = PROVIDERS[row["provider"]].label
    if not row["seconds"]:
        return f"{label:<34}{row['note']}"
    norm = "" if row["norm_ratio"] is None else f"{row['norm_ratio']:.2f}"
    memory = " " * 19
    if row["peak_mib"] is not None:
        memory = f"{row['peak_mib']:>10.0f}{row['memory_times']:>9.2f}"
    return (
        f"{label:<34}{row['dims'] or '':>9}{row['samples_per_second']:>11.2f}"
        f"{row['batch'] / row['samples_per_second']:>9.3f}{row['times']:>9.2f}"
        f"{memory}{norm:>13}  {row['note']}"
    ).rstrip()


def targets(rows: Sequence[Row]) -> list[Target]:
    """What is asked of the rows of one workload and K."""
    found = {row["provider"]: row for row in rows if row["seconds"]}
    where = f"{rows[0]['workload']}, K = {rows[0]['proj_dim']}"
    made: list[Target] = []
    for name, most, how in TIMES:
        figure = found[name]["times"] if name in found else None
        made.append(Target(f"{where}: {name}, times plain", figure, most, False, note=how))
    for name in dict.fromkeys(name for name, _, _ in TIMES):
        figure = found[name]["memory_times"] if name in found else None
        made.append(Target(f"{where}: {name}, memory times plain", figure, MEMORY, False))
    for name, row in found.items():
        ours = found.get(PROVIDERS[name].against)
        if ours is not None:
            figure = ours["samples_per_second"] / row["samples_per_second"]
            what = f"{where}: {ours['provider']}, speed times {name}"
            made.append(Target(what, figure, 1.0, at_least=True))
    for target in made:  # of tiny models the calls are most of the time
        target.judged = not rows[0]["quick"]
    return made


def wrong(rows: Sequence[Row]) -> Iterator[str]:
    """Rows whose features can't be right."""
    for row in rows:
        ratio = row.get("norm_ratio")
        if ratio is not None and not abs(ratio - 1) < OFF:
            yield (
                f"WRONG {row['workload']}, {row['provider']}, K = {row['proj_dim']}: |phi|²/|g|² "
                f"is {ratio:.3g}, expected 1"
            )
