"""Module hooks: every kind of layer and every way to use it gives autograd's gradients."""

from __future__ import annotations

import warnings
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastproj
from fastproj import Projector
from fastproj.trak import (
    AbstractModelOutput,
    FunctionalGradientComputer,
    HookGradientComputer,
    HooksError,
    ImageClassificationModelOutput,
    IterativeGradientComputer,
    batches,
)
from fastproj.trak.gradients import (
    AutomaticGradientComputer,
    hooks,
    parts,
    recorder,
    resolve_gradient_computer,
    sinks,
)
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.tasks.margin import margins
from tests.trak import cases, modules

TASK = ImageClassificationModelOutput()
CLASSES = 3
N = 5


class Classifier(nn.Module):
    """A layer, tanh, and a linear head on the mean over the middle dimensions."""

    def __init__(self, layer, width, call=None):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(width, CLASSES)
        self.call = call or (lambda layer, x: layer(x))

    def forward(self, x):
        h = torch.tanh(self.call(self.layer, x))
        h = h.flatten(1)
        return self.head(h.unflatten(1, (-1, self.head.in_features)).mean(1))


class Twice(nn.Module):
    """One layer called three times, and a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4, bias=False)
        self.other.weight = self.again.weight

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.other(x)


@modules.of(major=lambda: nn.Linear(4, 4), folded=lambda: nn.Linear(4, 4))
def TimeMajor(self, x):  # [B, T, 4]
    """Samples in dimension 1 inside, and all positions of all samples in one dimension."""
    h = torch.tanh(self.major(x.transpose(0, 1))).transpose(0, 1)
    return self.folded(h.reshape(-1, 4)).view(h.shape)


@modules.of(
    words=lambda: nn.Embedding(9, 4, padding_idx=2),
    places=lambda: nn.Embedding(N, 4),
    pairs=lambda: nn.Embedding(2 * N, 2),
    start=lambda: nn.Parameter(torch.randn(1, 1, 4)),
)
def Positions(self, ids):  # [B, T]
    """Embeddings of positions and a parameter, the same for all samples; T = N on purpose."""
    place = torch.arange(ids.shape[1])
    h = self.words(ids) + self.places(place.unsqueeze(0))
    h = torch.tanh(torch.cat([self.start.expand(len(ids), -1, -1), h], 1))[:, 1:]
    bias = self.pairs(place[:, None] + place)  # [T, T, 2]
    weights = (h @ h.transpose(1, 2) + bias.sum(2)).softmax(-1)
    return weights @ h + self.start


class TiedPairs(Positions):
    """The biases of pairs once more, looked up by sample: two uses, seen to in two ways."""

    def __init__(self):
        super().__init__()
        self.again = nn.Embedding(2 * N, 2)
        self.again.weight = self.pairs.weight

    def forward(self, ids):
        return super().forward(ids) * self.again(ids).repeat(1, 1, 2)


@modules.of(first=lambda: nn.Linear(4, 4), second=lambda: nn.Linear(4, 4))
def InPlace(self, x):
    """Outputs that later operations write to."""
    h = F.relu(self.first(x), inplace=True)
    out = self.second(h)
    out += 2 * x
    return out.sigmoid_()


class LoRA(nn.Module):
    """A frozen layer with a low-rank adapter beside it."""

    def __init__(self, width, rank):
        super().__init__()
        self.base = nn.Linear(width, width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.up(self.down(x))


@modules.of(scale=lambda: nn.Parameter(torch.rand(4)), table=lambda: nn.Linear(4, 4))
def Lookup(self, x):
    """Parameters of its own and of a submodule that is read, not called."""
    return F.linear(x * self.scale, self.table.weight.T, self.table.bias)


@modules.of(scale=lambda: nn.Parameter(torch.rand(4)))
def Branches(self, x):
    """Looks at values, as vmap can't."""
    return x * self.scale if bool((x > -100).all()) else x


@modules.of(layer=lambda: nn.Linear(4, 4), condition=lambda: nn.Linear(0, 4))
def NoInputs(self, x):
    """A layer for conditions that this model has none of, and whose weight has no entries."""
    return self.layer(x) + self.condition(x[..., :0])


