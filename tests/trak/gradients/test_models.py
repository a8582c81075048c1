"""Models of many kinds under each gradient computer: what plain autograd says, sample by sample."""

from __future__ import annotations

import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastproj.trak import (
    CausalLMModelOutput,
    FunctionalGradientComputer,
    HookGradientComputer,
    ImageClassificationModelOutput,
    IterativeGradientComputer,
    Seq2SeqModelOutput,
)
from tests.trak import cases, modules

TASK = ImageClassificationModelOutput()
SIZES = (5, 4, 1, 3)


class Model(nn.Module):
    """Parts, what ``call`` makes of them and inputs [B, 3, 4], and a head on the mean."""

    def __init__(self, parts, call):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = call
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.call(self.parts, x).flatten(1)
        return self.head(h.unflatten(1, (-1, 4)).mean(1).tanh())


class Square(torch.autograd.Function):
    """A function with its own backward, which ``torch.func`` can't follow."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Scaled(nn.Module):
    def __init__(self, scale_of):
        super().__init__()
        self.w = nn.Parameter(torch.rand(4))
        self.scale_of = scale_of

    def forward(self, x):
        return self.scale_of(self, x)


def linear():
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}


def tied():
    parts = linear()
    parts["b"].weight = parts["a"].weight
    return parts


def one_module_twice():
    layer = nn.Linear(4, 4)
    return {"a": layer, "b": layer}


def hooked():
    parts = linear()
    parts["a"].register_forward_hook(lambda m, args, out: 2 * out + args[0])
    parts["b"].register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    return parts


def weight_in_hook():
    parts = linear()
    parts["a"].register_forward_hook(lambda m, args, out: out @ m.weight)
    return parts


def positions():
    return {"a": nn.Linear(4, 4), "p": nn.Embedding(3, 4)}


def images():
    parts = {
        "conv": nn.Conv2d(1, 4, 2, padding=1),
        "batch": nn.BatchNorm2d(4),
        "group": nn.GroupNorm(2, 4),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "grouped": nn.Conv2d(4, 4, (1, 2), groups=2, padding=(0, 1), padding_mode="circular"),
    }
    parts["batch"].running_mean.normal_()
    parts["batch"].running_var.uniform_(0.5, 2)
    return parts


def of_images(p, x):
    h = p["instance"](p["group"](p["batch"](p["conv"](x.reshape(-1, 1, 2, 2)))))
    return p["grouped"](h).mean((2, 3)).view(len(x), -1, 4)


def batch_norm():
    layer = nn.BatchNorm1d(4)
    layer.running_mean.normal_()
    return {"a": layer}


def place(p):
    return p["p"](torch.arange(3).unsqueeze(0))  # [1, 3, 4]


def changes_input(p, x):
    x.sub_(x.mean(-1, keepdim=True) + 0.5)
    return p["a"](x)


def changes_later(p, x):
    h = p["a"](x)
    h = h + p["b"](F.relu(x, inplace=True))
    return h + x


def no_grad(p, x):
    with torch.no_grad():
        h = p["a"](x)
    return p["b"](h) + p["a"](x)


def tensor_hook(p, x):
    h = p["a"](x)
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    return p["b"](h)


def differentiates_inputs(p, x):
    with torch.enable_grad():
        x = x.requires_grad_()
        return p["a"](x).tanh()


def forces(p, x):
    """As of an energy, by which a loss of forces is trained."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(p["a"](x).tanh().sum(), x, create_graph=True)
    return slope


def direction(p, x):
    """A gradient that counts as a constant."""
    x = x.detach().requires_grad_()
    y = p["a"](x).tanh()
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return y + slope


def reentrant(p, x):
    return checkpoint(p["a"], x.requires_grad_(), use_reentrant=True).tanh() + p["b"](x)


def recurrent(kind):
    return lambda: {"a": nn.Linear(4, 4), "r": kind(4, 4, batch_first=True)}


def two_cells(p, x):
    h = p["r"](x[:, 0])
    return p["r"](x[:, 1], h)[0]


