"""project, project_transpose and matrix on every backend: values, shapes, promises."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastproj
from fastproj import checks, torch_ops
from fastproj.backends import reference, registry
from fastproj.call import Call
from fastproj.spec import MatrixKey, matrix_block, matrix_rows
from tests.dense import DTYPES, KINDS, integers, matmul_bound, normals, relative_error, stored

ONLY_TO_ROUNDING = {"reference"}
FLOAT32_LIKE = [torch.float32, torch.bfloat16, torch.float16]


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize(
    ("batch", "rows", "cols"),
    [(1, 1, 1), (1, 1, 5), (3, 1000, 1), (1, 1000, 512), (5, 1537, 33), (33, 600, 100)],
)
def test_small_integers_are_exact(
    backend: str,
    device: str,
    dtype: torch.dtype,
    precision: str,
    batch: int,
    rows: int,
    cols: int,
) -> None:
    grads = integers((batch, rows), dtype=dtype)
    y = fastproj.project(
        grads.to(device), cols, 3, stream=2, scale=None, precision=precision, backend=backend
    )
    assert y.shape == (batch, cols)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert y.device.type == device
    truth = grads.double() @ stored(rows, cols, 3, stream=2)
    assert torch.equal(y.cpu().double(), truth)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "cols"), [(1, 1, 1), (4, 5000, 130), (40, 999, 65)])
def test_highest_is_as_accurate_as_a_matmul_with_the_stored_matrix(
    backend: str, device: str, kind: str, dtype: torch.dtype, batch: int, rows: int, cols: int
) -> None:
    grads = normals((batch, rows), dtype=dtype)
    y = fastproj.project(
        grads.to(device), cols, kind=kind, scale=None, precision="highest", backend=backend
    ).cpu()
    matrix = stored(rows, cols, kind=kind)
    truth = grads.double() @ matrix
    if dtype == torch.float64:
        unit, same = 2.0**-53, grads @ matrix
        bound = matmul_bound(grads, matrix, unit)
        assert ((y - truth).abs() <= 2 * bound).all()
        return
    # Half-precision gradients times exact entries: the float32 matmul is the one to match.
    same = grads.float() @ matrix.float()
    unit = 2.0**-24
    allowed = 2 * max(relative_error(same, truth), unit)
    assert relative_error(y, truth) <= allowed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "unit"), [("high", 2.0**-16), ("medium", 2.0**-8)])
def test_lower_precisions_keep_their_terms(
    backend: str, device: str, kind: str, precision: str, unit: float
) -> None:
    grads = normals((5, 3000))
    y = fastproj.project(
        grads.to(device), 64, kind=kind, scale=None, precision=precision, backend=backend
    ).cpu()
    matrix = stored(3000, 64, kind=kind)
    truth = grads.double() @ matrix
    # Each gradient is off by at most unit of itself; then float32 sums.
    bound = unit * (grads.double().abs() @ matrix.abs()) + matmul_bound(grads, matrix)
    assert ((y - truth).abs() <= bound).all()
    assert relative_error(y, truth) <= unit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_half_precision_gradients_are_exact_with_one_term(
    backend: str, device: str, kind: str, dtype: torch.dtype, precision: str
) -> None:
    grads = normals((3, 2000), dtype=dtype)
    y = fastproj.project(
        grads.to(device), 40, kind=kind, scale=None, precision=precision, backend=backend
    ).cpu()
    matrix = stored(2000, 40, kind=kind)
    assert ((y - grads.double() @ matrix).abs() <= matmul_bound(grads, matrix)).all()


@pytest.mark.parametrize("dtype", FLOAT32_LIKE)
def test_the_whole_range_of_a_dtype_comes_through(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    """fast_jl turned |g| > 65504 into inf and 1e-8 into 0."""
    info = torch.finfo(dtype)
    for magnitude in (info.max / 4, 1e-8, info.tiny, 1.0):
        grads = torch.zeros(2, 700, dtype=dtype)
        grads[0, 5] = magnitude
        grads[1, 699] = -magnitude
        y = fastproj.project(grads.to(device), 30, scale=None, precision="highest", backend=backend)
        assert torch.equal(y.cpu().double(), grads.double() @ stored(700, 30))


def test_rows_of_very_different_size_do_not_meet(backend: str, device: str) -> None:
    grads = normals((4, 1500)) * torch.tensor([[1e30], [1e-30], [1.0], [1e-3]])
    y = fastproj.project(
        grads.to(device), 50, scale=None, precision="highest", backend=backend
    ).cpu()
    matrix = stored(1500, 50)
    truth = grads.double() @ matrix
    same = grads @ matrix.float()
    for row in range(4):
        allowed = 2 * max(relative_error(same[row], truth[row]), 2.0**-24)
        assert relative_error(y[row], truth[row]) <= allowed


def test_one_row_of_a_huge_range(backend: str, device: str) -> None:
    grads = normals((2, 1500))
    grads[:, ::7] *= 1e8
    y = fastproj.project(
        grads.to(device), 50, scale=None, precision="highest", backend=backend
    ).cpu()
    matrix = stored(1500, 50)
    truth = grads.double() @ matrix
    allowed = 2 * max(relative_error(grads @ matrix.float(), truth), 2.0**-24)
    assert relative_error(y, truth) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_nan_and_inf_stay_in_their_row(
    backend: str, device: str, dtype: torch.dtype, precision: str
) -> None:
    grads = integers((6, 900), dtype=dtype)
    clean = fastproj.project(
        grads.to(device), 70, scale=None, precision=precision, backend=backend
    ).cpu()
    grads[1, 3] = math.nan
    grads[3, 899] = math.inf
    grads[4, 0], grads[4, 512] = math.inf, -math.inf
    y = fastproj.project(
        grads.to(device), 70, scale=None, precision=precision, backend=backend
    ).cpu()
    assert torch.equal(y[[0, 2, 5]], clean[[0, 2, 5]])
    assert y[1].isnan().all()
    assert torch.equal(y[3].double(), math.inf * stored(900, 70)[899])
    # inf - inf is nan, inf + inf is inf: as the signs of the two entries say.
    first, second = stored(900, 70)[0], stored(900, 70)[512]
    expected = torch.where(first == second, math.nan, math.inf * first)
    assert torch.equal(y[4].double().nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


# ---- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("jl", 1 / math.sqrt(48)),
        (None, 1.0),
        (0.25, 0.25),
        (-2, -2.0),
        (0, 0.0),
        (np.float32(0.25), 0.25),
    ],
)
def test_scale(backend: str, device: str, scale: Any, factor: float) -> None:
    grads = integers((3, 100), dtype=torch.float64)
    y = fastproj.project(grads.to(device), 48, scale=scale, backend=backend).cpu()
    torch.testing.assert_close(y, factor * (grads @ stored(100, 48)), rtol=1e-14, atol=0)
    g = fastproj.project_transpose(y.to(device), 100, scale=scale, backend=backend).cpu()
    truth = factor * (y @ stored(100, 48).T)
    torch.testing.assert_close(g, truth, rtol=1e-13, atol=1e-13 * truth.abs().max().item())


def test_jl_keeps_lengths(backend: str, device: str) -> None:
    grads = normals((20, 3000))
    for kind in KINDS:
        y = fastproj.project(grads.to(device), 4096, kind=kind, backend=backend).cpu()
        ratio = y.norm(dim=1) / grads.norm(dim=1)
        # chi-square(4096) / 4096 stays within 0.16 but for 10^-9 in each of 20 rows.
        assert ((ratio**2 - 1).abs() < 0.16).all()


def test_numpy_integers_are_integers(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device)
    y = fastproj.project(
        grads,
        np.int64(7),
        np.uint64(2**63 + 5),
        stream=np.int32(3),
        row_offset=np.int16(4),
        backend=backend,
    )
    assert torch.equal(
        y, fastproj.project(grads, 7, 2**63 + 5, stream=3, row_offset=4, backend=backend)
    )


@pytest.mark.parametrize("offset", [1, 511, 512, 2**31 - 7, 2**32 - 3, 2**40 + 1, 2**56 - 700])
@pytest.mark.parametrize("kind", KINDS)
def test_row_offsets(backend: str, device: str, offset: int, kind: str) -> None:
    grads = integers((2, 700), dtype=torch.float64)
    y = fastproj.project(
        grads.to(device),
        20,
        2**64 - 1,
        kind,
        stream=9,
        row_offset=offset,
        scale=None,
        backend=backend,
    ).cpu()
    matrix = stored(700, 20, 2**64 - 1, kind, 9, offset)
    truth = grads @ matrix
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-11)
    if kind == "rademacher":
        assert torch.equal(y, truth)
    g = fastproj.project_transpose(
        y.to(device),
        slice(offset, offset + 700),
        2**64 - 1,
        kind,
        stream=9,
        scale=None,
        backend=backend,
    ).cpu()
    torch.testing.assert_close(g, y @ matrix.T, rtol=0, atol=1e-10)


def test_no_samples(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is asked: each takes sizes of at least one."""
    for name in ("project", "project_transpose", "matrix"):
        monkeypatch.delattr(registry.load(backend), name)
    grads = torch.empty(0, 5, device=device)
    assert fastproj.project(grads, 7, backend=backend).shape == (0, 7)
    assert fastproj.project([grads, grads], 7, backend=backend).shape == (0, 7)
    out = torch.empty(0, 7, device=device)
    assert fastproj.project(grads, 7, out=out, accumulate=True, backend=backend) is out
    assert fastproj.project_transpose(out, 5, backend=backend).shape == (0, 5)
    y = torch.ones(3, 7, device=device)
    assert fastproj.project_transpose(y, slice(4, 4), backend=backend).shape == (3, 0)
    assert fastproj.matrix(3, slice(2, 2), device=device, backend=backend).shape == (3, 0)


