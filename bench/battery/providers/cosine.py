"""Cosines between the loss gradient of a sample and the output gradient of a target."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import grad, vmap

from bench.battery.problem import Batch, Problem
from bench.battery.providers.job import Floats, Found, Job
from bench.battery.training import Checkpoint

BATCH = 50  # gradients at once


def scores(job: Job) -> Iterator[Found]:
    """Their mean over checkpoints; nothing is projected. A sample's with itself is 1."""
    problem = job.problem

    def cosines(checkpoint: Checkpoint) -> list[Floats]:
        likelihood = gradients(problem, checkpoint, "likelihood", problem.samples)
        output = gradients(problem, checkpoint, "output", problem.targets)
        return [(unit(likelihood) @ unit(output).mT).double().numpy()]

    for count, (mean,) in job.means(map(cosines, job.checkpoints)):
        yield Found("cosine", count, mean)


def gradients(problem: Problem, checkpoint: Checkpoint, of: str, samples: Batch) -> Tensor:
    """Gradients [B, P] of the "output" or "likelihood" of each sample."""
    model = problem.model().eval()
    function = getattr(problem.question, of)

    def one(weights: Checkpoint, *sample: Tensor) -> Tensor:
        batch = tuple(part.unsqueeze(0) for part in sample)
        return function(model, weights, batch).reshape(())

    each = vmap(grad(one), (None, *(0 for _ in samples)))
    parts = []
    for rows in torch.arange(len(samples[0])).split(BATCH):
        made = each(checkpoint, *(part[rows] for part in samples))
        parts.append(torch.cat([g.flatten(1) for g in made.values()], 1))
    return torch.cat(parts)


def unit(rows: Tensor) -> Tensor:
    """Rows divided by their norms; 0 stays 0."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
