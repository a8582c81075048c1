"""What a user of TRAKer can get wrong: each says what was received and what would work."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastproj import Projector, TRAKer
from fastproj.checks import check_device
from fastproj.trak import AbstractModelOutput, NotReadyError, StoreMismatchError
from fastproj.trak.files import read_json, write_json
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.tasks.image import ImageClassificationModelOutput
from tests.trak import cases, modules

N = 20


@pytest.fixture
def model():
    return cases.net()


@pytest.fixture
def train():
    return cases.data(N)


@pytest.fixture
def traker(tmp_path, model):
    return cases.loaded(model, tmp_path, N)


def shards(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"train_set_size": 0}, ValueError, "train_set_size=0"),
        ({"train_set_size": 2.5}, TypeError, "train_set_size=2.5"),
        ({"proj_dim": 0}, ValueError, "proj_dim=0"),
        (
            {"proj_dim": 8.0},
            TypeError,
            r"^TRAKer: received proj_dim=8.0 \(float\); expected an int",
        ),
        ({"proj_dim": 0, "kind": "gaussian"}, ValueError, "^TRAKer: received proj_dim=0; expected"),
        ({"projector_seed": -1}, ValueError, "^TRAKer: received projector_seed=-1; expected 0 <= "),
        (
            {"kind": "sparse"},
            ValueError,
            "^TRAKer: received kind='sparse'; expected one of rademach",
        ),
        (
            {"block": 48},
            ValueError,
            "^TRAKer: received block=48; expected a power of two from 16 to",
        ),
        ({"block": 16.0}, TypeError, "^TRAKer: received block=16.0 .*; expected a power of two"),
        ({"block": 48, "factored": 2}, ValueError, "^TRAKer: received block=48; expected a power"),
        (
            {"block": 16, "kind": "gaussian"},
            ValueError,
            "^TRAKer: received block=16 for kind='gaussian'; expected None",
        ),
        ({"factored": 0}, ValueError, "^TRAKer: received factored=0; expected 1 <= factored < 2"),
        ({"lambda_reg": -0.1}, ValueError, r"lambda_reg=-0.1.*'0.1\*mean'"),
        ({"grad_wrt": ["fc.waight"]}, ValueError, "'fc.waight'.*'fc.weight'"),
        ({"task": "segmentation"}, ValueError, "'segmentation'"),
        ({"model": "resnet"}, TypeError, "expected a torch.nn.Module"),
        ({"saver": dict}, TypeError, "saver=.*fastproj.trak.saver.Saver"),
        ({"score_computer": object()}, TypeError, "score_computer=.*ScoreComputer"),
        ({"model": nn.Identity()}, ValueError, "without parameters"),
    ],
)
def test_constructor(tmp_path, model, options, kind, message):
    settings = {
        "model": model,
        "task": "image_classification",
        "train_set_size": N,
        "save_dir": tmp_path / "new",
        "proj_dim": 8,
        **options,
    }
    with pytest.raises(kind, match=message):
        TRAKer(**settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["load_from_save_dir", "use_half_precision", "distributed"])
def test_a_flag_of_the_constructor_is_true_or_false(tmp_path, model, name):
    for odd in ("no", "", 0, 1, torch.tensor(False)):
        with pytest.raises(TypeError, match=rf"^TRAKer: received {name}=.*; expected True or Fals"):
            cases.make(model, tmp_path / "new", N, **{name: odd})
    assert not (tmp_path / "new").exists()
    cases.make(model, tmp_path / "new", N, **{name: np.False_})


def test_a_flag_of_a_call_is_true_or_false(traker, train, model):
    state = model.state_dict()

    def refused(call, name, *args):
        message = rf"^{call.__name__}: received {name}='no' \(str\); expected True or False"
        with pytest.raises(TypeError, match=message):
            call(*args, **{name: "no"})

    refused(traker.load_checkpoint, "strict", state, 1)
    assert not (traker.save_dir / "models" / "1").exists()
    traker.load_checkpoint(state, 0, strict=np.True_)
    traker.featurize(train, num_samples=N)
    refused(traker.finalize_features, "del_grads")
    with pytest.raises(NotReadyError, match="not finalised"):
        traker.start_scoring_checkpoint("test", state, 0, 3)
    traker.finalize_features(del_grads=np.True_)
    refused(traker.start_scoring_checkpoint, "strict", "test", state, 0, 3)
    assert not (traker.save_dir / "models" / "0" / "test").exists()
    traker.start_scoring_checkpoint("test", state, 0, 3, strict=np.True_)
    traker.score((train[0][:2], train[1][:2]), num_samples=2)
    refused(traker.finalize_scores, "allow_skip", "test")
    with pytest.raises(NotReadyError, match="lacks 1 of 3 targets"):
        traker.finalize_scores("test", allow_skip=np.False_)


def test_a_flag_of_a_task_is_true_or_false():
    with pytest.raises(TypeError, match=r"^ImageClassificationModelOutput: .* multilabel='no' .*F"):
        ImageClassificationModelOutput(multilabel="no")
    assert ImageClassificationModelOutput(multilabel=np.False_).multilabel is False


@pytest.mark.parametrize("package", ["safetensors", "tqdm"])
def test_a_missing_package_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; import fastproj; fastproj.TRAKer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip().endswith(
        f"fastproj.trak needs {package}: pip install 'torch-fastproj[trak]'"
    )


def test_a_missing_gpu_is_named(tmp_path, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'cuda:0.*no GPU\); expected a device .* such as "cpu"'):
        cases.make(model, tmp_path, N, device="cuda:0")


def test_gpus_are_counted_and_not_touched(monkeypatch):
    """Each process would take memory of the first one before it turns to its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", None)
    for device in ("cuda", "cuda:0", "cuda:1"):
        assert check_device("f", device) == torch.device(device)
    with pytest.raises(ValueError, match=r"f: received device='cuda:2' \(torch finds 2 GPU"):
        check_device("f", "cuda:2")


