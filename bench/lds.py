"""LDS of TRAK scores on real data: fastproj with its defaults and over lambda, beside trak.

    python -m bench.lds             all of problems.PROBLEMS at k = 128, 512, 2048
    python -m bench.lds --quick     digits and breast cancer, smaller: about a minute

For each problem it trains models on random halves (the ground truth), and a few on everything
(the checkpoints that both libraries get), both kept in --cache. Then, for each k:

    default     the LDS of fastproj.TRAKer as it comes, with a bootstrap interval
    best        the best of the same features by TRAK's formula, (Phi^T Phi + lambda I)^-1, over
                lambda = 10^-4 .. 10^4 times the mean eigenvalue
    trak        trak.TRAKer 0.3.2 as it comes (lambda 0) and its best over the same lambdas, by its
                own projector and score computer, in float32

The command fails where the default is more than 0.02 below the best, or below trak's best by more
than the half width of its own interval.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from bench import problems
from bench.problems import Problem
from bench.record import write_result
from fastproj import TRAKer
from fastproj.commands.arguments import positive
from fastproj.trak import AbstractModelOutput
from fastproj.trak.evaluation.metrics import LDS, lds

Scores = npt.NDArray[np.floating[Any]]
Checkpoints = list[dict[str, Tensor]]

DIMS = (128, 512, 2048)
SWEEP = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
BATCH = 250
BELOW_BEST = 0.02  # what the default may lose against the best lambda


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where the default misses what is asked of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two problems, small sizes")
    parser.add_argument("--problem", nargs="+", choices=list(problems.PROBLEMS))
    parser.add_argument("--dims", type=positive, nargs="+", metavar="K", help="128 512 2048")
    parser.add_argument("--checkpoints", type=positive, default=5, metavar="M")
    parser.add_argument("--subsets", type=positive, metavar="S", help="random halves; 120")
    parser.add_argument("--no-trak", action="store_true", help="fastproj only")
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument("--cache", type=Path, default=Path("build/bench-cache"), metavar="DIR")
    options = parser.parse_args(argv)
    logging.disable(logging.INFO)
    names = options.problem or (["digits", "breast_cancer"] if options.quick else problems.PROBLEMS)
    dims = options.dims or ((128, 512) if options.quick else DIMS)
    subsets = options.subsets or (60 if options.quick else 120)
    rows: list[dict[str, Any]] = []
    for name in names:
        problem = problems.PROBLEMS[name]()
        if options.quick:
            problem = problem.with_training(epochs=problem.training.epochs // 3)
        masks, runs = problems.ground_truth(problem, subsets, 1, options.cache)
        checkpoints = kept_checkpoints(problem, options.checkpoints, options.cache)
        truth = masks.numpy(), runs.mean(0).numpy()
        for k in dims:
            row = measure(problem, checkpoints, k, truth, with_trak=not options.no_trak)
            rows.append(row)
            print(line(row), flush=True)
    table = "\n".join([HEADER, *map(line, rows)])
    print(f"\n{table}")
    failed = [row for row in rows if faults(row)]
    for row in failed:
        print(f"MISSED {row['problem']} k={row['k']}: {'; '.join(faults(row))}")
    if not options.no_write:
        settings = {"checkpoints": options.checkpoints, "subsets": subsets, "sweep": SWEEP}
        name = "lds-quick" if options.quick else "lds"
        print(write_result(name, {"settings": settings, "rows": rows}, table))
    return 1 if failed else 0


def kept_checkpoints(problem: Problem, count: int, cache: Path) -> Checkpoints:
    """Models trained on everything; trained once."""
    path = cache / f"{problem.name}-{problem.fingerprint()}-checkpoints-{count}.pt"
    if not path.exists():
        torch.save(problems.checkpoints(problem, count), path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    loaded: Checkpoints = torch.load(path)
    return loaded


def measure(
    problem: Problem,
    checkpoints: Checkpoints,
    k: int,
    truth: tuple[npt.NDArray[np.bool_], Scores],
    with_trak: bool,
) -> dict[str, Any]:
    """One row of the table: both libraries on the same checkpoints."""
    row: dict[str, Any] = {"problem": problem.name, "n": problem.n, "k": k}
    row["parameters"] = sum(p.numel() for p in checkpoints[0].values())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trak's, of float16 and of singular matrices
        started = time.perf_counter()
        traker, scores = attribute(TRAKer, problem, checkpoints, k, f"{folder}/fastproj")
        row["fastproj_seconds"] = time.perf_counter() - started
        row["default"] = as_dict(lds(scores, *truth))
        chosen = [traker.saver.systems.read_solve(i) for i in range(len(checkpoints))]
        row["chosen"] = [solved["auto"]["relative"] for solved in chosen]
        row["rule"] = sorted({solved["auto"]["rule"] for solved in chosen})
        row["sweep"] = [quick_lds(s, truth) for s in sweep(traker, len(checkpoints))]
        if with_trak:
            from trak import TRAKer as Trak

            started = time.perf_counter()
            other, scores = attribute(Trak, problem, checkpoints, k, f"{folder}/trak")
            row["trak_seconds"] = time.perf_counter() - started
            row["trak_default"] = (
                as_dict(lds(scores, *truth)) if np.isfinite(scores).all() else None
            )
            row["trak_sweep"] = [quick_lds(s, truth) for s in trak_sweep(other, len(checkpoints))]
    return row


def attribute(
    library: Any, problem: Problem, checkpoints: Checkpoints, k: int, save_dir: str, **options: Any
) -> tuple[Any, Scores]:
    """(the TRAKer, its scores [n, m]) by the calls that both libraries share; trak in float32.

    library : fastproj's TRAKer or trak's.
    options : of it, beyond its defaults.
    """
    ours = library is TRAKer
    base = AbstractModelOutput if ours else trak_base()
    if not ours:
        options = {"use_half_precision": False, "device": "cpu", **options}
    traker = library(
        model=problem.model().eval(),
        task=problem.task(base),
        train_set_size=problem.n,
        save_dir=save_dir,
        proj_dim=k,
        logging_level=logging.ERROR,
        **options,
    )
    what = f"{problem.name}, k = {k}: {'fastproj' if ours else 'trak'}"
    count = len(problem.target_x)
    with tqdm(desc=what, total=len(checkpoints) * problem.n, unit="sample", leave=False) as bar:
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id)
            for rows in torch.arange(problem.n).split(BATCH):
                traker.featurize((problem.x[rows], problem.y[rows]), num_samples=len(rows))
                bar.update(len(rows))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("targets", checkpoint, model_id, count)
        traker.score((problem.target_x, problem.target_y), num_samples=count)
    try:
        return traker, np.array(traker.finalize_scores("targets"), dtype=np.float64)
    except torch.linalg.LinAlgError:
        return traker, np.full((problem.n, count), np.nan)


def trak_base() -> type:
    """What trak's tasks derive from."""
    from trak.modelout_functions import AbstractModelOutput as Base

    return Base


