"""The battery: its problems ask what TRAKer's tasks ask, its measures are right, and it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import lds, record
from bench.battery import PROBLEMS, summary, training
from bench.battery.providers import PROVIDERS, bm25, cosine, traker, trakpkg
from bench.battery.providers.job import Found, Job
from bench.battery.sentences import facts
from fastproj import TRAKer
from fastproj.trak import AbstractModelOutput
from fastproj.trak.tasks import has_likelihood
from tests.essential import essential

PAIRS = ((0, 1), (0, 2), (1, 2))
SMALL = {"n": 160, "targets": 20}


def small(name: str):
    """A problem of a few samples, trained for a moment."""
    problem = PROBLEMS[name](**({"n": 60, "targets": 20} if name == "wine" else SMALL))
    return problem.with_training(epochs=2)


@pytest.mark.parametrize(
    "name", essential(PROBLEMS, ("digits", "wine", "portrait", "docstring_gaps"))
)
def test_every_problem_is_made_alike_twice(name: str) -> None:
    first, second = small(name), small(name)
    assert first.name == name
    assert first.fingerprint() == second.fingerprint()
    assert (first.n, first.m) == (len(first.samples[-1]), 20)
    # No target is a training sample.
    parts = [torch.cat([part.flatten(1) for part in p if part.dim() > 1], 1).float()
             for p in (first.samples, first.targets)]  # fmt: skip
    assert (torch.cdist(*parts) > 0).all()


@pytest.mark.parametrize(
    "name", ["digits", "diabetes", "modules", "docstring_words", "docstring_gaps", "captions"]
)
def test_the_retrained_output_is_what_traker_differentiates(name: str, tmp_path: Path) -> None:
    """The truth's f and TRAKer's f are the same function, so are their gradients."""
    problem = small(name)
    torch.manual_seed(0)
    model = problem.model().eval()
    weights = {key: value.detach() for key, value in model.named_parameters()}
    task = TRAKer(
        model,
        problem.question.task(AbstractModelOutput),
        problem.n,
        save_dir=tmp_path,
        logging_level="ERROR",
    ).task
    holder = type("Holder", (), {"task": task, "model": model})
    problem.question.prepare(holder, problem.samples)
    expected = problem.question.output(model, weights, problem.targets)
    for row in range(3):
        sample = tuple(part[row] for part in problem.targets)
        found = task.get_output(model, weights, {}, *sample)
        torch.testing.assert_close(found, expected[row], rtol=1e-4, atol=1e-5)


def test_likelihoods_are_sums_of_cross_entropies() -> None:
    problem = small("docstring_words")
    model = problem.model()
    ids, mask, labels = problem.targets
    logits = model(ids, mask)[:, :-1]
    expected = -torch.nn.functional.cross_entropy(
        logits.mT, labels[:, 1:], ignore_index=-100, reduction="none"
    ).sum(1)
    weights = dict(model.named_parameters())
    torch.testing.assert_close(
        problem.question.likelihood(model, weights, problem.targets), expected
    )


def test_causal_models_see_no_later_word_and_no_padding() -> None:
    problem = small("manual_words")
    model = problem.model()
    ids = problem.samples[0][:4].clone()
    before = model(ids)
    ids[:, 9:] = 5
    torch.testing.assert_close(model(ids)[:, :9], before[:, :9])


def test_wrong_labels_are_those_that_are_said_to_be() -> None:
    clean, noisy = PROBLEMS["digits"](), PROBLEMS["digits_wrong20"]()
    assert noisy.wrong is not None
    assert int(noisy.wrong.sum()) == 200
    torch.testing.assert_close(clean.samples[1] != noisy.samples[1], noisy.wrong)
    torch.testing.assert_close(clean.targets[1], noisy.targets[1])


def test_facts_are_stated_where_it_is_said() -> None:
    problem = PROBLEMS["docstring_words"]()
    assert problem.facts is not None
    assert problem.words is not None
    texts, targets = problem.words
    for number, fact in enumerate(facts(50)):
        assert targets[number] == fact.asked
        stating = problem.facts[:, number].nonzero().flatten().tolist()
        assert sorted(texts[i] for i in stating) == sorted(fact.stated)
    assert not problem.facts[:, 50:].any()


def test_training_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PART", 4)
    problem = small("wine")
    whole = training.ground_truth(problem, 10, tmp_path / "whole", retrainings=2)
    assert whole.masks.shape == (10, 60)
    assert whole.output.shape == whole.likelihood.shape == (2, 10, 20)
    assert (whole.masks.sum(1) == 30).all()
    training.ground_truth(problem, 4, tmp_path / "parts")
    trained = []
    monkeypatch.setattr(
        training, "train", lambda *a, own=training.train: trained.append(len(a[1])) or own(*a)
    )
    again = training.ground_truth(problem, 10, tmp_path / "parts", retrainings=2)
    assert sum(trained) == 12  # of twice 10, twice 4 were there
    torch.testing.assert_close(again.masks, whole.masks)
    torch.testing.assert_close(again.output, whole.output)


def test_the_sweep_is_traks_formula(tmp_path: Path) -> None:
    """In the primal and in the dual, against the matrix written out."""
    problem = small("diabetes")
    checkpoints = training.checkpoints(problem, 2, tmp_path)
    for k in (32, 256):
        job = Job(problem, checkpoints, [2], k, "rademacher", str(tmp_path / str(k)))
        done = traker.run(job, traker.TRAK_RULE)
        at = traker.SWEEP.index(0.1)
        found = list(traker.sweep(done, job))[at]
        expected, own, q = 0.0, 0.0, 0.0
        for model_id in range(2):
            phi = done.saver.matrix(model_id).double()
            targets = done.saver.matrix(model_id, "targets").double()
            ridge = 0.1 * float(phi.square().sum()) / k * torch.eye(k, dtype=torch.float64)
            inverse = torch.linalg.inv(phi.mT @ phi + ridge)
            expected = expected + phi @ inverse @ targets.mT / 2
            own = own + (phi @ inverse * phi).sum(1) / 2
            q = q + done.saver.out_to_loss(model_id).double() / 2
        assert (found.setting, found.checkpoints) == (0.1, 2)
        np.testing.assert_allclose(found.scores, expected * q[:, None], rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(found.own, own * q, rtol=1e-6)


def test_trak_is_scored_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its default is lambda 0, which is the sweep's limit; where k > n, XtX is singular."""
    pytest.importorskip("trak")
    monkeypatch.setattr(trakpkg, "SWEEP", (1e-9, 1.0))
    problem = small("diabetes")
    checkpoints = training.checkpoints(problem, 2, tmp_path)
    for k in (8, 256):
        job = Job(problem, checkpoints, [1, 2], k, "", str(tmp_path / str(k)))
        own, *sweep = list(trakpkg.scores(job))[-3:]
        assert (own.provider, own.checkpoints) == ("trak", 2)
        assert [(one.setting, one.checkpoints) for one in sweep] == [(1e-9, 2), (1.0, 2)]
        assert all(np.isfinite(one.scores).all() for one in sweep)
        if k < problem.n:
            scale = np.abs(own.scores).max()
            np.testing.assert_allclose(own.scores, sweep[0].scores, rtol=0, atol=1e-3 * scale)
            assert np.abs(own.scores - sweep[1].scores).max() > 0.1 * scale


