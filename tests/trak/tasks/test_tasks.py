"""Margins, their weights Q, and what the image task refuses."""

from __future__ import annotations

import re
import types

import pytest
import torch
from torch import nn

from fastproj import TRAKer
from fastproj.trak import (
    AbstractModelOutput,
    CausalLMModelOutput,
    CLIPModelOutput,
    FunctionModelOutput,
    HookGradientComputer,
    HooksError,
    ImageClassificationModelOutput,
)
from fastproj.trak.tasks import margins, resolve_task
from tests.trak import cases


def test_margin_is_the_log_odds_of_the_label():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, 3, 4, 2])
    p = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(margins(logits, labels), (p / (1 - p)).log())


def test_q_is_one_minus_p_also_where_p_is_almost_one():
    model = nn.Identity()
    logits = torch.tensor([[40.0, 0.0], [0.3, 0.5], [-90.0, 5.0]])
    labels = torch.tensor([0, 1, 0])
    out = ImageClassificationModelOutput().get_out_to_loss_grad(model, {}, {}, (logits, labels))
    exact = 1 / (1 + margins(logits.double(), labels).exp())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)
    assert out[0] > 0  # 1 - softmax would give 0


def test_temperature_divides_the_logits():
    logits, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    warm = ImageClassificationModelOutput(temperature=2.0)
    out = warm.get_out_to_loss_grad(nn.Identity(), {}, {}, (logits, labels))
    torch.testing.assert_close(out, 1 - (logits / 2).softmax(1)[:, 0])
    with pytest.raises(ValueError, match="temperature=0"):
        ImageClassificationModelOutput(temperature=0)


def test_tasks_are_names_classes_instances_or_lookalikes():
    assert isinstance(resolve_task("image_classification"), ImageClassificationModelOutput)
    assert isinstance(resolve_task(ImageClassificationModelOutput), ImageClassificationModelOutput)

    class Lookalike:
        def get_output(self): ...

        def get_out_to_loss_grad(self): ...

    task = Lookalike()
    assert resolve_task(task) is task


def test_unknown_tasks_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'segmentation'; expected one of image_classification"):
        resolve_task("segmentation")

    class HalfATask:
        def get_output(self): ...

    with pytest.raises(TypeError, match="without get_out_to_loss_grad"):
        resolve_task(HalfATask())
    with pytest.raises(TypeError):
        AbstractModelOutput()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3, 4),), "1 parts"),
        ((torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)), "3 parts"),
        ((torch.zeros(3, 4), torch.zeros(3)), r"labels \[3\] float32"),
        ((torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.long)), r"labels \[3, 4\] int64"),
        ((torch.zeros(3, 4), {"y": torch.zeros(3)}), "dict"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    with pytest.raises(ValueError, match=message):
        ImageClassificationModelOutput().check_batch(batch)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"label 3 at row 1 .* classes 0\.\.2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "label -1 at row 0"),
        (torch.zeros(2, 1), torch.tensor([0, 2]), r"label 2 at row 1 .* classes 0\.\.1"),
        (torch.zeros(2), torch.tensor([-1, 1]), "label -1 at row 0"),
        (torch.zeros(1, 2), torch.tensor([0, 0]), r"\[1, 2\] .*or one logit of class 1"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 0]), r"\[2, 3, 4\]"),
    ],
)
def test_labels_must_be_classes_of_the_model(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageClassificationModelOutput().get_out_to_loss_grad(
            nn.Identity(), {}, {}, (logits, labels)
        )


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("classes", [128, 256, 40_000, 1 << 16])
def test_classes_may_be_any_integers(dtype, classes):
    """Whether or not the dtype of labels holds the number of classes."""
    logits, labels = torch.rand(3, classes), torch.tensor([3, 0, 100])

    def found(labels):
        task, batch = ImageClassificationModelOutput(), (logits, labels)
        task.check_batch(batch)
        with torch.no_grad():
            terms = task.likelihood_terms(nn.Identity(), {}, {}, batch, torch.rand(3, 0, 1, 3))
        return [*terms, task.get_out_to_loss_grad(nn.Identity(), {}, {}, batch)]

    assert all(map(torch.equal, found(labels), found(labels.to(dtype))))


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool])
def test_several_labels_may_be_of_any_dtype(dtype):
    logits, labels = torch.randn(3, 4), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    task = ImageClassificationModelOutput(multilabel=True)
    found = []
    for given in (labels, labels.to(dtype)):
        task.check_batch((logits, given))
        found.append(task.outputs(nn.Identity(), {}, {}, (logits, given)))
    assert torch.equal(*found)


