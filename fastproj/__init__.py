"""fastproj: random projection whose matrix is made on the fly, and TRAK on top of it."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from fastproj import namesake

if TYPE_CHECKING:
    from fastproj import backends as backends
    from fastproj import call as call
    from fastproj import checks as checks
    from fastproj import compat as compat
    from fastproj import factored as factored
    from fastproj import gauss_table as gauss_table
    from fastproj import ops as ops
    from fastproj import projector as projector
    from fastproj import spec as spec
    from fastproj import torch_ops as torch_ops
    from fastproj import trak as trak
    from fastproj.backends.registry import available_backends
    from fastproj.factored import FactoredProjector
    from fastproj.ops import matrix, project, project_transpose
    from fastproj.projector import Projector
    from fastproj.spec import SPEC_VERSION
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
_PLACES = {
    "available_backends": "fastproj.backends.registry",
    "matrix": "fastproj.ops",
    "project": "fastproj.ops",
    "project_transpose": "fastproj.ops",
    "FactoredProjector": "fastproj.factored",
    "Projector": "fastproj.projector",
    "SPEC_VERSION": "fastproj.spec",
}
# Modules that may be used without a further import. Each comes alone: one may ask for another while
# it is being imported itself.
_MODULES = (
    "call",
    "checks",
    "factored",
    "gauss_table",
    "ops",
    "projector",
    "spec",
    "torch_ops",
)

# Packages that come when they are named: projecting needs none of them.
_PACKAGES = ("compat", "trak")

_problem = namesake.problem()
if _problem is not None:
    warnings.warn(f"fastproj: {_problem}", stacklevel=2)


if not TYPE_CHECKING:  # to a type checker every name would be there, misspelt ones too

    def __getattr__(name: str) -> Any:
        """What is public, imported when the first of it is used.

        Importing torch takes seconds, in which the ``fastproj`` command must already take Ctrl-C.
        TRAKer comes by itself: projecting needs none of what TRAK imports.
        """
        if name == "TRAKer":
            from fastproj.trak import TRAKer

            return TRAKer
        if name in _MODULES or name in _PACKAGES:
            return importlib.import_module(f"fastproj.{name}")
        if name in _PLACES or name == "backends":  # its registry comes with it
            modules = {place: importlib.import_module(place) for place in _PLACES.values()}
            globals().update({n: getattr(modules[place], n) for n, place in _PLACES.items()})
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
