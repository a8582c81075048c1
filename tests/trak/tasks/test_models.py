"""Every task on a real model of its family: f, its gradient, Q, padding, and a whole TRAK run."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import fastproj
from fastproj import TRAKer
from fastproj.trak import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    Seq2SeqModelOutput,
    TextClassificationModelOutput,
    batches,
)
from fastproj.trak.tasks import margins
from tests.trak import cases
from tests.trak.model_zoo import FAMILIES, make

COMPUTERS = [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer]
N = 5


def log_odds(logits, label):
    """log(p / (1 - p)) with p from the softmax, of one row of logits."""
    p = logits.softmax(-1)[label]
    return (p / (1 - p)).log()


def independent_output(name, model, batch, row, others=None):
    """f of one sample as the paper writes it: the sample alone, without any padding."""
    if name == "resnet":
        return log_odds(model(batch[0][row : row + 1])[0], batch[1][row])
    if name == "vit":
        images = batch["pixel_values"][row : row + 1]
        return log_odds(model(pixel_values=images).logits[0], batch["labels"][row])
    if name == "bert":
        ids, types, mask, labels = batch
        length = int(mask[row].sum())
        output = model(input_ids=ids[row, :length][None], token_type_ids=types[row, :length][None])
        return log_odds(output.logits[0], labels[row])
    if name == "gpt2":
        ids, mask = batch
        length = int(mask[row].sum())
        logits = model(input_ids=ids[row, :length][None]).logits[0]
        parts = [log_odds(logits[t - 1], ids[row, t]) for t in range(1, length)]
        return sum(parts) / len(parts)
    if name == "mt5":
        length = int(batch["attention_mask"][row].sum())
        labels = batch["labels"][row]
        labels = labels[: int((labels != -100).sum())]
        shifted = torch.cat([torch.zeros(1, dtype=torch.long), labels[:-1]])
        output = model(
            input_ids=batch["input_ids"][row, :length][None], decoder_input_ids=shifted[None]
        )
        return sum(log_odds(output.logits[0, t], labels[t]) for t in range(len(labels)))
    assert name == "clip"
    output = model(**{key: t[row : row + 1] for key, t in batch.items()})
    u, v = output.image_embeds[0], output.text_embeds[0]
    texts = sum(torch.exp(-(u @ (v - other))) for other in others.texts)
    images = sum(torch.exp(-(v @ (u - other))) for other in others.images)
    return -texts.log() - images.log()


def others_of(task, model):
    return task._embeddings(model) if hasattr(task, "_embeddings") else None


def prepared(batch):
    return batches.prepare("test", batch, torch.device("cpu"))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_output_is_the_papers_for_a_sample_alone_without_padding(name):
    model, task, data = make(name, torch.float64)
    batch = data(N)
    with torch.no_grad():
        found = task.outputs(model, {}, {}, prepared(batch))
        others = others_of(task, model)
        exact = [independent_output(name, model, batch, row, others) for row in range(N)]
    torch.testing.assert_close(found, torch.stack(exact), rtol=1e-9, atol=1e-9)
    assert len(set(found.tolist())) == N


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_finite_differences(name, computer, caplog):
    """Along random directions, of the independent f, in float64.

    For mT5 by autograd of the independent f: it computes variances in float32 whatever the dtype,
    too coarse for differences.
    """
    model, task, data = make(name, torch.float64)
    batch = data(N)
    others = others_of(task, model)
    grads = computer(model, task).compute_per_sample_grad(prepared(batch))
    params = {key: p.detach() for key, p in model.named_parameters()}
    assert list(grads) == list(params)
    assert all(g.shape == (N, *params[key].shape) for key, g in grads.items())
    said = [r for r in caplog.records if r.name == "fastproj.trak"]
    assert not said  # neither a run of the whole model nor a loop over samples
    step = 1e-5
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        direction = {
            key: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for key, p in params.items()
        }
        slopes = sum((grads[key] * d).reshape(N, -1).sum(1) for key, d in direction.items())

        def along(t, row, direction=direction):
            moved = {key: p + t * direction[key] for key, p in params.items()}

            def run(*args, **kwargs):
                return functional_call(model, moved, args, kwargs)

            return independent_output(name, run, batch, row, others)

        exact = []
        for row in range(N):
            if name == "mt5":
                t = torch.zeros((), dtype=torch.float64, requires_grad=True)
                exact.append(torch.autograd.grad(along(t, row), t)[0])
            else:
                with torch.no_grad():
                    exact.append((along(step, row) - along(-step, row)) / (2 * step))
        torch.testing.assert_close(slopes, torch.stack(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_gradient(name):
    """So that the tests of gradients can fail; CLIP's scale is not part of f."""
    model, task, data = make(name, torch.float64)
    grads = HookGradientComputer(model, task).compute_per_sample_grad(prepared(data(N)))
    zero = [key for key, g in grads.items() if not g.any()]
    assert zero == (["logit_scale"] if name == "clip" else [])