def test_scores_are_those_of_each_group_of_checkpoints(tmp_path: Path) -> None:
    """Whatever a provider shares among the groups; the third of three is in no pair."""
    problem = small("wine")
    checkpoints = training.checkpoints(problem, 3, tmp_path)
    whole = Job(problem, checkpoints, [1, 2], 16, "sjlt", str(tmp_path / "whole"))
    for provider in (traker.default, traker.rule, cosine.scores):
        found = list(provider(replace(whole, folder=str(tmp_path / provider.__name__))))
        for name in dict.fromkeys(one.provider for one in found):
            some = [one for one in found if one.provider == name and one.setting in (None, 1.0)]
            singles = [one.scores for one in some if one.checkpoints == 1]
            (pair,) = (one.scores for one in some if one.checkpoints == 2)
            assert len(singles) == 3
            # Like the mean over the two, next to that over others. (Lambda depends on the count.)
            means = [(singles[i] + singles[j]).ravel() for i, j in PAIRS]
            off = [1 - np.corrcoef(pair.ravel(), mean)[0, 1] for mean in means]
            assert off[0] < 0.3 * min(off[1:]), (name, off)


def test_means_are_of_groups() -> None:
    job = Job(small("wine"), [{}] * 5, [1, 2, 5], 0, "", "")
    found = job.means([np.array([float(i)]), np.array([10.0 * i])] for i in range(5))
    assert [(count, float(a[0]), float(b[0])) for count, (a, b) in found] == [
        (1, 0, 0),
        (1, 1, 10),
        (2, 0.5, 5),
        (1, 2, 20),
        (1, 3, 30),
        (2, 2.5, 25),
        (1, 4, 40),
        (5, 2, 20),
    ]


def test_a_regression_tells_its_likelihood() -> None:
    problem = small("auto_mpg")
    task = problem.question.task(AbstractModelOutput)
    assert has_likelihood(task)
    model = problem.model()
    weights = dict(model.named_parameters())
    q = task.get_out_to_loss_grad(model, weights, {}, problem.samples)
    output = problem.question.output(model, weights, problem.samples)
    torch.testing.assert_close(q, problem.samples[1] - output)


def test_results_are_gone_on_from() -> None:
    base = {"k": 8, "checkpoints": 1, "provider": "default"}
    old = [{**base, "problem": name, "output": 0.1} for name in ("digits", "wine")]
    new = [{**base, "problem": name, "output": 0.2} for name in ("wine", "mnist")]
    found = [(row["problem"], row["output"]) for row in lds.merged(old, new)]
    assert found == [("digits", 0.1), ("mnist", 0.2), ("wine", 0.2)]


