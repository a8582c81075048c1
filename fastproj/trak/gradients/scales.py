"""Numbers that gradients by each parameter are multiplied by before they are projected.

They are the metric that inner products of gradients are taken in, and so a part of what features
are: training samples, drawn rows and targets must have the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastproj.factored import FactoredProjector
from fastproj.projector import Projector


def size_factors(sizes: Mapping[str, int], power: float) -> dict[str, float]:
    """``(P / largest P)^power`` for each parameter of P entries, by name; P is at least 1."""
    largest = max(sizes.values())
    return {name: (max(size, 1) / largest) ** power for name, size in sizes.items()}


class ScaledProjector:
    """A projector before which gradients are multiplied by a number for each parameter.

    Parameters
    ----------
    projector : has ``proj_dim`` and ``project(grads, model_id=)``.
    factors : by name, in the order of the parameters; positive.
    """

    def __init__(self, projector: Any, factors: Mapping[str, float]) -> None:
        self.projector = projector
        self.factors = dict(factors)
        self.proj_dim = projector.proj_dim

    def project(self, grads: Mapping[str, Tensor], model_id: int = 0) -> Tensor:
        """``projector.project`` of ``factors[name] * grads[name]``, each [B, *shape]."""
        if not isinstance(grads, Mapping) or set(grads) != set(self.factors):
            found = list(grads) if isinstance(grads, Mapping) else type(grads).__name__
            raise TypeError(
                f"TRAKer: the gradient computer gave gradients {found!r:.80}; expected a dict by "
                f"the names of all {len(self.factors)} parameters, which have different scales "
                "(Fisher(size_power=0) needs no names)"
            )
        scaled = {name: times(grads[name], factor) for name, factor in self.factors.items()}
        made: Tensor = self.projector.project(scaled, model_id=model_id)
        return made


def times(g: Tensor, factor: float) -> Tensor:
    """``factor * g``, in float32 at least: 16 bits would round it."""
    return g.to(torch.promote_types(g.dtype, torch.float32)) * factor


def unscaled(projector: Any) -> tuple[Any, Mapping[str, float]]:
    """What projects, and the numbers by name that gradients are multiplied by before; none is 1."""
    if isinstance(projector, ScaledProjector):
        return projector.projector, projector.factors
    return projector, {}


def projects_pieces(projector: Any) -> bool:
    """Whether it takes gradients piece by piece.

    A ``FactoredProjector`` with a ``project`` of its own takes whole ones: pieces are compressed by
    its sides and would pass by what it overrides.
    """
    projector, _ = unscaled(projector)
    if isinstance(projector, FactoredProjector):
        return getattr(projector.project, "__func__", None) is FactoredProjector.project
    return isinstance(projector, Projector)


def for_each(
    projector: Projector, factors: Mapping[str, float], names: Sequence[str]
) -> dict[str, Projector]:
    """A projector for the gradient by each parameter, which multiplies for nothing."""
    return {n: projector.scaled(factors[n]) if n in factors else projector for n in names}