def negative_square(model, batch):
    """Minus the squared error of a regression."""
    x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
    return -((model(x).squeeze(1) - y) ** 2)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_function_is_a_task(as_dict, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8).double()
    batch = {"x": x, "y": y} if as_dict else (x, y)
    traker = TRAKer(model, negative_square, 8, tmp_path, proj_dim=5, use_half_precision=False)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=8)
    slope = (-2 * (model(x).squeeze(1) - y)).detach()
    exact = torch.cat([slope[:, None] * x, slope[:, None]], 1)  # [8, 4]
    matrix = cases.default_matrix(4, 5)
    torch.testing.assert_close(
        traker.saver.matrix(0).double(), exact @ matrix / 2, rtol=1e-5, atol=1e-6
    )
    assert traker.saver.out_to_loss(0).tolist() == [1.0] * 8
    assert traker.gradient_computer.name == "hooks"


class Twice(ImageClassificationModelOutput):
    """f is changed in trak's way, one sample at a time."""

    def get_output(self, model, weights, buffers, image, label):
        return 2 * super().get_output(model, weights, buffers, image, label)


def twice_itself():
    """The same in an object of our class."""
    task = ImageClassificationModelOutput()
    own = task.get_output
    task.get_output = lambda *args: 2 * own(*args)
    return task


@pytest.mark.parametrize("made", [Twice, twice_itself])
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
def test_an_output_that_is_changed_for_one_sample_is_f(made, computer, tmp_path):
    """``outputs`` of a batch still is our f then."""
    model, batch = cases.net(), cases.data(6)
    ours = cases.loaded(model, tmp_path / "ours", 6, proj_dim=16, curvature="trak")
    theirs = cases.loaded(
        model, tmp_path / "theirs", 6, made(), proj_dim=16, gradient_computer=computer
    )
    for traker in (ours, theirs):
        traker.featurize(batch, num_samples=6)
    assert theirs.fisher is None
    wanted = 2 * ours.saver.matrix(0)
    torch.testing.assert_close(theirs.saver.matrix(0), wanted, rtol=1e-4, atol=1e-5)


def test_hooks_refuse_an_output_that_is_changed_for_one_sample():
    with pytest.raises(HooksError, match=r"Twice gives the output of one sample only"):
        HookGradientComputer(cases.net(), Twice())


def test_q_that_is_changed_in_the_task_itself_is_used(tmp_path):
    task = ImageClassificationModelOutput()
    task.get_out_to_loss_grad = lambda model, weights, buffers, batch: torch.full((6,), 0.25)
    traker = cases.loaded(cases.net(), tmp_path, 6, task, proj_dim=16)
    traker.featurize(cases.data(6), num_samples=6)
    assert traker.saver.out_to_loss(0).tolist() == [0.25] * 6


def test_q_of_a_function_follows_from_its_loss():
    task = FunctionModelOutput(negative_square, loss=lambda f: f**2)
    model, batch = nn.Linear(3, 1), (torch.randn(4, 3), torch.randn(4))
    f = negative_square(model, batch).detach()
    torch.testing.assert_close(task.get_out_to_loss_grad(model, {}, {}, batch), -2 * f)
    wrong = FunctionModelOutput(negative_square, loss=lambda f: f.sum())
    with pytest.raises(ValueError, match=r"loss returned \[\] for outputs \[4\]"):
        wrong.get_out_to_loss_grad(model, {}, {}, batch)


@pytest.mark.parametrize("out", [lambda m, b: m(b[0]).sum(), lambda m, b: 0.0])
def test_a_function_returns_one_output_for_each_sample(out):
    with pytest.raises(ValueError, match=r"for a batch of 4; expected one output for each sample"):
        FunctionModelOutput(out).outputs(nn.Linear(3, 1), {}, {}, (torch.randn(4, 3),))


IDS = torch.zeros(2, 5, dtype=torch.long)
MASK = torch.ones(2, 5, dtype=torch.long)
LABELS = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        ("text_classification", (IDS, LABELS), "2 parts .* expected .*token_type_ids"),
        ("text_classification", ({"input_ids": IDS},), "dict of input_ids"),
        ("text_classification", (IDS, MASK, MASK), r"labels \[2, 5\] int64 .* expected \[B\]"),
        ("causal_lm", (IDS, MASK, MASK, MASK), "4 parts"),
        ("causal_lm", (IDS.float(), MASK), r"labels \[2, 5\] float32 .* expected token numbers"),
        ("causal_lm", (IDS, MASK, torch.full((2, 5), -100)), "row 0 .* no target token"),
        ("causal_lm", (IDS, torch.tensor([[1] * 5, [1, 0, 0, 0, 0]])), "row 1 .* no target"),
        ("seq2seq", (IDS, MASK), "2 parts .* expected .*labels"),
        ("seq2seq", (IDS, MASK, LABELS), r"labels \[2\] int64 .* expected token numbers \[B, T\]"),
        ("seq2seq", ({"input_ids": IDS},), "dict of input_ids"),
        ("clip", (IDS,), "1 parts"),
        ("clip", ({"input_ids": IDS},), "dict of input_ids"),
    ],
)
def test_wrong_batches_of_other_tasks_are_named(task, batch, message):
    with pytest.raises(ValueError, match=message):
        resolve_task(task).check_batch(batch)