def sweep(traker: TRAKer, count: int) -> list[Scores]:
    """Scores of fastproj's features at each lambda of SWEEP, a share of the mean eigenvalue."""
    total = [0.0] * len(SWEEP)
    q = torch.stack([traker.saver.out_to_loss(i) for i in range(count)]).double().mean(0)
    for model_id in range(count):
        phi = traker.saver.matrix(model_id).double()  # [n, k]
        targets = traker.saver.matrix(model_id, "targets").double()  # [m, k]
        mean = float(phi.square().sum()) / phi.shape[1]
        if len(phi) < phi.shape[1]:  # Phi^T (Phi Phi^T + lambda)^-1 is the same, and smaller
            values, vectors = torch.linalg.eigh(phi @ phi.mT)
            left, right = vectors * values, vectors.mT @ (phi @ targets.mT) / values.unsqueeze(1)
        else:
            values, vectors = torch.linalg.eigh(phi.mT @ phi)
            left, right = phi @ vectors, vectors.mT @ targets.mT
        for place, share in enumerate(SWEEP):
            scores = (left / (values + share * mean)) @ right * q.unsqueeze(1)
            total[place] = total[place] + scores.numpy() / count
    return [np.asarray(scores) for scores in total]


def trak_sweep(traker: Any, count: int) -> list[Scores]:
    """Scores of trak's features at the same lambdas, by trak's own score computer."""
    computer, saver = traker.score_computer, traker.saver
    stores = []
    for model_id in range(count):
        saver.load_current_store(model_id)
        grads = torch.as_tensor(np.array(saver.current_store["grads"]))
        q = np.array(saver.current_store["out_to_loss"])
        saver.load_current_store(model_id, "targets", len(saver.current_store["targets_grads"]))
        targets = torch.as_tensor(np.array(saver.current_store["targets_grads"]))
        stores.append((grads, targets, q, computer.get_xtx(grads)))
    mean = sum(float(xtx.diagonal().mean()) for *_, xtx in stores) / count
    found: list[Scores] = []
    for share in SWEEP:
        computer.lambda_reg = share * mean
        total = torch.zeros(len(stores[0][0]), len(stores[0][1]))
        for grads, targets, _, xtx in stores:
            computer.get_scores(computer.get_x_xtx_inv(grads, xtx), targets, accumulator=total)
        weight = sum(q for *_, q, _ in stores) / count
        found.append(total.double().numpy() / count * weight)
    computer.lambda_reg = 0.0
    return found


