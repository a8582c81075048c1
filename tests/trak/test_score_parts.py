"""score(per=, stream=): scores that are returned and not kept add up to those that are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastproj import TRAKer
from fastproj.trak.draws import Fisher
from fastproj.trak.gradients.layout import HooksError
from fastproj.trak.store.store import NotReadyError
from fastproj.trak.tasks import MaskedLMModelOutput
from tests.trak import cases, modules

VOCAB, T, N, M = 11, 7, 24, 5


@modules.of(
    seed=0,
    tokens=lambda: nn.Embedding(VOCAB, 8),
    places=lambda: nn.Embedding(T, 8),
    body=lambda: nn.Linear(8, 8),
    norm=lambda: nn.LayerNorm(8),
    head=lambda: nn.Linear(8, VOCAB, bias=False),
)
def Words(self, input_ids):
    """A small causal language model with positions as nanoGPT has them."""
    x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
    x = x.cumsum(1) / torch.arange(1, 1 + input_ids.shape[1])[:, None]
    return self.head(self.norm(x + torch.tanh(self.body(x))))


def batch_of(size, seed, labelled=None):
    """``labelled``: the places [t] of labels, each of which the first sample lacks but for one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (size, T), generator=generator)
    labels = ids.clone()
    labels[0, 4:] = -100
    if labelled is not None:
        labels[:, [place for place in range(T) if place not in labelled]] = -100
        labels[0, labelled[1:]] = -100
    return {"input_ids": ids, "labels": labels}


