"""How much memory features take, in bytes that PyTorch allocates: no resident sets, no clocks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastproj import FactoredProjector, Projector, TRAKer
from fastproj.trak.gradients import HookGradientComputer, parts, running, sinks
from fastproj.trak.gradients.recorder import Recorder
from fastproj.trak.tasks import (
    CausalLMModelOutput,
    ImageClassificationModelOutput,
    TokenOutput,
    contrasts,
)
from tests.trak import modules

TASK = ImageClassificationModelOutput()
WORDS, WIDTH, SAMPLES, LENGTH = 2000, 64, 4, 64


def most_bytes(call: Callable[[], Any]) -> int:
    """The most that was allocated at once during a call, beyond what was there before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most
    return most


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A language model whose logits are larger than its parameters, which are tied."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, WORDS, (SAMPLES, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.fixture(scope="module")
def plain(model) -> int:
    """The bytes of forward and backward as in training, parameters included."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        given = batch(0)
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), given["labels"][:, 1:], reduction="none"
        ).mean().backward()

    step()
    most = most_bytes(step)
    model.zero_grad(set_to_none=True)
    return most + parameters(model)


def parameters(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"curvature": "trak"}, {"factored": 16}], ids=str)
def test_a_language_model_takes_no_more_than_training(options, model, plain, tmp_path, monkeypatch):
    """Also where a batch is checked, as the first two and the fourth are."""
    monkeypatch.setattr(parts, "PIECE_BYTES", 1 << 17)  # as small beside the model as in real ones
    monkeypatch.setattr(contrasts, "BLOCK_BYTES", 1 << 17)
    monkeypatch.setattr(running, "NORM_ENTRIES", 1 << 15)
    traker = TRAKer(model, "causal_lm", 64, tmp_path, proj_dim=512, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    found = [
        most_bytes(lambda n=number: traker.featurize(batch(n), num_samples=SAMPLES))
        for number in range(4)
    ]
    assert traker.gradient_computer.name == "hooks"
    ratios = [(most + parameters(model)) / plain for most in found]
    assert max(ratios) < 1, ratios
    assert max(ratios) < 1.05 * ratios[2], ratios


def test_compressed_gradients_wait_for_those_of_their_own_output_alone(model):
    """One more output of a sample takes its features, not the compressed gradients of a model."""
    computer = HookGradientComputer(model, TokenOutput(CausalLMModelOutput()))
    projector = FactoredProjector(model, 16, 64)
    found = {}
    for places in (2, 12, 2, 12, 2, 12):  # the last two are not checked
        labels = batch(0)["labels"].clone()
        labels[:, places + 1 :] = -100
        given = ({**batch(0), "labels": labels},)
        computer.task.choose(given)
        found[places] = most_bytes(lambda x=given: computer.project_rows(x, projector, 0))
    features = SAMPLES * projector.proj_dim * 4
    waiting = SAMPLES * projector.inner_dim * 4
    assert 20 * features < waiting
    assert (found[12] - found[2]) / 10 < 4 * features


class Several(nn.Module):
    """Modules of one output and of several, one of which nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 8)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.rnn(self.embed(ids))[0]).mean(1)


IDS, LABELS = torch.arange(24).view(4, 6) % 20, torch.arange(4)


@pytest.mark.parametrize("asked", ["features", "outputs alone"])
def test_nothing_of_a_batch_stays(asked):
    """A graph whose own hooks lead to it is never freed, nor is what they hold."""
    model = Several()
    computer = HookGradientComputer(model, TASK)
    projector = Projector(sum(p.numel() for p in model.parameters()), 8)
    for _ in range(3):
        if asked == "features":
            computer.project((IDS, LABELS), projector, 0)
        else:
            computer.compute_loss_grad((IDS, LABELS))
    computer.load_model_params(model)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (Recorder, sinks.Check)]


def test_what_is_tried_first_takes_no_more_than_a_small_batch():
    """Two and three copies of a sample, whose activations are larger than the parameters."""
    layers = [part for _ in range(6) for part in (nn.Linear(8, 8), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 2048, 3))
    computer = HookGradientComputer(model, TASK)
    projector = Projector(sum(p.numel() for p in model.parameters()), 8)
    batch = torch.randn(3, 2048, 8), torch.arange(3)
    computer.project(batch, projector, 0)  # fills the workspace
    computer.load_model_params(model)
    first, second = (most_bytes(lambda: computer.project(batch, projector, 0)) for _ in range(2))
    assert first < 1.1 * second


def test_a_table_that_is_also_an_output_layer_needs_no_sum(monkeypatch):
    """Its rows that are looked up are projected by themselves."""
    made = []
    flush = sinks.ProjectingSink.flush
    monkeypatch.setattr(sinks.ProjectingSink, "flush", lambda s: (made.append(s), flush(s)))
    model = Several()
    computer = HookGradientComputer(model, TASK)
    projector = Projector(sum(p.numel() for p in model.parameters()), 8)
    found = computer.project((IDS, LABELS), projector, 0)
    assert [sink.to_come for sink in made] == [{}]
    exact = projector.project(computer.compute_per_sample_grad((IDS, LABELS)), 0)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


@modules.of()
def Mean(self, x):
    """Over the positions."""
    return x.mean(1)


def test_parts_of_a_parameter_are_projected_with_the_last_one(monkeypatch):
    """One sum at a time, not those of all parameters until the end; and within GRAD_BYTES.

    There are as many positions as make the factors of a product larger than a weight.
    """
    torch.manual_seed(0)
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(one, one, other, other, Mean())
    computer = HookGradientComputer(model, TASK)
    x = torch.randn(4, 8, 8)
    projector = Projector(sum(p.numel() for p in model.parameters()), 16)
    exact = projector.project(computer.compute_per_sample_grad((x, LABELS)), 0)
    held = []
    add = sinks.ProjectingSink.add

    def counted(sink: Any, name: str, part: Any) -> None:
        add(sink, name, part)
        held.append(len(sink.sums))

    monkeypatch.setattr(sinks.ProjectingSink, "add", counted)
    found = computer.project((x, LABELS), projector, 0)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert max(held) == 2  # weight and bias of one layer
    assert held[-1] == 0
    held.clear()
    monkeypatch.setattr("fastproj.trak.gradients.base.GRAD_BYTES", 4 * 8 * 8 * 4)  # one weight
    found = computer.project((x, LABELS), projector, 0)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert max(held) == 1


@modules.of(seed=0, cell=lambda: nn.Linear(256, 256), head=lambda: nn.Linear(256, 4))
def Unrolled(self, x):
    """A layer for each of 8 steps."""
    h = torch.zeros_like(x[:, 0])
    for step in range(x.shape[1]):
        h = torch.tanh(self.cell(h + x[:, step]))
    return self.head(h)


def test_the_gradient_of_a_layer_with_many_short_calls_is_not_formed_whole(monkeypatch):
    """Nor is a sum of its parts kept."""
    monkeypatch.setattr(parts, "PIECE_BYTES", 1 << 16)
    model = Unrolled()
    computer = HookGradientComputer(model, TASK)
    projector = Projector(sum(p.numel() for p in model.parameters()), 16, kind="sjlt")
    batch = torch.randn(4, 8, 256), LABELS
    found = [most_bytes(lambda: computer.project(batch, projector, 0)) for _ in range(3)]
    assert found[2] < 4 * 256 * 256 * 4 / 2  # the third is not checked
    exact = projector.project(computer.compute_per_sample_grad(batch), 0)
    torch.testing.assert_close(computer.project(batch, projector, 0), exact, rtol=1e-4, atol=1e-5)
