"""Everything a caller can get wrong: the error names what came and what would work.

Each case is refused before anything is written: ``out`` is full of NaN and stays so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastproj
import fastproj.torch_ops  # registers torch.ops.fastproj
from fastproj.backends import registry
from fastproj.trak.sharded import project_sharded

B, P, K = 3, 20, 5
G = torch.ones(B, P)
Y = torch.ones(B, K)


def nan_out(*shape: int, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype, **kwargs)


def case(name: str, error: type[Exception], *words: str, **kwargs: Any) -> Any:
    """A parametrize entry: the call's changes, the error and words that its message has."""
    return pytest.param(kwargs, error, words, id=name)


def refused(call: Callable[[], object], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value), str(caught.value)


# Arguments that project, project_transpose and matrix share.
SHARED = [
    case("seed_negative", ValueError, "seed=-1", "0 <= seed < 2^64", seed=-1),
    case("seed_too_large", ValueError, "seed=18446744073709551616", "2^64", seed=2**64),
    case("seed_float", TypeError, "seed=1.0", "float", "integer", seed=1.0),
    case("seed_bool", TypeError, "seed=True", "integer", seed=True),
    case("seed_flag", TypeError, "seed=tensor(True)", "integer", seed=torch.tensor(True)),
    case("seed_none", TypeError, "seed=None", "integer", seed=None),
    case("stream_negative", ValueError, "stream=-1", "2^32", stream=-1),
    case("stream_too_large", ValueError, "stream=4294967296", "2^32", stream=2**32),
    case("stream_str", TypeError, "stream='0'", "integer", stream="0"),
    case("kind_unknown", ValueError, "'normal'", "rademacher, gaussian", kind="normal"),
    case("kind_array", ValueError, "array(", "rademacher", kind=np.array(["sjlt", "gaussian"])),
    case("kind_none", ValueError, "kind=None", "rademacher, gaussian", kind=None),
    case(
        "backend_unknown", ValueError, "'abacus'", "cuda, triton, cpu, reference", backend="abacus"
    ),
]
HOW = [
    case("precision", ValueError, "'exact'", "highest, high, medium", precision="exact"),
    case("precision_tf32", ValueError, "'tf32'", "highest, high, medium", precision="tf32"),
    case("scale_word", ValueError, "'JL'", '"jl"', scale="JL"),
    case("scale_nan", ValueError, "nan", "finite", scale=math.nan),
    case("scale_inf", ValueError, "inf", "finite", scale=-math.inf),
    case("scale_huge", ValueError, "finite", scale=10**400),
    case("scale_bool", TypeError, "True", '"jl"', scale=True),
    case("scale_array", TypeError, "array([1., 2.])", '"jl"', scale=np.array([1.0, 2.0])),
    case("scale_list", TypeError, "[1.0]", '"jl"', scale=[1.0]),
    case("scale_tensor", TypeError, '"jl"', scale=torch.tensor(0.5)),
]


def floats(*dtypes: torch.dtype) -> list[Any]:
    return [
        case(f"dtype_{dtype}", TypeError, str(dtype).removeprefix("torch."), "float32", dtype=dtype)
        for dtype in dtypes
    ]


WRONG_DTYPES = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]

