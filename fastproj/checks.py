"""The argument checks: what a caller can get wrong is refused here, before anything is written.

Every function names the public ``function`` it checks for, what was received and what would work.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsFloat, SupportsIndex, cast

import numpy as np
import torch
from torch import Tensor

from fastproj.backends import registry
from fastproj.call import TERMS
from fastproj.spec import KINDS, MAX_BLOCK, MAX_COLS, MIN_BLOCK, MatrixKey, default_block

Grads = Tensor | Mapping[str, Tensor] | Sequence[Tensor]
Rows = SupportsIndex | slice

PRECISIONS = tuple(TERMS)
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_SEED = 1 << 64
MAX_STREAM = 1 << 32
MAX_VIEWS = 64  # a tensor that is not viewable as [B, p] is split into at most this many views


def describe(t: object) -> str:
    """A tensor as the error messages name it: ``[8, 1000] float16 on cpu``."""
    if not isinstance(t, Tensor):
        return f"{type(t).__name__} {t!r:.60}"
    layout = "" if t.layout is torch.strided else f" {_name(t.layout)}"
    return f"{list(t.shape)} {_name(t.dtype)} on {t.device}{layout}"


def listed(names: Iterable[object], most: int = 3) -> str:
    """A few of them, for messages: ``a, b, c ...``"""
    words = [str(name) for name in names]
    return f"{', '.join(words[:most])}{' ...' if len(words) > most else ''}"


def _name(torch_constant: object) -> str:
    return str(torch_constant).removeprefix("torch.")


def check_integer(
    function: str,
    name: str,
    value: object,
    low: int,
    high: int,
    expected: str = "an integer",
) -> int:
    """``value`` as an int in low <= value < high. Raises TypeError or ValueError."""
    if type(value) is not int:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError(f"{function}: received {name}={value!r}; expected {expected}")
        try:
            value = operator.index(cast(SupportsIndex, value))
        except TypeError:
            raise TypeError(
                f"{function}: received {name}={value!r} ({type(value).__name__}); "
                f"expected {expected}"
            ) from None
    if value < low or value >= high:
        top = f"2^{high.bit_length() - 1}" if high & (high - 1) == 0 else str(high)
        raise ValueError(f"{function}: received {name}={value}; expected {low} <= {name} < {top}")
    return value


def as_float(value: object) -> float | None:
    """A number of any library as a float; None for anything else, also for True and False."""
    if not isinstance(value, SupportsFloat) or isinstance(value, bool | np.bool_ | np.character):
        return None
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # several numbers, or too large
        return None


def check_flag(function: str, name: str, value: object) -> bool:
    """``value`` as a bool. Raises TypeError, also for strings such as "no", which count as true."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{function}: received {name}={value!r:.80} ({type(value).__name__}); expected True or "
            "False"
        )
    return bool(value)


def check_proj_dim(function: str, proj_dim: SupportsIndex) -> int:
    """``proj_dim`` as an int, 1 to MAX_COLS. Raises TypeError or ValueError."""
    return check_integer(function, "proj_dim", proj_dim, 1, MAX_COLS + 1)


def check_kind(function: str, kind: str) -> None:
    """Raise ValueError unless ``kind`` is one of KINDS."""
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{function}: received kind={kind!r:.80}; expected one of {known}")


def check_key(
    function: str,
    seed: SupportsIndex,
    kind: str,
    stream: SupportsIndex,
    stream_name: str = "stream",
    *,
    block: SupportsIndex | None = None,
    proj_dim: int | None = None,
) -> MatrixKey:
    """What names the matrix. Raises TypeError or ValueError, which call the stream so."""
    seed = check_integer(function, "seed", seed, 0, MAX_SEED)
    check_kind(function, kind)
    stream = check_integer(function, stream_name, stream, 0, MAX_STREAM)
    return MatrixKey(kind, seed, stream, check_block(function, kind, block, proj_dim))


def check_block(function: str, kind: str, block: SupportsIndex | None, proj_dim: int | None) -> int:
    """``block`` of kind sjlt, its default for ``proj_dim`` where it is None; 0 for other kinds.

    Raises TypeError or ValueError; also for kind sjlt with neither.
    """
    if kind != "sjlt":
        if block is None:
            return 0
        raise ValueError(
            f"{function}: received block={block!r} for kind={kind!r}; expected None "
            "(only kind='sjlt' has a block)"
        )
    expected = f"a power of two from {MIN_BLOCK} to {MAX_BLOCK}"
    if block is None:
        if proj_dim is None:
            raise ValueError(
                f"{function}: received kind='sjlt' without block=; expected {expected} "
                "(`Projector(...).block` is the one that a projector uses)"
            )
        return default_block(proj_dim)
    try:
        size = check_integer(function, "block", block, MIN_BLOCK, MAX_BLOCK + 1, expected)
    except ValueError:  # its bounds alone would make a caller try 20
        size = 0
    if size == 0 or size & (size - 1):
        raise ValueError(f"{function}: received block={block}; expected {expected}")
    return size


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


