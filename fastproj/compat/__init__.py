"""Other packages' projectors on fastproj's kernels: one module for each package.

========================= =======================================================================
``compat.fast_jl``        the six functions of fast_jl; ``install()`` makes ``import fast_jl`` work
``compat.trak``           the classes of ``trak.projectors``
``compat.dattri``         dattri's ``random_project``
``compat.bergson``        bergson's global projection
``compat.sjlt``           sjlt's ``SJLTProjection``
``compat.sklearn``        a scikit-learn transformer
========================= =======================================================================

The modules for packages that have no place to pass a projector in have an ``install()`` of their
own, which replaces that package's functions in place, and an ``uninstall()``. Importing this
package honours ``FASTPROJ_AS_FAST_JL=1``; see docs/dropin.md for scripts that can't be changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["install", "uninstall"]

FAST_JL_PATH = str(Path(__file__).parent / "as_fast_jl")  # holds nothing but fast_jl.py
ENVIRONMENT = "FASTPROJ_AS_FAST_JL"

_MODULES = ("bergson", "dattri", "fast_jl", "sjlt", "sklearn", "trak")

_log = logging.getLogger("fastproj")
_displaced: list[ModuleType] = []  # what ``shadow`` took out of sys.modules


def __getattr__(name: str) -> ModuleType:
    """A module of this package, imported when it is named."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install(*, shadow: bool = False) -> bool:
    """Let ``import fast_jl`` find ``fastproj.compat.fast_jl``, here and in spawned processes.

    ``importlib.util.find_spec("fast_jl")`` finds it too: a folder with a ``fast_jl.py`` goes to the
    end of ``sys.path``, so that a real fast_jl goes before it. Where the folder is there already,
    say because of an earlier ``shadow``, it keeps its place.

    Parameters
    ----------
    shadow : go before a real fast_jl, also one that was imported already. Names that other
        modules took from it (``from fast_jl import ...``) stay as they are.

    Returns
    -------
    bool, whether ``import fast_jl`` now gives ours.
    """
    if shadow:
        _remove_path()
        sys.path.insert(0, FAST_JL_PATH)
    elif FAST_JL_PATH not in sys.path:
        sys.path.append(FAST_JL_PATH)
    importlib.invalidate_caches()
    present = sys.modules.get("fast_jl")
    if present is not None and shadow and not _is_ours(present):
        _displaced.append(sys.modules.pop("fast_jl"))
        present = None
    if present is not None:
        ours, origin = _is_ours(present), getattr(present, "__file__", None)
    else:
        spec = importlib.util.find_spec("fast_jl")
        origin = spec.origin if spec is not None else None
        ours = origin is not None and Path(origin).parent == Path(FAST_JL_PATH)
    if ours:
        _log.info("import fast_jl gives fastproj.compat.fast_jl")
    else:
        _log.info(
            "import fast_jl gives the real one, %s; install(shadow=True) puts ours first", origin
        )
    return ours


def uninstall() -> None:
    """Undo ``install``: ``import fast_jl`` finds what it would without fastproj."""
    _remove_path()
    present = sys.modules.get("fast_jl")
    if present is not None and _is_ours(present):
        del sys.modules["fast_jl"]
    if _displaced:
        sys.modules.setdefault("fast_jl", _displaced[0])
        _displaced.clear()
    importlib.invalidate_caches()


def _remove_path() -> None:
    while FAST_JL_PATH in sys.path:
        sys.path.remove(FAST_JL_PATH)


def _is_ours(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(file).parent == Path(FAST_JL_PATH)


if os.environ.get(ENVIRONMENT) == "1":
    install()
