"""What goes into TRAKer as users have it: batches of any kind, checkpoints, the model itself."""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import warnings
from collections import UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import fastproj
from fastproj import TRAKer
from fastproj.trak import (
    AbstractModelOutput,
    BatchedModelOutput,
    ImageClassificationModelOutput,
    OtherDataWarning,
    StoreMismatchError,
    batches,
    progress,
)
from fastproj.trak.inputs import as_groups
from fastproj.trak.loaded import LoadedModel
from fastproj.trak.solving import finalizing, scoring
from fastproj.trak.solving.scoring import target_features
from fastproj.trak.tasks import resolve_task
from tests.trak import cases, modules

COMPUTERS = ["auto", "hooks", "func", "loop"]
CPU = torch.device("cpu")
N = 12


def traker_of(tmp_path, model, task, n=N, **options):
    settings = {"proj_dim": 8, "use_half_precision": False, "logging_level": "INFO", **options}
    return TRAKer(model, task, n, save_dir=tmp_path, **settings)


def features(tmp_path, model, task, batch, n=N, **options):
    """The features of one batch of n samples, float64 [n, 8]."""
    traker = traker_of(tmp_path, model, task, n, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=n)
    return traker.saver.matrix(0).double()


def exact_features(model, output, size, names=None):
    """Autograd of ``output(i)`` for every sample, projected, float64 [n, 8]."""
    params = [p for name, p in model.named_parameters() if names is None or name in names]
    rows = []
    for i in range(size):
        grads = torch.autograd.grad(output(i), params, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=False)
        ]
        rows.append(torch.cat([g.reshape(-1) for g in filled]))
    return cases.projected(torch.stack(rows).double(), 8, 0)


# ---- labels -------------------------------------------------------------------------------------

ONE_HOT = torch.eye(4, dtype=torch.long)[[2, 0, 3, 1]]
CLASSES = torch.tensor([2, 0, 3, 1])


@pytest.mark.parametrize("task", ["image_classification", "text_classification"])
@pytest.mark.parametrize(
    ("labels", "cure", "right"),
    [
        (CLASSES[:, None], "labels.squeeze(1)", CLASSES),
        (CLASSES[:, None].float(), "labels.squeeze(1).long()", CLASSES),
        (CLASSES.float(), "labels.long()", CLASSES),
        (CLASSES.double(), "labels.long()", CLASSES),
        (CLASSES > 1, "labels.long()", (CLASSES > 1).long()),
        ((CLASSES > 1)[:, None], "labels.squeeze(1).long()", (CLASSES > 1).long()),
        (ONE_HOT, "labels.argmax(1)", CLASSES),
        (ONE_HOT.float(), "labels.long().argmax(1)", CLASSES),
        (ONE_HOT.bool(), "labels.long().argmax(1)", CLASSES),
        (torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]]), None, "several classes"),
        (torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]]).bool(), None, "several classes"),
        (torch.tensor([[1, 1], [0, 1], [0, 0], [1, 0]]).float(), None, "several classes"),
        (torch.full((4, 5), 0.2), None, "soft labels"),
        (torch.tensor([0.5, 0.1, 0.0, 1.0]), None, "regression or soft labels"),
        (torch.zeros(4, 8, 8, dtype=torch.long), None, "labels of pixels"),
        (torch.zeros(4, 8, 8, dtype=torch.bool), None, "labels of pixels"),
        (torch.tensor([[5, 2], [1, 7], [0, 3], [4, 4]]), None, "labels of tokens"),
    ],
)
def test_labels_of_every_form_get_a_hint_that_can_be_obeyed(task, labels, cure, right):
    task = resolve_task(task)
    inputs = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"expected \[B\] class numbers") as error:
        task.check_batch(({"inputs": inputs, "labels": labels},))
    if cure is None:
        assert right in str(error.value)
        assert "argmax" not in str(error.value)
        assert "long()" not in str(error.value)
        return
    assert f"({cure}" in str(error.value)
    obeyed = eval(cure, {"labels": labels})
    assert torch.equal(obeyed, right)
    task.check_batch(({"inputs": inputs, "labels": obeyed},))


@pytest.mark.parametrize(
    "kind", ["ImageClassificationModelOutput", "TextClassificationModelOutput"]
)
def test_the_task_that_the_message_gives_for_several_classes_is_right(kind):
    single = getattr(fastproj.trak, kind)()
    labels = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 0, 0]])
    for wrong in (labels, labels.bool(), labels.float(), labels + 1):
        with pytest.raises(ValueError, match="multilabel=True") as error:
            single.check_batch(({"inputs": torch.zeros(4, 3), "labels": wrong},))
        given = re.search(r"\w+\(multilabel=True\)", str(error.value))[0]
        task = eval(given, {kind: getattr(fastproj.trak, kind)})
    for right in (labels, labels.bool(), labels.float()):
        task.check_batch(({"inputs": torch.zeros(4, 3), "labels": right},))
    for wrong, message in (
        (
            labels[:, 0],
            r"labels \[4\] int64 on cpu with multilabel=True; expected \[B, L\] of 0 and 1",
        ),
        (labels + 1, "label 2 at row 0, column 0"),
        (torch.full((4, 3), torch.nan), "label nan at row 0, column 0"),
        (labels / 2, "label 0.5 at row 0, column 0"),
        ([1, 0, 1, 0], "labels of type list"),
    ):
        with pytest.raises(ValueError, match=message):
            task.check_batch(({"inputs": torch.zeros(4, 3), "labels": wrong},))
    if "Image" in kind:
        with pytest.raises(ValueError, match=r"returned \[4, 2\] .*for labels \[4, 3\]"):
            task.outputs(nn.Identity(), {}, {}, (torch.zeros(4, 2), labels))


@pytest.mark.parametrize("computer", ["hooks", "func", "loop"])
@pytest.mark.parametrize("curvature", ["trak", "fisher"])
@pytest.mark.parametrize("labels", ["one logit", "one logit, squeezed", "several"])
def test_yes_or_no_tasks_give_their_features_and_q(tmp_path, computer, curvature, labels):
    """f is the log-odds of what is right, summed over labels; Q the mean of 1 - p."""
    torch.manual_seed(0)
    count = 3 if labels == "several" else 1
    model, x, y = nn.Linear(3, count), torch.randn(N, 3), torch.randint(0, 2, (N, count))
    task = ImageClassificationModelOutput(multilabel=labels == "several")
    batch = (x, y.float()) if labels == "several" else (x, y[:, 0])
    asked = nn.Sequential(model, nn.Flatten(0)) if "squeezed" in labels else model
    traker = traker_of(tmp_path, asked, task, gradient_computer=computer, curvature=curvature)
    traker.load_checkpoint(asked.state_dict(), 0)
    for rows in torch.arange(N).split(5):
        traker.featurize(tuple(part[rows] for part in batch), num_samples=len(rows))
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", asked.state_dict(), 0, N)
    traker.score(batch, num_samples=N)
    assert np.isfinite(traker.finalize_scores("t")).all()

    def odds(i):
        return (2 * y[i] - 1) * model(x[i])  # [L]

    wanted = exact_features(model, lambda i: odds(i).sum(), N)
    torch.testing.assert_close(traker.saver.matrix(0, "t").double(), wanted, rtol=1e-5, atol=1e-6)
    p = torch.stack([torch.sigmoid(odds(i)) for i in range(N)]).double().detach()
    found = traker.saver.out_to_loss(0).double()
    if labels == "several" and curvature == "fisher":
        wanted = exact_features(model, lambda i: F.logsigmoid(odds(i)).sum(), N)
        torch.testing.assert_close(found, torch.ones(N).double())
    else:
        torch.testing.assert_close(found, (1 - p).mean(1))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted, rtol=1e-5, atol=1e-6)


