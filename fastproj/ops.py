"""project, project_transpose, matrix: the public functions, the custom ops, the way to a backend.

The public functions check their arguments (``checks``), turn them into plain ones (2-D views,
integers, a float scale) and call one custom op; eager calls that nothing needs to trace skip
torch's dispatcher and call the same function directly.
"""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastproj.backends import registry
from fastproj.checks import (
    DTYPES,
    MAX_SEED,
    MAX_STREAM,
    Grads,
    Rows,
    check_backend,
    check_copied,
    check_device,
    check_grads,
    check_input,
    check_integer,
    check_kind,
    check_memory,
    check_out,
    check_precision,
    check_rows,
    check_scale,
    describe,
    result_dtype,
    signed_seed,
)
from fastproj.spec import MAX_COLS, MAX_ROWS, MatrixKey

_PLAIN = (Tensor, torch.nn.Parameter)


# ---- the operations ----------------------------------------------------------------------------
# What runs behind the checks. The op of the same name wraps each; strings stay as given
# ("" = default) so that a compiled graph follows torch's precision when it runs.


def _key(kind: str, seed: int, stream: int) -> MatrixKey:
    return MatrixKey(kind, seed & (MAX_SEED - 1), stream)


_TORCH_FP32_PRECISION = {"bf16": "medium", "tf32": "high"}  # torch >= 2.9; the rest are exact


def _precision(precision: str, device_type: str) -> str:
    """``precision``, or what torch is set to for float32 matmuls on this kind of device.

    Where torch's newer per-device settings are in use, its older word for all of them is refused.
    """
    if precision:
        return precision
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        place = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        return _TORCH_FP32_PRECISION.get(place.matmul.fp32_precision, "highest")


def _project(
    pieces: list[Tensor],
    proj_dim: int,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    precision: str,
    backend: str,
) -> Tensor:
    first = pieces[0]
    out = first.new_empty((first.shape[0], proj_dim), dtype=result_dtype(first.dtype))
    _fill(pieces, out, seed, kind, stream, row_offset, scale, False, precision, backend)
    return out


def _project_into(
    pieces: list[Tensor],
    out: Tensor,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    accumulate: bool,
    precision: str,
    backend: str,
) -> None:
    check_memory("project", out, pieces, "grads")
    _fill(pieces, out, seed, kind, stream, row_offset, scale, accumulate, precision, backend)


def _fill(
    pieces: list[Tensor],
    out: Tensor,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    accumulate: bool,
    precision: str,
    backend: str,
) -> None:
    first = pieces[0]
    precision = _precision(precision, first.device.type)
    chosen = registry.choose(
        first.device.type,
        first.dtype,
        kind,
        backend,
        shape=(out.shape[0], out.shape[1]),
        precision=precision,
        index=first.device.index,
    )
    if out.shape[0] != 0:
        chosen.project(
            pieces,
            out,
            key=_key(kind, seed, stream),
            row_offset=row_offset,
            scale=scale,
            accumulate=accumulate,
            precision=precision,
        )


def _project_transpose(
    y: Tensor,
    rows: int,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    precision: str,
    backend: str,
) -> Tensor:
    out = y.new_empty((y.shape[0], rows), dtype=result_dtype(y.dtype))
    _fill_transpose(y, out, seed, kind, stream, row_offset, scale, precision, backend)
    return out


def _project_transpose_into(
    y: Tensor,
    out: Tensor,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    precision: str,
    backend: str,
) -> None:
    check_memory("project_transpose", out, [y], "y")
    _fill_transpose(y, out, seed, kind, stream, row_offset, scale, precision, backend)


def _fill_transpose(
    y: Tensor,
    out: Tensor,
    seed: int,
    kind: str,
    stream: int,
    row_offset: int,
    scale: float,
    precision: str,
    backend: str,
) -> None:
    chosen = registry.choose(y.device.type, y.dtype, kind, backend)
    if out.numel() != 0:
        chosen.project_transpose(
            y,
            out,
            key=_key(kind, seed, stream),
            row_offset=row_offset,
            scale=scale,
            precision=_precision(precision, y.device.type),
        )


