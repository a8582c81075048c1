"""HFTRAKer: the scores are those of every sample by itself, whatever shares its batch."""

from __future__ import annotations

import logging
import warnings

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers as tf
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn
from torch.utils.data import IterableDataset

from fastproj import TRAKer
from fastproj.trak import HooksError, TextClassificationModelOutput
from fastproj.trak.featurizer import Featurizer
from fastproj.trak.hf import HFTRAKer, TRAKCallback, load_model
from fastproj.trak.hf.collate import Collator
from fastproj.trak.hf.labels import OF_TOKENS, labels_of
from fastproj.trak.hf.limits import positions_of
from fastproj.trak.hf.masking import SHARE, Masking
from fastproj.trak.hf.samples import Samples
from fastproj.trak.tasks import TASKS
from fastproj.trak.tasks.language import CausalLMModelOutput, forward_names
from tests.essential import slow
from tests.trak.hf import models

KINDS = (
    "causal_lm",
    "masked_lm",
    "seq2seq",
    "text_classification",
    "token_classification",
    "regression",
)
OPTIONS = {"proj_dim": 24, "use_half_precision": False, "logging_level": logging.ERROR}


def run(folder, model, train, targets, **options):
    traker = HFTRAKer(model, train, None, folder, **{**OPTIONS, **options})
    return np.array(traker.score(targets))


def close(a, b, share=2e-3):
    np.testing.assert_allclose(a, b, atol=share * np.abs(b).max())


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_samples_one_by_one(tmp_path, kind):
    """Neither padding nor the order of batches changes a score: against TRAKer, a sample at a time,
    not padded, by plain autograd.
    """
    model, tokenizer = models.model_for(kind), models.tokenizer()
    train, targets = models.samples_for(kind, 20), models.samples_for(kind, 4, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # hooks that had to give way
        found = run(tmp_path / "hf", model, train, targets, tokenizer=tokenizer, batch_size=4)
    task = (
        kind
        if kind != "regression"
        else HFTRAKer(model, train, None, tmp_path / "task", **OPTIONS).task
    )
    traker = TRAKer(model, task, 20, tmp_path / "one", gradient_computer="loop", **OPTIONS)
    traker.load_checkpoint(model.state_dict(), 0)
    for index, sample in enumerate(train):
        traker.featurize(alone(kind, "train", index, sample), inds=[index])
    traker.finalize_features()
    traker.start_scoring_checkpoint("targets", model.state_dict(), 0, 4)
    for index, sample in enumerate(targets):
        traker.score(alone(kind, "targets", index, sample), inds=[index])
    close(found, traker.finalize_scores("targets"))


def alone(kind, of, index, sample):
    ids = torch.tensor(sample["input_ids"])
    labels = labels_of(sample)
    if kind == "causal_lm":
        labels = ids
    elif kind == "masked_lm":
        ids, labels = Masking(models.tokenizer(), of).hide(index, ids, None)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.as_tensor(labels)
    return {name: part.unsqueeze(0) for name, part in batch.items()}


SMALL = {"vocab_size": models.VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2}
# They mix all tokens, or read the last one, whichever it is.
WITHOUT_PADDING = {
    "fnet": lambda: tf.FNetForSequenceClassification(
        tf.FNetConfig(**SMALL, num_hidden_layers=1, num_labels=3, pad_token_id=models.PAD)
    ),
    "xlnet": lambda: tf.XLNetForSequenceClassification(
        tf.XLNetConfig(
            vocab_size=models.VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=32, num_labels=3
        )
    ),
    "llama": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**SMALL, **LAYERS, num_labels=3, pad_token_id=None)
    ),
}


@pytest.mark.parametrize("name", WITHOUT_PADDING)
def test_where_padding_changes_outputs_there_is_none(tmp_path, name, caplog):
    torch.manual_seed(0)
    model = WITHOUT_PADDING[name]().eval()
    kind = "text_classification"
    train, targets = models.samples_for(kind, 12), models.samples_for(kind, 3, seed=9)
    size = 1 if name == "llama" else 4  # without a padding token it takes one sample at a time
    options = {"batch_size": size, "logging_level": logging.WARNING}
    found = run(tmp_path / "hf", model, train, targets, **options)
    assert "padding changes what" in caplog.text
    traker = TRAKer(model, kind, 12, tmp_path / "one", gradient_computer="loop", **OPTIONS)
    traker.load_checkpoint(model.state_dict(), 0)
    for index, sample in enumerate(train):
        traker.featurize(shown(model, alone(kind, "train", index, sample)), inds=[index])
    traker.finalize_features()
    traker.start_scoring_checkpoint("targets", model.state_dict(), 0, 3)
    for index, sample in enumerate(targets):
        traker.score(shown(model, alone(kind, "targets", index, sample)), inds=[index])
    close(found, traker.finalize_scores("targets"))


