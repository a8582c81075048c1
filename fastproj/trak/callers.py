"""Whose line a warning is about."""

from __future__ import annotations

import sys
from types import FrameType


def stack_to_caller() -> int:
    """The ``stacklevel`` for ``warnings.warn`` at which neither fastproj nor torch is, nor a
    decorator of theirs.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and is_inside(frame):
        level, frame = level + 1, frame.f_back
    return level


def is_inside(frame: FrameType) -> bool:
    """Whether a frame is one of fastproj or torch, or of a context manager as a decorator."""
    name = str(frame.f_globals.get("__name__")).partition(".")[0]
    return name in ("fastproj", "torch", "contextlib")
