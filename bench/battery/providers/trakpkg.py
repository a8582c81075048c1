"""trak.TRAKer 0.3.2, where it is installed: as it comes, and over lambda."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.battery.problem import Classes, Regression
from bench.battery.providers.job import BATCH, Floats, Found, Job, Unsupported
from bench.battery.providers.traker import SWEEP, decomposed

ROWS = 256  # of an inverse whose size is measured


def scores(job: Job) -> Iterator[Found]:
    """trak in float32 on the CPU, by its own projector (which draws its own matrix)."""
    try:
        from trak import TRAKer
        from trak.modelout_functions import AbstractModelOutput
    except ImportError as error:
        raise Unsupported(f"trak: {error}") from error
    question = job.problem.question
    images = isinstance(question, Classes) and question.name == "image_classification"
    if not images and not isinstance(question, Regression):
        raise Unsupported("trak: here it takes images and regression only")
    problem, count = job.problem, job.problem.m
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of float16 and of singular matrices
        traker = TRAKer(
            model=problem.model().eval(),
            task=question.task(AbstractModelOutput),
            train_set_size=problem.n,
            save_dir=job.folder,
            proj_dim=job.proj_dim,
            logging_level=logging.ERROR,
            use_half_precision=False,
            device="cpu",
        )
        for model_id, checkpoint in enumerate(job.checkpoints):
            traker.load_checkpoint(checkpoint, model_id)
            for rows in torch.arange(problem.n).split(BATCH):
                batch = tuple(part[rows] for part in problem.samples)
                traker.featurize(batch, num_samples=len(rows))
        for model_id, checkpoint in enumerate(job.checkpoints):
            finalize(traker, model_id)
            traker.start_scoring_checkpoint("targets", checkpoint, model_id, count)
            traker.score(problem.targets, num_samples=count)
        yield from over_lambda(traker, job)


def finalize(traker: Any, model_id: int) -> None:
    """trak's own step, without which it takes no targets; features are NaN where it fails."""
    try:
        traker.finalize_features([model_id])
    except torch.linalg.LinAlgError:  # as it comes, lambda is 0: XtX of few samples is singular
        traker.saver.current_store["features"][:] = np.nan
        traker.saver.model_ids[model_id]["is_finalized"] = 1
        traker.saver.serialize_current_model_id_metadata()


def over_lambda(traker: Any, job: Job) -> Iterator[Found]:
    """ "trak" at lambda 0, which is its default, and by its formula "trak_own_sweep" over SWEEP.

    As in trak, the inverse of XtX is divided by the mean size of its entries.
    """
    saver = traker.saver

    def arrays(model_id: int) -> list[Floats]:
        saver.load_current_store(model_id)
        phi = torch.tensor(np.array(saver.current_store["grads"]), dtype=torch.float64)
        own = np.array(saver.current_store["features"], np.float64)
        weight = np.array(saver.current_store["out_to_loss"], np.float64)
        saver.load_current_store(model_id, "targets", job.problem.m)
        targets = torch.tensor(np.array(saver.current_store["targets_grads"]), dtype=torch.float64)
        made = [weight, own @ targets.numpy().T]
        values, left, right = decomposed(phi, targets)
        mean = float(phi.square().sum()) / phi.shape[1]
        for share in SWEEP:
            ridge = share * mean
            product = (left / (values + ridge)) @ right / size_of_inverse(phi, left, values, ridge)
            made.append(product.numpy())
        return made

    for count, (weight, own, *made) in job.means(map(arrays, range(len(job.checkpoints)))):
        yield Found("trak", count, own * weight)
        for share, found in zip(SWEEP, made, strict=True):
            yield Found("trak_own_sweep", count, found * weight, setting=share)


def size_of_inverse(phi: Tensor, left: Tensor, values: Tensor, ridge: float) -> float:
    """The mean size of the entries of (Phi^T Phi + ridge I)^-1, by some of its rows."""
    step = max(1, phi.shape[1] // ROWS)
    rotated = left.mT @ phi  # values * V^T
    some = torch.eye(phi.shape[1], dtype=phi.dtype)[::step]
    some -= (rotated[:, ::step] / (values * (values + ridge)).unsqueeze(1)).mT @ rotated
    return float(some.abs().mean()) / ridge
