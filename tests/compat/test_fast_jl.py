"""compat.fast_jl: six functions, any size and dtype, one matrix."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from fastproj.compat import fast_jl
from tests.compat.bounds import assert_keeps_inner_products
from tests.dense import DTYPES, integers, normals, stored

NAMES = [f"project_{kind}_{n}" for kind in ("rademacher", "normal") for n in (8, 16, 32)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_result(name: str, device: str) -> None:
    function = getattr(fast_jl, name)
    assert list(inspect.signature(function).parameters) == [
        "input",
        "N",
        "seed",
        "num_feature_tiles",
    ]
    x = integers((8, 1000)).to(device)
    y = function(x, 512, 3, 108)
    kind = "gaussian" if "normal" in name else "rademacher"
    assert y.shape == (8, 512)
    assert y.dtype == torch.float32
    assert y.device == x.device
    expected = x.double().cpu() @ stored(1000, 512, 3, kind)
    if kind == "rademacher":
        assert torch.equal(y.double().cpu(), expected)  # sums of small integers are exact
    else:
        torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "rows", "cols"), [(1, 1, 1), (3, 1001, 7), (33, 77, 513), (0, 5, 4)]
)
def test_any_size_and_dtype(
    device: str, dtype: torch.dtype, batch: int, rows: int, cols: int
) -> None:
    x = integers((batch, rows), dtype=dtype).to(device)
    y = fast_jl.project_rademacher_16(x, cols, 0, 1)
    assert torch.equal(y.double().cpu(), x.double().cpu() @ stored(rows, cols))


def test_batch_size_in_the_name_changes_nothing() -> None:
    x = normals((20, 300))
    for kind in ("rademacher", "normal"):
        results = [getattr(fast_jl, f"project_{kind}_{n}")(x, 64, 1, 4) for n in (8, 16, 32)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def test_numpy_integers_strides_and_gradients_are_taken() -> None:
    x = integers((50, 6)).T.requires_grad_()
    y = fast_jl.project_rademacher_8(x, np.int64(9), np.uint32(4), np.int32(2))
    assert not y.requires_grad
    assert torch.equal(y.double(), x.detach().double() @ stored(50, 9, 4))


@pytest.mark.parametrize("name", ["project_rademacher_8", "project_normal_32"])
def test_inner_products_are_kept(name: str) -> None:
    x = normals((10, 3000), seed=1)
    x[1] = x[0] + 0.1 * x[1]
    assert_keeps_inner_products(x, getattr(fast_jl, name)(x, 4096, 11, 80), 4096)


@pytest.mark.parametrize(
    ("input", "N", "seed", "kind", "message"),
    [
        (torch.ones(5), 8, 0, TypeError, r"fast_jl.project_normal_8: received input \[5\]"),
        ([[1.0]], 8, 0, TypeError, "received input list; expected a Tensor"),
        (torch.ones(2, 5), 0, 0, ValueError, "fast_jl.project_normal_8: received proj_dim=0"),
        (torch.ones(2, 5), 8, -1, ValueError, "received seed=-1"),
        (torch.ones(2, 5, dtype=torch.int64), 8, 0, TypeError, "int64"),
    ],
)
def test_bad_input_is_named(input: object, N: int, seed: int, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        fast_jl.project_normal_8(input, N, seed, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_against_the_real_one(name: str) -> None:
    """Another matrix, the same inner products: within both packages' bounds."""
    theirs = pytest.importorskip("fast_jl", reason="fast_jl is not installed beside this torch")
    x = normals((8, 10_000), seed=2).cuda()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    for module in (fast_jl, theirs):
        y = getattr(module, name)(x, 4096, 5, sms)
        assert_keeps_inner_products(x.cpu(), y.cpu(), 4096)
