"""The option ``--block`` of commands that name a random matrix."""

from __future__ import annotations

import argparse

from fastproj.checks import check_block
from fastproj.commands.arguments import size
from fastproj.spec import MAX_BLOCK, MIN_BLOCK

_EXPECTED = f"a power of two from {MIN_BLOCK} to {MAX_BLOCK}"


def read_block(text: str) -> int:
    """The value of ``--block``, an integer; ``resolve_block`` says whether a kind can have it."""
    try:
        return size(text)
    except ValueError:  # its bounds alone would make a caller try 1
        raise argparse.ArgumentTypeError(f"received {text!r}; expected {_EXPECTED}") from None


def resolve_block(kind: str, block: int | None, cols: int) -> int:
    """The block that ``--block`` gives a matrix with ``cols`` columns; 0 of other kinds than sjlt.

    Raises ValueError, in options, for a block that can't be.
    """
    if kind != "sjlt" and block is not None:
        raise ValueError(
            f"--block: received W={block} with --kind {kind}; expected --kind sjlt, or no --block"
        )
    try:
        return check_block("--block", kind, block, cols)
    except ValueError:
        raise ValueError(f"--block: received W={block}; expected {_EXPECTED}") from None