def check_scale(function: str, scale: object, proj_dim: int, block: int = 0) -> float:
    """The factor that ``scale`` stands for; ``block`` is MatrixKey's.

    Raises TypeError or ValueError.
    """
    if scale is None:
        return 1.0
    if isinstance(scale, str):
        if scale != "jl":
            raise ValueError(
                f'{function}: received scale={scale!r}; expected "jl", None or a number'
            )
        return math.sqrt((block or 1) / proj_dim)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        try:
            factor = scale * 1.0
        except OverflowError:
            factor = math.inf
    else:
        number = None if isinstance(scale, Tensor) else as_float(scale)
        if number is None:
            raise TypeError(
                f'{function}: received scale={scale!r}; expected "jl", None or a number'
            )
        factor = number
    if not abs(factor) < math.inf:
        raise ValueError(f"{function}: received scale={scale!r}; expected a finite number")
    return factor


def check_device(function: str, device: torch.device | str, *, values: bool = True) -> torch.device:
    """``device`` as a torch.device that exists here, and holds values unless ``values`` is False.

    Raises TypeError or ValueError.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(
            f"{function}: received device={device!r}; expected a torch.device or its name"
        )
    expected = 'expected a device of this machine, such as "cpu"'
    try:
        place = torch.device(device)
        if place.type == "cuda":  # counted: a tensor on "cuda" would take memory of the first GPU
            if not torch.cuda.is_available():
                raise RuntimeError("torch finds no GPU")
            # torch.compile can't trace the count.
            count = 0 if torch.compiler.is_compiling() else torch.cuda.device_count()
            if place.index and 0 < count <= place.index:
                raise RuntimeError(f"torch finds {count} GPU(s)")
        elif place.type not in ("cpu", "meta"):
            torch.empty(0, device=place)
    except (AssertionError, RuntimeError) as error:  # torch has both for a backend that isn't there
        why = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ValueError(
            f"{function}: received device={str(device)!r} ({why}); {expected}"
        ) from error
    if values and place.type == "meta":
        raise ValueError(
            f"{function}: received device='meta', where tensors have no values; {expected}"
        )
    return place


def check_entries(function: str, dtype: torch.dtype, kind: str) -> None:
    """Raise TypeError unless ``dtype`` holds the entries of R exactly."""
    if dtype not in DTYPES and (dtype is not torch.int8 or kind == "gaussian"):
        raise TypeError(
            f"{function}: received dtype={dtype} for kind={kind!r}; expected float32, bfloat16, "
            "float16 or float64 (or int8 for rademacher and sjlt)"
        )


def check_rows(function: str, name: str, rows: Rows, limit: int, also: str = "") -> tuple[int, int]:
    """(start, count) of ``rows``, an int (0 .. rows) or a slice with a stop and no step.

    ``also`` is what else the caller takes, for the message.
    """
    if not isinstance(rows, slice):
        expected = f"an integer n for the first n, or slice(start, stop){also}"
        return 0, check_integer(function, name, rows, 0, limit + 1, expected)
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


def without_values(t: Tensor) -> bool:
    """Whether a tensor has a shape and no values: on the meta device, or made up for tracing."""
    return t.is_meta or torch._guards.detect_fake_mode([t]) is not None


def check_row_numbers(function: str, rows: Tensor, limit: int) -> Tensor:
    """``rows``, if they are integers [n], 0 <= row < limit."""
    whole = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if rows.dim() != 1 or not whole:
        raise TypeError(
            f"{function}: received rows={describe(rows)}; expected row numbers [n], int64"
        )
    if rows.dtype in UNSIGNED:  # PyTorch has no minimum of these; from 2^63 on they are negative
        rows = rows.long()
    if rows.numel() and not (torch.compiler.is_compiling() or without_values(rows)):
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= limit:
            raise ValueError(
                f"{function}: received rows from {low} to {high}; expected 0 <= row < {limit}"
            )
    return rows


def check_input(function: str, name: str, t: object) -> Tensor:
    """``t``, if it is a strided floating-point Tensor that some backend may take."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{function}: received {name} of type {type(t).__name__}; expected a torch.Tensor "
            "(torch.from_numpy turns a NumPy array into one)"
        )
    if type(t) is not Tensor and hasattr(t, "full_tensor"):  # importing DTensor takes seconds
        raise TypeError(
            f"{function}: received {name}, a DTensor {describe(t)}; expected a torch.Tensor "
            f"({name}.full_tensor() is one, called in all processes; "
            "fastproj.trak.sharded.project_sharded takes gradients that are DTensors)"
        )
    if t.dtype not in DTYPES:
        convert = (
            f"torch.view_as_real({name}) holds real and imaginary parts"
            if t.is_complex()
            else f"{name}.dequantize() holds its values"
            if t.is_quantized
            else f"convert with {name}.float() if that is what you mean"
        )
        raise TypeError(
            f"{function}: received {name} {describe(t)}; expected float32, bfloat16, float16 or "
            f"float64 ({convert})"
        )
    if t.is_nested:
        raise TypeError(
            f"{function}: received {name}, a nested {_name(t.dtype)} tensor; expected a strided "
            f"tensor (torch.nested.to_padded_tensor({name}, 0.0, output_size) makes one, with the "
            "same output_size for all batches, since it decides which row of R an entry meets)"
        )
    if t.layout is not torch.strided:
        raise TypeError(
            f"{function}: received {name} {describe(t)}; expected a strided tensor "
            f"({name}.to_dense() makes one)"
        )
    return t


