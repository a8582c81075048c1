"""The gradients of several outputs of a sample: all computers against plain autograd."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastproj import Projector
from fastproj.trak import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    batches,
)
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.gradients import base
from fastproj.trak.gradients.base import AbstractGradientComputer
from fastproj.trak.tasks import TrainingOutput
from tests.trak.model_zoo import FAMILIES, make

COMPUTERS = [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer]
N = 3
FLOAT32_INSIDE = ("vit", "clip")  # attention's softmax, whatever the dtype


def with_noise(task, batch, draws):
    """A batch of n samples as a TrainingOutput takes it."""
    prepared = batches.prepare("test", batch, torch.device("cpu"))[0]
    size = batches.size(prepared)
    numbers = Draws(100, 8, Fisher(draws=max(draws, 1)), seed=1)
    noise = numbers.noise(0, np.arange(size), task.num_predictions(prepared), some=draws > 0)
    return (*prepared, noise)


def plainly(model, task, batch):
    """By backward of each output of each sample, alone: of each output, name -> [n, *shape]."""
    rows = []
    for row in range(batches.size(batch)):
        one = batches.select(batch, slice(row, row + 1))
        terms = task.terms(model, {}, {}, one)
        outputs = [terms.output[0], *terms.drawn[0]]
        params = dict(model.named_parameters())
        found = []
        for out in outputs:
            grads = torch.autograd.grad(
                out, list(params.values()), retain_graph=True, allow_unused=True
            )
            pairs = zip(params.items(), grads, strict=True)
            found.append({n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs})
        rows.append(found)
    return [
        {name: torch.stack([sample[j][name] for sample in rows]) for name in rows[0][0]}
        for j in range(len(rows[0]))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_all_computers_give_the_gradients_of_every_output(name, caplog):
    model, task, data = make(name, torch.float64)
    training = TrainingOutput(task)
    batch = with_noise(task, data(N), 2)
    exact = plainly(model, training, batch)
    assert len(exact) == 3
    assert all(any(float(g.abs().max()) > 0 for g in rows.values()) for rows in exact)

    def close(rows, wanted):
        largest = max(float(g.abs().max()) for g in wanted.values())
        atol = largest * (1e-6 if name in FLOAT32_INSIDE else 1e-10)
        torch.testing.assert_close(rows, wanted, rtol=0, atol=atol)

    for kind in COMPUTERS:
        computer = kind(model, training)
        found = computer.compute_rows(batch)
        assert len(found) == 3
        for rows, wanted in zip(found, exact, strict=True):
            close(rows, wanted)
        first = computer.compute_rows((*batch[:-1], batch[-1][:, :0]))  # nothing drawn
        assert len(first) == 1
        close(first[0], exact[0])
        alone = computer.compute_rows(batches.select(batch, slice(1, 2)))
        assert len(alone) == 3
        for rows, wanted in zip(alone, exact, strict=True):
            close(rows, {n: g[1:2] for n, g in wanted.items()})
    said = [r.message for r in caplog.records if r.name == "fastproj.trak"]
    assert not said  # no parameter takes another run of the whole model


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
@pytest.mark.parametrize("computer", COMPUTERS)
def test_projected_rows_are_those_of_the_gradients(name, computer):
    model, task, data = make(name, torch.float64)
    batch = with_noise(task, data(N), 2)
    size = sum(p.numel() for p in model.parameters())
    projector = Projector(size, 16, 0, scale=None)
    made = computer(model, TrainingOutput(task))
    found = made.project_rows(batch, projector, 3)
    exact = [projector.project(g, model_id=3) for g in plainly(model, TrainingOutput(task), batch)]
    for rows, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(rows, wanted, rtol=1e-9, atol=1e-9)


def test_every_output_of_a_sample_counts_for_the_memory_of_a_chunk(monkeypatch):
    model, task, data = make("resnet")
    computer = FunctionalGradientComputer(model, TrainingOutput(task))
    per_row = sum(p.numel() * 4 for p in model.parameters())
    monkeypatch.setattr(base, "GRAD_BYTES", 6 * per_row)
    assert computer.samples_at_once(with_noise(task, data(N), 2)) == 2
    assert computer.samples_at_once(with_noise(task, data(N), 0)) == 6


@pytest.mark.parametrize(("ours", "drawn"), [(True, 1), (True, 2), (False, 1), (False, 2)])
def test_features_are_on_trust_where_any_of_their_parts_are(ours, drawn):
    """A batch of one sample has plain autograd's gradients, which are not."""
    model, task, data = make("resnet")
    computer = HookGradientComputer(model, TrainingOutput(task))
    projector = Projector(sum(p.numel() for p in model.parameters()), 16, 0)
    if not ours:
        projector = SimpleNamespace(project=projector.project)
    chosen = torch.arange(N) < drawn
    computer.project_drawn(with_noise(task, data(N), 1), chosen, projector, 0)
    assert computer.on_trust


def test_a_computer_is_the_one_that_gives_rows_where_it_says_so():
    class One(HookGradientComputer):
        def compute_per_sample_grad(self, batch):
            return super().compute_per_sample_grad(batch)

    class Both(One):
        def compute_rows(self, batch):
            return super().compute_rows(batch)

    class Neither(AbstractGradientComputer):
        pass

    assert [kind.gives_rows() for kind in (*COMPUTERS, One, Both)] == [True] * 3 + [False, True]
    model, task, data = make("resnet")
    with pytest.raises(NotImplementedError, match="Neither has neither compute_rows nor"):
        Neither(model, task).compute_per_sample_grad(data(N))
