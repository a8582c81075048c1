"""The way from checked arguments to a backend, past what torch must see.

Torch needs custom ops, their shapes, derivatives and vmap. A call without derivative, trace and
transform needs none of them, and goes straight to the backend. Every other call goes through an op.
The schema of an op takes plain numbers and strings: ``_flat`` turns a ``Call`` into these, and
``_call`` turns them back.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastproj.backends import registry
from fastproj.call import Call
from fastproj.checks import (
    MAX_SEED,
    check_entries,
    check_input,
    check_integer,
    check_key,
    check_memory,
    check_precision,
    check_proj_dim,
    check_row_numbers,
    check_scale,
    describe,
    result_dtype,
)
from fastproj.spec import MAX_COLS, MAX_ROWS
from fastproj.spec import matrix_rows as matrix_rows_of_spec

_PLAIN = (Tensor, torch.nn.Parameter)
_OPS = "torch.ops.fastproj"
_ROW_ENTRIES = 1 << 18  # of matrix_rows at a time: NumPy takes up to 160 bytes for each

# ---- a call as an op's arguments ---------------------------------------------------------------
# Torch takes some microseconds for each argument, so strings go two by two. The precision stays as
# given ("" = default), so that a compiled graph follows torch's when it runs. The row offset comes
# first and is the only one that the rules below look at.

_CALL_SCHEMA = (
    "SymInt row_offset, float scale, str precision_backend, "
    "str kind_block, SymInt seed, SymInt stream"
)


def _flat(call: Call, backend: str) -> tuple[Any, ...]:
    """``call`` as the arguments of an op. A schema has int64 alone, so the seed becomes the int64
    with the same 64 bits. A block that torch.compile traces as a symbol becomes a constant of the
    graph, as a string needs.
    """
    kind, seed, stream, block = call.key.kind, call.key.seed, call.key.stream, call.key.block
    seed = seed - MAX_SEED if seed >= MAX_SEED >> 1 else seed
    how, which = f"{call.precision},{backend}", f"{kind},{int(block)}"
    return call.row_offset, call.scale, how, which, seed, stream


@functools.lru_cache(maxsize=1024)  # so the checks cost nothing
def _call(
    row_offset: int,
    scale: float,
    precision_backend: str,
    kind_block: str,
    seed: int,
    stream: int,
) -> tuple[Call, str]:
    precision, backend = precision_backend.split(",")
    kind, block = kind_block.split(",")
    key = check_key(_OPS, seed & (MAX_SEED - 1), kind, stream, block=int(block) or None)
    check_integer(_OPS, "row_offset", row_offset, 0, MAX_ROWS + 1)
    check_scale(_OPS, scale, 1)
    check_precision(_OPS, precision or None)
    return Call(key, row_offset, scale, precision=precision), backend


# ---- the way to a backend ----------------------------------------------------------------------

_TORCH_FP32_PRECISION = {"bf16": "medium", "tf32": "high"}  # torch >= 2.9; the rest are exact


def _resolved(call: Call, device_type: str) -> Call:
    """``call`` with a precision: its own, or torch's for float32 matmuls on this kind of device.

    Where torch's newer per-device settings are in use, asking torch for the older global one
    raises.
    """
    if call.precision:
        return call
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        place = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        precision = _TORCH_FP32_PRECISION.get(place.matmul.fp32_precision, "highest")
    return Call(call.key, call.row_offset, call.scale, call.accumulate, precision)


def _fill(pieces: list[Tensor], out: Tensor, call: Call, backend: str) -> None:
    dtype, device = pieces[0].dtype, pieces[0].device
    call = _resolved(call, device.type)
    chosen = registry.choose(
        device.type,
        dtype,
        call.key.kind,
        backend,
        shape=(out.shape[0], out.shape[1]),
        precision=call.precision,
        index=device.index,
    )
    if out.shape[0] != 0:
        chosen.project(pieces, out, call)


def _project(pieces: list[Tensor], proj_dim: int, call: Call, backend: str) -> Tensor:
    first = pieces[0]
    out = first.new_empty((first.shape[0], proj_dim), dtype=result_dtype(first.dtype))
    _fill(pieces, out, call, backend)
    return out


def _project_into(pieces: list[Tensor], out: Tensor, call: Call, backend: str) -> None:
    check_memory("project", out, pieces, "grads")
    _fill(pieces, out, call, backend)


def _fill_transpose(y: Tensor, out: Tensor, call: Call, backend: str) -> None:
    chosen = registry.choose(y.device.type, y.dtype, call.key.kind, backend)
    if out.numel() != 0:
        chosen.project_transpose(y, out, _resolved(call, y.device.type))


def project_product(chosen: Any, left: Tensor, right: Tensor, out: Tensor, call: Call) -> bool:
    """``out`` += the projection of the products left[b].T @ right[b], in one kernel as they form.

    chosen : what ``registry.for_products`` gave. False, with nothing done, where its kernel doesn't
        take them, or torch must see the call: it would not see this one.
    """
    call = _resolved(call, out.device.type)
    return is_direct([out, left, right]) and chosen.project_product(left, right, out, call)


def _project_transpose(y: Tensor, rows: int, call: Call, backend: str) -> Tensor:
    out = y.new_empty((y.shape[0], rows), dtype=result_dtype(y.dtype))
    _fill_transpose(y, out, call, backend)
    return out


def _project_transpose_into(y: Tensor, out: Tensor, call: Call, backend: str) -> None:
    check_memory("project_transpose", out, [y], "y")
    _fill_transpose(y, out, call, backend)


def _matrix(
    rows: int,
    cols: int,
    col_offset: int,
    dtype: torch.dtype,
    device: torch.device,
    call: Call,
    backend: str,
) -> Tensor:
    out = torch.empty((rows, cols), dtype=dtype, device=device)
    if out.is_meta:
        return out
    chosen = registry.choose(out.device.type, dtype, call.key.kind, backend)
    if out.numel() != 0:
        chosen.matrix(out, _resolved(call, out.device.type), col_offset)
    return out


def _matrix_rows(
    rows: Tensor, cols: int, col_offset: int, dtype: torch.dtype, device: torch.device, call: Call
) -> Tensor:
    numbers = rows.cpu().numpy().astype(np.uint64)
    order = np.argsort(numbers)  # neighbours share what is computed
    out = torch.empty((len(numbers), cols), dtype=dtype, device=device)
    step = max(1, _ROW_ENTRIES // max(1, cols))
    for start in range(0, len(numbers), step):
        some = order[start : start + step]
        to = torch.from_numpy(some).to(device)
        for col in range(0, cols, _ROW_ENTRIES):
            stop = min(cols, col + _ROW_ENTRIES)
            entries = matrix_rows_of_spec(
                call.key, numbers[some], col_offset + col, col_offset + stop
            )
            out[to, col:stop] = torch.from_numpy(entries).to(device, dtype)
    return out


# ---- the ops -----------------------------------------------------------------------------------

# Whoever calls an op directly, or a graph that was traced with other values, has passed none of the
# checks in ops: what backends rely on is checked here again.


def _check_inputs(tensors: list[Tensor], call: Call, rows: int) -> None:
    """Refuse what isn't [B, n], in one batch size, dtype and device, and rows beyond the last."""
    if not tensors:
        raise ValueError(f"{_OPS}: received no tensors; expected at least one [B, P]")
    first = tensors[0]
    for t in tensors:
        check_input(_OPS, "a tensor", t)
        if (
            t.dim() != 2
            or t.shape[0] != first.shape[0]
            or t.dtype != first.dtype
            or t.device != first.device
        ):
            raise ValueError(
                f"{_OPS}: received {describe(first)} and {describe(t)}; expected [B, n], of one "
                "batch size, dtype and device"
            )
    if rows < 0 or call.row_offset + rows > MAX_ROWS:
        raise ValueError(
            f"{_OPS}: received row_offset={call.row_offset} and {rows} rows; expected "
            "0 <= rows, and row_offset + rows <= 2^56"
        )


