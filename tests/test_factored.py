"""FactoredProjector: sides by the spec, exact on integers, inner products kept in expectation."""

from __future__ import annotations

import pytest
import torch

import fastproj
from fastproj.factored import SIDES_SEED

SHAPES = {"fc": (12, 7), "bias": (12,), "conv": (9, 4, 3, 2), "table": (40, 10), "narrow": (3, 50)}
B, T = 3, 5


def whole(seed=0, size=B, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randint(-4, 5, (size, *shape), generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def side(first, size, r, seed, stream):
    return fastproj.matrix(
        slice(first, first + size), r, seed ^ SIDES_SEED, stream=stream, dtype=torch.float64
    ).div(r**0.5)


def by_hand(grads, r, seed, stream):
    """L^T G A of each parameter, from the documented rows of the matrix of sides."""
    first, kept = 0, []
    for g in grads.values():
        g = g.double()
        m, n = g.shape[1], g[0, 0].numel()
        if g.dim() > 2:
            g = g.flatten(2)
            if m > r:
                g = torch.einsum("mr,bmn->brn", side(first, m, r, seed, stream), g)
            if n > r:
                g = torch.einsum("ns,bmn->bms", side(first + m, n, r, seed, stream), g)
        first += m + n
        kept.append(g.flatten(1))
    return torch.cat(kept, 1)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "sjlt"])
@pytest.mark.parametrize("r", [1, 4, 8, 12])
def test_it_is_sides_by_the_spec_and_then_the_matrix(r, kind):
    seed, stream = 0xDEADBEEF12345678, 3
    projector = fastproj.FactoredProjector(SHAPES, r, 32, seed, kind, scale=None)
    kept = by_hand(whole(), r, seed, stream)
    assert projector.inner_dim == kept.shape[1]
    matrix = fastproj.matrix(
        kept.shape[1], 32, seed, kind, block=projector.block, stream=stream, dtype=torch.float64
    )
    torch.testing.assert_close(projector.project(whole(), stream), kept @ matrix)


def test_sides_that_are_not_larger_than_r_are_left_alone():
    """r at or above all sides is the projection itself."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    projector = fastproj.FactoredProjector(SHAPES, 64, 16, 5, "rademacher")
    assert projector.grad_dim == projector.inner_dim == total
    plain = fastproj.Projector(total, 16, 5)
    assert torch.equal(projector.project(whole(), 2), plain.project(whole(), 2))


def pairs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randint(-3, 4, shape, generator=generator).double()

    ids = torch.randint(0, 40, (B, T), generator=generator)
    given = {
        "fc": (numbers(B, T, 12), numbers(B, T, 7)),
        "bias": numbers(B, 12),
        "conv": numbers(B, 9, 4, 3, 2),
        "table": (ids, numbers(B, T, 10)),
        "narrow": (numbers(B, T, 3), numbers(B, T, 50)),
    }
    formed = dict(given)
    for name in ("fc", "narrow"):
        left, right = given[name]
        formed[name] = left.transpose(1, 2) @ right
    rows = torch.nn.functional.one_hot(ids, 40).double()
    formed["table"] = rows.transpose(1, 2) @ given["table"][1]
    return given, formed


@pytest.mark.parametrize("r", [2, 4, 10, 64])
def test_pairs_give_what_their_products_give(r):
    projector = fastproj.FactoredProjector(SHAPES, r, 32, 1)
    given, formed = pairs()
    torch.testing.assert_close(projector.project_pairs(given, 7), projector.project(formed, 7))


@pytest.mark.parametrize("places", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_one_sample_agree_with_those_of_a_batch_to_rounding(dtype, places):
    """Bit for bit only ``project`` does: matrix products depend on the number of rows."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"w": (96, 80), "v": (300, 48)}
    projector = fastproj.FactoredProjector(sizes, 16, 64)
    given = {
        name: tuple(torch.randn(17, places, n, generator=generator, dtype=dtype) for n in shape)
        for name, shape in sizes.items()
    }
    y = projector.project_pairs(given)
    alone = torch.cat(
        [
            projector.project_pairs(
                {n: (a[i : i + 1], b[i : i + 1]) for n, (a, b) in given.items()}
            )
            for i in range(17)
        ]
    )
    error = torch.linalg.vector_norm(alone - y, dim=1) / torch.linalg.vector_norm(y, dim=1)
    assert float(error.max()) < 16 * torch.finfo(dtype).eps


def test_forms_of_gradients_agree_and_rows_do_not_depend_on_each_other():
    projector = fastproj.FactoredProjector(SHAPES, 4, 32, 1)
    grads = whole(dtype=torch.float32)
    y = projector.project(grads)
    assert y.dtype == torch.float32
    assert torch.equal(projector.project(list(grads.values())), y)
    flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
    assert torch.equal(projector.project(flat), y)
    out = torch.full_like(y, float("nan"))
    assert projector.project(grads, out=out) is out
    assert torch.equal(out, y)
    for row in range(B):
        assert torch.equal(
            projector.project({n: g[row : row + 1] for n, g in grads.items()})[0], y[row]
        )
    assert not torch.equal(projector.project(grads, 1), y)