def test_padding_that_changes_some_lengths_alone_is_noticed(tmp_path, caplog):
    """CANINE joins four characters: padding is seen where some of the four are of the text."""
    torch.manual_seed(0)
    config = tf.CanineConfig(
        **{**SMALL, **LAYERS}, num_labels=3, num_hash_buckets=32, max_position_embeddings=32
    )
    model = tf.CanineForSequenceClassification(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    draw = np.random.default_rng(0)
    train = [
        {"input_ids": draw.integers(5, 60, size).tolist(), "label": i % 3}
        for i, size in enumerate([4, 4, 4, 4, 4, 5, 6, 7, 8])
    ]
    options = {**OPTIONS, "logging_level": logging.WARNING}
    HFTRAKer(model, train, None, tmp_path, **options).featurize()
    assert "padding changes what" in caplog.text


def test_the_rounding_of_tf32_does_not_count_as_padding_that_changes_outputs(tmp_path, caplog):
    kind = "text_classification"
    model, train = models.model_for(kind), models.samples_for(kind, 12)

    def rounded(module, args, kwargs, out):
        padded = not kwargs["attention_mask"].all()
        if padded and torch.backends.cudnn.allow_tf32:
            out.logits = out.logits + 0.01 * torch.arange(out.logits.shape[1])
        return out

    model.register_forward_hook(rounded, with_kwargs=True)
    options = {**OPTIONS, "logging_level": logging.WARNING, "gradient_computer": "loop"}
    with torch.backends.cudnn.flags(allow_tf32=True):  # its default
        HFTRAKer(model, train, None, tmp_path, tokenizer=models.tokenizer(), **options).featurize()
    assert "padding changes what" not in caplog.text


def shown(model, batch):
    """What the model takes of a batch."""
    return {k: part for k, part in batch.items() if k in (*forward_names(model), "labels")}


def test_texts_that_share_a_sample_do_not_see_each_other(tmp_path):
    """Positions that begin again, and no mask: f is the sum of those of the texts."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SMALL, **LAYERS, pad_token_id=models.PAD)
    model = tf.LlamaForCausalLM(config).eval()
    a, b, c = models.token_lists(3, 5, 9)
    texts = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in (a, b, c)]
    packed = [packed_of(texts), packed_of(texts[:1]), packed_of(texts[1:])]
    traker = HFTRAKer(model, packed, None, tmp_path, **OPTIONS)
    task = CausalLMModelOutput()
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def outputs(batch):
        return task.outputs(model, weights, buffers, (batch,))

    alone = [{name: torch.tensor([part]) for name, part in text.items()} for text in texts]
    own = torch.cat(list(map(outputs, alone)))
    found = outputs(traker.collator("train", packed).batch([0, 1, 2]))
    torch.testing.assert_close(found, torch.stack([own.sum(), own[0], own[1:].sum()]))
    masked = [{**s, "attention_mask": [1] * len(s["input_ids"])} for s in packed]
    seen = outputs(traker.collator("train", masked).batch([0, 1, 2]))  # as it came
    assert (seen - found)[[0, 2]].abs().min() > 1e-3
    traker.featurize()


def packed_of(texts):
    whole = {name: [part for text in texts for part in text[name]] for name in texts[0]}
    whole["position_ids"] = [i for text in texts for i in range(len(text["input_ids"]))]
    return whole


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_batch_size_does_not_matter(tmp_path, batch_size):
    model, train = models.model_for("causal_lm"), models.samples_for("causal_lm", 20)
    wanted = run(tmp_path / "a", model, train, train[:5], batch_size=7)
    close(run(tmp_path / "b", model, train, train[:5], batch_size=batch_size), wanted)


def test_another_order_of_the_data_gives_the_scores_in_that_order(tmp_path):
    model, train = models.model_for("causal_lm"), models.samples_for("causal_lm", 20)
    order = np.random.default_rng(3).permutation(20)
    # TRAK's curvature, which draws nothing: random numbers are those of a sample's place.
    wanted = run(tmp_path / "a", model, train, train[:5], curvature="trak", lambda_reg="0.1*mean")
    moved = [train[i] for i in order]
    found = run(tmp_path / "b", model, moved, train[:5], curvature="trak", lambda_reg="0.1*mean")
    close(found, wanted[order])


def test_a_second_run_goes_on_with_what_is_there(tmp_path, monkeypatch):
    model, train = models.model_for("causal_lm"), models.samples_for("causal_lm", 20)
    first = run(tmp_path, model, train, train[:5], batch_size=4)
    computed = []
    features = Featurizer.features

    def counted(self, batch, model_id, inds, **kind):
        computed.extend(inds)
        return features(self, batch, model_id, inds, **kind)

    monkeypatch.setattr(Featurizer, "features", counted)
    # With another batch size: what a sample holds is the same, so nothing warns.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run(tmp_path, model, train, train[:5], batch_size=7)
    assert computed == []
    np.testing.assert_array_equal(first, second)


def test_other_data_in_the_same_place_is_said(tmp_path):
    model, train = models.model_for("causal_lm"), models.samples_for("causal_lm", 20)
    run(tmp_path, model, train, train[:5])
    other = [train[1], train[0], *train[2:]]
    with pytest.warns(UserWarning, match="featurized from other data"):
        run(tmp_path, model, other, train[:5])


def test_few_shapes_are_checked(tmp_path):
    """Samples of many lengths, and more than rows are drawn for: few structures."""
    model, train = models.model_for("causal_lm"), models.samples_for("causal_lm", 300)
    traker = HFTRAKer(model, train, None, tmp_path, batch_size=10, **{**OPTIONS, "proj_dim": 16})
    drawn = traker.traker.has_drawn_rows(range(300))
    assert 0 < drawn.sum() < 300
    shapes = set()
    featurize = traker.traker.featurize

    def noted(batch, inds):
        shapes.add((tuple(batch["input_ids"].shape), tuple(drawn[inds])))
        featurize(batch, inds=inds)

    traker.traker.featurize = noted
    traker.featurize()
    lengths = {shape[1] for shape, _ in shapes}
    assert len(lengths) <= 4
    assert len(shapes) <= 4 * len(lengths)  # drawn or not, full or the last of its kind


# ---- what a data set may be ---------------------------------------------------------------------


def as_tensors(samples):
    return [{name: torch.tensor(part) for name, part in s.items()} for s in samples]


def as_columns(samples):
    columns = {name: [s[name] for s in samples] for name in samples[0]}
    return tf.BatchEncoding(columns)


def as_series(samples):
    """Columns of rows that were shuffled: their index isn't their place."""
    index = np.arange(len(samples))[::-1]
    return {name: pandas.Series(part, index=index) for name, part in as_columns(samples).items()}


class MapStyle:
    """A PyTorch data set: no iteration of its own."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[int(index)]


class Iterated(IterableDataset):
    """PyTorch's data set without numbers, which inherits a __getitem__ that raises."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __iter__(self):
        return iter(self.samples)


@pytest.mark.parametrize(
    "form",
    [
        datasets.Dataset.from_list,
        lambda samples: datasets.Dataset.from_list(samples).with_format("torch"),
        lambda samples: datasets.Dataset.from_list(samples).to_iterable_dataset(),
        lambda samples: (sample for sample in samples),
        as_columns,
        as_series,
        as_tensors,
        MapStyle,
        Iterated,
    ],
)
def test_forms_of_a_data_set(tmp_path, form):
    model = models.model_for("text_classification")
    samples = models.samples_for("text_classification", 12)
    wanted = run(tmp_path / "a", model, samples, samples[:3])
    found = run(tmp_path / "b", model, form(samples), form(samples[:3]))
    np.testing.assert_array_equal(found, wanted)


def test_what_the_model_takes_is_passed_on_and_the_rest_said(tmp_path, caplog):
    """token_type_ids matter to BERT; "text" isn't an argument of it."""
    model = models.model_for("text_classification")
    plain = models.samples_for("text_classification", 12)
    typed = [
        {**s, "token_type_ids": [i % 2 for i in range(len(s["input_ids"]))], "text": "x"}
        for s in plain
    ]
    wanted = run(tmp_path / "a", model, plain, plain[:3])
    found = run(tmp_path / "b", model, typed, typed[:3], logging_level=logging.INFO)
    assert "takes no text; left out of train" in caplog.text
    caplog.clear()
    run(tmp_path / "b", model, typed, typed[:3], logging_level=logging.WARNING)
    assert not caplog.text
    assert (found != wanted).any()
    zeros = [{**s, "token_type_ids": [0] * len(s["input_ids"])} for s in plain]
    np.testing.assert_array_equal(run(tmp_path / "c", model, zeros, zeros[:3]), wanted)


def test_labels_that_do_not_count(tmp_path):
    """-100 hides the prompt: scores differ, and those of a label that is hidden are of the rest."""
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 12)
    masked = [{**s, "labels": [-100] * 2 + s["input_ids"][2:]} for s in samples]
    whole = [{**s, "labels": s["input_ids"]} for s in samples]
    wanted = run(tmp_path / "a", model, samples, samples[:3])
    np.testing.assert_array_equal(run(tmp_path / "b", model, whole, samples[:3]), wanted)
    assert np.abs(run(tmp_path / "c", model, masked, samples[:3]) - wanted).max() > 0


