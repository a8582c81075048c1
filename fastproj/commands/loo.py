"""``fastproj loo``: leave-one-out correlation, from retraining without one sample at a time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.commands import evaluation
from fastproj.commands.arguments import add_option, command_parser
from fastproj.commands.running import DONE, FAILED, Outcome
from fastproj.trak.evaluation.correlation import METHODS
from fastproj.trak.evaluation.metrics import loo_correlation
from fastproj.trak.evaluation.retrain import all_but, train_subsets
from fastproj.trak.store.scores import TopScores, load_scores


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj loo``."""
    parser = command_parser(
        "loo",
        "Leave-one-out correlation. The command trains without one sample at a time, for some "
        "random samples, and correlates the change of the outputs with the scores. A seed changes "
        "outputs more than one sample does, so use several --repeats. A stopped command resumes "
        "as `fastproj lds` does.",
        """
        fastproj loo recipe.py --scores trak_results/scores/held_out.mmap --samples 50
        fastproj loo recipe.py --scores a.npy b.npy --repeats 10 --jobs 4   # compare two
        """,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=evaluation.RECIPE_HELP)
    evaluation.add_scores(parser, nargs="+", required=True)
    add_option(parser, "--samples", 50, "L", "samples that are left out")
    add_option(parser, "--repeats", 5, "N", "models trained without each")
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default="spearman",
        help="which correlation (default: spearman)",
    )
    evaluation.add_training(parser, "fastproj-loo")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj loo``; returns the exit status."""
    return evaluation.guarded("loo", build_parser().parse_args(argv), run)


def run(options: argparse.Namespace) -> Outcome:
    """Train without some samples, and print the correlation for each score file."""
    scores: dict[Path, Any] = {path: load_scores(path) for path in options.scores}
    n = evaluation.agreed("training samples", {str(path): a.shape[0] for path, a in scores.items()})
    m = evaluation.agreed("targets", {str(path): a.shape[1] for path, a in scores.items()})
    if not 3 <= options.samples <= n:
        raise ValueError(f"--samples: received {options.samples}; expected 3 to n = {n}")
    for path, array in scores.items():
        if isinstance(array, TopScores):
            raise ValueError(
                f"{path} holds the extremes of each target only; expected all scores: "
                "finalize_scores without top_k writes them"
            )
    evaluation.check_before_training(scores)
    removed = np.random.default_rng(options.seed).permutation(n)[: options.samples]
    truth = train_subsets(
        options.recipe,
        all_but(n, list(removed)),
        options.out,
        repeats=options.repeats,
        names=[f"without sample {i}" for i in removed],
        n_targets=m,
        **evaluation.training(options),
    )
    n_runs, n_removed, n_targets = truth.outputs.shape
    more = evaluation.others_of(truth, options.out)
    print(f"left out: {n_removed} samples, {n_runs} models each, {n_targets} targets{more}")
    results, good = [], True
    for path, array in scores.items():
        result = loo_correlation(
            array, removed, truth.mean, method=options.method, **evaluation.interval(options)
        )
        good &= evaluation.print_correlation("loo", result, path, truth.mean)
        results.append({"scores": str(path), **asdict(result)})
    facts = {"recipe": options.recipe, "removed": removed.tolist(), "n_runs": options.repeats}
    content = {**facts, "results": results}
    evaluation.write_results(content, options.out)
    return DONE if good else FAILED, content
