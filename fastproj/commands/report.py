"""``fastproj report``: an HTML page of finished scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastproj.trak.files import StoreError
from fastproj.trak.report import Page, write_report
from fastproj.trak.writer import load_array, load_scores


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj report``: a page of the scores in a save_dir (or a .npy file)."""
    parser = argparse.ArgumentParser(
        prog="fastproj report", description="An HTML page of finished TRAK scores."
    )
    parser.add_argument(
        "scores",
        type=Path,
        help="scores/<exp_name>.mmap or .top.safetensors, or any .npy [n, m]",
    )
    parser.add_argument("--out", type=Path, default=Path("trak-report.html"))
    parser.add_argument("--targets", type=int, nargs="+", metavar="T", help="default: the first 12")
    parser.add_argument("--top", type=int, default=8, help="samples on each side, default 8")
    for name in ("train-images", "target-images", "train-labels", "target-labels"):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE.npy")
    parser.add_argument("--title", default="TRAK scores")
    options = parser.parse_args(argv)

    def load(path: Path | None) -> npt.NDArray[np.generic] | None:
        return None if path is None else load_array(path)

    try:
        scores = load_scores(options.scores)
        page = Page(
            options.title,
            scores,
            options.targets or range(min(12, scores.shape[1])),
            options.top,
            train_images=load(options.train_images),
            target_images=load(options.target_images),
            train_labels=load(options.train_labels),  # type: ignore[arg-type]
            target_labels=load(options.target_labels),  # type: ignore[arg-type]
            facts={"scores": options.scores.name, "shape": f"{scores.shape}"},
        )
        print(write_report(options.out, page))
    except (StoreError, OSError, ValueError) as error:
        print(f"fastproj report: {error}", file=sys.stderr)
        return 1
    return 0
