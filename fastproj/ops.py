"""project, project_transpose, matrix: the public functions.

Each checks its arguments (``checks``) and makes one ``Call`` of them. It hands the call and 2-D
views of the tensors to ``torch_ops``.
"""

from __future__ import annotations

from typing import SupportsIndex

import torch
from torch import Tensor

from fastproj import torch_ops
from fastproj.call import Call
from fastproj.checks import (
    Grads,
    Rows,
    check_backend,
    check_copied,
    check_device,
    check_entries,
    check_flag,
    check_grads,
    check_input,
    check_integer,
    check_key,
    check_out,
    check_precision,
    check_proj_dim,
    check_row_numbers,
    check_rows,
    check_scale,
    describe,
)
from fastproj.spec import MAX_COLS, MAX_ROWS


def project(
    grads: Grads,
    proj_dim: SupportsIndex,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
    block: SupportsIndex | None = None,
    stream: SupportsIndex = 0,
    row_offset: SupportsIndex = 0,
    out: Tensor | None = None,
    accumulate: bool = False,
    scale: str | float | None = "jl",
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project per-sample gradients with a random matrix that is made on the fly.

    ``Y = scale * G @ R[row_offset : row_offset + P, :K]``. This is the same as ``scale * G @
    matrix(slice(row_offset, row_offset + P), K, seed, kind, stream=stream)`` (kind sjlt: with its
    ``block``).

    Parameters
    ----------
    grads : Tensor [B, P], strided, float32, bfloat16, float16 or float64, B >= 0, P >= 1; or a dict
        or sequence of [B, ...] tensors, flattened per sample and taken in order as one [B, P].
    proj_dim : K, 1 <= K <= 2^32.
    seed, stream : numbers that name the matrix; seed < 2^64, stream < 2^32 (a checkpoint's
        model_id).
    kind : "rademacher" (+1 / -1), "gaussian", or "sjlt" (sparse: K / block entries +1 / -1 a row,
        which costs K / block additions for each entry of G instead of K multiply-adds).
    block : of kind "sjlt" alone, and part of the matrix's name: a power of two, 16 to 65,536. None
        is ``fastproj.spec.default_block(K)``: the largest with at least four entries in a row, or
        16.
    row_offset : the row of R that the first column of ``grads`` meets; row_offset + P <= 2^56.
    out : Tensor [B, K] of the result's dtype on the device of ``grads``, written and returned.
    accumulate : add to ``out`` instead of overwriting it.
    scale : "jl" for 1 / sqrt(K) (sjlt: sqrt(block / K)), None for 1, or a number.
    precision : "highest", "high", "medium"; None follows torch.get_float32_matmul_precision().
    backend : "cuda", "triton", "cpu", "reference"; None leaves the choice to FASTPROJ_BACKEND or
        the registry.

    Returns
    -------
    Tensor [B, K], float64 for float64 grads, float32 otherwise. Differentiable in ``grads``.

    Raises
    ------
    TypeError, ValueError
        For anything it can't take, before ``out`` is touched.
    """
    function = "project"
    proj_dim = check_proj_dim(function, proj_dim)
    key = check_key(function, seed, kind, stream, block=block, proj_dim=proj_dim)
    call = Call(
        key,
        check_integer(function, "row_offset", row_offset, 0, MAX_ROWS),
        check_scale(function, scale, proj_dim, key.block),
        check_flag(function, "accumulate", accumulate),
        check_precision(function, precision),
    )
    return project_call(function, grads, proj_dim, call, check_backend(function, backend), out=out)


def project_call(
    function: str,
    grads: Grads,
    proj_dim: int,
    call: Call,
    backend: str = "",
    *,
    out: Tensor | None = None,
    grad_dim: int | None = None,
    whole: bool = False,
) -> Tensor:
    """``project`` on behalf of ``function``, which the messages name; checks tensors only.

    Where ``grad_dim`` is given, the rows must lie within it. Where ``whole`` is true, they must be
    all of it.
    """
    pieces = check_grads(function, grads)
    total = pieces[0].shape[1] if len(pieces) == 1 else sum([piece.shape[1] for piece in pieces])
    start = call.row_offset
    if grad_dim is None:
        if start + total > MAX_ROWS:
            raise ValueError(
                f"{function}: received row_offset={start} and grads with P={total}; "
                "expected row_offset + P <= 2^56"
            )
    elif whole and total != grad_dim:
        raise ValueError(
            f"{function}: received grads with P={total}; expected P = grad_dim = {grad_dim} "
            "(give row_offset= to project a piece of the gradient)"
        )
    elif start + total > grad_dim:
        raise ValueError(
            f"{function}: received row_offset={start} and grads with P={total}; "
            f"expected row_offset + P <= grad_dim = {grad_dim}"
        )
    if out is None:
        if call.accumulate:
            raise ValueError(f"{function}: received accumulate=True without out; expected out=")
        return torch_ops.project(pieces, proj_dim, call, backend)
    check_out(function, out, (pieces[0].shape[0], proj_dim), pieces, "grads")
    if not isinstance(grads, Tensor) and torch_ops.is_direct([out, *pieces]):
        check_copied(function, out, grads)
    torch_ops.project_into(function, pieces, out, call, backend)
    return out


def project_transpose(
    y: Tensor,
    rows: Rows,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
    block: SupportsIndex | None = None,
    stream: SupportsIndex = 0,
    scale: str | float | None = "jl",
    out: Tensor | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """The adjoint of ``project``: back from K dimensions to rows of R.

    ``G = scale * Y @ R[rows, :K].T``.

    Parameters
    ----------
    y : Tensor [B, K], strided, float32, bfloat16, float16 or float64, B >= 0, K >= 1.
    rows : the n rows to produce, an int for rows 0 .. n or a slice(start, stop).
    scale : "jl" for 1 / sqrt(K) (sjlt: sqrt(block / K)), None for 1, or a number.
    out : Tensor [B, n] of the result's dtype on the device of ``y``, written and returned.
    seed, kind, block, stream, precision, backend : as in ``project``.

    Returns
    -------
    Tensor [B, n], float64 for float64 y, float32 otherwise. Differentiable in ``y``.

    Raises
    ------
    TypeError, ValueError
        For anything it can't take, before ``out`` is touched.
    """
    function = "project_transpose"
    y = check_input(function, "y", y)
    if y.dim() != 2 or y.shape[1] == 0:
        raise ValueError(f"{function}: received y {describe(y)}; expected [B, K] with K >= 1")
    start, count = check_rows(function, "rows", rows, MAX_ROWS)
    key = check_key(function, seed, kind, stream, block=block, proj_dim=y.shape[1])
    call = Call(
        key,
        start,
        check_scale(function, scale, y.shape[1], key.block),
        precision=check_precision(function, precision),
    )
    name = check_backend(function, backend)
    if out is None:
        return torch_ops.project_transpose(y, count, call, name)
    check_out(function, out, (y.shape[0], count), [y], "y")
    torch_ops.project_transpose_into(function, y, out, call, name)
    return out


def matrix(
    rows: Rows | Tensor,
    cols: Rows,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
    block: SupportsIndex | None = None,
    stream: SupportsIndex = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Any block ``R[rows, cols]`` of the matrix, unscaled: what ``project`` multiplies with.

    Parameters
    ----------
    rows, cols : an int n for 0 .. n, or a slice(start, stop); rows < 2^56, columns < 2^32. Rows may
        also be a Tensor [n] of row numbers, integers in any order. NumPy makes such rows on the
        CPU, whichever the backend.
    block : needed for kind "sjlt", since no proj_dim gives a default here.
    dtype : a floating-point dtype, each of which holds the entries exactly; or int8 (not for
        Gaussian).
    device : where the block goes; None is torch's default device.
    seed, kind, stream, backend : as in ``project``.

    Returns
    -------
    Tensor [rows, cols] of ``dtype``, contiguous.

    Raises
    ------
    TypeError, ValueError
        For anything it can't take.
    """
    row, n = (
        (0, len(check_row_numbers("matrix", rows, MAX_ROWS)))
        if isinstance(rows, Tensor)
        else check_rows("matrix", "rows", rows, MAX_ROWS, ", or a tensor of row numbers")
    )
    col, m = check_rows("matrix", "cols", cols, MAX_COLS)
    key = check_key("matrix", seed, kind, stream, block=block)
    check_entries("matrix", dtype, kind)
    # Asked of a tensor because torch.compile can't trace torch.get_default_device.
    place = (
        torch.empty(0, device=None).device
        if device is None
        else check_device("matrix", device, values=False)
    )
    if n * m * dtype.itemsize >= 1 << 63:
        raise ValueError(
            f"matrix: received rows={rows} and cols={cols}: {n} x {m} entries; expected a block "
            "that fits in memory"
        )
    name = check_backend("matrix", backend)
    if isinstance(rows, Tensor):
        return torch_ops.matrix_rows(rows, m, col, dtype, place, Call(key))
    return torch_ops.matrix(n, m, col, dtype, place, Call(key, row), name)
