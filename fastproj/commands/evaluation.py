"""What the commands that compare scores with retraining share: options, messages, results."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastproj
from fastproj.commands.arguments import add_json, add_option
from fastproj.commands.running import Outcome, execute, plain
from fastproj.trak.evaluation.metrics import LDS, LOO, check_sampling, row_blocks
from fastproj.trak.evaluation.retrain import GroundTruth, TrainingError
from fastproj.trak.evaluation.workers import WorkerError
from fastproj.trak.files import StoreError, write_atomic
from fastproj.trak.store.scores import TopScores

RECIPE_HELP = (
    "how to train: a Python file, or a module's name, with train(indices, seed) -> model and "
    "outputs(model) -> [m]; FILE.py:NAME and MODULE:NAME name something inside"
)


def add_scores(parser: argparse.ArgumentParser, nargs: str | None, required: bool) -> None:
    """The option --scores."""
    parser.add_argument(
        "--scores",
        type=Path,
        nargs=nargs,
        required=required,
        metavar="FILE",
        help="scores/<exp_name>.mmap or .top.safetensors of a TRAKer, or any .npy file, [n, m]",
    )


def add_training(parser: argparse.ArgumentParser, out: str) -> None:
    """What ``train_subsets`` and the intervals take."""
    add_option(parser, "--out", Path(out), "DIR", "where to keep trained models and numbers", Path)
    add_option(parser, "--jobs", 1, "N", "models trained at once, each in a process")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="torch threads of each of them (default: the cores, shared out)",
    )
    add_option(parser, "--seed", 0, "N", "of everything random")
    parser.add_argument(
        "--depends",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other files that results depend on: --out is refused when one has changed",
    )
    add_interval(parser)


def add_interval(parser: argparse.ArgumentParser) -> None:
    """What the intervals are made with, and how the numbers are printed."""
    add_option(parser, "--confidence", 0.95, "C", "of the intervals", float)
    add_option(parser, "--n-boot", 500, "N", "resamples that the intervals come from")
    add_json(parser)


def check_before_training(scores: Mapping[Path, Any]) -> None:
    """Raise ValueError for scores that are not finite, before hours of training."""
    for path, array in scores.items():
        for _ in () if isinstance(array, TopScores) else row_blocks(str(path), array):
            pass


def others_of(truth: GroundTruth, folder: Path) -> str:
    """A message about the models in a directory that a result doesn't use."""
    if not truth.unused:
        return ""
    return f"; {truth.unused} more models in {folder} are kept and not used"


def print_correlation(
    command: str, result: LDS | LOO, path: Path, outputs: npt.NDArray[np.float64]
) -> bool:
    """Print a mean correlation and the targets [m] without one. Return whether it is a number."""
    print(f"{result}  {path}")
    silent = np.isnan(result.per_target)
    if not silent.any():
        return True
    same = np.ptp(outputs, axis=0) == 0  # of [S, m]
    reasons = []
    if (silent & same).any():
        reasons.append(
            f"{int((silent & same).sum())} have the same output in all of the {len(outputs)} "
            "models that were trained (does train use its indices and its seed, and outputs its "
            "model?)"
        )
    if (silent & ~same).any():
        reasons.append(
            f"the scores of {int((silent & ~same).sum())} predict the same for all of them (are "
            "the scores all equal, or 0?)"
        )
    number = not math.isnan(result.mean)
    print(
        f"fastproj {command}: {path}: {int(silent.sum())} of {len(silent)} targets have no "
        f"correlation and are left out: {'; '.join(reasons)}"
        + ("" if number else ". Expected outputs and scores that differ for at least one target"),
        file=sys.stderr,
    )
    return number


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of ``train_subsets``."""
    names = ("jobs", "threads", "seed", "depends")
    return {name: getattr(options, name) for name in names}


def interval(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the metrics."""
    return {"confidence": options.confidence, "n_boot": options.n_boot, "seed": options.seed}


def guarded(
    command: str, options: argparse.Namespace, run: Callable[[argparse.Namespace], Outcome]
) -> int:
    """Run a command. An error that its user can mend becomes a message."""

    def checked(options: argparse.Namespace) -> Outcome:
        check_sampling(command, options.confidence, options.n_boot, options.seed)
        return run(options)

    kept = ""
    if "out" in options:
        kept = f"Finished models are kept in {options.out}; the same command goes on from there"
    mendable = (StoreError, TrainingError, WorkerError, ValueError, TypeError, OSError)
    return execute(command, options, checked, mendable, kept)


def agreed(what: str, sizes: dict[str, int], default: int | None = None) -> Any:
    """The common value of ``sizes``. Raises ValueError, naming two of them, where they differ."""
    if len(set(sizes.values())) > 1:
        first = next(iter(sizes.items()))
        other = next(item for item in sizes.items() if item[1] != first[1])
        raise ValueError(
            f"received {first[1]} {what} in {first[0]}, {other[1]} in {other[0]}; expected the same"
        )
    return next(iter(sizes.values()), default)


def write_results(content: dict[str, Any], folder: Path) -> None:
    """Write the numbers to results.json in the command's own directory."""
    path = folder / "results.json"
    text = json.dumps(plain({"fastproj": fastproj.__version__, **content}), indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()), len(text))
    print(f"numbers: {path}")
