"""The progress bar of work that may take long."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress(what: str, total: int, unit: str) -> Any:
    """A progress bar on a terminal, nothing elsewhere."""
    return tqdm(desc=what, total=total, unit=unit, unit_scale=True, leave=False, disable=None)
