"""``fastproj trak``: scores for a Hugging Face model, from local folders and files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fastproj.checks import MAX_SEED, check_device, check_integer
from fastproj.commands.arguments import LIMIT, add_json, add_option, local_path, positive
from fastproj.commands.matrix import add_matrix, resolve_matrix
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.factored import MAX_FACTORED
from fastproj.spec import MAX_COLS
from fastproj.trak.distributed import DistributedError
from fastproj.trak.files import StoreCorruptError, StoreError, StoreMismatchError
from fastproj.trak.inputs import MAX_BATCH, PROJ_DIM
from fastproj.trak.mixing import OtherDataWarning
from fastproj.trak.store.store import NotReadyError, check_exp_name
from fastproj.trak.tasks.language import base_of

# fastproj.trak.hf is imported when the command runs: help and completion need no transformers.
TASKS = ("causal_lm", "seq2seq", "masked_lm", "text_classification", "token_classification")
# By the arguments of the library that they give.
OPTIONS = {
    "save_dir": "--out",
    "exp_name": "--name",
    "kind": "--kind",
    "block": "--block",
    "proj_dim": "--proj-dim",
    "factored": "--factored",
    "projector_seed": "--seed",
}
DESCRIPTION = """\
Which training samples raise or lower what a model says of a target? TRAK scores for a Hugging Face
model, its training set and targets, all in local folders and files: the command asks no network.
It prints the most helpful and the most harmful samples of the first targets, and keeps all scores.
"""
EPILOG = """\
examples:
  fastproj trak run/ --train train.jsonl --targets dev.jsonl
  fastproj trak run/checkpoint-100 run/checkpoint-200 --train train.parquet --targets dev.txt
  fastproj trak adapters/ --base llama/ --train train.jsonl --targets dev.jsonl --mean
  torchrun --nproc-per-node 2 -m fastproj trak run/ --train train.jsonl --targets dev.jsonl

models:
  A folder that save_pretrained wrote, a whole model or peft's adapters, or the output folder of a
  Trainer, of which all checkpoint-<step> folders are taken. Scores are averaged over checkpoints.
  The last checkpoint's class says what is predicted. Adapters with virtual tokens, such as those of
  prompt tuning, are refused.

data:
  .jsonl, .txt (a text a line), .parquet, or a folder of datasets' save_to_disk. What samples have:
    language model      {"text": ...}, or {"prompt": ..., "completion": ...}, which alone counts
    masked model        {"text": ...}; 15 % of the tokens are hidden, the same ones each time
    sequence to sequence  {"source": ..., "target": ...}
    classifier          {"text": ..., "label": ...}, and "text_pair" where there are two texts; with
                        one output, samples raise or lower the number that is predicted
    tokenised samples   {"input_ids": [...], "labels": ...}
  --column text=review says where an entry has another name. Of tokenised samples it may name the
  labels: --column labels=tags (--column label=stars for a classifier).

A stopped run goes on when the same command runs again. Exit status: 0 when the scores are there, 1
for an error that the message says how to mend, 2 for wrong arguments, 130 when interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj trak``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        check(options)
    except ValueError as refusal:
        parser.error(str(refusal))
    mendable = (
        DistributedError,
        ModuleNotFoundError,
        NotReadyError,
        OSError,
        OtherDataWarning,
        StoreError,
        TypeError,
        ValueError,
    )
    kept = f"What is finished is kept in {options.out}; the same command goes on from there"
    return execute("trak", options, run, mendable, kept, in_options)


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for what can't work with any model."""
    check_exp_name("--name", options.name, "NAME")
    check_device("--device", options.device)
    if options.proj_dim is not None:
        check_integer("--proj-dim", "K", options.proj_dim, 1, MAX_COLS + 1)
    resolve_matrix(options.kind, options.block, options.proj_dim or PROJ_DIM)
    if options.factored is not None:
        check_integer("--factored", "r", options.factored, 1, MAX_FACTORED)
    check_integer("--batch-size", "B", options.batch_size, 1, MAX_BATCH)
    check_integer("--seed", "N", options.seed, 0, MAX_SEED)
    check_integer("--show", "N", options.show, 0, LIMIT)


def in_options(error: Exception) -> str:
    """What an error says, with the remedy in options and not in the library's arguments."""
    if isinstance(error, StoreCorruptError):
        return f"{error.found}. Delete the file and run the same command again"
    if isinstance(error, OtherDataWarning):
        return f"{error.found} than --train holds now; use another {OPTIONS['save_dir']}"
    if not isinstance(error, StoreMismatchError):
        return str(error)
    return (
        f"{error.found}. Nothing was changed; use {same_options(error.same)}another "
        f"{OPTIONS[error.another]}"
    )