def _matrix(
    rows: int,
    cols: int,
    row_offset: int,
    col_offset: int,
    seed: int,
    kind: str,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    out = torch.empty((rows, cols), dtype=dtype, device=device)
    if out.is_meta:
        return out
    chosen = registry.choose(out.device.type, dtype, kind, backend)
    if out.numel() != 0:
        chosen.matrix(
            out, key=_key(kind, seed, stream), row_offset=row_offset, col_offset=col_offset
        )
    return out


_KEY_SCHEMA = "SymInt seed, str kind, SymInt stream, SymInt row_offset, float scale"
_HOW_SCHEMA = "str precision, str backend"
_REST = 8  # arguments of project and project_transpose after the tensors

_project_op = torch.library.custom_op(
    "fastproj::project",
    _project,
    mutates_args=(),
    schema=f"(Tensor[] pieces, SymInt proj_dim, {_KEY_SCHEMA}, {_HOW_SCHEMA}) -> Tensor",
)
_project_into_op = torch.library.custom_op(
    "fastproj::project_into",
    _project_into,
    mutates_args=("out",),
    schema=f"(Tensor[] pieces, Tensor(a!) out, {_KEY_SCHEMA}, bool accumulate, "
    f"{_HOW_SCHEMA}) -> ()",
)
_project_transpose_op = torch.library.custom_op(
    "fastproj::project_transpose",
    _project_transpose,
    mutates_args=(),
    schema=f"(Tensor y, SymInt rows, {_KEY_SCHEMA}, {_HOW_SCHEMA}) -> Tensor",
)
_project_transpose_into_op = torch.library.custom_op(
    "fastproj::project_transpose_into",
    _project_transpose_into,
    mutates_args=("out",),
    schema=f"(Tensor y, Tensor(a!) out, {_KEY_SCHEMA}, {_HOW_SCHEMA}) -> ()",
)
_matrix_op = torch.library.custom_op(
    "fastproj::matrix",
    _matrix,
    mutates_args=(),
    schema="(SymInt rows, SymInt cols, SymInt row_offset, SymInt col_offset, SymInt seed, "
    "str kind, SymInt stream, ScalarType dtype, Device device, str backend) -> Tensor",
)


# ---- shapes for tracing, derivatives, vmap -----------------------------------------------------


@_project_op.register_fake
def _(pieces: list[Tensor], proj_dim: int, *rest: object) -> Tensor:
    first = pieces[0]
    return first.new_empty((first.shape[0], proj_dim), dtype=result_dtype(first.dtype))


@_project_transpose_op.register_fake
def _(y: Tensor, rows: int, *rest: object) -> Tensor:
    return y.new_empty((y.shape[0], rows), dtype=result_dtype(y.dtype))


@_project_into_op.register_fake
def _(*args: object) -> None:
    return None


@_project_transpose_into_op.register_fake
def _(*args: object) -> None:
    return None


@_matrix_op.register_fake
def _(
    rows: int,
    cols: int,
    row_offset: int,
    col_offset: int,
    seed: int,
    kind: str,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> Tensor:
    return torch.empty((rows, cols), dtype=dtype, device=device)


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pieces, ctx.proj_dim, *ctx.rest = inputs
    ctx.sizes = [piece.shape[1] for piece in pieces]
    ctx.dtype = pieces[0].dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (
        _piece_gradients(_project_transpose_op, ctx, grad, ctx.needs_input_grad[0]),
        *[None] * _REST,
    )


def _piece_gradients(transpose: Any, ctx: Any, grad: Tensor, needed: Any) -> list[Tensor | None]:
    """dL/dG_i = scale * dL/dY @ R[rows of piece i].T, in the dtype of the pieces."""
    seed, kind, stream, row, *how = ctx.rest
    gradients: list[Tensor | None] = []
    for size, wanted in zip(ctx.sizes, needed, strict=True):
        g = transpose(grad, size, seed, kind, stream, row, *how).to(ctx.dtype) if wanted else None
        gradients.append(g)
        row = row + size
    return gradients


def _project_transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, ctx.rows, *ctx.rest = inputs
    ctx.proj_dim, ctx.dtype = y.shape[1], y.dtype


def _project_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dL/dY = scale * dL/dG @ R[rows], in the dtype of y."""
    return (_project_op([grad], ctx.proj_dim, *ctx.rest).to(ctx.dtype), *[None] * _REST)


_project_op.register_autograd(_project_backward, setup_context=_project_setup)
_project_transpose_op.register_autograd(
    _project_transpose_backward, setup_context=_project_transpose_setup
)


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` [B, p] mapped over ``dim`` as [size * B, p]; an unmapped one is repeated."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.reshape(size * t.shape[1], t.shape[2])


def _unfold(t: Tensor, size: int) -> Tensor:
    """``t`` [size * B, n] as [size, B, n]."""
    return t.view(size, t.shape[0] // size, t.shape[1])


def _project_vmap(run: Any, size: int, dims: Any, pieces: Any, *rest: Any) -> tuple[Tensor, int]:
    """``run`` once for all ``size`` members: they become rows of one batch."""
    folded = [_fold(t, dim, size) for t, dim in zip(pieces, dims, strict=True)]
    return _unfold(run(folded, *rest), size), 0


def _transpose_vmap(run: Any, size: int, dim: Any, y: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return _unfold(run(_fold(y, dim, size), *rest), size), 0


if hasattr(_project_op, "register_vmap"):  # torch >= 2.5; for torch.vmap inside torch.compile
    _project_op.register_vmap(
        lambda info, dims, *args: _project_vmap(_project_op, info.batch_size, dims[0], *args)
    )
    _project_transpose_op.register_vmap(
        lambda info, dims, *args: _transpose_vmap(
            _project_transpose_op, info.batch_size, dims[0], *args
        )
    )


class _ProjectFunction(torch.autograd.Function):
    """project under torch.func transforms and forward mode, where a custom op's rule is not used.

    Arguments: those of ``_project_op`` after its pieces, then the pieces.
    """

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _project_op(list(args[_REST:]), *args[:_REST])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _project_setup(ctx, (inputs[_REST:], *inputs[:_REST]), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[_REST:]
        return (*[None] * _REST, *_piece_gradients(_run_transpose, ctx, grad, needed))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Linear: the sum of each tangent's projection, at its own rows."""
        seed, kind, stream, row, *how = ctx.rest
        total = None
        for size, tangent in zip(ctx.sizes, tangents[_REST:], strict=True):
            if tangent is not None:
                y = _run_project([tangent], ctx.proj_dim, seed, kind, stream, row, *how)
                total = y if total is None else total + y
            row = row + size
        assert total is not None  # jvp is called only where an input has a tangent
        return total

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rest, pieces = args[:_REST], args[_REST:]
        return _project_vmap(_run_project, info.batch_size, in_dims[_REST:], pieces, *rest)


class _ProjectTransposeFunction(torch.autograd.Function):
    """project_transpose in the same places. Arguments: all of its op's but y, then y."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _project_transpose_op(args[_REST], *args[:_REST])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _project_transpose_setup(ctx, (inputs[_REST], *inputs[:_REST]), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        y = _run_project([grad], ctx.proj_dim, *ctx.rest)
        return (*[None] * _REST, y.to(ctx.dtype))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _run_transpose(tangents[_REST], ctx.rows, *ctx.rest)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _transpose_vmap(
            _run_transpose, info.batch_size, in_dims[_REST], args[_REST], *args[:_REST]
        )


# ---- the way to a kernel -----------------------------------------------------------------------


def _is_direct(tensors: list[Tensor]) -> bool:
    """Whether nothing needs to see this call: no derivative, trace, mode, lazy bit or subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or _in_transform()
    ):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) not in _PLAIN or (grad and t.requires_grad) or t.is_meta or t.is_neg():
            return False
    return True


