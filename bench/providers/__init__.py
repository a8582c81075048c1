"""Who is timed: each provider prepares one case and returns the call to time and its own check."""

from __future__ import annotations

from providers import basic_projector, ours, stored
from providers.base import Case, Inputs, Prepared, Provider

__all__ = ["Case", "Inputs", "Prepared", "Provider", "all_providers"]


def all_providers() -> list[Provider]:
    """Every provider, in the order of the table."""
    return [*stored.providers(), *ours.providers(), *basic_projector.providers()]
