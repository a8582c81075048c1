"""Lambda in a mean over checkpoints: what each of them has learned alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastproj.trak import FunctionModelOutput, progress
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


def chosen(traker, model_id):
    """The lambda of a checkpoint as it is stored."""
    return traker.saver.systems.read_solve(model_id)["lambda_reg"]


def of_mean(traker, model_ids):
    """The lambdas with which the scores of these are averaged."""
    found = peers.in_mean(traker.saver.systems, traker.score_computer, model_ids).solved
    return [found[model_id]["lambda_reg"] for model_id in model_ids]


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


@pytest.mark.parametrize(("n", "k"), [(30, 12), (12, 40)])
def test_outputs_are_those_of_the_newton_step(tmp_path, monkeypatch, n, k):
    """By the primal and by the dual, of several blocks."""
    cases.small_blocks(monkeypatch.setattr)
    train = cases.data(n, dtype=torch.float64)
    model = trained(train, 1)
    traker = cases.featurized(model, tmp_path, train, proj_dim=k, curvature="fisher")
    traker.finalize_features()
    systems = traker.saver.systems
    assert systems.read_system(0).dual == (n == 12)
    lam = systems.read_solve(0)["lambda_reg"]
    matrix, _, response = cases.fisher_of(model, 0, train, k, traker.fisher)
    phi = cases.projected(cases.gradients(model, train), k, 0)
    ridged = [matrix + by * lam * torch.eye(k).double() for by in (1, 2.25)]
    expected = torch.stack([phi @ torch.linalg.solve(one, response) for one in ridged], 1)
    found = peers.outputs_of(systems, traker.score_computer, 0, [1, 2.25])
    assert found.dtype == torch.float64
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * size)


def test_one_checkpoint_and_a_number_stay(tmp_path, problem, monkeypatch):
    monkeypatch.setattr(peers, "agreeing_multiple", None)
    models, train, targets = problem
    traker = run(tmp_path / "one", models[:1], train, targets)
    assert of_mean(traker, [0]) == pytest.approx([3 * chosen(traker, 0)])
    traker = run(tmp_path / "number", models, train, targets, lambda_reg=0.3)
    assert of_mean(traker, [0, 1, 2]) == [0.3] * 3
    traker.finalize_features([1], lambda_reg="auto")
    assert of_mean(traker, [0, 1]) == pytest.approx([0.3, 2 * chosen(traker, 1)])


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
    (multiple,) = traker.saver.systems.multiples.values()
    assert multiple > 1
    grown = [5 / 3 * multiple * chosen(traker, model_id) for model_id in range(3)]
    assert of_mean(traker, [0, 1, 2]) == pytest.approx(grown)
    traker.finalize_scores("test", [0, 2])
    traker.finalize_features([1], lambda_reg=0.5)
    traker.finalize_scores("test")
    assert asked == [[0, 1, 2], [0, 2]]


def classes_told_apart(steps):
    """x [60, 6], y [60] of two classes, some of them wrong; and three networks of one logit."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + 0.8 * torch.randn(60, generator=generator, dtype=torch.float64) > 0).long()
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(x)[:, 0], y.double()).backward()
            optimizer.step()
        models.append(model)
    return x, y, models


def test_two_classes_may_be_said_by_the_log_odds_of_either(tmp_path):
    """By the right one's, or by that of class 1 for all, with which others agree on the labels."""
    x, y, models = classes_told_apart(steps=10)
    right = FunctionModelOutput(
        lambda model, batch: (2 * batch[1] - 1) * model(batch[0])[:, 0],
        likelihood=lambda f, batch: F.logsigmoid(f),
    )
    by_class = FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0],
        likelihood=lambda f, batch: batch[1] * f - F.softplus(f),
    )
    found = []
    for name, task in (("right", right), ("by_class", by_class)):
        options = {"task": task, "proj_dim": 32, "curvature": "fisher"}
        folder, targets = tmp_path / name, (x[:M], y[:M])
        scores = np.array(cases.whole_run(folder, models, (x, y), targets, **options))
        traker = cases.make(models[0], folder, len(x), **options)
        np.testing.assert_array_equal(traker.finalize_scores("test"), scores)
        found.append((scores, traker.saver.systems.multiples.popitem()[1]))
    (scores, multiple), (others, other) = found
    assert other == multiple > 1
    others = others * (2 * y[:M].numpy() - 1)
    np.testing.assert_allclose(others, scores, rtol=1e-4, atol=1e-5 * np.abs(scores).max())


def store_of(along, slopes=None, curvature=None):
    """Columns of 40 samples whose outputs are ``along(model_id)``: a regression, unless given."""
    columns = {
        "out_to_loss": torch.linspace(-1, 1, 40).double() if slopes is None else slopes,
        "curvature": torch.ones(40).double() if curvature is None else curvature,
    }
    return SimpleNamespace(column=lambda i, name: along(i) if name == "along" else columns[name])


def along_two():
    """Two directions [40] that are orthogonal to each other, and to a constant."""
    one = torch.linspace(-1, 1, 40, dtype=torch.float64)
    made = torch.linalg.qr(torch.stack([torch.ones_like(one), one, one**2], 1))[0]
    return made[:, 1], made[:, 2]


