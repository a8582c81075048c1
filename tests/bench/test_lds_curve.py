"""The LDS curve: its datamodels and its gradients are what they are called, and it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV

from bench import lds_curve, record
from bench.battery import PROBLEMS


def test_datamodels_are_sklearns_ridge_with_its_own_choice() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((60, 25)) < 0.5
    outputs = masks @ rng.normal(size=(25, 4)) * [1, 0.1, 1, 1] + rng.normal(size=(60, 4)) + 3
    x = masks - masks.mean(0)
    unit = np.trace(x @ x.T) / len(x)
    ridge = RidgeCV([unit * r for r in lds_curve.RIDGES], alpha_per_target=True)
    ridge.fit(masks.astype(float), outputs)
    assert len(set(ridge.alpha_)) > 1
    np.testing.assert_allclose(lds_curve.datamodel_scores(masks, outputs), ridge.coef_.T, atol=1e-8)


def test_tracin_is_the_mean_product_of_loss_gradients() -> None:
    problem = PROBLEMS["digits"](n=6, targets=3)
    checkpoints = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        checkpoints.append(problem.model().state_dict())
    expected = torch.zeros(6, 3)
    for checkpoint in checkpoints:
        model = problem.model()
        model.load_state_dict(checkpoint)

        def gradient(x: torch.Tensor, y: torch.Tensor, model: torch.nn.Module = model):
            loss = torch.nn.functional.cross_entropy(model(x[None]), y[None])
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
            )

        samples = [gradient(x, y) for x, y in zip(*problem.samples, strict=True)]
        targets = [gradient(x, y) for x, y in zip(*problem.targets, strict=True)]
        expected += torch.stack(samples) @ torch.stack(targets).mT / 2
    ((count, found),) = lds_curve.tracin_scores(problem, checkpoints, [2])
    assert count == 2
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_it_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    sizes = {
        "checkpoints": 2,
        "datamodels": 20,
        "subsets": 6,
        "retrainings": 2,
        "n-boot": 10,
        "train": 60,
        "epochs": 2,
    }
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    more = ["--cache", str(tmp_path / "cache"), "--traker", '{"proj_dim": 16}']
    assert lds_curve.main([*words, *more]) == 0
    (path,) = tmp_path.glob("*-lds-curve.json")
    (problem,) = json.loads(path.read_text())["problems"]
    counted = [(p["method"], p["models"]) for p in problem["points"]]
    assert counted == [
        ("TRAK", 1),
        ("TRAK", 2),
        ("datamodels (ridge)", 10),
        ("datamodels (ridge)", 20),
        ("TracIn-style", 1),
        ("TracIn-style", 2),
    ]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib" in sys.modules
