"""Mixed precision, checkpointing and long sequences: gradients are autograd's within rounding."""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastproj.trak import (
    AbstractModelOutput,
    CausalLMModelOutput,
    FuncError,
    FunctionalGradientComputer,
    HookGradientComputer,
    HooksError,
    ImageClassificationModelOutput,
    IterativeGradientComputer,
)
from fastproj.trak.gradients import AutomaticGradientComputer, hooks, recorder, running
from tests.trak import cases, modules

WORDS, WIDTH, CLASSES = 11, 8, 3
# Relative errors of gradients: a few units in the last place of what the model computes in.
BOUNDS = {torch.bfloat16: 0.03, torch.float16: 0.004, torch.float32: 1e-5}


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH, padding_idx=1),
    places=lambda: nn.Embedding(6, WIDTH),
    norm=lambda: nn.LayerNorm(WIDTH),
    up=lambda: nn.Linear(WIDTH, WIDTH),
    down=lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    last=lambda: nn.RMSNorm(WIDTH),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Text(self, ids):
    """Every kind of layer that texts go through; places are shared by all samples."""
    h = self.words(ids) + self.places(torch.arange(ids.shape[1]).unsqueeze(0))
    h = h + self.down(F.gelu(self.up(self.norm(h))))
    return self.head(self.last(h).mean(1))


@modules.of(
    first=lambda: nn.Conv2d(3, 4, 3, padding=1),
    batch=lambda: nn.BatchNorm2d(4),
    group=lambda: nn.GroupNorm(2, 4),
    second=lambda: nn.Conv2d(4, 4, 3, groups=2),
    head=lambda: nn.Linear(4, CLASSES),
)
def Images(self, x):
    """Every kind of layer that images go through."""
    h = self.second(self.group(F.relu(self.batch(self.first(x)))))
    return self.head(h.mean((2, 3)))


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH),
    norm=lambda: nn.LayerNorm(WIDTH),
    qkv=lambda: nn.Linear(WIDTH, 3 * WIDTH),
    out=lambda: nn.Linear(WIDTH, WIDTH),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Attention(self, ids):
    """One layer of fused attention over any number of tokens."""
    h = self.norm(self.words(ids))
    q, k, v = self.qkv(h).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.head((h + self.out(attended.transpose(1, 2).flatten(2))).mean(1))


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH),
    layer=lambda: nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Encoder(self, ids):
    """PyTorch's own layer, whose attention has a mask and all parameters of it without a rule."""
    return self.head(self.layer(self.words(ids), src_key_padding_mask=ids == 0).mean(1))


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH),
    bias=lambda: nn.Parameter(torch.rand(6, 6)),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Imported(self, ids):
    """Attention by a function that was imported by itself, with its arguments by name."""
    h = self.words(ids)
    attended = scaled_dot_product_attention(query=h, key=h, value=h.exp(), attn_mask=self.bias)
    return self.head(attended.mean(1))


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH),
    scaled=lambda: Scaled(),
    memory=lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Gated(self, ids):
    """Layers without a rule: parameters of its own, and a recurrent one."""
    return self.head(self.memory(self.scaled(self.words(ids)))[0].mean(1))


@modules.of(gain=lambda: nn.Parameter(torch.rand(WIDTH, WIDTH)))
def Scaled(self, x):
    return x + x @ self.gain