@pytest.mark.parametrize("r", [2, 6])
def test_inner_products_keep_their_expectation(r):
    """The mean over 600 seeds is within 4.5 standard errors of the exact Gram matrix.

    Of the 6 entries one is outside by chance in 2 of 10^5 sets of seeds.
    """
    grads = whole(dtype=torch.float32)
    exact = torch.cat([g.flatten(1) for g in grads.values()], 1)
    exact = exact @ exact.T
    found = []
    for seed in range(600):
        y = fastproj.FactoredProjector(SHAPES, r, 64, seed).project(grads)
        found.append(y @ y.T)
    every = torch.stack(found)
    error = (every.mean(0) - exact) / (every.std(0) / len(found) ** 0.5)
    assert error.abs().max() < 4.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits(dtype):
    """Integers are exact in 16 bits, and so are their sums in float32 before the scale."""
    projector = fastproj.FactoredProjector(SHAPES, 4, 32, 1)
    exact = projector.project(whole())
    found = projector.project(whole(dtype=dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)


def test_a_module_gives_its_shapes():
    module = torch.nn.Linear(20, 30)
    projector = fastproj.FactoredProjector(module, 8, 16)
    assert projector.grad_dim == 630
    assert projector.inner_dim == 64 + 30
    assert "factored=8" in repr(projector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 5, 8, 16])
def test_sides_give_a_sample_the_same_bits_in_any_batch(r, dtype):
    one = fastproj.FactoredProjector({"w": (40, 19)}, r, 32, 3).sides("w", 2)
    x = torch.randn(3, 70, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = one.of_left(x)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, x.to(found.dtype) @ one.left.matrix(x))
    for part in (slice(0, 1), slice(1, 3), slice(0, 0)):
        assert torch.equal(one.of_left(x[part]), found[part])
    assert one.of_left(x[:, :0]).shape == (3, 0, r)


def test_pairs_are_the_same_under_autocast():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(B, T, n, generator=generator) for n in (30, 20))
    projector = fastproj.FactoredProjector({"w": (30, 20)}, 4, 64)
    usual = projector.project_pairs({"w": (left, right)})
    with torch.autocast("cpu", torch.bfloat16):
        other = projector.project_pairs({"w": (left, right)})
    assert torch.equal(usual, other)


@pytest.mark.parametrize("r", [2, 8])  # both sides compressed, or none
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_positions_are_not_in_16_bits(r, dtype):
    projector = fastproj.FactoredProjector({"w": (4, 6)}, r, 16)
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(15, 25, (2, 700, 4), generator=generator).to(dtype)  # sums above 65,504
    right = torch.randint(15, 25, (2, 700, 6), generator=generator).to(dtype)
    found = projector.project_pairs({"w": (left, right)})
    exact = projector.project_pairs({"w": (left.double(), right.double())})
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("r", [2, 64])
def test_no_samples_and_no_positions(r):
    """B = 0 gives [0, proj_dim], and pairs with T = 0 a gradient of zero."""
    projector = fastproj.FactoredProjector(SHAPES, r, 32)
    assert projector.project(whole(size=0)).shape == (0, 32)
    assert projector.project(torch.zeros(0, projector.grad_dim)).shape == (0, 32)
    given, _ = pairs()
    none = {
        n: p[:0] if isinstance(p, torch.Tensor) else (p[0][:0], p[1][:0]) for n, p in given.items()
    }
    assert projector.project_pairs(none).shape == (0, 32)
    still = {
        n: 0 * p if isinstance(p, torch.Tensor) else (p[0][:, :0], p[1][:, :0])
        for n, p in given.items()
    }
    assert torch.equal(projector.project_pairs(still), torch.zeros(B, 32, dtype=torch.float64))


def test_parameters_without_entries_are_nothing():
    projector = fastproj.FactoredProjector({**SHAPES, "none": (9, 0), "no": (0, 9)}, 4, 32, 1)
    grads = {**whole(), "none": torch.zeros(B, 9, 0).double(), "no": torch.zeros(B, 0, 9).double()}
    exact = fastproj.FactoredProjector(SHAPES, 4, 32, 1).project(whole())
    assert torch.equal(projector.project(grads), exact)


@pytest.mark.parametrize(
    ("shapes", "error", "said"),
    [
        ({"a": 5}, TypeError, r"shapes\['a'\] of type int.*tuple of sizes"),
        ({"a": "ab"}, TypeError, "of type str"),
        ({"a": None}, TypeError, "of type NoneType"),
        ({"a": torch.zeros(3, 4)}, TypeError, r"tuple\(a.shape\)"),
        ({"a": (2.5, 4)}, TypeError, r"2\.5.*expected an integer"),
        ({"a": (True, 4)}, TypeError, "expected an integer"),
        ({"a": (-1, 4)}, ValueError, "=-1; expected 0 <="),
        ({"a": (1 << 55, 3), "b": (1 << 55, 3)}, ValueError, r"2\^56 rows and columns"),
        (torch.nn.LazyLinear(4), ValueError, "lazy.*call it once"),
        ([("a", (3, 4))], TypeError, "a dict of shapes by name"),
    ],
)
def test_shapes_that_are_none(shapes, error, said):
    with pytest.raises(error, match=said):
        fastproj.FactoredProjector(shapes, 4, 32)


