"""LDS of TRAKer's default scores with each kind of matrix, on the same checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.battery import training
from bench.battery.problem import Problem
from bench.battery.providers import traker
from bench.battery.providers.job import Job
from bench.distortion import kinds_of
from fastproj.trak.evaluation.metrics import lds

BASE = "rademacher"


def scored(
    problem: Problem,
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
    truth = training.ground_truth(problem, subsets, cache, retrainings=1)
    kept = training.checkpoints(problem, checkpoints, cache)
    parameters = sum(p.numel() for p in kept[0].values())
    for k in dims:
        for seed in seeds:
            for kind in kinds_of(k):
                if (k, seed, kind.name) in known:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    job = Job(problem, kept, [checkpoints], k, kind.kind, folder)
                    options = {"block": kind.block or None, "projector_seed": seed}
                    scores = traker.run(job, options).finalize_scores("targets")
                    found = lds(scores, truth.masks.numpy(), truth.output.mean(0).numpy())
                row = {"problem": problem.name, "n": problem.n, "parameters": parameters}
                row |= {"k": k, "seed": seed, "kind": kind.name, "block": kind.block}
                row |= {"mean": found.mean, "low": found.low, "high": found.high}
                yield {**row, "per_target": [round(float(r), 5) for r in found.per_target]}


def against_dense(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each problem, K and kind: the mean LDS, and its difference to dense Rademacher.

    The 95 % interval of the difference adds two variances: that of its mean over targets, paired,
    so that what all kinds have in common drops out; and that of the matrices, pooled over the kinds
    of a problem and K. With one seed the second is not known, and the interval is too narrow.
    ``spread`` is the standard deviation of a kind's LDS between seeds. Rows of the problem "mean"
    average the differences over the problems.
    """
    table: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        table.setdefault((row["problem"], row["k"], row["kind"]), []).append(row)
    found: list[dict[str, Any]] = []
    for (problem, k, kind), runs in table.items():
        base = table.get((problem, k, BASE))
        if base is None:
            continue
        alike = [found for (p, other, _), found in table.items() if (p, other) == (problem, k)]
        apart = by_target(runs) - by_target(base)
        apart = apart[np.isfinite(apart)]
        of_targets = apart.var(ddof=1) / len(apart)
        of_matrices = pooled_variance(alike) * (1 / len(runs) + 1 / len(base))
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
                "seeds": len(runs),
                **difference(apart.mean(), of_targets + (kind != BASE) * of_matrices),
            }
        )
    return found + averages(found)


def averages(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the problem "mean": for each K and kind, over all problems that have that K."""
    places = list(dict.fromkeys((row["k"], row["kind"]) for row in rows))
    count = len({row["problem"] for row in rows})
    found = []
    for k, kind in places if count > 1 else ():
        alike = [row for row in rows if (row["k"], row["kind"]) == (k, kind)]
        variance = sum(row["difference_variance"] for row in alike) / len(alike) ** 2
        row = {"problem": "mean", "k": k, "kind": kind, "spread": None}
        row |= {name: float(np.mean([r[name] for r in alike])) for name in ("lds", "low", "high")}
        row["seeds"] = min(r["seeds"] for r in alike)
        row |= difference(float(np.mean([r["difference"] for r in alike])), variance)
        found.append(row)
    return found


def difference(mean: float, variance: float) -> dict[str, float]:
    """A difference with its 95 % interval."""
    reach = 1.96 * float(variance) ** 0.5
    return {
        "difference": float(mean),
        "difference_low": float(mean) - reach,
        "difference_high": float(mean) + reach,
        "difference_variance": float(variance),
    }


def pooled_variance(groups: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Variance of the LDS between seeds within a kind; 0 where all kinds have one seed."""
    means = [[run["mean"] for run in runs] for runs in groups]
    squares = sum(float(np.square(np.array(m) - np.mean(m)).sum()) for m in means)
    return squares / max(1, sum(len(m) - 1 for m in means))


def by_target(runs: Sequence[dict[str, Any]]) -> npt.NDArray[np.float64]:
    """The mean over runs of each target's correlation, [m]."""
    return np.asarray(np.mean([run["per_target"] for run in runs], axis=0))


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