PROJECT = [
    *SHARED,
    *HOW,
    *[
        case(
            f"grads_{dtype}",
            TypeError,
            f"[3, 20] {str(dtype).removeprefix('torch.')} on cpu",
            "float32, bfloat16, float16 or float64",
            grads=G.to(dtype),
        )
        for dtype in WRONG_DTYPES
    ],
    case("grads_numpy", TypeError, "ndarray", "torch.from_numpy", grads=np.ones((B, P))),
    case("grads_none", TypeError, "NoneType", "torch.Tensor", grads=None),
    case("grads_number", TypeError, "float", "dict", grads=1.0),
    case("grads_iterator", TypeError, "list_iterator", "sequence", grads=iter([G])),
    case("grads_1d", ValueError, "[20]", "grads.reshape(1, -1) is one sample", grads=G[0]),
    case("grads_3d", ValueError, "[3, 20, 1]", "[B, P]", "[grads]", grads=G[:, :, None]),
    case("grads_0d", ValueError, "[]", "[B, P]", grads=torch.tensor(1.0)),
    case("grads_no_columns", ValueError, "[3, 0]", "P >= 1", grads=G[:, :0]),
    case("grads_sparse", TypeError, "sparse_coo", "to_dense", grads=G.to_sparse()),
    case("dict_empty", ValueError, "empty dict", "at least one tensor", grads={}),
    case("list_empty", ValueError, "empty list", "at least one tensor", grads=[]),
    case(
        "complex", TypeError, "complex64", "torch.view_as_real(grads)", grads=G.to(torch.complex64)
    ),
    case("list_of_empties", ValueError, "2 tensors", "P >= 1", grads=[G[:, :0], G[:, :0]]),
    case(
        "dict_batches_disagree",
        ValueError,
        "grads['w'] [3, 20]",
        "grads['b'] [2, 20]",
        "one batch size",
        "(grads of one batch)",
        grads={"w": G, "b": G[:2]},
    ),
    case(
        "dict_batches_disagree_on_an_empty_piece",
        ValueError,
        "grads['w'] [3, 20]",
        "grads['b'] [2, 0]",
        grads={"w": G, "b": G[:2, :0]},
    ),
    case(
        "list_dtypes_disagree",
        ValueError,
        "grads[0] [3, 20] float32",
        "grads[1] [3, 20] float64",
        "(grads[1].to(grads[0]) casts it)",
        grads=[G, G.double()],
    ),
    case(
        "devices_disagree",
        ValueError,
        "grads[0] [3, 20] float32 on cpu",
        "grads[1] [3, 20] float32 on meta",
        "(a tensor on meta has no values)",
        grads=[G, G.to("meta")],
    ),
    case("list_item", TypeError, "grads[1] of type list", grads=[G, [1.0]]),
    case("dict_integer", TypeError, "grads['b']", "int64", grads={"w": G, "b": G.long()}),
    case("list_0d", ValueError, "grads[0] []", "[B, ...]", grads=[torch.tensor(1.0)]),
    case("string", TypeError, "grads[0] of type str", grads="grads"),
    case("proj_dim_zero", ValueError, "proj_dim=0", "1 <= proj_dim", proj_dim=0),
    case("proj_dim_negative", ValueError, "proj_dim=-4", "1 <= proj_dim", proj_dim=-4),
    case("proj_dim_too_large", ValueError, "proj_dim=4294967297", "4294967297", proj_dim=2**32 + 1),
    case("proj_dim_float", TypeError, "proj_dim=5.0", "integer", proj_dim=5.0),
    case("row_offset_negative", ValueError, "row_offset=-1", "0 <= row_offset", row_offset=-1),
    case("row_offset_too_large", ValueError, "row_offset", "2^56", row_offset=2**56),
    case("rows_too_far", ValueError, "P=20", "2^56", row_offset=2**56 - 19),
    case("row_offset_none", TypeError, "row_offset=None", "integer", row_offset=None),
]


@pytest.mark.parametrize(("changes", "error", "words"), PROJECT)
@pytest.mark.parametrize("accumulate", [False, True])
def test_project(
    changes: dict[str, Any], error: type[Exception], words: tuple[str, ...], accumulate: bool
) -> None:
    out = nan_out(B, K)
    call = {"grads": G, "proj_dim": K, "out": out, "accumulate": accumulate, **changes}
    refused(lambda: fastproj.project(**call), error, ("project: received", *words))
    assert out.isnan().all()
    del call["out"], call["accumulate"]
    refused(lambda: fastproj.project(**call), error, words)


