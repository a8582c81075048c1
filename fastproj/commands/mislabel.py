"""``fastproj mislabel``: how well self-influence finds wrong labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastproj.commands import evaluation
from fastproj.commands.arguments import add_option, command_parser
from fastproj.commands.running import DONE, Outcome
from fastproj.trak.evaluation.metrics import mislabel_auc
from fastproj.trak.store.scores import load_array


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj mislabel``."""
    parser = command_parser(
        "mislabel",
        "How well self-influence finds wrong labels that are known: the area under the ROC curve. "
        "1 is perfect, 0.5 is chance. Python's traker.self_influence() makes the scores.",
        """
        fastproj mislabel --scores self_influence.npy --flipped flipped.npy
        fastproj mislabel --scores self_influence.npy --flipped flipped.npy --json > auc.json
        """,
    )
    parser.add_argument(
        "--scores",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npy or .mmap: [n], or [n, n] with the training samples as targets",
    )
    parser.add_argument(
        "--flipped", type=Path, required=True, metavar="FILE.npy", help="bool [n]: wrong labels"
    )
    add_option(parser, "--seed", 0, "N", "of the resampling")
    evaluation.add_interval(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj mislabel``; returns the exit status."""
    return evaluation.guarded("mislabel", build_parser().parse_args(argv), run)


def run(options: argparse.Namespace) -> Outcome:
    """Print the AUC."""
    flipped = load_array(options.flipped)
    values = load_array(options.scores)
    result = mislabel_auc(values, flipped, **evaluation.interval(options))
    print(result)
    own = values if values.ndim == 1 else np.diagonal(values)
    if np.ptp(own) == 0:
        print(
            f"fastproj mislabel: {options.scores}: all scores are {own[0]:.3g}, which finds "
            "nothing; expected the self-influence of each training sample "
            "(traker.self_influence())",
            file=sys.stderr,
        )
    return DONE, {"scores": str(options.scores), "result": asdict(result)}
