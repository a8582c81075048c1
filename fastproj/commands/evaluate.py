"""The commands ``fastproj lds``, ``loo``, ``brittleness`` and ``mislabel``: retrain and compare."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import fastproj
from fastproj.commands.arguments import INTERRUPTED
from fastproj.trak.correlation import METHODS
from fastproj.trak.files import StoreError, write_atomic
from fastproj.trak.metrics import (
    LDS,
    LOO,
    brittleness,
    check_sampling,
    lds,
    loo_correlation,
    mislabel_auc,
    most_helpful,
    noise_ceiling,
    row_blocks,
)
from fastproj.trak.retrain import (
    GroundTruth,
    TrainingError,
    all_but,
    random_subsets,
    train_subsets,
)
from fastproj.trak.workers import WorkerError
from fastproj.trak.writer import TopScores, load_array, load_scores

RECIPE_HELP = (
    "how to train: a Python file, or a module's name, with train(indices, seed) -> model and "
    "outputs(model) -> [m]; FILE.py:NAME and MODULE:NAME name something inside"
)


def lds_main(argv: Sequence[str] | None = None) -> int:
    """``fastproj lds``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastproj lds",
        description="The linear datamodeling score: how well scores predict what models trained on "
        "random subsets output. Trains these models, each kept as soon as it is finished: run "
        "again, the same command goes on where it was stopped; with more --subsets or --repeats, "
        "it adds to what is there.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=RECIPE_HELP)
    add_scores(parser, nargs="+", required=False)
    parser.add_argument(
        "--ground-truth",
        type=Path,
        metavar="DIR|NPZ",
        help="instead of RECIPE: a finished --out, or a .npz file with masks [S, n] and outputs "
        "[S, m] or [R, S, m]",
    )
    parser.add_argument(
        "--train-set-size", type=int, metavar="N", help="needed where no --scores are given"
    )
    parser.add_argument(
        "--subsets",
        type=int,
        metavar="S",
        help="models; 100. Fewer than --out or --ground-truth holds: the first S of them",
    )
    parser.add_argument("--fraction", type=float, help="of the training set; 0.5")
    parser.add_argument("--repeats", type=int, metavar="R", help="models a subset; 1")
    add_training(parser, "fastproj-lds")
    add_interval(parser)
    options = parser.parse_args(argv)
    if (options.recipe is None) == (options.ground_truth is None):
        parser.error("expected either RECIPE or --ground-truth")
    if options.ground_truth is not None and not options.scores:
        parser.error("--ground-truth needs --scores")
    if not options.scores and options.train_set_size is None:
        parser.error("expected --scores, or --train-set-size to only train")
    if options.ground_truth is not None and options.fraction is not None:
        parser.error("--fraction goes with RECIPE: a ground truth has its subsets")
    return guarded("lds", options, run_lds)


def run_lds(options: argparse.Namespace) -> int:
    """Train or read the ground truth, and print the LDS of each score file."""
    scores = {path: load_scores(path) for path in options.scores or []}
    sizes = {str(path): array.shape[0] for path, array in scores.items()}
    if options.train_set_size is not None:
        sizes["--train-set-size"] = options.train_set_size
    n = agreed("training samples", sizes)
    m = agreed("targets", {str(path): a.shape[1] for path, a in scores.items()}, None)
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
        check_before_training(scores)
        truth = train_subsets(
            options.recipe,
            random_subsets(n, count, fraction, options.seed),
            options.out,
            repeats=1 if options.repeats is None else options.repeats,
            identity={"fraction": fraction},
            n_targets=m,
            allow_failures=True,
            **training(options),
        )
        keep(truth, options.out / "ground-truth.npz")
        more = others_of(truth, options.out)
        made = {"path": str(options.out), "recipe": options.recipe, "fraction": fraction}
    n_runs, n_subsets, n_targets = truth.outputs.shape
    print(f"ground truth: {n_subsets} subsets, {n_runs} models each, {n_targets} targets{more}")
    for name, why in truth.failed.items():
        print(f"fastproj lds: {name} failed and is left out: {why}", file=sys.stderr)
    results, good = [], True
    for path, array in scores.items():
        result = lds(array, truth.masks, truth.mean, **interval(options))
        good &= tell("lds", result, path, truth.mean)
        results.append({"scores": str(path), **asdict(result)})
    ceiling = noise_ceiling(truth.outputs) if n_runs > 1 and n_subsets >= 3 else None
    if ceiling is not None and math.isfinite(ceiling):
        print(f"the randomness of training leaves at most about {ceiling:.2f} to predict")
    facts = {"ground_truth": made, "n_runs": n_runs, "n_subsets": n_subsets, "n_targets": n_targets}
    write_results(
        options,
        {**facts, "noise_ceiling": ceiling, "failed": truth.failed, "results": results},
        options.out if options.ground_truth is None else None,
    )
    return 0 if good and not truth.failed else 1


