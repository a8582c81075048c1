"""project, project_transpose, matrix: argument checks, the custom ops, and the choice of backend.

Everything a caller can get wrong is refused here, before anything is written. The public functions
turn their arguments into plain ones (2-D views, integers, a float scale) and call one custom op;
eager calls that nothing needs to trace skip torch's dispatcher and call the same function directly.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fastproj.backends import registry
from fastproj.spec import KINDS, MAX_COLS, MAX_ROWS, MatrixKey

Grads = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Rows = SupportsIndex | slice

PRECISIONS = ("highest", "high", "medium")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_VIEWS = 64  # a tensor that is not viewable as [B, p] is split into at most this many views

_PLAIN = (Tensor, torch.nn.Parameter)
_MAX_SEED = 1 << 64
_MAX_STREAM = 1 << 32


# ---- the checks --------------------------------------------------------------------------------


def _describe(t: object) -> str:
    """A tensor as the error messages name it: ``[8, 1000] float16 on cpu``."""
    if not isinstance(t, Tensor):
        return f"{type(t).__name__} {t!r:.60}"
    layout = "" if t.layout is torch.strided else f" {_name(t.layout)}"
    return f"{list(t.shape)} {_name(t.dtype)} on {t.device}{layout}"


def _name(torch_constant: object) -> str:
    return str(torch_constant).removeprefix("torch.")


def check_integer(function: str, name: str, value: SupportsIndex, low: int, high: int) -> int:
    """``value`` as an int in low <= value < high. Raises TypeError or ValueError."""
    if type(value) is not int:
        if isinstance(value, bool):
            raise TypeError(f"{function}: received {name}={value!r}; expected an integer")
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(
                f"{function}: received {name}={value!r} ({type(value).__name__}); "
                "expected an integer"
            ) from None
    if value < low or value >= high:
        top = f"2^{high.bit_length() - 1}" if high & (high - 1) == 0 else str(high)
        raise ValueError(f"{function}: received {name}={value}; expected {low} <= {name} < {top}")
    return value


def check_kind(function: str, kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{function}: received kind={kind!r}; expected one of {', '.join(KINDS)}")


def check_precision(function: str, precision: str | None) -> str:
    """``precision`` as the ops take it ("" follows torch when the op runs). Raises ValueError."""
    if precision is None:
        return ""
    if precision not in PRECISIONS:
        raise ValueError(
            f"{function}: received precision={precision!r}; "
            f"expected one of {', '.join(PRECISIONS)}, or None"
        )
    return precision


def check_backend(function: str, backend: str | None) -> str:
    """``backend`` as the ops take it ("" leaves the choice to the registry). Raises ValueError."""
    if backend is None:
        return ""
    if backend not in registry.NAMES:
        raise ValueError(
            f"{function}: received backend={backend!r}; "
            f"expected one of {', '.join(registry.NAMES)}, or None"
        )
    return backend


def check_scale(function: str, scale: str | float | None, proj_dim: int) -> float:
    """The factor that ``scale`` stands for. Raises TypeError or ValueError."""
    if scale is None:
        return 1.0
    if isinstance(scale, str):
        if scale != "jl":
            raise ValueError(
                f'{function}: received scale={scale!r}; expected "jl", None or a number'
            )
        return 1.0 / math.sqrt(proj_dim)
    if isinstance(scale, (bool, Tensor)) or not hasattr(scale, "__float__"):
        raise TypeError(f'{function}: received scale={scale!r}; expected "jl", None or a number')
    factor = float(scale)
    if not math.isfinite(factor):
        raise ValueError(f"{function}: received scale={scale!r}; expected a finite number")
    return factor


def _signed(function: str, seed: SupportsIndex) -> int:
    """``seed`` checked, as the int64 with the same 64 bits (op schemas know only int64)."""
    seed = check_integer(function, "seed", seed, 0, _MAX_SEED)
    return seed - _MAX_SEED if seed >= _MAX_SEED >> 1 else seed


def check_rows(function: str, name: str, rows: Rows, limit: int) -> tuple[int, int]:
    """(start, count) of ``rows``, an int (0 .. rows) or a slice with a stop and no step."""
    if not isinstance(rows, slice):
        return 0, check_integer(function, name, rows, 0, limit + 1)
    if rows.stop is None or rows.step not in (None, 1):
        raise ValueError(
            f"{function}: received {name}={rows}; expected slice(start, stop), without a step"
        )
    stop = check_integer(function, f"{name}.stop", rows.stop, 0, limit + 1)
    start = (
        0
        if rows.start is None
        else check_integer(function, f"{name}.start", rows.start, 0, limit + 1)
    )
    if start > stop:
        raise ValueError(f"{function}: received {name}={rows}; expected start <= stop")
    return start, stop - start


def _check_input(function: str, name: str, t: object) -> Tensor:
    """``t``, if it is a strided floating-point Tensor that some backend may take."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{function}: received {name} of type {type(t).__name__}; expected a torch.Tensor "
            "(torch.from_numpy turns a NumPy array into one)"
        )
    if t.dtype not in DTYPES:
        raise TypeError(
            f"{function}: received {name} {_describe(t)}; expected float32, bfloat16, float16 or "
            f"float64 (convert with {name}.float() if that is what you mean)"
        )
    if t.layout is not torch.strided:
        raise TypeError(
            f"{function}: received {name} {_describe(t)}; expected a strided tensor "
            f"({name}.to_dense() makes one)"
        )
    return t


