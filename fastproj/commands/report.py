"""``fastproj report``: an HTML page of finished scores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastproj.commands.arguments import add_json, command_parser
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.trak.evaluation.report import Page, write_report
from fastproj.trak.files import StoreError
from fastproj.trak.store.scores import load_array, load_scores


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj report``."""
    parser = command_parser(
        "report",
        "An HTML page of finished TRAK scores: for each target, the training samples that help it "
        "most and those that harm it most. It is one file that refers to nothing outside.",
        """
        fastproj report trak_results/scores/held_out.mmap --train-labels labels.npy
        fastproj report scores.npy --train-images train.npy --target-images targets.npy --top 5
        """,
    )
    parser.add_argument(
        "scores",
        type=Path,
        metavar="SCORES",
        help="scores/<exp_name>.mmap or .top.safetensors, or any .npy [n, m]",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("trak-report.html"), metavar="HTML", help="where to write"
    )
    parser.add_argument("--targets", type=int, nargs="+", metavar="T", help="default: the first 12")
    parser.add_argument(
        "--top", type=int, default=8, metavar="N", help="samples on each side, default 8"
    )
    for name, what in (
        ("train-images", "[n, ...], grey or colour"),
        ("target-images", "[m, ...]"),
        ("train-labels", "[n], numbers or short texts"),
        ("target-labels", "[m]"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE.npy", help=what)
    parser.add_argument("--title", default="TRAK scores", metavar="TEXT", help="of the page")
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj report``; returns the exit status."""
    options = build_parser().parse_args(argv)
    return execute("report", options, run, (StoreError, OSError, ValueError))


def run(options: argparse.Namespace) -> Outcome:
    """Write the page, and print where it is."""
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
    path = write_report(options.out, page)
    print(path)
    return DONE, {"report": str(path), "targets": list(page.targets)}


def load(path: Path | None) -> npt.NDArray[np.generic] | None:
    """The array of a file that was named."""
    return None if path is None else load_array(path)