TOKENS = torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("task", "labels", "cure", "right"),
    [
        (
            "causal_lm",
            COUNTS,
            "input_ids.masked_fill(~labels, -100)",
            TOKENS.masked_fill(~COUNTS, -100),
        ),
        ("token_classification", COUNTS, "labels.long()", COUNTS.long()),
        ("causal_lm", TOKENS[:, :, None], "labels.squeeze(2)", TOKENS),
        ("seq2seq", TOKENS.float(), "labels.long()", TOKENS),
    ],
)
def test_token_labels_get_a_hint_that_can_be_obeyed(task, labels, cure, right):
    with pytest.raises(ValueError, match=r"labels .*expected token numbers") as error:
        resolve_task(task).check_batch(({"input_ids": TOKENS, "labels": labels},))
    assert f"({cure}" in str(error.value)
    assert torch.equal(eval(cure, {"labels": labels, "input_ids": TOKENS}), right)


@pytest.mark.parametrize(
    ("task", "labels"),
    [("seq2seq", COUNTS), ("masked_lm", COUNTS), ("causal_lm", torch.full((2, 5), 0.5))],
)
def test_token_labels_get_no_hint_where_none_is_right(task, labels):
    """The inputs of a seq2seq or masked model are not what it predicts."""
    with pytest.raises(ValueError, match=r"expected token numbers \[B, T\], int64$"):
        resolve_task(task).check_batch(({"input_ids": TOKENS, "labels": labels},))


def test_ragged_token_labels_are_not_padded_as_tokens_are():
    ragged = batches.SampleList([[1, 2], [3]])
    for task, collator in (
        ("causal_lm", "Seq2Seq"),
        ("seq2seq", "Seq2Seq"),
        ("masked_lm", "TokenClassification"),
        ("token_classification", "TokenClassification"),
    ):
        expected = f"padded with -100, as transformers.DataCollatorFor{collator}"
        with pytest.raises(ValueError, match=expected):
            resolve_task(task).check_batch(({"input_ids": TOKENS, "labels": ragged},))
    with pytest.raises(ValueError, match="as a tokenizer gives with padding=True"):
        resolve_task("causal_lm").check_batch(({"input_ids": ragged, "labels": TOKENS},))


