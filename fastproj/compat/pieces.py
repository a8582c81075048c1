"""Gradients as other packages hand them over: moved, in pieces, of several dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import SupportsIndex

import torch
from torch import Tensor

from fastproj import checks, ops
from fastproj.call import Call
from fastproj.spec import MAX_BLOCK, MIN_BLOCK

KINDS = {"normal": "gaussian", "rademacher": "rademacher"}


def kind_of(function: str, proj_type: object, kinds: Mapping[str, str] = KINDS) -> str:
    """fastproj's word for a ``ProjectionType`` or its value, by ``kinds``.

    Raises
    ------
    ValueError
        For anything that isn't a key of ``kinds``.
    """
    name = getattr(proj_type, "value", proj_type)
    if not isinstance(name, str) or name not in kinds:
        expected = " or ".join(repr(kind) for kind in kinds)
        raise ValueError(f"{function}: received proj_type={proj_type!r}; expected {expected}")
    return kinds[name]


def block_below(width: int) -> int:
    """The block of kind sjlt for one entry in ``width`` columns, width >= 1.

    The power of two at or below ``width``, between MIN_BLOCK and MAX_BLOCK.
    """
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << width.bit_length() - 1))


def as_pieces(
    grads: Tensor | Mapping[str, Tensor] | Sequence[Tensor], device: torch.device | str
) -> list[Tensor]:
    """``grads`` as a list of detached tensors on ``device``."""
    if isinstance(grads, Mapping):
        grads = list(grads.values())
    pieces = [grads] if isinstance(grads, Tensor) else list(grads)
    return [piece.detach().to(device) for piece in pieces]


def project_pieces(
    function: str,
    pieces: list[Tensor],
    proj_dim: SupportsIndex,
    seed: SupportsIndex,
    kind: str,
    *,
    stream: SupportsIndex,
    scale: str | float | None,
    row_offset: int = 0,
    grad_dim: int | None = None,
    block: int | None = None,
) -> Tensor:
    """``fastproj.project`` of tensors that may differ in dtype, as ``function`` in its messages.

    Neighbours of one dtype are projected in one call; the calls' results are added up.

    Returns
    -------
    Tensor [B, proj_dim], float64 where a piece is float64, float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        For what ``fastproj.project`` refuses, and for a total width other than ``grad_dim``.
    """
    check_batch(function, pieces)
    total = sum(width(piece) for piece in pieces)
    if grad_dim is not None and total != grad_dim:
        raise ValueError(
            f"{function}: received gradients of {total} entries per sample; "
            f"expected {grad_dim}, what the projector was made for"
        )
    proj_dim = checks.check_proj_dim(function, proj_dim)
    key = checks.check_key(function, seed, kind, stream, block=block)
    factor = checks.check_scale(function, scale, proj_dim, key.block)
    call = Call(key, row_offset, factor, precision="")
    pieces = [piece for piece in pieces if width(piece)] or pieces  # a call takes no empty ones
    y: Tensor | None = None
    for _, group in groupby(pieces, key=lambda piece: piece.dtype):
        run = list(group)
        part = ops.project_call(
            function, run[0] if len(run) == 1 and run[0].dim() == 2 else run, proj_dim, call
        )
        y = part if y is None else y + part
        call = call._replace(row_offset=call.row_offset + sum(width(piece) for piece in run))
    if y is None:
        raise ValueError(f"{function}: received no gradients; expected a tensor or a dict of them")
    return y


def check_batch(function: str, pieces: Sequence[Tensor]) -> None:
    """Raise ValueError unless all are of one batch size: sums of several calls would broadcast."""
    for piece in pieces:
        if piece.dim() and piece.shape[:1] != pieces[0].shape[:1]:
            raise ValueError(
                f"{function}: received {checks.describe(pieces[0])} and {checks.describe(piece)}; "
                "expected one batch size throughout (grads of one batch)"
            )


def width(piece: Tensor) -> int:
    """Entries per sample of a [B, ...] tensor."""
    return math.prod(piece.shape[1:])
