"""Values that commands read from their command line."""

from __future__ import annotations

import argparse
import math

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    try:
        value = int(float(text)) if "e" in text.lower() else int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}; expected an integer of at least 1")
    return value


def size(text: str) -> int:
    """ "4096", "1e7" or "10**8" as an integer of at least 1. Raises ValueError."""
    base, power, exponent = text.partition("**")
    try:
        value = float(base) ** int(exponent) if power else float(text) if "e" in text else int(text)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value < math.inf or value != int(value):
        raise ValueError(f"received {text!r}; expected an integer of at least 1")
    return int(value)