def padded(sample, pads, side, fill):
    """A sample as a tokenizer pads it, with a mask. ``fill`` is by the name of an entry."""
    size = len(sample["input_ids"])
    whole = {"attention_mask": [1] * size, **sample}
    for name in fill.keys() & whole.keys():
        pad = [fill[name]] * pads
        whole[name] = [*pad, *whole[name]] if side == "left" else [*whole[name], *pad]
    return whole


FILL = {
    "input_ids": 9,
    "attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "special_tokens_mask": 0,
}


@pytest.mark.parametrize("side", ["left", slow("right")])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_padded_already(tmp_path, kind, side):
    """By a tokenizer, on either side: scores are those without the padding."""
    model, samples = models.model_for(kind), models.samples_for(kind, 12)
    for sample in samples:
        size = len(sample["input_ids"])
        if kind == "causal_lm" and size % 2:
            sample["labels"] = [-100, *sample["input_ids"][1:]]
        elif kind == "causal_lm":
            sample["labels"] = sample["input_ids"]
        if kind == "masked_lm":
            sample["special_tokens_mask"] = [1, *[0] * (size - 1)]
        if kind == "text_classification":
            sample["token_type_ids"] = [i % 2 for i in range(size)]
    fill = {**FILL, "labels": -100} if kind in OF_TOKENS else FILL
    # Of each sample that isn't the longest.
    other = [padded(s, (0, 1, 5)[i % 3] if i else 70, side, fill) for i, s in enumerate(samples)]
    own = {"tokenizer": models.tokenizer()}
    wanted = run(tmp_path / "a", model, samples, samples[:3], **own)
    np.testing.assert_array_equal(run(tmp_path / "b", model, other, other[:3], **own), wanted)