def _views(t: Tensor) -> list[Tensor]:
    """``t`` [B, ...] as [B, p_i] views whose columns, in order, are those of t.flatten(1).

    Views wherever MAX_VIEWS of them suffice; a layout that would need more is copied.
    """
    batch = t.shape[0]
    if t.dim() == 1:
        return [t.unsqueeze(1)]
    if t.dim() == 2:
        return [t]
    if t.is_contiguous():
        return [t.view(batch, t[0].numel() if batch else math.prod(t.shape[1:]))]
    # Dimension d runs on into d + 1 when its stride is that of the whole inner part.
    shape, stride = t.shape, t.stride()
    split, inner = t.dim() - 1, t.dim() - 1
    for d in range(t.dim() - 2, 0, -1):
        if shape[d] != 1 and shape[inner] != 1 and stride[d] != stride[inner] * shape[inner]:
            break
        if shape[d] != 1:
            inner = d
        split = d
    outer = shape[1:split]
    if math.prod(outer) > MAX_VIEWS:
        return [t.reshape(batch, -1)]
    parts = [t]
    for _ in outer:
        parts = [part.select(1, i) for part in parts for i in range(part.shape[1])]
    return [part.flatten(1) for part in parts]


def _pieces(function: str, grads: Grads) -> list[Tensor]:
    """``grads`` as checked [B, p_i] views of one batch size, dtype and device; no empty ones."""
    if isinstance(grads, Tensor):
        grads = _check_input(function, "grads", grads)
        if grads.dim() != 2:
            raise ValueError(
                f"{function}: received grads {_describe(grads)}; expected [B, P] (a list or dict "
                "of [B, ...] tensors is flattened per sample, so [grads] works too)"
            )
        if grads.shape[1] == 0:
            raise ValueError(
                f"{function}: received grads {_describe(grads)}; expected [B, P] with P >= 1"
            )
        return [grads]
    if isinstance(grads, Mapping):
        named = [(f"grads[{name!r}]", t) for name, t in grads.items()]
    elif isinstance(grads, Sequence) and not isinstance(grads, (str, bytes)):
        named = [(f"grads[{i}]", t) for i, t in enumerate(grads)]
    else:
        raise TypeError(
            f"{function}: received grads of type {type(grads).__name__}; expected a torch.Tensor "
            "[B, P], or a dict or sequence of [B, ...] tensors"
        )
    pieces: list[Tensor] = []
    for name, t in named:
        t = _check_input(function, name, t)
        if t.dim() == 0:
            raise ValueError(f"{function}: received {name} {_describe(t)}; expected [B, ...]")
        first_name, first = named[0]
        if t.shape[0] != first.shape[0] or t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"{function}: received {first_name} {_describe(first)} but {name} {_describe(t)}; "
                "expected one batch size, dtype and device throughout (or one call for each group, "
                "with its row_offset and accumulate=True)"
            )
        pieces += [view for view in _views(t) if view.shape[1] != 0]
    if not pieces:
        raise ValueError(
            f"{function}: received {len(named)} tensors with no elements per sample; "
            "expected P >= 1 in all"
        )
    return pieces


