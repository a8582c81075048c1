"""Finalising: the Gram matrix of a checkpoint's features, and the lambda that is added to it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from fastproj.trak.distributed import Ranks
from fastproj.trak.features import FeatureReader, feature_stream, sample_blocks
from fastproj.trak.files import Indices, StoreError, Tensors
from fastproj.trak.inputs import IF_STORED, check_finite
from fastproj.trak.progress import progress
from fastproj.trak.ridge import Moments, are_probabilities, choose_lambda
from fastproj.trak.solve import AUTO, HALF_ROUNDING, Gram, Lambda, ScoreComputer, Solution
from fastproj.trak.store import Store

STEP = "finalize_features"
SUMMARY = ("method", "lambda_reg", "n", "rank", "condition")  # of Solution.summary
MAX_PARTS = 16  # that a Gram matrix is kept in until it is whole
PART_ROWS = 4096  # samples in a part, at least;
PART_ROWS_PER_DIM = 8  # and so many times k, for a part (8 k^2 bytes) to be smaller than they are

logger = logging.getLogger("fastproj.trak")


def finalize(
    store: Store,
    computer: ScoreComputer,
    model_ids: Sequence[int],
    lambda_reg: Lambda,
    ranks: Ranks,
    probabilities: bool | None = None,
) -> None:
    """Sum up the matrix that lambda is added to, choose lambda where it is "auto", and keep it.

    "auto" is added to Phi^T R Phi where Q are probabilities, otherwise, as every lambda that is
    given, to XtX. ``probabilities`` says whether they are; None looks at them.
    """
    weighted: list[int] = []
    with ranks.together(STEP):
        if ranks.first and lambda_reg == AUTO and probabilities is not False:
            weighted = [i for i in model_ids if curved(i, store.out_to_loss(i), probabilities)]
    weighted = ranks.gather(STEP, weighted)[0]
    missing = [i for i in model_ids if not store.has_gram(i, i in weighted)]
    # Rank 0's list: it may be writing while others still look.
    todo = ranks.gather(STEP, missing)[0]
    mine = len(todo) * store.train_set_size // ranks.size
    with progress("finalising features", mine, "sample") as bar:
        for model_id in todo:
            sum_gram(store, computer, model_id, model_id in weighted, ranks, bar.update)
    with ranks.together(STEP):
        for model_id in model_ids if ranks.first else ():
            keep_lambda(store, computer, model_id, model_id in weighted, lambda_reg)


def curved(model_id: int, q: Tensor, probabilities: bool | None) -> bool:
    """Whether Q [n] are probabilities; ValueError where the task says so and they can't be."""
    low, high = float(q.min()), float(q.max())
    if probabilities and not 0 <= low <= high <= 1:
        raise ValueError(
            f"{STEP}: model_id {model_id} has Q from {low:g} to {high:g}; expected 0..1, since the "
            "task's q_are_probabilities is True (None finds out; False takes Q for residuals)"
        )
    return bool(probabilities) or are_probabilities(q)


def keep_lambda(
    store: Store, computer: ScoreComputer, model_id: int, weighted: bool, lambda_reg: Lambda
) -> None:
    """Choose a checkpoint's lambda where it is "auto", check that it solves, and store it."""
    gram, moments = read_gram(store, model_id, weighted)
    value = lambda_reg
    facts: dict[str, Any] = {"lambda": lambda_reg, "weighted": weighted}
    if lambda_reg == AUTO:
        choice = choose_lambda(gram, moments)
        value, facts["auto"] = choice.lambda_reg, choice.summary()
        logger.info(
            "model_id %d: lambda %.3g (%.3g * mean) chosen by %s",
            model_id,
            choice.lambda_reg,
            choice.relative,
            choice.rule,
        )
    solution = computer.solve(gram, value)
    store.write_solve(model_id, {**facts, **solution.summary()})
    logger.info(
        "model_id %d: lambda %.3g, condition estimate %.1e",
        model_id,
        solution.lambda_reg,
        solution.condition,
    )


