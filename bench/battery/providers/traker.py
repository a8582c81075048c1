"""fastproj.TRAKer as it comes, by TRAK's features with its own rule, and over lambda."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.battery.providers.job import Floats, Found, Job
from fastproj import TRAKer
from fastproj.trak import AbstractModelOutput

# What makes TRAKer use TRAK's features and choose lambda for them; {} is TRAKer as it comes.
TRAK_RULE: dict[str, Any] = {"curvature": "trak"}
SWEEP = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)


def default(job: Job) -> Iterator[Found]:
    """TRAKer with none of its choices made."""
    traker = run(job, {})
    yield from found(traker, "default", job)


def rule(job: Job) -> Iterator[Found]:
    """TRAK's features: with TRAKer's rule, and by TRAK's formula at each lambda of SWEEP."""
    traker = run(job, TRAK_RULE)
    yield from found(traker, "trak_rule", job)
    yield from sweep(traker, job)


def run(job: Job, options: dict[str, Any]) -> TRAKer:
    """A TRAKer that has featurized all checkpoints and scored the targets with each."""
    traker = make(job, options)
    for model_id in range(len(job.checkpoints)):
        featurize(traker, job, model_id)
    return score(traker, job)


def make(job: Job, options: dict[str, Any]) -> TRAKer:
    """A TRAKer for the problem, with options."""
    problem = job.problem
    return TRAKer(
        problem.model().eval(),
        problem.question.task(AbstractModelOutput),
        problem.n,
        save_dir=job.folder,
        proj_dim=job.proj_dim,
        kind=job.kind,
        logging_level="ERROR",
        **options,
    )


def featurize(traker: TRAKer, job: Job, model_id: int) -> None:
    """Featurize the training samples with a checkpoint."""
    problem = job.problem
    traker.load_checkpoint(job.checkpoints[model_id], model_id)
    problem.question.prepare(traker, problem.samples)
    for batch in job.batches():
        traker.featurize(batch, num_samples=len(batch[0]))


def score(traker: TRAKer, job: Job) -> TRAKer:
    """Finalise, and score the targets with each checkpoint."""
    problem = job.problem
    traker.finalize_features()
    for model_id, checkpoint in enumerate(job.checkpoints):
        traker.start_scoring_checkpoint("targets", checkpoint, model_id, problem.m)
        traker.score(problem.targets, num_samples=problem.m)
    return traker


def found(traker: TRAKer, provider: str, job: Job) -> Iterator[Found]:
    """The scores of each group of checkpoints, and their lambdas as shares of the mean."""
    for count in job.counts:
        for group in job.groups(count):
            solved = [traker.saver.systems.read_solve(i) for i in group]
            details = {"lambda": [one.get("auto", {}).get("relative") for one in solved]}
            scores = np.array(traker.finalize_scores("targets", model_ids=group), np.float64)
            own = np.asarray(traker.self_influence(group), np.float64)
            yield Found(provider, count, scores, own, details=details)


def sweep(traker: TRAKer, job: Job) -> Iterator[Found]:
    """TRAK's scores, phi_i (Phi^T Phi + lambda I)^-1 phi_z Q_i, over SWEEP.

    lambda is a share of the mean eigenvalue; as in TRAK, products and Q are averaged apart.
    """

    def arrays(model_id: int) -> list[Floats]:
        phi = traker.saver.matrix(model_id).double()  # [n, k]
        targets = traker.saver.matrix(model_id, "targets").double()  # [m, k]
        values, left, right = decomposed(phi, targets)
        mean = float(phi.square().sum()) / phi.shape[1]
        made = [traker.saver.out_to_loss(model_id).double().numpy()]
        for share in SWEEP:
            shrunk = values + share * mean
            made.append(((left / shrunk) @ right).numpy())
            made.append((left.square() / shrunk).sum(1).numpy())
        return made

    for count, (q, *made) in job.means(map(arrays, range(len(job.checkpoints)))):
        for share, products, own in zip(SWEEP, made[::2], made[1::2], strict=True):
            yield Found("trak_sweep", count, products * q[:, None], own * q, setting=share)


def decomposed(phi: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, left, right): phi (Phi^T Phi + l I)^-1 targets^T is left / (values + l) @ right.

    And the same for phi itself with left^T in place of right.
    """
    if len(phi) < phi.shape[1]:  # Phi (Phi^T Phi + l)^-1 = (Phi Phi^T + l)^-1 Phi, which is smaller
        values, vectors = torch.linalg.eigh(phi @ phi.mT)
        values = values.clamp(min=1e-30)
        left = vectors * values.sqrt()
        return values, left, vectors.mT @ (phi @ targets.mT) / values.sqrt().unsqueeze(1)
    values, vectors = torch.linalg.eigh(phi.mT @ phi)
    return values.clamp(min=0), phi @ vectors, vectors.mT @ targets.mT
