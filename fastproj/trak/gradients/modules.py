"""Projections module by module: what each part of a model adds to the features of a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproj.trak.gradients.base import AbstractGradientComputer
from fastproj.trak.gradients.parts import Piece
from fastproj.trak.gradients.sinks import ModuleSink


def project_modules(
    computer: AbstractGradientComputer,
    batch: tuple[Any, ...],
    projector: Any,
    model_id: int,
) -> list[Tensor]:
    """The part of ``computer.project`` that each of ``modules_of`` the parameters adds, [B, k]."""
    own = getattr(computer, "project_modules", None)
    if own is not None:
        found: list[Tensor] = own(batch, projector, model_id)
        return found
    computer.on_trust = False
    computer.check_dependence(batch)
    chunks = []
    for grads, *_ in computer.iter_rows(batch):
        size = len(next(iter(grads.values())))
        sink = ModuleSink(computer.chosen, size, projector, model_id, {})
        for name, g in grads.items():
            if g.numel():  # a parameter may have no entries
                sink.add(name, Piece(0, g.detach().reshape(size, -1)))
        sink.flush()
        chunks.append(sink.outs)
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]
