"""Lambda in a mean over checkpoints: what each of them has learned alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastproj.trak.solving import peers
from tests.trak import cases

N, K, M = 30, 12, 4


def trained(train, seed, steps=40):
    """A network that has fitted its samples for a while."""
    torch.manual_seed(seed)
    model = cases.net().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train[0].float()), train[1]).backward()
        optimizer.step()
    return model.double()


def run(tmp_path, models, train, targets, **options):
    cases.whole_run(tmp_path, models, train, targets, proj_dim=K, curvature="fisher", **options)
    return cases.make(models[0], tmp_path, N, proj_dim=K, curvature="fisher")


@pytest.fixture
def problem():
    train, targets = cases.data(N, dtype=torch.float64), cases.data(M, seed=5, dtype=torch.float64)
    return [trained(train, seed) for seed in (1, 2, 3)], train, targets


def test_correlations_are_those_of_numpy_and_0_of_a_constant():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    others = torch.randn(9, generator=generator, dtype=torch.float64) + 4
    outputs[:, 1] = 2
    found = peers.correlations(outputs, others)
    for i in (0, 2):
        assert float(found[i]) == pytest.approx(np.corrcoef(outputs[:, i], others)[0, 1])
    assert float(found[1]) == 0
    assert not peers.correlations(outputs, torch.ones(9).double()).any()


def test_one_checkpoint_and_a_number_stay(tmp_path, problem, monkeypatch):
    monkeypatch.setattr(peers, "agreeing_multiple", None)
    models, train, targets = problem
    run(tmp_path / "one", models[:1], train, targets)
    run(tmp_path / "number", models, train, targets, lambda_reg=0.3)


def test_the_same_checkpoints_are_compared_once(tmp_path, problem, monkeypatch):
    """Whatever is asked of them; and anew for others, or after another lambda was chosen."""
    models, train, targets = problem
    traker = run(tmp_path, models, train, targets)
    compare, asked = peers.agreeing_multiple, []

    def counted(systems, computer, model_ids):
        asked.append(list(model_ids))
        return compare(systems, computer, model_ids)

    monkeypatch.setattr(peers, "agreeing_multiple", counted)
    scores = np.array(traker.finalize_scores("test"))
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)
    traker.self_influence()
    parts = []
    for model_id, model in enumerate(models):
        traker.start_scoring_checkpoint("test", model.state_dict(), model_id, M)
        parts.append(traker.score(targets, per="module").sum(2))
    np.testing.assert_allclose(
        np.mean(parts, 0), scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max()
    )
    assert asked == [[0, 1, 2]]
    traker.finalize_scores("test", [0, 2])
    traker.finalize_features([1], lambda_reg=0.5)
    traker.finalize_scores("test")
    assert asked == [[0, 1, 2], [0, 2]]


@pytest.mark.parametrize("alone", [0.0, 1.0, 4.0])
def test_what_each_has_alone_raises_lambda_until_it_is_small_beside_the_rest(monkeypatch, alone):
    """Directions of all with a strength of 30, and those of one checkpoint with one of 2."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(40, 5, generator=generator, dtype=torch.float64))[0]
    parts = parts - parts.mean(0)
    of_all, also, *own = parts.mT
    store = SimpleNamespace(column=lambda i, name: of_all + 0.5 * also + alone * own[i])

    def outputs_of(systems, computer, model_id, multiples):
        ridges = torch.tensor(multiples)
        shrunk = of_all[:, None] * (30 / (30 + ridges)) + 0.5 * also[:, None] * (8 / (8 + ridges))
        return shrunk + alone * own[model_id][:, None] * (2 / (2 + ridges))

    monkeypatch.setattr(peers, "outputs_of", outputs_of)
    found = peers.agreeing_multiple(SimpleNamespace(store=store), None, [0, 1, 2])
    ridges = 1.5 ** np.arange(9)
    curve = sum(
        peers.correlations(
            outputs_of(None, None, i, list(ridges)),
            sum(store.column(j, "") for j in range(3) if j != i),
        )
        for i in range(3)
    )
    assert found == pytest.approx(ridges[int(curve.argmax())])
    assert (found > 1) == (alone > 0)
