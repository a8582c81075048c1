"""Per-sample gradients: vectorised, looped and plain autograd agree."""

from __future__ import annotations

import re
from collections import deque
from types import FunctionType

import pytest
import torch
from torch import nn

from fastproj import TRAKer
from fastproj.memory import is_out_of_memory
from fastproj.trak import (
    FunctionalGradientComputer,
    FunctionModelOutput,
    HookGradientComputer,
    ImageClassificationModelOutput,
    IterativeGradientComputer,
)
from fastproj.trak.gradients import AutomaticGradientComputer, recorder
from fastproj.trak.gradients import base as module
from fastproj.trak.inputs import RandomNumbersError
from tests.trak import cases

COMPUTERS = [FunctionalGradientComputer, HookGradientComputer, IterativeGradientComputer]


def assert_nothing(*_):
    raise AssertionError


def flat(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_gradients_are_those_of_autograd(computer):
    model, batch = cases.net(dtype=torch.float64), cases.data(9, dtype=torch.float64)
    grads = computer(model, ImageClassificationModelOutput()).compute_per_sample_grad(batch)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    assert all(grads[name].shape == (9, *p.shape) for name, p in model.named_parameters())
    torch.testing.assert_close(flat(grads), cases.gradients(model, batch))


@pytest.mark.parametrize("computer", COMPUTERS)
def test_grad_wrt_selects_in_the_order_of_the_model(computer):
    model, batch = cases.net(dtype=torch.float64), cases.data(5, dtype=torch.float64)
    task = ImageClassificationModelOutput()
    every = computer(model, task).compute_per_sample_grad(batch)
    some = computer(model, task, grad_wrt=["fc.bias", "conv.weight"]).compute_per_sample_grad(batch)
    assert list(some) == ["conv.weight", "fc.bias"]
    for name, g in some.items():
        torch.testing.assert_close(g, every[name])


class Seeded(nn.Module):
    """Adds noise that it seeds in each forward: a sample's depends on its place in the batch."""

    def __init__(self):
        super().__init__()
        self.net = cases.net(dtype=torch.float64)

    def forward(self, x):
        noise = torch.Generator().manual_seed(0)
        return self.net(x + torch.randn(x.shape, generator=noise, dtype=x.dtype))


@pytest.mark.filterwarnings("ignore:.*gradient_computer 'hooks' can't take this model")
@pytest.mark.parametrize("computer", [AutomaticGradientComputer, *COMPUTERS[::2]])
def test_noise_that_the_model_seeds_is_that_of_each_sample_alone(computer):
    model, (x, y) = Seeded(), cases.data(5, dtype=torch.float64)
    grads = computer(model, ImageClassificationModelOutput()).compute_per_sample_grad((x, y))
    torch.testing.assert_close(flat(grads), cases.gradients(model, (x, y)))


@pytest.mark.parametrize(("share", "refused"), [(1e-6, False), (0.1, True)])
def test_outputs_may_differ_from_call_to_call_by_rounding(share, refused):
    """The kernels of a GPU may add in any order."""

    class Unordered(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + share * (self.calls % 2))

    batch = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 0, 1]),
    )
    computer = IterativeGradientComputer(Unordered(3, 2), ImageClassificationModelOutput())
    if refused:
        with pytest.raises(RandomNumbersError, match="outputs differ from one call to the next"):
            computer.check_repeats(batch)
    else:
        computer.check_repeats(batch)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_outputs_of_any_size_show_that_samples_are_mixed(scale):
    model = nn.Linear(3, 1)
    batch = (torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),)

    def alone(model, batch):
        return scale * model(batch[0])[:, 0]

    def mixed(model, batch):
        return alone(model, batch) - alone(model, batch).mean()

    for output in (alone, mixed):
        computer = IterativeGradientComputer(model, FunctionModelOutput(output))
        assert computer.mixes(batch) == (output is mixed)