def test_inds_of_other_dtypes_get_a_hint_only_where_it_is_right(tmp_path):
    traker = cases.loaded(cases.net(), tmp_path, N)
    batch = cases.data(4)
    whole, mask = [0.0, 1.0, 2.0, 3.0], [True] * 4
    for inds, cure in (
        (whole, "numpy.asarray(inds).astype(int)"),
        (np.array(whole), "numpy.asarray(inds).astype(int)"),
        (torch.tensor(whole), "inds.long()"),
        (mask, "numpy.flatnonzero"),
        (torch.tensor(mask), "numpy.flatnonzero"),
    ):
        with pytest.raises(TypeError, match=re.escape(cure)):
            traker.featurize(batch, inds=inds)
        call = cure if "inds" in cure else f"{cure}(inds)"
        assert eval(call, {"inds": inds, "numpy": np}).tolist() == [0, 1, 2, 3]
    with pytest.raises(TypeError, match=r"the samples' numbers$"):
        traker.featurize(batch, inds=[0.5, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("part", "cure", "right"),
    [
        (np.arange(4), "torch.as_tensor(numpy.asarray(it))", torch.arange(4)),
        (np.array(3.5), "torch.as_tensor(numpy.asarray(it))", torch.tensor(3.5).double()),
        (np.array(list("abcd")), "it.tolist()", list("abcd")),
        (np.array([1, None, "a", 2.5], object), "it.tolist()", [1, None, "a", 2.5]),
        (torch.ones(1, 3), "t.expand(B, *t.shape[1:])", torch.ones(4, 3)),
        ([1, 2, 3], None, "what all samples share belongs into the task itself"),
        (torch.Size([3, 3]), None, "what all samples share belongs into the task itself"),
    ],
)
def test_parts_of_other_forms_get_a_hint_that_can_be_obeyed(part, cure, right):
    with pytest.raises((TypeError, ValueError)) as error:
        batches.prepare("featurize", (torch.ones(4, 3), part), torch.device("cpu"))
    if cure is None:
        assert str(error.value).endswith(right)
        return
    assert cure in str(error.value)
    obeyed = eval(cure, {"it": part, "t": part, "B": 4, "torch": torch, "numpy": np})
    if isinstance(right, list):
        assert obeyed == right
    else:
        assert torch.equal(obeyed, right)


@pytest.mark.parametrize("packed", [True, False])
def test_only_a_list_of_samples_is_told_to_be_collated(packed):
    """Not a dict whose parts have other first dimensions, as packed sequences have."""
    x, starts = torch.ones(6, 3), torch.tensor([0, 2, 6])
    batch = {"x": x, "starts": starts} if packed else [{"x": t, "y": t.sum()} for t in x[:2]]
    with pytest.raises(ValueError, match="share their first dimension") as error:
        batches.prepare("featurize", batch, torch.device("cpu"), 2)
    assert ("default_collate" in str(error.value)) != packed


def test_a_model_on_the_meta_device_is_filled_only_where_a_checkpoint_can(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.register_buffer("inv_freq", torch.ones(3), persistent=False)

    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(ValueError, match="no checkpoint fills inv_freq") as error:
        traker_of(tmp_path, model, "image_classification")
    assert "to_empty" not in str(error.value)


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_whose_forward_waits_for_other_processes_is_refused(tmp_path, group, inside):
    """DDP's sends the buffers of batch norm; processes that take turns would wait for ever."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    model, words = (nn.Sequential(wrapped), "'0' in D.*expected its module in its place")
    if not inside:
        model, words = wrapped, r"model in D.*expected model\.module"
    with pytest.raises(TypeError, match=words):
        traker_of(tmp_path / "new", model, "image_classification")
    assert not (tmp_path / "new").exists()
    traker_of(tmp_path / "new", wrapped.module, "image_classification")


def test_shards_are_refused_with_a_way_to_the_whole(tmp_path, group):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, sharded = nn.Linear(3, 2), nn.Linear(3, 2)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"DTensors, .*full_state_dict=True"):
        traker_of(tmp_path / "new", sharded, "image_classification")
    traker, before = traker_of(tmp_path, whole, "image_classification"), whole.weight.clone()
    with pytest.raises(TypeError, match=r"weight of type DTensor.*full_tensor\(\)"):
        traker.load_checkpoint(sharded.state_dict(), 0)
    assert torch.equal(whole.weight, before)
    obeyed = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    traker.load_checkpoint(obeyed, 0)
    traker.load_checkpoint({name: t.full_tensor() for name, t in sharded.state_dict().items()}, 0)


def test_a_lazy_model_is_told_to_see_a_batch(tmp_path):
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).eval()
    with pytest.raises(ValueError, match=r"0\.weight, 0\.bias, .*no shape yet.*call it once"):
        traker_of(tmp_path / "new", model, "image_classification")
    model(torch.ones(2, 3))
    traker_of(tmp_path / "new", model, "image_classification")


# ---- shuffled loaders ---------------------------------------------------------------------------


def two_checkpoints(tmp_path, order, **options):
    """Featurize two checkpoints; ``order(i)`` is the data for the i-th; the warnings of it all."""
    nets = [cases.net(0), cases.net(1)]
    states = [copy.deepcopy(net.state_dict()) for net in nets]
    traker = cases.make(nets[0], tmp_path, N, **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for i, state in enumerate(states):
            traker.load_checkpoint(state, i)
            images, labels = order(i)
            for rows in torch.arange(N).split(5):
                traker.featurize((images[rows], labels[rows]), num_samples=len(rows))
        traker.finalize_features()
    return traker, states, [str(w.message) for w in seen]


def assert_told_once(said, what="sample"):
    assert len(said) == 1, said
    assert f"{what} " in said[0]
    assert "held other data under model_id 1 than under 0" in said[0]
    assert "If the loader shuffles" in said[0]
    assert "If it augments at random" in said[0]


def test_a_loader_that_shuffles_is_noticed_once(tmp_path):
    images, labels = cases.data(N)
    torch.manual_seed(3)
    orders = [torch.randperm(N) for _ in range(2)]
    _, _, said = two_checkpoints(tmp_path, lambda i: (images[orders[i]], labels[orders[i]]))
    assert_told_once(said)
    assert "featurize: sample" in said[0]


def test_augmentation_is_noticed_and_computed_and_the_same_data_are_not(tmp_path):
    images, labels = cases.data(N)
    traker, _, said = two_checkpoints(tmp_path / "a", lambda i: (images + 0.1 * i, labels))
    assert_told_once(said)
    assert traker.saver.model_ids[1] == {"is_featurized": 1, "is_finalized": 1}
    assert two_checkpoints(tmp_path / "b", lambda i: (images, labels))[2] == []


def test_padding_by_batch_is_named_as_a_cause(tmp_path):
    """The same samples, in batches of another size."""
    ids = torch.randint(1, 9, (N, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(N) % 5 + 2
    model = Words()
    traker = traker_of(tmp_path, model, "causal_lm")

    def featurize(model_id, size):
        traker.load_checkpoint({k: t + model_id for k, t in state.items()}, model_id)
        for rows in torch.arange(N).split(size):
            longest = int(lengths[rows].max())
            mask = (torch.arange(longest) < lengths[rows, None]).long()
            batch = ids[rows, :longest] * mask, mask
            traker.featurize(batch, num_samples=len(rows))

    state = copy.deepcopy(model.state_dict())
    featurize(0, 2)
    with pytest.warns(UserWarning, match=r"or pads samples as others of their batch need it"):
        featurize(1, 5)
    with pytest.warns(OtherDataWarning, match="at random, or pads samples by batch"):
        featurize(1, 3)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)


def test_shuffled_data_are_noticed_in_another_process(tmp_path):
    """One process for each checkpoint, then one for the scores: none of them saw both passes."""
    images, labels = cases.data(N)
    nets = [cases.net(0), cases.net(1)]
    states = [copy.deepcopy(net.state_dict()) for net in nets]
    made = [cases.make(cases.net(), tmp_path, N) for _ in range(2)]
    for i, traker in enumerate(made):
        traker.load_checkpoint(states[i], i)
    for i, traker in enumerate(made):  # at once: neither finds the other's samples when it starts
        traker._contents.beside = i
        order = torch.arange(N).roll(i)
        traker.featurize((images[order], labels[order]), num_samples=N)
        traker.finalize_features(model_ids=[i])
    last = cases.make(cases.net(), tmp_path, N)
    for i, state in enumerate(states):
        last.start_scoring_checkpoint("test", state, i, 3)
        last.score((images[:3], labels[:3]), num_samples=3)
    with pytest.warns(UserWarning, match=r"sample 0 held other data .*12 of 12 samples") as seen:
        last.finalize_scores("test")
    assert_told_once([str(w.message) for w in seen])


def test_shuffled_data_are_noticed_after_resuming(tmp_path):
    images, labels = cases.data(N)
    model = cases.net(0)
    cases.featurize(cases.make(model, tmp_path, N), model, 0, (images, labels))
    again = cases.make(model, tmp_path, N)
    again.load_checkpoint(cases.net(1).state_dict(), 1)
    again.featurize((images[:5], labels[:5]), num_samples=5)
    later = cases.make(model, tmp_path, N)
    later.load_checkpoint(cases.net(1).state_dict(), 1)
    with pytest.warns(UserWarning, match="sample 6 held other data under model_id 1 than under 0"):
        later.featurize((images[[5, 7, 6]], labels[[5, 7, 6]]), inds=[5, 6, 7])


def test_targets_that_differ_between_checkpoints_are_noticed(tmp_path):
    images, labels = cases.data(N)
    traker, states, _ = two_checkpoints(tmp_path, lambda i: (images, labels))
    for i, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, i, 3)
        traker.score((images[i : i + 3], labels[i : i + 3]), num_samples=3)
    with pytest.warns(UserWarning, match="of 'test' held other data") as seen:
        traker.finalize_scores("test")
    assert_told_once([str(w.message) for w in seen], "target")


# ---- what changes after load_checkpoint ---------------------------------------------------------


class Stateful(nn.Module):
    """A model whose eval forward may write to a buffer, of which its output is a function."""

    def __init__(self, how=None, persistent=True):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.how = how
        self.register_buffer("seen", torch.ones(3), persistent=persistent)

    def forward(self, x):
        out = self.fc(x) * self.seen[0].clone()
        if self.how == "count":
            self.seen[1] += 1
        if self.how == "drift":
            self.seen.mul_(1.5)
        if self.how == "replace":
            self.seen = self.seen * 1.5
        if self.how == "make" and not hasattr(self, "made"):
            self.register_buffer("made", torch.arange(3.0), persistent=False)
        return out


DATA = torch.randn(N, 4, generator=torch.Generator().manual_seed(1)), torch.arange(N) % 3


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_statistics_changed_after_the_checkpoint_was_loaded(tmp_path, layer):
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.Linear(4, 3)).eval()
    x = DATA[0] if isinstance(layer, nn.BatchNorm1d) else DATA[0][:, :, None].repeat(1, 1, 2)
    if x.dim() == 3:
        model = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.Linear(8, 3)).eval()
    traker = traker_of(tmp_path, model, "image_classification")
    state = copy.deepcopy(model.state_dict())
    traker.load_checkpoint(state, 0)
    traker.featurize((x[:5], DATA[1][:5]), num_samples=5)
    model.train()
    model(torch.randn_like(x))
    model.eval()
    with pytest.raises(
        ValueError, match=r"0\.running_mean, 0\.running_var.*have changed since"
    ) as e:
        traker.featurize((x[5:], DATA[1][5:]), num_samples=N - 5)
    assert "expected load_checkpoint or start_scoring_checkpoint" in str(e.value)
    traker.load_checkpoint(state, 0)
    traker.featurize((x, DATA[1]), num_samples=N)
    wanted = features(tmp_path / "new", model, "image_classification", (x, DATA[1]))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted)


def test_statistics_whose_change_shows_in_no_version(tmp_path):
    """torch's batch norm writes to its statistics without counting that as a write."""
    norm = nn.BatchNorm1d(4)
    norm.num_batches_tracked = None
    model = nn.Sequential(norm, nn.Linear(4, 3)).eval()
    traker = traker_of(tmp_path, model, "image_classification")
    traker.load_checkpoint(model.state_dict(), 0)
    model.train()
    model(DATA[0])
    model.eval()
    with pytest.raises(ValueError, match=r"running_mean, 0\.running_var of the model have changed"):
        traker.featurize(DATA, num_samples=N)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("how", ["write", "replace"])
def test_a_buffer_changed_by_the_user(tmp_path, persistent, how):
    model = Stateful(persistent=persistent)
    traker = traker_of(tmp_path, model, "image_classification")
    traker.load_checkpoint(model.state_dict(), 0)
    with torch.no_grad():
        if how == "write":
            model.seen[0] = 2
        else:
            model.seen = model.seen * 2
    cure = "load_checkpoint or" if persistent else "which no state_dict holds, as before"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"featurize: seen of the model have changed.*{cure}"):
            traker.featurize(DATA, num_samples=N)
    assert model.seen[0] == 2  # it is the user's
    model.seen = torch.ones(3)
    traker.featurize(DATA, num_samples=N)


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("how", ["count", "replace", "make"])
def test_what_the_model_writes_to_by_itself_is_put_back(tmp_path, how, computer, caplog):
    """Counters and caches are no error, whoever called the model, and change no features."""
    wanted = features(tmp_path / "a", Stateful(), "image_classification", DATA)
    model = Stateful(how)
    traker = traker_of(tmp_path / "b", model, "image_classification", gradient_computer=computer)
    traker.load_checkpoint(model.state_dict(), 0)
    for rows in torch.arange(N).split(5):
        if how == "count" or rows[0]:
            traker.model(DATA[0]) if how == "count" else None  # the user looks at the accuracy
        traker.featurize((DATA[0][rows], DATA[1][rows]), num_samples=len(rows))
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted, rtol=1e-4, atol=1e-5)
    if how == "count":
        assert torch.equal(model.seen, torch.ones(3))
        assert caplog.text.count("writes to its buffer seen in eval mode") == 1


