"""TRAKer end to end: against the written-out formula, and against TRAK's known faults."""

from __future__ import annotations

import logging
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastproj
from fastproj import TRAKer
from fastproj.trak import (
    AbstractModelOutput,
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    NotReadyError,
    SingularXtXWarning,
    StoreMismatchError,
)
from fastproj.trak.solving.solve import System
from tests.trak import cases

N, M = 30, 6


@pytest.fixture
def models():
    return [cases.net(seed, torch.float64) for seed in (0, 1)]


@pytest.fixture
def train():
    return cases.data(N, dtype=torch.float64)


@pytest.fixture
def targets():
    return cases.data(M, seed=5, dtype=torch.float64)


# ---- the formula -------------------------------------------------------------------------------


def test_features_are_the_projected_gradients(tmp_path, models, train):
    traker = cases.make(models[0], tmp_path, N, proj_dim=19, projector_seed=7)
    cases.featurize(traker, models[0], 3, train)
    exact = cases.projected(cases.gradients(models[0], train), 19, model_id=3, seed=7)
    torch.testing.assert_close(traker.saver.matrix(3), exact)
    torch.testing.assert_close(
        traker.saver.out_to_loss(3).double(), cases.q(models[0], train), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("lambda_reg", [0.0, 0.01])
def test_scores_are_the_papers_formula(tmp_path, models, train, targets, lambda_reg):
    scores = cases.whole_run(tmp_path, models, train, targets, lambda_reg=lambda_reg)
    exact = cases.explicit_trak(models, train, targets, 8, lambda_reg)
    assert (scores.shape, scores.dtype) == ((N, M), np.float32)
    np.testing.assert_allclose(scores, exact, rtol=2e-6, atol=2e-6 * float(exact.abs().max()))


def test_blocks_and_chunks_do_not_matter(tmp_path, models, train, targets, monkeypatch):
    whole = cases.whole_run(tmp_path / "a", models, train, targets)
    cases.small_blocks(monkeypatch.setattr)
    monkeypatch.setattr("fastproj.trak.gradients.base.GRAD_BYTES", 1)
    blocks = cases.whole_run(tmp_path / "b", models, train, targets)
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_linear_model_by_hand(tmp_path):
    """Two classes and a linear model: f = (w_y - w_other) x, so its gradient is +-x."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    x, y = torch.randn(12, 3).double(), torch.randint(0, 2, (12,))
    grads = torch.zeros(12, 2, 3).double()
    grads[torch.arange(12), y] = x
    grads[torch.arange(12), 1 - y] = -x
    phi = cases.projected(grads.flatten(1), 3, 0)
    margin = ((model.weight[y] - model.weight[1 - y]) * x).sum(1).detach()
    inverse = torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(3).double())
    exact = phi @ inverse @ phi.T / (1 + margin.exp())[:, None]
    scores = cases.whole_run(tmp_path, [model], (x, y), (x, y), proj_dim=3, lambda_reg=0.5)
    np.testing.assert_allclose(scores, exact, rtol=1e-6, atol=1e-7)


def one_output(base, scale):
    """A computer of a user's own that gives the gradients of one output."""

    class Scaled(base):
        def compute_per_sample_grad(self, batch):
            return {n: g * scale for n, g in super().compute_per_sample_grad(batch).items()}

    return Scaled


def all_outputs(base, scale):
    """The same of several outputs."""

    class Scaled(base):
        def compute_rows(self, batch):
            return [{n: g * scale for n, g in rows.items()} for rows in super().compute_rows(batch)]

    return Scaled


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (one_output, FunctionalGradientComputer),
        (one_output, HookGradientComputer),
        (all_outputs, FunctionalGradientComputer),
    ],
)
def test_half_precision_storage_keeps_three_digits_at_any_scale(tmp_path, train, scale, kind, base):
    """Gradients far outside float16's range; plain float16 would store zeros or infinities."""
    model = cases.net(dtype=torch.float64)
    computer = kind(base, scale)
    traker = cases.make(model, tmp_path, N, use_half_precision=True, gradient_computer=computer)
    assert (traker.fisher is None) is (kind is one_output)
    cases.featurize(traker, model, 0, train)
    exact = cases.projected(cases.gradients(model, train) * scale, 8, 0)
    stored = traker.saver.matrix(0)
    assert float(((stored - exact).norm(dim=1) / exact.norm(dim=1)).max()) < 2.0**-11


