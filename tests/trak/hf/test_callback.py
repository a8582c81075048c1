"""TRAKCallback: the training is the same with it, and nothing that it computed is lost."""

from __future__ import annotations

import logging
import random
import types
import warnings

import numpy as np
import pytest
import torch
import transformers as tf

from fastproj.trak.featurizer import Featurizer
from fastproj.trak.files import StoreMismatchError, read_json
from fastproj.trak.hf import HFTRAKer, TRAKCallback, checkpoints_in
from fastproj.trak.hf.undisturbed import undisturbed
from tests.essential import slow
from tests.trak.hf import models
from tests.trak.hf.training import SAMPLES, STEPS, state_of, train

OPTIONS = {"proj_dim": 16, "logging_level": logging.WARNING}


def callback(folder, **options):
    samples = models.samples_for("causal_lm", SAMPLES)
    return TRAKCallback(samples, folder / "trak", samples[:3], **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder, state) of the training without a callback."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, state_of(train(folder, []))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(found[name], t), name


@pytest.mark.parametrize("when", ["save", "epoch"])
def test_the_training_is_the_same_bit_for_bit(tmp_path, plain, when):
    ours = callback(tmp_path, when=when)
    assert_same(state_of(train(tmp_path / "run", [ours])), plain[1])
    assert ours.steps == {"save": [4, 8, 12], "epoch": [STEPS, 2 * STEPS]}[when]
    assert ours.scores.shape == (SAMPLES, 3)
    assert np.isfinite(ours.scores).all()


def test_it_is_the_same_under_autocast_and_with_gradients_accumulated(tmp_path):
    settings = {"bf16": True, "gradient_accumulation_steps": 4, "max_steps": 5, "save_steps": 2}
    wanted = state_of(train(tmp_path / "plain", [], **settings))
    ours = callback(tmp_path, when="epoch")
    assert_same(state_of(train(tmp_path / "run", [ours], **settings)), wanted)
    # Gradients are the model's own, without autocast: those of the checkpoints that were saved.
    saved = callback(tmp_path / "saved")
    run = tmp_path / "saved" / "run"
    train(run, [saved], **settings)
    check_by_checkpoints(tmp_path, saved, run)


def test_it_is_the_same_with_adapters_and_checkpointed_activations(tmp_path):
    settings = {"adapters": True, "gradient_checkpointing": True}
    wanted = state_of(train(tmp_path / "plain", [], **settings))
    ours = callback(tmp_path)
    assert_same(state_of(train(tmp_path / "run", [ours], **settings)), wanted)
    names = ours.traker.traker.gradient_names
    assert all("lora_" in name for name in names)
    assert np.abs(ours.scores).max() > 0


def check_by_checkpoints(tmp_path, ours, run, **options):
    """The scores are those of the checkpoints on disk."""
    folders = dict(zip(ours.steps, checkpoints_in(run), strict=True))
    samples = models.samples_for("causal_lm", SAMPLES)
    options = {**OPTIONS, **options}
    after = HFTRAKer(folders[ours.steps[0]], samples, folders, tmp_path / "after", **options)
    np.testing.assert_array_equal(ours.scores, after.score(samples[:3]))


def test_scores_are_those_of_the_saved_checkpoints(tmp_path):
    ours = callback(tmp_path)
    train(tmp_path / "run", [ours])
    check_by_checkpoints(tmp_path, ours, tmp_path / "run")


def test_factored_gradients(tmp_path, plain, whole):
    """The training is the same, and scores are those of the saved checkpoints."""
    ours = callback(tmp_path, factored=3)
    assert_same(state_of(train(tmp_path / "run", [ours])), plain[1])
    check_by_checkpoints(tmp_path, ours, tmp_path / "run", factored=3)
    assert np.abs(ours.scores - whole).max() > 0.01 * np.abs(whole).max()


def test_targets_may_come_later(tmp_path, whole):
    without = callback(tmp_path / "without")
    without.targets = None
    train(tmp_path / "run2", [without])
    assert without.scores is None
    folders = dict(zip(without.steps, checkpoints_in(tmp_path / "run2"), strict=True))
    samples = models.samples_for("causal_lm", SAMPLES)
    later = HFTRAKer(folders[4], samples, folders, without.save_dir, **OPTIONS)
    np.testing.assert_array_equal(later.score(samples[:3]), whole)


# ---- stopping and going on ----------------------------------------------------------------------