@pytest.mark.parametrize("computer", COMPUTERS)
def test_features_do_not_depend_on_the_batches_before_where_a_buffer_drifts(tmp_path, computer):
    """Each use begins at the checkpoint's buffers."""
    found = []
    for size in (3, 6):
        traker = traker_of(
            tmp_path / str(size),
            Stateful("drift"),
            "image_classification",
            gradient_computer=computer,
        )
        traker.load_checkpoint(traker.model.state_dict(), 0)
        for rows in torch.arange(N).split(size):
            traker.featurize((DATA[0][rows], DATA[1][rows]), num_samples=len(rows))
        found.append((traker.saver.matrix(0), traker.saver.out_to_loss(0)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_forward_that_changes_parameters_is_named(tmp_path):
    class Clamped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(Clamped(4, 3))
    traker = traker_of(tmp_path, model, "image_classification")
    traker.load_checkpoint(copy.deepcopy(model.state_dict()), 0)
    with pytest.raises(ValueError, match=r"0\.weight of the model have been changed by its own"):
        traker.featurize(DATA, num_samples=N)
    assert not list(tmp_path.rglob("train-*"))
    state = copy.deepcopy(model.state_dict())  # after a forward, as the message has it
    traker.load_checkpoint(state, 1)
    traker.featurize((DATA[0][:5], DATA[1][:5]), num_samples=5)
    traker.featurize((DATA[0][5:], DATA[1][5:]), num_samples=N - 5)
    assert traker.saver.index(1).done.all()


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("bag", [False, True])
def test_embeddings_with_a_largest_norm(tmp_path, computer, bag):
    """Their forward writes to their weights: features are those of the rows brought to the norm."""

    class Net(nn.Module):
        def __init__(self, norm):
            super().__init__()
            torch.manual_seed(0)
            self.table = (
                nn.EmbeddingBag(7, 5, max_norm=norm) if bag else nn.Embedding(7, 5, max_norm=norm)
            )
            self.fc = nn.Linear(5, 3)

        def forward(self, x):
            h = self.table(x)
            return self.fc(h if bag else h.mean(1))

    torch.manual_seed(1)
    batch = torch.randint(0, 7, (N, 4)), torch.arange(N) % 3
    model = Net(1.0)
    state = copy.deepcopy(model.state_dict())
    norms = state["table.weight"].norm(dim=1, keepdim=True)
    plain = Net(None)
    plain.load_state_dict({**state, "table.weight": state["table.weight"] / norms.clamp(min=1)})
    traker = traker_of(tmp_path, model, "image_classification", gradient_computer=computer)
    traker.load_checkpoint(state, 0)
    for rows in torch.arange(N).split(5):
        traker.model(batch[0])  # the user's own forward renormalises once more
        traker.featurize((batch[0][rows], batch[1][rows]), num_samples=len(rows))
    wanted = exact_features(
        plain,
        lambda i: fastproj.trak.tasks.margins(plain(batch[0][i : i + 1]), batch[1][i : i + 1])[0],
        N,
    )
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted, rtol=1e-4, atol=1e-5)
    assert model.table.max_norm == 1.0
    assert traker.gradient_computer.__class__.__name__ or computer
    cases.make(model, tmp_path, N)
    traker.load_checkpoint(state, 0)  # the same checkpoint


def test_large_buffers_are_not_copied(monkeypatch):
    monkeypatch.setattr("fastproj.trak.loaded.COPIED_BYTES", 8)
    model = Stateful("count")
    loaded = LoadedModel(model)
    message = "seen of the model have been changed by its own forward"
    with pytest.raises(ValueError, match=message), loaded.guarded("featurize", False):
        model(DATA[0])


# ---- tasks that use the model itself ------------------------------------------------------------


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(2, 4)
        self.beta = 2.0
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.register_buffer("shift", torch.tensor(0.1))

    def encode(self, x):
        return self.enc(x).chunk(2, -1)

    def forward(self, x):
        return self.dec(self.encode(x)[0])


def elbo(model, batch):
    mu, log_var = model.encode(batch[0])
    error = ((model.dec(mu) * model.scale - batch[0] + model.shift) ** 2).sum(-1)
    return -error - 0.5 * model.beta * (mu**2 + log_var.exp() - log_var - 1).sum(-1)


def of_parameters(model, batch):
    """The model's parameters by name, and its call."""
    assert isinstance(model, nn.Module)
    norm = sum((p**2).sum() for p in model.parameters())
    return model(batch[0]).sum(1) * dict(model.named_parameters())["enc.weight"].sum() + norm


class Subclass(BatchedModelOutput):
    """A task that calls the model's methods, and takes functional_call for a part only."""

    def outputs(self, model, weights, buffers, batch):
        whole = functional_call(model, (dict(weights), dict(buffers)), (batch[0],))
        return elbo(model, batch) + whole.sum(1)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0])) * model.beta


