"""One forward for the gradients of a batch and what else is asked about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fastproj import TRAKer
from fastproj.trak import Fisher
from fastproj.trak.gradients import HookGradientComputer, hooks
from fastproj.trak.gradients.replay import Replay
from fastproj.trak.tasks import ImageClassificationModelOutput
from tests.trak import cases


class Counting(nn.Module):
    """A small network that counts its calls, and the samples that it sees on both ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        self.calls = self.forwards = self.backwards = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        self.forwards += len(x)
        h = self.body(x)
        if h.requires_grad:
            h.register_hook(self.count)
        return h * scale

    def count(self, g):
        self.backwards += len(g)


def batch_of(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 6, generator=generator), torch.arange(size) % 3


@pytest.mark.parametrize("curvature", ["fisher", "trak"])
@pytest.mark.parametrize("computer", ["auto", "hooks"])
def test_a_batch_like_one_before_costs_one_forward(curvature, computer, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "worth_a_proof", lambda number: number == 1)
    stores = {}
    for way in (computer, "loop"):
        model = Counting().eval()
        traker = TRAKer(
            model,
            "image_classification",
            20,
            tmp_path / way,
            proj_dim=64,
            gradient_computer=way,
            curvature=curvature,
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), 0)
        calls = []
        for number in range(4):
            before = model.calls
            traker.featurize(batch_of(5, number), num_samples=5)
            calls.append(model.calls - before)
        if way == computer:
            assert calls[1:] == [1, 1, 1]
        traker.finalize_features()
        traker.start_scoring_checkpoint("t", model.state_dict(), 0, 10)
        for number in range(2):
            before = model.calls
            traker.score(batch_of(5, 10 + number), num_samples=5)
        if way == computer:
            assert model.calls - before == 1
        stores[way] = torch.from_numpy(traker.finalize_scores("t").copy())
    torch.testing.assert_close(stores[computer], stores["loop"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("computer", ["hooks", "loop"])
def test_rows_that_few_samples_have_cost_no_more_than_these_samples(
    computer, tmp_path, monkeypatch
):
    """One forward and backward of the batch and one of those few; where they are many, one more
    backward of the batch. What is kept is the same as of two batches.
    """
    monkeypatch.setattr(hooks, "worth_a_proof", lambda number: number == 1)
    n = 96
    images, labels = batch_of(n, 0)
    stores = []
    for way in ("mixed", "apart"):
        model = Counting().eval()
        traker = TRAKer(
            model,
            "image_classification",
            n,
            tmp_path / way,
            proj_dim=16,
            gradient_computer=computer,
            curvature=Fisher(samples=n // 2),
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), 0)
        is_drawn = traker.has_drawn_rows(range(n))
        drawn, others = np.flatnonzero(is_drawn), np.flatnonzero(~is_drawn)
        assert len(drawn) == len(others) == n // 2
        costs = []
        for start in range(0, n // 2, 8):
            few = 1 if start >= 24 else 2  # of the batch's eight
            one, other = drawn[start : start + 8], others[start : start + 8]
            mixed = [np.r_[other[few:], one[:few]], np.r_[one[few:], other[:few]]]
            for inds in mixed if way == "mixed" else (one, other):
                model.forwards = model.backwards = 0
                traker.featurize((images[inds], labels[inds]), inds=inds)
                costs.append((int(is_drawn[inds].sum()), model.forwards, model.backwards))
        if (way, computer) == ("mixed", "hooks"):
            # Later ones of a kind, which are not checked. A batch of one sample never is.
            assert set(costs[2:6]) == {(2, 10, 10), (6, 8, 16)}
            assert set(costs[6:]) == {(1, 9, 9), (7, 8, 16)}
        if way == "apart" and computer == "hooks":
            assert set(costs[2:]) == {(8, 8, 16), (0, 8, 8)}
        traker.finalize_features()
        traker.start_scoring_checkpoint("t", model.state_dict(), 0, 5)
        traker.score(batch_of(5, 1), num_samples=5)
        scores = torch.from_numpy(traker.finalize_scores("t").copy())
        stores.append((traker.saver.matrix(0), scores))
    for mixed, apart in zip(*stores, strict=True):
        torch.testing.assert_close(mixed, apart, rtol=1e-4, atol=1e-6)


def test_a_wrong_label_is_named_before_the_gradients_meet_it(tmp_path):
    model = Counting().eval()
    traker = TRAKer(model, "image_classification", 20, tmp_path)
    traker.load_checkpoint(model.state_dict(), 0)
    for number in range(3):
        traker.featurize(batch_of(4, number), num_samples=4)
    images, labels = batch_of(4, 3)
    with pytest.raises(ValueError, match="label 9"):
        traker.featurize((images, labels + torch.tensor([0, 0, 7, 0])), num_samples=4)
    traker.featurize((images, labels), num_samples=4)
    assert traker.gradient_computer.name == "hooks"


def test_what_is_kept_is_of_that_batch_alone():
    """Another batch, or the same tensors with another partner, takes a forward of its own."""
    model = Counting().eval()
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    for number in range(5):
        computer.compute_per_sample_grad(batch_of(4, number))
    one, other = batch_of(4, 7), batch_of(4, 8)
    exact = computer.compute_per_sample_grad(one)
    computer.compute_loss_grad(other)
    found = computer.compute_per_sample_grad(one)
    for name, g in exact.items():
        assert torch.equal(found[name], g)


def test_only_a_call_with_the_same_arguments_is_replayed():
    model = Counting()
    replay = Replay(model)
    x = torch.ones(2, 6)
    with replay.recording(lambda: None):
        first = model(x, scale=2.0)
    with replay.playing():
        assert torch.equal(model(x.clone(), scale=2.0), first)
        assert model.calls == 1
    for given in ((x, 3.0), (x + 1, 2.0), (x,)):
        with replay.playing():
            model(*given)
    assert model.calls == 4
    assert "forward" not in vars(model)


def test_features_do_not_depend_on_which_batches_were_checked(tmp_path):
    """Bit for bit, and Q with them; of a network whose gradients are checked evenly, too."""
    train = cases.data(20)
    state = cases.trained(1, train).state_dict()
    kept = []
    for place, order in enumerate(([0, 1, 2, 3, 4], [4, 2, 0, 3, 1])):
        model = cases.net()
        traker = cases.make(model, tmp_path / str(place), 20)
        traker.load_checkpoint(state, 0)
        for number in order:
            rows = torch.arange(4 * number, 4 * number + 4)
            traker.featurize((train[0][rows], train[1][rows]), inds=rows)
        assert traker.gradient_computer.name == "hooks"
        assert traker._featurizer.training_computer.name == "hooks"
        kept.append((traker.saver.matrix(0), traker.saver.out_to_loss(0)))
    for ours, theirs in zip(*kept, strict=True):
        assert torch.equal(ours, theirs)
