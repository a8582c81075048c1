"""``fastproj lds``: the linear datamodeling score, from retraining on random subsets."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastproj.commands import evaluation
from fastproj.commands.arguments import command_parser, positive
from fastproj.commands.running import DONE, FAILED, Outcome
from fastproj.trak.evaluation.metrics import lds, noise_ceiling
from fastproj.trak.evaluation.retrain import GroundTruth, random_subsets, train_subsets
from fastproj.trak.files import StoreError
from fastproj.trak.store.scores import load_scores


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj lds``."""
    parser = command_parser(
        "lds",
        "The linear datamodeling score: how well scores predict the outputs of models that are "
        "trained on random subsets. The command trains these models and keeps each as soon as it "
        "is finished. Run it again to go on where it was stopped. More --subsets or --repeats add "
        "to what is there.",
        """
        fastproj lds recipe.py --scores trak_results/scores/held_out.mmap --jobs 2 --out truth
        fastproj lds --ground-truth truth --scores other.npy      # trains nothing again
        fastproj lds recipe.py --train-set-size 1000 --out truth  # train now, score later

        recipe.py says how to train:
            def train(indices, seed): ...   # int64 [s] -> a model
            def outputs(model): ...         # -> [m], the output of each target
        """,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=evaluation.RECIPE_HELP)
    evaluation.add_scores(parser, nargs="+", required=False)
    parser.add_argument(
        "--ground-truth",
        type=Path,
        metavar="DIR|NPZ",
        help="instead of RECIPE: a finished --out, or a .npz file with masks [S, n] and outputs "
        "[S, m] or [runs, S, m]",
    )
    parser.add_argument(
        "--train-set-size",
        type=positive,
        metavar="N",
        help="of the recipe; needed where no --scores are given",
    )
    parser.add_argument(
        "--subsets",
        type=int,
        metavar="S",
        help="random subsets to train on (default: 100). Fewer than --out or --ground-truth holds: "
        "the first S of them",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        metavar="F",
        help="of the training set in each subset (default: 0.5)",
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="models trained on each subset (default: 1)"
    )
    evaluation.add_training(parser, "fastproj-lds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj lds``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if (options.recipe is None) == (options.ground_truth is None):
        parser.error("expected either RECIPE or --ground-truth")
    if options.ground_truth is not None and not options.scores:
        parser.error("--ground-truth needs --scores")
    if not options.scores and options.train_set_size is None:
        parser.error("expected --scores, or --train-set-size to only train")
    if options.ground_truth is not None and options.fraction is not None:
        parser.error("--fraction goes with RECIPE: a ground truth has its subsets")
    return evaluation.guarded("lds", options, run)


def run(options: argparse.Namespace) -> Outcome:
    """Train or read the ground truth, and print the LDS of each score file."""
    scores = {path: load_scores(path) for path in options.scores or []}
    sizes = {str(path): array.shape[0] for path, array in scores.items()}
    if options.train_set_size is not None:
        sizes["--train-set-size"] = options.train_set_size
    n = evaluation.agreed("training samples", sizes)
    m = evaluation.agreed("targets", {str(path): a.shape[1] for path, a in scores.items()}, None)
    made: dict[str, Any]
    if options.ground_truth is not None:
        whole, made = GroundTruth.load(options.ground_truth), {"path": str(options.ground_truth)}
        truth = whole.first(options.subsets, options.repeats)
        there = whole.outputs.shape
        less = truth.outputs.shape != there
        more = f"; the first of {there[1]} subsets, {there[0]} models each" if less else ""
    else:
        count = 100 if options.subsets is None else options.subsets
        fraction = 0.5 if options.fraction is None else options.fraction
        if scores and count < 3:
            raise ValueError(f"--subsets: received {count}; expected at least 3")
        evaluation.check_before_training(scores)
        truth = train_subsets(
            options.recipe,
            random_subsets(n, count, fraction, options.seed),
            options.out,
            repeats=1 if options.repeats is None else options.repeats,
            identity={"fraction": fraction},
            n_targets=m,
            allow_failures=True,
            **evaluation.training(options),
        )
        keep(truth, options.out / "ground-truth.npz")
        more = evaluation.others_of(truth, options.out)
        made = {"path": str(options.out), "recipe": options.recipe, "fraction": fraction}
    n_runs, n_subsets, n_targets = truth.outputs.shape
    print(f"ground truth: {n_subsets} subsets, {n_runs} models each, {n_targets} targets{more}")
    for name, why in truth.failed.items():
        print(f"fastproj lds: {name} failed and is left out: {why}", file=sys.stderr)
    results, good = [], True
    for path, array in scores.items():
        result = lds(array, truth.masks, truth.mean, **evaluation.interval(options))
        good &= evaluation.print_correlation("lds", result, path, truth.mean)
        results.append({"scores": str(path), **asdict(result)})
    ceiling = noise_ceiling(truth.outputs) if n_runs > 1 and n_subsets >= 3 else None
    if ceiling is not None and math.isfinite(ceiling):
        print(f"the randomness of training leaves at most about {ceiling:.2f} to predict")
    content = {
        "ground_truth": made,
        "n_runs": n_runs,
        "n_subsets": n_subsets,
        "n_targets": n_targets,
        "noise_ceiling": ceiling,
        "failed": truth.failed,
        "results": results,
    }
    if options.ground_truth is None:
        evaluation.write_results(content, options.out)
    return DONE if good and not truth.failed else FAILED, content


def keep(truth: GroundTruth, path: Path) -> None:
    """Write a ground truth, unless the file has it and more."""
    try:
        there = GroundTruth.load(path) if path.exists() else None
    except (StoreError, ValueError, TypeError):
        there = None
    if there is None or not there.holds(truth):
        truth.save(path)
    elif there.outputs.shape != truth.outputs.shape:
        n_runs, n_subsets, _ = there.outputs.shape
        print(f"{path} is left as it is, with {n_subsets} subsets, {n_runs} models each")