def _check_written(out: Tensor, batch: int, width: int, like: Tensor) -> None:
    """Refuse an ``out`` that isn't [batch, width] of the result's dtype on the device of ``like``.

    Under compilation ``out`` may be another tensor than the one that ops has checked.
    """
    check_input(_OPS, "out", out)
    dtype = result_dtype(like.dtype)
    if out.shape != (batch, width) or out.dtype != dtype or out.device != like.device:
        raise ValueError(
            f"{_OPS}: received out {describe(out)}; expected {[batch, width]} "
            f"{str(dtype).removeprefix('torch.')} on {like.device}"
        )


def _check_project(pieces: list[Tensor], proj_dim: int, call: Call) -> None:
    _check_inputs(pieces, call, sum(piece.shape[-1] for piece in pieces if piece.dim()))
    check_proj_dim(_OPS, proj_dim)


def _check_transpose(y: Tensor, rows: int, call: Call) -> None:
    _check_inputs([y], call, rows)
    check_proj_dim(_OPS, y.shape[1])


def _run_project_op(pieces: list[Tensor], proj_dim: int, *flat: Any) -> Tensor:
    call, backend = _call(*flat)
    _check_project(pieces, proj_dim, call)
    return _project(pieces, proj_dim, call, backend)


def _run_project_into_op(pieces: list[Tensor], out: Tensor, accumulate: bool, *flat: Any) -> None:
    call, backend = _call(*flat)
    call = call._replace(accumulate=accumulate)
    _check_project(pieces, out.shape[-1] if out.dim() else 0, call)
    _check_written(out, pieces[0].shape[0], out.shape[-1], pieces[0])
    _project_into(pieces, out, call, backend)


