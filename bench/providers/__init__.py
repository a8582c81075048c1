"""Who is timed: each provider prepares one case and returns the call to time and its own check."""

from __future__ import annotations

from bench.providers import (
    basic_projector,
    generated,
    memory,
    others_gpu,
    ours,
    ours_gpu,
    sparse_stored,
    stored,
)
from bench.providers.base import DENSE_KINDS, Case, Inputs, Prepared, Provider

__all__ = ["DENSE_KINDS", "Case", "Inputs", "Prepared", "Provider", "all_providers"]


def all_providers(
    device: str = "cpu", ladder: bool = False, kind: str = "rademacher"
) -> list[Provider]:
    """Every provider for a device and a kind, in the order of the table.

    ladder : one for each family of CUDA kernels, from the simplest correct one to the best.
    """
    if kind == "sjlt" and not ladder:
        others = sparse_stored.providers(device)
        if device == "cpu":
            mine = [*ours.providers(("highest",)), *ours.dense_providers()]
            return [*memory.providers(), *mine, *others]
        mine = ours_gpu.sparse_providers()
        return [*memory.providers(), *mine, *others, *others_gpu.sparse_providers()]
    if device == "cpu":
        return [*stored.providers(device), *ours.providers(), *basic_projector.providers()]
    mine = ours_gpu.ladder() if ladder else ours_gpu.providers()
    return [*stored.providers(device), *mine, *generated.providers(), *others_gpu.providers()]
