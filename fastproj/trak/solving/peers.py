"""Lambda in a mean over checkpoints: what one of them has learned by itself is shrunk."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.trak.progress import tracked
from fastproj.trak.solving.finalizing import read_gram, sum_of_rows
from fastproj.trak.solving.ridge import ROUNDED, fisher_meaning, for_mean, regularised
from fastproj.trak.solving.solve import ScoreComputer
from fastproj.trak.solving.systems import Systems
from fastproj.trak.store.features import block_rows, read_features, sample_blocks

STEP = 1.5  # from one multiple of lambda to the next
TRIED = ((0, 1), (2, 3, 4), (5, 6, 7, 8))  # powers of STEP, at once

logger = logging.getLogger("fastproj.trak")


def in_mean(systems: Systems, computer: ScoreComputer, model_ids: Sequence[int]) -> Systems:
    """The systems with the lambdas that checkpoints have where the scores of these are averaged."""
    kept = systems.multiples
    systems = systems.as_now(model_ids)
    found = {model_id: systems.read_solve(model_id) for model_id in model_ids}
    apart = [model_id for model_id in model_ids if found[model_id].get("peers")]
    multiple, key = 1.0, repr([(model_id, found[model_id]) for model_id in apart])
    if len(apart) > 1:
        if key not in kept:
            kept[key] = agreeing_multiple(systems, computer, apart)
        multiple = kept[key]
    for model_id, summary in found.items():
        lambda_reg = float(summary["lambda_reg"]) * (multiple if model_id in apart else 1.0)
        own_noise = float(summary.get("own_noise", 0.0))
        summary["lambda_reg"] = for_mean(lambda_reg, own_noise, len(model_ids))
    return Systems(systems.store, found)


def agreeing_multiple(systems: Systems, computer: ScoreComputer, model_ids: Sequence[int]) -> float:
    """The multiple of lambda, 1 or more, at which checkpoints tell best what the others say.

    The Newton step that lambda is chosen by has the outputs ``Phi (F + lambda I)^-1 u`` on the
    training samples. Their correlation with the mean of the other checkpoints' outputs grows with
    lambda as long as the step has much that is this checkpoint's alone. The multiple is where the
    mean correlation of all checkpoints is highest: see docs/research/lambda.md.
    """
    values = {i: systems.store.column(i, "along") for i in model_ids}
    total = torch.stack(list(values.values())).sum(0, dtype=torch.float64)
    side = sides(systems, model_ids)
    same = ROUNDED * len(model_ids)
    agreements: list[float] = []
    for powers in TRIED:
        found = torch.zeros(len(powers), dtype=torch.float64, device="cpu")
        for model_id in tracked(model_ids, "comparing checkpoints", len(model_ids), "checkpoint"):
            outputs = outputs_of(systems, computer, model_id, [STEP**p for p in powers])
            others = side * (total - values[model_id])
            found += correlations(outputs.mul_(side.unsqueeze(1)), others)
        agreements += found.tolist()
        if agreements[-1] <= max(agreements[:-1]) + same:
            break
    best = max(agreements) - same
    multiple = STEP ** next(i for i, agreement in enumerate(agreements) if agreement >= best)
    logger.info("lambda of %d checkpoints: %.3g times that of each", len(model_ids), multiple)
    return multiple


def sides(systems: Systems, model_ids: Sequence[int]) -> Tensor:
    """1 or -1, float64 [n]: by which outputs of two classes are log-odds of the right one.

    Those of class 1 for all samples agree on the labels, whatever the checkpoints have learned.
    """
    slopes, residual = torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
    for model_id in model_ids:
        q, curvature, along = (
            systems.store.column(model_id, name) for name in ("out_to_loss", "curvature", "along")
        )
        slopes = slopes + q
        residual += fisher_meaning(q, curvature, along).residual / len(model_ids)
    opposed = (slopes < 0) & (residual < 0.5)  # the residuals of a regression have both signs
    return torch.where(opposed, -1.0, 1.0).double()


def outputs_of(
    systems: Systems, computer: ScoreComputer, model_id: int, multiples: Sequence[float]
) -> Tensor:
    """Outputs of the step on the training samples, float64 [n, multiples], of lambda."""
    store, system = systems.store, systems.read_system(model_id)
    lam = float(systems.read_solve(model_id)["lambda_reg"])
    gram, moments = read_gram(systems, model_id, system)
    start = moments.response if system.dual else moments.fitted
    found = torch.stack([regularised(gram.matrix, lam * by, start) for by in multiples], 1)
    if system.dual:
        found = sum_of_rows(systems, model_id, system, found)
    out = torch.empty(store.train_set_size, len(multiples), dtype=torch.float64, device="cpu")
    reader = store.reader(model_id)
    blocks = sample_blocks(reader.index.order(), block_rows(store.proj_dim))
    for inds, _, features, _ in read_features([reader], blocks):
        out[torch.from_numpy(inds)] = computer.scores(features, found.mT).double()
    return out


def correlations(outputs: Tensor, others: Tensor) -> Tensor:
    """Of each column of ``outputs`` [n, c] with ``others`` [n]; 0 where one is constant."""
    x, y = outputs - outputs.mean(0), others - others.mean()
    size = x.norm(dim=0) * y.norm()
    return torch.where(size > 0, (x.mT @ y) / size, 0.0)