@pytest.mark.parametrize("labels", [False, True])
def test_padding_on_the_left_without_labels_and_with_positions(tmp_path, labels):
    """The first token that the mask shows is predicted by none."""
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 12)
    placed = [{**s, "position_ids": [*range(1, 1 + len(s["input_ids"]))]} for s in samples]
    for given in (samples, placed):
        other = [padded(s, 1 + i % 3, "left", FILL) for i, s in enumerate(given)]
        if labels:
            other = [as_tensors([s])[0] for s in other]
        folder = tmp_path / str(len(given[0]))
        wanted = run(folder / "a", model, given, given[:3])
        np.testing.assert_array_equal(run(folder / "b", model, other, other[:3]), wanted)
    assert (run(folder / "c", model, samples, samples[:3]) != wanted).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_target_that_is_padded_already(tmp_path, side):
    """By its own mask."""
    model, samples = models.model_for("seq2seq"), models.samples_for("seq2seq", 10)
    fill = {"labels": -100, "decoder_attention_mask": 0}
    other = [
        padded({**s, "decoder_attention_mask": [1] * len(s["labels"])}, 1 + i % 3, side, fill)
        for i, s in enumerate(samples)
    ]
    samples = [{**s, "decoder_attention_mask": [1] * len(s["labels"])} for s in samples]
    wanted = run(tmp_path / "a", model, samples, samples[:3])
    np.testing.assert_array_equal(run(tmp_path / "b", model, other, other[:3]), wanted)


def collator_of(row, kind="causal_lm", task="causal_lm", model=None):
    samples = Samples("HFTRAKer", "train", [row])
    return Collator(samples, model or models.model_for(kind), kind, task, None, None, "train")


def test_labels_of_another_number_than_the_tokens_are_refused_as_they_came():
    row = {"input_ids": [7, 8, 9, 10], "attention_mask": [0, 0, 1, 1], "labels": [9, 10]}
    with pytest.raises(ValueError, match=r"has labels \[2\] and 4 input_ids"):
        collator_of(row).batch([0])


def test_a_mask_with_holes_stays():
    row = {"input_ids": [7, 8, 9, 10, 11], "attention_mask": [0, 1, 0, 1, 0]}
    batch = collator_of(row).batch([0])
    assert batch["input_ids"].tolist() == [[8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1, 0, 1]]
    assert batch["labels"].tolist() == [[8, -100, 10]]