def three_outputs(self, x):
    h = x * self.w
    return h, h.tanh(), h


def sorted_rows(p, x):
    order = x.sum((1, 2)).argsort()
    return p["a"](x[order])[order.argsort()]


def by_chance(p, x):
    return p["a"](x) if bool(x.sum() > 0) else p["b"](x)


MODELS = {
    "inputs changed in place": (linear, changes_input),
    "hidden changed in place": (linear, lambda p, x: p["b"](F.relu(p["a"](x), inplace=True))),
    "no_grad": (linear, no_grad),
    "views": (linear, lambda p, x: p["b"](p["a"](x)[:, :2].transpose(0, 1).transpose(0, 1))),
    "user's hooks": (hooked, lambda p, x: p["b"](p["a"](x))),
    "weight in a hook": (weight_in_hook, lambda p, x: p["b"](p["a"](x))),
    "tensor hook": (linear, tensor_hook),
    "tied": (tied, lambda p, x: p["b"](p["a"](x).tanh())),
    "one module twice": (one_module_twice, lambda p, x: p["b"](p["a"](x).tanh())),
    "orthogonal": (
        lambda: {"a": nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))},
        lambda p, x: p["a"](x),
    ),
    "functional": (linear, lambda p, x: F.linear(x, p["a"].weight) + p["b"](x)),
    "functional as well": (linear, lambda p, x: F.linear(x, p["a"].weight) + p["a"](x)),
    "normalised weight": (
        linear,
        lambda p, x: F.linear(x, F.normalize(p["a"].weight, dim=1)) + p["b"](x),
    ),
    "weight decay": (linear, lambda p, x: p["a"](x) + p["a"].weight.square().sum()),
    "custom function": (linear, lambda p, x: p["b"](Square.apply(p["a"](x)))),
    "custom function of a parameter": (
        lambda: {"s": Scaled(lambda self, x: Square.apply(x * self.w))},
        lambda p, x: p["s"](x),
    ),
    "several outputs": (
        lambda: {"s": Scaled(three_outputs)},
        lambda p, x: sum(i * t for i, t in enumerate(p["s"](x), 1)),
    ),
    "time-major folded": (
        linear,
        lambda p, x: p["a"](x.transpose(0, 1).reshape(-1, 4)).view(3, -1, 4).transpose(0, 1),
    ),
    "folded images": (images, of_images),
    "folded batch norm": (batch_norm, lambda p, x: p["a"](x.reshape(-1, 4)).view(x.shape)),
    "positions broadcast": (positions, lambda p, x: p["a"](x + place(p))),
    "positions repeated": (positions, lambda p, x: p["a"](x + place(p).repeat(len(x), 1, 1))),
    "positions expanded": (positions, lambda p, x: p["a"](x + place(p).expand(len(x), -1, -1))),
    "positions concatenated": (positions, lambda p, x: p["a"](x + torch.cat([place(p)] * len(x)))),
    "positions row 0": (positions, lambda p, x: p["a"](x + place(p)[0])),
    "positions averaged": (positions, lambda p, x: p["a"](x + place(p).mean(0))),
    "positions summed": (positions, lambda p, x: p["a"](x + place(p).sum(0))),
    "sorted": (linear, sorted_rows),
    "row by row": (linear, lambda p, x: torch.stack([p["a"](row) for row in x])),
    "batch mean": (linear, lambda p, x: p["a"](x) - p["a"](x).mean(0, keepdim=True)),
    "inputs differentiated": (linear, differentiates_inputs),
    "forces": (linear, forces),
    "gradient as a constant": (linear, direction),
    "checkpoint": (linear, lambda p, x: checkpoint(p["a"], x, use_reentrant=False).tanh()),
    "checkpoint of layers": (
        lambda: {"a": nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), "b": nn.Tanh()},
        lambda p, x: checkpoint(p["a"], p["b"](x), use_reentrant=False),
    ),
    "reentrant checkpoint": (linear, reentrant),
    "lstm": (recurrent(nn.LSTM), lambda p, x: p["r"](p["a"](x))[0]),
    "lstm's states": (
        recurrent(nn.LSTM),
        lambda p, x: p["r"](x)[1][0][0] + p["r"](p["a"](x))[1][1][0],
    ),
    "gru": (recurrent(nn.GRU), lambda p, x: p["r"](p["a"](x))[0]),
    "lstm cell": (lambda: {"r": nn.LSTMCell(4, 4)}, two_cells),
    "object of its own": (
        lambda: {"s": Scaled(lambda self, x: SimpleNamespace(h=x * self.w)), **linear()},
        lambda p, x: p["b"](p["s"](p["a"](x)).h),
    ),
    "attention": (
        lambda: {"r": nn.MultiheadAttention(4, 2, batch_first=True)},
        lambda p, x: p["r"](x, x, x)[0] + p["r"](x, x, x)[1] @ x,
    ),
}
# Where hooks can't, and "auto" goes on.
UNHOOKED = {
    "weight in a hook",
    "tensor hook",
    "functional as well",
    "weight decay",
    "time-major folded",
    "sorted",
    "batch mean",
    "forces",
}