class Centred(nn.Conv2d):
    """A convolution that changes its weight where its forward can't be seen to differ."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def floats(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def ids(high, *shape):
    return torch.randint(0, high, (N, *shape), generator=torch.Generator().manual_seed(3))


def conv(kind, *arguments, **options):
    return lambda: kind(*arguments, **options)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), floats(4), 6),
    "linear-3d": (lambda: nn.Linear(4, 6), floats(3, 4), 6),
    "linear-4d": (lambda: nn.Linear(4, 6, bias=False), floats(2, 3, 4), 6),
    "conv1d": (conv(nn.Conv1d, 4, 6, 3, stride=2, padding=1), floats(4, 8), 6),
    "conv2d": (conv(nn.Conv2d, 2, 6, 3, padding=1), floats(2, 4, 4), 6),
    "conv2d-groups": (
        conv(nn.Conv2d, 4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        floats(4, 5, 6),
        6,
    ),
    "conv2d-depthwise": (conv(nn.Conv2d, 6, 6, 3, groups=6, bias=False), floats(6, 4, 4), 6),
    "conv2d-same": (conv(nn.Conv2d, 2, 6, 4, padding="same"), floats(2, 5, 5), 6),
    "conv2d-circular": (
        conv(nn.Conv2d, 2, 6, 3, padding=1, padding_mode="circular"),
        floats(2, 4, 4),
        6,
    ),
    "centred": (conv(Centred, 2, 6, 3), floats(2, 4, 4), 6),
    "conv2d-one-place": (conv(nn.Conv2d, 4, 6, 1, groups=2), floats(4, 3, 4), 6),
    "conv2d-one-place-strided": (conv(nn.Conv2d, 4, 6, 1, stride=2), floats(4, 5, 4), 6),
    "conv-transpose-one-place": (conv(nn.ConvTranspose2d, 4, 6, 1), floats(4, 3, 4), 6),
    "conv-transpose-one-place-longer": (
        conv(nn.ConvTranspose2d, 4, 6, 1, dilation=2, output_padding=1),
        floats(4, 3, 3),
        6,
    ),
    "conv3d": (conv(nn.Conv3d, 2, 4, 2, stride=(1, 2, 1)), floats(2, 3, 4, 3), 4),
    "conv3d-groups": (
        conv(nn.Conv3d, 4, 4, (1, 2, 2), dilation=(1, 1, 2), groups=2, padding_mode="replicate"),
        floats(4, 2, 3, 4),
        4,
    ),
    "conv-transpose-1d": (
        conv(nn.ConvTranspose1d, 4, 6, 3, stride=2, padding=1, output_padding=1),
        floats(4, 5),
        6,
    ),
    "conv-transpose": (conv(nn.ConvTranspose2d, 2, 6, 3), floats(2, 3, 3), 6),
    "conv-transpose-groups": (
        conv(nn.ConvTranspose2d, 4, 6, (3, 2), stride=(2, 1), padding=(0, 1), groups=2, bias=False),
        floats(4, 3, 3),
        6,
    ),
    "conv-transpose-dilated": (  # output_padding beyond the stride: places that no input has
        conv(nn.ConvTranspose2d, 4, 6, 2, dilation=(3, 2), output_padding=(2, 1), padding=1),
        floats(4, 3, 3),
        6,
    ),
    "conv-transpose-3d": (
        conv(nn.ConvTranspose3d, 4, 4, 2, stride=(1, 2, 1), groups=4),
        floats(4, 2, 2, 2),
        4,
    ),
    "conv-transpose-size": (
        conv(nn.ConvTranspose1d, 2, 6, 3, stride=2),
        floats(2, 3),
        6,
        lambda m, x: m(x, output_size=[8]),
    ),
    "embedding": (lambda: nn.Embedding(7, 6), ids(7, 4), 6),
    "embedding-padding": (lambda: nn.Embedding(4, 6, padding_idx=1), ids(4, 9), 6),
    "embedding-one-token": (lambda: nn.Embedding(4, 6), ids(4), 6),
    "embedding-sparse": (lambda: nn.Embedding(7, 6, sparse=True), ids(7, 4), 6),
    "embedding-max-norm": (lambda: nn.Embedding(7, 6, max_norm=9.0), ids(7, 4), 6),
    "embedding-bag": (lambda: nn.EmbeddingBag(7, 6, mode="sum"), ids(7, 4), 6),
    "embedding-bag-mean": (lambda: nn.EmbeddingBag(4, 6, padding_idx=1), ids(4, 5), 6),
    "embedding-bag-sparse": (lambda: nn.EmbeddingBag(7, 6, mode="sum", sparse=True), ids(7, 4), 6),
    "embedding-bag-max": (lambda: nn.EmbeddingBag(7, 6, mode="max"), ids(7, 4), 6),
    "embedding-bags": (  # several of each sample
        lambda: nn.EmbeddingBag(7, 6),
        ids(7, 2, 4),
        6,
        lambda m, x: m(x.flatten(0, 1)).unflatten(0, (-1, 2)),
    ),
    "layer-norm": (lambda: nn.LayerNorm(4, eps=0.1), floats(3, 4), 4),
    "layer-norm-2d": (lambda: nn.LayerNorm((3, 4)), floats(2, 3, 4), 4),
    "layer-norm-flat": (lambda: nn.LayerNorm(4), floats(4), 4),
    "rms-norm": (lambda: nn.RMSNorm(4, eps=0.1), floats(3, 4), 4),
    "group-norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), floats(4, 3, 3), 4),
    "instance-norm": (lambda: nn.InstanceNorm2d(4, affine=True), floats(4, 3, 3), 4),
    "batch-norm-1d": (lambda: nn.BatchNorm1d(4), floats(4), 4),
    "batch-norm-2d": (lambda: nn.BatchNorm2d(4, eps=0.1), floats(4, 3, 3), 4),
    "prelu": (lambda: nn.PReLU(4), floats(4, 3), 4),
    "lstm": (lambda: nn.LSTM(4, 6, batch_first=True), floats(3, 4), 6, lambda m, x: m(x)[0]),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        floats(3, 4),
        4,
    ),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        floats(3, 4),
        4,
        lambda m, x: m(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1),
    ),
    "weight-norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)),
        floats(3, 4),
        6,
    ),
    "twice": (Twice, floats(3, 4), 4),
    "time-major": (TimeMajor, floats(3, 4), 4),
    "positions": (Positions, ids(9, N), 4),
    "tied-pairs": (TiedPairs, ids(9, N), 4),
    "in-place": (InPlace, floats(3, 4), 4),
    "lora": (lambda: LoRA(4, 2), floats(3, 4), 4),
    "lookup": (Lookup, floats(3, 4), 4),
    "branches": (Branches, floats(3, 4), 4),
    "no-inputs": (NoInputs, floats(3, 4), 4),
}


def build(name):
    """A model in eval mode and float64, and its batch."""
    make, x, width, *call = LAYERS[name]
    torch.manual_seed(0)
    model = Classifier(make(), width, *call).double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval(), (x, torch.arange(N) % CLASSES)


def flat(grads):
    return torch.cat([g.reshape(len(g), g[0].numel()) for g in grads.values()], 1)


@pytest.mark.parametrize("pieces", ["whole", "pieces"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_the_gradients_of_autograd(name, pieces, monkeypatch):
    model, batch = build(name)
    if pieces == "pieces":
        monkeypatch.setattr(parts, "PIECE_BYTES", N * 8 * 20)
        monkeypatch.setattr(parts, "PATCH_BYTES", 2 * 8 * 100)
    exact = flat(IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch))
    computer = HookGradientComputer(model, TASK)
    torch.testing.assert_close(flat(computer.compute_per_sample_grad(batch)), exact)
    projector = Projector(exact.shape[1], 7, seed=4, scale=None)
    matrix = fastproj.matrix(exact.shape[1], 7, 4, stream=2, dtype=torch.float64)
    torch.testing.assert_close(computer.project(batch, projector, 2), exact @ matrix)
    for r in (1, 2, 3):  # no side, one or both of them are compressed
        factored = fastproj.FactoredProjector(model, r, 32, seed=4, scale=None)
        torch.testing.assert_close(computer.project(batch, factored, 2), factored.project(exact, 2))


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
def test_convolutions_come_channel_by_channel(name, monkeypatch):
    model, batch = build(name)
    monkeypatch.setattr(parts, "PIECE_BYTES", 1)
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch)
    found = HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(found), flat(exact))


WITH_RULES = [
    name
    for name in LAYERS
    if name.startswith(("linear", "conv", "embedding", "layer-norm", "rms", "group", "batch"))
    and not name.endswith(("-size", "-bag-max", "-max-norm"))
]


@pytest.mark.parametrize("name", WITH_RULES)
def test_common_layers_are_not_run_again(name, monkeypatch):
    monkeypatch.setattr(recorder, "local_gradients", None)
    model, batch = build(name)
    HookGradientComputer(model, TASK).compute_per_sample_grad(batch)


@pytest.mark.parametrize("name", ["linear-3d", "positions", "twice", "conv2d", "no-inputs"])
def test_other_batch_sizes_and_shapes_after_the_first(name):
    model, batch = build(name)
    computer = HookGradientComputer(model, TASK)
    computer.compute_per_sample_grad(batch)
    loop = IterativeGradientComputer(model, TASK)
    for rows in (slice(0, 1), slice(1, 3), [4, 0, 0, 1, 2, 3, 4]):
        part = batches.select(batch, rows)
        torch.testing.assert_close(
            flat(computer.compute_per_sample_grad(part)), flat(loop.compute_per_sample_grad(part))
        )
    if name == "linear-3d":
        longer = (torch.cat([batch[0], -batch[0]], 1), batch[1])
        torch.testing.assert_close(
            flat(computer.compute_per_sample_grad(longer)),
            flat(loop.compute_per_sample_grad(longer)),
        )


def test_adapters_alone():
    model, batch = build("lora")
    names = ["layer.down.weight", "layer.up.weight"]
    grads = HookGradientComputer(model, TASK, grad_wrt=names).compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert list(grads) == names
    for name in names:
        torch.testing.assert_close(grads[name], exact[name])


class Recorded(Projector):
    """A projector that notes what it is given."""

    def project(self, grads, *args, **kwargs):
        self.seen = [*getattr(self, "seen", []), grads.shape]
        return super().project(grads, *args, **kwargs)


def test_no_more_than_a_layer_is_in_memory_at_once(monkeypatch):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32) for _ in range(6)), nn.Linear(32, 3))
    batch = (floats(32).float(), torch.arange(N) % CLASSES)
    total = sum(p.numel() for p in model.parameters())
    projector = Recorded(total, 8, scale=None)
    computer = HookGradientComputer(model, TASK)
    computer.project(batch, projector, 0)
    assert max(shape[1] for shape in projector.seen) == 32 * 32
    monkeypatch.setattr(parts, "PIECE_BYTES", N * 4 * 100)
    projector.seen = []
    computer.project(batch, projector, 0)
    assert max(shape[1] for shape in projector.seen) <= 100
    assert sum(shape[1] for shape in projector.seen) == total


@pytest.mark.parametrize("computer", ["hooks", "func", "loop", "auto"])
@pytest.mark.parametrize("size", [1, N])
def test_all_computers_factor_alike(computer, size):
    model, batch = build("positions")
    batch = batches.select(batch, slice(0, size))
    exact = flat(IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch))
    factored = fastproj.FactoredProjector(model, 2, 32, scale=None)
    made = resolve_gradient_computer(computer)(model, TASK)
    torch.testing.assert_close(made.project(batch, factored, 1), factored.project(exact, 1))


@modules.of(table=lambda: nn.Parameter(torch.randn(4)))
def OnDefault(self, x):
    """New tensors without a device of their own."""
    self.devices.append(torch.empty(0).device.type)
    return x * self.table


def test_what_is_run_again_has_the_default_device_of_the_first_time():
    """A model may leave its new tensors to torch.set_default_device("cuda")."""
    layer = OnDefault()
    layer.devices = []
    model = nn.Sequential(layer, nn.Linear(4, 3))
    with torch.device("meta"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(
            (torch.randn(N, 4, device="cpu"), torch.arange(N, device="cpu") % 3)
        )
    assert set(layer.devices) == {"meta"}


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("r", [2, 4, 6])
def test_conv1d_of_transformers_is_factored(r, shape, monkeypatch):
    """GPT-2's layer, W [I, O] = [4, 6]: both sides are compressed, one, and none."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(6, 4)
    model = Classifier(layer, 6).double().eval()
    batch = (floats(*shape), torch.arange(N) % CLASSES)
    exact = flat(IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch))
    monkeypatch.setattr(recorder, "local_gradients", None)
    factored = fastproj.FactoredProjector(model, r, 32, seed=4, scale=None)
    found = HookGradientComputer(model, TASK).project(batch, factored, 2)
    torch.testing.assert_close(found, factored.project(exact, 2))
    plain = Projector(exact.shape[1], 32, 4, "sjlt", scale=None).project(exact, 2)
    assert torch.allclose(found, plain) == (r == 6)