class OneSample(AbstractModelOutput):
    def get_output(self, model, weights, buffers, x):
        return elbo(model, (x.unsqueeze(0),)).squeeze(0)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]))


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("task", [elbo, of_parameters, Subclass(), OneSample()])
def test_tasks_that_use_the_model_itself(tmp_path, task, computer):
    model, x = Vae().eval(), DATA[0]
    if computer == "hooks" and task is not elbo:
        pytest.skip("a parameter used outside of its module's forward is for other computers")
    found = features(tmp_path, model, task, (x,), gradient_computer=computer)
    output = {
        elbo: lambda i: elbo(model, (x[i : i + 1],)).sum(),
        of_parameters: lambda i: of_parameters(model, (x[i : i + 1],)).sum(),
    }.get(task, lambda i: elbo(model, (x[i : i + 1],)).sum())
    if isinstance(task, Subclass):
        wanted = exact_features(
            model, lambda i: elbo(model, (x[i : i + 1],)).sum() + model(x[i : i + 1]).sum(), N
        )
    else:
        wanted = exact_features(model, output, N)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_the_model_is_as_before_after_a_task_that_fails(tmp_path, computer):
    model = Vae().eval()
    before = dict(model.named_parameters())

    def failing(model, batch):
        assert model.enc.weight is not before["enc.weight"]
        raise KeyError("no such luck")

    traker = traker_of(tmp_path, model, failing, gradient_computer=computer)
    traker.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(KeyError, match="no such luck"):
        traker.featurize((DATA[0],), num_samples=N)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert isinstance(model.scale, nn.Parameter)


# ---- batches of any kind ------------------------------------------------------------------------

Pair = namedtuple("Pair", ["image", "label"])


@dataclasses.dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    label: torch.Tensor


class Encoding(UserDict):
    """As Hugging Face's BatchEncoding: keys are attributes too."""

    def __getattr__(self, name):
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


def margin(logits, labels):
    return fastproj.trak.tasks.margins(logits, labels)


def by_attribute(model, batch):
    return margin(model(batch.image), batch.label)


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize(
    "make", [Pair, Sample, lambda image, label: Encoding(image=image, label=label)]
)
def test_a_batch_arrives_at_the_task_as_what_it_was(tmp_path, make, computer):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    kinds = set()

    def task(model, batch):
        kinds.add(type(batch))
        return by_attribute(model, batch)

    batch = make(*DATA)
    found = features(tmp_path / "a", model, task, batch, gradient_computer=computer)
    wanted = features(tmp_path / "b", model, "image_classification", DATA)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert kinds == {type(batch)}


def test_a_namedtuple_arrives_at_tasks_of_all_kinds(tmp_path):
    torch.manual_seed(0)
    model, seen = nn.Linear(4, 3), []

    class Own(BatchedModelOutput):
        def check_batch(self, batch):
            seen.append(batch.label)

        def outputs(self, model, weights, buffers, batch):
            return margin(functional_call(model, weights, (batch.image,)), batch.label)

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch.label))

    wanted = features(tmp_path / "b", model, "image_classification", Pair(*DATA))
    for computer in COMPUTERS:
        found = features(tmp_path / computer, model, Own(), Pair(*DATA), gradient_computer=computer)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert len(seen) == 4


TEXTS = [f"{'x' * (1 + i % 4)}{i}" for i in range(N)]


@modules.of(seed=0, table=lambda: nn.Embedding(128, 5), fc=lambda: nn.Linear(5, 3))
def Texts(self, texts):
    """A model that makes its numbers of strings by itself."""
    rows = [self.table(torch.tensor([ord(c) for c in text])).mean(0) for text in texts]
    return self.fc(torch.stack(rows))


def assert_any_computer(tmp_path, model, task, batch, wanted, refuse=("func",), match="vectorised"):
    """All computers but those give the features, also where samples are skipped after resuming."""
    for computer in COMPUTERS:
        if computer in refuse:
            with pytest.raises((TypeError, RuntimeError), match=match):
                features(tmp_path / computer, model, task, batch, gradient_computer=computer)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the computers that can't
            found = features(tmp_path / computer, model, task, batch, gradient_computer=computer)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_strings_and_numbers_beside_tensors(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)

    def task(model, batch):
        images, labels, names, power, mode = batch
        assert len(names) == len(images)
        assert mode == "square"
        assert isinstance(names, tuple)
        return margin(model(images), labels) ** power

    (loaded,) = DataLoader(
        [(x, y, text) for x, y, text in zip(*DATA, TEXTS, strict=True)], batch_size=N
    )
    assert isinstance(loaded[2], tuple)
    wanted = exact_features(
        model, lambda i: margin(model(DATA[0][i : i + 1]), DATA[1][i : i + 1]).sum() ** 2, N
    )
    batch = (*loaded, 2, "square")
    assert_any_computer(tmp_path, model, task, batch, wanted)


def test_strings_alone(tmp_path):
    model = Texts()

    def task(model, batch):
        return model(batch["text"]).sum(1)

    wanted = exact_features(model, lambda i: model(TEXTS[i : i + 1]).sum(), N)
    assert_any_computer(tmp_path, model, task, {"text": TEXTS}, wanted)


def test_ragged_tensors_and_dicts_by_sample(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    boxes = [{"boxes": torch.randn(1 + i % 3, 4), "id": i} for i in range(N)]

    def task(model, batch):
        images, targets = batch
        assert isinstance(targets, list)
        own = torch.stack([model(t["boxes"]).sum() for t in targets])
        return model(images).sum(1) * own

    wanted = exact_features(
        model, lambda i: model(DATA[0][i]).sum() * model(boxes[i]["boxes"]).sum(), N
    )
    assert_any_computer(
        tmp_path, model, task, (DATA[0], boxes), wanted, refuse=("func", "hooks"), match=""
    )


def test_a_task_for_one_sample_gets_entries_of_lists(tmp_path):
    model = Texts()

    class Own(AbstractModelOutput):
        def get_output(self, model, weights, buffers, text, scale):
            assert isinstance(text, str)
            return functional_call(model, weights, ([text],)).sum() * scale

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]))

    found = features(tmp_path, model, Own(), (TEXTS, 3.0), gradient_computer="loop")
    wanted = exact_features(model, lambda i: 3 * model(TEXTS[i : i + 1]).sum(), N)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Graphs:
    """A batch of graphs as PyTorch Geometric has it: x [N, F], edge_index [2, E], batch [N]."""

    def __init__(self, data):
        self.data = data
        counts = [len(d["x"]) for d in data]
        starts = np.cumsum([0, *counts[:-1]])
        self.x = torch.cat([d["x"] for d in data])
        self.edge_index = torch.cat(
            [d["edge_index"] + int(s) for d, s in zip(data, starts, strict=True)], 1
        )
        self.batch = torch.arange(len(data)).repeat_interleave(torch.tensor(counts))

    @property
    def num_graphs(self):
        return len(self.data)

    def to_data_list(self):
        return [SimpleNamespace(to_dict=lambda d=d: d, **d) for d in self.data]

    @classmethod
    def from_data_list(cls, samples):
        return cls([sample.to_dict() for sample in samples])

    def to(self, device):
        return self


