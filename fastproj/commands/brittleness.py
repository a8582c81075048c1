"""``fastproj brittleness``: predictions that flip without the samples that help them most."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from fastproj.commands import evaluation
from fastproj.commands.arguments import add_option, command_parser
from fastproj.commands.running import DONE, Outcome
from fastproj.trak.evaluation.metrics import brittleness, most_helpful
from fastproj.trak.evaluation.retrain import all_but, train_subsets
from fastproj.trak.store.scores import load_scores


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj brittleness``."""
    parser = command_parser(
        "brittleness",
        "How many predictions flip when the training samples that help each of them most are left "
        "out. Outputs must be margins: positive where the model is right. The command trains "
        "(targets x sizes + 1) x repeats models. A stopped command resumes as `fastproj lds` does.",
        """
        fastproj brittleness recipe.py --scores trak_results/scores/held_out.mmap
        fastproj brittleness recipe.py --scores a.npy --targets 0 7 --remove 10 100 --jobs 2
        """,
    )
    parser.add_argument("recipe", metavar="RECIPE", help=evaluation.RECIPE_HELP)
    evaluation.add_scores(parser, nargs=None, required=True)
    parser.add_argument(
        "--targets", type=int, nargs="+", metavar="T", help="which targets (default: the first 10)"
    )
    add_option(
        parser, "--remove", [10, 20, 50, 100], "K", "numbers of samples to leave out", nargs="+"
    )
    add_option(parser, "--repeats", 3, "N", "models trained without each")
    evaluation.add_training(parser, "fastproj-brittleness")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj brittleness``; returns the exit status."""
    return evaluation.guarded("brittleness", build_parser().parse_args(argv), run)


def run(options: argparse.Namespace) -> Outcome:
    """Train without what helps each target most, and print the share of flips."""
    scores = load_scores(options.scores)
    n, m = scores.shape
    targets = options.targets or list(range(min(10, m)))
    sizes = sorted(set(options.remove))
    if sizes[0] < 1 or sizes[-1] >= n:
        raise ValueError(f"--remove: received {options.remove}; expected 1 to n - 1 = {n - 1}")
    helpful = most_helpful(scores, sizes[-1], targets)  # [T, K max]
    without = [(t, k) for t in range(len(targets)) for k in sizes]
    removed = [np.empty(0, np.int64), *(helpful[t, :k] for t, k in without)]
    truth = train_subsets(
        options.recipe,
        all_but(n, removed),
        options.out,
        repeats=options.repeats,
        names=["all samples", *(f"target {targets[t]} without {k}" for t, k in without)],
        n_targets=m,
        **evaluation.training(options),
    )
    outputs = np.empty((options.repeats, len(sizes), len(targets)))
    for row, (t, k) in enumerate(without, start=1):
        outputs[:, sizes.index(k), t] = truth.outputs[:, row, targets[t]]
    base = truth.outputs[:, 0, targets]  # [runs, T]
    result = brittleness(outputs, base, sizes, confidence=options.confidence)
    print(result)
    if not np.ptp(truth.outputs[..., targets], axis=1).any():
        print(
            "fastproj brittleness: all models have the same outputs, whatever was left out; does "
            "train use its indices, and outputs its model?",
            file=sys.stderr,
        )
    facts = {"recipe": options.recipe, "scores": str(options.scores), "targets": targets}
    content = {**facts, "n_runs": options.repeats, "result": asdict(result)}
    evaluation.write_results(content, options.out)
    return DONE, content
