"""``fastproj mislabel``: how well self-influence finds wrong labels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fastproj.commands import evaluation
from fastproj.trak.evaluation.metrics import mislabel_auc
from fastproj.trak.store.scores import load_array


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj mislabel``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastproj mislabel",
        description="How well self-influence finds wrong labels: the area under the ROC curve.",
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
    parser.add_argument("--seed", type=int, default=0, help="of the resampling; 0")
    evaluation.add_interval(parser)
    return evaluation.guarded("mislabel", parser.parse_args(argv), run)


def run(options: argparse.Namespace) -> int:
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
    evaluation.write_results(
        options, {"scores": str(options.scores), "result": asdict(result)}, None
    )
    return 0