class Selected(Graphs):
    """The same by fastproj's own protocol."""

    to_data_list = from_data_list = None

    def __init__(self, data):
        super().__init__(data)
        del self.__dict__["x"]
        self.x = torch.cat([d["x"] for d in data])

    def __getattribute__(self, name):
        if name in ("num_graphs", "to_data_list", "from_data_list"):
            raise AttributeError(name)
        return super().__getattribute__(name)

    def __len__(self):
        return len(self.data)

    def select(self, rows):
        return type(self)([self.data[row] for row in rows])


@modules.of(seed=0, a=lambda: nn.Linear(3, 5), b=lambda: nn.Linear(5, 2))
def GraphNet(self, graphs):
    h = self.a(graphs.x)
    h = h.index_add(0, graphs.edge_index[1], torch.tanh(h)[graphs.edge_index[0]])
    size = int(graphs.batch.max()) + 1
    pooled = torch.zeros(size, 5).index_add(0, graphs.batch, torch.tanh(h))
    return self.b(pooled)


def some_graphs(n):
    generator = torch.Generator().manual_seed(4)
    sizes = [2 + i % 3 for i in range(n)]
    return [
        {
            "x": torch.randn(size, 3, generator=generator),
            "edge_index": torch.randint(0, size, (2, 4), generator=generator),
        }
        for size in sizes
    ]


@pytest.mark.parametrize("kind", [Graphs, Selected])
@pytest.mark.parametrize("bare", [True, False])
def test_graphs(tmp_path, kind, bare):
    model, data = GraphNet(), some_graphs(N)

    def task(model, batch):
        return model(batch if bare else batch[0]).sum(1)

    batch = kind(data) if bare else (kind(data), torch.zeros(N))
    wanted = exact_features(model, lambda i: model(Graphs(data[i : i + 1])).sum(), N)
    assert_any_computer(
        tmp_path,
        model,
        task,
        batch,
        wanted,
        refuse=("func", "hooks"),
        match="plain autograd|doesn't hold|vect",
    )


def test_parts_that_are_no_tensors_after_resuming(tmp_path):
    """Samples that are there are left out of every part; other content is noticed."""
    model, data = GraphNet(), some_graphs(N)

    def task(model, batch):
        graphs, texts = batch
        assert len(texts) == graphs.num_graphs
        return model(graphs).sum(1) * torch.tensor([float(len(text)) for text in texts])

    whole = features(tmp_path / "a", model, task, (Graphs(data), TEXTS), gradient_computer="loop")
    for _ in range(2):
        traker = traker_of(tmp_path / "b", model, task, gradient_computer="loop")
        traker.load_checkpoint(model.state_dict(), 0)
        some = [0, 3, 4]
        traker.featurize((Graphs([data[i] for i in some]), [TEXTS[i] for i in some]), inds=some)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traker.featurize((Graphs(data), TEXTS), inds=range(N))
    torch.testing.assert_close(traker.saver.matrix(0).double(), whole)
    with pytest.warns(UserWarning, match="sample 1 of model_id 0 was featurized from other data"):
        traker.featurize((Graphs(data), [TEXTS[0], "other", *TEXTS[2:]]), inds=range(N))


def prepare(batch, count=None, lists=None):
    return batches.prepare("featurize", batch, CPU, count, lists)


def ids(batch, count=None):
    prepared, size = prepare(batch, count)
    return batches.content_ids(prepared, size).tolist()


def test_content_is_that_of_every_part():
    x = torch.zeros(3, 2)
    base = ids((x, ["a", "b", "c"], 1))
    assert base == ids((x, ["a", "b", "c"], 1))
    assert len(set(base)) == 3
    assert [a == b for a, b in zip(base, ids((x, ["a", "z", "c"], 1)), strict=False)] == [
        True,
        False,
        True,
    ]
    assert not set(base) & set(ids((x, ["a", "b", "c"], 2)))
    assert not set(base) & set(ids((x, ["a", "b", "c"], "1")))
    assert ids((x, [{"k": 1.0}, {"k": None}, {}])) != ids((x, [{"k": 1.0}, {"k": 0}, {}]))
    arrays = [np.arange(2), np.arange(3), np.arange(4)]
    assert ids((x, arrays)) == ids((x, [a.copy() for a in arrays]))
    assert ids((x, arrays)) != ids((x, [*arrays[:2], np.array([0, 1, 2, 4])]))
    graphs = some_graphs(3)
    for kind in (Graphs, Selected):
        assert len(set(ids(kind(graphs)))) == 3
        other = copy.deepcopy(graphs)
        other[1]["x"][0, 0] += 1
        same = [a == b for a, b in zip(ids(kind(graphs)), ids(kind(other)), strict=False)]
        assert same == [True, False, True]
    with pytest.raises(TypeError, match="whose content can't be read"):
        ids((x, [lambda: 0] * 3))
    nothing = ids((torch.zeros(3, 0),))
    assert len(set(nothing)) == 1
    assert not set(nothing) & set(ids((torch.zeros(3, 2, 0),)))


def test_single_entries_of_columns(tmp_path):
    """PyTorch calls them contiguous, whatever their stride."""
    torch.manual_seed(0)
    table, model = torch.randn(5, 6), nn.Linear(4, 3)
    model.shift = nn.Parameter(torch.randn(4, 3).double()[1:2, 2])

    def outputs(model, batch):
        return -((model(batch[0]) + model.shift)[:, 1] * batch[1])

    def features(sizes):
        traker = cases.loaded(model, tmp_path / str(len(sizes)), 5, outputs)
        for rows in torch.arange(5).split(sizes):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            traker.featurize((table[rows, :4], table[:, 5][rows]), inds=range(5)[rows])
        return traker.saver.matrix(0)

    torch.testing.assert_close(features([4, 1]), features([5]))


def test_where_the_number_of_samples_comes_from():
    x = torch.zeros(4, 2)
    assert prepare((["a"] * 4, x))[1] == 4
    assert prepare({"text": ["a", "b"]}, count=2)[1] == 2
    assert prepare(Graphs(some_graphs(5)), count=1)[1] == 5
    assert prepare(([x, x], [x, x]), count=4)[1] == 4
    assert prepare(([x, x], [x, x]))[1] == 4
    with pytest.raises(ValueError, match=r"holds 5 samples in a batch of 4"):
        prepare((x, Graphs(some_graphs(5))))
    with pytest.raises(ValueError, match="share their first"):
        prepare({"b": x, "a": {0: torch.zeros(3)}})
    with pytest.raises(ValueError, match=r"an empty dict inside the batch"):
        prepare((x, {}))
    with pytest.raises(ValueError, match=r"batch\[1\], a list of 2, in a batch of 4"):
        prepare((x, [torch.zeros(3), torch.zeros(3)]))


def test_lists_that_could_be_parts_or_samples():
    """A list of B tensors of B rows: parts, unless another batch has shown one entry a sample."""
    square, ragged = [torch.zeros(2, 4)] * 2, [torch.zeros(3, 4), torch.zeros(1, 4)]
    x = torch.zeros(2)
    lists = batches.Lists()
    assert not isinstance(prepare((x, square), lists=lists)[0][1], batches.SampleList)
    with pytest.raises(ValueError, match=r"one entry for each sample. In an earlier batch of 2"):
        prepare((x, ragged), lists=lists)
    lists = batches.Lists()
    for batch in (ragged, square, ragged):
        found = prepare((x, batch), lists=lists)[0][1]
        assert isinstance(found, batches.SampleList)
        assert len(batches.select((x, found), [1, 1, 0])[1]) == 3
    lists = batches.Lists()
    parts = [torch.zeros(3, 4)] * 2
    for count, batch in ((3, parts), (2, square), (3, parts)):
        found = prepare((torch.zeros(count), batch), lists=lists)[0][1]
        assert not isinstance(found, batches.SampleList)