def test_a_factored_layer_is_not_formed_but_to_be_checked(monkeypatch):
    """Of a second batch like the first, no piece is as wide as a layer's gradient."""
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32) for _ in range(6)), nn.Linear(32, 3))
    batch = (floats(32).float(), torch.arange(N) % CLASSES)
    factored = fastproj.FactoredProjector(model, 4, 32, scale=None)
    factored.outer = Recorded(factored.inner_dim, 32, kind="sjlt", scale=None)
    computer = HookGradientComputer(model, TASK)
    first = computer.project(batch, factored, 0)
    factored.outer.seen.clear()
    monkeypatch.setattr(hooks, "worth_a_proof", lambda _: False)
    monkeypatch.setattr(parts.Product, "pieces", None)
    assert torch.equal(computer.project(batch, factored, 0), first)
    assert factored.outer.seen == [(N, factored.inner_dim)]  # those of all layers wait for one call


@pytest.mark.parametrize("lacking", [None, "2.weight"])
@pytest.mark.parametrize("numbers", [1, 20, 50, 100])
def test_gradients_that_wait_for_each_other_are_projected_once_each(numbers, lacking, monkeypatch):
    """However many numbers wait, and with a gap: sums of integers are exact in any order."""
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 3))
    values = torch.Generator().manual_seed(0)
    grads = {
        name: torch.randint(-3, 4, (N, *p.shape), generator=values).float() * (name != lacking)
        for name, p in model.named_parameters()
    }
    factored = fastproj.FactoredProjector(model, 4, 32, scale=None)
    exact = factored.project(grads)
    factored.outer = Recorded(factored.inner_dim, 32, kind="sjlt", scale=None)
    monkeypatch.setattr(sinks, "GATHERED", numbers)
    sink = sinks.ProjectingSink(dict(model.named_parameters()), N, factored, 0, {})
    for name in reversed(grads):
        if name != lacking:
            sink.add(name, parts.Piece(0, grads[name].flatten(1)))
    sink.flush()
    assert torch.equal(sink.out, exact)
    if lacking is None:
        assert all(shape[1] >= numbers for shape in factored.outer.seen[:-1])