def multiple_of_curve(monkeypatch, curve):
    """(what is found, the multiples that were tried) where the correlations are these numbers."""
    said, aside = along_two()
    tried = []

    def outputs_of(systems, computer, model_id, multiples):
        tried.extend(multiples if model_id == 0 else [])
        places = [round(np.log(multiple) / np.log(1.5)) for multiple in multiples]
        found = torch.tensor([curve[place] for place in places], dtype=torch.float64)
        return said[:, None] * found + aside[:, None] * (1 - found.square()).sqrt()

    monkeypatch.setattr(peers, "outputs_of", outputs_of)
    systems = SimpleNamespace(store=store_of(lambda i: said))
    return peers.agreeing_multiple(systems, None, [0, 1, 2]), tried


@pytest.mark.parametrize("best", range(9))
def test_the_multiple_is_the_best_of_nine_powers(monkeypatch, caplog, best):
    """Those above it are not tried, but the rest of its group and, at its end, another."""
    curve = [0.9 - 0.01 * abs(place - best) for place in range(9)]
    with caplog.at_level("INFO", "fastproj.trak"):
        found, tried = multiple_of_curve(monkeypatch, curve)
    assert found == 1.5**best
    assert tried == [1.5**place for place in range([2, 5, 5, 5, 9, 9, 9, 9, 9][best])]
    assert f"lambda of 3 checkpoints: {1.5**best:.3g} times that of each" in caplog.text


@pytest.mark.parametrize("fall", [1, 4])
def test_the_search_stops_where_correlations_fall(monkeypatch, fall):
    curve = [0.5 + 0.01 * place for place in range(9)]
    curve[fall] = 0.4
    assert multiple_of_curve(monkeypatch, curve)[0] == 1.5 ** (fall - 1)


@pytest.mark.parametrize(("gain", "expected"), [(3e-7, 1.0), (3e-5, 1.5**3)])
def test_what_may_be_rounding_is_no_gain(monkeypatch, gain, expected):
    """Outputs of two samples, or of one direction, are the same at any lambda but for float32."""
    curve = [0.9 + gain * min(place, 3) for place in range(9)]
    assert multiple_of_curve(monkeypatch, curve)[0] == expected


def test_the_smallest_of_multiples_that_are_as_good_is_taken(monkeypatch):
    curve = [0.8, 0.8 + 2e-6, 0.85, 0.9, 0.9 + 5e-7, 0, 0, 0, 0]
    assert multiple_of_curve(monkeypatch, curve)[0] == 1.5**3


@pytest.mark.parametrize(("logistic", "expected"), [(True, 1.5**8), (False, 1.0)])
def test_a_difference_between_classes_is_none_of_their_right_ones(monkeypatch, logistic, expected):
    """What a larger lambda adds to one class and takes from the other. A regression has no sides,
    though its slopes have both signs.
    """
    said, aside = along_two()
    side = said.new_tensor([-1.0, 1.0]).repeat(20)
    slopes = side * torch.sigmoid(-side * said)
    curvature = slopes.abs() * torch.sigmoid(side * said) if logistic else torch.ones(40).double()
    store = store_of(lambda i: said, slopes, curvature)

    def outputs_of(systems, computer, model_id, multiples):
        grown = torch.tensor(multiples, dtype=torch.float64)
        own = (side * said)[:, None] + aside[:, None] * side[:, None] / grown
        return side[:, None] * own + 0.3 * grown * side[:, None]

    monkeypatch.setattr(peers, "outputs_of", outputs_of)
    assert peers.agreeing_multiple(SimpleNamespace(store=store), None, [0, 1, 2]) == expected


@pytest.mark.parametrize("alone", [0.0, 1.0, 4.0])
def test_what_each_has_alone_raises_lambda_until_it_is_small_beside_the_rest(monkeypatch, alone):
    """Directions of all with a strength of 30, and those of one checkpoint with one of 2."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.linalg.qr(torch.randn(40, 5, generator=generator, dtype=torch.float64))[0]
    parts = parts - parts.mean(0)
    of_all, also, *own = parts.mT
    store = store_of(lambda i: of_all + 0.5 * also + alone * own[i])

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
            sum(store.column(j, "along") for j in range(3) if j != i),
        )
        for i in range(3)
    )
    assert found == pytest.approx(ridges[int(curve.argmax())])
    assert (found > 1) == (alone > 0)


def test_progress_ends_complete(tmp_path, problem, monkeypatch):
    bars = []

    class Bar(progress.ProgressLines):
        def __init__(self, *args):
            super().__init__(*args)
            bars.append(self)

    models, train, targets = problem
    traker = run(tmp_path, models, train, targets)
    monkeypatch.setattr(progress, "ProgressLines", Bar)
    traker.finalize_scores("test")
    compared = [bar for bar in bars if bar.what == "comparing checkpoints"]
    assert compared
    assert all(bar.n == bar.total == len(models) for bar in compared)
