"""Features are those of the checkpoint that was loaded, whoever writes to the model meanwhile."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastproj.trak.loaded import LoadedModel
from fastproj.trak.store.store import NotReadyError
from tests.trak import cases, modules

N = 12
DATA = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 3


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()


# ---- ways to change a model between two batches -------------------------------------------------


def assign_data(model):
    model[0].weight.data = model[0].weight.data * 1.5


def copy_into_data(model):
    model[0].weight.data.copy_(torch.ones(6, 4))


def one_entry(model):
    model[3].bias.data[1] += 1e-3


def through_numpy(model):
    model[3].weight.detach().numpy()[0, 0] = 2


def through_set(model):
    with torch.no_grad():
        model[3].weight.set_(torch.ones(3, 6))


def twice_as_large(model):
    for p in model.parameters():
        p.data.mul_(2)


def negated(model):
    model[0].weight.data.neg_()


def rows_swapped(model):
    weight = model[0].weight.data
    weight[[0, 1]] = weight[[1, 0]]


def entries_swapped(model):
    weight = model[0].weight.data
    weight[2, [0, 3]] = weight[2, [3, 0]]


def exchanged(model):
    a, b = model[0].bias, model[2].weight
    a.data, b.data = b.data, a.data


def under_no_grad(model):
    with torch.no_grad():
        model[0].bias.copy_(torch.ones(6))


def another_parameter(model):
    model[0].weight = nn.Parameter(torch.ones(6, 4))


def another_module(model):
    model[0] = nn.Linear(4, 6)


def another_state(model):
    model.load_state_dict(net(1).state_dict())


def assigned_state(model):
    model.load_state_dict(net(1).state_dict(), assign=True)


def a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(DATA[0]).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def averaged_weights(model):
    """ema.copy_to(...) of usual packages."""
    for p, shadow in zip(model.parameters(), net(1).parameters(), strict=True):
        p.data.copy_(0.9 * p.data + 0.1 * shadow.data)


def statistics(model):
    model[2].running_mean.data.add_(1)


CHANGES = [
    assign_data,
    copy_into_data,
    one_entry,
    through_numpy,
    through_set,
    twice_as_large,
    negated,
    rows_swapped,
    entries_swapped,
    exchanged,
    under_no_grad,
    another_parameter,
    another_module,
    another_state,
    assigned_state,
    a_step,
    averaged_weights,
    statistics,
]


def truth(model):
    return cases.projected(cases.gradients(model, DATA), 8, 0)


def part(traker, step, rows):
    getattr(traker, step)((DATA[0][rows], DATA[1][rows]), inds=range(rows.start, rows.stop))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("step", ["featurize", "score"])
def test_nothing_is_kept_of_another_model(tmp_path, change, step):
    model = net()
    wanted = truth(copy.deepcopy(model))
    state = copy.deepcopy(model.state_dict())
    traker = cases.make(model, tmp_path, N, lambda_reg=0.1)
    exp_name = None
    traker.load_checkpoint(state, 0)
    if step == "score":
        part(traker, "featurize", slice(0, N))
        traker.finalize_features()
        exp_name = "test"
        traker.start_scoring_checkpoint("test", state, 0, N)
    part(traker, step, slice(0, 4))
    change(traker.model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{step}: .* have (been )?changed"):
            part(traker, step, slice(4, 8))
    assert not traker.saver.index(0, exp_name).done[4:].any()
    if step == "score":
        traker.start_scoring_checkpoint("test", state, 0, N)
    else:
        traker.load_checkpoint(state, 0)
    part(traker, step, slice(4, N))
    torch.testing.assert_close(traker.saver.matrix(0, exp_name).double(), wanted)


@pytest.mark.parametrize("curvature", ["trak", "fisher"])
@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_a_change_is_noticed_by_every_computer(tmp_path, computer, curvature):
    model = net()
    traker = cases.loaded(model, tmp_path, N, gradient_computer=computer, curvature=curvature)
    model[0].weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"featurize: 0\.weight of the model have changed"):
        part(traker, "featurize", slice(0, N))
    assert not traker.saver.index(0).done.any()


def test_averaged_weights_that_are_put_back(tmp_path):
    """store, copy_to, an evaluation, restore: between two batches it is nobody's affair."""
    model = net()
    wanted = truth(copy.deepcopy(model))
    traker = cases.loaded(model, tmp_path, N)
    part(traker, "featurize", slice(0, 4))
    stored = [p.detach().clone() for p in model.parameters()]
    averaged_weights(model)
    model(DATA[0])
    with pytest.raises(ValueError, match="have changed"):
        part(traker, "featurize", slice(4, 8))
    for p, kept in zip(model.parameters(), stored, strict=True):
        p.data.copy_(kept)
    part(traker, "featurize", slice(4, N))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted)


