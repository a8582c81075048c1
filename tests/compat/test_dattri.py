"""compat.dattri: alone, and under dattri 0.3's own TRAKAttributor."""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastproj.compat import dattri as ours
from tests.compat.bounds import assert_keeps_inner_products, assert_scores_agree, exact_scores
from tests.compat.packages import load
from tests.dense import integers, normals, relative_error, stored

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


# ---- without dattri ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_projector_has_dattris_shape_and_scale(device: str, proj_type: str) -> None:
    kind = {"rademacher": "rademacher", "normal": "gaussian"}[proj_type]
    x = integers((3, 31)).to(device)
    projector = ours.Projector(31, 16, 5, proj_type, torch.device(device), dtype=torch.float64)
    for ensemble_id in (0, 2):
        y = projector.project(x, ensemble_id)
        exact = x.double().cpu() @ stored(31, 16, 5, kind, stream=ensemble_id) / 4
        assert relative_error(y.cpu(), exact) < 1e-14
        assert y.dtype == torch.float64
    projector.free_memory()
    tree = {"w": x[:, :30].reshape(3, 5, 6), "b": x[:, 30]}
    torch.testing.assert_close(projector.project(tree, 2), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("proj_dim", "block"), [(64, 64), (100, 64), (5, 16), (1 << 17, 1 << 16)])
