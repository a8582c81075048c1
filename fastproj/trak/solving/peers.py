"""Lambda in a mean over checkpoints: what one of them has learned by itself is shrunk."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fastproj.trak.progress import progress
from fastproj.trak.solving.finalizing import read_gram, sum_of_rows
from fastproj.trak.solving.ridge import for_mean, regularised
from fastproj.trak.solving.solve import ScoreComputer, full_precision
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


@full_precision()
def agreeing_multiple(systems: Systems, computer: ScoreComputer, model_ids: Sequence[int]) -> float:
    """The multiple of lambda, 1 or more, at which checkpoints tell best what the others say.

    The Newton step that lambda is chosen by has the outputs ``Phi (F + lambda I)^-1 u`` on the
    training samples. Their correlation with the mean of the other checkpoints' outputs grows with
    lambda as long as the step has much that is this checkpoint's alone. The multiple is where the
    mean correlation of all checkpoints is highest: see docs/research/lambda.md.
    """
    store = systems.store
    values = {i: store.column(i, "along").double() for i in model_ids}
    total = torch.stack(list(values.values())).sum(0)
    agreements: list[float] = []
    with progress("comparing checkpoints", len(TRIED) * len(model_ids), "step") as bar:
        for powers in TRIED:
            found = torch.zeros(len(powers), dtype=torch.float64, device="cpu")
            for model_id in model_ids:
                outputs = outputs_of(systems, computer, model_id, [STEP**p for p in powers])
                found += correlations(outputs, total - values[model_id])
                bar.update()
            agreements += found.tolist()
            if not agreements[-1] > max(agreements[:-1]):
                break
    multiple = STEP ** agreements.index(max(agreements))
    logger.info("lambda of %d checkpoints: %.3g times that of each", len(model_ids), multiple)
    return multiple


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
    size = gram.k * found.abs().amax(0)  # so that float32 holds them, and their sums
    steps = (found / size.clamp(min=torch.finfo(torch.float64).tiny)).mT
    out = torch.empty(store.train_set_size, len(multiples), dtype=torch.float64, device="cpu")
    reader = store.reader(model_id)
    blocks = sample_blocks(reader.index.order(), block_rows(store.proj_dim))
    for inds, _, features, _ in read_features([reader], blocks):
        product = computer.scores(features, steps)
        out[torch.from_numpy(inds)] = product.double()
    return out


def correlations(outputs: Tensor, others: Tensor) -> Tensor:
    """Of each column of ``outputs`` [n, c] with ``others`` [n]; 0 where one is constant."""
    x, y = outputs - outputs.mean(0), others - others.mean()
    size = x.norm(dim=0) * y.norm()
    return torch.where(size > 0, (x.mT @ y) / size, 0.0)