def data_elsewhere(model):
    kept = model[0].weight.data.clone()
    model[0].weight.data.mul_(2)
    model[0].weight.data = kept


def parameter_elsewhere(model):
    old = model[0].weight
    model[0].weight = nn.Parameter(old.detach().clone())
    old.data.mul_(2)


def module_elsewhere(model):
    old = model[0]
    model[0] = copy.deepcopy(old)
    old.weight.data.mul_(2)


def buffer_elsewhere(model):
    old = model[2].running_mean
    model[2].running_mean = old.clone()
    old.add_(2)


def assigned_elsewhere(model):
    state = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.data.mul_(2)
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "move",
    [data_elsewhere, parameter_elsewhere, module_elsewhere, buffer_elsewhere, assigned_elsewhere],
)
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
@pytest.mark.parametrize("curvature", ["trak", "fisher"])
def test_the_checkpoint_put_back_into_other_memory(tmp_path, move, computer, curvature):
    """What held it before is another model's now, and must not be used."""
    model = net()
    wanted = truth(copy.deepcopy(model))
    options = {"gradient_computer": computer, "curvature": curvature}
    traker = cases.loaded(model, tmp_path, N, **options)
    part(traker, "featurize", slice(0, 4))
    move(model)
    part(traker, "featurize", slice(4, N))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted)


@pytest.mark.parametrize("size", [4, 1 << 15])
def test_a_buffer_of_any_size(tmp_path, size):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)
            self.register_buffer("mask", torch.ones(size))

        def forward(self, x):
            return self.fc(x * self.mask[:4])

    model = Masked()
    wanted = truth(copy.deepcopy(model))
    traker = cases.loaded(model, tmp_path, N)
    part(traker, "featurize", slice(0, 4))
    model.mask.data[1] = 3
    for _ in range(2):
        with pytest.raises(ValueError, match="mask of the model have changed since"):
            part(traker, "featurize", slice(4, N))
    assert model.mask[1] == 3
    model.mask.data[1] = 1
    part(traker, "featurize", slice(4, N))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted)


@pytest.mark.parametrize("how", ["copy", "drift"])
def test_a_forward_that_writes_to_parameters_without_a_version(tmp_path, how):
    """As spectral norms of old do with their vectors, in eval mode too."""

    @modules.of(
        seed=0,
        fc=lambda: nn.Linear(4, 3),
        u=lambda: nn.Parameter(torch.ones(3), requires_grad=False),
    )
    def Writing(self, x):
        new = torch.zeros(3) if how == "copy" else self.u.detach() * 1.5
        self.u.data.copy_(new)
        return self.fc(x) * self.u

    model = Writing()
    traker = cases.loaded(model, tmp_path, N, grad_wrt=["fc.weight"])
    message = (
        r"u of the model have changed .* \(through \.data .* expected .* a forward that leaves"
    )
    with pytest.raises(ValueError, match=message):
        part(traker, "featurize", slice(0, N))
    assert not traker.saver.index(0).done.any()


# ---- parameters as they may lie in memory -------------------------------------------------------


