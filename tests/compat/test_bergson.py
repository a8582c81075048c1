"""compat.bergson: alone, and under bergson's own collector on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastproj.compat import bergson as ours
from tests.compat.bounds import assert_keeps_inner_products
from tests.compat.packages import load
from tests.dense import integers, normals, relative_error, stored

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = {"rademacher": "rademacher", "normal": "gaussian"}


@dataclass
class Outer:
    """bergson's OuterProductGradients as far as it matters here."""

    g: Tensor
    a: Tensor
    bias: Tensor | None = None
    bias_col: Tensor | None = None
    divisor: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Outer:
        """The divisor keeps its dtype, as bergson's does."""
        moved = {name: getattr(self, name) for name in ("g", "a", "bias", "bias_col")}
        moved = {k: v if v is None else v.to(device, dtype) for k, v in moved.items()}
        return replace(self, **moved)

    def materialize(self) -> Tensor:
        p = self.g.unsqueeze(-1) * self.a.unsqueeze(-2) if self.g.ndim == 2 else self.g.mT @ self.a
        if self.divisor is not None:
            p.div_(self.divisor)
        return p if self.bias is None else p + self.bias.unsqueeze(-1) * self.bias_col


# ---- without bergson -----------------------------------------------------------------------------


@pytest.mark.parametrize("projection_type", KINDS)
@pytest.mark.parametrize("scale", ["jl", "row_norm"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_matrix_and_the_projection_agree(
    projection_type: str, scale: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastproj.compat.sketch.BLOCK", 500)
    name, m, n = "layers.0.mlp/single", 24, 101
    A = ours.create_projection_matrix(
        name, m, n, torch.float64, device, projection_type, scale
    )  # fmt: skip
    assert A.shape == (m, n)
    r = stored(n, m, ours.seed_of(name), KINDS[projection_type])
    divisor = m**0.5 if scale == "jl" else r.norm(dim=0)
    assert relative_error(A.cpu(), (r / divisor).T) < 1e-6
    x = normals((5, n)).to(device)
    y = ours.project_global(name, x, m, projection_type, scale)
    assert relative_error(y.cpu(), (x.double() @ A.T).cpu()) < 1e-5
    half = ours.project_global(name, x.bfloat16(), m, projection_type, scale)
    assert half.dtype == torch.float32  # sums over modules are not rounded to bfloat16
    if scale == "row_norm":
        torch.testing.assert_close(A.norm(dim=1), torch.ones_like(A[:, 0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("projection_type", KINDS)
@pytest.mark.parametrize("scale", ["jl", "row_norm"])
def test_float64_is_float64_whatever_torchs_default_is(projection_type: str, scale: str) -> None:
    """A model's loading sets the default to bfloat16."""
    m, n = 24, 101
    torch.set_default_dtype(torch.bfloat16)
    try:
        name = f"{projection_type}/{scale}"  # none whose norms are kept from another test
        A = ours.create_projection_matrix(name, m, n, torch.float64, "cpu", projection_type, scale)
        x = normals((5, n)).double()
        y = ours.project_global(name, x, m, projection_type, scale)
    finally:
        torch.set_default_dtype(torch.float32)
    r = stored(n, m, ours.seed_of(name), KINDS[projection_type])
    exact = r / (m**0.5 if scale == "jl" else r.norm(dim=0))
    assert relative_error(A, exact.T) < 1e-14
    assert relative_error(y, x @ exact) < 1e-14


def test_identifiers_name_matrices() -> None:
    a, b = (ours.create_projection_matrix(s, 8, 90, torch.float32, "cpu") for s in ("x", "y"))
    assert not torch.equal(a, b)
    assert ours.seed_of("x") == int.from_bytes(bytes.fromhex("2d711642b726b044"), "little")


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("limit", [1 << 27, 40])
def test_outer_products_are_formed_a_few_rows_at_a_time(
    tokens: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "MATERIALIZED", limit)
    shape = (7,) if tokens else (7, 3)
    P = Outer(
        integers((*shape, 4)), integers((*shape, 5), 1), integers((7, 4), 2), integers((5,), 3)
    )
    y = ours.project_global("a", P, 6, "rademacher")
    exact = ours.project_global("a", P.materialize().flatten(1), 6, "rademacher")
    assert torch.equal(y, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_divisor_takes_half_precision_nowhere(dtype: torch.dtype) -> None:
    """Adam's smallest divisors: the quotients are beyond float16, and far from a bfloat16."""
    g, a = (integers((7, n), seed, dtype) for n, seed in ((4, 0), (5, 1)))
    divisor = (1 + normals((4, 5)).abs()) * 1e-6
    y = ours.project_global("a", Outer(g, a, divisor=divisor), 6, "rademacher")
    exact = (g.double().unsqueeze(-1) * a.double().unsqueeze(-2) / divisor.double()).flatten(1)
    assert exact.abs().max() > 65504
    assert relative_error(y, exact @ stored(20, 6, ours.seed_of("a")) / 6**0.5) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_no_rows_are_no_rows(dtype: torch.dtype) -> None:
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    g, a = torch.zeros(0, 4, dtype=dtype), torch.zeros(0, 5, dtype=dtype)
    for P in (Outer(g, a), torch.zeros(0, 20, dtype=dtype)):
        y = ours.project_global("a", P, 6)
        assert (y.shape, y.dtype) == ((0, 6), wanted)


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match="received projection_scale='none'; expected 'jl' or"):
        ours.project_global("a", torch.ones(1, 2), 3, "normal", "none")
    with pytest.raises(ValueError, match="create_projection_matrix: received proj_type='sparse'"):
        ours.create_projection_matrix("a", 2, 2, torch.float32, "cpu", "sparse")


@pytest.mark.parametrize("projection_type", KINDS)
def test_inner_products_are_kept(projection_type: str) -> None:
    x = normals((8, 2000), seed=6)
    y = ours.project_global("layer", x, 4096, projection_type)
    assert_keeps_inner_products(x, y * 4096**0.5, 4096)


# ---- bergson itself ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> nn.Module:
    transformers = load("transformers")
    load("bergson.collector.collector")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def collect(model: nn.Module, folder: Path, projection_dim: int, **processor: object) -> dict:
    """bergson's gradients of six short texts, by its in-memory collector."""
    collector = load("bergson.collector.collector")
    memory = load("bergson.collector.in_memory_collector")
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 50, (6, 9), generator=generator).tolist()
    data = load("datasets").Dataset.from_dict({"input_ids": texts, "labels": texts})
    folder.with_name(folder.name + ".part").mkdir()
    config = load("bergson.config.config").IndexConfig(
        run_path=str(folder), projection_dim=projection_dim
    )
    hooks = memory.InMemoryCollector(
        model=model.base_model,
        data=data,
        cfg=config,
        processor=load("bergson.gradients").GradientProcessor(
            projection_dim=projection_dim or None, **processor
        ),
    )
    collector.CollectorComputer(
        model, data, collector=hooks, batches=[[0, 1, 2], [3, 4, 5]], cfg=config
    ).run_with_collector_hooks()
    return hooks.gradients


@pytest.mark.slow
@pytest.mark.parametrize("projection_type", KINDS)
def test_global_projection_on_ours(model: nn.Module, tmp_path: Path, projection_type: str) -> None:
    """The sum over modules of gradient @ R / sqrt(k), R from the module's identifier."""
    k = 4096
    full = collect(model, tmp_path / "full", 0)
    options = {"projection_target": "global", "projection_type": projection_type}
    own = collect(model, tmp_path / "own", k, **options)["gradients"]
    ours.install()
    got = collect(model, tmp_path / "ours", k, **options)["gradients"]
    assert not torch.equal(got, own)
    assert len(full) > 10
    exact = sum(
        grads.double()
        @ stored(grads.shape[1], k, ours.seed_of(f"{name}/single"), KINDS[projection_type])
        / k**0.5
        for name, grads in full.items()
    )
    assert relative_error(got, exact) < 1e-5
    whole = torch.cat(list(full.values()), 1)
    for projected in (got, own):
        assert_keeps_inner_products(whole, projected * k**0.5, k)


@pytest.mark.slow
def test_two_sided_projection_on_ours(model: nn.Module, tmp_path: Path) -> None:
    full = collect(model, tmp_path / "full", 0)
    ours.install()
    got = collect(model, tmp_path / "ours", 4)
    collector = load("bergson.collector.collector")
    for name, grads in full.items():
        module = model.base_model.get_submodule(name)
        left, right = (
            collector.create_projection_matrix(
                f"{name}/{side}", 4, size, torch.float64, torch.device("cpu"), "rademacher"
            )
            for side, size in (("left", module.out_features), ("right", module.in_features))
        )
        p = left @ grads.double().reshape(6, module.out_features, module.in_features) @ right.T
        assert relative_error(got[name].reshape(6, 4, 4), p) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("projection_scale", ["jl", "row_norm"])
def test_bergsons_outer_products_on_ours(tokens: bool, projection_scale: str) -> None:
    """Its own class, with a bias and a divisor, against its own arithmetic in float64."""
    outer = load("bergson.gradients").OuterProductGradients
    shape = (7,) if tokens else (7, 3)
    grads = outer(
        normals((*shape, 4)),
        normals((*shape, 5), 1),
        normals((7, 4), 2),
        torch.tensor([0.0, 0, 0, 0, 1]),
        normals((4, 5), 3).abs() + 0.1,
    )
    A = ours.create_projection_matrix(
        "a", 6, 20, torch.float64, "cpu", "normal", projection_scale
    )  # fmt: skip
    exact = grads.to("cpu", torch.float64).materialize().flatten(1) @ A.T
    y = ours.project_global("a", grads, 6, "normal", projection_scale)
    assert relative_error(y, exact) < 1e-6
    half = ours.project_global("a", grads.to("cpu", torch.bfloat16), 6, "normal", projection_scale)
    assert relative_error(half, exact) < 2.0**-6  # as far off as its inputs


@pytest.mark.slow
def test_install_reaches_modules_that_imported_the_names() -> None:
    theirs = load("bergson.collector.collector")
    other = load("bergson.hessians.apply_hessian")
    before = theirs.project_global
    ours.install()
    ours.install()
    assert theirs.project_global is other.project_global is ours.project_global
    ours.uninstall()
    assert theirs.project_global is other.project_global is before
