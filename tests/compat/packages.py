"""The other packages, for the tests that run them: imported, or skipped with the reason."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

HOW = "`make compat` installs it beside the pinned torch"
_schemas: list[torch.library.Library] = []


def load(name: str) -> ModuleType:
    """The module ``name``; a skip that says what is missing where its package isn't installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        pytest.skip(f"{name.split('.')[0]} is not installed: {HOW}")
    _declare_torchvision()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{name} needs {error.name}, which is not installed: {HOW}")


def _declare_torchvision() -> None:
    """Let torchvision be imported beside a torch that its operators weren't built for.

    The wheel on PyPI is built for CUDA's torch; beside the CPU's its library doesn't load, and its
    Python fails for want of two schemas. Nothing in these tests calls them.
    """
    if _schemas or importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision.extension")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