BAD_PAIRS = {
    "2-d": (
        "fc",
        lambda left, right: (left[:, 0], right[:, 0]),
        r"one position: left\.unsqueeze",
    ),
    "4-d": ("fc", lambda left, right: (left[:, None], right[:, None]), r"expected \[B, T, 12\]"),
    "integer inputs": ("fc", lambda left, right: (left, right.long()), r"pairs\['fc'\]\[1\].float"),
    "complex": ("fc", lambda left, right: (left + 0j, right), r"pairs\['fc'\]\[0\].*view_as_real"),
    "flags": ("table", lambda ids, right: (ids > 3, right), "row numbers"),
    "batch": ("fc", lambda left, right: (left[:2], right[:2]), "one batch size"),
    "devices": ("fc", lambda left, right: (left.to("meta"), right), "one device"),
    "other device": (
        "fc",
        lambda left, right: (left.to("meta"), right.to("meta")),
        "one batch size",
    ),
    "integer bias": ("bias", lambda g: g.long(), r"pairs\['bias'\].float\(\)"),
    "sparse": ("bias", lambda g: g.to_sparse(), r"pairs\['bias'\].to_dense\(\)"),
    "numpy": ("bias", lambda g: g.numpy(), "'bias': ndarray; expected a pair of tensors"),
    "none": ("bias", lambda g: None, "'bias': NoneType"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_pairs_that_are_refused(name):
    """By the caller's names, before ``out`` is touched."""
    which, spoil, said = BAD_PAIRS[name]
    projector = fastproj.FactoredProjector(SHAPES, 4, 32)
    given, _ = pairs()
    was = given[which]
    given[which] = spoil(was) if isinstance(was, torch.Tensor) else spoil(*was)
    out = torch.full((B, 32), 7.0, dtype=torch.float64)
    with pytest.raises(
        (TypeError, ValueError), match=f"^FactoredProjector.project_pairs: .*{said}"
    ):
        projector.project_pairs(given, out=out)
    assert bool((out == 7).all())


def test_what_it_refuses():
    make = fastproj.FactoredProjector
    with pytest.raises(TypeError, match="a dict of shapes by name"):
        make(7, 4, 32)
    with pytest.raises(ValueError, match="factored=0"):
        make(SHAPES, 0, 32)
    projector = make(SHAPES, 4, 32)
    grads = whole()
    with pytest.raises(ValueError, match="without 'narrow'"):
        projector.project({n: g for n, g in grads.items() if n != "narrow"})
    with pytest.raises(ValueError, match="'other'"):
        projector.project({**grads, "other": grads["bias"]})
    with pytest.raises(ValueError, match=r"'fc'.*expected \[B, 12, 7\]"):
        projector.project({**grads, "fc": grads["fc"][:, :11]})
    with pytest.raises(ValueError, match="grad_dim"):
        projector.project(torch.zeros(2, 9))
    with pytest.raises(ValueError, match="received 4 gradients; expected 5"):
        projector.project(list(grads.values())[:4])
    for odd in (None, 7, "abc"):
        with pytest.raises(TypeError, match=r"^FactoredProjector\.project: received grads of type"):
            projector.project(odd)
    with pytest.raises(ValueError, match=r"grads\['fc'\].*but grads\['bias'\].*one batch size"):
        projector.project({**grads, "bias": grads["bias"][:2]})
    with pytest.raises(TypeError, match=r"grads\['fc'\].float\(\)"):
        projector.project({**grads, "fc": grads["fc"].long()})
    given, _ = pairs()
    with pytest.raises(TypeError, match="received pairs of type list; expected a dict"):
        projector.project_pairs(list(given.values()))
    with pytest.raises(
        ValueError, match=r"'fc'.*row numbers.*\(the same two in the other order\)$"
    ):
        projector.project_pairs({**given, "fc": given["fc"][::-1]})
    with pytest.raises(TypeError, match="tuple of Tensor; expected a pair of tensors"):
        projector.project_pairs({**given, "fc": (given["fc"][0],)})
    with pytest.raises(TypeError, match="list of ndarray, ndarray; expected a pair of tensors"):
        projector.project_pairs({**given, "fc": [factor.numpy() for factor in given["fc"]]})
    short = {**given, "table": (given["table"][0].to(torch.uint16), given["table"][1])}
    assert torch.equal(projector.project_pairs(short), projector.project_pairs(given))
    with pytest.raises(ValueError, match="expected 0 <= row < 40"):
        projector.project_pairs({**given, "table": (given["table"][0] + 40, given["table"][1])})