def one_sample(model):
    """A batch of one, a FactoredProjector, a computer, and the features by autograd's gradient."""
    batch = (floats(32).float()[:1], torch.zeros(1, dtype=torch.long))
    factored = fastproj.FactoredProjector(model, 4, 32)
    computer = HookGradientComputer(model, TASK)
    return batch, factored, computer, factored.project(computer.compute_rows(batch)[0])


def test_a_factored_layer_of_one_sample_is_not_formed(monkeypatch):
    """Its features are those of autograd's gradient, which was compared in the first batch."""
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(32, 32) for _ in range(3)), nn.Linear(32, 3))
    batch, factored, computer, exact = one_sample(model)
    for _ in range(3):
        computer.compute_loss_grad(batch)
        torch.testing.assert_close(computer.project(batch, factored, 0), exact)
        monkeypatch.setattr(hooks, "worth_a_proof", lambda _: False)
        monkeypatch.setattr(hooks, "whole_pieces", None)
        monkeypatch.setattr(parts.Product, "pieces", None)


def test_one_sample_that_hooks_cannot_follow_is_factored_all_the_same(caplog):
    """The plan takes batches of two and three; a model for one sample at a time takes neither."""

    class OneByOne(nn.Linear):
        def forward(self, x):
            assert len(x) == 1, "one sample at a time"
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), OneByOne(32, 3))
    batch, factored, computer, exact = one_sample(model)
    for _ in range(2):
        computer.compute_loss_grad(batch)
        assert torch.equal(computer.project(batch, factored, 0), exact)
    assert caplog.text.count("one sample at a time") == 1


def test_embeddings_stay_sparse():
    """Only rows that are looked up are projected, each for the samples that look it up."""
    model = Classifier(nn.Embedding(1000, 6), 6).eval()
    x = torch.tensor([[5, 5, 7, 8], [7, 8, 7, 8], [999, 5, 0, 0]])
    batch = (x, torch.tensor([0, 1, 2]))
    projector = Recorded(sum(p.numel() for p in model.parameters()), 8, scale=None)
    HookGradientComputer(model, TASK).project(batch, projector, 0)
    table = [shape for shape in projector.seen if shape != (3, 18) and shape != (3, 3)]
    # token 0 of sample 2; 5 of samples 0 and 2; 7 and 8 of samples 0 and 1, together; 999 of 2
    assert sorted(table) == sorted([(1, 6), (2, 6), (2, 12), (1, 6)])


def test_a_shared_layer_is_projected_once():
    model, batch = build("twice")
    projector = Recorded(sum(p.numel() for p in model.parameters()), 8, scale=None)
    HookGradientComputer(model, TASK).project(batch, projector, 0)
    assert sorted(shape[1] for shape in projector.seen) == [3, 4, 12, 16]


class Repeated(nn.Module):
    """A weight [16, 16] in calls of different lengths: of a linear layer, of another without a
    bias, of GPT-2's layer, which transposes it, and of an embedding. A convolution is called twice.
    """

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.linear = nn.Linear(16, 16)
        self.other = nn.Linear(16, 16, bias=False)
        self.transposed = transformers.pytorch_utils.Conv1D(16, 16)
        self.words = nn.Embedding(16, 16)
        self.places = nn.Conv1d(16, 16, 2)
        self.rare = nn.Linear(16, 16)
        self.other.weight = self.transposed.weight = self.words.weight = self.linear.weight

    def forward(self, ids):  # [B, 3]
        h = self.words(ids)
        h = torch.tanh(self.linear(h)) + self.linear(h[:, :1])
        for _ in range(2):
            h = torch.tanh(self.places(h.transpose(1, 2)).transpose(1, 2))  # [B, 2, 16], [B, 1, 16]
        h = h[:, 0]
        return self.transposed(torch.tanh(self.other(self.linear(h)))) + self.rare(self.rare(h))


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
@pytest.mark.parametrize("factored", [None, 4])
@pytest.mark.parametrize("most", ["factors", "sums", "neither"])
def test_calls_of_different_lengths_have_one_gradient(most, factored, kind, monkeypatch):
    """Against torch.func, whatever is kept of the calls until the last one; also of a part of the
    batch.
    """
    torch.manual_seed(0)
    model = Classifier(Repeated(), 16).double().eval()
    batch = torch.randint(0, 16, (N, 3)), torch.arange(N) % CLASSES
    if most == "factors":
        monkeypatch.setattr(sinks, "KEPT_SHARE", 100.0)
    if most == "sums":
        monkeypatch.setattr(sinks, "KEPT_SHARE", 0.0)
    if most == "neither":
        monkeypatch.setattr("fastproj.trak.gradients.base.GRAD_BYTES", 1)
    size = sum(p.numel() for p in model.parameters())
    projector = Projector(size, 32, kind=kind)
    if factored:
        projector = fastproj.FactoredProjector(model, factored, 32, kind=kind)
    exact = FunctionalGradientComputer(model, TASK).compute_per_sample_grad(batch)
    computer = HookGradientComputer(model, TASK)
    for rows in (slice(0, N), slice(0, 2), slice(2, N), slice(0, N)):
        found = computer.project(batches.select(batch, rows), projector, 3)
        wanted = projector.project({name: g[rows] for name, g in exact.items()}, 3)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kernel", [False, True])
