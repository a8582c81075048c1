"""Hashes of a model: which checkpoint it holds, and how its gradients are laid out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from torch import nn

from fastproj.trak.files import digest, tensor_digest


def model_digest(model: nn.Module) -> str:
    """Hash of all parameters and buffers of a model, with their names."""
    return combined_digest(model_digests(model))


def model_digests(model: nn.Module) -> dict[str, str]:
    """The hash of each parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor_digest(t) for name, t in named}


def combined_digest(digests: Mapping[str, str]) -> str:
    """Hash of several hashes and their names."""
    h = hashlib.blake2b(digest_size=16)
    for name, value in digests.items():
        h.update(f"{name}:{value};".encode())
    return h.hexdigest()


def layout_fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Hash of the names and shapes of the parameters in order: what decides a gradient's layout."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return digest(json.dumps([[name, shapes[name]] for name in names]).encode())