def _outer(t: Tensor) -> tuple[int, ...]:
    """The dimensions of ``t`` [B, ...] after the first that can't be flattened into one view."""
    if t.dim() <= 2 or t.is_contiguous():
        return ()
    # Dimension d runs on into d + 1 when its stride is that of the whole inner part.
    shape, stride = t.shape, t.stride()
    split, inner = t.dim() - 1, t.dim() - 1
    for d in range(t.dim() - 2, 0, -1):
        if shape[d] != 1 and shape[inner] != 1 and stride[d] != stride[inner] * shape[inner]:
            break
        if shape[d] != 1:
            inner = d
        split = d
    return tuple(shape[1:split])


def _views(t: Tensor) -> list[Tensor]:
    """``t`` [B, ...] as [B, p_i] views whose columns, in order, are those of t.flatten(1).

    Views wherever MAX_VIEWS of them suffice; a layout that would need more is copied.
    """
    if t.dim() == 1:
        return [t.unsqueeze(1)]
    if t.dim() == 2:
        return [t]
    outer = _outer(t)
    if math.prod(outer) > MAX_VIEWS:
        return [t.reshape(t.shape[0], -1)]
    parts = [t]
    for _ in outer:
        parts = [part.select(1, i) for part in parts for i in range(part.shape[1])]
    return [part.flatten(1) for part in parts]


