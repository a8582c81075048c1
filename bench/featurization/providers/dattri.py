"""dattri 0.3: TRAK's projection of whole gradients, and LoGra.

Compared: ``project`` is one batch of TRAKAttributor.cache up to the projected gradient: its
gradients by torch.func, its random projection at the same K. ``logra`` is LoGraAttributor.cache of
a batch without a Hessian: linear layers only, kept in memory, with 64 numbers for each side as it
recommends (4096 a layer); ``equal`` is the same with so few that all layers keep at most K.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bench.featurization.job import Job, Prepared, Unsupported
from bench.featurization.providers.layers import samples_of, with_linear_layers
from bench.featurization.providers.trakpkg import Logits, rename
from bench.featurization.workloads import losses_of
from fastproj.trak.gradients.attention import plain_attention

SIDE = 64


def project(job: Job) -> Prepared:
    """Per-sample gradients, then random_project of kind rademacher."""
    from dattri.func.projection import random_project
    from dattri.task import AttributionTask

    names = list(job.first)

    def loss(params: Any, sample: Any) -> Tensor:
        batch = {name: part.unsqueeze(0) for name, part in zip(names, sample, strict=True)}
        return torch.func.functional_call(Losses(job.model), rename(params), (batch,)).mean()

    task = AttributionTask(loss, job.model, job.model.state_dict())
    parameters, _ = task.get_param(ckpt_idx=0)
    gradients = task.get_grad_loss_func(in_dims=(None, 0))
    options = {"proj_dim": job.proj_dim, "proj_max_batch_size": 32, "proj_type": "rademacher"}

    def call(batch: dict[str, Tensor]) -> Any:
        with plain_attention(job.model):  # what torch.func can follow
            grads = gradients(parameters, tuple(batch.values()))
        size = len(batch["labels"])
        return random_project(grads, size, proj_seed=0, device="cpu", **options)(grads)

    return Prepared(call, job.proj_dim, warm_up=0, repeats=1)


class Losses(Logits):
    """The losses of a batch."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return losses_of(self.model, batch)


def logra(job: Job) -> Prepared:
    """LoGra of all linear layers, 64 x 64 numbers each."""
    return cache(job, lambda layers: SIDE)


def equal(job: Job) -> Prepared:
    """LoGra of all linear layers, at most K numbers in all."""
    return cache(job, lambda layers: max(1, math.isqrt(job.proj_dim // layers)))


def cache(job: Job, side_of: Callable[[int], int]) -> Prepared:
    """LoGra with the side that ``side_of`` their number gives the layers."""
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    model = with_linear_layers(job.model)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise Unsupported("LoGra takes linear layers only")

    def loss(model: nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
        return losses_of(model, batch).sum()

    task = AttributionTask(loss, model, model.state_dict())
    numbers = side_of(len(layers)) ** 2
    attributor = LoGraAttributor(task, layers, "Identity", proj_dim=numbers, cache_dir=job.folder)

    def call(batch: dict[str, Tensor]) -> None:
        samples = samples_of(batch)
        attributor.cache(DataLoader(samples, batch_size=len(samples)))

    return Prepared(call, numbers * len(layers))