TRANSPOSE = [
    *SHARED,
    *HOW,
    case("y_integer", TypeError, "[3, 5] int64", "float32", y=Y.long()),
    case("y_complex", TypeError, "complex64", "float32", y=Y.to(torch.complex64)),
    case("y_list", TypeError, "list", "torch.Tensor", y=[Y]),
    case("y_1d", ValueError, "[5]", "[B, K]", y=Y[0]),
    case("y_no_columns", ValueError, "[3, 0]", "K >= 1", y=Y[:, :0]),
    case("y_sparse", TypeError, "sparse_coo", "to_dense", y=Y.to_sparse()),
    case("rows_negative", ValueError, "rows=-1", rows=-1),
    case("rows_too_many", ValueError, f"rows={2**56 + 1}", rows=2**56 + 1),
    case("rows_float", TypeError, "rows=2.5", rows=2.5),
    case(
        "rows_open", ValueError, "slice(3, None, None)", "slice(start, stop)", rows=slice(3, None)
    ),
    case("rows_step", ValueError, "slice(0, 20, 2)", "without a step", rows=slice(0, 20, 2)),
    case("rows_backwards", ValueError, "slice(9, 3, None)", "start <= stop", rows=slice(9, 3)),
    case("rows_negative_start", ValueError, "rows.start=-2", rows=slice(-2, 18)),
    case("rows_negative_stop", ValueError, "rows.stop=-2", rows=slice(0, -2)),
    case("rows_none", TypeError, "rows=None", rows=None),
    case("rows_list", TypeError, "rows=[0, 1]", "or slice(start, stop)", rows=[0, 1]),
    case("rows_range", TypeError, "rows=range(0, 3)", "or slice(start, stop)", rows=range(3)),
]


@pytest.mark.parametrize(("changes", "error", "words"), TRANSPOSE)
def test_project_transpose(
    changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    out = nan_out(B, P)
    call = {"y": Y, "rows": P, "out": out, **changes}
    refused(lambda: fastproj.project_transpose(**call), error, ("project_transpose: ", *words))
    assert out.isnan().all()


MATRIX = [
    *SHARED,
    *[
        case(f"dtype_{dtype}", TypeError, str(dtype), "float32", dtype=dtype)
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)
    ],
    case("dtype_int8_gaussian", TypeError, "int8", "'gaussian'", dtype=torch.int8, kind="gaussian"),
    case("dtype_name", TypeError, "float32", dtype="float32"),
    case("cols_too_many", ValueError, f"cols={2**32 + 1}", cols=2**32 + 1),
    case("cols_negative", ValueError, "cols=-1", cols=-1),
    case("rows_open", ValueError, "slice(0, None, None)", rows=slice(0, None)),
    case("cols_step", ValueError, "slice(0, 4, 2)", cols=slice(0, 4, 2)),
    case("rows_2d", TypeError, "[2, 3] int64", "row numbers [n]", rows=torch.zeros(2, 3).long()),
    case("rows_float", TypeError, "[3] float32", "int64", rows=torch.zeros(3)),
    case("rows_below", ValueError, "from -1 to 5", "0 <= row < ", rows=torch.tensor([5, -1])),
    case("rows_above", ValueError, f"to {2**56}", rows=torch.tensor([2**56])),
    case("rows_numpy", TypeError, "a tensor of row numbers", rows=np.array([1, 2])),
]


