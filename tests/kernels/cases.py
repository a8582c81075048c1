"""What every kernel must give. Collected twice: on a GPU by test_gpu.py, and by test_interpreter.py
in a process of its own, where Triton interprets the kernels on CPU tensors.

Memory from torch.empty holds NaN in every test, workspaces included: what a kernel forgets to
write shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import fastproj
from fastproj.backends import triton as adapter
from fastproj.call import Call
from fastproj.kernels import plan
from fastproj.kernels.entries import matrix_kernel
from fastproj.kernels.generate import philox4x32_10
from fastproj.kernels.launch import INTERPRETED, device_facts, magnitudes
from tests import tensor_cores
from tests.dense import blocked_matmul, integers, matmul_bound, normals, relative_error, stored
from tests.essential import essential
from tests.known import Block, blocks, check_block, check_entry, entries, fields
from tests.tensor_cores import AMPERE

DEVICE = "cpu" if INTERPRETED else "cuda"
KINDS = ["rademacher", "gaussian"]
# Rows that one accumulator adds up, by kind and terms.
FOLDS = {
    ("rademacher", 3): 128,
    ("rademacher", 2): 256,
    ("gaussian", 3): 64,
    ("gaussian", 2): 128,
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MAX_SEED = 2**64 - 1


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN
    yield
    torch.use_deterministic_algorithms(before)


def project(grads: Tensor | list[Tensor], columns: int, **options: object) -> Tensor:
    return fastproj.project(grads, columns, **{"scale": None, "backend": "triton", **options})  # type: ignore[arg-type]


def check_project(grads: Tensor, columns: int, *, kind: str, **key: int) -> None:
    """Equality for integers under Rademacher, else the rounding of products summed in float32."""
    result = project(grads, columns, kind=kind, precision="highest", **key)
    assert result.dtype == (torch.float64 if grads.dtype == torch.float64 else torch.float32)
    r = stored(grads.shape[1], columns, kind=kind, device=DEVICE, **key)
    truth = grads.double() @ r
    if kind == "rademacher":
        assert torch.equal(result.double(), truth)
    else:
        unit = 2.0**-53 if grads.dtype == torch.float64 else 2.0**-24
        assert ((result.double() - truth).abs() <= matmul_bound(grads, r, unit)).all()


# ---- the matrix --------------------------------------------------------------------------------


@triton.jit
def philox_kernel(counters_ptr, words_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    mask = i < n
    c0 = tl.load(counters_ptr + i * 6, mask=mask).to(tl.uint32)
    c1 = tl.load(counters_ptr + i * 6 + 1, mask=mask).to(tl.uint32)
    c2 = tl.load(counters_ptr + i * 6 + 2, mask=mask).to(tl.uint32)
    c3 = tl.load(counters_ptr + i * 6 + 3, mask=mask).to(tl.uint32)
    k0 = tl.load(counters_ptr + i * 6 + 4, mask=mask).to(tl.uint32)
    k1 = tl.load(counters_ptr + i * 6 + 5, mask=mask).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32_10(c0, c1, c2, c3, k0, k1)
    tl.store(words_ptr + i * 4, w0.to(tl.int64), mask=mask)
    tl.store(words_ptr + i * 4 + 1, w1.to(tl.int64), mask=mask)
    tl.store(words_ptr + i * 4 + 2, w2.to(tl.int64), mask=mask)
    tl.store(words_ptr + i * 4 + 3, w3.to(tl.int64), mask=mask)


def test_philox_known_answers() -> None:
    rows = [[int(word, 16) for word in row] for row in fields("philox4x32_10.txt")]
    table = torch.tensor(rows, dtype=torch.int64, device=DEVICE)  # [n, 10]
    words = torch.zeros((len(rows), 4), dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](table[:, :6].contiguous(), words, len(rows), SIZE=64)
    assert torch.equal(words, table[:, 6:])


@pytest.mark.parametrize("kind", KINDS)
def test_known_entries(kind: str) -> None:
    for known in entries(kind)[:: 101 if INTERPRETED else 5]:
        check_entry(known, device=DEVICE, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_known_entries(kind: str) -> None:
    for known in entries(kind):
        check_entry(known, device=DEVICE, backend="triton")


@pytest.mark.parametrize("known", blocks(sparse=False), ids=lambda known: "-".join(map(str, known)))
def test_known_blocks(known: Block) -> None:
    check_block(known, device=DEVICE, backend="triton")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    essential(product(KINDS, FLOATS), [*product(KINDS[:1], FLOATS), (KINDS[1], torch.float32)]),
    ids=str,
)
def test_matrix_dtypes(kind: str, dtype: torch.dtype) -> None:
    """Entries are exact in every float dtype; a block may lie across the counter's high half."""
    period = plan.BLOCK_ROWS[kind] << 32
    rows = slice(period - 70, period + 30)
    entries = fastproj.matrix(
        rows, slice(2**32 - 65, 2**32), MAX_SEED, kind, dtype=dtype, device=DEVICE, backend="triton"
    )
    key = fastproj.spec.MatrixKey(kind, MAX_SEED, 0)
    expected = fastproj.spec.matrix_block(key, rows.start, rows.stop, 2**32 - 65, 2**32)
    assert torch.equal(entries, torch.from_numpy(expected).to(DEVICE, dtype))


