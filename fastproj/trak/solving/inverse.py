"""The inverse that a finalised checkpoint's scores are made with: one factor is held at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastproj.trak.solving.finalizing import ONE_RIDGE, gram_of, stored_rows, weights_of
from fastproj.trak.solving.solve import Gram, ScoreComputer, Solution
from fastproj.trak.solving.systems import Systems
from fastproj.trak.store.features import block_rows, read_features, sample_blocks

SUMMARY = ("method", "lambda_reg", "n", "rank", "condition")  # of Solution.summary


def ridges_of(systems: Systems, model_id: int) -> list[tuple[float, float]]:
    """(ridge, weight) of the inverses whose mean a finalised checkpoint's scores are made with."""
    summary = systems.read_solve(model_id)
    lam = float(summary["lambda_reg"])
    return [(lam * by, weight) for by, weight in summary.get("ridges", ONE_RIDGE)]


def solved(
    systems: Systems, computer: ScoreComputer, model_id: int, ridge: float
) -> tuple[Solution, Gram]:
    """The system of a finalised checkpoint, factored with one of its ridges, and its matrix."""
    systems = systems.as_now([model_id])
    system = systems.read_system(model_id)
    stored = systems.read_solve(model_id)
    sums, n, eps = systems.read_gram(model_id, system)
    gram = gram_of(systems.store, system, sums, n, eps)
    summary = {**{name: stored[name] for name in SUMMARY}, "lambda_reg": ridge}
    solution = computer.solve_again(gram, summary)
    if system.dual:
        rows = stored_rows(systems.store, model_id, system, sums["order"].numpy())
        solution = replace(solution, rows=rows)
    return solution, gram


def apply_inverse(
    systems: Systems, computer: ScoreComputer, model_id: int, targets: Tensor
) -> Tensor:
    """Targets [m, k] times the inverse of a finalised checkpoint, float64 [m, k]."""
    parts = (
        solved(systems, computer, model_id, ridge)[0].apply(targets).mul_(weight)
        for ridge, weight in ridges_of(systems, model_id)
    )
    total = next(parts)
    for part in parts:
        total.add_(part)
    return total


def with_image(
    systems: Systems, computer: ScoreComputer, model_id: int, targets: Tensor
) -> tuple[Tensor, Tensor, float]:
    """(weights, S^T S times them, trace of S^T S); weights as of ``apply_inverse``."""

    def at(ridge: float, weight: float) -> tuple[Tensor, Tensor, float]:
        solution, gram = solved(systems, computer, model_id, ridge)
        trace = gram.trace
        del gram  # its matrix
        part = solution.apply(targets).mul_(weight)
        image = targets.to(part, copy=True).mul_(weight).sub_(part, alpha=solution.lambda_reg)
        return part, image, trace

    first, *others = ridges_of(systems, model_id)
    weights, image, trace = at(*first)
    for ridge, weight in others:
        part, left, _ = at(ridge, weight)
        weights.add_(part)
        image.add_(left)
    return weights, image, trace


def own_scores(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> Tensor:
    """``phi inverse phi`` of each training sample, float64 [n]."""
    total = torch.zeros(systems.store.train_set_size, dtype=torch.float64, device="cpu")
    by = own_scores_dual if systems.read_system(model_id).dual else own_scores_primal
    for ridge, weight in ridges_of(systems, model_id):
        total.add_(by(systems, computer, model_id, ridge, advance), alpha=weight)
    return total


def own_scores_dual(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    ridge: float,
    advance: Callable[[int], Any],
) -> Tensor:
    """``phi (S^T S + ridge I)^-1 phi`` of each training sample, float64 [n], by the dual."""
    system, store = systems.read_system(model_id), systems.store
    solution, gram = solved(systems, computer, model_id, ridge)
    order = systems.read_order(model_id, system)
    out = torch.empty(int(order.max()) + 1, dtype=torch.float64, device="cpu")
    out[order] = solution.on_own_rows(gram.matrix)
    samples = out[: store.train_set_size]  # the others are rows that were drawn
    advance(len(samples))
    return samples / weights_of(store, model_id, system)


def own_scores_primal(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    ridge: float,
    advance: Callable[[int], Any],
) -> Tensor:
    """The same by S^T S, with a pass over the features."""
    store = systems.store
    out = torch.empty(store.train_set_size, dtype=torch.float64, device="cpu")
    solution = solved(systems, computer, model_id, ridge)[0]
    reader = store.reader(model_id)
    blocks = sample_blocks(reader.index.order(), block_rows(store.proj_dim))
    for rows, _, features, _ in read_features([reader], blocks):
        own = (solution.apply(features) * features.double()).sum(1)
        out[torch.from_numpy(rows)] = own.cpu()
        advance(len(rows))
    return out