def build(name, dtype=torch.float64):
    parts, call = MODELS[name]
    torch.manual_seed(0)
    model = Model(parts(), call).to(dtype).eval()
    x = torch.randn(sum(SIZES), 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    return model, (x, torch.arange(len(x)) % 3)


def truth(model, batch):
    """float64 [n, P], by ``backward`` of one sample after another."""
    model = copy.deepcopy(model).double()
    rows = []
    for image, label in zip(*batch, strict=True):
        model.zero_grad()
        logits = model(image.double().clone().unsqueeze(0))[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        (logits[label] - others.logsumexp(0)).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def flat(grads):
    return torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)


def run(model, batch, save_dir, sizes=SIZES, **options):
    """Features of batches of some sizes, and the computer that made the last of them."""
    traker = cases.loaded(model, save_dir, len(batch[0]), **options)
    begin = 0
    for size in sizes:
        rows = slice(begin, begin + size)
        traker.featurize((batch[0][rows].clone(), batch[1][rows]), num_samples=size)
        begin += size
    return traker.saver.matrix(0), traker.gradient_computer


@pytest.mark.parametrize("sizes", [SIZES, (1, 3, 9)], ids=["several-first", "one-first"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_autograd(name, sizes, tmp_path):
    model, batch = build(name)
    exact = cases.projected(truth(model, batch), 8, 0)
    before = list(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features, computer = run(model, batch, tmp_path, sizes)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(features, exact)
    assert (computer.name == "hooks") == (name not in UNHOOKED)


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, IterativeGradientComputer])
@pytest.mark.parametrize("name", MODELS)
def test_the_other_computers_agree(name, computer):
    model, batch = build(name)
    before = list(model.parameters())
    try:
        found = computer(model, TASK).compute_per_sample_grad(batch)
    except RuntimeError:
        if computer is IterativeGradientComputer:  # which takes anything
            raise
    else:
        torch.testing.assert_close(flat(found), truth(model, batch))
    after = list(model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "computer", [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer]
)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, nn.BatchNorm3d])
def test_tokens_of_one_image(norm, computer):
    """PyTorch's backward of these norms mixes channels where the image is alone."""

    def tokens(p, x):
        h = p["norm"](x.reshape(len(x), 4, *sides)).flatten(2).transpose(1, 2)
        h = (h + p["a"](h).tanh()).transpose(1, 2).reshape(len(x), 4, *sides)
        h = p["again"](h).flatten(2).transpose(1, 2)
        return h + p["b"](h).tanh()

    torch.manual_seed(0)
    sides = (3, 1, 1) if norm is nn.BatchNorm3d else (3, 1)
    parts = {"norm": norm(4, affine=True), **linear(), "again": norm(4, affine=True)}
    model = Model(parts, tokens).double().eval()
    batch = torch.randn(4, 3, 4).double(), torch.arange(4) % 3
    found = computer(model, TASK)
    params = list(model.parameters())
    for row in range(4):
        twice = torch.tensor([row, row])
        (out, _) = TASK.outputs(model, {}, {}, (batch[0][twice], batch[1][twice]))
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(out, params)])
        one = slice(row, row + 1)
        alone = found.compute_per_sample_grad((batch[0][one], batch[1][one]))
        torch.testing.assert_close(flat(alone)[0], exact)
    if computer is HookGradientComputer:  # which compares them
        found.compute_per_sample_grad(batch)