def launch_one_tile(out: torch.Tensor, columns: int, strides: tuple[int, int]) -> None:
    """One program of 512 rows of a Rademacher matrix of so many columns, seed 0."""
    words = {"block": 0, "tag": 0, "signs": plan.signed32(0x80008000)}
    words |= {"stream_id": 0, "seed_low": 0, "seed_high": 0}
    matrix_kernel[(1, 1)](
        out,
        magnitudes(out.device, False),
        512,
        columns,
        *strides,
        origin=0,
        col_offset=0,
        **words,
        GAUSSIAN=False,
        BLOCK_K=64,
        NUM_WARPS=4,
        num_warps=4,
    )


def test_matrix_of_more_than_2_31_columns() -> None:
    """The first tile of one: nothing in a kernel takes the number of columns for a small one."""
    out = torch.zeros((512, 64), device=DEVICE)
    launch_one_tile(out, 2**31 + 64, out.stride())
    assert torch.equal(out.double(), stored(512, 64, device=DEVICE))


@pytest.mark.skipif(not INTERPRETED, reason="test_gpu.py makes all of one")
def test_last_tile_of_more_than_2_31_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are counted in 64 bits. All of them lie in one place here, so those that are wrongly
    taken for columns of ``out`` show.
    """
    last = 2**31 // 64

    def program(self: Any, axis: int) -> Any:
        return interpreter.TensorHandle(np.array([0 if axis else last], np.int32), tl.int32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", program)
    out = torch.zeros(512)
    launch_one_tile(out, 2**31 + 1, (1, 0))
    key = fastproj.spec.MatrixKey("rademacher", 0, 0)
    column = fastproj.spec.matrix_block(key, 0, 512, 2**31, 2**31 + 1)[:, 0]
    assert torch.equal(out.double(), torch.from_numpy(column).double())


# ---- projection --------------------------------------------------------------------------------

# B, P, K, row offset: ragged, single, whole panels, odd starts, many splits
RAGGED = (3, 1100, 70, 511)
SHAPES = [(1, 1, 1, 0), (17, 300, 129, 1000), (2, 6 * 512, 65, 512)]
PROJECT = [(dtype, kind, RAGGED) for dtype in FLOATS for kind in KINDS]
PROJECT += [(dtype, "rademacher", shape) for dtype in FLOATS[:2] for shape in SHAPES]
PROJECT += [(torch.bfloat16, "gaussian", SHAPES[0])]
if not INTERPRETED:
    SHAPES += [
        (33, 100_003, 300, 7),
        (64, 65_536, 4096, 0),
        (129, 20_000, 257, 31),
        (300, 5000, 100, 0),
        (5, 3000, 33_000, 0),
    ]
    PROJECT = [(dtype, kind, s) for dtype in FLOATS for kind in KINDS for s in [RAGGED, *SHAPES]]


@pytest.mark.parametrize(
    ("dtype", "kind", "shape"),
    essential(PROJECT, [c for c in PROJECT if c[1] == "rademacher" or c[0] == torch.bfloat16]),
    ids=str,
)
def test_project(dtype: torch.dtype, kind: str, shape: tuple[int, int, int, int]) -> None:
    B, P, K, offset = shape
    check_project(integers((B, P), dtype=dtype).to(DEVICE), K, kind=kind, row_offset=offset)


@pytest.mark.parametrize("kind", KINDS)
def test_far_rows(kind: str) -> None:
    """Rows where the block number passes 2^32, with every bit of the key in use."""
    period = plan.BLOCK_ROWS[kind] << 32
    check_project(
        integers((2, 300)).to(DEVICE),
        20,
        kind=kind,
        seed=MAX_SEED - 12345,
        stream=2**32 - 1,
        row_offset=period - 155,
    )
    check_project(integers((2, 40)).to(DEVICE), 20, kind=kind, row_offset=2**56 - 40)


def test_strides() -> None:
    """Any strides in, any out; adding to what is there; a scale."""
    flat = integers((7, 2704)).to(DEVICE, torch.bfloat16)
    views = {
        "every other row": flat[::2, :600],
        "many panels, aligned": flat[:, 48:],
        "many panels from an odd column": flat[:3, 5:],
        "every third column": flat[:, ::3],
        "transposed": flat[:, :600].T.contiguous().T,
        "one row for all": flat[:1, :600].expand(4, -1),
    }
    for name, grads in views.items():
        r = stored(grads.shape[1], 33, row_offset=48, device=DEVICE)
        truth = grads.double() @ r
        out = torch.full((33, grads.shape[0]), 3.0, device=DEVICE).T
        project(grads, 33, row_offset=48, out=out, accumulate=True, scale=0.5)
        assert torch.equal(out.double(), 3 + 0.5 * truth), name


@pytest.mark.parametrize("kind", KINDS)
def test_pieces(kind: str) -> None:
    """Pieces in order give what their concatenation gives; empty ones give nothing."""
    sizes = [1, 513, 0, 700, 3]
    pieces = [integers((3, size), seed=size).to(DEVICE) for size in sizes]
    whole = torch.cat(pieces, 1)
    r = stored(whole.shape[1], 40, kind=kind, row_offset=300, device=DEVICE)
    result = project(pieces, 40, kind=kind, row_offset=300).double()
    truth = whole.double() @ r
    if kind == "rademacher":
        assert torch.equal(result, truth)
    else:
        assert ((result - truth).abs() <= matmul_bound(whole, r)).all()


def test_nothing_to_add() -> None:
    grads = torch.empty((2, 0), device=DEVICE)
    out = torch.empty((2, 5), device=DEVICE)
    adapter.project([grads], out, Call(fastproj.spec.MatrixKey("rademacher", 0, 0)))
    assert torch.equal(out, torch.zeros_like(out))


def test_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, columns and partial sums beyond one launch and one workspace."""
    monkeypatch.setattr(plan, "MAX_BATCH", 16)
    monkeypatch.setattr(plan, "MAX_COLUMNS", 64)
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 16 * 256 * 4 * 3)  # three slots
    sizes = [100, 3000, 300] if INTERPRETED else [600, 51200, 777]
    pieces = [integers((18, size), seed=size).to(DEVICE) for size in sizes]
    r = stored(sum(sizes), 70, device=DEVICE)
    truth = torch.cat(pieces, 1).double() @ r
    from fastproj.kernels import launch

    launch.cached_plan.cache_clear()
    try:
        assert torch.equal(project(pieces, 70).double(), truth)
    finally:
        launch.cached_plan.cache_clear()


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("highest", "rademacher"),
        ("highest", "gaussian"),
        ("high", "rademacher"),
        ("medium", "rademacher"),
    ],
)
def test_precision(precision: str, kind: str) -> None:
    """Error against float64: twice torch's own for "highest", the terms' for the others."""
    grads = normals((4, 1000)).to(DEVICE)
    r = stored(1000, 64, kind=kind, device=DEVICE)
    truth = grads.double() @ r
    error = relative_error(project(grads, 64, kind=kind, precision=precision), truth)
    if precision == "highest":
        assert error <= 2 * relative_error(grads @ r.float(), truth)
    else:
        assert error <= {"high": 2.0**-16, "medium": 2.0**-8}[precision]
        assert error >= {"high": 2.0**-24, "medium": 2.0**-14}[precision]