@pytest.mark.parametrize("device", ["foo", "cuda:one", "meta", "maia", 3.5])
def test_other_devices_are_refused_and_the_model_stays_as_it_is(tmp_path, model, device):
    with pytest.raises((TypeError, ValueError), match=r"TRAKer: received device=.*; expected a "):
        cases.make(model, tmp_path, N, device=device)
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_an_empty_batch_is_nothing_to_do(traker, train, model):
    """The last batch of a sampler may be empty."""
    nothing = (train[0][:0], train[1][:0])
    traker.featurize(nothing, inds=[])
    traker.featurize(nothing, inds=torch.empty(0, dtype=torch.int64))
    traker.featurize(nothing, num_samples=0)
    assert not shards(traker.save_dir)
    with pytest.raises(ValueError, match="num_samples=0 with a batch of 20"):
        traker.featurize(train, num_samples=0)
    with pytest.raises(ValueError, match="0 inds with a batch of 20"):
        traker.featurize(train, inds=[])
    traker.featurize(train, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 3)
    traker.score(nothing, num_samples=0)
    traker.score((train[0][:3], train[1][:3]), num_samples=3)
    with pytest.raises(ValueError, match="top_k=0"):
        traker.finalize_scores("test", top_k=0)
    assert traker.finalize_scores("test", top_k=99).helpful_indices.shape == (3, N)


def test_batches_that_remain(tmp_path, traker, train, model):
    with pytest.raises(NotReadyError, match="call load_checkpoint or"):
        cases.make(model, tmp_path / "new", N).remaining_batches(4)
    with pytest.raises(ValueError, match="batch_size=0"):
        traker.remaining_batches(0)
    traker.featurize((train[0][[0, 1, 2, 3, 9]], train[1][[0, 1, 2, 3, 9]]), inds=[0, 1, 2, 3, 9])
    traker.load_checkpoint(model.state_dict(), 0)
    todo = traker.remaining_batches(4)
    assert todo == [[4, 5, 6, 7], [8, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    for inds in todo:
        traker.featurize((train[0][inds], train[1][inds]), inds=inds)
    assert traker.remaining_batches(4) == []
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 3)
    assert traker.remaining_batches(2) == [[0, 1], [2]]


def test_checkpoints_that_do_not_fit_leave_the_model_alone(traker, model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t + 1 for name, t in model.state_dict().items()}
    missing = {name: t for name, t in state.items() if name != "fc.bias"}
    with pytest.raises(ValueError, match=r"missing: fc.bias"):
        traker.load_checkpoint(missing, 1)
    with pytest.raises(ValueError, match=r"not in the model: head"):
        traker.load_checkpoint({**state, "head": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match=r"other shapes: fc.bias \[9\] for \[4\]"):
        traker.load_checkpoint({**state, "fc.bias": torch.zeros(9)}, 1)
    with pytest.raises(TypeError, match="of type Net; expected a state_dict"):
        traker.load_checkpoint(model, 1)
    with pytest.raises(ValueError, match="model_id=-1"):
        traker.load_checkpoint(state, -1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not (traker.save_dir / "models" / "1").exists()


def test_another_checkpoint_under_the_same_model_id(traker, train, model):
    cases.featurize(traker, model, 0, train)
    other = {name: t + 1 for name, t in model.state_dict().items()}
    kept = shards(traker.save_dir)
    with pytest.raises(StoreMismatchError, match=r"model_id 0 .*hash \w+, received .*hash \w+"):
        traker.load_checkpoint(other, 0)
    traker.finalize_features()
    with pytest.raises(StoreMismatchError, match="expected the checkpoint, or the model_id, that"):
        traker.start_scoring_checkpoint("test", other, 0, 3)
    assert set(kept) <= set(shards(traker.save_dir))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"proj_dim": 9}, "proj dim 8 in the directory, 9 in this run"),
        ({"projector_seed": 5}, "seed 0 in the directory, 5 in this run"),
        ({"kind": "gaussian"}, "kind 'rademacher' in the directory, 'gaussian' in this run"),
        ({"grad_wrt": ["fc.weight"]}, "num params 341 in the directory, 300 in this run"),
        ({"n": 21}, "train set size 20 in the directory, 21 in this run"),
    ],
)
def test_a_directory_of_another_run(traker, model, train, other, message):
    cases.featurize(traker, model, 0, train)
    kept = shards(traker.save_dir)
    options = dict(other)
    n = options.pop("n", N)
    with pytest.raises(StoreMismatchError, match=message) as error:
        cases.make(model, traker.save_dir, n, **options)
    assert "another save_dir" in str(error.value)
    assert shards(traker.save_dir) == kept
    cases.make(model, traker.save_dir, N)