class Stopped(Exception):
    """Stands for a process that was killed."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The scores of a training that wasn't stopped."""
    folder = tmp_path_factory.mktemp("whole")
    ours = callback(folder)
    train(folder / "run", [ours])
    return np.array(ours.scores)


@pytest.mark.parametrize("after", [5, *map(slow, (0, 1, 6))])
def test_a_stopped_training_goes_on(tmp_path, plain, whole, monkeypatch, after):
    """Stopped before the second checkpoint is featurized, amid it, and before it is scored."""
    computed: list[tuple[int, int]] = []
    write = Featurizer.features

    def features(self, batch, model_id, inds, **kind):
        if (model_id, stop[0]) == (8, len([c for c in computed if c[0] == 8])):
            raise Stopped
        computed.append((model_id, len(inds)))
        return write(self, batch, model_id, inds, **kind)

    stop = [after]
    monkeypatch.setattr(Featurizer, "features", features)
    with pytest.raises(Stopped):
        train(tmp_path / "run", [callback(tmp_path, batch_size=4)])
    stop[0] = -1
    ours = callback(tmp_path, batch_size=4)
    trainer = train(tmp_path / "run", [ours], resume=tmp_path / "run" / "checkpoint-8")
    assert_same(state_of(trainer), plain[1])
    assert ours.steps == [4, 8, 12]
    np.testing.assert_allclose(ours.scores, whole, atol=2e-3 * np.abs(whole).max())
    total = sum(size for step, size in computed if step == 8)
    assert total == SAMPLES + 3  # nothing twice


@pytest.mark.slow
def test_steps_that_are_taken_again_to_other_weights_are_set_aside(tmp_path):
    train(tmp_path / "run", [callback(tmp_path)])
    again = callback(tmp_path)
    with pytest.warns(UserWarning, match="was moved to 4.replaced-"):
        train(tmp_path / "run2", [again], seed=1)
    fresh = callback(tmp_path / "fresh")
    train(tmp_path / "run3", [fresh], seed=1)
    np.testing.assert_array_equal(again.scores, fresh.scores)


def test_a_training_that_is_repeated_computes_nothing_again(tmp_path, monkeypatch):
    first = callback(tmp_path)
    train(tmp_path / "run", [first])
    wanted = np.array(first.scores)
    monkeypatch.setattr(Featurizer, "features", None)
    again = callback(tmp_path)
    train(tmp_path / "run2", [again])
    np.testing.assert_array_equal(again.scores, wanted)