@pytest.mark.skipif(not INTERPRETED, reason="a model of tensor cores, for the interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_sums_as_tensor_cores_cut_them(
    precision: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the model, which test_the_promise_at_a_million_rows is about, bit for bit."""

    def create_dot(self: object, a: Any, b: Any, d: Any, *_: object) -> Any:
        return type(d)(tensor_cores.multiply(a.data, b.data, d.data, AMPERE), d.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    grads = normals((3, 1536))
    r = stored(1536, 20, kind=kind, dtype=torch.float32)
    terms = {"highest": 3, "high": 2}[precision]
    model = tensor_cores.project(
        tensor_cores.terms_of(grads.numpy(), terms)[::-1], r.numpy(), FOLDS[kind, terms], AMPERE
    )
    result = project(grads, 20, kind=kind, precision=precision)
    assert np.array_equal(result.numpy(), model)


@pytest.mark.skipif(not INTERPRETED, reason="a model of tensor cores, for the interpreter")
@pytest.mark.parametrize("kind", KINDS)
def test_the_promise_at_a_million_rows(kind: str) -> None:
    """The error of "highest" is at most twice that of a float32 matmul, and of a good one."""
    rows, cols = 10**6, 8
    grads = normals((4, rows))
    r = stored(rows, cols, kind=kind, dtype=torch.float32)
    truth = grads.double() @ r.double()
    terms = tensor_cores.terms_of(grads.numpy(), 3)[::-1]
    total = np.zeros((4, cols), dtype=np.float32)
    (launches,) = plan.plan([rows], 0, 4096, kind, 132, 4)
    for launch in launches:
        first = launch.panel * plan.PANEL
        for start in range(0, launch.count, launch.per_split):
            stop = min(start + launch.per_split, launch.count)
            part = slice(first + start * plan.PANEL, first + stop * plan.PANEL)
            left = [term[:, part] for term in terms]
            total += tensor_cores.project(left, r[part].numpy(), FOLDS[kind, 3], AMPERE)
    usual = relative_error(blocked_matmul(grads, r), truth)
    assert relative_error(torch.from_numpy(total), truth) <= 2 * usual


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_range(precision: str) -> None:
    """Nothing is clipped: the whole range of float32, and in bf16 terms no overflow by rounding."""
    largest = torch.finfo(torch.float32).max
    grads = torch.zeros((6, 600), device=DEVICE)
    for row, value in enumerate((largest, -largest, 65536.0, 1e-8, 1e-30, 3e38)):
        grads[row, 17] = value
    r = stored(600, 9, device=DEVICE)
    result = project(grads, 9, precision=precision).double()
    truth = grads.double() @ r
    unit = {"highest": 2.0**-24, "high": 2.0**-16, "medium": 2.0**-8}[precision]
    assert ((result - truth).abs() <= unit * truth.abs()).all()


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "high"), (torch.float32, "medium"), *((d, "highest") for d in FLOATS)],
    ids=str,
)
def test_not_finite(dtype: torch.dtype, precision: str) -> None:
    """NaN and infinities pass through as in a matmul, and stay in their row."""
    grads = integers((5, 700), dtype=dtype).to(DEVICE)
    grads[0, 3] = float("nan")
    grads[1, 600] = float("inf")
    grads[2, 5] = float("-inf")
    grads[3, 5] = float("inf")
    grads[3, 6] = float("-inf")
    if dtype == torch.float32:  # a NaN whose payload is cut off with the lower bits
        grads.view(torch.int32)[0, 3] = 0x7F800001  # through a Python float it would lose that
    result = project(grads, 65, precision=precision)
    truth = (grads.double() @ stored(700, 65, device=DEVICE)).to(result.dtype)
    torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)


def test_results_repeat() -> None:
    grads = normals((5, 1600)).to(DEVICE)
    first = project(grads, 40)
    assert torch.equal(first, project(grads, 40))


# ---- the adjoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_project_transpose(dtype: torch.dtype, kind: str) -> None:
    period = plan.BLOCK_ROWS[kind] << 32
    shapes = [(3, 70, slice(0, 100)), (1, 1, slice(period - 30, period + 50))]
    if not INTERPRETED:
        shapes += [(33, 1030, slice(1000, 9001)), (130, 64, slice(0, 512))]
    for B, K, rows in shapes:
        y = integers((B, K), dtype=dtype).to(DEVICE)
        result = fastproj.project_transpose(
            y, rows, 3, kind, stream=1, scale=None, precision="highest", backend="triton"
        )
        r = stored(rows.stop - rows.start, K, 3, kind, 1, rows.start, device=DEVICE)
        truth = y.double() @ r.T
        if kind == "rademacher":
            assert torch.equal(result.double(), truth)
        else:
            unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
            assert ((result.double() - truth).abs() <= matmul_bound(y, r.T, unit)).all()


def test_project_transpose_strides() -> None:
    y = integers((40, 3)).to(DEVICE).T  # [3, 40]
    out = torch.empty((600, 3), device=DEVICE).T
    fastproj.project_transpose(y, 600, 3, scale=0.25, out=out, backend="triton")
    assert torch.equal(out.double(), 0.25 * y.double() @ stored(600, 40, 3, device=DEVICE).T)


def test_device() -> None:
    """What the plan is made for here."""
    facts = device_facts(torch.empty(0, device=DEVICE).device)
    assert facts.multiprocessors > 0
    assert facts.arch.startswith(("sm_", "gfx"))