def test_a_directory_of_another_version(traker, model):
    """No setting makes it fit."""
    path = traker.save_dir / "metadata.json"
    write_json(path, {**read_json(path), "format": 3})
    with pytest.raises(StoreMismatchError, match="use the version of fastproj that made it, or"):
        cases.make(model, traker.save_dir, N)


def test_a_directory_of_another_task(tmp_path, model, train):
    def total(model, batch):
        return model(batch[0]).sum(1)

    Own = type("Own", (ImageClassificationModelOutput,), {"__module__": "elsewhere"})
    tasks = [
        ("image_classification", "ImageClassificationModelOutput(temperature=1.0)"),
        (ImageClassificationModelOutput(2.0), "ImageClassificationModelOutput(temperature=2.0)"),
        (total, "FunctionModelOutput(output=total, loss=None)"),
        (Own(), "Own"),
    ]
    for i, (task, _) in enumerate(tasks):
        TRAKer(model, task, N, tmp_path / str(i), device="cpu")
        for j, (other, name) in enumerate(tasks):
            if i == j:
                TRAKer(model, other, N, tmp_path / str(i), device="cpu")
                continue
            with pytest.raises(StoreMismatchError) as error:
                TRAKer(model, other, N, tmp_path / str(i), device="cpu")
            stored = tasks[i][1]
            assert f"task {stored!r} in the directory, {name!r} in this run" in str(error.value)
    TRAKer(model, "iterative_image_classification", N, tmp_path / "0", device="cpu")


def test_a_directory_of_another_model_or_spec(traker, monkeypatch):
    class Renamed(cases.Net):
        def __init__(self):
            super().__init__()
            self.head = self.fc
            del self.fc

    with pytest.raises(
        StoreMismatchError, match=r"parameter layout '.*' in the directory, '.*' in"
    ):
        cases.make(Renamed(), traker.save_dir, N)
    monkeypatch.setattr("fastproj.trak.estimator.SPEC_VERSION", 2)
    with pytest.raises(StoreMismatchError, match="spec version 1 in the directory, 2 in this run"):
        cases.make(cases.net(), traker.save_dir, N)