@pytest.mark.parametrize("name", ["lstm", "lstm's states", "gru", "lstm cell", "folded images"])
def test_float32_takes_the_same_way(name, tmp_path):
    """PyTorch has other kernels for it: oneDNN's recurrent layers."""
    model, batch = build(name, torch.float32)
    exact = cases.projected(truth(model, batch), 8, 0)
    for way in ("auto", "loop"):
        features, computer = run(model, batch, tmp_path / way, gradient_computer=way)
        assert getattr(computer, "name", "hooks") == "hooks"
        torch.testing.assert_close(features.double(), exact, rtol=1e-3, atol=1e-5)


def test_a_loop_for_one_module_is_said_in_the_log_alone(tmp_path, caplog):
    model, batch = build("custom function of a parameter", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, batch, tmp_path, logging_level=logging.INFO)
    assert "vmap can't take" in caplog.text


@pytest.mark.parametrize("name", ["lstm", "lstm's states", "gru", "lstm cell"])
def test_recurrent_layers_take_no_loop_over_samples(name, tmp_path, caplog):
    model, batch = build(name)
    run(model, batch, tmp_path, logging_level=logging.INFO)
    assert "vmap can't take" not in caplog.text


@pytest.mark.parametrize("way", ["auto", "func"])
def test_what_vmap_lacks_is_no_warning_to_the_user(way, tmp_path):
    @modules.of(
        words=lambda: nn.EmbeddingBag(9, 4, mode="sum"),
        head=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    )
    def Bag(self, ids):
        return self.head(self.words(ids))

    batch = torch.arange(15).reshape(5, 3) % 9, torch.arange(5) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(Bag().eval(), batch, tmp_path, (5,), gradient_computer=way)


@pytest.mark.parametrize("size", [2, 5])
def test_folded_images_in_one_piece_and_in_many(size, monkeypatch):
    from fastproj.trak.gradients import parts

    model, batch = build("folded images")
    batch = batch[0][:size], batch[1][:size]
    exact = truth(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            flat(HookGradientComputer(model, TASK).compute_per_sample_grad(batch)), exact
        )
        monkeypatch.setattr(parts, "PIECE_BYTES", size * 8 * 5)
        monkeypatch.setattr(parts, "PATCH_BYTES", 8 * 20)
        torch.testing.assert_close(
            flat(HookGradientComputer(model, TASK).compute_per_sample_grad(batch)), exact
        )


