"""Who is timed: each provider prepares one case and returns the call to time and its own check."""

from __future__ import annotations

from bench.providers import basic_projector, generated, others_gpu, ours, ours_gpu, stored
from bench.providers.base import Case, Inputs, Prepared, Provider

__all__ = ["Case", "Inputs", "Prepared", "Provider", "all_providers"]


def all_providers(device: str = "cpu", ladder: bool = False) -> list[Provider]:
    """Every provider for a device, in the order of the table.

    ladder : one for each family of CUDA kernels, from the simplest correct one to the best.
    """
    if device == "cpu":
        return [*stored.providers(device), *ours.providers(), *basic_projector.providers()]
    mine = ours_gpu.ladder() if ladder else ours_gpu.providers()
    return [*stored.providers(device), *mine, *generated.providers(), *others_gpu.providers()]
