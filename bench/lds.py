"""How well scores predict retraining: TRAKer and others on the problems of bench.battery.

    python -m bench.lds                      all problems, k = 512, 2048, 8192, 1 and 5 checkpoints
    python -m bench.lds --only digits        one of them
    python -m bench.lds --held-out           those that no rule was chosen by
    python -m bench.lds --quick              tiny sizes: half a minute
    python -m bench.lds --beside FILE        rows that FILE has, and that are not measured, are kept

For each problem it trains models on random halves of the data (the truth), and a few on everything
(the checkpoints), and keeps both in --cache. A cell is a problem, a k and a number of checkpoints.
It has the mean over groups of so many: each of the five by itself, or all five. In each, scores of

    default       fastproj.TRAKer as it comes
    trak_rule     TRAKer with TRAK's features and the lambda that it chooses for them
    trak_sweep    TRAK's formula, (Phi^T Phi + lambda I)^-1, at the best lambda in hindsight
    trak          trak.TRAKer 0.3.2 as it comes, and trak_own_sweep, its best in hindsight
    ekfac         kronfluence's EK-FAC without projection, and ekfac_sweep, its best damping
    cosine        cosines of gradients, not projected
    bm25          words in common, for texts

are held against the outputs of the retrained models (LDS, arXiv 2303.14186, with a bootstrap
interval), against their log-likelihoods where that is another order, against which labels are wrong
(area under the ROC curve of the samples' scores on themselves) and against which sentences state
the fact that a target asks for (mean reciprocal rank, recall at 10). What is not installed, or
can't take a problem, is left out.

The command fails where the default is more than 0.02 below the best lambda.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.battery import PROBLEMS, summary, training
from bench.battery.problem import Problem
from bench.battery.providers import PROVIDERS
from bench.battery.providers.job import Found, Job, Unsupported
from bench.record import commit, end_with, write_result
from fastproj.commands.arguments import positive
from fastproj.trak.evaluation.metrics import lds, mislabel_auc, noise_ceiling

DIMS = (512, 2048, 8192)
CHECKPOINTS = (1, 5)
QUICK = ("digits_wrong20", "docstring_words")

COMMIT = commit()  # as the modules were read

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where the default misses what is asked of it."""
    options = parse(argv)
    rows: list[Row] = [
        row for path in options.beside for row in json.loads(path.read_text())["rows"]
    ]
    for problem in chosen(options):
        rows = merged(rows, measure(problem, options))
        print(summary.table(rows, problem.name), flush=True)
        if not options.no_write:  # after each problem: a run that is stopped leaves what it has
            write(rows, options)
    print(f"\n{summary.verdict(rows)}")
    missed = summary.missed(rows)
    for line in missed:
        print(f"MISSED {line}")
    return 1 if missed else 0


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, in the order of PROBLEMS; new ones in place of old ones."""
    found = {(*summary.cell(row), row["provider"]): row for row in (*old, *new)}
    order = {name: place for place, name in enumerate(PROBLEMS)}
    return sorted(found.values(), key=lambda row: order[row["problem"]])


def write(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write the result files, in place of those of the problems before."""
    kept = ("dims", "checkpoints", "subsets", "retrainings", "kind", "providers")
    settings = {name: getattr(options, name) for name in kept}
    text = f"{summary.table(rows)}\n{summary.verdict(rows)}"
    name = "lds-quick" if options.quick else "lds"
    print(write_result(name, {"settings": settings, "rows": rows}, text))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with their defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two problems, tiny sizes")
    parser.add_argument(
        "--only", nargs="+", choices=list(PROBLEMS), metavar="NAME", help="problems"
    )
    parser.add_argument("--held-out", action="store_true", help="held-out problems only")
    parser.add_argument("--dims", type=positive, nargs="+", metavar="K", help="512 2048 8192")
    parser.add_argument("--checkpoints", type=positive, nargs="+", metavar="M", help="1 5")
    parser.add_argument("--subsets", type=positive, metavar="S", help="random halves; 200")
    parser.add_argument(
        "--retrainings", type=positive, metavar="R", help="of each half; what the problem says"
    )
    parser.add_argument("--kind", choices=["rademacher", "sjlt"], default="rademacher")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="FILE", help="results to go on from"
    )
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument(
        "--cache",
        type=Path,
        default=training.default_cache(),
        metavar="DIR",
        help="trained models; $FASTPROJ_BENCH_CACHE, or %(default)s",
    )
    options = parser.parse_args(argv)
    options.dims = options.dims or ([64, 512] if options.quick else list(DIMS))
    options.checkpoints = options.checkpoints or ([1, 2] if options.quick else list(CHECKPOINTS))
    options.subsets = options.subsets or (20 if options.quick else 200)
    return options