def laid_out(kind, n):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, generator=generator)
    if kind == "odd offset":
        return torch.cat([torch.zeros(1), values])[1:]
    if kind == "transposed":
        return values[: n // 3 * 3].view(-1, 3).T
    if kind == "channels last":
        x = values[: n // 12 * 12].view(1, 3, 4, -1)
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "expanded":
        return values[:1].expand(n)
    if kind == "strided":
        return torch.stack([values, values])[:, ::1].T[:, 0]
    if kind == "bool":
        return values > 0
    return values.to(getattr(torch, kind))


KINDS = ["float32", "float64", "bfloat16", "float16", "int8", "complex64", "bool"]
PLACES = ["odd offset", "transposed", "channels last", "expanded", "strided"]


def look(loaded):
    with loaded.guarded("featurize", True):
        pass


@pytest.mark.parametrize("kind", [*KINDS, *PLACES])
@pytest.mark.parametrize("n", [12, 60, 1000, 40_000])
def test_every_entry_counts(kind, n, monkeypatch):
    monkeypatch.setattr("fastproj.trak.fingerprints.PART_BYTES", 1 << 15)
    model = nn.Module()
    model.t = nn.Parameter(laid_out(kind, n), requires_grad=False)
    model.empty = nn.Parameter(torch.empty(0, 3))
    loaded = LoadedModel(model)
    look(loaded)
    size = model.t.numel()
    for place in {0, size // 2, size - 1}:
        where = tuple(int(i) for i in np.unravel_index(place, model.t.shape))
        before = model.t
        model.t = nn.Parameter(laid_out(kind, n), requires_grad=False)
        look(loaded)
        model.t.data[where] = ~before[where] if kind == "bool" else before[where] + 1
        with pytest.raises(ValueError, match="t of the model have changed"):
            look(loaded)
        model.t = before
        look(loaded)


def test_parts_of_a_tensor_that_change_places(monkeypatch):
    monkeypatch.setattr("fastproj.trak.fingerprints.PART_BYTES", 1 << 15)
    model = nn.Module()
    model.t = nn.Parameter(torch.randn(1 << 17, generator=torch.Generator().manual_seed(0)))
    loaded = LoadedModel(model)
    for step in (1, 2, 16, 1 << 13, 1 << 15, 1 << 16):
        model.t.data = model.t.data.view(-1, 2, step).flip(1).reshape(-1)
        with pytest.raises(ValueError, match="t of the model have changed"):
            look(loaded)
        model.t.data = model.t.data.view(-1, 2, step).flip(1).reshape(-1)
        look(loaded)


def test_the_same_values_elsewhere_are_the_same_checkpoint():
    model = net()
    loaded = LoadedModel(model)
    for p in model.parameters():
        p.data = p.data.clone()
    look(loaded)
    model[0].weight.data = torch.as_strided(
        model[0].weight.data.T.contiguous().view(-1), (6, 4), (1, 6)
    )
    look(loaded)
    assert torch.equal(model[0].weight, net()[0].weight)


# ---- checkpoints in the model's own memory ------------------------------------------------------


def states():
    """A model, and the state_dict of another."""
    return net(0), {name: t.clone() for name, t in net(1).state_dict().items()}


@pytest.mark.parametrize("strict", [True, False])
def test_memory_that_another_checkpoint_was_loaded_into_is_refused(tmp_path, strict):
    model, other = states()
    traker = cases.make(model, tmp_path, N)
    traker.load_checkpoint(other, 0)
    said = r"model_id 1 the model's own memory .* of model_id 0 .*; expected copies, taken"
    for _ in range(2):  # also when it is tried again
        with pytest.raises(ValueError, match=said):
            traker.load_checkpoint(model.state_dict(), 1, strict=strict)
    with pytest.raises(NotReadyError, match="no checkpoint is loaded"):
        traker.featurize(DATA, num_samples=N)


def test_memory_that_was_written_to_is_refused_for_targets(tmp_path):
    model, other = states()
    own = model.state_dict()
    traker = cases.make(model, tmp_path, N)
    for model_id, state in enumerate((own, other)):
        traker.load_checkpoint(state, model_id)
        traker.featurize(DATA, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", other, 1, N)
    said = r"^start_scoring_checkpoint: received for model_id 0 the model's own .* of model_id 1 "
    with pytest.raises(ValueError, match=said):
        traker.start_scoring_checkpoint("test", own, 0, N)


def test_the_models_own_memory_is_taken_where_it_holds_what_it_held(tmp_path):
    model, other = states()
    traker = cases.make(model, tmp_path, N)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(DATA, num_samples=N)
    model.load_state_dict(other)  # by the user
    traker.load_checkpoint(model.state_dict(), 1)
    traker.featurize(DATA, num_samples=N)
    traker.load_checkpoint(copy.deepcopy(model.state_dict()), 1)
    traker.load_checkpoint(model.state_dict(), 1)  # the same again
    first, second = traker.saver.matrix(0), traker.saver.matrix(1)
    assert not torch.equal(first, second)


def test_the_same_weights_under_two_numbers_are_said_once(tmp_path, caplog):
    model, _ = states()
    kept = [model.state_dict() for _ in range(3)]  # three names for one memory
    for _ in range(2):
        traker = cases.make(model, tmp_path, N)
        for model_id, state in enumerate(kept):
            traker.load_checkpoint(state, model_id)
            traker.featurize(DATA, num_samples=N)
    said = [line for line in caplog.messages if "has the weights of" in line]
    assert [one.split(";")[0] for one in said] == [
        f"load_checkpoint: model_id {i} has the weights of model_id 0" for i in (1, 2)
    ]
    assert not torch.equal(traker.saver.matrix(0), traker.saver.matrix(1))  # their own projections


def test_several_values_of_what_a_model_shares_are_refused(tmp_path):
    """PyTorch loads the last of them, and says nothing."""

    class Tied(cases.Net):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(2, 2)
            self.other = nn.Linear(2, 2)
            self.other.weight = self.again.weight

    model = Tied()
    traker = cases.make(model, tmp_path, 4)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["again.weight"][0, 0] = state["other.weight"][0, 0] = torch.nan
    traker.load_checkpoint(state, 0)
    traker.load_checkpoint({**state, "other.weight": state["other.weight"].double()}, 0)
    state["other.weight"][1, 1] += 1
    before = model.again.weight.clone()
    with pytest.raises(ValueError, match=r"'other.weight' that differs from 'again.weight'"):
        traker.load_checkpoint(state, 1)
    assert torch.equal(model.again.weight.nan_to_num(), before.nan_to_num())


def test_shapes_of_what_a_model_shares_are_for_the_hooks_of_its_modules(tmp_path):
    """A hook may mend a value that an older version kept otherwise."""

    class Tied(cases.Net):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(2, 3, bias=False)
            self.other = nn.Linear(2, 3, bias=False)
            self.other.weight = self.again.weight
            self.other.register_load_state_dict_pre_hook(turn)

    def turn(module, state, prefix, *_):
        state[f"{prefix}weight"] = state[f"{prefix}weight"].mT

    model = Tied()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["other.weight"] = state["other.weight"].mT  # [2, 3]
    cases.make(model, tmp_path, 4).load_checkpoint(state, 0)
    assert torch.equal(model.again.weight, state["again.weight"])


class Merging(nn.Linear):
    """An adapter that is added to the weights while the model is in eval mode, as of loralib."""

    def __init__(self):
        super().__init__(4, 3)
        self.adapter, self.merged = nn.Parameter(torch.randn(3, 4)), False

    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += self.adapter.data * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.adapter.T


def test_weights_that_eval_merges_are_those_of_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    states = [Merging().state_dict() for _ in range(2)]
    model = Merging()
    traker = cases.make(model, tmp_path, N)
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        expected = Merging()
        expected.load_state_dict(state)
        torch.testing.assert_close(model(DATA[0]), expected(DATA[0]))
        with pytest.raises(ValueError, match="doesn't fit the model"):
            traker.load_checkpoint(nn.Linear(4, 2).state_dict(), 7)
        torch.testing.assert_close(model(DATA[0]), expected(DATA[0]))