def test_order_of_calls(tmp_path, model, train):
    traker = cases.make(model, tmp_path, N)
    with pytest.raises(NotReadyError, match="call load_checkpoint"):
        traker.featurize(train, num_samples=N)
    with pytest.raises(NotReadyError, match="has none"):
        traker.finalize_features()
    with pytest.raises(NotReadyError, match="start_scoring_checkpoint"):
        traker.score(train, num_samples=N)
    with pytest.raises(NotReadyError, match="experiment 'test' does not exist"):
        traker.finalize_scores("test")
    traker.load_checkpoint(model.state_dict(), 4)
    with pytest.raises(NotReadyError, match="start_scoring_checkpoint"):
        traker.score(train, num_samples=N)
    traker.featurize((train[0][:15], train[1][:15]), num_samples=15)
    fewer = r"model_id 4 lacks 5 of 20 .*first: 15.*no more .* train_set_size=15 and another save_d"
    with pytest.raises(NotReadyError, match=fewer):
        traker.finalize_features()
    traker.featurize((train[0][15:], train[1][15:]), num_samples=5)
    with pytest.raises(NotReadyError, match="model_id 4 is not finalised"):
        traker.start_scoring_checkpoint("test", model.state_dict(), 4, 3)
    traker.finalize_features()
    with pytest.raises(NotReadyError, match=r"\[7\].*has \[4\]"):
        traker.finalize_features(model_ids=[7])
    traker.start_scoring_checkpoint("test", model.state_dict(), 4, 3)
    with pytest.raises(NotReadyError, match="load_checkpoint"):
        traker.featurize(train, num_samples=N)
    with pytest.raises(NotReadyError, match="lacks 3 of 3 targets") as error:
        traker.finalize_scores("test")
    assert "no more" not in str(error.value)
    traker.score((train[0][:2], train[1][:2]), inds=[1, 0])
    with pytest.raises(NotReadyError, match=r"no more .* num_targets=2 and another exp_name"):
        traker.finalize_scores("test")


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        (torch.zeros(4, 1, 5, 5), TypeError, r"received \[4, 1, 5, 5\] float32 on cpu"),
        ({"x": torch.zeros(4, 1, 5, 5)}, ValueError, "dict of x"),
        ("images", TypeError, "type str; expected a tuple or list such as .* or a dict"),
        ((torch.zeros(4, 1, 5, 5), [0, 1, 2, 3]), TypeError, r"list of int.*as_tensor\(labels\)"),
        ((torch.zeros(4, 1, 5, 5), list("abcd")), TypeError, "list of str.*whole data set"),
        ((torch.zeros(4, 1, 5, 5), [*torch.arange(4)]), TypeError, r"Tensor;.*torch.stack\(labels"),
        (([*torch.zeros(4, 1, 5, 5)], torch.arange(4)), ValueError, r"\(list of Tensor, \[4\]"),
        ((tuple("abcd"), torch.arange(4)), ValueError, r"\(list of str, \[4\] int64"),
        (
            (torch.zeros(4, 1, 5, 5), [0, 1, 2]),
            ValueError,
            r"a list of 3, in a batch of 4",
        ),
        ((torch.zeros(4, 1, 5, 5), object()), TypeError, "object .* inside the batch"),
        (([], 3), ValueError, "a list of 0, in a batch of 4"),
        ((3, "a"), ValueError, "empty batch .2 parts"),
        ((np.zeros((4, 1, 5, 5)),), TypeError, r"ndarray \[4, 1, 5, 5\] float64 inside the batch"),
        ((torch.zeros(4, 1, 5, 5), torch.zeros(3).long()), ValueError, "share their first"),
        ((torch.zeros(4, 1, 5, 5), torch.tensor(3)), ValueError, "share their first"),
        ((), ValueError, "empty batch"),
        ((torch.zeros(4, 1, 5, 5),), ValueError, "1 parts"),
        ((torch.zeros(4, 1, 5, 5), torch.full((4,), 9)), ValueError, "label 9 at row 0"),
    ],
)
def test_batches(traker, batch, kind, message):
    with pytest.raises(kind, match=message):
        traker.featurize(batch, num_samples=4)
    assert not shards(traker.save_dir)


@pytest.mark.parametrize(
    ("inds", "kind", "message"),
    [
        ([0, 1, 2, 20], ValueError, "sample 20; expected 0 <= index < train_set_size = 20"),
        ([0, 1, 2, -1], ValueError, "sample -1"),
        ([0, 1, 2, 1], ValueError, "index 1 more than once"),
        ([0, 1, 2], ValueError, "3 inds with a batch of 4"),
        ([0.0, 1.0, 2.0, 3.0], TypeError, "dtype float64"),
        (np.array([True] * 4), TypeError, "numpy.flatnonzero"),
    ],
)
def test_indices(traker, train, inds, kind, message):
    batch = (train[0][:4], train[1][:4])
    with pytest.raises(kind, match=message):
        traker.featurize(batch, inds=inds)
    assert not shards(traker.save_dir)
    traker.featurize(batch, inds=torch.tensor([[3], [0], [9], [5]]))
    assert traker.saver.index(0).done.nonzero()[0].tolist() == [0, 3, 5, 9]


@pytest.mark.parametrize("inds", [[0, N], [-1], [10**9]])
def test_samples_that_arent_there_have_no_drawn_rows(traker, inds):
    message = rf"^has_drawn_rows: received sample {inds[-1]}; expected 0 <= index < .* = {N}$"
    with pytest.raises(ValueError, match=message):
        traker.has_drawn_rows(inds)


def test_num_samples(traker, train):
    batch = (train[0][:4], train[1][:4])
    with pytest.raises(ValueError, match="neither inds nor num_samples"):
        traker.featurize(batch)
    with pytest.raises(ValueError, match="both inds and num_samples"):
        traker.featurize(batch, inds=[0, 1, 2, 3], num_samples=4)
    with pytest.raises(ValueError, match="num_samples=5 with a batch of 4"):
        traker.featurize(batch, num_samples=5)
    traker.featurize((train[0][:18], train[1][:18]), num_samples=18)
    more = r"sample 20; .* index < train_set_size = 20 .*larger .* takes another save_dir"
    with pytest.raises(ValueError, match=more):
        traker.featurize(batch, num_samples=4)
    traker.featurize((train[0][18:], train[1][18:]), num_samples=np.int64(2))
    assert traker.saver.index(0).done.all()


def test_features_that_are_not_finite_name_their_samples(traker, train):
    images = train[0].clone()
    images[3, 0, 0, 0] = torch.nan
    images[11] = torch.inf
    with pytest.raises(ValueError, match=r"samples 3, 11 are not finite"):
        traker.featurize((images, train[1]), num_samples=N)
    assert not shards(traker.save_dir)
    traker.featurize(train, num_samples=N)  # put right, at the same place
    assert traker.saver.index(0).done.all()


