"""fastproj.TRAKer.featurize: features on disk, samples and features checked."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.featurization.job import Job, Prepared, Unsupported
from fastproj import TRAKer

# Features alone. The default curvature also draws for at most 2 K samples of a training set, which
# costs up to as much again for these: "default" does so for every sample.
FEATURES = {"curvature": "trak"}

# Batches 1, 2, 4, 8 ... of a checkpoint are checked against plain autograd: few of a long run, but
# most of the first ones.
WARM_UP = 4


def prepare(job: Job, linear: bool = False, **options: Any) -> Prepared:
    """TRAKer with these options, the rest as it comes.

    linear : gradients by the weights of linear layers alone, as other packages take them.
    """
    names = linear_weights(job.model) if linear else [n for n, _ in job.model.named_parameters()]
    if linear:
        options["grad_wrt"] = names
    try:
        traker = TRAKer(
            job.model,
            job.workload.task,
            job.count,
            save_dir=job.folder,
            proj_dim=job.proj_dim,
            logging_level="ERROR",
            **options,
        )
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise Unsupported(f"this fastproj can't: {error}") from error
    traker.load_checkpoint(job.model.state_dict(), model_id=0)

    def call(batch: dict[str, Tensor]) -> None:
        traker.featurize(batch, num_samples=len(batch["labels"]))

    found = partial(against_gradient, traker, names) if options.get("curvature") == "trak" else None
    computer = {"computer": getattr(traker.gradient_computer, "name", None)}
    return Prepared(call, job.proj_dim, WARM_UP, check=found, details=computer)


def linear_weights(model: nn.Module) -> list[str]:
    """The names of the weights of all linear layers, also of GPT-2's Conv1D, in the model."""
    names = {id(p): name for name, p in model.named_parameters()}  # a shared weight's first one
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    ]
    return list(dict.fromkeys(names[id(layer.weight)] for layer in layers))


def against_gradient(traker: Any, names: list[str], batch: dict[str, Tensor]) -> float:
    """|phi|^2 / |grad f|^2 of the sample that was featurized last, the last of ``batch``.

    names : of the parameters that gradients are meant to be taken by.
    """
    model = traker.model
    model.zero_grad(set_to_none=True)
    sample = {name: part[-1:] for name, part in batch.items()}
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    chosen = [weights[name] for name in names]
    out = traker.task.outputs(model, weights, buffers, (sample,))
    grads = torch.autograd.grad(out.sum(), chosen, allow_unused=True)
    exact = sum(float(g.double().square().sum()) for g in grads if g is not None)
    done = int(traker.saver.index(0).done.sum())
    features = traker.saver.matrix(0)[done - 1].double() * traker.normalize_factor
    return float(features.square().sum()) / traker.proj_dim / exact