def test_labels_that_count_are_not_cut_off():
    """Behind the text, as an end that is also the padding; before it they can't be kept."""
    ids = [7, 8, 9, 9, 9]
    row = {"input_ids": ids, "attention_mask": [1, 1, 0, 0, 0], "labels": [7, 8, 9, -100, -100]}
    batch = collator_of(row).batch([0])
    assert batch["input_ids"].tolist() == [[7, 8, 9]]
    assert batch["labels"].tolist() == [[7, 8, 9]]
    row = {"input_ids": ids, "attention_mask": [0, 0, 1, 1, 1], "labels": ids}
    said = r"sample 0 of train has labels that count for the 2 tokens at its start .*-100 there"
    with pytest.raises(ValueError, match=said):
        collator_of(row)
    batch = collator_of({**row, "labels": [-100, -100, 9, 9, 9]}).batch([0])
    assert batch["input_ids"].tolist() == [[9, 9, 9]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_numbers_of_tokens_are_of_those_that_are_there(side):
    """Where an answer starts and ends would be other tokens without those before."""
    model = tf.BertForQuestionAnswering(tf.BertConfig(**models.BERT))
    sample = {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0]}
    if side == "left":
        sample = {name: part[::-1] for name, part in sample.items()}
    sample |= {"start_positions": 2, "end_positions": 2}
    samples = Samples("HFTRAKer", "train", [sample])

    def batch():
        return Collator(samples, model, None, len, None, None, "train").batch([0])

    if side == "right":
        assert batch()["input_ids"].tolist() == [[5, 6, 7]]
    else:
        with pytest.raises(ValueError, match=r"sample 0 of train has end_positions, by"):
            batch()


def test_samples_with_other_entries_of_tokens_stay_as_they_are():
    """What has a part for each token under a name of the model's own can't be padded anew."""

    class Boxed(tf.GPT2LMHeadModel):
        def forward(self, input_ids=None, attention_mask=None, bbox=None, labels=None):
            raise NotImplementedError

    row = {"input_ids": [7, 8, 9], "attention_mask": [0, 1, 1], "bbox": [[0, 0]] * 3}
    batch = collator_of(row, model=Boxed(tf.GPT2Config(**models.GPT2))).batch([0])
    assert batch["input_ids"].tolist() == [[7, 8, 9]]
    assert batch["bbox"].shape == (1, 3, 2)
    batch = collator_of(row).batch([0])  # of a model that doesn't take it
    assert batch["input_ids"].tolist() == [[8, 9]]


def test_labels_of_a_task_of_ones_own_are_of_tokens_in_all_samples_or_in_none():
    """Three labels a sample, some of which have three tokens."""
    model = models.model_for("causal_lm")
    lengths = [3, 3, 5, 3]
    rows = [{"input_ids": list(range(1, n + 1)), "labels": [1, 0, 1]} for n in lengths]

    def collator(rows):
        samples = Samples("HFTRAKer", "train", rows)
        return Collator(samples, model, None, lambda model, batch: None, None, None, "train")

    batch = collator(rows).batch([0, 1, 3])
    assert batch["input_ids"].shape == (3, 5)
    assert batch["labels"].tolist() == [[1, 0, 1]] * 3
    by_token = [{**row, "labels": row["input_ids"]} for row in rows]
    assert collator(by_token).batch([0])["labels"].tolist() == [[1, 2, 3, -100, -100]]


def test_a_compiled_model_is_the_model_inside(tmp_path):
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 6)
    wanted = run(tmp_path / "a", model, samples, samples[:2])
    found = run(tmp_path / "b", torch.compile(model), samples, samples[:2])
    np.testing.assert_array_equal(found, wanted)