class Checkpointed(nn.Module):
    """Blocks of several layers whose activations are computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 2 * WIDTH),
                nn.GELU(),
                nn.Linear(2 * WIDTH, WIDTH),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        h = self.words(ids)
        for block in self.blocks:
            h = h + checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h.mean(1))


class Autocast(nn.Module):
    """A model that is run under autocast, which its own forward turns on."""

    def __init__(self, model, dtype=torch.bfloat16):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", dtype=self.dtype):
            return self.model(*args, **kwargs)


def texts(n, length=6):
    return torch.randint(0, WORDS, (n, length), generator=torch.Generator().manual_seed(n))


def images(n):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))


MODELS = {
    "text": (Text, texts),
    "images": (Images, images),
    "attention": (Attention, texts),
    "encoder": (Encoder, texts),
    "imported": (Imported, texts),
    "no rule": (Gated, texts),
    "checkpoint": (lambda: Checkpointed(False), texts),
    "reentrant checkpoint": (lambda: Checkpointed(True), texts),
}


def build(name):
    make, data = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.4)
    x = data(5)
    return model, (x, torch.arange(len(x)) % CLASSES)


def truth(model, batch):
    """float64 [n, P]: plain autograd of the model in float64, sample by sample, no autocast."""
    model = copy.deepcopy(model).double()
    x, labels = batch
    rows = []
    for sample, label in zip(x.double() if x.is_floating_point() else x, labels, strict=True):
        model.zero_grad()
        logits = model(sample.unsqueeze(0))[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        (logits[label] - others.logsumexp(0)).backward()
        rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    return torch.stack(rows)


def flat(grads):
    return torch.cat([g.reshape(len(g), -1).double() for g in grads.values()], 1)


def error(found, exact):
    """The largest relative error of a sample."""
    return float(((found - exact).norm(dim=1) / exact.norm(dim=1)).max())


TASK = ImageClassificationModelOutput()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_follow_autocast_inside_the_model(name, dtype):
    model, batch = build(name)
    exact = truth(model, batch)
    computer = HookGradientComputer(Autocast(model, dtype), TASK)
    found = computer.compute_per_sample_grad(batch)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert 1e-6 < error(flat(found), exact) < BOUNDS[dtype]  # it did compute in 16 bits


class OneByOne(AbstractModelOutput):
    """TASK for a sample alone: "auto" begins with "func"."""

    def get_output(self, *args):
        return TASK.get_output(*args)

    def get_out_to_loss_grad(self, *args):
        return TASK.get_out_to_loss_grad(*args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_other_computers_follow_autocast_or_say_which_does(name, dtype):
    """PyTorch has no backward of fused attention and batch norm under both it and torch.func."""
    model, batch = build(name)
    exact, model = truth(model, batch), Autocast(model, dtype)
    made = [IterativeGradientComputer(model, TASK), FunctionalGradientComputer(model, TASK)]
    said = ""
    try:
        made[1].compute_per_sample_grad(batch)
    except FuncError as refused:  # by PyTorch 2.13
        said = str(refused)
    if said:
        assert name in ("attention", "encoder", "images", "imported")
        reason = "RuntimeError: expected scalar type"
        assert re.search(rf"can't follow .* \({reason}.*\); expected gradient_comp.*=.auto", said)
        made[1] = AutomaticGradientComputer(model, OneByOne())
        with pytest.warns(UserWarning, match=f"'func' can't take this model, .* slower: {reason}"):
            made[1].compute_per_sample_grad(batch)
        made.append(AutomaticGradientComputer(model, TASK))
    for computer in made:
        found = computer.compute_per_sample_grad(batch)
        assert {g.dtype for g in found.values()} == {torch.float32}
        assert 1e-6 < error(flat(found), exact) < BOUNDS[dtype]


@pytest.mark.parametrize(
    ("message", "times"), [("nobody is at home", 2), ("not enough memory: you tried to", 1)]
)
def test_other_errors_of_func_stay_what_they_are(message, times):
    """Those of the model, which plain autograd meets too; and memory that has run out."""
    model, batch = build("text")
    left = [RuntimeError(message)] * times

    def fail(module, args):
        if left:
            raise left.pop()

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match=message) as error:
        FunctionalGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert not isinstance(error.value, FuncError)


@pytest.mark.parametrize("name", MODELS)
def test_without_autocast_they_are_exact(name):
    model, batch = build(name)
    found = HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    assert error(flat(found), truth(model, batch)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("name", ["text", "images", "attention"])
def test_a_model_in_bfloat16_has_its_gradients(name):
    model, batch = build(name)
    exact = truth(model, batch)
    if name == "images":
        batch = (batch[0].bfloat16(), batch[1])
    found = HookGradientComputer(model.bfloat16(), TASK).compute_per_sample_grad(batch)
    assert {g.dtype for g in found.values()} == {torch.bfloat16}
    assert error(flat(found), exact) < BOUNDS[torch.bfloat16]


def features(model, save_dir, batches, **options):
    """Features by hooks, which pass their own checks on both batches."""
    traker = cases.loaded(model, save_dir, 10, proj_dim=32, **options)
    for batch in batches:
        traker.featurize(batch, num_samples=5)
    assert traker.gradient_computer.name == "hooks"
    return traker.saver.matrix(0).double()


@pytest.mark.parametrize(
    "options", [{"curvature": "trak"}, {"curvature": "fisher"}, {"factored": 4}], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_features_follow_autocast(name, options, tmp_path):
    model, (x, y) = build(name)
    batches = [(x, y), (x.flip(0), y)]
    exact = features(model, tmp_path / "float32", batches, **options)
    found = features(Autocast(model), tmp_path / "bfloat16", batches, **options)
    assert error(found, exact) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("options", [{}, {"factored": 4}], ids=str)
def test_features_of_a_model_in_bfloat16(options, tmp_path):
    model, (x, y) = build("text")
    batches = [(x, y), (x.flip(0), y)]
    exact = features(model, tmp_path / "float32", batches, curvature="trak", **options)
    model = model.bfloat16()
    found = features(model, tmp_path / "bfloat16", batches, curvature="trak", **options)
    assert error(found, exact) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, IterativeGradientComputer])
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_other_computers_take_checkpoints(computer, reentrant):
    model, batch = build("reentrant checkpoint" if reentrant else "checkpoint")
    found = computer(model, TASK).compute_per_sample_grad(batch)
    assert error(flat(found), truth(model, batch)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("computer", [HookGradientComputer, IterativeGradientComputer])
@pytest.mark.parametrize("name", ["checkpoint", "reentrant checkpoint"])
def test_checkpoints_of_frozen_models_keep_to_the_weights_given(computer, name):
    """The parameters of the model itself have no say in the backward."""
    model, batch = build(name)
    exact = truth(model, batch)
    made = computer(model.requires_grad_(False), TASK, grad_wrt=["blocks.0.1.weight"])
    (found,) = made.compute_per_sample_grad(batch).values()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    parts = dict(zip(names, exact.split(sizes, 1), strict=True))
    assert error(found.flatten(1).double(), parts["blocks.0.1.weight"]) < BOUNDS[torch.float32]


def test_checkpoints_are_as_before_afterwards():
    """A user's training goes on with activations computed again."""
    model, batch = build("checkpoint")
    HookGradientComputer(model, TASK).compute_per_sample_grad(batch)
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(batch[0]).sum().backward()
    assert len(calls) == 2


