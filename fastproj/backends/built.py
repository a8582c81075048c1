"""What the build recorded about the compiled modules `fastproj._cpu` and `fastproj._cuda`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import warnings
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


def outdated(name: str) -> str | None:
    """What to do where a checkout's sources aren't those of its module, else None.

    An editable install shows Python's files as they are now, and modules as they were compiled.
    """
    root = checkout()
    digests: dict[str, str] = record().get(name, {}).get("sources", {})
    if root is None or all(digest_of(root / path) == digest for path, digest in digests.items()):
        return None
    return (
        f"fastproj._{name} was compiled from other sources than {root / 'csrc'} has now: "
        "`pip install -e .` there compiles it again"
    )


def warn_of_outdated(name: str) -> None:
    """Warn of what ``outdated`` says."""
    found = outdated(name)
    if found is not None:
        warnings.warn(found, RuntimeWarning, stacklevel=2)


def digest_of(path: Path) -> str | None:
    """As the build's ``source_digests`` has it; None of a file that can't be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return None


def checkout() -> Path | None:
    """The checkout that this package lies in, if it does."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "build_native.py").is_file() else None


def among_sources() -> str | None:
    """What to do where this package is a checkout's and not installed from there, else None.

    Python looks in its working folder first, so in a checkout it passes over an installed fastproj.
    """
    folder = checkout()
    if folder is None:
        return None
    if importlib.util.find_spec("fastproj.kernels") is not None:  # mapped by an editable install
        return None
    return (
        f"Python took fastproj from the sources in {folder}, where it is not installed: run Python "
        "in another folder, or `pip install -e .` in that one"
    )
