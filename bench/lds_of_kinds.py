"""LDS of TRAKer's default scores with each kind of matrix, on the same checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import lds as bench_lds
from bench import problems
from bench.distortion import Kind, kinds_of
from fastproj import TRAKer
from fastproj.trak.evaluation.metrics import lds

BASE = "rademacher"
RESAMPLES = 2000


def scored(
    problem: problems.Problem,
    dims: Sequence[int],
    seeds: Sequence[int],
    checkpoints: int,
    subsets: int,
    cache: Path,
    known: Collection[tuple[int, int, str]] = (),
) -> Iterator[dict[str, Any]]:
    """A row for each K, kind and seed of the matrix: the LDS, its interval, and each target's.

    known : (K, seed, name of the kind) of rows that aren't wanted.
    """
    masks, runs = problems.ground_truth(problem, subsets, 1, cache)
    kept = bench_lds.kept_checkpoints(problem, checkpoints, cache)
    truth = masks.numpy(), runs.mean(0).numpy()
    parameters = sum(p.numel() for p in kept[0].values())
    for k in dims:
        for seed in seeds:
            for kind in kinds_of(k):
                if (k, seed, kind.name) in known:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    _, scores = bench_lds.attribute(
                        TRAKer, problem, kept, k, folder, **options_of(kind, seed)
                    )
                found = lds(scores, *truth)
                row = {"problem": problem.name, "n": problem.n, "parameters": parameters}
                row |= {"k": k, "seed": seed, "kind": kind.name, "block": kind.block}
                row |= bench_lds.as_dict(found)
                yield {**row, "per_target": [round(float(r), 5) for r in found.per_target]}


def options_of(kind: Kind, seed: int) -> dict[str, Any]:
    """What TRAKer takes."""
    return {"kind": kind.kind, "block": kind.block or None, "projector_seed": seed}


def against_dense(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each problem, K and kind: the mean LDS, and its difference to dense Rademacher.

    The interval of the difference is a 95 % bootstrap over targets of the mean over seeds: pairs,
    so that what all kinds have in common drops out. ``spread`` is the standard deviation of the LDS
    between seeds, of one seed none.
    """
    table: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        table.setdefault((row["problem"], row["k"], row["kind"]), []).append(row)
    found = []
    for (problem, k, kind), runs in table.items():
        base = table.get((problem, k, BASE))
        if base is None:
            continue
        mine, dense = by_target(runs), by_target(base)
        apart = mine - dense
        low, high = interval(apart)
        means = [run["mean"] for run in runs]
        found.append(
            {
                "problem": problem,
                "k": k,
                "kind": kind,
                "lds": float(np.mean(means)),
                "low": float(np.mean([run["low"] for run in runs])),
                "high": float(np.mean([run["high"] for run in runs])),
                "spread": float(np.std(means, ddof=1)) if len(means) > 1 else None,
                "difference": float(np.nanmean(apart)),
                "difference_low": low,
                "difference_high": high,
                "seeds": len(runs),
            }
        )
    return found


def by_target(runs: Sequence[dict[str, Any]]) -> npt.NDArray[np.float64]:
    """The mean over runs of each target's correlation, [m]."""
    return np.mean([run["per_target"] for run in runs], axis=0)


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    values = values[np.isfinite(values)]
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each problem, K and kind."""
    lines = [
        "\nLDS of TRAKer's defaults          k  kind          LDS (95% CI)               seeds' std"
        "   against rademacher (95% CI)"
    ]
    for row in rows:
        spread = "-" if row["spread"] is None else f"{row['spread']:.4f}"
        lines.append(
            f"{row['problem']:<28}{row['k']:>7}  {row['kind']:<14}{row['lds']:.3f} "
            f"({row['low']:.3f} .. {row['high']:.3f}) {spread:>14}   {row['difference']:+.4f} "
            f"({row['difference_low']:+.4f} .. {row['difference_high']:+.4f})"
        )
    return "\n".join(lines)