def _result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check_out(
    function: str, out: Tensor, shape: tuple[int, int], inputs: list[Tensor], source: str
) -> None:
    """Refuse an ``out`` that can't take the result: nothing has been written yet."""
    dtype, device = _result_dtype(inputs[0].dtype), inputs[0].device
    expected = f"{list(shape)} {_name(dtype)} on {device}"
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{function}: received out of type {type(out).__name__}; expected a Tensor {expected}"
        )
    if out.dtype != dtype:
        raise TypeError(f"{function}: received out {_describe(out)}; expected {expected}")
    if out.layout is not torch.strided or out.shape != shape or out.device != device:
        raise ValueError(f"{function}: received out {_describe(out)}; expected {expected}")
    if torch.is_grad_enabled() and (out.requires_grad or any(t.requires_grad for t in inputs)):
        which = "out" if out.requires_grad else source
        raise ValueError(
            f"{function}: received out= and a {which} that requires grad, which out= can't "
            "differentiate; call without out=, or under torch.no_grad()"
        )


def _check_memory(function: str, out: Tensor, inputs: list[Tensor], source: str) -> None:
    """Refuse an ``out`` [n, m] that shares memory with itself or with an input."""
    (n, m), (s0, s1) = out.shape, out.stride()
    if n == 0 or m == 0:
        return
    divisor = math.gcd(s0, s1) or 1
    # i * s0 = j * s1 has a solution with |i| < n, |j| < m exactly when its smallest one has.
    if (
        (s0 == 0 and n > 1)
        or (s1 == 0 and m > 1)
        or (s0 and s1 and s1 // divisor < n and s0 // divisor < m)
    ):
        raise ValueError(
            f"{function}: received out {_describe(out)} with strides {(s0, s1)}, whose elements "
            "overlap in memory; expected one without overlap (out.contiguous() makes one)"
        )
    for t in inputs:
        if _share_memory(out, t):
            raise ValueError(
                f"{function}: received out {_describe(out)} that shares memory with {source} "
                f"{_describe(t)}; expected separate memory (torch.empty_like(out) has it)"
            )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two 2-D tensors may share an element. False only where they certainly don't."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a >= start_b + _extent(b) or start_b >= start_a + _extent(a):
        return False
    pitch = a.stride(0) * a.element_size()
    if a.shape[0] == 1 or b.shape[0] == 1 or pitch == 0 or pitch != b.stride(0) * b.element_size():
        return True
    # Two column ranges of one wider matrix: rows recur at one pitch, so compare them modulo it.
    return not (
        (start_b - start_a) % pitch >= _extent(a[:1])
        and (start_a - start_b) % pitch >= _extent(b[:1])
    )


def _extent(t: Tensor) -> int:
    """Bytes from the first element of a non-empty tensor to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
    return (last + 1) * t.element_size()


def _is_eager(tensors: list[Tensor]) -> bool:
    """Whether nothing needs to see this call: no autograd, tracing, functorch, lazy bit, subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:
        if type(t) not in _PLAIN or (grad and t.requires_grad) or t.is_meta or t.is_neg():
            return False
    return True


# ---- the operations ----------------------------------------------------------------------------
# What runs behind the checks. The op of the same name wraps each; strings stay as given
# ("" = default) so that a compiled graph follows torch's precision when it runs.


def _key(kind: str, seed: int, stream: int) -> MatrixKey:
    return MatrixKey(kind, seed & (_MAX_SEED - 1), stream)


def _precision(precision: str) -> str:
    return precision or torch.get_float32_matmul_precision()


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
    out = first.new_empty((first.shape[0], proj_dim), dtype=_result_dtype(first.dtype))
    _project_into(pieces, out, seed, kind, stream, row_offset, scale, False, precision, backend)
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
    first = pieces[0]
    chosen = registry.choose(first.device.type, first.dtype, kind, backend)
    if out.shape[0] == 0:
        return
    chosen.project(
        pieces,
        out,
        key=_key(kind, seed, stream),
        row_offset=row_offset,
        scale=scale,
        accumulate=accumulate,
        precision=_precision(precision),
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
    out = y.new_empty((y.shape[0], rows), dtype=_result_dtype(y.dtype))
    _project_transpose_into(y, out, seed, kind, stream, row_offset, scale, precision, backend)
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
    chosen = registry.choose(y.device.type, y.dtype, kind, backend)
    if out.numel() == 0:
        return
    chosen.project_transpose(
        y,
        out,
        key=_key(kind, seed, stream),
        row_offset=row_offset,
        scale=scale,
        precision=_precision(precision),
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
    chosen = registry.choose(out.device.type, dtype, kind, backend)
    if out.numel() != 0:
        chosen.matrix(
            out, key=_key(kind, seed, stream), row_offset=row_offset, col_offset=col_offset
        )
    return out


_KEY_SCHEMA = "SymInt seed, str kind, SymInt stream, SymInt row_offset, float scale"
_HOW_SCHEMA = "str precision, str backend"

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
    schema=f"(Tensor[] pieces, Tensor(a!) out, {_KEY_SCHEMA}, bool accumulate, {_HOW_SCHEMA}) -> ()",
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
    schema="(SymInt rows, SymInt cols, SymInt row_offset, SymInt col_offset, SymInt seed, str kind, "
    "SymInt stream, ScalarType dtype, Device device, str backend) -> Tensor",
)


# ---- shapes for tracing, derivatives, vmap -----------------------------------------------------


@_project_op.register_fake
def _(pieces: list[Tensor], proj_dim: int, *rest: object) -> Tensor:
    first = pieces[0]
    return first.new_empty((first.shape[0], proj_dim), dtype=_result_dtype(first.dtype))


@_project_transpose_op.register_fake
def _(y: Tensor, rows: int, *rest: object) -> Tensor:
    return y.new_empty((y.shape[0], rows), dtype=_result_dtype(y.dtype))


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
    pieces, _, ctx.seed, ctx.kind, ctx.stream, ctx.row_offset, ctx.scale, *ctx.how = inputs
    ctx.sizes = [piece.shape[1] for piece in pieces]
    ctx.dtype = pieces[0].dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dL/dG_i = scale * dL/dY @ R[rows of piece i].T, in the dtype of the pieces."""
    wanted = ctx.needs_input_grad[0]
    row = ctx.row_offset
    grads: list[Tensor | None] = []
    for size, needed in zip(ctx.sizes, wanted):
        grads.append(
            _project_transpose_op(
                grad, size, ctx.seed, ctx.kind, ctx.stream, row, ctx.scale, *ctx.how
            ).to(ctx.dtype)
            if needed
            else None
        )
        row = row + size
    return (grads, *[None] * 8)


def _project_transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, _, ctx.seed, ctx.kind, ctx.stream, ctx.row_offset, ctx.scale, *ctx.how = inputs
    ctx.proj_dim, ctx.dtype = y.shape[1], y.dtype


def _project_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dL/dY = scale * dL/dG @ R[rows], in the dtype of y."""
    y = _project_op(
        [grad], ctx.proj_dim, ctx.seed, ctx.kind, ctx.stream, ctx.row_offset, ctx.scale, *ctx.how
    )
    return (y.to(ctx.dtype), *[None] * 8)


_project_op.register_autograd(_project_backward, setup_context=_project_setup)
_project_transpose_op.register_autograd(
    _project_transpose_backward, setup_context=_project_transpose_setup
)


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` [B, p] mapped over ``dim`` as [size * B, p]; unmapped ones are repeated as a view."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.reshape(size * t.shape[1], t.shape[2])


@_project_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], pieces: list[Tensor], *rest: Any) -> tuple[Tensor, int]:
    size = info.batch_size
    folded = [_fold(t, dim, size) for t, dim in zip(pieces, in_dims[0])]
    result = _project_op(folded, *rest)
    return result.reshape(size, -1, result.shape[1]), 0


@_project_transpose_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], y: Tensor, *rest: Any) -> tuple[Tensor, int]:
    result = _project_transpose_op(_fold(y, in_dims[0], info.batch_size), *rest)
    return result.reshape(info.batch_size, -1, result.shape[1]), 0


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
) -> Tensor:
    """``project`` on behalf of ``function``, which the messages name.

    With a ``grad_dim``, the rows have to lie within it, and cover it where ``row_offset`` is None.
    """
    proj_dim = check_integer(function, "proj_dim", proj_dim, 1, MAX_COLS + 1)
    signed_seed = _signed(function, seed)
    check_kind(function, kind)
    stream = check_integer(function, "stream", stream, 0, _MAX_STREAM)
    start = (
        0 if row_offset is None else check_integer(function, "row_offset", row_offset, 0, MAX_ROWS)
    )
    factor = check_scale(function, scale, proj_dim)
    how = check_precision(function, precision), check_backend(function, backend)
    pieces = _pieces(function, grads)
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
        run = _project if _is_eager(pieces) else _project_op
        return run(pieces, proj_dim, signed_seed, kind, stream, start, factor, *how)
    _check_out(function, out, (pieces[0].shape[0], proj_dim), pieces, "grads")
    arguments = pieces, out, signed_seed, kind, stream, start, factor, bool(accumulate), *how
    if _is_eager([out, *pieces]):
        _check_memory(function, out, pieces, "grads")
        _project_into(*arguments)
        _mark_written(out)
    else:
        _project_into_op(*arguments)
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
    y = _check_input("project_transpose", "y", y)
    if y.dim() != 2 or y.shape[1] == 0:
        raise ValueError(
            f"project_transpose: received y {_describe(y)}; expected [B, K] with K >= 1"
        )
    start, count = check_rows("project_transpose", "rows", rows, MAX_ROWS)
    signed_seed = _signed("project_transpose", seed)
    check_kind("project_transpose", kind)
    stream = check_integer("project_transpose", "stream", stream, 0, _MAX_STREAM)
    factor = check_scale("project_transpose", scale, y.shape[1])
    how = (
        check_precision("project_transpose", precision),
        check_backend("project_transpose", backend),
    )
    if out is None:
        run = _project_transpose if _is_eager([y]) else _project_transpose_op
        return run(y, count, signed_seed, kind, stream, start, factor, *how)
    _check_out("project_transpose", out, (y.shape[0], count), [y], "y")
    if _is_eager([out, y]):
        _check_memory("project_transpose", out, [y], "y")
        _project_transpose_into(y, out, signed_seed, kind, stream, start, factor, *how)
        _mark_written(out)
    else:
        _project_transpose_into_op(y, out, signed_seed, kind, stream, start, factor, *how)
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
    signed_seed = _signed("matrix", seed)
    check_kind("matrix", kind)
    stream = check_integer("matrix", "stream", stream, 0, _MAX_STREAM)
    if dtype not in DTYPES and (dtype is not torch.int8 or kind != "rademacher"):
        raise TypeError(
            f"matrix: received dtype={dtype} for kind={kind!r}; expected float32, bfloat16, "
            "float16 or float64 (or int8 for rademacher)"
        )
    place = torch.get_default_device() if device is None else torch.device(device)
    name = check_backend("matrix", backend)
    run = _matrix if _is_eager([]) and place.type != "meta" else _matrix_op
    return run(n, m, row, col, signed_seed, kind, stream, dtype, place, name)


def _mark_written(out: Tensor) -> None:
    """Tell autograd that ``out`` changed, as a dispatched op would have."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