def check_grads(function: str, grads: Grads) -> list[Tensor]:
    """``grads`` as checked [B, p_i] views of one batch size, dtype and device; no empty ones."""
    if isinstance(grads, Tensor):
        grads = check_input(function, "grads", grads)
        if grads.dim() != 2:
            cure = (
                "a list or dict of [B, ...] tensors is flattened per sample, so [grads] works too"
                if grads.dim() > 2
                else "grads.reshape(1, -1) is one sample"
            )
            raise ValueError(
                f"{function}: received grads {describe(grads)}; expected [B, P] ({cure})"
            )
        if grads.shape[1] == 0:
            raise ValueError(
                f"{function}: received grads {describe(grads)}; expected [B, P] with P >= 1"
            )
        return [grads]
    if isinstance(grads, Mapping):
        named = [(f"grads[{name!r}]", t) for name, t in grads.items()]
    elif isinstance(grads, Sequence):
        named = [(f"grads[{i}]", t) for i, t in enumerate(grads)]
    else:
        raise TypeError(
            f"{function}: received grads of type {type(grads).__name__}; expected a torch.Tensor "
            "[B, P], or a dict or sequence of [B, ...] tensors (torch.from_numpy turns a NumPy "
            "array into a tensor)"
        )
    if not named:
        raise ValueError(
            f"{function}: received an empty {type(grads).__name__} of grads; expected at least one "
            "tensor [B, ...]"
        )
    pieces: list[Tensor] = []
    for name, t in named:
        t = check_input(function, name, t)
        if t.dim() == 0:
            raise ValueError(f"{function}: received {name} {describe(t)}; expected [B, ...]")
        first_name, first = named[0]
        if t.shape[0] != first.shape[0] or t.dtype != first.dtype or t.device != first.device:
            cure = " (grads of one batch)"
            if t.is_meta != first.is_meta:
                cure = " (a tensor on meta has no values)"
            elif t.shape[0] == first.shape[0]:
                cure = f" ({name}.to({first_name}) casts it)"
            raise ValueError(
                f"{function}: received {first_name} {describe(first)} but {name} {describe(t)}; "
                f"expected one batch size, dtype and device throughout{cure}"
            )
        pieces += [view for view in _views(t) if view.shape[1] != 0]
    if not pieces:
        raise ValueError(
            f"{function}: received {len(named)} tensors with no elements per sample; "
            "expected P >= 1 in all"
        )
    return pieces


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_out(
    function: str, out: Tensor, shape: tuple[int, int], inputs: list[Tensor], source: str
) -> None:
    """Refuse an ``out`` that can't take the result: nothing has been written yet."""
    dtype, device = result_dtype(inputs[0].dtype), inputs[0].device
    expected = f"{list(shape)} {_name(dtype)} on {device}"
    if not isinstance(out, Tensor):
        raise TypeError(
            f"{function}: received out of type {type(out).__name__}; expected a Tensor {expected}"
        )
    if out.dtype != dtype:
        raise TypeError(f"{function}: received out {describe(out)}; expected {expected}")
    if out.layout is not torch.strided or out.shape != shape or out.device != device:
        raise ValueError(f"{function}: received out {describe(out)}; expected {expected}")
    tracing = torch.compiler.is_compiling()
    if not tracing and out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{function}: received out {describe(out)} made in inference mode, which torch allows "
            "no one to write outside it; expected one made outside (out.clone() is one), or a call "
            "under torch.inference_mode()"
        )
    if not tracing and out.is_neg():
        raise ValueError(
            f"{function}: received out {describe(out)} with its negative bit set (as in x.conj()"
            ".imag); expected a tensor that can be written directly (out.resolve_neg() is one)"
        )
    if torch.is_grad_enabled() and (out.requires_grad or any(t.requires_grad for t in inputs)):
        which = "an out" if out.requires_grad else f"a {source}"
        raise ValueError(
            f"{function}: received out= and {which} that requires grad, which out= can't "
            "differentiate; call without out=, or under torch.no_grad()"
        )


def check_memory(function: str, out: Tensor, inputs: list[Tensor], source: str) -> None:
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
            f"{function}: received out {describe(out)} with strides {(s0, s1)}, whose elements "
            "overlap in memory; expected one without overlap (out.contiguous() makes one)"
        )
    for t in inputs:
        if _share_memory(out, t):
            raise ValueError(
                f"{function}: received out {describe(out)} that shares memory with {source} "
                f"{describe(t)}; expected separate memory (torch.empty_like(out) has it)"
            )


def check_copied(function: str, out: Tensor, grads: Grads) -> None:
    """Refuse an ``out`` on memory of a piece that is copied: check_memory sees only the copy."""
    pieces = grads.values() if isinstance(grads, Mapping) else grads
    for t in pieces:
        if out.numel() == 0 or t.numel() == 0 or math.prod(_outer(t)) <= MAX_VIEWS:
            continue
        start, start_t = out.data_ptr(), t.data_ptr()
        if start < start_t + _extent(t) and start_t < start + _extent(out):
            raise ValueError(
                f"{function}: received out {describe(out)} that shares memory with grads "
                f"{describe(t)}; expected separate memory (torch.empty_like(out) has it)"
            )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors [B, n] with elements may share one. False only where they don't.

    Rows of ``a`` don't overlap.
    """
    start_a, start_b = a.data_ptr(), b.data_ptr()
    if start_a >= start_b + _extent(b) or start_b >= start_a + _extent(a):
        return False
    pitch = a.stride(0) * a.element_size()
    if a.shape[0] == 1 or pitch != b.stride(0) * b.element_size():
        return True
    # Two column ranges of one wider matrix: rows recur at one pitch, so compare them modulo it.
    return not (
        (start_b - start_a) % pitch >= _extent(a[:1])
        and (start_a - start_b) % pitch >= _extent(b[:1])
    )


def _extent(t: Tensor) -> int:
    """Bytes from the first element of a non-empty tensor to the end of its last one."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()