def test_a_norm_is_called_by_the_names_of_its_arguments(tmp_path):
    def normed(p, x):
        n = p["norm"]
        h = F.batch_norm(input=x.mean(1), running_mean=n.running_mean, running_var=n.running_var)
        return p["b"](h)

    torch.manual_seed(0)
    model = Model({"norm": nn.BatchNorm1d(4, affine=False), **linear()}, normed).double().eval()
    batch = torch.randn(4, 3, 4).double(), torch.arange(4) % 3
    features, _ = run(model, batch, tmp_path, (3, 1))
    torch.testing.assert_close(features, cases.projected(truth(model, batch), 8, 0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_parts_of_torch_jit_are_left_to_other_computers(way, tmp_path):
    model, batch = build("tied")
    exact = cases.projected(truth(model, batch), 8, 0)
    layer = model.parts["b"]
    if way == "script":
        model.parts["b"] = torch.jit.script(layer)
    else:
        model.parts["b"] = torch.jit.trace(layer, torch.zeros(1, 4, dtype=torch.float64))
    with pytest.warns(UserWarning, match="'func' is used .*'parts.b' of torch.jit, which hooks"):
        features, _ = run(model, batch, tmp_path)
    torch.testing.assert_close(features, exact)
    assert not any(module._forward_hooks for module in model.modules())


# ---- later batches -------------------------------------------------------------------------------


@modules.of(places=lambda: nn.Embedding(3, 4), head=lambda: nn.Linear(4, 3))
def Fragile(self, x):
    """Can't have a clone of its layer's output where there are four samples."""
    shared = self.places(torch.arange(3).unsqueeze(0))
    h = x + (shared.repeat(4, 1, 1) if len(x) == 4 else shared)
    return self.head(h.mean(1))


def test_what_fails_in_a_later_batch_goes_on_to_the_next_computer(tmp_path):
    """Not a HooksError: the model's own, brought about by one output for each sample."""
    torch.manual_seed(0)
    model = Fragile().double().eval()
    batch = torch.randn(9, 3, 4).double(), torch.arange(9) % 3
    with pytest.warns(UserWarning, match="'hooks' can't take this model, 'func' is used"):
        features, computer = run(model, batch, tmp_path, (5, 4))
    assert computer.name == "func"
    torch.testing.assert_close(features, cases.projected(truth(model, batch), 8, 0))


# ---- compiled models -----------------------------------------------------------------------------


def refuse(graph, inputs):
    raise AssertionError("compiled")


def compiled_whole(model):
    return torch.compile(model, backend=refuse)


def compiled_in_place(model):
    model.compile(backend=refuse)
    return model


def compiled_parts(model):
    for part in model.parts.values():
        part.compile(backend=refuse)
    model.parts["a"] = torch.compile(model.parts["a"], backend=refuse)
    return model


def compiled_function(model):
    call = model.call
    model.call = torch.compile(lambda p, x: call(p, x), backend=refuse)
    return model


@pytest.mark.parametrize("way", ["auto", "hooks", "func", "loop"])
@pytest.mark.parametrize(
    "compiled", [compiled_whole, compiled_in_place, compiled_parts, compiled_function]
)
def test_compiled_models_are_run_as_they_were_written(compiled, way, tmp_path):
    model, batch = build("hidden changed in place")
    plain, _ = run(model, batch, tmp_path / "plain", gradient_computer=way)
    features, _ = run(compiled(model), batch, tmp_path / "compiled", gradient_computer=way)
    torch.testing.assert_close(features, plain)


# ---- experts -------------------------------------------------------------------------------------


def test_a_mixture_of_experts_keeps_the_hooks():
    """Its router returns logits, and weights that it makes of them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        bos_token_id=1,
        eos_token_id=2,
        experts_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.5)
    ids = torch.randint(3, 20, (4, 5), generator=torch.Generator().manual_seed(0))
    batch = ids, torch.ones_like(ids)
    task = CausalLMModelOutput()
    found = HookGradientComputer(model, task).compute_per_sample_grad(batch)
    exact = IterativeGradientComputer(model, task).compute_per_sample_grad(batch)
    torch.testing.assert_close(flat(found), flat(exact))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_mask_that_hides_nothing_of_the_first_sample(first):
    """transformers' T5 leaves such a mask out where the sample is alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    ids = torch.randint(3, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[(first + 1) % 3, 6:] = 0
    mask[(first + 2) % 3, 4:] = 0
    task = Seq2SeqModelOutput()
    computer = HookGradientComputer(model, task)
    whole = torch.ones_like(mask)
    for masks in (whole, mask, mask.bool()):  # of one shape: the plans differ
        batch = ids, masks, ids[:, :5]
        exact = IterativeGradientComputer(model, task).compute_per_sample_grad(batch)
        torch.testing.assert_close(flat(computer.compute_per_sample_grad(batch)), flat(exact))
