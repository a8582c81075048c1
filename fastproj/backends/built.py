"""What the build recorded about the compiled modules `fastproj._cpu` and `fastproj._cuda`."""

from __future__ import annotations

import importlib
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
    reason = record().get(name, {}).get("reason") or f"{error}; {advice}"
    return f"fastproj._{name} is not built: {reason}"