def test_many_short_calls_are_projected_as_one_product(kernel, monkeypatch):
    """A kernel that forms and projects at once is given it, too."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    model = nn.Sequential(
        *[part for _ in range(4) for part in (layer, nn.Tanh())], nn.Linear(16, 3)
    )
    batch = floats(16).float(), torch.arange(N) % CLASSES
    projector = Recorded(sum(p.numel() for p in model.parameters()), 32, kind="sjlt")
    given = []

    def add_product(left, right, model_id, *, row_offset, out):
        given.append((left.shape, right.shape))
        grads = torch.einsum("btm,btn->bmn", left, right).flatten(1)
        projector.project(grads, model_id, row_offset=row_offset, out=out, accumulate=True)
        return True

    if kernel:
        monkeypatch.setattr(projector, "add_product", add_product)
    computer = HookGradientComputer(model, TASK)
    exact = projector.project(flat(computer.compute_per_sample_grad(batch)), 0)
    projector.seen = []
    torch.testing.assert_close(computer.project(batch, projector, 0), exact)
    assert [shape for shape in projector.seen if shape[1] == 256] == [(N, 256)]
    if kernel:
        assert given[-1] == ((N, 4, 16), (N, 4, 16))


@pytest.mark.parametrize("lengths", [(1, 1), (1, 2)])  # the last goes into a sum where 3 may come
@pytest.mark.parametrize("uses", [2, 3])
def test_what_is_kept_of_a_product_is_a_copy_and_not_lost(uses, lengths):
    """Where fewer parts come than might have, and where factors are written to later."""
    model = nn.Linear(16, 16, bias=False)
    projector = Projector(256, 32, kind="sjlt")
    sink = sinks.ProjectingSink({"weight": model.weight}, N, projector, 0, {"weight": uses})
    exact = torch.zeros(N, 256)
    for length in lengths:
        left, right = floats(length, 16).float(), floats(length, 16).float().cos()
        exact += torch.einsum("btm,btn->bmn", left, right).flatten(1)
        sink.add("weight", parts.Product(left, right, parts.Workspace()))
        left.zero_()
        right.zero_()
    assert bool(sink.kept) == (uses == 3)
    assert bool(sink.sums) == (uses == 3 and lengths == (1, 2))
    sink.flush()
    torch.testing.assert_close(sink.out, projector.project(exact, 0))
    assert not sink.kept
    assert not sink.sums


def test_the_model_is_left_as_it_was():
    model, batch = build("encoder-layer")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.backends.mha.set_fastpath_enabled(True)
    HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@modules.of(seed=0, words=lambda: nn.Linear(4, 5))
def OfTexts(self, texts):
    counts = [[float(text.count(letter)) for letter in "abcd"] for text in texts]
    return self.words(torch.tensor(counts, device=self.words.weight.device))


def margin_of_texts(model, batch):
    return margins(model(batch[0]), batch[1])


def test_few_plans_are_kept_of_batches_that_have_one_each(tmp_path, monkeypatch):
    """Of a list of texts the shapes within the model aren't known."""
    monkeypatch.setattr(hooks, "PLANS", 2)
    texts = [first + second for first in "abcd" for second in "abc"]
    model, labels = OfTexts(), torch.arange(12) % 5
    traker = cases.loaded(model, tmp_path, 12, margin_of_texts, gradient_computer="hooks")
    for rows in torch.arange(12).split(3):
        batch = [texts[row] for row in rows], labels[rows]
        traker.featurize(batch, num_samples=3)
        assert 1 <= len(traker.gradient_computer._plans) <= 2
    loop = cases.loaded(model, tmp_path / "loop", 12, margin_of_texts, gradient_computer="loop")
    loop.featurize((texts, labels), num_samples=12)
    torch.testing.assert_close(traker.saver.matrix(0), loop.saver.matrix(0))


@modules.of(fc=lambda: nn.Linear(4, 4), norm=lambda: nn.BatchNorm1d(4, track_running_stats=False))
def Mixing(self, x):
    """Batch statistics in eval mode: a sample's output depends on the batch."""
    return self.norm(self.fc(x).unsqueeze(-1).expand(-1, -1, 3) * torch.arange(1, 4)).mean(2)


@modules.of(fc=lambda: nn.Linear(4, 4))
def Elsewhere(self, x):
    """A weight that is also used where no hook sees it."""
    return torch.tanh(self.fc(x)) @ self.fc.weight


UNFIT = {"mixing": Mixing, "elsewhere": Elsewhere}


@pytest.mark.parametrize("name", UNFIT)
def test_what_hooks_cannot_see_is_refused_and_automatic_goes_on_without_them(name):
    torch.manual_seed(0)
    model = Classifier(UNFIT[name](), 4).double().eval()
    batch = (floats(4), torch.arange(N) % CLASSES)
    with pytest.raises(HooksError, match=r"layer\.(fc|norm)"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    automatic = AutomaticGradientComputer(model, TASK)
    with pytest.warns(UserWarning, match="'hooks' can't take this model"):
        grads = automatic.compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(grads), flat(exact))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        automatic.compute_per_sample_grad(batch)