def solution_of(store: Store, computer: ScoreComputer, model_id: int) -> Solution:
    """The factored system of a finalised checkpoint, at the lambda it was finalised with."""
    stored = store.read_solve(model_id)
    gram, _ = read_gram(store, model_id, stored["weighted"])
    return computer.solve_again(gram, {name: stored[name] for name in SUMMARY})


def read_gram(store: Store, model_id: int, weighted: bool) -> tuple[Gram, Moments]:
    """XtX of a checkpoint, or Phi^T R Phi, and what was summed up beside it."""
    sums, n, eps = store.read_gram(model_id, weighted)
    rounding = HALF_ROUNDING if store.half else 0.0
    return Gram(sums["xtx"], n, eps, rounding), Moments.of(sums, weighted)


# ---- sums over all samples ----------------------------------------------------------------------


def sum_gram(
    store: Store,
    computer: ScoreComputer,
    model_id: int,
    weighted: bool,
    ranks: Ranks,
    advance: Callable[[int], Any],
) -> None:
    """Sum up and store Phi^T Phi of a checkpoint, or Phi^T R Phi, shared out over ranks.

    The parts that it is summed from, and their order, depend on the shards alone: so the sum is
    the same, bit for bit, for any number of ranks, and whether or not it was interrupted.
    """
    parts = gram_parts(sample_blocks(store.index(model_id).shard), store.proj_dim)
    reader = FeatureReader(store, model_id)

    def write(blocks: Sequence[Indices], part: int | None) -> None:
        moments = Moments(store.proj_dim, weighted)
        rows = moments.over(counted(feature_stream([reader], blocks), advance))
        gram = computer.gram(rows, store.proj_dim, store.train_set_size)
        sums = {"xtx": gram.xtx, **moments.tensors()}
        store.write_gram(model_id, sums, gram.n, gram.eps, weighted, part)

    with ranks.together(STEP):
        if len(parts) == 1:
            if ranks.first:
                write(parts[0], None)
            return
        for number in range(ranks.rank, len(parts), ranks.size):
            if not store.has_gram(model_id, weighted, number):
                write(parts[number], number)
    with ranks.together(STEP):
        if ranks.first and not store.has_gram(model_id, weighted):  # else a process apart was first
            try:
                total = add_parts(store, model_id, weighted, len(parts))
            except StoreError:
                if not store.has_gram(model_id, weighted):
                    raise
            else:
                store.write_gram(model_id, *total, weighted)
        if ranks.first:
            store.remove_parts(model_id, weighted)


def add_parts(
    store: Store, model_id: int, weighted: bool, count: int
) -> tuple[Tensors, int, float]:
    """The sums of all parts, in order, how many samples they are of, and how exact."""
    total, n, eps = store.read_gram(model_id, weighted, 0)
    total = {name: t.clone() for name, t in total.items()}
    for number in range(1, count):
        part, rows, _ = store.read_gram(model_id, weighted, number)
        n += rows
        for name, t in part.items():
            total[name] += t
    return total, n, eps


def counted(
    stream: Iterator[tuple[Indices, int, Tensor, Tensor | None]], advance: Callable[[int], Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, Q) of a stream, checked to be finite and told to the progress bar."""
    for rows, _, features, q in stream:
        assert q is not None  # training shards have it
        check_finite(STEP, "stored features", features, rows, IF_STORED)
        yield features, q
        advance(len(rows))


def gram_parts(blocks: Sequence[Indices], proj_dim: int) -> list[list[Indices]]:
    """The blocks in at most MAX_PARTS runs: what a Gram matrix is shared out and kept by."""
    total = sum(len(rows) for rows in blocks)
    size = max(-(-total // MAX_PARTS), PART_ROWS, PART_ROWS_PER_DIM * proj_dim)
    parts: list[list[Indices]] = [[]]
    for rows in blocks:
        if sum(len(r) for r in parts[-1]) >= size:
            parts.append([])
        parts[-1].append(rows)
    return parts