def test_gradients_that_are_not_finite_though_the_output_is(tmp_path, train):
    @modules.of(fc=lambda: nn.Linear(25, 4))
    def Root(self, x):
        """The output of the square root is 0 at 0; its slope is infinite."""
        return (self.fc(x.flatten(1)) - self.fc.bias).abs().sqrt()

    images = train[0].clone()
    images[7] = 0
    traker = cases.loaded(Root(), tmp_path, N)
    with pytest.raises(ValueError, match="features of sample 7 are not finite"):
        traker.featurize((images, train[1]), num_samples=N)
    assert not shards(traker.save_dir)


@pytest.mark.parametrize("left", [2, 1])
def test_masks_of_logits_that_leave_nothing_to_compare_are_named(tmp_path, train, left):
    """A mask that hides the label, or all other classes: f is infinite."""

    @modules.of(fc=lambda: nn.Linear(25, 4))
    def Masked(self, x):
        return self.fc(x.flatten(1)).masked_fill(torch.arange(4) >= left, -torch.inf)

    labels = torch.full_like(train[1], 0 if left == 1 else 3)
    traker = cases.loaded(Masked(), tmp_path, N)
    with pytest.raises(ValueError, match=r"not finite.* mask the label, or all but the label"):
        traker.featurize((train[0], labels), num_samples=N)


def test_other_data_for_a_featurized_sample_is_noticed_once(traker, train):
    traker.featurize(train, num_samples=N)
    before = traker.saver.matrix(0)
    traker.load_checkpoint(traker.model.state_dict(), 0)
    other = (train[0].flip(0), train[1])
    with pytest.warns(UserWarning, match="sample 0 of model_id 0 was featurized from other data"):
        traker.featurize((other[0][:10], other[1][:10]), num_samples=10)
    traker.featurize((other[0][10:], other[1][10:]), num_samples=10)
    assert torch.equal(traker.saver.matrix(0), before)


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "..", "a\0b", None, 3, 201 * "a", 101 * "ä"]
)
def test_experiment_names_that_name_no_file(traker, train, model, name):
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    with pytest.raises(ValueError, match="exp_name"):
        traker.start_scoring_checkpoint(name, model.state_dict(), 0, 3)


def test_number_of_targets(traker, train, model):
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    with pytest.raises(ValueError, match="num_targets=0"):
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 0)
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, 3)
    more = r"sample 3; expected 0 <= index < num_targets = 3 .*larger .* takes another exp_name"
    with pytest.raises(ValueError, match=more):
        traker.score(train, num_samples=N)
    with pytest.raises(
        StoreMismatchError, match=r"'test' .* has 3 targets, received 4\. Nothing was"
    ):
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 4)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm2d(1, affine=False), "0"),
        (nn.InstanceNorm2d(1, track_running_stats=True), "0"),
        (nn.Dropout(0.1), "0"),
        (nn.Sequential(nn.Identity(), nn.Dropout2d()), r"0\.1"),
    ],
)
@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_training_mode_is_refused_by_all_and_changes_nothing(
    tmp_path, train, layer, name, computer
):
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.Linear(25, 4))
    traker = cases.loaded(model, tmp_path, len(train[0]), gradient_computer=computer)
    before = copy.deepcopy(model.state_dict())
    model.train()
    with pytest.raises(ValueError, match=rf"a model with {name} in training mode.*model\.eval"):
        traker.featurize(train, num_samples=len(train[0]))
    assert shards(tmp_path) == []
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    traker.load_checkpoint(before, 0)
    traker.featurize(train, num_samples=len(train[0]))


def test_training_mode_without_effect_is_taken(tmp_path, train):
    """cuDNN differentiates recurrent modules in training mode alone."""
    model = nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Dropout(0.0), nn.Linear(25, 4))
    traker = cases.loaded(model, tmp_path, len(train[0]))
    model.train()
    traker.featurize(train, num_samples=len(train[0]))


@modules.of(fc=lambda: nn.Linear(25, 25), out=lambda: nn.Linear(25, 4))
def ActsInTraining(self, x):
    """Does something else in training mode, as no module of torch's shows."""
    h = torch.tanh(self.fc(x.flatten(1)))
    if self.training:
        drops = self.act == "drops out"
        h = torch.nn.functional.dropout(h, 0.5) if drops else h * (0.5 if self.act else 1)
    return self.out(h)