BAD_SAMPLES = {
    "negative": ({"input_ids": [5, -1, 3]}, r"has the token -1; expected tokens 0\.\.63"),
    "unknown": ({"input_ids": [5, 64, 3]}, r"has the token 64; expected tokens 0\.\.63"),
    "floats": ({"input_ids": [5.0, 1.0]}, "input_ids of floating-point numbers"),
    "strings": ({"input_ids": ["5", "1"]}, r"input_ids \['5', '1'\]; expected numbers"),
    "none": ({"input_ids": None}, "input_ids None; expected a list"),
    "number": ({"input_ids": 5}, "input_ids 5; expected a list"),
    "mask": ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "attention_mask of 2 and 3"),
    "mask of labels": (
        {"input_ids": [1, 2, 3], "attention_mask": [-100, 2, 1]},
        "an attention_mask with the value -100; expected 1 for each token, 0",
    ),
    "one token": ({"input_ids": [5]}, "no label that counts .one token"),
    "hidden": ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "no label that counts"),
    "no label": ({"input_ids": [5, 6], "labels": [5, -100]}, "no label that counts .*-100"),
    "too long": ({"input_ids": [5] * 200}, "has 200 tokens, .*expected at most 40: texts cut"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_sample_that_can_not_work_is_named_by_its_number(name, tmp_path):
    sample, said = BAD_SAMPLES[name]
    samples = [*models.samples_for("causal_lm", 7), sample]
    with pytest.raises(ValueError, match=f"HFTRAKer: sample 7 of train .*{said}"):
        run(tmp_path, models.model_for("causal_lm"), samples, samples[:1])


@pytest.mark.parametrize("kind", ["causal_lm", "text_classification"])
@pytest.mark.parametrize("tokens", [models.LONGEST + 1, 60])
def test_a_sample_that_is_too_long_is_named_whatever_the_batch(kind, tokens, tmp_path):
    """Shorter samples are padded to its length, so another batch may fail before its own."""
    samples = models.samples_for(kind, 40)
    samples[7] = {**samples[7], "input_ids": [5] * tokens}
    samples[7].pop("attention_mask", None)
    if kind == "causal_lm":
        samples[7].pop("labels", None)
    with pytest.raises(ValueError, match=f"sample 7 of train has {tokens} tokens, .* most 40"):
        run(tmp_path, models.model_for(kind), samples, samples[:1])


def test_positions_before_the_first_token_do_not_count(tmp_path):
    """RoBERTa's, up to that of the padding token."""
    config = tf.RobertaConfig(**{**models.BERT, "pad_token_id": 1}, num_labels=3)
    model = tf.RobertaForSequenceClassification(config)
    most = positions_of(model)
    assert most == models.LONGEST - 2
    assert positions_of(models.model_for("text_classification")) == models.LONGEST
    assert positions_of(models.model_for("seq2seq")) is None
    samples = [{"input_ids": [5] * n, "label": 0} for n in (3, 4, most)]
    assert np.isfinite(run(tmp_path / "a", model, samples, samples[:1])).all()
    samples[1]["input_ids"] = [5] * (most + 1)
    with pytest.raises(ValueError, match=rf"sample 1 .* 39 tokens, .*max_length={most}\)"):
        run(tmp_path / "b", model, samples, samples[:1])


def test_other_errors_of_long_samples_are_left_as_they_are(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise HooksError("hooks: no index")

    monkeypatch.setattr(TRAKer, "featurize", fails)
    samples = [{"input_ids": [5] * 60}] * 3
    with pytest.raises(HooksError, match="hooks: no index"):
        run(tmp_path, models.model_for("causal_lm"), samples, samples[:1])


def test_data_sets_that_are_none(tmp_path):
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 4)
    one = datasets.Dataset.from_list(samples)
    splits = datasets.DatasetDict({"train": one, "test": one})
    with pytest.raises(TypeError, match=r"dict of data sets .*data\['train'\]"):
        run(tmp_path, model, splits, samples)
    with pytest.raises(TypeError, match=r"DataFrame; expected .*from_pandas"):
        run(tmp_path, model, one.to_pandas(), samples)
    with pytest.raises(TypeError, match="checkpoints=3; expected a list"):
        HFTRAKer(model, samples, 3, tmp_path, **OPTIONS)


def test_a_name_that_can_be_none_is_refused_before_anything_is_computed(tmp_path):
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 4)
    traker = HFTRAKer(model, samples, None, tmp_path, **OPTIONS)
    with pytest.raises(ValueError, match="HFTRAKer: received exp_name='a/b'; expected letters"):
        traker.score(samples, "a/b")
    assert not traker.traker.saver.ids()
    with pytest.raises(ValueError, match="TRAKCallback: received exp_name='a/b'"):
        TRAKCallback(samples, tmp_path, samples, exp_name="a/b")


def test_a_flag_is_true_or_false(tmp_path):
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 4)
    with pytest.raises(TypeError, match=r"received load_from_save_dir='no' .*; expected True or F"):
        run(tmp_path / "new", model, samples, samples, load_from_save_dir="no")
    assert not (tmp_path / "new").exists()


def test_tokens_that_the_mask_hides_are_not_predicted():
    """Padding need not be special to the tokenizer."""
    ids = torch.arange(10, 30)
    mask = (ids < 14).long()
    for index in range(20):
        hidden, labels = Masking(models.tokenizer(), "train").hide(index, ids, None, mask)
        assert (labels[4:] == -100).all()
        assert torch.equal(hidden[4:], ids[4:])
        assert (labels[:4] != -100).any()


# ---- adapters -----------------------------------------------------------------------------------


def test_gradients_are_by_the_adapters_alone(tmp_path):
    model = models.with_adapters(models.model_for("causal_lm"))
    samples = models.samples_for("causal_lm", 12)
    traker = HFTRAKer(model, samples, None, tmp_path / "a", **OPTIONS)
    names = traker.traker.gradient_names
    assert names
    assert all("lora_" in name for name in names)
    wanted = run(tmp_path / "b", model, samples, samples[:3], grad_wrt=names)
    np.testing.assert_array_equal(traker.score(samples[:3]), wanted)
    every = HFTRAKer(model, samples, None, tmp_path / "c", grad_wrt=None, **OPTIONS)
    assert every.traker.num_params_for_grad == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    ],
)
def test_adapters_with_virtual_tokens_are_refused(tmp_path, config):
    samples = models.samples_for("causal_lm", 4)
    models.model_for("causal_lm").save_pretrained(tmp_path / "base")
    model = get_peft_model(models.model_for("causal_lm"), config)
    model.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match=r"HFTRAKer: .* P\w+, which put virtual tokens before"):
        HFTRAKer(model, samples, None, tmp_path / "a", **OPTIONS)
    with pytest.raises(ValueError, match=r"load_model: received .*/adapters with .* virtual"):
        load_model(tmp_path / "adapters", base=tmp_path / "base")