def test_half_precision_scores_are_close(tmp_path, models, train, targets):
    full = cases.whole_run(tmp_path / "full", models, train, targets, lambda_reg="0.1*mean")
    half = cases.whole_run(
        tmp_path / "half", models, train, targets, lambda_reg="0.1*mean", use_half_precision=True
    )
    assert np.linalg.norm(half - full) < 5e-3 * np.linalg.norm(full)


def test_gaussian_kind_and_looped_gradients(tmp_path, models, train):
    traker = cases.make(
        models[0], tmp_path, N, kind="gaussian", gradient_computer=IterativeGradientComputer
    )
    cases.featurize(traker, models[0], 1, train)
    grads = cases.gradients(models[0], train)
    size = grads.shape[1]
    matrix = fastproj.matrix(size, 8, 0, "gaussian", stream=1, dtype=torch.float64)
    torch.testing.assert_close(traker.saver.matrix(1), grads @ matrix / size**0.5)


def test_grad_wrt_scales_by_the_chosen_parameters(tmp_path, models, train):
    traker = cases.make(models[0], tmp_path, N, grad_wrt=["fc.bias", "fc.weight"], proj_dim=4)
    cases.featurize(traker, models[0], 0, train)
    exact = cases.projected(cases.gradients(models[0], train)[:, -304:], 4, 0)
    assert traker.num_params_for_grad == 304
    torch.testing.assert_close(traker.saver.matrix(0), exact)


def test_a_task_of_ones_own(tmp_path):
    """Regression: output is the prediction, Q its residual; a batch of three parts."""

    class Regression(AbstractModelOutput):
        def get_output(self, model, weights, buffers, x, y, w):
            return torch.func.functional_call(model, (weights, buffers), (x[None],)).sum() * w

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            x, y, _ = batch
            return (torch.func.functional_call(model, (weights, buffers), (x,))[:, 0] - y)[:, None]

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    batch = (torch.randn(9, 3), torch.randn(9), torch.rand(9))
    traker = TRAKer(model, Regression(), 9, tmp_path, proj_dim=2, use_half_precision=False)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(list(batch), num_samples=9)
    gradient = torch.cat([batch[0], torch.ones(9, 1)], 1) * batch[2][:, None]
    exact = cases.projected(gradient.double(), 2, 0)
    torch.testing.assert_close(
        traker.saver.matrix(0).double(), exact.double(), rtol=1e-5, atol=1e-6
    )
    residual = model(batch[0])[:, 0].detach() - batch[1]
    torch.testing.assert_close(traker.saver.out_to_loss(0), residual)


# ---- TRAK's faults, put right -------------------------------------------------------------------


def test_resuming_in_the_middle_of_a_batch(tmp_path, models, train):
    whole = cases.make(models[0], tmp_path / "whole", N)
    cases.featurize(whole, models[0], 0, train)
    first = cases.make(models[0], tmp_path / "parts", N)
    first.load_checkpoint(models[0].state_dict(), 0)
    first.featurize((train[0][3:9], train[1][3:9]), inds=np.arange(3, 9))
    again = cases.make(models[0], tmp_path / "parts", N)
    cases.featurize(again, models[0], 0, train, batch=10)  # batch 0 overlaps 3..8
    torch.testing.assert_close(again.saver.matrix(0), whole.saver.matrix(0))
    torch.testing.assert_close(again.saver.out_to_loss(0), whole.saver.out_to_loss(0))


def test_what_is_there_is_not_computed_again(tmp_path, models, train):
    traker = cases.make(models[0], tmp_path, N)
    cases.featurize(traker, models[0], 0, train)
    again = cases.make(models[0], tmp_path, N)
    again._featurizer.features = None  # would fail if called
    cases.featurize(again, models[0], 0, train)
    again.finalize_features()


@pytest.mark.parametrize("proj_dim", [1, 2, 100])
def test_score_after_finalize_features_at_small_proj_dim(
    tmp_path, models, train, targets, proj_dim
):
    scores = cases.whole_run(
        tmp_path, models, train, targets, proj_dim=proj_dim, lambda_reg="0.1*mean"
    )
    assert np.isfinite(scores).all()