@modules.of(seed=0, words=lambda: nn.Embedding(9, 4), body=lambda: nn.Linear(4, 4))
def Reads(self, ids):
    """A table that is also an output layer, by a function that reads it."""
    return F.linear(torch.tanh(self.body(self.words(ids))).mean(1), self.words.weight)


class Shares(Reads):
    """The same by a module that shares it."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.words(ids))).mean(1))


def test_a_weight_that_is_read_elsewhere_is_named_with_a_cure_that_is_right(tmp_path):
    """What the warning asks for gives the same scores, in the same save_dir too."""
    batch = torch.randint(0, 9, (N, 3)), torch.arange(N)
    before, after = Reads().double().eval(), Shares().double().eval()
    said = (
        r"by 'words\.weight' .* \(use a module that shares it, such as nn\.Linear for F\.linear\)"
    )
    first = cases.loaded(before, tmp_path, N, proj_dim=16, lambda_reg=1.0)
    with pytest.warns(UserWarning, match=said):
        first.featurize(batch, num_samples=N)
    assert first.gradient_computer.name == "func"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in (tmp_path, tmp_path / "new"):
            cured = cases.loaded(after, folder, N, proj_dim=16, lambda_reg=1.0)
            cured.featurize(batch, num_samples=N)
            assert cured.gradient_computer.name == "hooks"
            found = cured.saver.matrix(0)
            torch.testing.assert_close(found, first.saver.matrix(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "table",
    [
        lambda: nn.Embedding(4, 6, scale_grad_by_freq=True),
        lambda: nn.EmbeddingBag(4, 6, mode="sum", scale_grad_by_freq=True),
    ],
)
@pytest.mark.parametrize("factored", [False, True])
def test_frequencies_are_counted_within_a_sample(table, factored):
    """Autograd would count those of all samples that it differentiates together."""
    torch.manual_seed(0)
    model = Classifier(table(), 6).double().eval()
    exact = IterativeGradientComputer(model, TASK)
    computers = [kind(model, TASK) for kind in (FunctionalGradientComputer, HookGradientComputer)]
    size = exact.chosen["layer.weight"].numel() + exact.chosen["head.weight"].numel() + CLASSES
    projector = Projector(size, 32, seed=4)
    if factored:
        projector = fastproj.FactoredProjector(model, 2, 32, seed=4)
    for _ in range(4):  # of which three are checked
        batch = torch.randint(0, 4, (9, 5)), torch.arange(9) % CLASSES
        for computer in computers:
            torch.testing.assert_close(
                computer.project(batch, projector, 0), exact.project(batch, projector, 0)
            )


class OneSample(AbstractModelOutput):
    """A task in trak's form, that looks at values."""

    def get_output(self, model, weights, buffers, image, label):
        logits = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))[0]
        return logits[label] if bool(logits[label] > 0) else 2 * logits[label]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[1]))


def test_automatic_ends_at_the_loop():
    model, batch = build("linear")
    with pytest.raises(HooksError, match="outputs"):
        HookGradientComputer(model, OneSample())
    automatic = AutomaticGradientComputer(model, OneSample())
    assert automatic.name == "func"
    with pytest.warns(UserWarning, match="'func' can't take this model, 'loop' is used"):
        grads = automatic.compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, OneSample()).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(grads), flat(exact))


def test_a_bad_batch_does_not_cost_the_hooks():
    model, batch = build("linear")
    automatic = AutomaticGradientComputer(model, TASK)
    with pytest.raises(RuntimeError, match="shape"):
        automatic.compute_per_sample_grad((batch[0][:, :2], batch[1]))
    assert automatic.name == "hooks"
    automatic.compute_per_sample_grad(batch)
    assert automatic.name == "hooks"
    with pytest.raises(RuntimeError, match="shape"):
        automatic.compute_per_sample_grad((batch[0][:, :2], batch[1]))
    assert automatic.name == "hooks"


def test_a_new_checkpoint_is_checked_anew():
    model, batch = build("linear")
    automatic = AutomaticGradientComputer(model, TASK)
    automatic.compute_per_sample_grad(batch)
    model.layer.forward = lambda x: F.linear(x, model.layer.weight) * 2 + model.head.weight[0, 0]
    automatic.load_model_params(model)
    with pytest.warns(UserWarning, match="head.weight"):
        grads = automatic.compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(grads), flat(exact))


def test_a_first_sample_of_nan_is_left_to_the_estimator():
    model, batch = build("conv2d")
    images = batch[0].clone()
    images[0, 0, 0, 0] = torch.nan
    grads = flat(HookGradientComputer(model, TASK).compute_per_sample_grad((images, batch[1])))
    assert not torch.isfinite(grads[0]).all()
    exact = flat(IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch))
    torch.testing.assert_close(grads[1:], exact[1:])


def test_after_a_first_sample_of_nan_the_next_is_checked():
    torch.manual_seed(0)
    model = Classifier(Elsewhere(), 4).double().eval()
    x, labels = floats(4), torch.arange(N) % CLASSES
    computer = HookGradientComputer(model, TASK)
    computer.compute_per_sample_grad((x * torch.nan, labels))
    with pytest.raises(HooksError, match=r"layer\.fc"):
        computer.compute_per_sample_grad((x, labels))


@modules.of(usual=lambda: nn.Linear(4, 4), rare=lambda: nn.Linear(4, 4))
def Experts(self, x):
    """A layer that only some samples go through; the first does not."""
    out = self.usual(x)
    chosen = x[:, 0] > 1e3
    if bool(chosen.any()):
        out = out + self.rare(x) * chosen.unsqueeze(1)
    return out