@pytest.mark.parametrize("at", [0, 2])  # that of the first batch, and one that hooks don't check
@pytest.mark.parametrize("act", ["drops out", "scales"])
@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_training_mode_that_shows_in_outputs_alone(tmp_path, train, computer, act, at):
    model = ActsInTraining()
    model.act = act
    traker = cases.loaded(model, tmp_path, N, gradient_computer=computer)
    rows = list(torch.arange(N).split(2))
    for inds in rows[:at]:
        traker.featurize([part[inds] for part in train], inds=inds)
    model.train()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ActsInTraining, fc, out in training mode.*eval\(\)"):
            traker.featurize([part[rows[at]] for part in train], inds=rows[at])
    assert traker.saver.index(0).done.sum() == 2 * at
    assert model.training
    model.eval()
    traker.featurize(train, inds=range(N))
    model.act = ""  # in training mode, without effect
    again = cases.loaded(model, tmp_path / "again", N, gradient_computer=computer)
    model.train()
    again.featurize(train, inds=range(N))
    torch.testing.assert_close(again.saver.matrix(0), traker.saver.matrix(0))


class Alone(AbstractModelOutput):
    """The logit of the label, of one sample."""

    def get_output(self, model, weights, buffers, image, label):
        logits = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))
        return logits[0].gather(0, label.reshape(1))[0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[1]))


def test_training_mode_that_shows_in_outputs_of_single_samples(tmp_path, train):
    model = ActsInTraining()
    model.act = "scales"
    traker = cases.loaded(model, tmp_path, N, Alone(), curvature="trak")
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        traker.featurize(train, inds=range(N))
    model.act = ""
    traker.featurize(train, inds=range(N))


@modules.of(fc=lambda: nn.Linear(25, 25), out=lambda: nn.Linear(25, 4))
def DropsOut(self, x):
    """Dropout as a function, which is on by default; ``mended`` switches it off."""
    h = torch.tanh(self.fc(x.flatten(1)))
    if not hasattr(self, "mended"):
        h = torch.nn.functional.dropout(h, 0.5)
    return self.out(h)


@pytest.mark.parametrize("size", [1, N])
@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_random_numbers_are_refused_by_all_and_leave_nothing(
    tmp_path, train, size, computer, caplog
):
    model = DropsOut()
    traker = cases.loaded(model, tmp_path, N, gradient_computer=computer)
    batch = [part[:size] for part in train]
    said = r"differ from one call to the next.*F\.dropout\(x, p, training=self\.training\)"
    for _ in range(2):  # not the first time alone
        with pytest.raises(RandomNumbersError, match=said):
            traker.featurize(batch, num_samples=size)
    assert shards(tmp_path) == []
    assert "depend on the other samples" not in caplog.text
    model.mended = True
    traker = cases.loaded(model, tmp_path, N, gradient_computer=computer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traker.featurize(train, num_samples=N)


@pytest.mark.parametrize("computer", ["auto", "hooks", "func", "loop"])
def test_random_numbers_are_refused_for_parts_of_scores(tmp_path, train, computer):
    model = DropsOut()
    model.mended = True
    traker = cases.featurized(model, tmp_path, train, gradient_computer=computer)
    traker.finalize_features()
    del model.mended
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, N)
    with pytest.raises(RandomNumbersError):
        traker.score(train, per="module")


@pytest.mark.parametrize("computer", ["auto", "hooks"])
def test_random_numbers_of_some_batches_alone_make_the_others_distrusted(tmp_path, train, computer):
    """Hooks let earlier batches pass because none of theirs differed."""
    model = DropsOut()
    model.mended = True
    traker = cases.loaded(model, tmp_path, N, gradient_computer=computer)
    traker.featurize([part[:4] for part in train], inds=range(4))
    del model.mended
    with pytest.raises(RandomNumbersError), pytest.warns(match="4 training samples"):
        traker.featurize([part[4:7] for part in train], inds=range(4, 7))
    assert not traker.saver.index(0).done.any()


@pytest.mark.parametrize("computer", ["func", "loop"])
def test_rounding_that_differs_is_not_taken_for_random_numbers(tmp_path, train, computer):
    """As of kernels that add in any order."""

    class Unsteady(DropsOut):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + 1e-6 * (self.calls % 2))

    model = Unsteady()
    model.mended = True
    cases.loaded(model, tmp_path, N, gradient_computer=computer).featurize(train, num_samples=N)


# ---- what would spoil gradients without a word ---------------------------------------------------

COMPUTERS = ["auto", "hooks", "func", "loop"]


def margin(model, batch):
    """The output of a label, as a task of its own."""
    images, labels = batch
    return model(images).gather(1, labels.unsqueeze(1)).squeeze(1)


@modules.of(fc=lambda: nn.Linear(25, 4))
def Blind(self, x):
    """Logits that autograd knows nothing of."""
    return self.fc(x.flatten(1)).detach()


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("task", ["image_classification", margin, "another model", "argmax"])
def test_an_output_that_does_not_depend_on_the_model_is_refused(tmp_path, train, computer, task):
    model = cases.net() if isinstance(task, str) and task[0] == "a" else Blind()
    other = cases.net()
    if task == "another model":
        task = lambda _, batch: margin(other, batch)  # noqa: E731
    elif task == "argmax":
        task = lambda model, batch: model(batch[0]).argmax(1).float()  # noqa: E731
    traker = TRAKer(model, task, N, tmp_path, gradient_computer=computer, proj_dim=8)
    traker.load_checkpoint(model.state_dict(), 0)
    said = r"output of (Image|Function)\w*ModelOutput doesn't depend on any of the \d parameters"
    with pytest.raises(ValueError, match=said):
        traker.featurize(train, num_samples=N)
    assert shards(tmp_path) == []