def test_load_from_save_dir_false_in_a_fresh_directory(tmp_path, models, train, targets):
    fresh = cases.whole_run(
        tmp_path / "a" / "b", models, train, targets, load_from_save_dir=False, lambda_reg=0
    )
    exact = cases.explicit_trak(models, train, targets, 8, 0.0)
    np.testing.assert_allclose(fresh, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_load_from_save_dir_false_sets_old_features_aside(tmp_path, models, train):
    traker = cases.make(models[0], tmp_path, N)
    cases.featurize(traker, models[0], 0, train)
    fresh = cases.make(models[0], tmp_path, N, load_from_save_dir=False)
    with pytest.warns(UserWarning, match="moved to 0.replaced-"):
        fresh.load_checkpoint(models[1].state_dict(), 0)
    assert not fresh.saver.index(0).done.any()
    assert len(list(tmp_path.glob("models/0.replaced-*/train-*"))) == 5  # one a batch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_checkpoint(models[1].state_dict(), 0)  # its own now


def test_load_from_save_dir_false_leaves_other_checkpoints_of_before_out(
    tmp_path, models, train, targets
):
    alone = cases.whole_run(tmp_path / "alone", models[1:], train, targets)
    cases.whole_run(tmp_path / "two", models, train, targets)
    with pytest.warns(UserWarning, match="model_id 0 was moved to") as said:
        fresh = cases.whole_run(
            tmp_path / "two", models[1:], train, targets, load_from_save_dir=False
        )
    np.testing.assert_array_equal(fresh, alone)
    assert [Path(one.filename).name for one in said] == ["cases.py"]  # the line that loaded it
    later = cases.make(models[0], tmp_path / "two", N, load_from_save_dir=False)
    with pytest.raises(NotReadyError, match=r"model_ids \[1\]; .* none, and .* an earlier run"):
        later.start_scoring_checkpoint("test", models[1].state_dict(), 1, M)
    assert cases.make(models[0], tmp_path / "two", N).saver.ids() == [0, 1]


def test_one_process_per_checkpoint_then_a_gather(tmp_path, models, train, targets):
    """TRAK's SLURM pattern."""
    whole = cases.whole_run(tmp_path / "whole", models, train, targets)
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    for model_id, state in enumerate(states):
        traker = cases.make(models[0], tmp_path / "jobs", N, load_from_save_dir=False)
        traker.load_checkpoint(state, model_id)
        for rows in torch.arange(N).split(7):
            traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))
        traker.finalize_features(model_ids=[model_id])
        traker.start_scoring_checkpoint("test", state, model_id, M)
        traker.score(targets, num_samples=M)
    gather = cases.make(models[0], tmp_path / "jobs", N)
    np.testing.assert_array_equal(gather.finalize_scores("test"), whole)


def test_allow_skip_averages_over_what_is_complete(tmp_path, models, train, targets):
    alone = cases.whole_run(tmp_path / "alone", models[:1], train, targets)
    traker = cases.make(models[0], tmp_path / "two", N)
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        for rows in torch.arange(N).split(7):
            traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", states[0], 0, M)
    traker.score(targets, num_samples=M)
    with pytest.raises(NotReadyError, match="model_id 1 lacks 6 of 6 targets"):
        traker.finalize_scores("test")
    with pytest.warns(UserWarning, match="model_id 1 .*skipped"):
        skipped = traker.finalize_scores("test", allow_skip=True)
    np.testing.assert_array_equal(skipped, alone)
    np.testing.assert_array_equal(traker.finalize_scores("test", model_ids=[0]), alone)
    with (
        pytest.raises(NotReadyError, match="no checkpoint"),
        pytest.warns(UserWarning, match="skipped"),
    ):
        traker.finalize_scores("test", model_ids=[1], allow_skip=True)


def test_fewer_samples_than_dimensions_warns_and_is_repeatable(tmp_path, models, train, targets):
    results = []
    for name in ("a", "b"):
        with pytest.warns(SingularXtXWarning, match="n=30 samples, k=64"):
            scores = cases.whole_run(
                tmp_path / name, models, train, targets, proj_dim=64, lambda_reg=0
            )
        results.append(np.array(scores))
    np.testing.assert_array_equal(*results)