def test_precision_follows_torch(backend: str, device: str) -> None:
    grads = normals((4, 2000)).to(device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            default = fastproj.project(grads, 32, backend=backend)
            named = fastproj.project(grads, 32, precision=precision, backend=backend)
            assert torch.equal(default, named)
    finally:
        torch.set_float32_matmul_precision(before)


NEWER_PRECISIONS = """
import torch, fastproj
grads = torch.linspace(-1, 1, 4000).reshape(2, 2000)
named = {p: fastproj.project(grads, 32, precision=p) for p in ("highest", "high", "medium")}
for setting, precision in (("ieee", "highest"), ("tf32", "high"), ("bf16", "medium")):
    torch.backends.mkldnn.matmul.fp32_precision = setting
    assert torch.equal(fastproj.project(grads, 32), named[precision]), setting
"""


def test_precision_follows_torchs_newer_settings() -> None:
    """In a process of its own: once used, they make the older functions raise."""
    code = NEWER_PRECISIONS
    if not hasattr(torch.backends.mkldnn, "matmul"):
        code = "import torch; torch.set_float32_matmul_precision('high')"  # before torch 2.9
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = integers((2, 10))
    monkeypatch.setenv("FASTPROJ_BACKEND", "reference")
    assert torch.equal(fastproj.project(grads, 3), fastproj.project(grads, 3, backend="reference"))
    monkeypatch.setenv("FASTPROJ_BACKEND", "abacus")
    with pytest.raises(ValueError, match="abacus"):
        fastproj.project(grads, 3)
    assert fastproj.project(grads, 3, backend="reference").shape == (2, 3)


# ---- out= and accumulate= ----------------------------------------------------------------------


def outs(batch: int, cols: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Tensors [batch, cols] full of NaN, in several layouts."""
    nan = math.nan
    return [
        torch.full((batch, cols), nan, dtype=dtype, device=device),
        torch.full((cols, batch), nan, dtype=dtype, device=device).T,
        torch.full((batch, 2 * cols + 3), nan, dtype=dtype, device=device)[:, 3::2],
        torch.full((3 * batch, cols + 1), nan, dtype=dtype, device=device)[1::3, :cols],
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_out_in_any_layout(backend: str, device: str, dtype: torch.dtype, kind: str) -> None:
    grads = normals((5, 600), dtype=dtype).to(device)
    expected = fastproj.project(grads, 33, kind=kind, backend=backend)
    for out in outs(5, 33, expected.dtype, device):
        beyond = out._base.isnan().sum() - out.isnan().sum() if out._base is not None else 0
        assert fastproj.project(grads, 33, kind=kind, out=out, backend=backend) is out
        assert torch.equal(out, expected)
        if out._base is not None:
            assert out._base.isnan().sum() == beyond


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_adds(backend: str, device: str, dtype: torch.dtype) -> None:
    grads = integers((5, 600), dtype=dtype).to(device)
    expected = fastproj.project(grads, 33, scale=None, backend=backend)
    for out in outs(5, 33, expected.dtype, device):
        out.copy_(integers((5, 33), seed=1).to(out))
        before = out.clone()
        fastproj.project(grads, 33, scale=None, out=out, accumulate=True, backend=backend)
        assert torch.equal(out, before + expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_transpose_out_in_any_layout(backend: str, device: str, dtype: torch.dtype) -> None:
    y = integers((5, 40), dtype=dtype).to(device)
    truth = y.cpu().double() @ stored(777, 40, row_offset=3).T
    for out in outs(5, 777, torch.float64 if dtype == torch.float64 else torch.float32, device):
        got = fastproj.project_transpose(y, slice(3, 780), scale=None, out=out, backend=backend)
        assert got is out
        assert torch.equal(out.cpu().double(), truth)


def test_out_tells_autograd_that_it_changed(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device)
    w = torch.ones(2, 3, device=device, requires_grad=True)
    out = torch.ones(2, 3, device=device)
    product = w * out
    fastproj.project(grads, 3, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_out_next_to_its_input_in_one_buffer(backend: str, device: str) -> None:
    buffer = integers((6, 50)).to(device)
    expected = fastproj.project(buffer[:, 7:], 7, backend=backend)
    assert torch.equal(
        fastproj.project(buffer[:, 7:], 7, out=buffer[:, :7], backend=backend), expected
    )


@pytest.mark.parametrize("first", ["grads", "out"])
def test_out_directly_behind_its_input_or_before_it(backend: str, device: str, first: str) -> None:
    buffer = integers((1, 6 * 50)).to(device).flatten()
    at = 0 if first == "grads" else 6 * 7
    grads = buffer[at : at + 6 * 43].view(6, 43)
    out = (buffer[6 * 43 :] if first == "grads" else buffer[: 6 * 7]).view(6, 7)
    expected = fastproj.project(grads, 7, backend=backend)
    assert torch.equal(fastproj.project(grads, 7, out=out, backend=backend), expected)


def test_out_under_inference_mode_and_no_grad(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device).requires_grad_()
    expected = fastproj.project(grads.detach(), 3, backend=backend)
    with torch.inference_mode():
        out = torch.empty(2, 3, device=device)
        assert torch.equal(fastproj.project(grads, 3, out=out, backend=backend), expected)
    with torch.no_grad():
        out = torch.empty(2, 3, device=device)
        assert torch.equal(fastproj.project(grads, 3, out=out, backend=backend), expected)


# ---- dicts, lists, layouts ---------------------------------------------------------------------


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Per-sample gradients of a small network, some in layouts that no [B, p] view has."""
    conv = integers((3, 8, 5, 4, 4), dtype=dtype)
    return {
        "conv": conv,
        "channels_last": conv.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "transposed": integers((3, 30, 20), seed=1, dtype=dtype).transpose(1, 2),
        "scalar": integers((3,), seed=2, dtype=dtype),
        "empty": torch.empty(3, 0, dtype=dtype),
        "sliced": integers((3, 40, 17), seed=3, dtype=dtype)[:, ::2, 1:14],
        "expanded": integers((3, 1, 9), seed=4, dtype=dtype).expand(3, 6, 9),
        "bias": integers((6, 11), seed=5, dtype=dtype)[::2],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dict_equals_its_concatenation(
    backend: str, device: str, dtype: torch.dtype, kind: str
) -> None:
    grads = {name: t.to(device) for name, t in parameters(dtype).items()}
    flat = torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in grads.values()], dim=1)
    how = {"kind": kind, "row_offset": 13, "scale": None, "backend": backend}
    whole = fastproj.project(flat, 41, 5, **how)
    truth = flat.cpu().double() @ stored(flat.shape[1], 41, 5, kind, row_offset=13)
    for form in (grads, list(grads.values()), tuple(grads.values())):
        y = fastproj.project(form, 41, 5, **how)
        if kind == "rademacher":
            assert torch.equal(y, whole)
            assert torch.equal(y.cpu().double(), truth)
        else:
            bound = matmul_bound(flat.cpu(), stored(flat.shape[1], 41, 5, kind, row_offset=13))
            assert ((y.cpu() - truth).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_pieces_equals_the_whole(backend: str, device: str, kind: str) -> None:
    grads = integers((4, 2000), dtype=torch.float64).to(device)
    how = {"seed": 1, "kind": kind, "scale": None, "backend": backend}
    whole = fastproj.project(grads, 30, **how)
    out = torch.zeros(4, 30, dtype=torch.float64, device=device)
    for start, stop in ((0, 1), (1, 512), (512, 1030), (1030, 2000)):
        fastproj.project(
            grads[:, start:stop], 30, row_offset=start, out=out, accumulate=True, **how
        )
    torch.testing.assert_close(out, whole, rtol=0, atol=0 if kind == "rademacher" else 1e-10)


def test_layouts_are_viewed_and_not_copied() -> None:
    grads = parameters()
    for name, t in grads.items():
        views = checks.check_grads("project", {"x": t}) if t.numel() else []
        expected = t.flatten(1) if t.dim() > 1 else t[:, None]
        assert torch.equal(torch.cat([*views, expected[:, :0]], 1), expected), name
        for view in views:
            same = view.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
            assert same, name
        assert len(views) <= checks.MAX_VIEWS


def test_dimensions_of_one_do_not_split_a_layout() -> None:
    t = integers((6, 48)).as_strided((3, 8, 1, 6), (96, 6, 1234, 1))
    (view,) = checks.check_grads("project", [t])
    assert view.data_ptr() == t.data_ptr()
    assert torch.equal(view, t.flatten(1))


def test_a_layout_of_too_many_views_is_copied() -> None:
    columns = integers((2, 5, checks.MAX_VIEWS + 1))
    for count in (checks.MAX_VIEWS, checks.MAX_VIEWS + 1):
        t = columns[:, :, :count].transpose(1, 2)
        views = checks.check_grads("project", [t])
        assert len(views) == (count if count <= checks.MAX_VIEWS else 1)
        assert torch.equal(torch.cat(views, 1), t.flatten(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_a_matrix(backend: str, device: str, dtype: torch.dtype) -> None:
    base = integers((12, 3000), dtype=dtype).to(device)
    for grads in (
        base[:, 1::3],
        base[::5],
        base[:, :700].T.contiguous().T,
        base.T[:40, :],
        base[:1, :500].expand(7, 500),
        base[:, :1].expand(12, 600),
        base[3:4],
    ):
        y = fastproj.project(grads, 37, scale=None, backend=backend)
        truth = grads.cpu().double() @ stored(grads.shape[1], 37)
        assert torch.equal(y.cpu().double(), truth)


# ---- promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_reproducible_bit_for_bit(
    backend: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    grads = normals((7, 4000), dtype=dtype).to(device)
    first = fastproj.project(grads, 100, kind=kind, backend=backend)
    for _ in range(3):
        assert torch.equal(fastproj.project(grads.clone(), 100, kind=kind, backend=backend), first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(
    backend: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    """Bit for bit, but for backends whose matmul is torch's: there to rounding."""
    grads = normals((67, 3000), dtype=dtype).to(device)
    for precision in ("highest", "high", "medium"):
        how = {"kind": kind, "scale": None, "precision": precision, "backend": backend}
        whole = fastproj.project(grads, 50, **how)
        for rows in (slice(0, 1), slice(1, 9), slice(16, 33), slice(3, 67)):
            part = fastproj.project(grads[rows], 50, **how)
            if backend in ONLY_TO_ROUNDING:
                torch.testing.assert_close(part, whole[rows])
            else:
                assert torch.equal(part, whole[rows]), (precision, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_nothing(backend: str, device: str, kind: str) -> None:
    grads = normals((6, 20000)).to(device)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(fastproj.project(grads, 130, kind=kind, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_calls_from_several_threads_at_once(backend: str, device: str) -> None:
    inputs = [normals((b, 3000 + 17 * b), seed=b).to(device) for b in range(1, 9)]

    def run(grads: Tensor) -> list[Tensor]:
        y = fastproj.project(grads, 64, len(grads), backend=backend)
        return [y, fastproj.project_transpose(y, 700, len(grads), backend=backend)]

    alone = [run(grads) for grads in inputs]
    together: list[list[Tensor]] = [[] for _ in inputs]
    barrier = threading.Barrier(len(inputs))

    def work(i: int) -> None:
        barrier.wait()
        for _ in range(3):
            together[i] = run(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_transpose_is_the_adjoint(
    backend: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    y = normals((5, 130), dtype=dtype).to(device)
    how = {"seed": 3, "kind": kind, "stream": 2, "backend": backend}
    g = fastproj.project_transpose(y, slice(100, 900), scale=None, precision="highest", **how).cpu()
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    matrix = stored(800, 130, 3, kind, 2, 100)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = 2 * matmul_bound(y.cpu(), matrix.T, unit)
    assert ((g - y.cpu().double() @ matrix.T).abs() <= bound).all()


def test_drift_over_many_rows(backend: str, device: str) -> None:
    """A column of equal terms grows linearly: one fp32 accumulator would lose its low bits."""
    rows = 1_000_000
    grads = (normals((1, 1), seed=3) + 1).expand(1, rows).to(device)
    y = fastproj.project(grads, 4, scale=None, precision="highest", backend=backend).cpu()
    truth = grads[:, 0].item() * stored(rows, 4).sum(0)
    assert relative_error(y[0], truth) < 1e-5


def test_the_reference_makes_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def block(key: Any, row: int, row_stop: int, col: int, col_stop: int) -> Any:
        made.append((row, row_stop, col, col_stop))
        return matrix_block(key, row, row_stop, col, col_stop)

    monkeypatch.setattr(reference, "matrix_block", block)
    rows, cols = slice(100, 3101), 2100
    y = fastproj.project(torch.ones(1, 3001), cols, row_offset=rows.start, backend="reference")
    fastproj.project_transpose(y, rows, backend="reference")
    fastproj.matrix(rows, cols, backend="reference")
    sizes = [(stop - row) * (col_stop - col) for row, stop, col, col_stop in made]
    assert max(sizes) <= 2**19
    assert sum(sizes) == 3 * 3001 * cols
    # Cut where the spec's blocks begin, none is made twice.
    assert {row for row, *_ in made} == {100, 512, 1024, 1536, 2048, 2560, 3072}


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
def test_rows_by_number_are_made_some_at_a_time(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    made = []

    def of_spec(key: Any, rows: Any, col: int, col_stop: int) -> Any:
        made.append(rows.size * (col_stop - col))
        return matrix_rows(key, rows, col, col_stop)

    monkeypatch.setattr(torch_ops, "matrix_rows_of_spec", of_spec)
    how: dict[str, Any] = {"kind": kind, "block": 32 if kind == "sjlt" else None}
    rows = torch.arange(0, 18000, 6) % 9001  # in no order
    assert torch.equal(
        fastproj.matrix(rows, slice(5, 405), **how),
        fastproj.matrix(9001, slice(5, 405), **how)[rows],
    )
    assert max(made) <= 2**18
    assert sum(made) == 3000 * 400
    few, cols = torch.tensor([9, 3]), slice(7, 2**18 + 77)
    assert torch.equal(fastproj.matrix(few, cols, **how), fastproj.matrix(10, cols, **how)[few])
    assert max(made) <= 2**18


class _Largest(TorchDispatchMode):
    """Notes the most numbers that an op has returned in one tensor."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return made


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
def test_the_reference_makes_small_products(kind: str) -> None:
    x, call = torch.ones(512, 512), Call(MatrixKey(kind, 0, 0, 16 if kind == "sjlt" else 0))
    with _Largest() as largest:
        reference.project([x], torch.empty(512, 1024), call)
        reference.project_transpose(torch.ones(512, 1024), torch.empty(512, 512), call)
    assert largest.numbers <= 2**19