def as_usual(traker, train):
    traker.featurize(train, num_samples=N)


def without_grad(traker, train):
    with torch.no_grad():
        as_usual(traker, train)


def in_inference_mode(traker, train):
    with torch.inference_mode():
        traker.featurize((train[0] * 1, train[1]), num_samples=N)


def under_autocast(traker, train):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        as_usual(traker, train)


def inputs_with_gradients(traker, train):
    traker.featurize((train[0].clone().requires_grad_(), train[1]), num_samples=N)


def small_labels(traker, train):
    traker.featurize((train[0], train[1].to(torch.uint8)), num_samples=N)


@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize(
    "call", [without_grad, in_inference_mode, under_autocast, inputs_with_gradients, small_labels]
)
def test_features_are_the_same_whatever_they_are_called_in(
    tmp_path, model, train, computer, call, caplog
):
    found = []
    for name, way in (("usual", as_usual), ("other", call)):
        traker = cases.loaded(model, tmp_path / name, N, gradient_computer=computer)
        way(traker, train)
        found.append((traker.saver.matrix(0), traker.saver.out_to_loss(0)))
    assert bool(found[0][0].any())
    for usual, other in zip(*found, strict=True):
        torch.testing.assert_close(usual, other, rtol=0, atol=0)
    assert ("autocast is off" in caplog.text) == (call is under_autocast)


def test_another_default_dtype_changes_nothing(tmp_path, model, train):
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            traker = cases.make(model, tmp_path / str(dtype), N)
            cases.featurize(traker, model, 0, train)
            traker.finalize_features()
            cases.score(traker, model, 0, train)
            found.append(traker.finalize_scores("test"))
        finally:
            torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("step", ["featurize", "score"])
def test_a_model_that_has_changed_since_its_checkpoint_was_loaded(traker, model, train, step):
    state = copy.deepcopy(model.state_dict())
    if step == "score":
        cases.featurize(traker, model, 0, train)
        traker.finalize_features()
        traker.start_scoring_checkpoint("test", state, 0, N)
    with torch.no_grad():
        model.fc.bias.add_(1)
    with pytest.raises(ValueError, match=rf"{step}: fc\.bias of the model have changed since"):
        getattr(traker, step)(train, num_samples=N)
    if step == "score":
        traker.start_scoring_checkpoint("test", state, 0, N)
    else:
        traker.load_checkpoint(state, 0)
    getattr(traker, step)(train, num_samples=N)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_parameters_of_several_dtypes(tmp_path, train, computer):
    @modules.of(seed=0, a=lambda: nn.Linear(25, 8).bfloat16(), b=lambda: nn.Linear(8, 4))
    def Mixed(self, x):
        return self.b(self.a(x.flatten(1).bfloat16()).float())

    model = Mixed()
    traker = cases.make(model, tmp_path, N, gradient_computer=computer)
    cases.featurize(traker, model, 0, train)
    exact = cases.projected(cases.gradients(model, train), 8, 0)
    error = (traker.saver.matrix(0).double() - exact).norm() / exact.norm()
    assert error < 2 * torch.finfo(torch.bfloat16).eps


def with_int8():
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 4))
    table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.register_parameter("table", table)
    return model


def dispatched(places):
    """As accelerate leaves a model whose parts are on several GPUs."""
    model = cases.net()
    model.hf_device_map = places
    return model


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": with_int8()}, ValueError, "'table' of dtype torch.int8.*floating-point"),
        ({"model": nn.DataParallel(cases.net())}, TypeError, r"expected model\.module"),
        ({"model": nn.Linear(25, 4, device="meta")}, ValueError, "weight, bias on the meta device"),
        ({"model": dispatched({"fc": 1, "": 0})}, ValueError, "device_map, on 0, 1; expected"),
        ({"model": torch.jit.script(nn.Linear(25, 4))}, TypeError, "the module that it was made"),
        ({"grad_wrt": list(cases.net().parameters())}, TypeError, "grad_wrt with Parameter"),
        ({"gradient_computer": object()}, TypeError, "a class .not an instance."),
        ({"projector": 3}, TypeError, "projector=3; expected None, or an object"),
        ({"projector": Projector}, TypeError, "not a class"),
    ],
)
def test_constructor_of_other_things(tmp_path, change, kind, message):
    arguments = {"model": cases.net(), "task": "image_classification", "train_set_size": N}
    with pytest.raises(kind, match=message):
        TRAKer(**{**arguments, "save_dir": tmp_path / "new", **change})
    assert not (tmp_path / "new").exists()