def test_another_lambda_needs_no_features(tmp_path, models, train, targets):
    scores = cases.whole_run(tmp_path, models[:1], train, targets)
    traker = cases.make(models[0], tmp_path, N)
    traker._featurizer.features = None  # would fail if called
    traker.finalize_features(lambda_reg=0.02)
    assert traker.saver.systems.read_solve(0)["lambda_reg"] == 0.02
    changed = traker.finalize_scores("test")
    exact = cases.explicit_trak(models[:1], train, targets, 8, 0.02)
    np.testing.assert_allclose(changed, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    assert not np.allclose(changed, scores)


def test_new_features_make_a_finalised_checkpoint_unfinished(tmp_path, models, train):
    traker = cases.make(models[0], tmp_path, N)
    cases.featurize(traker, models[0], 0, train)
    traker.finalize_features()
    for shard in tmp_path.glob("models/0/train-*"):
        shard.unlink()
    other = cases.data(N, seed=9, dtype=torch.float64)
    again = cases.make(models[0], tmp_path, N)
    cases.featurize(again, models[0], 0, other)
    assert not again.saver.systems.is_finalized(0)
    again.finalize_features(lambda_reg="1*mean")
    phi = cases.projected(cases.gradients(models[0], other), 8, 0)
    torch.testing.assert_close(again.saver.systems.read_gram(0, System())[0]["xtx"], phi.T @ phi)


# ---- targets ------------------------------------------------------------------------------------


def test_other_targets_under_the_same_name_count(tmp_path, models, train, targets):
    first = np.array(cases.whole_run(tmp_path, models[:1], train, targets, lambda_reg=0))
    other = cases.data(M, seed=6, dtype=torch.float64)
    mixed = (torch.cat([targets[0][:2], other[0][2:]]), torch.cat([targets[1][:2], other[1][2:]]))
    traker = cases.make(models[0], tmp_path, N, lambda_reg=0)
    for batch in (mixed, mixed):  # the second time nothing is left to do
        cases.score(traker, models[0], 0, batch)
    scores = traker.finalize_scores("test")
    exact = cases.explicit_trak(models[:1], train, mixed, 8, 0.0)
    np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    np.testing.assert_array_equal(scores[:, :2], first[:, :2])
    assert len(list(tmp_path.glob("models/0/targets/test/*"))) == 3


def test_targets_that_differ_between_checkpoints_are_noticed(tmp_path, models, train, targets):
    cases.whole_run(tmp_path, models, train, targets)
    traker = cases.make(models[0], tmp_path, N)
    cases.score(traker, models[0], 0, cases.data(M, seed=6, dtype=torch.float64))
    with pytest.warns(UserWarning, match="target 0 .*other data under model_id 1"):
        traker.finalize_scores("test")


def test_targets_in_pieces_and_out_of_order(tmp_path, models, train, targets):
    whole = cases.whole_run(tmp_path, models[:1], train, targets)
    traker = cases.make(models[0], tmp_path, N)
    for rows in ([5, 0, 3], [1, 4, 2]):
        traker.start_scoring_checkpoint("pieces", models[0].state_dict(), 0, M)
        traker.score((targets[0][rows], targets[1][rows]), inds=torch.tensor(rows))
    np.testing.assert_allclose(
        traker.finalize_scores("pieces"), whole, rtol=1e-5, atol=1e-6 * np.abs(whole).max()
    )
    assert set(traker.saver.experiments) == {"test", "pieces"}


def test_the_result_is_the_file_and_writing_to_it_spares_the_file(tmp_path, models, train, targets):
    scores = cases.whole_run(tmp_path, models[:1], train, targets)
    copy = np.array(scores)
    scores *= 0
    np.testing.assert_array_equal(np.load(tmp_path / "scores" / "test.mmap"), copy)


# ---- what others read from a TRAKer --------------------------------------------------------------


def test_current_store_has_traks_arrays(tmp_path, models, train, targets):
    """quanda multiplies features, projected target gradients and out_to_loss itself."""
    scores = cases.whole_run(tmp_path, models[:1], train, targets, lambda_reg=0.1)
    traker = cases.make(models[0], tmp_path, N, lambda_reg=0.1)
    traker.load_checkpoint(models[0].state_dict(), 0)
    store = traker.saver.current_store
    assert traker.saver.current_model_id == 0
    assert traker.saver.model_ids == {0: {"is_featurized": 1, "is_finalized": 1}}
    grads = traker.gradient_computer.compute_per_sample_grad(batch=targets)
    phi = traker.projector.project(grads, model_id=0) / traker.normalize_factor
    by_hand = store["features"] @ phi.numpy().T * store["out_to_loss"]
    np.testing.assert_allclose(by_hand, scores, rtol=1e-5, atol=1e-5 * np.abs(scores).max())
    shapes = {name: store[name].shape for name in store}
    assert shapes == {
        "grads": (N, 8),
        "features": (N, 8),
        "out_to_loss": (N, 1),
        "is_featurized": (N, 1),
        "test_grads": (M, 8),
    }
    np.testing.assert_array_equal(store["test_scores"], scores)
    assert "nothing" not in store


def test_a_projector_of_ones_own(tmp_path, models, train):
    class NoOp:
        proj_dim = 0
        proj_type = "na"
        seed = np.int64(3)

        def project(self, grads, model_id):
            return torch.cat(
                [g.flatten(1) if g.dim() > 1 else g[:, None] for g in grads.values()], 1
            )

    traker = cases.make(models[0], tmp_path, N, projector=NoOp(), proj_dim=None)
    cases.featurize(traker, models[0], 0, train)
    grads = cases.gradients(models[0], train)
    assert traker.proj_dim == grads.shape[1]
    torch.testing.assert_close(traker.saver.matrix(0), grads / grads.shape[1] ** 0.5)
    with pytest.raises(StoreMismatchError, match="projector"):
        cases.make(models[0], tmp_path, N, proj_dim=traker.proj_dim, projector_seed=3)


def test_a_gradient_computer_with_traks_three_methods(tmp_path, models, train):
    class Plain:
        def __init__(self, model, task, grad_dim, dtype, device, grad_wrt):
            self.arguments = (grad_dim, dtype, str(device), grad_wrt)

        def load_model_params(self, model):
            self.model = model

        def compute_per_sample_grad(self, batch):
            return cases.gradients(self.model, batch)

        def compute_loss_grad(self, batch):
            return cases.q(self.model, batch)[:, None]

    traker = cases.make(models[0], tmp_path, N, gradient_computer=Plain, use_half_precision=True)
    cases.featurize(traker, models[0], 0, train)
    assert traker.gradient_computer.arguments == (341, torch.float16, "cpu", None)
    exact = cases.projected(cases.gradients(models[0], train), 8, 0)
    torch.testing.assert_close(traker.saver.matrix(0).double(), exact, rtol=1e-2, atol=1e-3)


def test_positional_arguments_are_traks(tmp_path):
    import inspect

    names = list(inspect.signature(TRAKer).parameters)
    assert names[:17] == [
        *("model", "task", "train_set_size", "save_dir", "load_from_save_dir", "device"),
        *("gradient_computer", "projector", "saver", "score_computer", "proj_dim"),
        *("logging_level", "use_half_precision", "proj_max_batch_size", "projector_seed"),
        *("grad_wrt", "lambda_reg"),
    ]


def test_logging_level_is_that_of_our_logger_only(tmp_path, models):
    root = logging.getLogger().level
    cases.make(models[0], tmp_path, N, logging_level=logging.ERROR)
    assert logging.getLogger("fastproj.trak").level == logging.ERROR
    assert logging.getLogger().level == root


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2], ids=["one TRAKer", "two of one model"])
def test_threads_on_one_model_do_not_mix(tmp_path, count):
    """Hooks of one had recorded what the other computed, and features were others."""
    model, train = cases.net(), cases.data(40)
    wanted = cases.featurized(model, tmp_path / "alone", train).saver.matrix(0)
    made = [cases.loaded(model, tmp_path / f"{i}", 40) for i in range(count)]

    def featurize(number):
        every = torch.arange(40).split(7)
        for rows in every[number::2] if count == 1 else every:
            made[number % count].featurize((train[0][rows], train[1][rows]), inds=rows)

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(featurize, range(2)))
    finally:
        sys.setswitchinterval(interval)
    for traker in made:
        assert torch.equal(traker.saver.matrix(0), wanted)