def chosen(options: argparse.Namespace) -> Iterable[Problem]:
    """The problems to measure on."""
    for name in options.only or (QUICK if options.quick else PROBLEMS):
        sizes = {"n": 300, "targets": 20} if options.quick else {}
        problem = PROBLEMS[name](**sizes)
        if options.quick:
            problem = problem.with_training(epochs=max(2, problem.training.epochs // 4))
        if problem.held_out or not options.held_out:
            yield problem


def measure(problem: Problem, options: argparse.Namespace) -> list[Row]:
    """The rows of a problem: one for each provider, k and number of checkpoints."""
    models = training.checkpoints(problem, max(options.checkpoints), options.cache)
    truth = training.ground_truth(
        problem, options.subsets, options.cache, retrainings=options.retrainings
    )
    ceiling = noise_ceiling(truth.output.numpy()) if len(truth.output) > 1 else None
    rows: list[Row] = []
    jobs = [
        (name, k)
        for name in options.providers
        for k in (options.dims if PROVIDERS[name][1] else [0])
    ]
    for name, k in tqdm(jobs, desc=problem.name, unit="job", leave=False, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(problem, models, sorted(options.checkpoints), k, options.kind, folder)
            started = time.process_time()
            try:
                found = list(PROVIDERS[name][0](job))
            except Unsupported as reason:
                tqdm.write(f"{problem.name}: {reason}", file=sys.stderr)
                continue
            seconds = time.process_time() - started
        for key in dict.fromkeys((one.provider, one.checkpoints) for one in found):
            same = [one for one in found if (one.provider, one.checkpoints) == key]
            rows.append(
                {
                    "problem": problem.name,
                    "held_out": problem.held_out,
                    "language": problem.language,
                    "n": problem.n,
                    "parameters": sum(p.numel() for p in models[0].values()),
                    "ceiling": ceiling,
                    "provider": key[0],
                    "k": k,
                    "checkpoints": key[1],
                    "cpu_seconds": round(seconds, 1),
                    "kind": options.kind,
                    "commit": COMMIT,
                    **judged(same, problem, truth),
                }
            )
    return rows


def judged(found: Sequence[Found], problem: Problem, truth: training.Truth) -> Row:
    """What a provider reaches in the mean over groups of checkpoints: of a sweep the best setting
    in hindsight, one for all groups, in each measure by itself.
    """
    settings = list(dict.fromkeys(one.setting for one in found))
    groups = [[one for one in found if one.setting == setting] for setting in settings]
    values = [mean_of([measures(one, problem, truth) for one in group]) for group in groups]
    row: Row = {"groups": len(groups[0])}
    for name in dict.fromkeys(name for value in values for name in value):
        known = [(value[name], place) for place, value in enumerate(values) if name in value]
        best, place = max(known)
        row[name] = best
        if name in ("output", "likelihood"):
            ends = [interval(one, name, truth) for one in groups[place]]
            row[f"{name}_interval"] = tuple(map(float, np.mean(ends, 0)))
        if settings[place] is not None:
            row[f"{name}_at"] = settings[place]
    if len(settings) > 1:
        row["sweep"] = [
            {"at": setting, **value} for setting, value in zip(settings, values, strict=True)
        ]
    if found[0].details:
        row["details"] = [one.details for one in found]
    return row


def mean_of(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means of what all of these measure."""
    names = [name for name in values[0] if all(name in value for value in values)]
    return {name: float(np.mean([value[name] for value in values])) for name in names}


def measures(found: Found, problem: Problem, truth: training.Truth) -> dict[str, float]:
    """All that is measured of some scores; nothing of scores that are not finite."""
    if not np.isfinite(found.scores).all():
        return {}
    masks, question = truth.masks.numpy(), problem.question
    value = {"output": lds(found.scores, masks, truth.output.mean(0).numpy(), n_boot=1).mean}
    if question.likelihood_differs:
        against = truth.likelihood.mean(0).numpy()
        value["likelihood"] = lds(found.scores, masks, against, n_boot=1).mean
    if problem.wrong is not None and found.own is not None:
        value["auc"] = mislabel_auc(found.own, problem.wrong.numpy(), n_boot=1).mean
    if problem.facts is not None:
        value["mrr"], value["recall"] = retrieval(found.scores, problem.facts.numpy())
    return {name: number for name, number in value.items() if math.isfinite(number)}


def interval(found: Found, name: str, truth: training.Truth) -> tuple[float, float]:
    """The 95 % bootstrap interval of an LDS."""
    result = lds(found.scores, truth.masks.numpy(), getattr(truth, name).mean(0).numpy())
    return result.low, result.high


def retrieval(scores: Any, facts: Any, depth: int = 10) -> tuple[float, float]:
    """(mean reciprocal rank, recall at ``depth``) of the samples that state a target's fact.

    Over the targets that ask for one; a sample ranks behind all others with its score.
    """
    asked = facts.any(0)
    scores, facts = scores[:, asked], facts[:, asked]
    # How many samples score at least as much, the sample itself included: [n, T].
    order = np.sort(scores, axis=0)
    ranks = np.stack(
        [len(scores) - np.searchsorted(order[:, t], scores[:, t]) for t in range(scores.shape[1])],
        axis=1,
    )
    first = np.where(facts, ranks, len(scores) + 1).min(0)
    within = (facts & (ranks <= depth)).sum(0) / np.minimum(facts.sum(0), depth)
    return float((1 / first).mean()), float(within.mean())


if __name__ == "__main__":
    end_with(main)