def test_merged_adapters_are_refused(tmp_path):
    """A head beside them would have a gradient, and the scores would be by the head alone."""
    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(models.model_for("text_classification"), lora)
    model.merge_adapter()
    samples = models.samples_for("text_classification", 4)
    with pytest.raises(ValueError, match=r"merged into its weights .*query.*unmerge_adapter"):
        HFTRAKer(model, samples, None, tmp_path, **OPTIONS)
    model.unmerge_adapter()
    HFTRAKer(model, samples, None, tmp_path, **OPTIONS)


def test_prefixes_are_no_tokens(tmp_path):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(models.model_for("causal_lm"), config)
    samples = models.samples_for("causal_lm", 4)
    assert np.isfinite(run(tmp_path, model, samples, samples[:1])).all()


def test_adapters_of_parameters_leave_the_base_its_own(tmp_path):
    """peft's forward takes the weight of the base out, and registers it anew after the bias."""
    lora = LoraConfig(
        r=2, target_modules=[], target_parameters=["c_fc.weight"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(models.model_for("causal_lm"), lora).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    names = {name for name, _ in model.named_parameters()}
    samples = models.samples_for("causal_lm", 6)
    found = run(tmp_path / "hooks", model, samples, samples[:2])
    assert {name for name, _ in model.named_parameters()} == names
    close(run(tmp_path / "loop", model, samples, samples[:2], gradient_computer="loop"), found)


def test_a_head_that_is_trained_beside_adapters_counts(tmp_path):
    config = tf.GPT2Config(**models.GPT2, num_labels=3)
    model = models.with_adapters(tf.GPT2ForSequenceClassification(config), task_type="SEQ_CLS")
    samples = models.samples_for("text_classification", 12)
    traker = HFTRAKer(model, samples, None, tmp_path, **OPTIONS)
    assert any("score" in name for name in traker.traker.gradient_names)
    assert np.isfinite(traker.score(samples[:3])).all()


# ---- masked language models ---------------------------------------------------------------------


def test_hidden_tokens_belong_to_the_sample():
    masking = Masking(models.tokenizer(), "train")
    ids = torch.tensor(models.token_lists(1, 2000, 2000)[0])
    hidden, labels = masking.hide(5, ids, None)
    where = labels != -100
    assert torch.equal(labels[where], ids[where])
    assert (hidden[where] == models.MASK).all()
    assert torch.equal(hidden[~where], ids[~where])
    assert abs(float(where.float().mean()) - SHARE) < 4 * (SHARE * (1 - SHARE) / 2000) ** 0.5
    again, _ = masking.hide(5, ids, None)
    assert torch.equal(hidden, again)
    for other in (
        masking.hide(6, ids, None),
        Masking(models.tokenizer(), "targets").hide(5, ids, None),
    ):
        assert not torch.equal(hidden, other[0])


def test_special_tokens_are_not_hidden_and_something_is():
    masking = Masking(models.tokenizer(), "train", share=1e-9)
    ids = torch.tensor([models.BOS, 7, models.EOS])
    hidden, labels = masking.hide(0, ids, None)
    assert hidden.tolist() == [models.BOS, models.MASK, models.EOS]
    assert labels.tolist() == [-100, 7, -100]
    hidden, _ = masking.hide(0, torch.tensor([7, 8]), torch.tensor([1, 0]))
    assert hidden.tolist() == [7, models.MASK]


# ---- what can't work ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "train", "said"),
    [
        ("causal_lm", [], "without a sample"),
        ("causal_lm", [{"text": "w1"}], "sample 0 that has 'text'.*tokenize makes them"),
        ("causal_lm", [{"input_ids": [5, 6]}, {"labels": [1]}], "sample 1 that has 'labels'"),
        ("causal_lm", [{"input_ids": [5, 6]}, {}], "sample 1 that has no entries"),
        ("causal_lm", "train.jsonl", "of type str"),
        ("causal_lm", 5, "of type int"),
        ("causal_lm", [[5, 6]], "sample 0 of type list"),
        ("causal_lm", {"input_ids": [[5]], "labels": []}, "columns of unequal lengths"),
        ("causal_lm", [{"input_ids": []}], "sample 0 of train has no tokens"),
        ("causal_lm", [{"input_ids": [[5, 6]]}], r"has input_ids \[1, 2\]"),
        ("causal_lm", [{"input_ids": [5, 6], "labels": [5]}], r"labels \[1\] and 2 input_ids"),
        ("seq2seq", [{"input_ids": [5, 6]}], "has no labels"),
        ("text_classification", [{"input_ids": [5, 6]}], "has no labels"),
        ("text_classification", [{"input_ids": [5, 6], "label": [1, 0]}], "has 2 labels"),
        (
            "text_classification",
            [{"input_ids": [5], "label": 1}, {"input_ids": [5], "label": 1, "token_type_ids": [0]}],
            "expected the same entries in all",
        ),
    ],
)
def test_samples_that_can_not_work(tmp_path, kind, train, said):
    with pytest.raises((TypeError, ValueError), match=said):
        HFTRAKer(models.model_for(kind), train, None, tmp_path, **OPTIONS).featurize()


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (nn.Linear(3, 3), {}, "class Linear, which doesn't say what it predicts"),
        (tf.BertModel(tf.BertConfig(**models.BERT)), {}, "class BertModel"),
        (models.model_for("masked_lm"), {}, "without a mask token"),
        (models.model_for("causal_lm"), {"batch_size": 0}, "batch_size"),
        (models.model_for("causal_lm"), {"checkpoints": []}, "received no checkpoints"),
        (models.model_for("causal_lm"), {"checkpoints": "run"}, "checkpoints_in of it"),
        (
            models.model_for("causal_lm"),
            {"checkpoints": models.model_for("causal_lm").state_dict()},
            r"a state_dict goes in as \[state_dict\]",
        ),
        (
            tf.BertForSequenceClassification(
                tf.BertConfig(**models.BERT, problem_type="multi_label_classification")
            ),
            {},
            "several labels or none",
        ),
        (
            tf.BertForSequenceClassification(
                tf.BertConfig(**models.BERT, problem_type="regression", num_labels=2)
            ),
            {},
            "predicts 2 numbers",
        ),
        (
            tf.XLNetLMHeadModel(
                tf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=32)
            ),
            {},
            "XLNetLMHeadModel, which doesn't say what it predicts",
        ),
    ],
)
def test_models_that_can_not_work(tmp_path, model, options, said):
    samples = models.samples_for("causal_lm", 3)
    with pytest.raises((TypeError, ValueError), match=said):
        HFTRAKer(model, samples, save_dir=tmp_path, **{**OPTIONS, **options}).featurize()


