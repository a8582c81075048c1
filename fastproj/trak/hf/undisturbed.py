"""A model in training, used for something else and left as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastproj.trak.loaded import bounded

AUTOCAST = "_original_forward"  # accelerate's name for the forward that it wraps in autocast


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within the block the model may be used in eval mode; afterwards a training goes on as if it
    had not been.

    Kept are the mode of each module, ``requires_grad`` and ``grad`` of the parameters, the weights
    of embeddings with ``max_norm``, whose rows are scaled when the model is used, and the states of
    Python's, numpy's and torch's random numbers. Within, the model's forward is its own,
    without the autocast that accelerate puts around it.
    """
    modes = {module: module.training for module in model.modules()}
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    scaled = [(module.weight, module.weight.detach().clone()) for module in bounded(model)]
    wrapped = vars(model).get("forward") if AUTOCAST in vars(model) else None
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one
    of_torch = [(module, module.get_rng_state()) for module in random_modules(model)]
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        if wrapped is not None:
            model.forward = vars(model)[AUTOCAST]
        yield
    finally:
        if wrapped is not None:
            model.forward = wrapped
        for module, training in modes.items():
            module.training = training
        for p, requires_grad, grad in grads:
            p.requires_grad_(requires_grad)
            p.grad = grad
        with torch.no_grad():
            for weight, kept in scaled:
                weight.copy_(kept)
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for source, state in of_torch:
            source.set_rng_state(state)
        if of_cuda:
            torch.cuda.set_rng_state_all(of_cuda)


def random_modules(model: nn.Module) -> list[Any]:
    """Torch and the module of the model's device, if it has random numbers; but not torch.cuda."""
    kinds = {p.device.type for p in model.parameters()} - {"cpu", "cuda", "meta"}
    modules = [torch, *(torch.get_device_module(kind) for kind in sorted(kinds))]
    return [module for module in modules if hasattr(module, "get_rng_state")]
