"""What the build recorded about the compiled modules `fastproj._cpu` and `fastproj._cuda`."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def record() -> dict[str, dict[str, Any]]:
    """What was recorded about "cpu" and "cuda"; empty for a tree that was never built."""
    try:
        found: dict[str, dict[str, Any]] = importlib.import_module("fastproj._build_info").BUILT
    except ModuleNotFoundError:
        return {}
    return found


def absent(name: str, error: ImportError, advice: str) -> str:
    """Why the module of a backend isn't there, and the fix: the build's, else ``advice``."""
    reason = record().get(name, {}).get("reason") or f"{error}; {among_sources() or advice}"
    return f"fastproj._{name} is not built: {reason}"


def among_sources() -> str | None:
    """What to do where this package is a checkout's and not installed from there, else None.

    Python looks in its working folder first, so in a checkout it passes over an installed fastproj.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "build_native.py").is_file():
        return None
    if importlib.util.find_spec("fastproj.kernels") is not None:  # mapped by an editable install
        return None
    return (
        f"Python took fastproj from the sources in {folder}, where it is not installed: run Python "
        "in another folder, or `pip install -e .` in that one"
    )