def same_options(same: Mapping[str, Any] | None) -> str:
    """The options that give the library's arguments these values; "" where some have none."""
    if same is None:
        return ""
    if "groups" in same:  # all targets are in one, or each is by itself
        if same["groups"] is None:
            return "no --mean, or "
        return "--mean, or " if not any(same["groups"]) and same["reduction"] == "mean" else ""
    if not same.keys() <= OPTIONS.keys():
        return ""
    words = ", ".join(
        f"no {OPTIONS[name]}" if value is None else f"{OPTIONS[name]} {value}"
        for name, value in same.items()
    )
    return f"the same settings{words and f' ({words})'}, or "


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="fastproj trak",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", type=local_path, metavar="MODEL", help="local folders")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train", type=local_path, required=True, metavar="PATH", help="the training set"
    )
    data.add_argument(
        "--targets", type=local_path, required=True, metavar="PATH", help="the samples to explain"
    )
    data.add_argument(
        "--column",
        type=renaming,
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="another name of an entry; may be repeated",
    )
    data.add_argument(
        "--max-length",
        type=positive,
        metavar="T",
        help="cut texts to T tokens (default: what the tokenizer and the model can take); longer "
        "tokenised samples are an error",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--task",
        choices=TASKS,
        metavar="TASK",
        help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]} (default: by the class of the model)",
    )
    model.add_argument(
        "--base", type=local_path, metavar="DIR", help="the model that adapters belong to"
    )
    model.add_argument(
        "--tokenizer", type=local_path, metavar="DIR", help="for a MODEL without one"
    )
    model.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of parameters and gradients (default: auto, as in the files)",
    )
    model.add_argument("--device", help="such as cuda (default: cpu)", default="cpu")
    model.add_argument(
        "--grad-wrt",
        choices=["auto", "all"],
        default="auto",
        help="gradients by all parameters, or by adapters where there are any (default: auto)",
    )
    scores = parser.add_argument_group("scores")
    add_option(scores, "--out", Path("fastproj-trak"), "DIR", "where to write", local_path)
    scores.add_argument(
        "--name", default="targets", help="of this set of targets (default: targets)"
    )
    scores.add_argument(
        "--mean",
        action="store_true",
        help="one score a sample, for all targets together: to select data with",
    )
    add_matrix(scores)
    scores.add_argument(
        "--factored",
        type=positive,
        metavar="r",
        help="compress both sides of each layer's gradient to r first: faster for large models, at "
        "some cost in quality (default: gradients as they are)",
    )
    add_option(scores, "--batch-size", 16, "B", "samples at once", positive)
    add_option(scores, "--seed", 0, "N", "of the projection")
    add_option(scores, "--top", 5, "N", "samples to print on each side", positive)
    add_option(scores, "--show", 3, "N", "targets to print")
    add_json(parser)
    return parser


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Without the bars of transformers and datasets where standard error is no terminal."""
    import datasets
    from transformers.utils import logging as transformers

    terminal = sys.stderr.isatty()
    of_models = not terminal and transformers.is_progress_bar_enabled()
    of_tables = not terminal and not datasets.are_progress_bars_disabled()
    if of_models:
        transformers.disable_progress_bar()
    if of_tables:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if of_models:
            transformers.enable_progress_bar()
        if of_tables:
            datasets.enable_progress_bars()


def run(options: argparse.Namespace) -> Outcome:
    """Load, tokenise, score and print."""
    import fastproj.trak.hf  # noqa: F401, it says what to install where something is missing

    with bars_on_terminals_only(), warnings.catch_warnings():
        # Files are read in order, and nothing is drawn: these are other samples.
        warnings.simplefilter("error", OtherDataWarning)
        return score(options)


def score(options: argparse.Namespace) -> Outcome:
    """What ``run`` does, whatever is shown of it."""
    from fastproj.trak.hf import HFTRAKer, checkpoints_in, load_model, read_samples, tokenize
    from fastproj.trak.hf.heads import is_regression, kind_of_model

    checkpoints = [found for path in options.models for found in checkpoints_in(path)]
    rows = {name: read_samples(getattr(options, name)) for name in ("train", "targets")}
    model = load_model(checkpoints[-1], options.task, base=options.base, dtype=options.dtype)
    task = options.task or kind_of_model("fastproj trak", model)
    texts = not all(map(is_tokenised, rows.values()))
    tokenizer = find_tokenizer(options, checkpoints, needed=texts or task == "masked_lm")
    limit = longest(model, tokenizer)
    columns = columns_of(options, task, rows)
    data = {
        name: tokenize(
            samples,
            tokenizer,
            task,
            # The tokenizer's limit is none of samples that are tokenised already, and the model's
            # may be one that it can pass.
            max_length=options.max_length or (None if is_tokenised(samples) else limit),
            columns=columns[name],
            label2id=getattr(base_of(model).config, "label2id", None),
            name=str(getattr(options, name)),
        )
        for name, samples in rows.items()
    }
    traker = HFTRAKer(
        model,
        data["train"],
        checkpoints,
        options.out,
        device=options.device,
        tokenizer=tokenizer,
        task=options.task,
        batch_size=options.batch_size,
        grad_wrt=None if options.grad_wrt == "all" else options.grad_wrt,
        proj_dim=options.proj_dim,
        kind=options.kind,
        block=options.block,
        projector_seed=options.seed,
        factored=options.factored,
        logging_level=logging.WARNING,
    )
    first = traker.traker.ranks.first
    if first:
        print(
            f"{type(base_of(model)).__name__}, {task}: gradients by "
            f"{traker.traker.num_params_for_grad:,} parameters, {len(checkpoints)} checkpoint(s), "
            f"{len(data['train'])} training samples, {len(data['targets'])} targets",
            flush=True,
        )
    groups = [0] * len(data["targets"]) if options.mean else None
    scores = traker.score(data["targets"], options.name, groups=groups, reduction="mean")
    sides = ("raises", "lowers") if is_regression(traker.task) else ("helpful", "harmful")
    return DONE, report(options, task, checkpoints, rows, scores, sides) if first else None


def find_tokenizer(options: argparse.Namespace, checkpoints: list[Path], needed: bool) -> Any:
    """The tokenizer of --tokenizer, of a checkpoint or of the base model; None where there is none
    and none is needed.
    """
    from fastproj.trak.hf import load_tokenizer
    from fastproj.trak.hf.folders import base_folder

    given = [path for path in (options.tokenizer,) if path is not None]
    base = options.base or base_folder(checkpoints[-1])
    places = given or [*reversed(checkpoints), *options.models, *filter(None, [base])]
    try:
        return load_tokenizer(*dict.fromkeys(places))
    except FileNotFoundError as error:
        if needed or given:
            raise FileNotFoundError(f"{error}; --tokenizer names it") from None
        return None


def is_tokenised(samples: Any) -> bool:
    """Whether a file holds tokenised samples, not texts, by its first one."""
    return "input_ids" in samples[0]


def columns_of(
    options: argparse.Namespace, task: str, rows: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """The columns of each file. Where one is tokenised and the other isn't, a column may be for
    one of them alone.
    """
    from fastproj.trak.hf.texts import names_of

    both = len(set(map(is_tokenised, rows.values()))) == 2
    return {
        name: {
            entry: column
            for entry, column in options.column
            if not both
            or entry in names_of(task, is_tokenised(samples))
            or entry not in names_of(task, not is_tokenised(samples))
        }
        for name, samples in rows.items()
    }


def longest(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that the tokenizer and the positions of the model allow; None: no limit."""
    from fastproj.trak.hf.limits import positions_of

    limits = [getattr(tokenizer, "model_max_length", None), positions_of(model)]
    known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < 1 << 30]
    return min(known, default=None)


