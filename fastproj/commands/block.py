"""The option ``--block`` of commands that name a random matrix."""

from __future__ import annotations

from fastproj.checks import check_block
from fastproj.spec import MAX_BLOCK, MIN_BLOCK


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
        raise ValueError(
            f"--block: received W={block}; expected a power of two from {MIN_BLOCK} to {MAX_BLOCK}"
        ) from None
