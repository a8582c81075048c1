"""quanda 0.5's TRAK wrapper, on ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastproj.compat import trak as ours
from tests.compat.bounds import assert_scores_agree, exact_scores
from tests.compat.packages import load

pytestmark = pytest.mark.slow

N, M, FEATURES, CLASSES = 20, 4, 12, 2


class Data(torch.utils.data.Dataset):
    def __init__(self, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = 1 + 0.3 * torch.randn(n, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).eval()


def explain(model: nn.Module, cache: Path, **options: object) -> tuple[object, Tensor]:
    wrapper = load("quanda.explainers.wrappers.trak_wrapper")
    explainer = wrapper.TRAK(
        model=model,
        train_dataset=Data(N, 1),
        model_id="test",
        cache_dir=str(cache),
        load_from_disk=False,
        seed=3,
        **{"proj_dim": 10, "batch_size": 7, "lambda_reg": 1.0, **options},
    )
    targets = Data(M, 2)
    return explainer, explainer.explain(targets.x, targets.y)


@pytest.mark.parametrize("projector", ["basic", "cuda"])
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_wrapper_runs_on_ours(
    model: nn.Module, tmp_path: Path, projector: str, proj_type: str
) -> None:
    """Its registry of classes was filled when it was imported: install() reaches that too."""
    wrapper = load("quanda.explainers.wrappers.trak_wrapper")
    ours.install()
    assert wrapper.projector_cls["cuda"] is ours.CudaProjector
    assert importlib.util.find_spec("fast_jl") is not None  # quanda asks before it takes "cuda"
    explainer, scores = explain(model, tmp_path, projector=projector, proj_type=proj_type)
    cls = ours.CudaProjector if projector == "cuda" else ours.BasicProjector
    assert type(explainer.traker.projector) is cls
    assert scores.shape == (M, N)
    assert torch.isfinite(scores).all()
    if projector == "cuda":
        assert explainer.traker.projector.max_batch_size == 7  # no multiple of 8
    features = torch.as_tensor(explainer.traker.saver.current_store["features"])
    assert features.shape == (N, 10)
    _, again = explain(model, tmp_path / "again", projector="basic", proj_type=proj_type)
    torch.testing.assert_close(again, scores, rtol=1e-4, atol=1e-4 * float(scores.abs().max()))


def test_wrapper_on_its_own_agrees(model: nn.Module, tmp_path: Path) -> None:
    """Correlation above 0.95 at k = 4096, as in test_trak.py."""
    k, size = 4096, sum(p.numel() for p in model.parameters())
    computer = explain(model, tmp_path / "any", projector="basic")[0].traker.gradient_computer
    train, targets = (
        ours.NoOpProjector().project(computer.compute_per_sample_grad(batch=(d.x, d.y)), 0).double()
        for d in (Data(N, 1), Data(M, 2))
    )
    s, lam, angle = exact_scores(train, targets, 0.3, k)
    options = {"proj_type": "normal", "proj_dim": k, "lambda_reg": lam * k / size}
    explainer, own = explain(model, tmp_path / "own", projector="basic", **options)
    ours.install()
    _, mine = explain(model, tmp_path / "ours", projector="basic", **options)
    weights = torch.as_tensor(explainer.traker.saver.current_store["out_to_loss"]).T  # [1, N]
    own, mine = own / weights, mine / weights
    assert not torch.equal(own, mine)
    assert_scores_agree(s.T, angle, own, mine)