@pytest.mark.parametrize("names", [["fc.wieght"], []])
def test_unknown_or_empty_grad_wrt_is_refused(names):
    with pytest.raises(ValueError, match="grad_wrt") as error:
        FunctionalGradientComputer(cases.net(), ImageClassificationModelOutput(), grad_wrt=names)
    assert not names or "'fc.weight'" in str(error.value)
    with pytest.raises(TypeError, match="a string"):
        FunctionalGradientComputer(cases.net(), ImageClassificationModelOutput(), grad_wrt="fc")


def test_chunks_follow_one_another_and_respect_the_limit(monkeypatch):
    model, batch = cases.net(dtype=torch.float64), cases.data(10, dtype=torch.float64)
    computer = FunctionalGradientComputer(model, ImageClassificationModelOutput())
    per_sample = sum(p.numel() * 8 for p in model.parameters())
    monkeypatch.setattr(module, "GRAD_BYTES", 3 * per_sample + 1)
    chunks = [grads for (grads,) in computer.iter_rows(batch)]
    assert [len(chunk["fc.bias"]) for chunk in chunks] == [3, 3, 3, 1]
    torch.testing.assert_close(torch.cat([flat(c) for c in chunks]), cases.gradients(model, batch))
    monkeypatch.setattr(module, "GRAD_BYTES", 1)
    assert computer.samples_at_once(batch) == 1


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)
            self.b = nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    model = Tied().double()
    batch = (torch.randn(3, 4).double(), torch.tensor([0, 1, 2]))
    computer = FunctionalGradientComputer(model, ImageClassificationModelOutput())
    grads = computer.compute_per_sample_grad(batch)
    assert list(grads) == ["a.weight"]
    torch.testing.assert_close(flat(grads), cases.gradients(model, batch))


class Keeping(nn.Module):
    """Keeps in eval mode what it has made of its parameters, in an attribute or in a dict."""

    def __init__(self, in_dict):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.ones(3, 1))
        self.in_dict, self.kept, self.weight, self.made = in_dict, {}, None, False

    def forward(self, x):
        if not self.made:
            weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
            self.made = True
            if self.in_dict:
                self.kept["weight"] = weight
            else:
                self.weight = weight
        return x @ (self.kept["weight"] if self.in_dict else self.weight).T


@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize("computer", COMPUTERS)
def test_what_a_model_keeps_of_its_weights_is_made_anew(computer, in_dict):
    """Else no gradient gets to them after the first call, here one for labels."""
    torch.manual_seed(0)
    model, batch = Keeping(in_dict).eval(), (torch.randn(5, 4), torch.arange(5) % 3)
    made = computer(model, ImageClassificationModelOutput())
    for _ in range(2):
        made.compute_loss_grad(batch)
        grads = made.compute_per_sample_grad(batch)
    assert (model.kept, model.weight, model.made) == ({}, None, False)
    for row in range(5):
        p = model(batch[0]).softmax(1)[row, batch[1][row]]
        model.made = False
        exact = torch.autograd.grad((p / (1 - p)).log(), [model.v, model.g])
        torch.testing.assert_close([grads["v"][row], grads["g"][row]], list(exact))


class Past(nn.Module):
    """Keeps the parameters that it multiplies by somewhere else as well."""

    def __init__(self, where, trained=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(4, 4), trained)
        self.head = nn.Linear(4, 3)
        first = self.first
        self.weights = {
            "list": lambda: [first],
            "variable": lambda: [lambda: first],
            "ParameterList": lambda: nn.ParameterList([first]),
            "attribute": lambda: [lambda: self.first],
        }[where]()

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ (weight() if callable(weight) else weight))
        return self.head(x)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("where", ["list", "variable"])
@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_parameters_used_past_their_module_are_refused(computer, where, trained, size, tmp_path):
    """Their gradients would be 0, for whichever computer."""
    model, batch = Past(where, trained), (torch.randn(size, 4), torch.arange(size))
    traker = cases.loaded(model, tmp_path, size, gradient_computer=computer)
    with pytest.raises(ValueError, match=r"depend on first past the module .* self\.first"):
        traker.featurize(batch, num_samples=size)
    assert model.first.requires_grad == trained
    assert not traker.saver.index(0).done.any()


