"""The options of commands that name TRAKer's random matrix."""

from __future__ import annotations

from typing import Any

from fastproj.commands.arguments import positive
from fastproj.commands.block import read_block, resolve_block
from fastproj.spec import KINDS
from fastproj.trak.inputs import FEW_SAMPLES, MOST_DIMS, PROJ_DIM, default_kind


def add_matrix(parser: Any) -> None:
    """``--proj-dim``, ``--kind`` and ``--block``, which are None where they aren't given."""
    parser.add_argument(
        "--proj-dim",
        type=positive,
        metavar="K",
        help=f"dimension of the features (default: {PROJ_DIM}; up to {MOST_DIMS} for at most "
        f"{FEW_SAMPLES} samples and kind sjlt)",
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="of random matrix (default: sjlt from K = 16 on, rademacher below)",
    )
    parser.add_argument(
        "--block", type=read_block, metavar="W", help="of kind sjlt (default: by --proj-dim)"
    )


def resolve_matrix(kind: str | None, block: int | None, proj_dim: int) -> tuple[str, int]:
    """The kind and block that TRAKer takes for ``--kind`` and ``--block``; block 0 of other kinds.

    Raises ValueError, in options, for a block that can't be.
    """
    kind = default_kind(proj_dim, block) if kind is None else kind
    return kind, resolve_block(kind, block, proj_dim)