def report(
    options: argparse.Namespace,
    task: str,
    checkpoints: list[Path],
    rows: Mapping[str, Any],
    scores: Any,
    sides: tuple[str, str] = ("helpful", "harmful"),
) -> dict[str, Any]:
    """Print the extremes of the first targets; returns those of all, for --json.

    sides : what the highest and the lowest scores are called.
    """
    found = []
    for column in range(scores.shape[1]):
        found.append(
            {
                name: [
                    {"sample": int(i), "score": float(scores[i, column])}
                    # among equal scores the lower number first, as in TopScores
                    for i in np.argsort(sign * scores[:, column], kind="stable")[: options.top]
                ]
                for name, sign in zip(sides, (-1, 1), strict=True)
            }
        )
    for column, extremes in enumerate(found[: options.show]):
        title = (
            "all targets"
            if options.mean
            else f"target {column}: {text_of(rows['targets'][column])}"
        )
        print(f"\n{title}")
        for name, samples in extremes.items():
            for entry in samples:
                said = text_of(rows["train"][entry["sample"]])
                print(f"  {name} {entry['score']:+10.3g}  sample {entry['sample']}: {said}")
    path = options.out / "scores" / f"{options.name}.mmap"
    print(f"\nscores {list(scores.shape)}: {path} (numpy.load reads it)")
    return {
        "scores": str(path),
        "shape": list(scores.shape),
        "task": task,
        "checkpoints": list(map(str, checkpoints)),
        "train": str(options.train),
        "targets": str(options.targets),
        "mean_of_targets": options.mean,
        "extremes": found,
    }


def text_of(sample: Mapping[str, Any], width: int = 90) -> str:
    """A line about a sample."""
    shown = {name: part for name, part in sample.items() if isinstance(part, str | int | float)}
    text = json.dumps(shown or {"tokens": len(sample["input_ids"])}, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def renaming(text: str) -> tuple[str, str]:
    """NAME=COLUMN as a pair."""
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise argparse.ArgumentTypeError(
            f"received {text!r}; expected NAME=COLUMN, such as text=review"
        )
    return name, column