@pytest.mark.parametrize("where", ["ParameterList", "attribute"])
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
def test_parameters_read_anew_by_each_forward_are_taken(computer, where, tmp_path):
    """As the error above advises."""
    model, batch = Past(where, trained=False), (torch.randn(5, 4), torch.arange(5) % 3)
    traker = cases.loaded(model, tmp_path, 5, gradient_computer=computer)
    traker.featurize(batch, num_samples=5)
    model.requires_grad_()
    exact = cases.projected(cases.gradients(model, batch).double(), 8, 0)
    torch.testing.assert_close(traker.saver.matrix(0).double(), exact, rtol=1e-3, atol=1e-5)


def test_parameters_past_their_module_may_be_used_if_no_gradient_is_taken_by_them(tmp_path):
    model, batch = Past("list", trained=False), (torch.randn(5, 4), torch.arange(5) % 3)
    options = {"grad_wrt": ["head.weight"]}
    cases.loaded(model, tmp_path, 5, **options).featurize(batch, num_samples=5)


class Leaky(nn.Module):
    """A neuron whose state leaks from call to call, kept in an attribute or in what it holds."""

    def __init__(self, kind):
        super().__init__()
        self.kept, self.kind = None if kind is None else kind(), kind

    def forward(self, x):
        before = self.kept if self.kind is None else self.kept and self.kept[0]
        now = x if before is None or len(before) != len(x) else 0.5 * before + x
        if self.kind is None:
            self.kept = now.detach()
        else:
            self.kept.clear()
            self.kept.update({0: now}) if self.kind is dict else self.kept.append(now)
        return torch.tanh(now)


@pytest.mark.parametrize("kind", [None, dict, list, deque])
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
def test_a_state_goes_from_no_sample_to_the_next(computer, kind, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Leaky(kind), nn.Linear(4, 3))
    batch = torch.randn(7, 4), torch.arange(7) % 3
    traker = cases.loaded(model, tmp_path, 7, gradient_computer=computer)
    for begin, end in ((0, 1), (1, 4), (4, 7)):
        traker.featurize(tuple(t[begin:end] for t in batch), num_samples=end - begin)
    assert not model[1].kept
    plain = nn.Sequential(model[0], nn.Tanh(), model[2])
    exact = cases.projected(cases.gradients(plain, batch), 8, 0)
    torch.testing.assert_close(traker.saver.matrix(0).double(), exact, rtol=1e-3, atol=1e-5)