def test_lists_of_parts_keep_their_type():
    class Columns(list):
        pass

    found = prepare((torch.zeros(3), Columns([torch.ones(3), torch.zeros(3, 2)])))[0][1]
    assert isinstance(found, Columns)
    assert [t.shape for t in batches.select((torch.zeros(3), found), [0, 2])[1]] == [(2,), (2, 2)]


# ---- checkpoints of a part ----------------------------------------------------------------------


class Lora(nn.Module):
    """A linear layer with an adapter, with peft's names."""

    def __init__(self, inside, outside):
        super().__init__()
        self.base_layer = nn.Linear(inside, outside)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outside, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapted(seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(Lora(4, 5), nn.Tanh(), Lora(5, 3))
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name)
        if "lora" in name:
            nn.init.normal_(p)
    return model


def adapters(model):
    """What peft's ``save_pretrained`` keeps."""
    state = {name: t for name, t in model.state_dict().items() if "lora" in name}
    return {name.replace(".default", ""): t.clone() for name, t in state.items()}


def test_adapters_alone_give_the_features_of_the_whole(tmp_path, caplog):
    first, second = adapted(1), adapted(2)
    wanted = [
        features(tmp_path / str(i), m, "image_classification", DATA, grad_wrt="trainable")
        for i, m in enumerate((first, second))
    ]
    names = [name for name, p in first.named_parameters() if p.requires_grad]
    for i, model in enumerate((first, second)):
        traker = traker_of(
            tmp_path / f"a{i}", adapted(0), "image_classification", grad_wrt="trainable"
        )
        assert traker.grad_wrt == names
        traker.load_checkpoint(adapters(model), 0, strict=False)
        traker.featurize(DATA, num_samples=N)
        torch.testing.assert_close(traker.saver.matrix(0).double(), wanted[i])
        traker.finalize_features()
        traker.start_scoring_checkpoint("t", adapters(model), 0, 2, strict=False)
    assert "the checkpoint lacks 4 of 8 entries, which stay as the model has them" in caplog.text
    assert "0.base_layer.weight, 0.base_layer.bias, 2.base_layer.weight" in caplog.text


def test_checkpoints_of_a_part_that_are_refused(tmp_path):
    model = adapted()
    traker = traker_of(tmp_path, model, "image_classification", grad_wrt="trainable")
    before = copy.deepcopy(model.state_dict())
    part = adapters(adapted(1))
    with pytest.raises(ValueError, match=r"missing: 0.base_layer.weight.*strict=False .*where the"):
        traker.load_checkpoint(part, 0)
    with pytest.raises(ValueError, match=r"not in the model: 0.lora_C.weight"):
        traker.load_checkpoint({**part, "0.lora_C.weight": torch.zeros(1)}, 0, strict=False)
    lacking = {key: t for key, t in part.items() if "2.lora_B" not in key}
    with pytest.raises(ValueError, match=r"missing, of what gradients are taken by: 2.lora_B.def"):
        traker.load_checkpoint(lacking, 0, strict=False)
    with pytest.raises(ValueError, match="nothing of the model in it"):
        traker.load_checkpoint({}, 0, strict=False)
    with pytest.raises(ValueError, match=r"other shapes: 0.lora_A"):
        traker.load_checkpoint({**part, "0.lora_A.weight": torch.zeros(1)}, 0, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    traker.load_checkpoint(part, 0, strict=False)
    traker.featurize(DATA, num_samples=N)
    other = adapted()  # the same adapters on another base are another checkpoint
    nn.init.normal_(other[0].base_layer.weight)
    another = traker_of(tmp_path, other, "image_classification", grad_wrt="trainable")
    with pytest.raises(StoreMismatchError, match=r"model_id 0 .* belongs to a checkpoint"):
        another.load_checkpoint(part, 0, strict=False)


def test_other_names_that_peft_shortens():
    """modules_to_save, embeddings, adapters of other names."""
    model = nn.Module()
    model.peft_config = {"math": None}
    model.lora_embedding_A = nn.ParameterDict({"math": torch.zeros(2, 3)})
    head = nn.Module()
    head.original_module = nn.Linear(2, 2)
    head.modules_to_save = nn.ModuleDict({"math": nn.Linear(2, 2)})
    model.head = head
    from fastproj.trak.checkpoints import load_state

    state = {"lora_embedding_A": torch.ones(2, 3), "head.weight": torch.ones(2, 2)}
    load_state("f", model, state, strict=False)
    assert torch.equal(model.lora_embedding_A["math"], torch.ones(2, 3))
    assert torch.equal(head.modules_to_save["math"].weight, torch.ones(2, 2))
    assert not torch.equal(head.original_module.weight, torch.ones(2, 2))


def test_what_is_trainable(tmp_path):
    model = adapted()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter has requires_grad"):
        traker_of(tmp_path, model, "image_classification", grad_wrt="trainable")
    with pytest.raises(TypeError, match='"trainable"'):
        traker_of(tmp_path, model, "image_classification", grad_wrt="all")


def test_a_list_by_sample_costs_no_hooks_where_a_parameter_has_none(tmp_path):
    """What hooks can't see is taken from the whole model, in a loop where vmap can't follow."""
    model, (images, labels) = cases.net(), cases.data(N)  # whose gain is no module's own

    def logit(model, batch):
        return model(torch.stack(batch[0]))[torch.arange(len(batch[0])), batch[1]]

    traker = traker_of(tmp_path, model, logit)
    traker.load_checkpoint(model.state_dict(), 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traker.featurize((list(images), labels), num_samples=N)
    assert traker.gradient_computer.name == "hooks"
    wanted = exact_features(model, lambda i: model(images[i : i + 1])[0, labels[i]], N)
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted, rtol=1e-4, atol=1e-5)


# ---- groups of targets --------------------------------------------------------------------------

GROUPS = [1, 0, 1, 2, 0, 1, 1]


def scores_by_group(folder, reduction, groups=GROUPS, cut=3, **options):
    images, labels = cases.data(N)
    targets = cases.data(len(GROUPS), seed=5)
    traker, states, _ = two_checkpoints(folder, lambda i: (images, labels), proj_dim=6)
    for i, state in enumerate(states):
        for rows in torch.arange(len(GROUPS)).split(cut):
            traker = cases.make(cases.net(), folder, N, proj_dim=6)  # another process each time
            traker.start_scoring_checkpoint(
                "test", state, i, len(GROUPS), groups=groups, reduction=reduction
            )
            traker.score((targets[0][rows], targets[1][rows]), inds=rows)
    return np.array(traker.finalize_scores("test", **options))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scores_of_groups_are_those_of_their_targets_together(tmp_path, reduction, monkeypatch):
    cases.small_blocks(monkeypatch.setattr)
    single = scores_by_group(tmp_path / "a", "sum", groups=None)
    found = scores_by_group(tmp_path / "b", reduction)
    assert found.shape == (N, 3)
    for g in range(3):
        members = single[:, np.array(GROUPS) == g].astype(np.float64)
        wanted = members.sum(1) if reduction == "sum" else members.mean(1)
        np.testing.assert_allclose(found[:, g], wanted, rtol=0, atol=1e-5 * np.abs(single).max())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_groups_of_features_in_float64_keep_their_digits(tmp_path, reduction):
    model, targets = cases.net(0, torch.float64), cases.data(3, dtype=torch.float64)
    traker = cases.featurized(model, tmp_path, cases.data(N, dtype=torch.float64))
    traker.finalize_features()
    options = {"groups": [0, 1, 0], "reduction": reduction}
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 3, **options)
    traker.score(targets, num_samples=3)
    phi = traker.saver.matrix(0, "test")
    found = target_features(traker.saver, 0, "test", range(2))
    first = (phi[0] + phi[2]) / (1 if reduction == "sum" else 2)
    torch.testing.assert_close(found, torch.stack([first, phi[1]]), rtol=1e-14, atol=1e-14)