# ---- long sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_two_thousand_tokens(autocast):
    model, _ = build("attention")
    batch = texts(3, 2048), torch.arange(3)
    exact = truth(model, batch)
    asked = Autocast(model) if autocast else model
    found = HookGradientComputer(asked, TASK).compute_per_sample_grad(batch)
    bound = BOUNDS[torch.bfloat16 if autocast else torch.float32]
    assert error(flat(found), exact) < bound


@modules.of(
    words=lambda: nn.Embedding(3, WIDTH),
    padded=lambda: nn.Embedding(3, WIDTH, padding_idx=1),
    bags=lambda: nn.EmbeddingBag(3, WIDTH),
    normed=lambda: nn.LayerNorm(WIDTH),
    table=lambda: nn.Parameter(torch.rand(3, WIDTH)),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def FewWords(self, ids):
    """Parameters that every one of many tokens adds to."""
    h = self.words(ids) + self.padded(ids) + self.table[ids]
    h = h + self.bags(ids.reshape(-1, 2)).view(len(ids), -1, WIDTH).repeat(1, 2, 1)
    return self.head((self.normed(h) + h).tanh().mean(1))


WAYS = [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("computer", WAYS)
def test_sums_over_many_tokens_go_on_in_16_bits(computer, size):
    """PyTorch's own lose most of 2048 tokens on a CPU: such a sum stops at 256 times a token's."""
    torch.manual_seed(1)
    model = FewWords().bfloat16().eval()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 3, (size, 2048), generator=generator), torch.arange(size)
    exact = truth(model, batch)
    computed = computer(model, TASK)
    found = computed.compute_per_sample_grad(batch)
    assert {g.dtype for g in found.values()} == {torch.bfloat16}
    place = 0
    for name, g in found.items():
        part = exact[:, place : place + g[0].numel()]
        place += part.shape[1]
        assert error(g.flatten(1).double(), part) < BOUNDS[torch.bfloat16], name


@modules.of(step=lambda: nn.Linear(WIDTH, WIDTH), head=lambda: nn.Linear(WIDTH, CLASSES))
def Loop(self, x):
    """A loop over time, as of a cell."""
    return self.head(sum(torch.tanh(self.step(x[:, t])) for t in range(x.shape[1])))


@pytest.mark.parametrize(("dtype", "steps"), [("bfloat16", 65), ("bfloat16", 64), ("float32", 65)])
def test_sums_over_many_calls_in_16_bits_are_warned_of(dtype, steps, caplog):
    """Autograd adds them up in 16 bits, and so do all computers: see docs/gradients.md."""
    dtype = getattr(torch, dtype)
    x = torch.rand(4, steps, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    computer = AutomaticGradientComputer(Loop().to(dtype).eval(), TASK)
    batch = x, torch.arange(4) % CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where "auto" goes on
        for _ in range(2):
            computer.compute_per_sample_grad(batch)
    told = [r.getMessage() for r in caplog.records if "adds up the gradients" in r.getMessage()]
    warned = dtype == torch.bfloat16 and steps > 64
    assert len(told) == warned
    assert not told or "'step.weight' 65 times in a forward" in told[0]


def test_a_sparse_table_adds_up_in_float32():
    torch.manual_seed(1)
    model = FewWords().bfloat16().eval()
    batch = torch.randint(0, 3, (1, 2048)), torch.arange(1)
    exact = truth(model, batch)[:, 3 * WIDTH : 6 * WIDTH]  # the parameter of the model comes first
    model.words.sparse = True
    for computer in (HookGradientComputer, IterativeGradientComputer):
        found = computer(model, TASK).compute_per_sample_grad(batch)["words.weight"]
        assert error(found.flatten(1).double(), exact) < BOUNDS[torch.bfloat16]


class UnderAutocast(CausalLMModelOutput):
    """A task that turns autocast on around the model."""

    def predictions(self, *args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().predictions(*args)


def causal(attention, length):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=length,
        vocab_size=40,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    ids = torch.randint(0, 40, (3, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return GPT2LMHeadModel(config).eval(), batch


@pytest.mark.parametrize(
    ("task", "attention", "length", "reentrant"),
    [
        *product((CausalLMModelOutput, UnderAutocast), ("sdpa",), (12,), (None, False, True)),
        (UnderAutocast, "eager", 12, None),
        (UnderAutocast, "sdpa", 2048, None),
        (CausalLMModelOutput, "sdpa", 2048, False),
    ],
)
def test_language_models_of_transformers(task, attention, length, reentrant):
    model, batch = causal(attention, length)
    loop = IterativeGradientComputer(copy.deepcopy(model).double(), CausalLMModelOutput())
    exact = flat(loop.compute_per_sample_grad((batch,)))
    if reentrant is not None:
        options = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.train()  # transformers computes activations again in training mode alone
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    computer = HookGradientComputer(model, task())
    found = flat(computer.compute_per_sample_grad((batch,)))
    bound = BOUNDS[torch.bfloat16 if task is UnderAutocast else torch.float32]
    assert error(found, exact) < bound


# ---- what is checked, and said -------------------------------------------------------------------


def test_autocast_loosens_the_check_no_further_than_its_rounding(monkeypatch):
    """A layer whose gradient is a fifth too large is found under autocast too."""
    model, batch = build("text")
    usual = recorder.in_one_dtype

    def too_large(module, names, x, g):
        x, g = usual(module, names, x, g)
        return x, 1.2 * g if module is model.up else g

    monkeypatch.setattr(recorder, "in_one_dtype", too_large)
    with pytest.raises(HooksError, match=r"up\.weight"):
        HookGradientComputer(Autocast(model), TASK).compute_per_sample_grad(batch)


def test_without_autocast_the_check_is_as_strict_as_before(monkeypatch):
    model, batch = build("text")
    usual = recorder.in_one_dtype

    def too_large(module, names, x, g):
        x, g = usual(module, names, x, g)
        return x, 1.01 * g if module is model.up else g

    monkeypatch.setattr(recorder, "in_one_dtype", too_large)
    with pytest.raises(HooksError, match=r"up\.weight"):
        HookGradientComputer(model, TASK).compute_per_sample_grad(batch)


@pytest.mark.parametrize("factor", [1.01, 1.2])
def test_tf32_loosens_the_check_no_further_than_its_rounding(monkeypatch, factor):
    """A GPU takes it for convolutions by default, and not in every size of batch."""
    model, batch = build("text")
    usual = recorder.in_one_dtype

    def too_large(module, names, x, g):
        x, g = usual(module, names, x, g)
        return x, factor * g if module is model.up else g

    monkeypatch.setattr(recorder, "in_one_dtype", too_large)
    monkeypatch.setattr(hooks, "tf32_eps", lambda _: running.TF32_EPS)
    computer = HookGradientComputer(model, TASK)
    with nullcontext() if factor < 1.1 else pytest.raises(HooksError, match=r"up\.weight"):
        computer.compute_per_sample_grad(batch)


class Newer:
    """A setting of torch >= 2.9, beside which the older one raises."""

    def __init__(self, precision):
        self.fp32_precision = precision

    @property
    def allow_tf32(self):
        raise RuntimeError("a mix of the legacy and new APIs")


def newer_settings(monkeypatch, of_tf32):
    precision = {name: "tf32" if name == of_tf32 else "ieee" for name in ("matmul", "conv")}
    cudnn = Newer("none")
    cudnn.conv, cudnn.rnn = Newer(precision["conv"]), Newer("ieee")
    monkeypatch.setattr(torch.backends.cuda, "matmul", Newer(precision["matmul"]))
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)


def test_where_tf32_may_be_in_use(monkeypatch):
    class OfGpu:
        is_cuda, dtype, ndim = True, torch.float32, 4

    assert running.tf32_eps([torch.zeros(2, 3, 4, 5)]) == 0
    with torch.backends.cudnn.flags(allow_tf32=True):  # its default
        assert running.tf32_eps([OfGpu]) == 2**-10
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert running.tf32_eps([OfGpu]) == 0
        with monkeypatch.context() as at:
            at.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
            assert running.tf32_eps([OfGpu]) == 2**-10
    for set_for, eps in (("matmul", 2**-10), ("conv", 2**-10), ("none", 0)):
        with monkeypatch.context() as at:
            newer_settings(at, set_for)
            assert running.tf32_eps([OfGpu]) == eps
    monkeypatch.setattr(OfGpu, "ndim", 2)  # no convolution
    assert running.tf32_eps([OfGpu]) == 0
    monkeypatch.setattr(OfGpu, "ndim", 4)
    monkeypatch.setattr(OfGpu, "dtype", torch.float64)
    assert running.tf32_eps([OfGpu]) == 0


@modules.of(
    words=lambda: nn.Embedding(WORDS, WIDTH),
    first=lambda: nn.Linear(WIDTH, WIDTH),
    down=lambda: nn.Linear(WIDTH, 2),
    up=lambda: nn.Linear(2, WIDTH),
    head=lambda: nn.Linear(WIDTH, CLASSES),
)
def Adapted(self, ids):
    """Adapters in float32 in a model in 16 bits, as peft makes them."""
    h = torch.tanh(self.words(ids))
    for _ in range(4):
        h = torch.tanh(self.first(h) + self.up(self.down(h.float())).to(h.dtype))
    return self.head(h.mean(1))


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_frozen_parameters_in_16_bits_loosen_the_check_no_further(monkeypatch, factor):
    torch.manual_seed(0)
    model = Adapted().bfloat16().eval()
    model.down.float(), model.up.float()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, WORDS, (16, 6), generator=generator), torch.arange(16) % CLASSES
    usual = recorder.in_one_dtype

    def too_large(module, names, x, g):
        x, g = usual(module, names, x, g)
        return x, factor * g if module is model.up else g

    monkeypatch.setattr(recorder, "in_one_dtype", too_large)
    names = [name for name, p in model.named_parameters() if p.dtype == torch.float32]
    computer = HookGradientComputer(model, TASK, grad_wrt=names)
    if factor != 1:
        with pytest.raises(HooksError, match=r"up\.weight"):
            computer.compute_per_sample_grad(batch)
    else:
        computer.compute_per_sample_grad(batch)


def test_auto_stays_with_hooks_under_autocast(recwarn):
    model, batch = build("text")
    computer = AutomaticGradientComputer(Autocast(model), TASK)
    computer.compute_per_sample_grad(batch)
    assert computer.name == "hooks"
    assert not [str(w.message) for w in recwarn if "hooks" in str(w.message)]