def _run_transpose_op(y: Tensor, rows: int, *flat: Any) -> Tensor:
    call, backend = _call(*flat)
    _check_transpose(y, rows, call)
    return _project_transpose(y, rows, call, backend)


def _run_transpose_into_op(y: Tensor, out: Tensor, *flat: Any) -> None:
    call, backend = _call(*flat)
    rows = out.shape[-1] if out.dim() else 0
    _check_transpose(y, rows, call)
    _check_written(out, y.shape[0], rows, y)
    _project_transpose_into(y, out, call, backend)


def _check_block(
    rows: int, cols: int, col_offset: int, dtype: torch.dtype, kind: str, row_offset: int = 0
) -> None:
    """Refuse a block of R that lies outside it, and a dtype that can't hold its entries."""
    check_integer(_OPS, "row_offset + rows", row_offset + rows, row_offset, MAX_ROWS + 1)
    check_integer(_OPS, "col_offset", col_offset, 0, MAX_COLS + 1)
    check_integer(_OPS, "col_offset + cols", col_offset + cols, col_offset, MAX_COLS + 1)
    check_entries(_OPS, dtype, kind)


def _run_matrix_op(
    rows: int, cols: int, col_offset: int, dtype: torch.dtype, device: torch.device, *flat: Any
) -> Tensor:
    call, backend = _call(*flat)
    _check_block(rows, cols, col_offset, dtype, call.key.kind, call.row_offset)
    return _matrix(rows, cols, col_offset, dtype, device, call, backend)


def _run_matrix_rows_op(
    rows: Tensor, cols: int, col_offset: int, dtype: torch.dtype, device: torch.device, *flat: Any
) -> Tensor:
    call, _ = _call(*flat)
    rows = check_row_numbers(_OPS, rows, MAX_ROWS)
    _check_block(0, cols, col_offset, dtype, call.key.kind)
    return _matrix_rows(rows, cols, col_offset, dtype, device, call)