def test_sjlt_has_one_entry_a_row_where_it_can(device: str, proj_dim: int, block: int) -> None:
    x = integers((3, 310)).to(device)
    tree = {"w": x[:, :300].reshape(3, 5, 60), "b": x[:, 300:].double()}  # of two dtypes
    projector = ours.make_random_projector([300, 10], 3, proj_dim, 8, torch.device(device), 4)
    assert isinstance(projector, ours.Projector)  # dattri's default type, "sjlt"
    exact = x.double().cpu() @ stored(310, proj_dim, 4, "sjlt", stream=2, block=block)
    exact *= (block / proj_dim) ** 0.5
    for features in (x, tree):
        assert relative_error(projector.project(features, 2).cpu(), exact) < 1e-6
    by_function = ours.random_project(x, 3, proj_dim, 8, 4, "sjlt", device=device)(x, 2)
    assert torch.equal(by_function, projector.project(x, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_random_project_follows_the_features(dtype: torch.dtype) -> None:
    x = integers((6, 40), dtype=dtype)
    project = ours.random_project(x, 6, 4, 16, 3, "rademacher", device="cpu")
    y = project(x[:2], ensemble_id=1)
    assert y.dtype == dtype
    exact = x[:2].double() @ stored(40, 4, 3, stream=1) / 2
    assert torch.equal(y, exact.to(dtype))
    tree = {"a": x[:, :15].reshape(6, 3, 5), "b": x[:, 15:]}
    assert torch.equal(ours.random_project(tree, 6, 4, 16, 3, "rademacher")(tree, 1)[:2], y)


def test_parameters_as_one_object() -> None:
    """dattri's development version passes RandomProjectionParams."""
    x = integers((2, 9))
    params = SimpleNamespace(
        feature_batch_size=2,
        proj_dim=4,
        proj_max_batch_size=8,
        proj_seed=1,
        proj_type="normal",
        device=torch.device("cpu"),
    )
    expected = ours.random_project(x, 2, 4, 8, 1, "normal")(x)
    assert torch.equal(ours.random_project(x, params)(x), expected)


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match=r"received proj_type='grass'.*'sjlt' .*others to dattri"):
        ours.random_project(torch.ones(1, 3), 1, 2, 8, proj_type="grass")
    with pytest.raises(ValueError, match=r"received proj_type='grass'; expected .* or 'sjlt'"):
        ours.Projector(3, 2, 0, "grass", "cpu")
    with pytest.raises(ValueError, match=r"received gradients of 4 .* expected 3"):
        ours.random_project(torch.ones(1, 3), 1, 2, 8)(torch.ones(1, 4))
    with pytest.raises(TypeError, match="received no proj_dim"):
        ours.random_project(torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="received 0 tensors, feature_batch_size=2; expected"):
        ours.random_project({}, 2, 3, 8)
    with pytest.raises(ValueError, match="received 1 tensors, feature_batch_size=0; expected"):
        ours.random_project(torch.ones(0, 3), 0, 3, 8)
    with pytest.raises(TypeError, match="int64"):
        ours.random_project(torch.ones(1, 3, dtype=torch.int64), 1, 2, 8)(
            torch.ones(1, 3, dtype=torch.int64)
        )


@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_inner_products_are_kept(proj_type: str) -> None:
    x = normals((8, 2000), seed=4)
    y = ours.random_project(x, 8, 4096, 8, proj_type=proj_type)(x)
    assert_keeps_inner_products(x, y * 4096**0.5, 4096)


GRASS = """
import torch

def make_random_projector(param_shape_list, feature_batch_size, proj_dim, proj_max_batch_size,
                          device, proj_seed=0, proj_type="sjlt", *, dtype=torch.float32,
                          grass_multiplier=4, active_indices=None):
    return "GraSS's own", proj_type, grass_multiplier, active_indices

def random_project(feature, feature_batch_size, proj_dim, proj_max_batch_size, proj_seed=0,
                   proj_type="normal", *, device="cpu", active_indices=None):
    sizes = [feature.numel() // feature_batch_size]
    return make_random_projector(sizes, feature_batch_size, proj_dim, proj_max_batch_size, device,
                                 proj_seed, proj_type, dtype=feature.dtype,
                                 active_indices=active_indices)
"""  # the calls of _dattri/func/projection.py


def test_the_copy_in_grass_is_patched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "_dattri" / "func"
    folder.mkdir(parents=True)
    (folder / "projection.py").write_text(GRASS)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours.install()
    theirs = importlib.import_module("_dattri.func.projection")
    try:
        x = integers((4, 33))
        y = theirs.random_project(x, 4, 9, 8, 2, "sjlt").project(x, ensemble_id=3)
        assert torch.equal(y, ours.Projector(33, 9, 2, "sjlt", "cpu").project(x, 3))
        # Types of its own stay its own, and get what they need.
        assert theirs.random_project(x, 4, 9, 8, 2, "grass", active_indices=[5]) == (
            "GraSS's own",
            "grass",
            4,
            [5],
        )
    finally:
        ours.uninstall()
        for name in [name for name in sys.modules if name.split(".")[0] == "_dattri"]:
            del sys.modules[name]
    assert theirs.random_project(x, 4, 9, 8, 2, "sjlt")[0] == "GraSS's own"


# ---- dattri itself -------------------------------------------------------------------------------

N, M, FEATURES = 30, 8, 20


def data(n: int, seed: int) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = 1 + 0.3 * torch.randn(n, FEATURES, generator=generator)
    y = torch.randint(0, 2, (n,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 2))


MODEL = network()
STATE = copy.deepcopy(MODEL.state_dict())  # dattri loads checkpoints into the model


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    logits = torch.func.functional_call(MODEL, params, x.unsqueeze(0))
    return nn.functional.cross_entropy(logits, y.unsqueeze(0))


def margin(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    value = loss(params, *batch)
    return -torch.log(-torch.expm1(-value)) - value  # log(p / (1 - p))


def probability(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return torch.exp(-loss(params, *batch))


def attribute(regularization: float, checkpoints: int = 1, **projector: object) -> Tensor:
    """TRAKAttributor's scores [N, M] of a small network, without the weights 1 - p."""
    task = load("dattri.task").AttributionTask(
        loss_func=margin,
        model=MODEL,
        checkpoints=[{k: v / (i + 1) for k, v in STATE.items()} for i in range(checkpoints)],
    )
    attributor = load("dattri.algorithm.trak").TRAKAttributor(
        task=task,
        correct_probability_func=probability,
        device="cpu",
        projector_kwargs={"proj_max_batch_size": 8, "proj_seed": 0, "device": "cpu", **projector},
        regularization=regularization,
    )
    attributor.cache(data(N, 1))
    with torch.no_grad():
        return attributor.attribute(data(M, 2)) / attributor.Q[:, None]


def gradients(loader: torch.utils.data.DataLoader) -> Tensor:
    """What TRAKAttributor projects, [n, P] float64."""
    params = {k: v.detach().double() for k, v in STATE.items()}
    x, y = loader.dataset.tensors
    tree = torch.func.vmap(torch.func.grad(margin), (None, (0, 0)))(params, (x.double(), y))
    flat = torch.cat([g.flatten(1) for g in tree.values()], 1)
    return flat / flat.shape[1] ** 0.5


@pytest.mark.slow
def test_install_serves_dattris_own_functions() -> None:
    theirs = load("dattri.func.projection")
    trak = load("dattri.algorithm.trak")
    original = theirs.make_random_projector
    x = integers((4, 33))
    ours.install()
    ours.install()
    assert theirs.make_random_projector.func is ours.make_random_projector
    for function in (original, theirs.random_project):
        mine = inspect.signature(getattr(ours, function.__name__)).parameters
        for name, parameter in inspect.signature(function).parameters.items():
            if name != "grass_multiplier":  # handed on
                assert mine[name].kind == parameter.kind
                expected = {"proj_dim": None, "proj_max_batch_size": None}  # they may come as one
                if function is original or name not in expected:
                    assert mine[name].default == parameter.default
    project = trak.random_project(x, 4, 9, 8, proj_seed=2, proj_type="rademacher")
    assert torch.equal(
        project(x, ensemble_id=3), ours.Projector(33, 9, 2, "rademacher", "cpu").project(x, 3)
    )
    mask = trak.random_project(x, 4, 9, 8, proj_type="random_mask")(x)  # dattri's, still
    assert all((x == column[:, None]).all(0).any() for column in mask.T)
    assert isinstance(
        ours.Projector(3, 2, 0, theirs.ProjectionType.normal, "cpu"), theirs.AbstractProjector
    )
    ours.uninstall()
    assert theirs.make_random_projector is original


@pytest.mark.slow
def test_trak_attributor_on_ours_agrees_with_its_own() -> None:
    """Correlation above 0.95 at k = 4096, as in test_trak.py."""
    train, targets = gradients(data(N, 1)), gradients(data(M, 2))
    s, lam, angle = exact_scores(train, targets, 0.3, 4096)
    kinds = ("normal", "rademacher")
    own = {kind: attribute(lam, proj_dim=4096, proj_type=kind) for kind in kinds}
    ours.install()
    for kind in kinds:
        scores = attribute(lam, proj_dim=4096, proj_type=kind)
        assert scores.shape == (N, M)
        assert not torch.equal(scores, own[kind])  # the projection was replaced
        assert_scores_agree(s, angle, scores, own[kind])
    # Of one seed the same scores, of another different ones (dattri issue 110).
    a, b, c = (attribute(lam, 2, proj_dim=64, proj_type="normal", proj_seed=i) for i in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


class Whole(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.slow
def test_factorised_projections_on_ours() -> None:
    """DVEmb's and LoGra's: both factors of a layer's gradient, and their Kronecker product."""
    load("dattri.func.projection")
    ours.install()
    a, b = integers((6, FEATURES)), integers((6, 5), 1)
    r = stored(FEATURES, 9, 4, "gaussian") / 3
    exact = torch.einsum("bi,bj->bij", b.double() @ r[:5], a.double() @ r).flatten(1)
    layer = nn.Linear(FEATURES, 5, bias=False)
    dvemb = load("dattri.algorithm.dvemb").DVEmbAttributor.__new__(
        load("dattri.algorithm.dvemb").DVEmbAttributor
    )
    dvemb._linear_layers, dvemb.projection_dim = [layer], 9
    dvemb.projector_kwargs = {
        "proj_max_batch_size": 8,
        "proj_seed": 4,
        "proj_type": "normal",
        "device": "cpu",
    }
    dvemb._setup_projectors(batch_size=6)
    got = dvemb._project_gradients_factors_kronecker([{"A": a, "B": b}])
    assert relative_error(got, exact) < 1e-5

    # LoGra seeds a layer by its place among the modules, and compiles the call.
    compressor = load("dattri.algorithm.block_projected_if.core.compressor")
    dense = {"proj_dim": 9, "proj_max_batch_size": 8, "proj_type": "normal", "device": "cpu"}
    (stage,) = compressor.setup_model_compressors(
        Whole(layer),
        ["layer"],
        sparsifier_kwargs=dense | {"proj_seed": 4},
        projector_kwargs=dense | {"proj_dim": -1, "proj_type": "identity"},
        sample_inputs={"x": a},
    )
    factors = [stored(n, 9, 10_004 + i, "gaussian") / 3 for i, n in enumerate((5, FEATURES))]
    v = [x.double() @ r for x, r in zip((b, a), factors, strict=True)]
    exact = 6 * torch.einsum("bi,bj->bij", *v).flatten(1)  # dattri's scale: the batch size
    for _ in range(2):
        assert relative_error(stage.forward(b, a), exact) < 1e-5