def scored(folder, computer="auto", task="causal_lm", **settings):
    """A TRAKer with all targets of an experiment scored, and the training batch and scores."""
    model = Words().double().eval()
    traker = TRAKer(
        model,
        task,
        N,
        folder,
        proj_dim=64,
        gradient_computer=computer,
        use_half_precision=False,
        **settings,
    )
    train = batch_of(N, 1)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(train, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", model.state_dict(), 0, M)
    traker.score(batch_of(M, 2), num_samples=M)
    return traker, train, np.array(traker.finalize_scores("t"))


SETTINGS = [
    {},
    {"curvature": Fisher(size_power=0.5)},
    {"curvature": "trak"},
    {"factored": 4, "curvature": Fisher(size_power=-0.5)},
    {"factored": 4, "curvature": "trak"},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
def test_parts_add_up_to_the_score(computer, settings, tmp_path):
    traker, _, scores = scored(tmp_path, computer, **settings)
    for size in (M, 1):
        targets = {name: t[:size] for name, t in batch_of(M, 2).items()}
        by_module = traker.score(targets, per="module")
        assert traker.modules == ["tokens", "places", "body", "norm", "head"]
        assert by_module.shape == (N, size, 5)
        np.testing.assert_allclose(by_module.sum(2), scores[:, :size], rtol=1e-4, atol=1e-6)
        by_token = traker.score(targets, per="token")
        assert by_token.shape == (N, size, T - 1)
        assert not by_token[:, 0, 3:].any()  # labels of -100
        np.testing.assert_allclose(by_token.sum(2), scores[:, :size], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("half", "bound"), [(False, 1e-6), (True, 2e-3)])
@pytest.mark.parametrize("curvature", ["fisher", "trak"])
def test_of_two_checkpoints_each_adds_up_to_its_own_score(curvature, half, bound, tmp_path):
    """Their mean is the score of both but for "trak", which averages Q by itself. Stored features
    in float16 are rounded where those of parts are not.
    """
    model = Words().double().eval()
    options = {"curvature": curvature, "use_half_precision": half, "proj_dim": 64}
    traker = TRAKer(model, "causal_lm", N, tmp_path, **options)
    train, targets, states = batch_of(N, 1), batch_of(M, 2), []
    for model_id in range(2):
        torch.manual_seed(model_id)
        moved = {n: t + 0.3 * torch.randn_like(t) for n, t in model.state_dict().items()}
        states.append(moved)
        traker.load_checkpoint(moved, model_id)
        traker.featurize(train, num_samples=N)
    traker.finalize_features()
    found = []
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("t", state, model_id, M)
        traker.score(targets, num_samples=M)
        parts = [traker.score(targets, per=per).sum(2) for per in ("module", "token")]
        found.append([*parts, traker.score(train, stream=True)])
    scores = np.array(traker.finalize_scores("t"))
    alone = [np.array(traker.finalize_scores("t", [model_id])) for model_id in range(2)]
    allowed = bound * np.abs(scores).max()
    for of_one, wanted in zip(found, alone, strict=True):
        for ours in of_one:
            np.testing.assert_allclose(ours, wanted, rtol=0, atol=allowed)
            assert not half or np.abs(ours - wanted).max() > allowed / 100
    for first, second in zip(*found, strict=True):
        difference = np.abs((first + second) / 2 - scores).max()
        assert (difference > 1e-2 * np.abs(scores).max()) == (curvature == "trak")
        assert curvature == "trak" or difference < allowed


def test_a_token_counts_as_if_it_were_the_only_label(tmp_path):
    traker, _, _ = scored(tmp_path)
    targets = batch_of(1, 2)
    by_token = traker.score(targets, per="token")
    for place in range(3):
        labels = torch.full_like(targets["labels"], -100)
        labels[0, place + 1] = targets["labels"][0, place + 1]
        alone = traker.score({**targets, "labels": labels}, per="token")
        np.testing.assert_allclose(alone[:, 0, place], by_token[:, 0, place], rtol=1e-4, atol=1e-6)


def by_formula(model, train, targets, lambda_reg):
    """TRAK's scores by each token [N, M, T], with explicit gradients and inverse, float64."""

    def by_token(batch):
        margins, probabilities = [], []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            logits = model(ids.unsqueeze(0))[0]
            for place, label in enumerate(labels.tolist()):
                others = torch.cat([logits[place, :label], logits[place, label + 1 :]])
                if label == -100:
                    margins.append(logits.sum() * 0)
                else:
                    margins.append(logits[place, label] - others.logsumexp(0))
            counted = labels != -100
            p = logits.softmax(1)[counted, labels[counted]]
            probabilities.append(p.mean().detach())
        rows = []
        for margin in margins:
            parts = torch.autograd.grad(margin, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        features = cases.projected(torch.stack(rows), 64, 0)
        return features.view(len(batch["labels"]), T, 64), 1 - torch.stack(probabilities)

    of_train, q = by_token(train)
    phi = of_train.sum(1)
    inverse = torch.linalg.inv(phi.T @ phi + lambda_reg * torch.eye(64).double())
    of_targets, _ = by_token(targets)
    return torch.einsum("n,nk,mtk->nmt", q, phi @ inverse, of_targets).numpy()


@pytest.mark.parametrize("computer", ["hooks", "func", "loop"])
@pytest.mark.parametrize("task", ["masked_lm", "token_classification"])
def test_tokens_of_tasks_that_predict_each_at_its_own_place(task, computer, tmp_path):
    traker, train, scores = scored(tmp_path, computer, task, lambda_reg=0.5)
    assert traker.fisher is None  # a lambda is given: TRAK's formula
    for labelled in (None, [1, 4, 5]):
        targets = batch_of(M, 2, labelled)
        found = traker.score(targets, per="token")
        wanted = by_formula(traker.model, train, targets, 0.5)
        counted = (targets["labels"] != -100).numpy()
        assert not found[:, ~counted].any()
        assert np.abs(wanted[:, counted]).min(0).all()
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6 * scale)
        if labelled is None:
            np.testing.assert_allclose(found.sum(2), scores, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_places_without_a_label_in_any_sample_have_scores_of_0(task, computer, tmp_path):
    """What the others have does not depend on whether such places are there."""
    traker, _, _ = scored(tmp_path, computer, task)
    first = 1 if task == "causal_lm" else 0  # whose label nothing predicts
    labels = batch_of(M, 2)["labels"]
    whole = traker.score({**batch_of(M, 2), "labels": labels}, per="token")
    few = torch.full_like(labels, -100)
    few[:, 2:4] = labels[:, 2:4]
    found = traker.score({**batch_of(M, 2), "labels": few}, per="token")
    assert found.shape == whole.shape
    assert found.dtype == whole.dtype
    np.testing.assert_allclose(found[..., 2 - first : 4 - first], whole[..., 2 - first : 4 - first])
    found[..., 2 - first : 4 - first] = 0
    assert not found.any()


class OfEveryPlace(MaskedLMModelOutput):
    """A task of one's own, in which places without a label add to f, too."""

    def predictions(self, model, weights, buffers, inputs):
        """The labels are the words that are there."""
        logits, _ = super().predictions(model, weights, buffers, inputs)
        return logits, inputs["input_ids"]


def test_a_task_that_changes_what_is_predicted_keeps_all_places(tmp_path):
    traker, _, scores = scored(tmp_path, task=OfEveryPlace())
    found = traker.score(batch_of(M, 2, [1, 4]), per="token")
    assert np.abs(found).max((0, 1)).all()
    np.testing.assert_allclose(found.sum(2), scores, rtol=1e-4, atol=1e-6)


def test_a_label_takes_one_backward(tmp_path, monkeypatch):
    """What was checked is not checked again before another checkpoint is loaded. A place at which
    no sample has a label takes none.
    """
    traker, _, _ = scored(tmp_path)
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.autograd, "grad", counted(torch.autograd.grad))
    monkeypatch.setattr(torch.Tensor, "backward", counted(torch.Tensor.backward))

    def passes(labelled=None):
        calls.clear()
        traker.score(batch_of(M, 2, labelled), per="token")
        return len(calls)

    first, second, third, fourth = (passes() for _ in range(4))  # all checked but the third
    assert first > second == fourth > third == T - 1
    few = [passes([2, 5]), passes([3]), passes([1, 2, 4])]  # of as many places as have a label
    assert few == [2, 1, 3]
    traker.start_scoring_checkpoint("t", traker.model.state_dict(), 0, M)
    assert passes() > T - 1  # the fifth of the old checkpoint would not be


@pytest.mark.parametrize("per", ["module", "token"])
def test_parts_are_not_on_trust_after_a_failed_check(per, tmp_path):
    traker, _, _ = scored(tmp_path, computer="hooks")
    traker.score(batch_of(M, 2), per=per)
    traker.saver.distrust(0, "a check has failed")
    with pytest.raises(HooksError, match="failed a check before"):
        traker.score(batch_of(M, 2), per=per)


@modules.of(fc=lambda: nn.Linear(5, 8), out=lambda: nn.Linear(8, 3))
def Turns(self, x):
    """Takes gradients as no hook sees them once ``turned``."""
    h = torch.tanh(self.fc(x))
    if hasattr(self, "turned"):
        h = h + nn.functional.linear(x, self.fc.weight)
    return self.out(h)


@pytest.mark.parametrize("settings", [{"per": "module"}, {"stream": True}])
@pytest.mark.parametrize("checkpoints", [1, 2])
def test_features_that_no_longer_count_give_no_scores(checkpoints, settings, tmp_path):
    """A check fails in the batch that is scored: what the scores would be made of is on trust."""
    torch.manual_seed(0)
    model = Turns()
    states = [Turns().state_dict() for _ in range(checkpoints)]
    traker = cases.make(model, tmp_path, N)
    train, targets = ((torch.randn(n, 5), torch.randint(0, 3, (n,))) for n in (N, M))
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        for rows in torch.arange(N).split(4):
            traker.featurize([part[rows] for part in train], inds=rows)
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", states[0], 0, M)
    traker.score(targets, num_samples=M)
    traker.score(targets, **settings)
    model.turned = True
    lost = f"lacks {N} of {N} training samples"
    with (
        pytest.raises(NotReadyError, match=lost),
        pytest.warns(match="to be wrong|is used instead"),
    ):
        traker.score(targets, **settings)
    with pytest.raises(NotReadyError, match=lost):
        traker.score(targets, **settings)
    traker.load_checkpoint(states[0], 0)
    traker.featurize(train, inds=range(N))
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", states[0], 0, M)
    if "stream" in settings:
        with pytest.raises(NotReadyError, match=f"lacks {M} of {M} targets"):
            traker.score(targets, **settings)
    traker.score(targets, num_samples=M)
    assert np.isfinite(traker.score(targets, **settings)).all()


@pytest.mark.parametrize(("per", "before"), [("module", 3), ("token", 2)])
def test_labels_are_checked_in_the_forward_of_the_gradients(per, before, tmp_path):
    traker, _, _ = scored(tmp_path)
    for _ in range(before):  # the next is not checked
        traker.score(batch_of(M, 2), per=per)
    calls = []
    traker.model.head.register_forward_hook(lambda *_: calls.append(1))
    traker.score(batch_of(M, 2), per=per)
    assert len(calls) == 1


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("computer", ["auto", "loop"])
def test_a_stream_of_training_samples_has_their_scores(computer, settings, tmp_path):
    traker, train, scores = scored(tmp_path, computer, **settings)
    files = sorted(str(path) for path in tmp_path.rglob("*"))
    for some in (slice(0, 7), slice(7, N), slice(3, 4)):
        found = traker.score({name: t[some] for name, t in train.items()}, stream=True)
        np.testing.assert_allclose(found, scores[some], rtol=1e-4, atol=1e-6)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == files


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stream_has_the_targets_and_lambda_that_are_there(grouped, tmp_path):
    """Not those of the stream's first batch: targets may be given again, or lambda be another."""
    traker, train, _ = scored(tmp_path, curvature="fisher")
    if grouped:
        state = traker.model.state_dict()
        traker.start_scoring_checkpoint("g", state, 0, M, groups=[0, 1, 0, 0, 1], reduction="mean")
        traker.score(batch_of(M, 2), num_samples=M)
    name = "g" if grouped else "t"
    before = traker.score(train, stream=True)
    traker.score(batch_of(M, 3), inds=range(M))
    found = traker.score(train, stream=True)
    assert np.abs(found - before).max() > 0.1 * np.abs(before).max()
    np.testing.assert_allclose(found, traker.finalize_scores(name), rtol=1e-4, atol=1e-6)
    traker.finalize_features(lambda_reg="10*mean")
    found = traker.score(train, stream=True)
    assert np.abs(found).max() < 0.9 * np.abs(before).max()
    np.testing.assert_allclose(found, traker.finalize_scores(name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", ["fisher", "trak"])
def test_an_empty_batch_has_no_scores(curvature, tmp_path):
    traker, _, _ = scored(tmp_path, curvature=curvature)
    nothing = {name: t[:0] for name, t in batch_of(M, 2).items()}
    assert traker.score(nothing, per="module").shape == (N, 0, 5)
    assert traker.score(nothing, per="token").shape == (N, 0, T - 1)
    assert traker.score(nothing, stream=np.True_).shape == (0, M)


@pytest.mark.parametrize("computer", ["hooks", "func", "loop"])
def test_a_parameter_without_entries_adds_nothing(computer, tmp_path):
    model, train = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), torch.randn(8, 4)
    model.extra = nn.Module()
    model.extra.nothing = nn.Parameter(torch.zeros(0, 3))
    model.forward = lambda x: model[1](model[0](x).tanh())
    traker = TRAKer(
        model,
        lambda m, b: m(b[0]),
        len(train),
        tmp_path,
        gradient_computer=computer,
        proj_dim=16,
        lambda_reg=0.1,
        use_half_precision=False,
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((train,), num_samples=len(train))
    traker.finalize_features()
    traker.start_scoring_checkpoint("all", model.state_dict(), 0, len(train))
    traker.score((train,), num_samples=len(train))
    by_module = traker.score((train,), per="module")
    assert traker.modules == ["0", "1", "extra"]
    assert not by_module[..., 2].any()
    scores = traker.finalize_scores("all")
    np.testing.assert_allclose(by_module.sum(2), scores, rtol=1e-4, atol=1e-6)


class OfLists(nn.Module):
    """The mean over a sample's rows, or over the letters of its text."""

    def __init__(self):
        super().__init__()
        self.letters, self.head = nn.Embedding(128, 4), nn.Linear(4, 1)

    def forward(self, samples):
        rows = [
            self.letters(torch.tensor(list(s.encode()))) if type(s) is str else s for s in samples
        ]
        return torch.stack([self.head(t).mean() for t in rows])


@pytest.mark.parametrize("rows", [None, (1, 2, 3, 1, 2, 3), (3,) * 6])
def test_lists_alone_say_how_many_samples_there_are(rows, tmp_path):
    """Neither call takes num_samples, and of tensors in a list the first has other numbers."""
    texts = ["a", "few", "short", "texts", "of", "all lengths"]
    samples = texts if rows is None else [torch.randn(r, 4) for r in rows]
    model = OfLists()
    traker = TRAKer(
        model,
        lambda m, b: m(b[0]),
        6,
        tmp_path,
        proj_dim=16,
        use_half_precision=False,
        lambda_reg=0.1,
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((samples,), num_samples=6)
    traker.finalize_features()
    traker.start_scoring_checkpoint("lists", model.state_dict(), 0, 4)
    traker.score((samples[:4],), num_samples=4)
    scores = traker.finalize_scores("lists")
    bounds = {"rtol": 1e-4, "atol": 1e-6 * np.abs(scores).max()}
    np.testing.assert_allclose(traker.score((samples[:5],), stream=True), scores[:5], **bounds)
    by_module = traker.score((samples[:4],), per="module")
    np.testing.assert_allclose(by_module.sum(2), scores, **bounds)


def test_what_is_refused(tmp_path):
    traker, train, _ = scored(tmp_path)
    targets = batch_of(M, 2)
    with pytest.raises(ValueError, match="'module' or 'token'"):
        traker.score(targets, per="layer")
    with pytest.raises(ValueError, match="the batch alone"):
        traker.score(targets, per="token", num_samples=M)
    with pytest.raises(ValueError, match="the batch alone"):
        traker.score(targets, per="token", stream=True)
    for odd in ("no", 0, None):
        with pytest.raises(TypeError, match=rf"received stream={odd!r} .*; expected True or False"):
            traker.score(train, stream=odd)
    traker.start_scoring_checkpoint("later", traker.model.state_dict(), 0, M)
    with pytest.raises(NotReadyError, match="lacks 5 of 5 targets"):
        traker.score(train, stream=True)


def test_tokens_are_of_language_models_alone(tmp_path):
    model = nn.Linear(4, 3).eval()
    batch = torch.randn(6, 4), torch.arange(6) % 3
    traker = TRAKer(model, "image_classification", 6, tmp_path)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=6)
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", model.state_dict(), 0, 6)
    with pytest.raises(
        ValueError, match="expected seq2seq, causal_lm, masked_lm, token_classification, or"
    ):
        traker.score(batch, per="token")
    assert traker.score(batch, per="module").shape == (6, 6, 1)