_project_op = torch.library.custom_op(
    "fastproj::project",
    _run_project_op,
    mutates_args=(),
    schema=f"(Tensor[] pieces, SymInt proj_dim, {_CALL_SCHEMA}) -> Tensor",
)
_project_into_op = torch.library.custom_op(
    "fastproj::project_into",
    _run_project_into_op,
    mutates_args=("out",),
    schema=f"(Tensor[] pieces, Tensor(a!) out, bool accumulate, {_CALL_SCHEMA}) -> ()",
)
_project_transpose_op = torch.library.custom_op(
    "fastproj::project_transpose",
    _run_transpose_op,
    mutates_args=(),
    schema=f"(Tensor y, SymInt rows, {_CALL_SCHEMA}) -> Tensor",
)
_project_transpose_into_op = torch.library.custom_op(
    "fastproj::project_transpose_into",
    _run_transpose_into_op,
    mutates_args=("out",),
    schema=f"(Tensor y, Tensor(a!) out, {_CALL_SCHEMA}) -> ()",
)
_BLOCK_SCHEMA = "SymInt cols, SymInt col_offset, ScalarType dtype, Device device"
_matrix_op = torch.library.custom_op(
    "fastproj::matrix",
    _run_matrix_op,
    mutates_args=(),
    schema=f"(SymInt rows, {_BLOCK_SCHEMA}, {_CALL_SCHEMA}) -> Tensor",
)
_matrix_rows_op = torch.library.custom_op(
    "fastproj::matrix_rows",
    _run_matrix_rows_op,
    mutates_args=(),
    schema=f"(Tensor rows, {_BLOCK_SCHEMA}, {_CALL_SCHEMA}) -> Tensor",
)


# ---- shapes for tracing, derivatives, vmap -----------------------------------------------------


def _empty(like: Tensor, width: int) -> Tensor:
    return like.new_empty((like.shape[0], width), dtype=result_dtype(like.dtype))


_project_op.register_fake(lambda pieces, proj_dim, *flat: _empty(pieces[0], proj_dim))
_project_transpose_op.register_fake(lambda y, rows, *flat: _empty(y, rows))
_project_into_op.register_fake(lambda *args: None)
_project_transpose_into_op.register_fake(lambda *args: None)
_matrix_op.register_fake(
    lambda rows, cols, col_offset, dtype, device, *flat: torch.empty(
        (rows, cols), dtype=dtype, device=device
    )
)
_matrix_rows_op.register_fake(
    lambda rows, cols, col_offset, dtype, device, *flat: torch.empty(
        (rows.shape[0], cols), dtype=dtype, device=device
    )
)


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pieces, ctx.proj_dim, *ctx.flat = inputs
    ctx.sizes = [piece.shape[1] for piece in pieces]
    ctx.dtype = pieces[0].dtype


def _project_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gradients = _piece_gradients(_project_transpose_op, ctx, grad, ctx.needs_input_grad[0])
    return (gradients, None, *[None] * len(ctx.flat))


def _piece_gradients(transpose: Any, ctx: Any, grad: Tensor, needed: Any) -> list[Tensor | None]:
    """dL/dG_i = scale * dL/dY @ R[rows of piece i].T, in the dtype of the pieces."""
    row, *rest = ctx.flat
    gradients: list[Tensor | None] = []
    for size, wanted in zip(ctx.sizes, needed, strict=True):
        gradients.append(transpose(grad, size, row, *rest).to(ctx.dtype) if wanted else None)
        row = row + size
    return gradients


def _project_transpose_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, ctx.rows, *ctx.flat = inputs
    ctx.proj_dim, ctx.dtype = y.shape[1], y.dtype


def _project_transpose_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """dL/dY = scale * dL/dG @ R[rows], in the dtype of y."""
    y = _project_op([grad], ctx.proj_dim, *ctx.flat)
    return (y.to(ctx.dtype), None, *[None] * len(ctx.flat))


_project_op.register_autograd(_project_backward, setup_context=_project_setup)
_project_transpose_op.register_autograd(
    _project_transpose_backward, setup_context=_project_transpose_setup
)


def _fold(t: Tensor, dim: int | None, size: int) -> Tensor:
    """``t`` [B, p] mapped over ``dim`` as [size * B, p]; an unmapped one is repeated."""
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.reshape(size * t.shape[1], t.shape[2])