def quick_lds(scores: Scores, truth: tuple[Any, Any]) -> float | None:
    """The LDS alone; None for scores that are not finite."""
    if not np.isfinite(scores).all():
        return None
    value = lds(scores, *truth, n_boot=1).mean
    return value if math.isfinite(value) else None


def as_dict(result: LDS) -> dict[str, float]:
    """Plain values for the result file."""
    return {"mean": result.mean, "low": result.low, "high": result.high}


def best(values: Sequence[float | None]) -> tuple[float, float]:
    """(the best LDS of a sweep, its lambda / mean eigenvalue)."""
    known = [
        (value, share) for value, share in zip(values, SWEEP, strict=True) if value is not None
    ]
    return max(known) if known else (math.nan, math.nan)


def faults(row: dict[str, Any]) -> list[str]:
    """What the default misses in a row."""
    found = []
    mean, half = row["default"]["mean"], (row["default"]["high"] - row["default"]["low"]) / 2
    if best(row["sweep"])[0] - mean > BELOW_BEST:
        found.append(f"default {best(row['sweep'])[0] - mean:.3f} below the best lambda")
    if "trak_sweep" in row and best(row["trak_sweep"])[0] - mean > half:
        found.append(f"default {best(row['trak_sweep'])[0] - mean:.3f} below trak's best")
    return found


HEADER = (
    "problem           n     k | default (95% CI)       lambda/mean | best   at      loss   | "
    "trak default  best   at"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    score, (top, at) = row["default"], best(row["sweep"])
    chosen = float(np.median(row["chosen"]))
    text = (
        f"{row['problem']:<14}{row['n']:>5}{row['k']:>6} | {score['mean']:.3f} "
        f"({score['low']:.3f} .. {score['high']:.3f})  {chosen:>11.3g} | {top:.3f}  {at:<7g} "
        f"{top - score['mean']:>6.3f} | "
    )
    if "trak_sweep" in row:
        default = row["trak_default"]
        other, where = best(row["trak_sweep"])
        left = f"{default['mean']:.3f}" if default else "not finite"
        text += f"{left:<13} {other:.3f}  {where:g}"
    return text


if __name__ == "__main__":
    sys.exit(main())
