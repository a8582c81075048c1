"""``fastproj report``: an HTML page of finished scores."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastproj.commands.arguments import add_json, add_option, command_parser, positive
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.trak.evaluation.report import Page, write_report
from fastproj.trak.files import StoreError, lines_of, parsed_json, read_text
from fastproj.trak.store.scores import load_array, load_scores

TEXTS = "expected a list of texts, or of lists of tokens"


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj report``."""
    parser = command_parser(
        "report",
        "An HTML page of finished TRAK scores: for each target, the training samples that help it "
        "most and those that harm it most. It is one file that refers to nothing outside.",
        """
        fastproj report trak_results/scores/held_out.mmap --train-labels labels.npy
        fastproj report scores.npy --train-images train.npy --target-images targets.npy --top 5
        fastproj report scores.npy --train-texts facts.txt --target-texts questions.txt
        fastproj report scores.npy --train-texts tokens.json --token-scores tokens.npy
        fastproj report scores.npy --train-table train.csv --target-table targets.csv
        """,
    )
    parser.add_argument(
        "scores",
        type=Path,
        metavar="SCORES",
        help="scores/<exp_name>.mmap or .top.safetensors, or any .npy [n, m]",
    )
    add_option(parser, "--out", Path("trak-report.html"), "HTML", "where to write", Path)
    parser.add_argument(
        "--targets", type=int, nargs="+", metavar="T", help="which targets (default: the first 12)"
    )
    add_option(parser, "--top", 8, "N", "samples on each side", positive)
    for name, what in (
        ("train-images", "images of the training samples [n, ...], grey or colour"),
        ("target-images", "images of the targets [m, ...]"),
        ("train-labels", "labels of the training samples [n], numbers or short texts"),
        ("target-labels", "labels of the targets [m]"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE.npy", help=what)
    for name, whose in (("train-texts", "training samples"), ("target-texts", "targets")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE",
            help=f"passages of the {whose}: .txt with one a line, or .json, a list of texts or of "
            "lists of tokens",
        )
    parser.add_argument(
        "--token-scores",
        type=Path,
        metavar="FILE.npy",
        help="[m, n, T]: what each token of a training sample adds to its score; --train-texts "
        "must then be lists of tokens",
    )
    for name, whose in (("train-table", "training samples"), ("target-table", "targets")):
        parser.add_argument(
            f"--{name}",
            type=Path,
            metavar="FILE.csv",
            help=f"rows of the {whose}; the first line names the columns",
        )
    parser.add_argument(
        "--title", default="TRAK scores", metavar="TEXT", help="of the page (default: TRAK scores)"
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj report``; returns the exit status."""
    options = build_parser().parse_args(argv)
    return execute("report", options, run, (StoreError, OSError, ValueError))


def run(options: argparse.Namespace) -> Outcome:
    """Write the page, and print where it is."""
    scores = load_scores(options.scores)
    columns, tables = load_tables(options.train_table, options.target_table)
    page = Page(
        options.title,
        scores,
        options.targets or range(min(12, scores.shape[1])),
        options.top,
        train_images=load(options.train_images),
        target_images=load(options.target_images),
        train_texts=load_texts(options.train_texts),
        target_texts=load_texts(options.target_texts),
        token_scores=load(options.token_scores),
        train_rows=tables[0],
        target_rows=tables[1],
        columns=columns,
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


def load_texts(path: Path | None) -> list[str] | list[list[str]] | None:
    """The passages of a .txt or .json file, as texts or as lists of tokens.

    Raises ValueError for a file that holds something else.
    """
    if path is None:
        return None
    text = read_text(path)
    if path.suffix != ".json":
        return lines_of(text)
    try:
        found = parsed_json(path, text)
    except ValueError as error:
        raise ValueError(f"{error}; {TEXTS}") from None
    if isinstance(found, list):
        if all(isinstance(passage, str) for passage in found):
            return found
        lists = all(isinstance(passage, list) for passage in found)
        if lists and all(isinstance(token, str) for passage in found for token in passage):
            return found
    raise ValueError(f"{path} holds something else; {TEXTS}")


def load_tables(
    *paths: Path | None,
) -> tuple[list[str], list[list[list[str]] | None]]:
    """The names of the columns, which must be the same, and the rows of each file."""
    columns: list[str] = []
    tables: list[list[list[str]] | None] = []
    for path in paths:
        if path is None:
            tables.append(None)
            continue
        try:
            head, *rows = list(
                csv.reader(io.StringIO(read_text(path, newline=""), newline=""))
            ) or [[]]
        except csv.Error as error:
            raise ValueError(f"{path} is no table in CSV ({error})") from None
        if columns and head != columns:
            raise ValueError(f"{path} has the columns {head}; expected {columns}, as {paths[0]}")
        for number, row in enumerate(rows, 2):
            if len(row) != len(head):
                raise ValueError(
                    f"{path}, line {number}: received {len(row)} values; expected {len(head)}"
                )
        columns = head
        tables.append(rows)
    return columns, tables