@pytest.mark.parametrize(("changes", "error", "words"), MATRIX)
def test_matrix(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    call = {"rows": P, "cols": K, **changes}
    refused(lambda: fastproj.matrix(**call), error, ("matrix: received", *words))


# ---- out ---------------------------------------------------------------------------------------


def with_base(base: Tensor, view: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    return base, view(base)


OUTS = [
    ("shape", ValueError, ("[3, 6]", "[3, 5] float32 on cpu"), nan_out(3, 6)),
    ("batch", ValueError, ("[4, 5]", "[3, 5]"), nan_out(4, 5)),
    ("flat", ValueError, ("[15]", "[3, 5]"), nan_out(15)),
    ("float64", TypeError, ("float64", "[3, 5] float32"), nan_out(3, 5, dtype=torch.float64)),
    ("bfloat16", TypeError, ("bfloat16", "[3, 5] float32"), nan_out(3, 5, dtype=torch.bfloat16)),
    ("integer", TypeError, ("int64", "float32"), torch.zeros(3, 5, dtype=torch.int64)),
    ("other_device", ValueError, ("meta", "cpu"), nan_out(3, 5, device="meta")),
    ("expanded", ValueError, ("overlap", "(0, 1)"), nan_out(1, 5).expand(3, 5)),
    ("expanded_columns", ValueError, ("overlap", "(1, 0)"), nan_out(3, 1).expand(3, 5)),
    ("one_element", ValueError, ("overlap", "(0, 0)"), nan_out(1, 1).expand(3, 5)),
    ("windows", ValueError, ("overlap", "(2, 1)"), nan_out(20).as_strided((3, 5), (2, 1))),
    ("last_column", ValueError, ("overlap", "(4, 1)"), nan_out(20).as_strided((3, 5), (4, 1))),
    ("last_row", ValueError, ("overlap", "(1, 2)"), nan_out(20).as_strided((3, 5), (1, 2))),
    ("diagonals", ValueError, ("overlap", "(3, 2)"), nan_out(20).as_strided((3, 5), (3, 2))),
    ("sparse", ValueError, ("sparse_coo", "[3, 5]"), torch.zeros(3, 5).to_sparse()),
    ("numpy", TypeError, ("ndarray", "[3, 5] float32"), np.full((3, 5), math.nan, np.float32)),
    ("requires_grad", ValueError, ("an out that requires grad",), nan_out(3, 5).requires_grad_()),
    (
        "negative_bit",
        ValueError,
        ("negative bit",),
        torch.complex(nan_out(3, 5), nan_out(3, 5)).conj().imag,
    ),
]


@pytest.mark.parametrize(
    ("error", "words", "out"), [pytest.param(*rest, id=name) for name, *rest in OUTS]
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_out(error: type[Exception], words: tuple[str, ...], out: Any, accumulate: bool) -> None:
    before = out.clone() if isinstance(out, Tensor) else out.copy()
    call = {"proj_dim": K, "out": out, "accumulate": accumulate}
    refused(lambda: fastproj.project(G, **call), error, ("project: received out", *words))
    if isinstance(out, Tensor) and not out.is_meta and out.layout is torch.strided:
        assert torch.equal(out.isnan(), before.isnan())


@pytest.mark.parametrize(
    "out",
    [nan_out(4, 20), nan_out(3, 20, dtype=torch.float16), nan_out(1, 20).expand(3, 20)],
    ids=["shape", "dtype", "expanded"],
)
def test_out_of_project_transpose(out: Tensor) -> None:
    with pytest.raises((TypeError, ValueError), match="project_transpose: received out"):
        fastproj.project_transpose(Y, P, out=out)
    assert out.isnan().all()


def test_strides_without_overlap_are_taken(backend: str, device: str) -> None:
    """(3, 2) overlaps in [3, 5], but not in [2, 3] or [3, 3]."""
    grads = G.to(device)
    for shape, strides in (
        ((2, 3), (3, 2)),
        ((3, 1), (0 + 7, 5)),
        ((3, 5), (1, 3)),
        ((3, 3), (3, 2)),
    ):
        out = nan_out(40, device=device).as_strided(shape, strides)
        got = fastproj.project(grads[: shape[0]], shape[1], out=out, backend=backend)
        assert torch.equal(got, fastproj.project(grads[: shape[0]], shape[1], backend=backend))


ALIASES = {
    "same": lambda buffer: (buffer[:60].view(3, 20), buffer[:15].view(3, 5)),
    "tail": lambda buffer: (buffer[:60].view(3, 20), buffer[59:74].view(3, 5)),
    "columns": lambda buffer: (buffer.view(4, 25)[:3, :20], buffer.view(4, 25)[:3, 19:24]),
    "columns_shifted": lambda buffer: (buffer.view(4, 25)[:3, 5:], buffer.view(4, 25)[1:, 1:6]),
    "transposed": lambda buffer: (buffer[:60].view(3, 20), buffer[30:45].view(5, 3).T),
    "one_row": lambda buffer: (buffer[:20].expand(3, 20), buffer[10:25].view(3, 5)),
    "other_pitch": lambda buffer: (
        buffer.as_strided((3, 5), (10, 1), 10),
        buffer.as_strided((3, 5), (20, 1), 5),
    ),
}


@pytest.mark.parametrize("layout", ALIASES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_out_that_shares_memory_with_grads(layout: str, accumulate: bool) -> None:
    buffer = nan_out(100)
    grads, out = ALIASES[layout](buffer)
    with pytest.raises(ValueError, match=r"project: received out .* shares memory with grads"):
        fastproj.project(grads, K, out=out, accumulate=accumulate)
    with pytest.raises(ValueError, match="shares memory with grads"):
        fastproj.project({"a": torch.ones(3, 2), "b": grads}, K, out=out, accumulate=accumulate)
    assert buffer.isnan().all()


def test_one_row_of_stride_0_that_shares_memory_with_grads() -> None:
    buffer = nan_out(20)
    with pytest.raises(ValueError, match="shares memory with grads"):
        fastproj.project(
            buffer.as_strided((1, 20), (0, 1)), K, out=buffer.as_strided((1, K), (0, 1))
        )


def test_out_that_shares_memory_with_grads_that_are_copied() -> None:
    base = torch.randn(4, 100, 70)
    before = base.clone()
    out = base.view(4, -1)[:, :8]
    pieces = [base.permute(0, 2, 1)]  # more views than are made: this piece is copied
    refused(lambda: fastproj.project(pieces, 8, out=out), ValueError, ("shares memory", "grads"))
    assert torch.equal(base, before)
    elsewhere = nan_out(4, 8)
    fastproj.project(pieces, 8, out=elsewhere)
    assert elsewhere.isfinite().all()


def test_out_made_in_inference_mode() -> None:
    with torch.inference_mode():
        out = torch.zeros(3, K)
    refused(lambda: fastproj.project(G, K, out=out), ValueError, ("inference mode", "out.clone()"))
    assert not out.any()
    with torch.inference_mode():
        fastproj.project(G, K, out=out)
    assert out.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_grads() -> None:
    nested = torch.nested.nested_tensor([torch.ones(3), torch.ones(4)])
    refused(lambda: fastproj.project(nested, K), TypeError, ("nested", "to_padded_tensor"))


def test_shards_of_grads() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shards = distribute_tensor(G, init_device_mesh("cpu", (1,)), [Shard(1)])
        words = ("a DTensor [3, 20] float32 on cpu", ".full_tensor()", "project_sharded")
        refused(lambda: fastproj.project(shards, K), TypeError, ("grads", *words))
        refused(lambda: fastproj.project([G, shards], K), TypeError, ("grads[1]", *words))
        refused(lambda: fastproj.project_transpose(shards, 9), TypeError, ("y", *words))
        obeyed = fastproj.project(shards.full_tensor(), K)
        assert torch.equal(obeyed, fastproj.project(G, K))
        assert torch.equal(project_sharded(fastproj.Projector(P, K), {"g": shards}), obeyed)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantized_grads() -> None:
    quantized = torch.quantize_per_tensor(G, 0.1, 0, torch.qint8)
    refused(lambda: fastproj.project(quantized, K), TypeError, ("qint8", "grads.dequantize()"))


@pytest.mark.parametrize(
    ("device", "error"), [("abacus", ValueError), (7, TypeError), ("cuda", ValueError)]
)
def test_matrix_on_a_device_that_is_not_there(device: Any, error: type[Exception]) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(lambda: fastproj.matrix(4, 4, device=device), error, (repr(device), "expected a"))


def test_matrix_beyond_any_memory() -> None:
    refused(lambda: fastproj.matrix(2**40, 2**30), ValueError, ("fits in memory",))


def test_out_that_shares_memory_with_y() -> None:
    buffer = nan_out(100)
    with pytest.raises(
        ValueError, match=r"project_transpose: received out .* shares memory with y"
    ):
        fastproj.project_transpose(buffer[:15].view(3, 5), 20, out=buffer[14:74].view(3, 20))
    assert buffer.isnan().all()


def test_out_with_grads_that_require_grad() -> None:
    out = nan_out(B, K)
    with pytest.raises(ValueError, match="out= and a grads that requires grad"):
        fastproj.project({"a": G, "b": G.clone().requires_grad_()}, K, out=out)
    with pytest.raises(ValueError, match="out= and a y that requires grad"):
        fastproj.project_transpose(Y.clone().requires_grad_(), P, out=nan_out(B, P))
    assert out.isnan().all()


@pytest.mark.parametrize("accumulate", ["no", "False", 2, None, torch.tensor([1, 0])])
def test_accumulate_is_true_or_false(accumulate: Any) -> None:
    out = torch.ones(B, K)
    projector = fastproj.Projector(P, K)
    for project in (partial(fastproj.project, G, K), partial(projector.project, G)):
        with pytest.raises(TypeError, match=r"accumulate=.*; expected True or False"):
            project(out=out, accumulate=accumulate)
    assert torch.equal(out, torch.ones(B, K))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_row_numbers_may_be_unsigned(dtype: torch.dtype) -> None:
    rows = torch.tensor([5, 0, 2])
    assert torch.equal(fastproj.matrix(rows.to(dtype), K), fastproj.matrix(rows, K))
    if dtype == torch.uint64:
        with pytest.raises(ValueError, match="expected 0 <= row"):
            fastproj.matrix(torch.tensor([-1]).to(dtype), K)


def test_row_numbers_without_values_give_a_shape() -> None:
    found = fastproj.matrix(torch.tensor([5, 0], device="meta"), K, device="meta")
    assert (found.shape, found.device.type) == ((2, K), "meta")
    with FakeTensorMode():
        assert fastproj.matrix(torch.tensor([5, 0]), K).shape == (2, K)


def test_accumulate_without_out() -> None:
    with pytest.raises(ValueError, match="accumulate=True without out"):
        fastproj.project(G, K, accumulate=True)


@pytest.mark.parametrize("start", [0, B])
def test_tensors_whose_memory_is_gone(start: int) -> None:
    """As FSDP frees it. A view into the middle begins elsewhere than at address 0."""
    whole = torch.ones(2 * B, P)
    grads, none = whole[start : start + B], whole[:0]
    whole.untyped_storage().resize_(0)
    words = ("[3, 20]", "storage is empty")
    refused(lambda: fastproj.project(grads, K), ValueError, words)
    refused(lambda: fastproj.project_transpose(grads, P), ValueError, words)
    refused(lambda: fastproj.project(G, P, out=grads), ValueError, words)
    assert fastproj.project(none, K).shape == (0, K)


# ---- the ops, called directly --------------------------------------------------------------------
# What passes here reaches a kernel, which reads and writes where the shapes say.

OPS = torch.ops.fastproj
CALL = (0, 1.0, "highest,", "rademacher,0", 0, 0)
SPARSE = (0, 1.0, "highest,", "sjlt,16", 0, 0)
GAUSSIAN = (0, 1.0, "highest,", "gaussian,0", 0, 0)
CPU = torch.device("cpu")
WITHOUT_CHECKS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no_columns": (lambda: OPS.project([G], 0, *CALL), ValueError, "proj_dim=0"),
    "no_columns_sparse": (lambda: OPS.project([G], 0, *SPARSE), ValueError, "proj_dim=0"),
    "too_many_columns": (lambda: OPS.project([G[:0]], 2**33, *CALL), ValueError, "proj_dim"),
    "no_pieces": (lambda: OPS.project([], K, *CALL), ValueError, "no tensors"),
    "batch": (lambda: OPS.project([G, G[:1]], K, *CALL), ValueError, "[3, 20] float32"),
    "dtypes": (lambda: OPS.project([G, G.double()], K, *CALL), ValueError, "[3, 20] float64"),
    "int8": (lambda: OPS.project([G.to(torch.int8)], K, *CALL), TypeError, "int8"),
    "sparse": (lambda: OPS.project([G.to_sparse()], K, *CALL), TypeError, "to_dense"),
    "dimensions": (lambda: OPS.project([G[0]], K, *CALL), ValueError, "[20] float32"),
    "row_negative": (lambda: OPS.project([G], K, -1, *CALL[1:]), ValueError, "row_offset=-1"),
    "row_beyond": (lambda: OPS.project([G], K, 2**56 - 1, *CALL[1:]), ValueError, "2^56"),
    "scale": (lambda: OPS.project([G], K, 0, math.nan, *CALL[2:]), ValueError, "scale=nan"),
    "precision": (lambda: OPS.project([G], K, 0, 1.0, "low,", *CALL[3:]), ValueError, "'low'"),
    "out_too_small": (
        lambda: OPS.project_into([G], nan_out(B - 1, K), False, *CALL),
        ValueError,
        "expected [3, 5] float32",
    ),
    "out_dtype": (
        lambda: OPS.project_into([G], nan_out(B, K, dtype=torch.float16), False, *CALL),
        ValueError,
        "expected [3, 5] float32",
    ),
    "out_without_columns": (
        lambda: OPS.project_into([G], nan_out(B, 0), False, *CALL),
        ValueError,
        "proj_dim=0",
    ),
    "out_flat": (
        lambda: OPS.project_into([G], nan_out(B * K), False, *CALL),
        ValueError,
        "[15] float32",
    ),
    "transpose_rows": (lambda: OPS.project_transpose(Y, -1, *CALL), ValueError, "-1 rows"),
    "transpose_row": (
        lambda: OPS.project_transpose(Y, P, -1, *CALL[1:]),
        ValueError,
        "row_offset=-1",
    ),
    "transpose_beyond": (
        lambda: OPS.project_transpose(Y, P, 2**56 - 1, *CALL[1:]),
        ValueError,
        "2^56",
    ),
    "transpose_without_columns": (
        lambda: OPS.project_transpose(Y[:, :0], P, *CALL),
        ValueError,
        "proj_dim=0",
    ),
    "transpose_complex": (
        lambda: OPS.project_transpose(Y.to(torch.complex64), P, *CALL),
        TypeError,
        "complex64",
    ),
    "transpose_out": (
        lambda: OPS.project_transpose_into(Y, nan_out(B - 1, P), *CALL),
        ValueError,
        "expected [3, 20] float32",
    ),
    "transpose_out_dtype": (
        lambda: OPS.project_transpose_into(Y, nan_out(B, P, dtype=torch.bfloat16), *CALL),
        ValueError,
        "expected [3, 20] float32",
    ),
    "block_row": (
        lambda: OPS.matrix(P, K, 0, torch.float32, CPU, 2**56, *CALL[1:]),
        ValueError,
        "row_offset + rows",
    ),
    "block_rows": (lambda: OPS.matrix(-1, K, 0, torch.float32, CPU, *CALL), ValueError, "rows=-1"),
    "block_column": (
        lambda: OPS.matrix(P, K, -1, torch.float32, CPU, *CALL),
        ValueError,
        "col_offset=-1",
    ),
    "block_columns": (
        lambda: OPS.matrix(P, K, 2**32, torch.float32, CPU, *CALL),
        ValueError,
        "col_offset + cols",
    ),
    "block_dtype": (
        lambda: OPS.matrix(P, K, 0, torch.int8, CPU, *GAUSSIAN),
        TypeError,
        "dtype=torch.int8",
    ),
    "rows_negative": (
        lambda: OPS.matrix_rows(torch.tensor([-1]), K, 0, torch.float32, CPU, *CALL),
        ValueError,
        "from -1",
    ),
    "rows_float": (
        lambda: OPS.matrix_rows(torch.tensor([0.5]), K, 0, torch.float32, CPU, *CALL),
        TypeError,
        "[1] float32",
    ),
    "rows_columns": (
        lambda: OPS.matrix_rows(torch.tensor([1]), -1, 0, torch.float32, CPU, *CALL),
        ValueError,
        "cols=-1",
    ),
    "rows_dtype": (
        lambda: OPS.matrix_rows(torch.tensor([1]), K, 0, torch.int8, CPU, *GAUSSIAN),
        TypeError,
        "dtype=torch.int8",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_CHECKS)
def test_an_op_called_directly(name: str) -> None:
    call, error, words = WITHOUT_CHECKS[name]
    refused(call, error, (words, "torch.ops.fastproj: received"))


def test_row_numbers_in_a_compiled_graph() -> None:
    """Their values are known only when it runs."""
    run = torch.compile(lambda rows: fastproj.matrix(rows, K), backend="aot_eager")
    rows = torch.tensor([5, 0])
    assert torch.equal(run(rows), fastproj.matrix(rows, K))
    for beyond in (-1, 2**56):
        with pytest.raises(ValueError, match=f"received rows from .*{beyond}.*; expected 0 <= row"):
            run(torch.tensor([beyond, beyond]))
    torch._dynamo.reset()


# ---- backends ----------------------------------------------------------------------------------


def test_a_backend_that_is_missing_names_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        registry, "unavailable", lambda name: "no abacus; buy one" if name == "cpu" else None
    )
    registry._choose.cache_clear()
    out = nan_out(B, K)
    with pytest.raises(
        ValueError, match=r"'cpu', which can't run here: no abacus; buy one\. Usable"
    ):
        fastproj.project(G, K, out=out, backend="cpu")
    with pytest.raises(ValueError, match="no abacus"):
        fastproj.Projector(P, K, backend="cpu")
    assert out.isnan().all()
    registry._choose.cache_clear()


def test_a_backend_that_cannot_take_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = registry.load("reference")
    monkeypatch.setattr(reference, "unsupported", lambda *what: f"not {what[0]} today")
    registry._choose.cache_clear()
    out = nan_out(B, K)
    with pytest.raises(ValueError, match="reference: not cpu today"):
        fastproj.project(G, K, out=out, backend="reference")
    assert out.isnan().all()
    registry._choose.cache_clear()


# ---- Projector ---------------------------------------------------------------------------------

PROJECTOR = [
    *SHARED[:6],
    *SHARED[9:],
    *HOW,
    case("grad_dim_zero", ValueError, "grad_dim=0", "1 <= grad_dim", grad_dim=0),
    case("grad_dim_float", TypeError, "grad_dim=1e3", "integer", grad_dim=1e3),
    case("proj_dim_zero", ValueError, "proj_dim=0", "1 <= proj_dim", proj_dim=0),
]


@pytest.mark.parametrize(("changes", "error", "words"), PROJECTOR)
def test_projector(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    words = tuple(re.sub("1e3", "1000.0", word) for word in words)
    call = {"grad_dim": P, "proj_dim": K, **changes}
    refused(lambda: fastproj.Projector(**call), error, ("Projector: received", *words))


def test_projector_checks_grad_dim() -> None:
    projector = fastproj.Projector(P + 1, K)
    out = nan_out(B, K)
    refused(
        lambda: projector.project(G, out=out),
        ValueError,
        ("Projector.project", "P=20", "grad_dim = 21", "row_offset="),
    )
    refused(
        lambda: projector.project({"a": G, "b": G}, out=out),
        ValueError,
        ("P=40", "grad_dim = 21"),
    )
    refused(
        lambda: projector.project(G, row_offset=2, out=out),
        ValueError,
        ("row_offset=2", "P=20", "grad_dim = 21"),
    )
    refused(lambda: projector.project(G, -1, row_offset=0, out=out), ValueError, ("model_id=-1",))
    assert out.isnan().all()
    assert projector.project(G, row_offset=1, out=out) is out
    assert not out.isnan().any()


def test_projector_transpose_checks_its_sizes() -> None:
    projector = fastproj.Projector(P, K)
    refused(
        lambda: projector.project_transpose(torch.ones(2, K + 1)),
        ValueError,
        ("K=6", "proj_dim = 5"),
    )
    refused(lambda: projector.project_transpose(torch.ones(K)), ValueError, ("y [5]", "[B, K]"))
    refused(lambda: projector.project_transpose([1.0] * K), TypeError, ("y of type list",))
    refused(
        lambda: projector.project_transpose(Y, -1),
        ValueError,
        ("Projector.project_transpose: received model_id=-1",),
    )
    refused(lambda: projector.project_transpose(Y, rows=P + 1), ValueError, ("rows=21",))
    refused(lambda: projector.matrix(slice(0, P + 1)), ValueError, ("rows.stop=21",))