def _unfold(t: Tensor, dim: int | None, size: int, y: Tensor) -> Tensor:
    """``y`` [size * B, n] as [size, B, n]: the inverse of ``_fold``, whose arguments come first."""
    batch = t.shape[0] if dim is None else t.shape[1 if dim % t.dim() == 0 else 0]
    return y.view(size, batch, y.shape[1])


def _project_vmap(run: Any, size: int, dims: Any, pieces: Any, *rest: Any) -> tuple[Tensor, int]:
    """``run`` once for all ``size`` members: they become rows of one batch."""
    folded = [_fold(t, dim, size) for t, dim in zip(pieces, dims, strict=True)]
    return _unfold(pieces[0], dims[0], size, run(folded, *rest)), 0


def _transpose_vmap(run: Any, size: int, dim: Any, y: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return _unfold(y, dim, size, run(_fold(y, dim, size), *rest)), 0


# For torch.vmap inside torch.compile.
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

    Arguments: proj_dim, the flat call, then the pieces.
    """

    @staticmethod
    def forward(proj_dim: int, flat: Any, *pieces: Tensor) -> Tensor:
        return _project_op(list(pieces), proj_dim, *flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        proj_dim, flat, *pieces = inputs
        _project_setup(ctx, (pieces, proj_dim, *flat), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients = _piece_gradients(_run_transpose, ctx, grad, ctx.needs_input_grad[2:])
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        """Linear: the projection of the tangents, in one call.

        Torch adds nothing here: it has forward mode turned off, so a sum would lose the tangents of
        an outer jvp.
        """
        return _run_project(list(tangents[2:]), ctx.proj_dim, *ctx.flat)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        proj_dim, flat, *pieces = args
        return _project_vmap(_run_project, info.batch_size, in_dims[2:], pieces, proj_dim, *flat)


class _ProjectTransposeFunction(torch.autograd.Function):
    """project_transpose in the same places. Arguments: the number of rows, the flat call, y."""

    @staticmethod
    def forward(rows: int, flat: Any, y: Tensor) -> Tensor:
        return _project_transpose_op(y, rows, *flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, flat, y = inputs
        _project_transpose_setup(ctx, (y, rows, *flat), output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, _run_project([grad], ctx.proj_dim, *ctx.flat).to(ctx.dtype)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _run_transpose(tangents[2], ctx.rows, *ctx.flat)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        rows, flat, y = args
        return _transpose_vmap(_run_transpose, info.batch_size, in_dims[2], y, rows, *flat)


# ---- straight to the backend, or through an op -------------------------------------------------


def is_direct(tensors: list[Tensor]) -> bool:
    """Whether torch needn't see this call: no derivative, trace, mode, lazy bit or subclass."""
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
        if t._is_zerotensor():  # a tangent that is zero: it has no memory, and torch makes it some
            return False
    return True


def _in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way.

    Raises NotImplementedError for derivatives by torch.func and forward mode inside torch.compile,
    where the op would fail or silently lose the tangent; without fullgraph=True, torch.compile
    answers by running this eagerly.
    """
    forward = forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        if forward or _in_func_derivative():
            raise NotImplementedError(
                "fastproj: received a call in torch.func.grad, vjp, jacrev or forward-mode "
                "differentiation inside torch.compile; expected one outside it "
                "(torch.compiler.disable on the caller does that)"
            )
        return False  # torch.vmap is served by the ops' own rule there
    return forward or torch._C._are_functorch_transforms_active()


def _needs_function() -> bool:
    """Whether a transform is under way for which an op's own rules don't do.

    torch.func.functionalize has no rule for a Function, and an op needs none there.
    """
    if not _in_transform():
        return False
    if forward_ad._current_level >= 0 or _in_func_derivative():
        return True
    stack = torch._C._functorch.get_interpreter_stack() or []  # the innermost comes last
    return stack[-1].key() != torch._C._functorch.TransformType.Functionalize


def _in_func_derivative() -> bool:
    """Whether torch.func.grad, vjp or jacrev is under way."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(each.key() == torch._C._functorch.TransformType.Grad for each in stack)


# As torch.compiler.assume_constant_result does, without importing the compiler: torch.compile calls
# this as it traces, and guards the transforms by itself.
_in_func_derivative._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run_project(pieces: list[Tensor], proj_dim: int, *flat: Any) -> Tensor:
    if is_direct(pieces):
        return _project(pieces, proj_dim, *_call(*flat))
    return _trace_project(pieces, proj_dim, *flat)


def _trace_project(pieces: list[Tensor], proj_dim: int, *flat: Any) -> Tensor:
    if _needs_function():
        return _ProjectFunction.apply(proj_dim, flat, *pieces)
    return _project_op(pieces, proj_dim, *flat)


def _run_transpose(y: Tensor, rows: int, *flat: Any) -> Tensor:
    if is_direct([y]):
        return _project_transpose(y, rows, *_call(*flat))
    return _trace_transpose(y, rows, *flat)


def _trace_transpose(y: Tensor, rows: int, *flat: Any) -> Tensor:
    if _needs_function():
        return _ProjectTransposeFunction.apply(rows, flat, y)
    return _project_transpose_op(y, rows, *flat)


def project(pieces: list[Tensor], proj_dim: int, call: Call, backend: str) -> Tensor:
    """scale * cat(pieces, 1) @ R[row_offset:, :K], a new tensor [B, K]."""
    if is_direct(pieces):
        return _project(pieces, proj_dim, call, backend)
    return _trace_project(pieces, proj_dim, *_flat(call, backend))


def project_transpose(y: Tensor, rows: int, call: Call, backend: str) -> Tensor:
    """scale * y @ R[row_offset:].T, a new tensor [B, rows]."""
    if is_direct([y]):
        return _project_transpose(y, rows, call, backend)
    return _trace_transpose(y, rows, *_flat(call, backend))


def project_into(
    function: str, pieces: list[Tensor], out: Tensor, call: Call, backend: str
) -> None:
    """``out`` [B, K] overwritten, or added to. ``function`` is named in messages."""
    if _is_direct_into(function, out, pieces):
        _project_into(pieces, out, call, backend)
        _note_written(out)
    else:
        _project_into_op(pieces, out, call.accumulate, *_flat(call, backend))


def project_transpose_into(function: str, y: Tensor, out: Tensor, call: Call, backend: str) -> None:
    """``out`` [B, n] overwritten. ``function`` is named in messages."""
    if _is_direct_into(function, out, [y]):
        _project_transpose_into(y, out, call, backend)
        _note_written(out)
    else:
        _project_transpose_into_op(y, out, *_flat(call, backend))


def matrix(
    rows: int,
    cols: int,
    col_offset: int,
    dtype: torch.dtype,
    device: torch.device,
    call: Call,
    backend: str,
) -> Tensor:
    """R[row_offset:, col_offset:], a new tensor [rows, cols]."""
    if is_direct([]):
        return _matrix(rows, cols, col_offset, dtype, device, call, backend)
    return _matrix_op(rows, cols, col_offset, dtype, device, *_flat(call, backend))


def matrix_rows(
    rows: Tensor, cols: int, col_offset: int, dtype: torch.dtype, device: torch.device, call: Call
) -> Tensor:
    """R[rows, col_offset:] by row numbers, int64 [n]; a new tensor [n, cols]."""
    if is_direct([rows]):
        return _matrix_rows(rows, cols, col_offset, dtype, device, call)
    return _matrix_rows_op(rows, cols, col_offset, dtype, device, *_flat(call, ""))


def _is_direct_into(function: str, out: Tensor, inputs: list[Tensor]) -> bool:
    """``is_direct``, where ``out`` is written. Raises ValueError where torch can't follow that."""
    if _in_transform():
        raise ValueError(
            f"{function}: received out= under a torch.func transform or forward-mode "
            "differentiation, which can't follow it; call without out="
        )
    return is_direct([out, *inputs])


def _note_written(out: Tensor) -> None:
    """Tell autograd that saved copies of ``out`` are stale, as an op does by itself."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