def test_cosines_are_of_loss_and_output(tmp_path: Path) -> None:
    problem = small("wine")
    checkpoints = training.checkpoints(problem, 1, tmp_path)
    (found,) = cosine.scores(Job(problem, checkpoints, [1], 0, "", ""))
    model = problem.model()
    model.load_state_dict(checkpoints[0])

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*model.parameters()])])

    (x, y), (tx, ty) = problem.samples, problem.targets
    p = model(tx[3:4]).softmax(1)[0, ty[3]]
    left = gradient(-torch.nn.functional.cross_entropy(model(x[5:6]), y[5:6]))
    right = gradient(torch.logit(p))
    expected = torch.nn.functional.cosine_similarity(left, right, 0)
    np.testing.assert_allclose(found.scores[5, 3], expected.item(), rtol=1e-3)


def test_bm25_by_hand() -> None:
    texts = [["a", "b", "b"], ["a"], ["c", "d"]]
    found = bm25.bm25(texts, [["b", "x"], ["a"]])
    rare = np.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    length = 1.5 * (0.25 + 0.75 * 3 / 2)
    assert found[0, 0] == pytest.approx(rare * 2 * 2.5 / (2 + length))
    assert (found[1:, 0] == 0).all()
    assert found[1, 1] > found[0, 1] > found[2, 1] == 0


def test_retrieval_counts_ties_as_lost() -> None:
    facts_of = np.zeros((20, 3), bool)
    facts_of[[0, 5], 0] = facts_of[1, 1] = True
    scores = np.zeros((20, 3))
    scores[:, 0] = -np.arange(20)  # ranks 1 and 6
    mrr, recall = lds.retrieval(scores, facts_of)
    assert mrr == pytest.approx((1 + 1 / 20) / 2)
    assert recall == pytest.approx((1 + 0) / 2)


def test_a_sweep_is_judged_in_hindsight_and_cells_are_compared() -> None:
    problem = small("digits_wrong20")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(160, 20))
    masks = torch.rand(30, 160) < 0.5
    outputs = (masks.double() @ torch.tensor(scores))[None]
    truth = training.Truth(masks, outputs, outputs)
    assert problem.wrong is not None
    own = problem.wrong.numpy().astype(float)
    found = [
        Found("trak_sweep", 1, np.full_like(scores, np.nan), own, 0.0),
        Found("trak_sweep", 1, scores + rng.normal(size=scores.shape), own, 0.1),
        Found("trak_sweep", 1, scores, -own, 1.0),
    ]
    row = lds.judged(found, problem, truth)
    assert (row["output"], row["output_at"]) == (pytest.approx(1), 1.0)
    assert (row["auc"], row["auc_at"]) == (1.0, 0.1)
    assert "likelihood" not in row
    assert row["groups"] == 1
    both = lds.judged([*found, replace(found[2], scores=-scores)], problem, truth)
    assert (both["output"], both["output_at"]) == (pytest.approx(row["sweep"][1]["output"]), 0.1)
    assert both["sweep"][2]["output"] == pytest.approx(0, abs=1e-9)  # 1 in one group, -1 in another
    base = {"problem": "p", "held_out": False, "language": True, "k": 8, "checkpoints": 1}
    rows = [
        {**base, "provider": "default", "output": 0.5},
        {**base, "provider": "trak_sweep", "output": 0.6},
        {**base, "provider": "bm25", "k": 0, "output": 0.3},
    ]
    assert summary.differences(rows, "default", "trak_sweep") == {("p", 8, 1): pytest.approx(-0.1)}
    assert summary.differences(rows, "default", "bm25") == {("p", 8, 1): pytest.approx(0.2)}
    assert len(summary.missed(rows)) == 1
    assert "at or above in 0% of 1 cells, worst -0.100 (p, k = 8, 1" in summary.verdict(rows)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(lds, "QUICK", ("docstring_words",))
    providers = [name for name in PROVIDERS if name not in ("trak", "ekfac")]
    words = ["--quick", "--cache", str(tmp_path / "cache"), "--kind", "sjlt", "--subsets", "8"]
    lds.main([*words, "--dims", "64", "--providers", *providers])
    (path,) = tmp_path.glob("*-lds-quick.json")
    rows = json.loads(path.read_text())["rows"]
    assert {(row["provider"], row["k"], row["checkpoints"]) for row in rows} == {
        *((name, 64, m) for name in ("default", "trak_rule", "trak_sweep") for m in (1, 2)),
        *((name, 0, m) for name in ("cosine", "bm25") for m in (1, 2)),
    }
    assert all({"output", "likelihood", "mrr", "recall"} <= row.keys() for row in rows)
    assert lds.main([*words, "--held-out", "--no-write"]) == 0