def test_a_decoder_among_the_models_for_sequences_is_causal(tmp_path):
    """transformers' table of models from sequence to sequence has decoders that listen, too."""
    torch.manual_seed(0)
    text = {"model_type": "llama", **SMALL, **LAYERS}
    audio = {"hidden_size": 16, "intermediate_size": 64, **LAYERS}  # 4 of its states are one
    config = tf.VoxtralConfig(text_config=text, audio_config=audio, audio_token_id=3)
    model = tf.VoxtralForConditionalGeneration(config).eval()
    assert HFTRAKer(model, models.samples_for("causal_lm", 4), None, tmp_path).kind == "causal_lm"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "regression"])
def test_a_task_of_fastproj_takes_the_samples_that_its_name_does(tmp_path, kind):
    """As an object it has settings of its own; samples are padded, hidden and packed as before."""
    options = {"tokenizer": models.tokenizer(), "batch_size": 4}
    model, train = models.model_for(kind), models.samples_for(kind, 12)
    expected = run(tmp_path / "name", model, train, train[:3], **options)
    model.save_pretrained(tmp_path / "folder")
    for task in (TASKS[kind], TASKS[kind]()):
        folder = tmp_path / type(task).__name__
        traker = HFTRAKer(tmp_path / "folder", train, None, folder, task=task, **OPTIONS, **options)
        assert traker.kind == kind
        np.testing.assert_array_equal(traker.score(train[:3]), expected)


def test_several_labels_of_a_sample_are_a_task_of_ones_own(tmp_path):
    model = models.model_for("text_classification")
    labels = model.config.num_labels
    samples = [
        {**sample, "label": [int(i == index % labels) for i in range(labels)]}
        for index, sample in enumerate(models.samples_for("text_classification", 6))
    ]
    task = TextClassificationModelOutput(multilabel=True)
    assert run(tmp_path, model, samples, samples[:2], task=task).shape == (6, 2)


def test_a_task_of_ones_own(tmp_path):
    """A function of (model, batch); the batch is the dict of the model's arguments."""

    def first_logit(model, batch):
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0, 5]

    samples, model = models.samples_for("causal_lm", 6), models.model_for("causal_lm")
    found = run(tmp_path / "a", model, samples, samples[:2], task=first_logit)
    assert np.isfinite(found).all()
    assert found.shape == (6, 2)
    model.save_pretrained(tmp_path / "folder")
    from_folder = run(tmp_path / "b", tmp_path / "folder", samples, samples[:2], task=first_logit)
    np.testing.assert_array_equal(from_folder, found)
