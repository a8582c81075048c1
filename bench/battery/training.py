"""Train many copies of a problem's model at once, and keep what they learn.

A cache folder holds, for each problem, a folder ``<name>-<fingerprint>`` with

    checkpoints-<count>-<seed>.pt         state dicts of models trained on everything
    halves-<seed>-<run>-<number>.pt       PART models trained on random halves: "masks" [PART, n],
                                          "output" and "likelihood" [PART, m] of the targets

Each file is written to a temporary name and renamed: a run that was stopped is repeated, and trains
what is missing.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import stack_module_state, vmap

from bench.battery.problem import Batch, Problem
from fastproj.testbed.ensembles import Ensemble, Loss, random_halves, train_ensemble

GROUP = 25  # models trained at once by a thread: few enough for a core's cache
PART = 50  # models of a file

Checkpoint = dict[str, Tensor]


@dataclass(frozen=True)
class Truth:
    """What models trained on random halves do with the targets.

    masks : bool [S, n], which samples each was trained on.
    output, likelihood : [runs, S, m], of several retrainings.
    """

    masks: Tensor
    output: Tensor
    likelihood: Tensor


def default_cache() -> Path:
    """$FASTPROJ_BENCH_CACHE, or a folder in the user's cache."""
    own = os.environ.get("FASTPROJ_BENCH_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else base / "fastproj-bench"


def train(problem: Problem, members: Tensor, seed: int, what: str) -> Ensemble:
    """Train M models, model j on the training samples ``members[j]`` [M, s], GROUP at once."""
    torch.manual_seed(seed)
    models = [problem.model() for _ in members]
    start, _ = stack_module_state(models)

    def make_loss() -> Loss:
        skeleton = copy.deepcopy(models[0])  # functional_call changes it: one for each thread

        def loss_of_one(weights: Ensemble, *batch: Tensor) -> Tensor:
            return problem.question.loss(skeleton, weights, batch)

        return lambda params, rows: vmap(loss_of_one)(
            params, *(part[rows] for part in problem.samples)
        ).sum()

    start = {name: p.detach() for name, p in start.items()}
    return train_ensemble(
        start, members, make_loss, problem.training, group=GROUP, seed=seed, what=what
    )


def evaluate(problem: Problem, params: Ensemble, batch: Batch) -> tuple[Tensor, Tensor]:
    """(outputs, log-likelihoods) [M, B] of each of M models on each of B samples."""
    skeleton, question = problem.model(), problem.question
    count = len(next(iter(params.values())))
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad():
        for rows in torch.arange(count).split(GROUP):
            some = {name: p[rows] for name, p in params.items()}
            for function, parts in zip((question.output, question.likelihood), found, strict=True):
                parts.append(vmap(lambda w, f=function: f(skeleton, w, batch))(some))
    return torch.cat(found[0]), torch.cat(found[1])


def folder_of(problem: Problem, cache: Path) -> Path:
    """Where the problem's files are."""
    return cache / f"{problem.name}-{problem.fingerprint()}"


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What ``path`` holds, made and written if it isn't there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".part{os.getpid()}")
        torch.save(make(), part)
        part.replace(path)
    return torch.load(path)


def checkpoints(problem: Problem, count: int, cache: Path, seed: int = 1) -> list[Checkpoint]:
    """State dicts of models trained on the whole training set from different seeds."""

    def make() -> list[Checkpoint]:
        everything = torch.arange(problem.n).expand(count, -1).contiguous()
        params = train(problem, everything, seed, f"{problem.name}: training {count} checkpoints")
        return [{name: p[c].clone() for name, p in params.items()} for c in range(count)]

    found: list[Checkpoint] = kept(
        folder_of(problem, cache) / f"checkpoints-{count}-{seed}.pt", make
    )
    return found


def ground_truth(
    problem: Problem, subsets: int, cache: Path, seed: int = 2, retrainings: int | None = None
) -> Truth:
    """What models trained on ``subsets`` random halves do; each is trained several times."""
    folder = folder_of(problem, cache)
    count = -(-subsets // PART)
    members, masks = random_halves(problem.n, count * PART, seed)
    runs = []
    for run in range(retrainings or problem.retrainings):
        parts = []
        for number in range(count):
            rows = slice(number * PART, min(subsets, (number + 1) * PART))
            name = f"{problem.name}: halves {rows.start} to {rows.stop} of {subsets}, run {run + 1}"
            some = members[rows], masks[rows]

            def make(some: Any = some, name: str = name, own: int = number, run: int = run) -> Any:
                params = train(problem, some[0], (seed * 100 + run) * 1000 + own, name)
                output, likelihood = evaluate(problem, params, problem.targets)
                return {"masks": some[1], "output": output, "likelihood": likelihood}

            whole = "" if rows.stop - rows.start == PART else f"-of-{rows.stop - rows.start}"
            parts.append(kept(folder / f"halves-{seed}-{run}-{number}{whole}.pt", make))
        runs.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
    return Truth(
        runs[0]["masks"],
        torch.stack([run["output"] for run in runs]),
        torch.stack([run["likelihood"] for run in runs]),
    )