def test_a_layer_that_the_first_samples_do_not_use_is_not_forgotten():
    torch.manual_seed(0)
    model = Classifier(Experts(), 4).double().eval()
    x, labels = floats(4), torch.arange(N) % CLASSES
    other = x.clone()
    other[2, 0] = 2e3
    computer = HookGradientComputer(model, TASK)
    for _ in range(2):
        grads = computer.compute_per_sample_grad((x, labels))
        assert not grads["layer.rare.weight"].any()
    with pytest.raises(HooksError, match=r"layer\.rare was called more often"):
        computer.compute_per_sample_grad((other, labels))
    automatic = AutomaticGradientComputer(model, TASK)
    for _ in range(2):
        automatic.compute_per_sample_grad((x, labels))
    with pytest.warns(UserWarning, match="'loop' is used instead"):
        found = automatic.compute_per_sample_grad((other, labels))
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad((other, labels))
    torch.testing.assert_close(flat(found), flat(exact))


def test_whole_model_runs_are_said(caplog):
    """A parameter of the model itself, here `gain`, leaves only torch.func on the whole model."""
    model, batch = cases.net(dtype=torch.float64), cases.data(4, dtype=torch.float64)
    HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert "'gain' takes another run of the whole model" in caplog.text


@modules.of(
    blocks=lambda: nn.ModuleList(cases.net(seed) for seed in range(2)),
    temperature=lambda: nn.Parameter(torch.tensor(1.5)),
    scales=lambda: nn.ParameterList(nn.Parameter(torch.tensor(1.0 + i)) for i in range(4)),
)
def Scaled(self, x):
    """Scalar parameters of blocks, of the model and of a list."""
    out = sum(scale * block(x) for scale, block in zip(self.scales, self.blocks, strict=False))
    return out * self.temperature + self.scales[2] - self.scales[3] * out


def test_scalar_parameters_are_said_once_for_all_batches_and_checkpoints(tmp_path, caplog):
    """Once for a TRAKer, in one message."""
    model, train = Scaled().eval(), cases.data(12)
    traker = cases.make(model, tmp_path, 12)
    for model_id in range(3):
        cases.featurize(traker, model, model_id, train, batch=5)
    traker.finalize_features()
    for model_id in range(3):
        cases.score(traker, model, model_id, train)
    assert len([r for r in caplog.records if "takes another run" in r.getMessage()]) == 1


def test_mixed_samples_are_said_once_for_all_checkpoints(caplog):
    model = Classifier(Mixing(), 4).double().eval()
    computer = IterativeGradientComputer(model, TASK)
    for _ in range(2):
        computer.load_model_params(model)
        computer.compute_loss_grad((floats(4), torch.arange(N) % CLASSES))
    assert caplog.text.count("depend on the other samples of a batch") == 1


def test_loops_over_samples_are_said(caplog):
    model, batch = build("branches")
    HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert "vmap can't take Branches, a loop over the samples does" in caplog.text


@modules.of(bags=lambda: nn.EmbeddingBag(7, 6), head=lambda: nn.Linear(6, CLASSES))
def Offsets(self, x):
    """Bags of one long list of words, by where each begins."""
    return self.head(self.bags(x.flatten(), torch.arange(0, x.numel(), x.shape[1])))