def test_a_model_with_a_map_to_one_device_is_taken(tmp_path):
    cases.make(dispatched({"": "cpu"}), tmp_path, N)


def test_a_projector_that_comes_late_is_refused(traker):
    """TRAK would use it from there on; the save_dir is another matrix's."""
    with pytest.raises(AttributeError, match=r"projector = Projector .*TRAKer\(\.\.\., projector="):
        traker.projector = Projector(traker.projector.grad_dim, 7)


def test_whole_tables_are_taken_where_grad_wrt_leaves_them_out(tmp_path, train):
    model = with_int8()
    traker = cases.make(model, tmp_path, N, grad_wrt=["1.weight"])
    cases.featurize(traker, model, 0, train)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, ValueError, "checkpoint.'state_dict'."),
        (
            lambda state: {f"module.{key}": t for key, t in state.items()},
            ValueError,
            "its keys begin with 'module.': remove that",
        ),
        (
            lambda state: {f"net.body.{key}": t for key, t in state.items()} | {"a.b": state},
            ValueError,
            "its keys begin with 'net.body.': remove that",
        ),
        (
            lambda state: {key: t.numpy() for key, t in state.items()},
            TypeError,
            "gain of type ndarray.*expected tensors",
        ),
    ],
)
def test_checkpoints_that_hold_something_else(traker, model, make, kind, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        traker.load_checkpoint(make(model.state_dict()), 0)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_checkpoints_of_a_model_that_is_wrapped_now(tmp_path, model):
    wrapped = nn.Sequential(model)
    with pytest.raises(ValueError, match=r"the model's keys begin with '0\.': give the model that"):
        cases.make(wrapped, tmp_path, N).load_checkpoint(model.state_dict(), 0)
    cases.make(wrapped[0], tmp_path / "inside", N).load_checkpoint(model.state_dict(), 0)


def test_a_nested_tensor_goes_in_as_a_list(traker):
    images = torch.nested.nested_tensor([torch.zeros(1, 5, n) for n in (5, 6)])
    with pytest.raises(TypeError, match=r"nested tensor; expected .* \(list\(t\.unbind\(\)\)\)"):
        traker.featurize((images, torch.tensor([0, 1])), num_samples=2)

    def first(model, batch):
        return torch.stack([model(x[None, ..., :5])[0, 0] for x in batch[0]])

    own = TRAKer(traker.model, first, N, traker.save_dir / "own", proj_dim=8, device="cpu")
    own.load_checkpoint(traker.model.state_dict(), 0)
    own.featurize((list(images.unbind()), torch.tensor([0, 1])), num_samples=2)


def test_numbers_of_checkpoints_and_of_samples_that_are_none(traker, model, train):
    with pytest.raises(TypeError, match=r"inds of type generator"):
        traker.featurize(train, inds=(i for i in range(N)))
    with pytest.raises(ValueError, match="inds that make no array"):
        traker.featurize(train, inds=[[0], [1, 2]])
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo.*to_dense"):
        traker.featurize((train[0].flatten(1).to_sparse(), train[1]), num_samples=N)
    with pytest.raises(ValueError, match=r"a tuple of 2, in a batch of 20.*default_collate"):
        traker.featurize(list(zip(*train, strict=True)), num_samples=N)
    cases.featurize(traker, model, 0, train)
    for call in (
        lambda: traker.finalize_features(model_ids=0),
        lambda: traker.self_influence(model_ids="0"),
        lambda: traker.finalize_scores("test", model_ids=[0.5]),
    ):
        with pytest.raises(TypeError, match=r"received model_ids=.*such as \[0\]"):
            call()
    with pytest.raises(ValueError, match=r"model_ids with 0 more than once.*model_ids=\[0, 1\]"):
        traker.finalize_scores("test", model_ids=[0, 1, 0])
    traker.finalize_features(model_ids=(i for i in np.arange(1)))


@pytest.mark.parametrize("options", [{}, {"lambda_reg": 0.1}])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("k", [4, 40])
def test_scores_are_the_same_under_autocast(tmp_path, monkeypatch, model, train, options, exact, k):
    if not exact:  # in float32, as where n k^2 is large
        monkeypatch.setattr("fastproj.trak.solving.solve.EXACT_FLOPS", 0)
    targets, found = (train[0][:3], train[1][:3]), []
    for name, inside in (("usual", False), ("other", True)):
        traker = cases.loaded(model, tmp_path / name, N, proj_dim=k, **options)
        as_usual(traker, train)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            traker.finalize_features()
            traker.start_scoring_checkpoint("test", model.state_dict(), 0, 3)
            traker.score(targets, num_samples=3)
            parts = traker.score(targets, per="module")
            stream = traker.score(train, stream=True)
            scores = np.array(traker.finalize_scores("test"))
            found.append((scores, parts, stream, traker.self_influence()))
    for usual, other in zip(*found, strict=True):
        np.testing.assert_array_equal(usual, other)