def test_steps_of_an_earlier_training_do_not_count(tmp_path):
    """Its steps were others, and are in save_dir."""
    train(tmp_path / "run", [callback(tmp_path)])
    ours = callback(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(tmp_path / "run2", [ours], save_steps=6)
    assert ours.steps == [6, 12]
    assert read_json(ours.save_dir / "trainer.json") == {"steps": [6, 12]}
    fresh = callback(tmp_path / "fresh")
    train(tmp_path / "run3", [fresh], save_steps=6)
    np.testing.assert_array_equal(ours.scores, fresh.scores)


def test_steps_of_an_abandoned_training_do_not_count_after_a_stop(tmp_path):
    """A training that stops before it has featurized anything, and goes on behind one of them."""
    train(tmp_path / "run", [callback(tmp_path, when="epoch")])  # whose epochs end at 6 and 12

    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 9:
                raise Stopped

    other = {"per_device_train_batch_size": 2, "max_steps": 12, "save_steps": 8, "seed": 5}
    with pytest.raises(Stopped):
        train(tmp_path / "run2", [callback(tmp_path, when="epoch"), Stop()], **other)
    ours, checkpoint = callback(tmp_path, when="epoch"), tmp_path / "run2" / "checkpoint-8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(tmp_path / "run2", [ours], resume=checkpoint, **other)
    assert ours.steps == [12]


def test_generators_last_for_a_second_training(tmp_path, whole):
    samples = models.samples_for("causal_lm", SAMPLES)
    folder, rows, targets = tmp_path / "trak", iter(samples), iter(samples[:3])
    ours = TRAKCallback(rows, folder, targets, **OPTIONS)
    for _ in range(2):
        train(tmp_path / "run", [ours])
        np.testing.assert_array_equal(ours.scores, whole)


def test_weights_that_embeddings_scale_are_put_back(tmp_path, monkeypatch):
    """Featurizing brings all rows to their largest norm, training those that it looks up."""
    made = models.model_for

    def bounded(kind, seed=0):
        model = made(kind, seed)
        model.transformer.wpe.max_norm = 0.05
        return model

    monkeypatch.setattr(models, "model_for", bounded)
    wanted = state_of(train(tmp_path / "plain", []))
    ours = callback(tmp_path)
    assert_same(state_of(train(tmp_path / "run", [ours])), wanted)
    again, checkpoint = callback(tmp_path), tmp_path / "run" / "checkpoint-12"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is set aside: weights are the same
        train(tmp_path / "run", [again], resume=checkpoint, max_steps=13)
    assert again.steps == [4, 8, 12, 13]


# ---- what is said -------------------------------------------------------------------------------


def test_a_training_without_a_checkpoint_is_said(tmp_path, caplog):
    ours = callback(tmp_path)
    with caplog.at_level(logging.WARNING, "fastproj.trak"):
        train(tmp_path / "run", [ours], save_strategy="no")
    assert "nothing was featurized, because the training ended without saving" in caplog.text
    assert ours.scores is None


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_smoothed_labels_are_said_not_to_count(tmp_path, caplog, factor):
    ours = callback(tmp_path)
    with caplog.at_level(logging.WARNING, "fastproj.trak"):
        train(tmp_path / "run", [ours], save_strategy="no", label_smoothing_factor=factor)
    assert ("(label_smoothing_factor=0.1)" in caplog.text) == bool(factor)


def test_samples_that_can_not_work_stop_the_training_before_it_begins(tmp_path):
    samples = [{"input_ids": [5, 6], "labels": [5]}]
    ours = TRAKCallback([{"text": "w0"}], tmp_path / "trak", samples)
    with pytest.raises(ValueError, match="sample 0 that has 'text'"):
        train(tmp_path / "run", [ours])
    assert not (tmp_path / "run" / "checkpoint-4").exists()


def test_another_number_of_targets_stops_the_training_before_it_begins(tmp_path):
    train(tmp_path / "run", [callback(tmp_path)])
    ours = callback(tmp_path)
    ours.targets = ours.targets[:2]
    with pytest.raises(StoreMismatchError, match=r"has 3 targets, received 2.*another exp_name"):
        train(tmp_path / "run2", [ours])
    assert not (tmp_path / "run2" / "checkpoint-4").exists()


def test_a_flag_is_true_or_false(tmp_path):
    with pytest.raises(
        TypeError, match=r"received use_half_precision='no' .*; expected True or Fa"
    ):
        train(tmp_path / "run", [callback(tmp_path, use_half_precision="no")])
    assert not (tmp_path / "run" / "checkpoint-4").exists()


@pytest.mark.parametrize("of", ["fsdp", "deepspeed", "DTensors"])
def test_shards_are_refused(tmp_path, of):
    model = models.model_for("causal_lm")
    arguments = types.SimpleNamespace(fsdp="full_shard" if of == "fsdp" else "", deepspeed=None)
    if of == "deepspeed":
        arguments.deepspeed = "zero3.json"
    if of == "DTensors":
        next(model.parameters()).device_mesh = "mesh"
    state = types.SimpleNamespace(global_step=0)
    with pytest.raises(ValueError, match=f"{of}, where no process holds the whole model"):
        callback(tmp_path).on_train_begin(arguments, state, None, model=model)


def test_when_is_one_of_two():
    with pytest.raises(ValueError, match="received when='step'; expected 'save' or 'epoch'"):
        TRAKCallback([], when="step")


# ---- a model that is left as it was -------------------------------------------------------------


def test_a_model_in_training_is_left_as_it_was():
    model = models.model_for("causal_lm").train()
    model.transformer.wte.eval()
    model.transformer.wte.weight.requires_grad_(False)
    grads = {}
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if "attn" in name and p.requires_grad else None
        grads[name] = p.grad
    modes = {name: module.training for name, module in model.named_modules()}

    def drawn():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002
    wanted = drawn()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)  # noqa: NPY002

    def disturbing():
        with undisturbed(model):
            model.eval().requires_grad_(True)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            drawn()
            raise Stopped

    with pytest.raises(Stopped):
        disturbing()
    assert drawn() == wanted
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.transformer.wte.weight.requires_grad
    for name, p in model.named_parameters():
        assert p.grad is grads[name]


def test_what_accelerate_puts_around_the_forward_is_off_within():
    model = models.model_for("causal_lm")
    own, wrapped = model.forward, lambda *args, **kwargs: None
    model._original_forward, model.forward = own, wrapped
    with undisturbed(model):
        assert model.forward == own
    assert model.forward is wrapped
