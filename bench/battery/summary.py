"""The tables of bench.lds, and what they come to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Cell = tuple[str, int, int]  # problem, k, checkpoints

BELOW_BEST = 0.02  # what the default may lose against the best lambda
EQUAL = 1e-3  # LDS are compared in their third digit
HEADER = (
    f"{'problem':<16}{'k':>6}{'M':>3} {'scores':<15}{'LDS (95% interval)':<24}{'at':<8}"
    f"{'likelihood':>11}{'AUC':>7}{'MRR':>7}{'R@10':>7}"
)


def table(rows: Sequence[Row], problem: str | None = None) -> str:
    """The rows of a problem, or all, as lines."""
    return "\n".join([HEADER, *(line(row) for row in rows if problem in (None, row["problem"]))])


def line(row: Row) -> str:
    """A row of the table."""
    score = "not finite"
    if "output" in row:
        low, high = row["output_interval"]
        score = f"{row['output']:.3f} ({low:.3f} to {high:.3f})"
    at = f"{row['output_at']:g}" if "output_at" in row else ""
    others = [
        f"{row[name]:.3f}" if name in row else "" for name in ("likelihood", "auc", "mrr", "recall")
    ]
    return (
        f"{row['problem']:<16}{row['k'] or '':>6}{row['checkpoints']:>3} {row['provider']:<15}"
        f"{score:<24}{at:<8}{others[0]:>11}{others[1]:>7}{others[2]:>7}{others[3]:>7}"
    ).rstrip()


def verdict(rows: Sequence[Row]) -> str:
    """What the table comes to, for the problems to choose by and for the held-out ones."""
    parts: list[str] = []
    for title, held_out in (("problems to choose by", False), ("held-out problems", True)):
        some = [row for row in rows if row["held_out"] == held_out]
        parts += [f"\n{title}", *comparisons(some)] if some else []
    return "\n".join(parts)


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """The default, and TRAK's rule, against each of the others."""
    for one in ("default", "trak_rule"):
        for other in dict.fromkeys(row["provider"] for row in rows):
            found = differences(rows, one, other)
            if other == one or not found:
                continue
            values = np.array(list(found.values()))
            worst = min(found, key=lambda cell: found[cell])
            text = (
                f"{one} - {other}: mean {values.mean():+.3f}, at or above in "
                f"{np.mean(values > -EQUAL / 2):.0%} of {len(values)} cells, worst "
                f"{values.min():+.3f} ({worst[0]}, k = {worst[1]}, {worst[2]} checkpoints)"
            )
            language = {row["problem"] for row in rows if row["language"]}
            spoken = [value for cell, value in found.items() if cell[0] in language]
            yield text + (f", mean on language models {np.mean(spoken):+.3f}" if spoken else "")


def differences(rows: Sequence[Row], one: str, other: str) -> dict[Cell, float]:
    """LDS of ``one`` less that of ``other`` in each cell; one without k is in the cells of all."""
    known = {(*cell(row), row["provider"]): row["output"] for row in rows if "output" in row}
    found = {}
    for row in rows:
        if row["provider"] == one and "output" in row:
            name, k, count = cell(row)
            against = known.get((name, k, count, other), known.get((name, 0, count, other)))
            if against is not None:
                found[cell(row)] = row["output"] - against
    return found


def missed(rows: Sequence[Row]) -> list[str]:
    """The cells in which the default is too far below the best lambda."""
    return [
        f"{name}, k = {k}, {count} checkpoints: the default is {-value:.3f} below the best lambda"
        for (name, k, count), value in differences(rows, "default", "trak_sweep").items()
        if value < -BELOW_BEST
    ]


def cell(row: Row) -> Cell:
    """Where a row belongs."""
    return row["problem"], row["k"], row["checkpoints"]