class Quantized(nn.Module):
    """A layer whose frozen weight has its scale as an attribute, and an adapter beside it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-7, 8, (3, 4), dtype=torch.int8), False)
        self.weight.scale = 0.1
        self.adapter = nn.Linear(4, 3)

    def forward(self, x):
        return x @ (self.weight.scale * self.weight).T + self.adapter(x)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_frozen_parameters_keep_their_attributes(computer):
    torch.manual_seed(0)
    model, batch = Quantized(), (torch.randn(5, 4), torch.arange(5) % 3)
    names = ["adapter.weight", "adapter.bias"]
    made = computer(model, ImageClassificationModelOutput(), grad_wrt=names)
    grads = made.compute_per_sample_grad(batch)
    for row in range(5):
        p = model(batch[0]).softmax(1)[row, batch[1][row]]
        exact = torch.autograd.grad((p / (1 - p)).log(), [model.get_parameter(n) for n in names])
        torch.testing.assert_close([grads[name][row] for name in names], list(exact))


def test_works_under_no_grad_and_leaves_the_model_alone():
    model, batch = cases.net(), cases.data(4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    computer = FunctionalGradientComputer(model, ImageClassificationModelOutput())
    with torch.no_grad():
        grads = computer.compute_per_sample_grad(batch)
    torch.testing.assert_close(
        flat(grads).double(), cases.gradients(model, batch), rtol=1e-4, atol=1e-5
    )
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("computer", [HookGradientComputer, IterativeGradientComputer])
def test_sparse_gradients_of_embeddings_are_those_of_dense_ones(computer):
    class Bag(nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.words = nn.Embedding(10, 6, sparse=sparse)
            self.head = nn.Linear(6, 4)

        def forward(self, ids):
            return self.head(torch.tanh(self.words(ids)).mean(1))

    batch = torch.arange(12).reshape(4, 3) % 5, torch.tensor([0, 1, 3, 2])
    task = ImageClassificationModelOutput()
    sparse, dense = (
        computer(Bag(sparse), task).compute_per_sample_grad(batch) for sparse in (True, False)
    )
    torch.testing.assert_close(flat(sparse), flat(dense))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda *_: missing_name, "NameError: name 'missing_name' is not defined"),  # noqa: F821
        (lambda *_: None.shape, "AttributeError: 'NoneType' object has no attribute 'shape'"),
        (lambda *_: ().index(), "TypeError: "),
        (assert_nothing, "of the model: AssertionError (fastproj"),
    ],
)
def test_a_fault_of_our_own_is_called_one(fault, said, monkeypatch):
    """And the run goes on with the next computer, whose gradients are right."""
    inside = FunctionType(fault.__code__, vars(recorder), fault.__name__)  # as if it stood there
    monkeypatch.setattr(recorder, "in_one_dtype", inside)
    model, batch = cases.net(dtype=torch.float64), cases.data(4, dtype=torch.float64)
    computer = AutomaticGradientComputer(model, ImageClassificationModelOutput())
    with pytest.warns(UserWarning, match="'hooks' has failed by a fault of fastproj") as caught:
        grads = computer.compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(grads), cases.gradients(model, batch))
    (message,) = [str(w.message) for w in caught]
    assert said in message
    assert re.search(r"\(fastproj/trak/gradients/recorder\.py:\d+ in \S+\)", message)


class Refuses(ImageClassificationModelOutput):
    """What comes from a task in batches is the user's affair."""

    def outputs(self, model, weights, buffers, batch):
        if len(batch[0]) > 1:
            raise AttributeError("not for batches")
        return super().outputs(model, weights, buffers, batch)


def test_what_a_task_raises_is_no_fault_of_ours():
    computer = AutomaticGradientComputer(cases.net(), Refuses())
    with pytest.warns(UserWarning, match="'hooks' can't take this model.*not for batches"):
        computer.compute_per_sample_grad(cases.data(4))


class Large(nn.Module):
    """Asks for more memory than there is, of batches of more than ``fits``; it counts its calls."""

    def __init__(self, where):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.where, self.fits, self.calls = where, 3, 0

    def forward(self, x):
        self.calls += 1
        if self.where == "forward":
            self.ask(x)
        h = self.fc(x)
        if self.where == "backward" and h.requires_grad:
            h.register_hook(self.ask)
        return h

    def ask(self, x):
        if len(x) > self.fits:
            torch.empty(1 << 58)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("computer", ["auto", "hooks"])
@pytest.mark.parametrize("curvature", ["fisher", "trak"])
def test_memory_that_is_not_enough_is_said_and_takes_no_other_way(
    where, computer, curvature, tmp_path, recwarn
):
    """The others would take more. A smaller batch goes on with hooks."""
    torch.manual_seed(0)
    model = Large(where).eval()
    options = {"gradient_computer": computer, "curvature": curvature, "proj_dim": 16}
    traker = TRAKer(model, "image_classification", 8, tmp_path, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(MemoryError, match=r"smaller batches.*allocate"):
        traker.featurize((x, labels), num_samples=8)
    assert model.calls < 8
    for rows in torch.arange(8).split(2):
        traker.featurize((x[rows], labels[rows]), inds=rows)
    assert not recwarn.list
    assert traker.saver.index(0).done.all()


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shape '[3]' is invalid for input of size 4"), False),
        (ValueError("out of memory cells"), False),
    ],
)
def test_errors_that_say_that_memory_ran_out(error, is_it):
    assert is_out_of_memory(error) is is_it