def loo_main(argv: Sequence[str] | None = None) -> int:
    """``fastproj loo``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastproj loo",
        description="Leave-one-out correlation: trains without one sample at a time, for some "
        "random samples, and correlates what that does with their scores. Resumes as `fastproj "
        "lds` does. One sample does little beside a seed: use several --repeats.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    add_scores(parser, nargs="+", required=True)
    parser.add_argument("--samples", type=int, default=50, metavar="L", help="left out; 50")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="models each; 5")
    parser.add_argument("--method", choices=list(METHODS), default="spearman")
    add_training(parser, "fastproj-loo")
    add_interval(parser)
    return guarded("loo", parser.parse_args(argv), run_loo)


def run_loo(options: argparse.Namespace) -> int:
    """Train without some samples, and print the correlation for each score file."""
    scores: dict[Path, Any] = {path: load_scores(path) for path in options.scores}
    n = agreed("training samples", {str(path): a.shape[0] for path, a in scores.items()})
    m = agreed("targets", {str(path): a.shape[1] for path, a in scores.items()})
    if not 3 <= options.samples <= n:
        raise ValueError(f"--samples: received {options.samples}; expected 3 to n = {n}")
    check_before_training(scores)
    removed = np.random.default_rng(options.seed).permutation(n)[: options.samples]
    truth = train_subsets(
        options.recipe,
        all_but(n, list(removed)),
        options.out,
        repeats=options.repeats,
        names=[f"without sample {i}" for i in removed],
        n_targets=m,
        **training(options),
    )
    n_runs, n_removed, n_targets = truth.outputs.shape
    more = others_of(truth, options.out)
    print(f"left out: {n_removed} samples, {n_runs} models each, {n_targets} targets{more}")
    results, good = [], True
    for path, array in scores.items():
        result = loo_correlation(
            array, removed, truth.mean, method=options.method, **interval(options)
        )
        good &= tell("loo", result, path, truth.mean)
        results.append({"scores": str(path), **asdict(result)})
    facts = {"recipe": options.recipe, "removed": removed.tolist(), "n_runs": options.repeats}
    write_results(options, {**facts, "results": results}, options.out)
    return 0 if good else 1


def brittleness_main(argv: Sequence[str] | None = None) -> int:
    """``fastproj brittleness``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastproj brittleness",
        description="How many predictions flip when the training samples that help each of them "
        "most are left out. Outputs must be margins: positive where the model is right. Resumes "
        "as `fastproj lds` does; trains (targets x sizes + 1) x repeats models.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help=RECIPE_HELP)
    add_scores(parser, nargs=None, required=True)
    parser.add_argument("--targets", type=int, nargs="+", metavar="T", help="the first 10")
    parser.add_argument(
        "--remove", type=int, nargs="+", default=[10, 20, 50, 100], metavar="K", help="10 20 50 100"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="models each; 3")
    add_training(parser, "fastproj-brittleness")
    add_interval(parser)
    return guarded("brittleness", parser.parse_args(argv), run_brittleness)


def run_brittleness(options: argparse.Namespace) -> int:
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
        **training(options),
    )
    outputs = np.empty((options.repeats, len(sizes), len(targets)))
    for row, (t, k) in enumerate(without, start=1):
        outputs[:, sizes.index(k), t] = truth.outputs[:, row, targets[t]]
    base = truth.outputs[:, 0, targets]  # [R, T]
    result = brittleness(outputs, base, sizes, confidence=options.confidence)
    print(result)
    if not np.ptp(truth.outputs[..., targets], axis=1).any():
        print(
            "fastproj brittleness: all models have the same outputs, whatever was left out; does "
            "train use its indices, and outputs its model?",
            file=sys.stderr,
        )
    facts = {"recipe": options.recipe, "scores": str(options.scores), "targets": targets}
    write_results(
        options, {**facts, "n_runs": options.repeats, "result": asdict(result)}, options.out
    )
    return 0


