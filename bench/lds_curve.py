"""LDS against the number of trained models: TRAK, datamodels and gradient inner products.

    python -m bench.lds_curve [--problem digits]

What is scored on: models trained on random halves of the data, several retrainings of each. What
competes, each point with its bootstrap interval:

- TRAK (arXiv 2303.14186): `fastproj.TRAKer` with its defaults on 1 to 20 checkpoints;
- datamodels (arXiv 2202.00622): ridge regression from "which samples was it trained on" to the
  output, fitted on up to 500 models that were trained on other random halves;
- TracIn-style (arXiv 2002.08484): inner products of the loss gradients of sample and target, not
  projected, at the same 1 to 20 checkpoints.

A checkpoint is trained on all samples, a datamodel's model on half of them: half the work.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from bench.battery import PROBLEMS, training
from bench.battery.problem import Problem
from bench.battery.providers.cosine import gradients
from bench.battery.training import Checkpoint
from bench.record import end_with, write_result
from fastproj import TRAKer
from fastproj.trak import AbstractModelOutput
from fastproj.trak.evaluation.metrics import LDS, lds, noise_ceiling

Floats = npt.NDArray[np.float64]

CHECKPOINTS = (1, 2, 3, 5, 7, 10, 15, 20)
DATAMODELS = (10, 20, 50, 100, 200, 300, 500)
RIDGES = tuple(10.0**power for power in np.arange(-3, 4.1, 0.5))  # times the mean eigenvalue
TRUTH_SEED, DATAMODEL_SEED = 2, 50  # of the subsets: other ones, trained from other seeds
COLOURS = {"TRAK": "#2f6fde", "datamodels (ridge)": "#c2571a", "TracIn-style": "#4d8f4d"}


@dataclass(frozen=True)
class Point:
    """One method after so many trained models."""

    method: str
    models: int
    lds: float
    low: float
    high: float


def trak_scores(
    problem: Problem,
    checkpoints: Sequence[Checkpoint],
    counts: Sequence[int],
    folder: str,
    options: dict[str, Any],
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """(M, scores [n, m]) of the first M checkpoints, for each M of ``counts``."""
    traker = TRAKer(
        problem.model(),
        problem.question.task(AbstractModelOutput),
        problem.n,
        save_dir=folder,
        logging_level="WARNING",
        **options,
    )
    for model_id, checkpoint in enumerate(
        tqdm(checkpoints, desc="featurizing", leave=False, disable=None)
    ):
        traker.load_checkpoint(checkpoint, model_id)
        for rows in torch.arange(problem.n).split(250):
            batch = tuple(part[rows] for part in problem.samples)
            traker.featurize(batch, num_samples=len(rows))
    traker.finalize_features()
    size = problem.m
    for model_id, checkpoint in enumerate(
        tqdm(checkpoints, desc="scoring", leave=False, disable=None)
    ):
        traker.start_scoring_checkpoint("targets", checkpoint, model_id, size)
        traker.score(problem.targets, num_samples=size)
    for count in counts:
        yield count, np.array(traker.finalize_scores("targets", model_ids=range(count)))


def tracin_scores(
    problem: Problem, checkpoints: Sequence[Checkpoint], counts: Sequence[int]
) -> Iterator[tuple[int, Floats]]:
    """(M, scores [n, m]): ``grad loss(sample) . grad loss(target)``, the mean of M checkpoints."""
    total = np.zeros((problem.n, problem.m))
    for done, checkpoint in enumerate(
        tqdm(checkpoints, desc="TracIn", leave=False, disable=None), start=1
    ):
        of_samples = gradients(problem, checkpoint, "likelihood", problem.samples)
        of_targets = gradients(problem, checkpoint, "likelihood", problem.targets)
        total += (of_samples @ of_targets.mT).double().numpy()
        if done in counts:
            yield done, total / done


def datamodel_scores(masks: npt.NDArray[np.bool_], outputs: Floats) -> Floats:
    """Ridge regression of the outputs [S, m] on the masks [S, n]; weights [n, m].

    Each target gets the ridge of RIDGES with the smallest leave-one-out error, in closed form
    (the residuals of row i divided by 1 - H_ii, with H the hat matrix).
    """
    x = masks - masks.mean(0)  # the intercept takes the means
    y = outputs - outputs.mean(0)
    values, vectors = np.linalg.eigh(x @ x.T)  # [S], [S, S]
    values = np.clip(values, 0, None)
    rotated = vectors.T @ y  # [S, m]
    best = np.full(y.shape[1], np.inf)
    weights = np.zeros((masks.shape[1], y.shape[1]))
    for ridge in RIDGES:
        shrunk = values + ridge * values.mean()
        # The intercept has a leverage of its own, 1 / S.
        leverage = (vectors**2) @ (values / shrunk) + 1 / len(x)
        residuals = y - vectors @ ((values / shrunk)[:, None] * rotated)
        error = ((residuals / (1 - leverage)[:, None]) ** 2).mean(0)  # [m]
        better = error < best
        best[better] = error[better]
        weights[:, better] = x.T @ (vectors @ (rotated[:, better] / shrunk[:, None]))
    return weights


def curve(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """All points of a problem, and the noise ceiling."""
    counts = [count for count in CHECKPOINTS if count <= options.checkpoints]
    sizes = [size for size in DATAMODELS if size <= options.datamodels]
    begun = time.perf_counter()
    truth_of = functools.partial(training.ground_truth, problem)
    truth = truth_of(options.subsets, options.cache, TRUTH_SEED, options.retrainings)
    made = truth_of(max(sizes), options.cache, DATAMODEL_SEED, 1)
    masks, runs, others = truth.masks, truth.output, made.masks
    if (others[:, None] == masks).all(2).any():
        raise ValueError("a datamodel's subset is among those that the LDS is measured on")
    checkpoints = training.checkpoints(problem, max(counts), options.cache)
    outputs = runs.double().mean(0).numpy()  # [S, m]
    points: list[Point] = []

    def measure(method: str, models: int, scores: npt.NDArray[Any]) -> None:
        found: LDS = lds(scores, masks.numpy(), outputs, n_boot=options.n_boot)
        points.append(Point(method, models, found.mean, found.low, found.high))
        print(f"{method:<20}{models:>5} models   {found}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for count, scores in trak_scores(problem, checkpoints, counts, folder, options.traker):
            measure("TRAK", count, scores)
    for size in sizes:
        weights = datamodel_scores(others[:size].numpy(), made.output[0, :size].double().numpy())
        measure("datamodels (ridge)", size, weights)
    for count, inner in tracin_scores(problem, checkpoints, counts):
        measure("TracIn-style", count, inner)
    ceiling = noise_ceiling(runs.numpy())
    print(f"{problem.name}: the randomness of training leaves at most about {ceiling:.2f}")
    return {
        "problem": problem.name,
        "n": problem.n,
        "targets": problem.m,
        "parameters": sum(p.numel() for p in checkpoints[0].values()),
        "training": asdict(problem.training),
        "subsets": options.subsets,
        "retrainings": options.retrainings,
        "traker": options.traker,
        "noise_ceiling": ceiling,
        "seconds": round(time.perf_counter() - begun),
        "points": [asdict(point) for point in points],
    }


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The curves of each problem, with their intervals and the noise ceiling, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(6.2 * len(results), 4.4), squeeze=False, layout="constrained"
    )
    for axis, result in zip(axes[0], results, strict=True):
        for method, colour in COLOURS.items():
            points = [p for p in result["points"] if p["method"] == method]
            x = [p["models"] for p in points]
            axis.plot(x, [p["lds"] for p in points], "o-", color=colour, ms=4, label=method)
            low, high = [p["low"] for p in points], [p["high"] for p in points]
            axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axis.axhline(result["noise_ceiling"], color="#888888", ls="--", lw=1, label="noise ceiling")
        ticks = (1, 2, 5, 10, 20, 50, 100, 200, 500)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(min(0.0, *(p["low"] for p in result["points"])), 1)
        axis.set_xlabel("trained models")
        axis.set_ylabel("linear datamodeling score")
        axis.set_title(
            f"{result['problem']}: {result['n']} samples, {result['targets']} targets, "
            f"{result['subsets']} subsets",
            fontsize=10,
        )
        axis.grid(alpha=0.25)
        axis.legend(loc="center right", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), default=["digits"])
    parser.add_argument("--checkpoints", type=int, default=max(CHECKPOINTS), help="at most")
    parser.add_argument("--datamodels", type=int, default=max(DATAMODELS), help="models, at most")
    parser.add_argument("--subsets", type=int, default=200, help="that the LDS is measured on")
    parser.add_argument("--retrainings", type=int, default=3, help="of each of these")
    parser.add_argument("--n-boot", type=int, default=500)
    parser.add_argument("--train", type=int, help="training samples; the problem's own number")
    parser.add_argument("--epochs", type=int, help="of each training; the problem's own number")
    parser.add_argument(
        "--traker", type=json.loads, default={}, metavar="JSON", help="other options of TRAKer"
    )
    parser.add_argument("--cache", type=Path, default=training.default_cache())
    parser.add_argument("--no-write", action="store_true", help="no files in bench/results")
    options = parser.parse_args(argv)
    for option, least in (
        ("checkpoints", 1),
        ("datamodels", 10),
        ("subsets", 3),
        ("retrainings", 2),
    ):
        if getattr(options, option) < least:
            parser.error(
                f"--{option}: received {getattr(options, option)}; expected {least} or more"
            )
    results = []
    for name in options.problem:
        problem = PROBLEMS[name](**({"n": options.train} if options.train else {}))
        if options.epochs:
            problem = problem.with_training(epochs=options.epochs)
        results.append(curve(problem, options))
    if not options.no_write:
        path = write_result("lds-curve", {"problems": results})
        draw(results, path.with_suffix(".png"))
        print(f"{path}\n{path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    end_with(main)