def shifted_loss(name, task, model, batch, t):
    """The training loss of each sample, by torch's own loss, with the right logits raised by t."""
    if name == "clip":
        output = model(**batch)
        others = others_of(task, model)
        losses = []
        for u, v in zip(output.image_embeds, output.text_embeds, strict=True):
            for query, key, rest in ((u, v, others.texts), (v, u, others.images)):
                logits = torch.cat([(query @ key + t).reshape(1), rest @ query]) * task.temperature
                losses.append(F.cross_entropy(logits[None], torch.zeros(1, dtype=torch.long)))
        return torch.stack(losses).view(-1, 2).sum(1)
    if name == "resnet":
        logits, labels = model(batch[0]), batch[1]
    elif name == "vit":
        logits, labels = model(batch["pixel_values"]).logits, batch["labels"]
    elif name == "bert":
        names = ("input_ids", "token_type_ids", "attention_mask")
        logits, labels = model(**dict(zip(names, batch, strict=False))).logits, batch[3]
    elif name == "gpt2":
        ids, mask = batch
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    else:
        logits, labels = model(**batch).logits, batch["labels"]
    raised = logits + t * F.one_hot(labels.clamp(min=0), logits.shape[-1])
    losses = F.cross_entropy(raised.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(len(logits), -1).sum(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_q_is_minus_the_derivative_of_the_loss_by_f(name):
    """dL/dt over df/dt, where t raises every margin that f is made of."""
    model, task, data = make(name, torch.float64)
    if name == "clip":
        task.temperature = 1.0
    batch = data(N)
    found = task.get_out_to_loss_grad(model, {}, {}, prepared(batch)).reshape(-1)
    assert found.shape == (N,)
    margins_in_f = {
        "clip": lambda: 2.0,
        "gpt2": lambda: (batch[1].sum(1) - 1).double(),
        "mt5": lambda: (batch["labels"] != -100).sum(1).double(),
    }.get(name, lambda: 1.0)()

    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    losses = shifted_loss(name, task, model, batch, t)
    slopes = torch.stack(
        [torch.autograd.grad(loss, t, retain_graph=True)[0] for loss in losses.unbind()]
    )
    torch.testing.assert_close(found, -slopes / margins_in_f)
    assert bool(((found > 0) & (found < 1)).all())


def padded(name, batch, extra):
    """The batch with ``extra`` more padding, of tokens that must not matter."""
    if name == "bert":
        ids, types, mask, labels = batch
        return (
            F.pad(ids, (0, extra), value=9),
            F.pad(types, (0, extra)),
            F.pad(mask, (0, extra)),
            labels,
        )
    if name == "gpt2":
        return F.pad(batch[0], (0, extra), value=9), F.pad(batch[1], (0, extra))
    fill = {"labels": -100, "attention_mask": 0, "input_ids": 9}
    return {key: F.pad(t, (0, extra), value=fill[key]) for key, t in batch.items()}


@pytest.mark.parametrize("name", ["bert", "mt5", "gpt2"])
def test_padding_does_not_matter(name):
    model, task, data = make(name, torch.float64)
    batch = data(N)
    longer = padded(name, batch, 3)
    computer = HookGradientComputer(model, task)
    for one, other in zip(
        computer.compute_per_sample_grad(prepared(batch)).values(),
        computer.compute_per_sample_grad(prepared(longer)).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    for function in (task.outputs, task.get_out_to_loss_grad):
        torch.testing.assert_close(
            function(model, {}, {}, prepared(batch)), function(model, {}, {}, prepared(longer))
        )


def explicit_scores(model, task, train, targets, proj_dim, lambda_reg):
    """The formula with gradients by a loop, a materialised matrix and an explicit inverse."""
    loop = IterativeGradientComputer(model, task)

    def features(batch):
        grads = loop.compute_per_sample_grad(prepared(batch))
        flat = torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1).double()
        return flat @ cases.default_matrix(flat.shape[1], proj_dim) / math.sqrt(flat.shape[1])

    phi, phi_target = features(train), features(targets)
    inverse = torch.linalg.inv(phi.T @ phi + lambda_reg * torch.eye(proj_dim))
    q = task.get_out_to_loss_grad(model, {}, {}, prepared(train)).reshape(-1).double()
    return (phi @ inverse @ phi_target.T * q[:, None]).numpy()


def rows(batch, start, stop):
    if isinstance(batch, dict):
        return {key: t[start:stop] for key, t in batch.items()}
    return tuple(t[start:stop] for t in batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_run(name, tmp_path):
    model, task, data = make(name)
    train, targets = data(12), data(4)
    traker = TRAKer(model, task, 12, tmp_path, proj_dim=6, lambda_reg=1e-3)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    traker.load_checkpoint(state, 0)
    for start in range(0, 12, 5):
        part = rows(train, start, start + 5)
        traker.featurize(part, num_samples=batches.size(part))
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", state, 0, 4)
    traker.score(targets, num_samples=4)
    scores = traker.finalize_scores("test")
    assert traker.gradient_computer.name == "hooks"
    exact = explicit_scores(model, task, train, targets, 6, 1e-3)
    np.testing.assert_allclose(scores, exact, rtol=0, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_computers_give_the_same_features(name):
    model, task, data = make(name)
    batch = prepared(data(N))
    size = sum(p.numel() for p in model.parameters())
    projector = fastproj.Projector(size, 32, scale=None)
    hooks, func, loop = (c(model, task).project(batch, projector, 1) for c in COMPUTERS)
    for features in (hooks, func):
        assert float(((features - loop).norm(dim=1) / loop.norm(dim=1)).max()) < 1e-4


def test_hooks_take_classifiers_with_a_decoder():
    """T5's would keep keys and values, which hooks can't run again sample by sample."""
    from transformers import T5Config, T5ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, num_labels=3, decoder_start_token_id=0)
    model, task = T5ForSequenceClassification(config).eval(), TextClassificationModelOutput()
    ids = torch.cat([torch.randint(2, 32, (N, 6)), torch.ones(N, 1, dtype=torch.int64)], 1)
    batch = prepared({"input_ids": ids, "labels": torch.arange(N) % 3})
    projector = fastproj.Projector(sum(p.numel() for p in model.parameters()), 32, scale=None)
    hooks, loop = (c(model, task).project(batch, projector, 1) for c in COMPUTERS[::2])
    torch.testing.assert_close(hooks, loop, rtol=0, atol=1e-4 * float(loop.abs().max()))


def test_decoder_inputs_may_be_given():
    model, task, data = make("mt5", torch.float64)
    batch = data(N)
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    torch.testing.assert_close(
        task.outputs(model, {}, {}, prepared({**batch, "decoder_input_ids": shifted})),
        task.outputs(model, {}, {}, prepared(batch)),
    )
    mean = Seq2SeqModelOutput("mean").outputs(model, {}, {}, prepared(batch))
    count = (batch["labels"] != -100).sum(1)
    torch.testing.assert_close(mean * count, task.outputs(model, {}, {}, prepared(batch)))
    with pytest.raises(ValueError, match="expected decoder_input_ids in the batch"):
        task.outputs(torch.nn.Linear(2, 2), {}, {}, prepared(batch))


def test_models_that_shift_labels_in_their_forward_do_so():
    """M2M100 and NLLB have no ``prepare_decoder_input_ids_from_labels``."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(vocab_size=32, max_position_embeddings=32, **sizes, **heads)
    model, task = M2M100ForConditionalGeneration(config).eval(), Seq2SeqModelOutput()
    labels = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100]])
    batch = {"input_ids": torch.randint(4, 32, (2, 6)), "labels": labels}
    with torch.no_grad():
        logits = model(**batch).logits  # as in its training
        found = task.outputs(model, {}, {}, (batch,))
    by_token = margins(logits, labels.clamp(min=0)) * (labels != -100)
    torch.testing.assert_close(found, by_token.sum(1))


def test_labels_that_do_not_count_stay_so_where_a_model_writes_to_them():
    """FSMT makes the padding token of -100, in the labels themselves."""
    from transformers import FSMTConfig, FSMTForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    heads = {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    words = {"langs": ["a", "b"], "src_vocab_size": 32, "tgt_vocab_size": 32}
    config = FSMTConfig(**words, max_position_embeddings=32, **sizes, **heads)
    model, task = FSMTForConditionalGeneration(config).eval(), Seq2SeqModelOutput()
    batch = {"input_ids": torch.randint(4, 32, (1, 6)), "labels": torch.tensor([[8, 9, 2]])}
    padded = {**batch, "labels": torch.tensor([[8, 9, 2, -100, -100]])}
    with torch.no_grad():
        alone, found = (task.outputs(model, {}, {}, (part,)) for part in (batch, padded))
    torch.testing.assert_close(found, alone)
    assert padded["labels"].tolist() == [[8, 9, 2, -100, -100]]
