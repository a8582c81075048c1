"""fastproj: random projection whose matrix is made on the fly, and TRAK on top of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from fastproj import namesake
from fastproj.backends.registry import available_backends
from fastproj.factored import FactoredProjector
from fastproj.ops import matrix, project, project_transpose
from fastproj.projector import Projector
from fastproj.spec import SPEC_VERSION

if TYPE_CHECKING:
    from fastproj.trak import TRAKer

__version__ = "0.1.0"
__all__ = [
    "SPEC_VERSION",
    "FactoredProjector",
    "Projector",
    "TRAKer",
    "__version__",
    "available_backends",
    "matrix",
    "project",
    "project_transpose",
]

_problem = namesake.problem()
if _problem is not None:
    warnings.warn(f"fastproj: {_problem}", stacklevel=2)


def __getattr__(name: str) -> Any:
    """TRAKer on first use: projecting needs none of what TRAK imports."""
    if name == "TRAKer":
        from fastproj.trak import TRAKer

        return TRAKer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