def test_modules_that_cannot_take_one_sample_are_named(tmp_path):
    """Offsets of a batch say nothing of a sample's own words."""
    model, batch = Offsets().eval(), (ids(7, 4), torch.arange(N) % CLASSES)
    with pytest.raises(HooksError, match="EmbeddingBag can't take what belongs to one sample"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    traker = cases.loaded(model, tmp_path, N, proj_dim=16, lambda_reg=1.0)
    with pytest.warns(UserWarning, match="'func' is used.*EmbeddingBag can't take"):
        traker.featurize(batch, num_samples=N)
    exact = cases.loaded(
        model, tmp_path / "exact", N, proj_dim=16, lambda_reg=1.0, gradient_computer="loop"
    )
    exact.featurize(batch, num_samples=N)
    torch.testing.assert_close(traker.saver.matrix(0), exact.saver.matrix(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model, (x, labels) = build("encoder-layer")
    exact = flat(IterativeGradientComputer(model, TASK).compute_per_sample_grad((x, labels)))
    model.to(dtype)
    projector = Projector(exact.shape[1], 16, scale=None)
    features = HookGradientComputer(model, TASK).project((x.to(dtype), labels), projector, 0)
    assert features.dtype == torch.float32
    truth = exact @ fastproj.matrix(exact.shape[1], 16, dtype=torch.float64)
    assert float((features - truth).norm() / truth.norm()) < 60 * torch.finfo(dtype).eps


def test_names_of_computers():
    assert resolve_gradient_computer("hooks") is HookGradientComputer
    assert resolve_gradient_computer("func") is FunctionalGradientComputer
    assert resolve_gradient_computer("loop") is IterativeGradientComputer
    assert resolve_gradient_computer(None) is AutomaticGradientComputer
    assert resolve_gradient_computer(FunctionalGradientComputer) is FunctionalGradientComputer
    with pytest.raises(ValueError, match="'vmap'; expected 'auto', 'hooks', 'func', 'loop'"):
        resolve_gradient_computer("vmap")


# ---- what is checked, and when -------------------------------------------------------------------


class Mixed(nn.Module):
    """A layer, and then what ``mix`` makes of its outputs [B, 4], the weight and the inputs."""

    def __init__(self, mix):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.mix = mix

    def forward(self, x):
        return self.mix(torch.tanh(self.fc(x)), self.fc.weight, x)


def large(x):
    return (x[:, :1] > 1).to(x.dtype)  # [B, 1]


# Each leaves the first sample of a batch alone.
BEYOND_THE_FIRST = {
    "neighbours": lambda h, w, x: torch.cat([h[:1], h[1:] + 0.3 * h[1:].flip(0)]),
    "constants of the batch": lambda h, w, x: h + (h - h.mean(0)).detach() * (x != x[:1]),
    "a weight used elsewhere": lambda h, w, x: h + large(x) * (x @ w),
    "a weight used twice": lambda h, w, x: h + large(x) * F.linear(x, w),
}


def inputs(seed, rows):
    """Inputs of which some rows pass for ``large``."""
    x = torch.randn(N, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 0] = 0
    x[rows, 0] = 2
    return x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BEYOND_THE_FIRST)
def test_samples_other_than_the_first_are_checked(name, seed):
    torch.manual_seed(seed)
    model = Classifier(Mixed(BEYOND_THE_FIRST[name]), 4).double().eval()
    batch = (inputs(seed, slice(1, N)), torch.arange(N) % CLASSES)
    with pytest.raises(HooksError, match=r"layer.*samples mixed"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    with pytest.warns(UserWarning, match="'hooks' can't take this model"):
        grads = AutomaticGradientComputer(model, TASK).compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, TASK).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(grads), flat(exact))


@pytest.mark.parametrize(("receiver", "giver"), list(permutations(range(N), 2)))
def test_any_two_samples_that_are_mixed_are_noticed(receiver, giver):
    def mix(h, w, x):
        takes, gives = (x[:, 0] == 2).to(h.dtype), (x[:, 0] == 3).to(h.dtype)
        return h + 0.3 * takes.outer(gives) @ h

    torch.manual_seed(0)
    model = Classifier(Mixed(mix), 4).double().eval()
    x = inputs(0, [])
    x[receiver, 0], x[giver, 0] = 2, 3
    with pytest.raises(HooksError, match=r"layer\.fc"):
        HookGradientComputer(model, TASK).compute_per_sample_grad((x, torch.arange(N) % CLASSES))


def when_large(usual, other):
    return lambda h, w, x: other(h, w, x) if bool(large(x).any()) else usual(h, w, x)


@pytest.mark.parametrize("name", BEYOND_THE_FIRST)
def test_another_graph_is_checked_anew(name):
    """The second batch takes a branch that the first didn't."""
    torch.manual_seed(0)
    model = Classifier(Mixed(when_large(lambda h, w, x: h, BEYOND_THE_FIRST[name])), 4)
    model.double().eval()
    labels = torch.arange(N) % CLASSES
    computer = HookGradientComputer(model, TASK)
    computer.compute_per_sample_grad((inputs(0, []), labels))
    with pytest.raises(HooksError, match=r"layer\.fc"):
        computer.compute_per_sample_grad((inputs(0, slice(1, N)), labels))
    computer.compute_per_sample_grad((inputs(1, []), labels))


@modules.of(one=lambda: nn.Linear(4, 4), two=lambda: nn.Linear(4, 4))
def Either(self, x):
    """Two layers that are both called, one of which is used: which, hangs on the batch."""
    return (self.one(x), self.two(x))[int(bool(large(x).any()))]


def test_a_layer_that_a_later_batch_uses_is_seen(monkeypatch):
    """Also where nothing but the first batch is checked."""
    monkeypatch.setattr(hooks, "worth_a_proof", lambda number: number == 1)
    torch.manual_seed(0)
    model = Classifier(Either(), 4).double().eval()
    labels = torch.arange(N) % CLASSES
    computer, loop = HookGradientComputer(model, TASK), IterativeGradientComputer(model, TASK)
    for x in (inputs(0, []), inputs(0, range(N)), inputs(1, [])):
        found = computer.compute_per_sample_grad((x, labels))
        torch.testing.assert_close(flat(found), flat(loop.compute_per_sample_grad((x, labels))))


def test_after_a_single_sample_the_first_batch_of_several_is_checked():
    torch.manual_seed(0)
    model = Classifier(Mixed(lambda h, w, x: h + 0.3 * h.roll(1, 0) * (len(x) > 1)), 4)
    model.double().eval()
    x, labels = floats(4), torch.arange(N) % CLASSES
    computer = HookGradientComputer(model, TASK)
    computer.compute_per_sample_grad((x[:1], labels[:1]))
    with pytest.raises(HooksError, match=r"layer\.fc"):
        computer.compute_per_sample_grad((x, labels))


def test_random_numbers_are_noticed():
    torch.manual_seed(0)
    model = Classifier(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), 4).double().train()
    with pytest.raises(RandomNumbersError, match="random numbers"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(
            (floats(4), torch.arange(N) % CLASSES)
        )


class Counted(nn.Module):
    """Counts the samples that come by."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.samples = 0
        self.branch = 0

    def forward(self, x):
        self.samples += len(x)
        h = self.fc(x)
        for _ in range(self.branch):
            h = torch.tanh(h)
        return h


def test_the_check_costs_a_batch_once_for_each_structure(caplog):
    torch.manual_seed(0)
    layer = Counted()
    model = Classifier(layer, 4).double().eval()
    x, labels = floats(4).repeat(40, 1), torch.arange(40 * N) % CLASSES
    computer = HookGradientComputer(model, TASK)

    def samples(size=40 * N):
        layer.samples = 0
        computer.compute_per_sample_grad((x[:size], labels[:size]))
        return layer.samples - size

    first = samples()
    assert len(x) <= first < 1.2 * len(x)  # each sample once more, and a few to find dimensions
    later = [samples() for _ in range(2, 40)]
    assert [n for n, cost in enumerate(later, 2) if cost] == [2, 4, 8, 16, 32]
    assert set(later) == {0, len(x)}
    assert samples(7) == 7
    assert samples(7) == 0
    assert samples(1) == 0  # plain autograd itself
    computer.load_model_params(model)
    assert samples() == first
    assert "control flow" not in caplog.text
    for layer.branch in range(1, 40):  # every batch with another graph
        assert samples() >= len(x)
    layer.branch = 5
    assert samples() == 0
    said = [r for r in caplog.records if "control flow that no batch before had" in r.getMessage()]
    assert len(said) == 1