def test_without_labels_the_first_token_after_padding_does_not_count():
    """No token comes before it that its logits could be of."""
    ids = torch.arange(1, 11).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = resolve_task("causal_lm").inputs((ids, mask))["labels"]
    assert labels.tolist() == [[-100, -100, -100, 4, 5], [6, 7, 8, -100, -100]]


class Tokens(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.table = nn.Embedding(9, size)

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("size", [157, 256, 40_000, 1 << 16])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_tokens_may_be_any_integers(parts, size, dtype):
    """Whether or not their dtype holds -100, which is 156 in 8 bits, and the number of tokens."""
    token = 100 if dtype == torch.int8 else 156
    ids = torch.tensor([[5, 100, token, 3], [token, 0, 5, 7]])
    logits = torch.rand(2, 4, size)

    def found(ids):
        task, batch = CausalLMModelOutput(), (ids, torch.ones(2, 4), ids)[:parts]
        task.check_batch(batch)
        with torch.no_grad():
            terms = task.likelihood_terms(Fixed(logits), {}, {}, batch, torch.rand(2, 0, 3, 3))
        return [*terms, task.counted_places(batch)]

    assert all(map(torch.equal, found(ids), found(ids.to(dtype))))


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask=None):
        return self.logits


@pytest.mark.parametrize(
    ("label", "size", "message"),
    [(9, 9, r"label 9 at row 1 .* tokens 0\.\.8"), (-1, 9, "label -1"), (0, 1, "V >= 2")],
)
def test_labels_must_be_tokens_of_the_model(label, size, message):
    labels = torch.tensor([[0, 1, -100], [1, 2, label]])
    batch = (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), labels)
    with pytest.raises(ValueError, match=message):
        CausalLMModelOutput().get_out_to_loss_grad(Tokens(size), {}, {}, batch)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        CausalLMModelOutput().likelihood_terms(Tokens(size), {}, {}, batch, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("method", "more"),
    [("outputs", ()), ("get_out_to_loss_grad", ()), ("likelihood_terms", (torch.ones(2, 3),))],
)
def test_several_labels_must_have_a_logit_each(method, more):
    """One logit would serve all labels otherwise."""
    task = ImageClassificationModelOutput(multilabel=True)
    batch = (torch.ones(2, 4), torch.tensor([[0, 1, 0], [1, 1, 0]]))
    with pytest.raises(ValueError, match=r"returned \[2, 1\] .* labels \[2, 3\] .* one logit for"):
        getattr(task, method)(nn.Linear(4, 1), {}, {}, batch, *more)


IDS = torch.tensor([[4, 5, 6], [4, 7, 8]])


@pytest.mark.parametrize(
    ("task", "batch", "value"),
    [
        ("causal_lm", (IDS, IDS), "4 at row 0"),
        ("causal_lm", (IDS, torch.tensor([[0, 1, 1], [1, -100, 1]])), "-100 at row 1"),
        ("causal_lm", (IDS, torch.tensor([[1, 1, 1], [1, 1, 0.5]])), "0.5 at row 1"),
        ("causal_lm", ({"input_ids": IDS, "attention_mask": IDS, "labels": IDS},), "4 at row 0"),
        ("seq2seq", (IDS, IDS, IDS), "4 at row 0"),
        ("masked_lm", (IDS, IDS, IDS), "4 at row 0"),
        ("text_classification", (IDS, IDS, torch.tensor([0, 1])), "4 at row 0"),
    ],
)
def test_masks_are_ones_and_zeros(task, batch, value):
    """Labels in the place of a mask would hide no token, or others."""
    said = rf"{task}: received attention_mask with the value {value} .*'labels'.* or after a mask"
    with pytest.raises(ValueError, match=said):
        resolve_task(task).check_batch(batch)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_mask_that_hides_all_of_a_sample_is_refused(dtype):
    """Such as token types of single texts, in the mask's place."""
    mask, types = torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    task, labels = resolve_task("text_classification"), torch.tensor([0, 1])
    task.check_batch((IDS, types, mask, labels))
    order = r"\(a tuple is \(input_ids, token_type_ids, attention_mask, labels\)\)"
    with pytest.raises(ValueError, match=f"attention_mask without a 1 at row 0 .* {order}"):
        task.check_batch((IDS, mask, types, labels))
    mask[1] = 0
    batch = {"input_ids": IDS, "decoder_attention_mask": mask, "labels": IDS}
    with pytest.raises(ValueError, match="decoder_attention_mask without a 1 at row 1"):
        resolve_task("seq2seq").check_batch((batch,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype):
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).to(dtype)
    resolve_task("causal_lm").check_batch((IDS, mask))
    resolve_task("text_classification").check_batch((IDS, mask, torch.tensor([0, 1])))


