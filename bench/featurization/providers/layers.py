"""Models as other packages can take them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bench.featurization.workloads import logits_of


def with_linear_layers(model: nn.Module) -> nn.Module:
    """A copy whose ``Conv1D`` layers, as GPT-2 has them, are ``nn.Linear``."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer).__name__ == "Conv1D":
                weight: Any = layer.weight  # [I, O]
                linear = nn.Linear(*weight.shape)
                linear.weight = nn.Parameter(weight.detach().T.contiguous())
                linear.bias = layer.bias  # type: ignore[assignment]
                setattr(module, name, linear)
    return model


def output_layer(model: Any) -> nn.Module | None:
    """The layer of a language model that has an output for each word, or None."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def called_on_positions(model: nn.Module, batch: Mapping[str, Tensor]) -> set[str]:
    """The names of the modules whose input is [B, T, n]."""
    found: set[str] = set()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
                found.add(name)

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in model.named_modules()]
    with torch.no_grad():
        logits_of(model, {name: part[:1] for name, part in batch.items()})
    for handle in handles:
        handle.remove()
    return found


def samples_of(batch: Mapping[str, Tensor]) -> Any:
    """The samples of a batch, one by one: a data set."""
    return [dict(zip(batch, parts, strict=True)) for parts in zip(*batch.values(), strict=True)]
