"""trak.TRAKer 0.3.2, where it is installed: as it comes, and over lambda."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.battery.problem import Classes, Regression
from bench.battery.providers.job import BATCH, Floats, Found, Job, Unsupported
from bench.battery.providers.traker import SWEEP


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
            traker.start_scoring_checkpoint("targets", checkpoint, model_id, count)
            traker.score(problem.targets, num_samples=count)
        yield from over_lambda(traker, job)


def over_lambda(traker: Any, job: Job) -> Iterator[Found]:
    """ "trak" at lambda 0, which is its default, and "trak_own_sweep" over SWEEP."""
    computer, saver = traker.score_computer, traker.saver
    totals: dict[float, Floats] = {share: np.zeros(()) for share in (0.0, *SWEEP)}
    weight: Floats = np.zeros(())
    for done in range(1, max(job.counts) + 1):
        saver.load_current_store(done - 1)
        grads = torch.as_tensor(np.array(saver.current_store["grads"]))
        weight = weight + np.array(saver.current_store["out_to_loss"])
        saver.load_current_store(done - 1, "targets", job.problem.m)
        targets = torch.as_tensor(np.array(saver.current_store["targets_grads"]))
        xtx = computer.get_xtx(grads)
        for share in totals:
            computer.lambda_reg = share * float(xtx.diagonal().mean())
            product = torch.zeros(len(grads), len(targets))
            try:
                computer.get_scores(computer.get_x_xtx_inv(grads, xtx), targets, product)
            except torch.linalg.LinAlgError:
                product.fill_(torch.nan)
            totals[share] = totals[share] + product.double().numpy()
        computer.lambda_reg = 0.0
        if done in job.counts:
            for share, total in totals.items():
                found = total / done * weight / done
                if share:
                    yield Found("trak_own_sweep", done, found, setting=share)
                else:
                    yield Found("trak", done, found)