def test_extremes_of_groups(tmp_path):
    every = scores_by_group(tmp_path, "sum")
    top = cases.make(cases.net(), tmp_path, N, proj_dim=6).finalize_scores("test", top_k=2)
    assert top.helpful_indices.shape == (3, 2)
    np.testing.assert_array_equal(top.helpful_indices[:, 0], every.argmax(0))


def test_other_groups_are_refused(tmp_path):
    scores_by_group(tmp_path, "sum")
    traker = cases.make(cases.net(), tmp_path, N, proj_dim=6)
    state = cases.net(0).state_dict()
    for groups, reduction in ((None, "sum"), (GROUPS, "mean"), ([0, *GROUPS[1:]], "sum")):
        with pytest.raises(StoreMismatchError, match=r"has groups \[1, 0, 1.*by sum, received"):
            traker.start_scoring_checkpoint("test", state, 0, 7, groups=groups, reduction=reduction)
    traker.start_scoring_checkpoint("test", state, 0, 7, groups=torch.tensor(GROUPS))


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        ([0, 1], ValueError, r"groups \[2\] for num_targets=3"),
        ([0, 2, 2], ValueError, "from 0 to 2, of which 2 have a target; expected 0..G-1"),
        ([-1, 0, 1], ValueError, "from -1 to 1"),
        ([0.0, 1.0, 1.0], TypeError, "dtype float64"),
        (["b", "a", "b"], TypeError, "numpy.unique"),
    ],
)
def test_groups_that_are_none(tmp_path, groups, kind, message):
    traker = cases.make(cases.net(), tmp_path, N)
    with pytest.raises(kind, match=message):
        traker.start_scoring_checkpoint("t", {}, 0, 3, groups=groups)
    with pytest.raises(ValueError, match="reduction='max'"):
        traker.start_scoring_checkpoint("t", {}, 0, 3, groups=[0, 0, 1], reduction="max")


@pytest.mark.parametrize(
    ("groups", "cure", "right"),
    [
        (["b", "a", "b"], "numpy.unique(groups, return_inverse=True)[1]", [1, 0, 1]),
        ([-1, 0, 4], "numpy.unique(groups, return_inverse=True)[1]", [0, 1, 2]),
        (torch.tensor([2.0, 0.5, 2.0]), "numpy.unique(groups, return_inverse=True)[1]", [1, 0, 1]),
        ([[0], [1], [1]], "numpy.ravel(groups)", [0, 1, 1]),
        (torch.tensor([[0], [1], [1]]), "numpy.ravel(groups)", [0, 1, 1]),
        ([None, "a", "b"], None, "dtype object"),
        ([float("nan"), 1.0, 1.0], None, "dtype float64"),
        ([[0, 1], [0], [1]], None, "make no array"),
    ],
)
def test_groups_of_other_forms_get_a_hint_that_can_be_obeyed(groups, cure, right):
    with pytest.raises((TypeError, ValueError), match="received groups") as error:
        as_groups("start_scoring_checkpoint", groups, "sum", 3)
    if cure is None:
        assert right in str(error.value)
        assert "numpy." not in str(error.value)
        return
    assert f"({cure}" in str(error.value)
    assert ("-1 as group 0" in str(error.value)) == (cure != "numpy.ravel(groups)" and -1 in groups)
    assert eval(cure, {"groups": groups, "numpy": np}).tolist() == right


# ---- progress -----------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, caplog, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "fastproj.trak")
    with progress.progress("scoring", 1000, "sample") as bar:
        for _ in range(10):
            clock[0] += 25
            bar.update(100)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "scoring: 300 of 1,000 samples after 01:15, about 02:55 left",
        "scoring: 600 of 1,000 samples after 02:30, about 01:40 left",
        "scoring: 900 of 1,000 samples after 03:45, about 00:25 left",
    ]
    assert capsys.readouterr() == ("", "")
    assert list(progress.tracked(range(3), "a", 3, "b")) == [0, 1, 2]


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress("scoring", 10, "sample", initial=2) as bar:
        bar.update(3)
        assert (bar.n, bar.total, bar.desc) == (5, 10, "scoring")


def test_progress_without_logging_is_on_standard_error(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress.logger, "hasHandlers", lambda: False)
    monkeypatch.setattr(progress.logger, "isEnabledFor", lambda level: True)
    with progress.progress("training", 4, "model", initial=2) as bar:
        clock[0] = 100
        bar.update(1)
    assert capsys.readouterr().err == "training: 3 of 4 models after 01:40, about 01:40 left\n"


@pytest.mark.parametrize("curvature", ["fisher", "trak"])
@pytest.mark.parametrize("proj_dim", [4, 64])
def test_progress_ends_where_it_said_it_would(tmp_path, monkeypatch, curvature, proj_dim):
    """Drawn rows of the Fisher matrix count, too."""
    bars = []

    def noted(*given):
        bars.append(progress.ProgressLines(*given))
        return bars[-1]

    monkeypatch.setattr(scoring, "progress", noted)
    monkeypatch.setattr(finalizing, "progress", noted)
    cases.small_blocks(monkeypatch.setattr)
    images, labels = cases.data(N)
    traker, states, _ = two_checkpoints(
        tmp_path, lambda i: (images, labels), proj_dim=proj_dim, curvature=curvature
    )
    for i, state in enumerate(states):
        traker.start_scoring_checkpoint("t", state, i, N)
        traker.score((images, labels), num_samples=N)
    traker.finalize_scores("t")
    traker.self_influence()
    assert [bar.what for bar in bars] == ["finalising features", "scoring", "self-influence"]
    assert [bar.n for bar in bars] == [bar.total for bar in bars]


def test_loaders_go_in_as_they_are(tmp_path):
    """The script of the docs, shuffled or not."""
    data = TensorDataset(*cases.data(N), torch.arange(N))
    nets = [cases.net(0), cases.net(1)]
    states = [copy.deepcopy(net.state_dict()) for net in nets]
    found = []
    for shuffle in (False, True):
        traker = cases.make(nets[0], tmp_path / str(shuffle), N)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, state in enumerate(states):
                traker.load_checkpoint(state, i)
                for images, labels, inds in DataLoader(data, 5, shuffle=shuffle):
                    traker.featurize((images, labels), inds=inds)
            traker.finalize_features()
        found.append(traker.saver.matrix(1))
    torch.testing.assert_close(found[0], found[1])