def _in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    Raises NotImplementedError for forward mode inside torch.compile, where the op would silently
    lose the tangent; without fullgraph=True, torch.compile answers by running this eagerly.
    """
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        if forward:
            raise NotImplementedError(
                "fastproj: received a call in forward-mode differentiation inside torch.compile; "
                "expected one outside it (torch.compiler.disable on the caller does that)"
            )
        return False  # torch.vmap is served by the ops' own rule there
    return forward or torch._C._are_functorch_transforms_active()


def _run_project(pieces: list[Tensor], *rest: Any) -> Tensor:
    if _is_direct(pieces):
        return _project(pieces, *rest)
    if _in_transform():
        return _ProjectFunction.apply(*rest, *pieces)
    return _project_op(pieces, *rest)


def _run_transpose(y: Tensor, *rest: Any) -> Tensor:
    if _is_direct([y]):
        return _project_transpose(y, *rest)
    if _in_transform():
        return _ProjectTransposeFunction.apply(*rest, y)
    return _project_transpose_op(y, *rest)


def _run_writing(function: str, direct: Any, op: Any, out: Tensor, inputs: Any, *rest: Any) -> None:
    """``direct`` or its op on (inputs, out, *rest), where ``out`` is overwritten or added to."""
    if _in_transform():
        raise ValueError(
            f"{function}: received out= under a torch.func transform or forward-mode "
            "differentiation, which can't follow it; call without out="
        )
    if _is_direct([out, *(inputs if isinstance(inputs, list) else [inputs])]):
        direct(inputs, out, *rest)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
    else:
        op(inputs, out, *rest)


# ---- the public functions ----------------------------------------------------------------------


def project(
    grads: Grads,
    proj_dim: SupportsIndex,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
    stream: SupportsIndex = 0,
    row_offset: SupportsIndex = 0,
    out: Tensor | None = None,
    accumulate: bool = False,
    scale: str | float | None = "jl",
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project per-sample gradients with a random matrix that is made on the fly.

    ``Y = scale * G @ R[row_offset : row_offset + P, :K]``, the same as
    ``scale * G @ matrix(slice(row_offset, row_offset + P), K, seed, kind, stream=stream)``.

    Parameters
    ----------
    grads : Tensor [B, P], strided, float32, bfloat16, float16 or float64, B >= 0, P >= 1; or a dict
        or sequence of [B, ...] tensors, flattened per sample and taken in order as one [B, P].
    proj_dim : K, 1 <= K <= 2^32.
    seed, stream : what names the matrix; seed < 2^64, stream < 2^32 (a checkpoint's model_id).
    kind : "rademacher" (+1 / -1) or "gaussian".
    row_offset : the row of R that the first column of ``grads`` meets; row_offset + P <= 2^56.
    out : Tensor [B, K] of the result's dtype on the device of ``grads``, written and returned.
    accumulate : add to ``out`` instead of overwriting it.
    scale : "jl" for 1 / sqrt(K), None for 1, or a number.
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
    return checked_project(
        "project",
        grads,
        proj_dim,
        seed,
        kind,
        stream=stream,
        row_offset=row_offset,
        out=out,
        accumulate=accumulate,
        scale=scale,
        precision=precision,
        backend=backend,
    )


def checked_project(
    function: str,
    grads: Grads,
    proj_dim: SupportsIndex,
    seed: SupportsIndex,
    kind: str,
    *,
    stream: SupportsIndex,
    row_offset: SupportsIndex | None,
    out: Tensor | None,
    accumulate: bool,
    scale: str | float | None,
    precision: str | None,
    backend: str | None,
    grad_dim: int | None = None,
    stream_name: str = "stream",
) -> Tensor:
    """``project`` on behalf of ``function``, which the messages name.

    With a ``grad_dim``, the rows have to lie within it, and cover it where ``row_offset`` is None.
    """
    proj_dim = check_integer(function, "proj_dim", proj_dim, 1, MAX_COLS + 1)
    seed64 = signed_seed(function, seed)
    check_kind(function, kind)
    stream = check_integer(function, stream_name, stream, 0, MAX_STREAM)
    start = 0
    if row_offset is not None or grad_dim is None:
        start = check_integer(function, "row_offset", row_offset, 0, MAX_ROWS)
    factor = check_scale(function, scale, proj_dim)
    how = check_precision(function, precision), check_backend(function, backend)
    pieces = check_grads(function, grads)
    total = pieces[0].shape[1] if len(pieces) == 1 else sum([piece.shape[1] for piece in pieces])
    if grad_dim is None:
        if start + total > MAX_ROWS:
            raise ValueError(
                f"{function}: received row_offset={start} and grads with P={total}; "
                "expected row_offset + P <= 2^56"
            )
    elif row_offset is None and total != grad_dim:
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
        if accumulate:
            raise ValueError(f"{function}: received accumulate=True without out; expected out=")
        return _run_project(pieces, proj_dim, seed64, kind, stream, start, factor, *how)
    check_out(function, out, (pieces[0].shape[0], proj_dim), pieces, "grads")
    if not isinstance(grads, Tensor) and _is_direct([out, *pieces]):
        check_copied(function, out, grads)
    rest = seed64, kind, stream, start, factor, bool(accumulate), *how
    _run_writing(function, _project_into, _project_into_op, out, pieces, *rest)
    return out


def project_transpose(
    y: Tensor,
    rows: Rows,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
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
    scale : "jl" for 1 / sqrt(K), None for 1, or a number.
    out : Tensor [B, n] of the result's dtype on the device of ``y``, written and returned.
    seed, kind, stream, precision, backend : as in ``project``.

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
    seed64 = signed_seed(function, seed)
    check_kind(function, kind)
    stream = check_integer(function, "stream", stream, 0, MAX_STREAM)
    factor = check_scale(function, scale, y.shape[1])
    how = (
        check_precision(function, precision),
        check_backend(function, backend),
    )
    if out is None:
        return _run_transpose(y, count, seed64, kind, stream, start, factor, *how)
    check_out(function, out, (y.shape[0], count), [y], "y")
    rest = seed64, kind, stream, start, factor, *how
    _run_writing(function, _project_transpose_into, _project_transpose_into_op, out, y, *rest)
    return out


def matrix(
    rows: Rows,
    cols: Rows,
    seed: SupportsIndex = 0,
    kind: str = "rademacher",
    *,
    stream: SupportsIndex = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Any block ``R[rows, cols]`` of the matrix, unscaled: what ``project`` multiplies with.

    Parameters
    ----------
    rows, cols : an int n for 0 .. n, or a slice(start, stop); rows < 2^56, columns < 2^32.
    dtype : a floating-point dtype (each holds the entries exactly), or int8 for Rademacher.
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
    row, n = check_rows("matrix", "rows", rows, MAX_ROWS)
    col, m = check_rows("matrix", "cols", cols, MAX_COLS)
    seed64 = signed_seed("matrix", seed)
    check_kind("matrix", kind)
    stream = check_integer("matrix", "stream", stream, 0, MAX_STREAM)
    if dtype not in DTYPES and (dtype is not torch.int8 or kind != "rademacher"):
        raise TypeError(
            f"matrix: received dtype={dtype} for kind={kind!r}; expected float32, bfloat16, "
            "float16 or float64 (or int8 for rademacher)"
        )
    # Asked of a tensor because torch.compile can't trace torch.get_default_device.
    place = torch.empty(0).device if device is None else check_device("matrix", device)
    if n * m * dtype.itemsize >= 1 << 63:
        raise ValueError(
            f"matrix: received rows={rows} and cols={cols}: {n} x {m} entries; expected a block "
            "that fits in memory"
        )
    name = check_backend("matrix", backend)
    run = _matrix if _is_direct([]) else _matrix_op
    return run(n, m, row, col, seed64, kind, stream, dtype, place, name)