def mislabel_main(argv: Sequence[str] | None = None) -> int:
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
    add_interval(parser)
    return guarded("mislabel", parser.parse_args(argv), run_mislabel)


def run_mislabel(options: argparse.Namespace) -> int:
    """Print the AUC."""
    flipped = load_array(options.flipped)
    values = load_array(options.scores)
    result = mislabel_auc(values, flipped, **interval(options))
    print(result)
    own = values if values.ndim == 1 else np.diagonal(values)
    if np.ptp(own) == 0:
        print(
            f"fastproj mislabel: {options.scores}: all scores are {own[0]:.3g}, which finds "
            "nothing; expected the self-influence of each training sample "
            "(traker.self_influence())",
            file=sys.stderr,
        )
    write_results(options, {"scores": str(options.scores), "result": asdict(result)}, None)
    return 0


# ---- what the commands share --------------------------------------------------------------------


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
    """What ``train_subsets`` takes."""
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR", help=out)
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once; 1")
    parser.add_argument("--threads", type=int, help="torch threads a job; the cores shared out")
    parser.add_argument("--seed", type=int, default=0, help="of everything random; 0")
    parser.add_argument(
        "--depends",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="other files that results depend on: --out is refused when one has changed",
    )


def add_interval(parser: argparse.ArgumentParser) -> None:
    """What the intervals are made with, and where the numbers go."""
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals; 0.95")
    parser.add_argument("--n-boot", type=int, default=500, help="resamples; 500")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers")


def check_before_training(scores: Mapping[Path, Any]) -> None:
    """Raise ValueError for scores that are not finite: hours of training would come before."""
    for path, array in scores.items():
        for _ in () if isinstance(array, TopScores) else row_blocks(str(path), array):
            pass


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


def others_of(truth: GroundTruth, folder: Path) -> str:
    """What is to be said of the models in a directory that a result is not made of."""
    if not truth.unused:
        return ""
    return f"; {truth.unused} more models in {folder} are kept and not used"


def tell(command: str, result: LDS | LOO, path: Path, outputs: npt.NDArray[np.float64]) -> bool:
    """Print a mean correlation, and which targets [m] have none; whether there is a number."""
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
    command: str, options: argparse.Namespace, run: Callable[[argparse.Namespace], int]
) -> int:
    """Run a command; what a user can put right is a message."""
    try:
        check_sampling(command, options.confidence, options.n_boot, options.seed)
        return run(options)
    except KeyboardInterrupt:
        kept = f". Finished models are kept in {options.out}; the same command goes on from there"
        print(f"\nfastproj {command}: stopped{kept if 'out' in options else ''}", file=sys.stderr)
        return INTERRUPTED
    except (StoreError, TrainingError, WorkerError, ValueError, TypeError, OSError) as error:
        print(f"fastproj {command}: {error}", file=sys.stderr)
        return 1


def agreed(what: str, sizes: dict[str, int], default: int | None = None) -> Any:
    """The one value of ``sizes``; raises ValueError, naming two, where they differ."""
    if len(set(sizes.values())) > 1:
        first = next(iter(sizes.items()))
        other = next(item for item in sizes.items() if item[1] != first[1])
        raise ValueError(
            f"received {first[1]} {what} in {first[0]}, {other[1]} in {other[0]}; expected the same"
        )
    return next(iter(sizes.values()), default)


def write_results(
    options: argparse.Namespace, content: dict[str, Any], folder: Path | None
) -> None:
    """Write the numbers to --json, or to results.json in the command's own directory."""
    path = options.json or (None if folder is None else folder / "results.json")
    if path is None:
        return
    text = json.dumps(plain({"fastproj": fastproj.__version__, **content}), indent=1) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()), len(text))
    print(f"numbers: {path}")


def plain(value: Any) -> Any:
    """Values that JSON has: lists for arrays, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
