"""bergson's random projections on fastproj: one matrix for each identifier, never stored.

``install()`` replaces two functions of ``bergson.collector.collector``: ``project_global``, which
multiplies each module's gradients with blocks of a matrix that it materialises, and
``create_projection_matrix``, behind the two-sided projection of single modules. An identifier (the
module's name, role and seed) becomes fastproj's 64-bit seed, so both agree with each other and on
every device.

Source: bergson 2.5.1, https://github.com/EleutherAI/bergson, for names and meaning.
"""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor

import fastproj
from fastproj.compat.patching import Patch, needed, takes
from fastproj.compat.pieces import kind_of
from fastproj.compat.sketch import column_squares

__all__ = ["create_projection_matrix", "install", "project_global", "seed_of", "uninstall"]

MATERIALIZED = 1 << 27  # entries of outer products formed at once: 512 MB in float32


def seed_of(identifier: str) -> int:
    """The 64-bit seed of the matrix named ``identifier``: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "little")


def create_projection_matrix(
    identifier: str,
    m: int,
    n: int,
    dtype: torch.dtype,
    device: torch.device | str,
    projection_type: str = "normal",
    projection_scale: str = "jl",
) -> Tensor:
    """``R[:n, :m].T`` of the matrix named ``identifier``, scaled.

    Parameters
    ----------
    projection_type : "normal" or "rademacher".
    projection_scale : "jl" for 1/sqrt(m), "row_norm" for rows of length 1.

    Returns
    -------
    Tensor [m, n] of ``dtype`` on ``device``.

    Raises
    ------
    ValueError
        For another type or scale.
    """
    kind = kind_of("create_projection_matrix", projection_type)
    _check_scale("create_projection_matrix", projection_scale)
    made = torch.float64 if dtype is torch.float64 else torch.float32  # rounded once
    r = fastproj.matrix(n, m, seed_of(identifier), kind, dtype=made, device=device)  # [n, m]
    if projection_scale == "row_norm":
        r /= _column_norms(identifier, n, m, kind, r.device).to(made)
    else:
        r /= sqrt(m)
    return r.T.to(dtype)


def project_global(
    identifier: str,
    P: Any,
    m: int,
    projection_type: str = "normal",
    projection_scale: str = "jl",
) -> Tensor:
    """``P @ create_projection_matrix(identifier, m, n, ...).T`` without the matrix.

    Parameters
    ----------
    P : Tensor [N, n], or bergson's OuterProductGradients, whose rows are formed MATERIALIZED
        entries at a time.

    Returns
    -------
    Tensor [N, m], float64 for float64 gradients, float32 otherwise: sums over modules are not
    rounded to half precision.

    Raises
    ------
    ValueError
        For another type or scale.
    """
    kind = kind_of("project_global", projection_type)
    _check_scale("project_global", projection_scale)
    seed = seed_of(identifier)
    scale = "jl" if projection_scale == "jl" else None
    if isinstance(P, Tensor):
        y = fastproj.project(P.detach(), m, seed, kind, scale=scale)
    else:
        parts = [
            fastproj.project(_materialized(rows), m, seed, kind, scale=scale)
            for rows in _row_blocks(P)
        ]
        dtype = torch.float64 if P.g.dtype is torch.float64 else torch.float32
        y = torch.cat(parts) if parts else P.g.new_zeros((0, m), dtype=dtype)
    if projection_scale == "row_norm":
        n = P.shape[1] if isinstance(P, Tensor) else P.g.shape[-1] * P.a.shape[-1]
        y /= _column_norms(identifier, n, m, kind, y.device).to(y.dtype)
    return y


def _materialized(P: Any) -> Tensor:
    """The gradients of ``P``, [N, n].

    A divisor can take half-precision gradients out of their range, so they take its dtype first.
    """
    if P.divisor is not None:
        P = P.to(P.g.device, P.divisor.dtype)
    p: Tensor = P.materialize().detach()
    return p.flatten(1)


def _row_blocks(P: Any) -> list[Any]:
    """``P`` cut along its rows into pieces of at most MATERIALIZED entries."""
    rows = P.g.shape[0]
    step = max(1, MATERIALIZED // (P.g.shape[-1] * P.a.shape[-1]))
    per_row = [
        field.name
        for field in fields(P)
        if field.name in ("g", "a", "bias") and getattr(P, field.name) is not None
    ]
    return [
        replace(P, **{name: getattr(P, name)[start : start + step] for name in per_row})
        for start in range(0, rows, step)
    ]


def _check_scale(function: str, scale: str) -> None:
    if scale not in ("jl", "row_norm"):
        raise ValueError(
            f"{function}: received projection_scale={scale!r}; expected 'jl' or 'row_norm'"
        )


@lru_cache(maxsize=4096)
def _column_norms(identifier: str, n: int, m: int, kind: str, device: torch.device) -> Tensor:
    """Norms [m], float64, of the columns of R[:n, :m]: those of the rows of bergson's matrix."""
    if kind == "rademacher":
        return torch.full((m,), sqrt(n), dtype=torch.float64, device=device)
    return column_squares(n, m, seed_of(identifier), kind, device).sqrt()


_patch = Patch()


def install() -> None:
    """Replace bergson's projection in place, wherever loaded modules hold it.

    Call it before an index is built, and use one projection for all of an index: bergson records
    its own version number with an index, and can't tell ours from its own.

    Raises
    ------
    ImportError
        Where bergson isn't installed, or is older than 0.13.1: it scaled otherwise.
    """
    theirs = needed("bergson.install", "bergson.collector.collector", "bergson")
    made_by = theirs.create_projection_matrix
    takes("bergson.install", made_by, "projection_scale", "bergson>=0.13.1")
    if not _patch.active:
        pairs: list[tuple[Any, Any]] = [(made_by, create_projection_matrix)]
        if hasattr(theirs, "project_global"):  # older versions multiply with the matrix above
            pairs.append((theirs.project_global, project_global))
        _patch.apply(pairs)


def uninstall() -> None:
    """Put bergson's own functions back."""
    _patch.undo()