def test_a_mask_of_pairs_of_tokens_is_added_to_the_logits_of_attention():
    hidden = torch.triu(torch.full((3, 3), -torch.inf), 1).expand(2, 1, 3, 3)
    batch = {"input_ids": IDS, "attention_mask": hidden, "labels": IDS}
    resolve_task("causal_lm").check_batch((batch,))


def test_the_mask_of_a_decoder_is_ones_and_zeros():
    batch = {"input_ids": IDS, "decoder_attention_mask": IDS, "labels": IDS}
    with pytest.raises(ValueError, match="received decoder_attention_mask with the value 4"):
        resolve_task("seq2seq").check_batch((batch,))


def test_labels_that_are_shifted_already_are_refused():
    """They would be shifted once more: no error, and other tokens than the model was trained on."""
    task = resolve_task("causal_lm")
    ids = torch.tensor([[3, 7, 4, 4, 9, 8, 2, 5, 6, 1, 3, 2], [5] * 12])
    mask = torch.ones_like(ids)
    task.check_batch((ids, mask, ids))
    task.check_batch((ids, mask, ids.masked_fill(torch.arange(12) < 4, -100)))
    for last in (-100, 0):
        labels = torch.cat([ids[:, 1:], torch.full((2, 1), last)], 1)
        with pytest.raises(ValueError, match=r"row 0 .* expected labels that are not shifted"):
            task.check_batch((ids, mask, labels))
        task.check_batch((ids[1:], mask[1:], labels[1:]))  # the same token everywhere
        labels[0, :4] = -100  # too few to tell
        task.check_batch((ids, mask, labels))


def test_prompts_do_not_count_where_labels_say_so():
    torch.manual_seed(0)
    model = Tokens(9)
    ids = torch.randint(0, 9, (1, 6))
    labels = ids.clone()
    labels[:, :4] = -100
    logits = model(ids)[0].double()
    p = logits.softmax(1)
    exact = sum((p[t - 1, ids[0, t]] / (1 - p[t - 1, ids[0, t]])).log() for t in (4, 5))
    found = CausalLMModelOutput().outputs(model, {}, {}, (ids, torch.ones(1, 6), labels))
    torch.testing.assert_close(found.double(), exact[None], rtol=1e-5, atol=1e-5)
    mean = CausalLMModelOutput("mean").outputs(model, {}, {}, (ids, torch.ones(1, 6), labels))
    torch.testing.assert_close(2 * mean, found)


def test_options_of_tasks_are_checked():
    with pytest.raises(ValueError, match="reduction='max'"):
        CausalLMModelOutput("max")
    with pytest.raises(ValueError, match="simulated_batch_size=0"):
        CLIPModelOutput(simulated_batch_size=0)
    for wrong in (-1, 0.0, float("inf"), float("nan"), "a", True, [1], torch.ones(2)):
        for task in (CLIPModelOutput, ImageClassificationModelOutput):
            with pytest.raises(
                ValueError, match=re.escape(f" temperature={wrong!r}; expected a pos")
            ):
                task(temperature=wrong)
        for task in (CLIPModelOutput, CausalLMModelOutput):
            with pytest.raises(ValueError, match=re.escape(f"likelihood_temperature={wrong!r};")):
                task(likelihood_temperature=wrong)
    with pytest.raises(ValueError, match="without batches"):
        CLIPModelOutput().get_embeddings(nn.Linear(1, 1), [])


@pytest.mark.parametrize("form", ["object", "dict", "tuple"])
def test_logits_are_found_in_what_models_return(form):
    logits = torch.randn(2, 3)
    wrapped = {
        "object": types.SimpleNamespace(logits=logits),
        "dict": {"loss": None, "logits": logits},
        "tuple": (logits, None),
    }[form]

    class Model(nn.Module):
        def forward(self, x):
            return wrapped

    batch = (torch.zeros(2, 1), torch.tensor([0, 2]))
    found = ImageClassificationModelOutput().outputs(Model(), {}, {}, batch)
    torch.testing.assert_close(found, margins(logits, batch[1]))
    wrapped = "nothing"
    with pytest.raises(TypeError, match="returned str; expected logits"):
        ImageClassificationModelOutput().outputs(Model(), {}, {}, batch)
