"""The scripts of TRAK's documentation: the same calls run on trak 0.3.2 and on fastproj."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import fastproj
from fastproj.compat.trak import CudaProjector, ProjectionType
from fastproj.trak import Fisher, ScoreComputer
from tests.trak import cases, modules

trak = pytest.importorskip("trak", reason="traker is not installed")
IterativeGradientComputer = pytest.importorskip("trak.gradient_computers").IterativeGradientComputer
AbstractModelOutput = pytest.importorskip("trak.modelout_functions").AbstractModelOutput

N, M, K, LAMBDA = 26, 5, 6, 0.01


def projector(model):
    size = sum(p.numel() for p in model.parameters())
    kind = ProjectionType.rademacher
    return CudaProjector(size, K, 0, kind, torch.device("cpu"), max_batch_size=8)


def made(package, model, save_dir, task="image_classification", **options):
    """A TRAKer with what both packages take."""
    return package.TRAKer(
        model=model,
        task=task,
        train_set_size=N,
        save_dir=save_dir,
        device="cpu",
        projector=projector(model),
        use_half_precision=False,
        **options,
    )


def quickstart(package, model, save_dir, train, targets):
    """Readme and quickstart: loaders, num_samples, one experiment."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    traker = made(package, model, save_dir, lambda_reg=LAMBDA)
    traker.load_checkpoint(state, model_id=0)
    for batch in DataLoader(TensorDataset(*train), batch_size=8):
        traker.featurize(batch=batch, num_samples=batch[0].shape[0])
    traker.finalize_features()
    traker.start_scoring_checkpoint(
        exp_name="quickstart", checkpoint=state, model_id=0, num_targets=M
    )
    for batch in DataLoader(TensorDataset(*targets), batch_size=2):
        traker.score(batch=batch, num_samples=batch[0].shape[0])
    return traker.finalize_scores(exp_name="quickstart")


def slurm(package, model, save_dir, train, targets):
    """A job for each checkpoint featurizes, one for each scores, one gathers."""
    states = [{k: v.clone() for k, v in cases.net(seed).state_dict().items()} for seed in (0, 1)]

    def make(load):
        options = {"load_from_save_dir": load, "lambda_reg": LAMBDA}
        return made(package, model, str(save_dir), **options)

    make(True)  # trak 0.3.2 can't make a new directory with load_from_save_dir=False
    for model_id, state in enumerate(states):
        traker = make(False)
        traker.load_checkpoint(state, model_id=model_id)
        for inds in torch.arange(N).split(8):
            batch = [part[inds] for part in train]
            traker.featurize(batch=batch, inds=inds.numpy())
        traker.finalize_features(model_ids=[model_id])
    for model_id, state in enumerate(states):
        traker = make(True)
        traker.start_scoring_checkpoint("slurm", state, model_id=model_id, num_targets=M)
        traker.score(batch=targets, num_samples=M)
    return make(True).finalize_scores(exp_name="slurm", model_ids=[0, 1])


@modules.of(
    words=lambda: nn.Embedding(20, 6),
    kinds=lambda: nn.Embedding(2, 6),
    head=lambda: nn.Linear(6, 2),
)
def Encoder(self, input_ids, token_type_ids, attention_mask):
    """A sequence classifier with the arguments of Hugging Face's."""
    h = torch.tanh(self.words(input_ids) + self.kinds(token_type_ids))
    weight = attention_mask.unsqueeze(-1).float()
    return self.head((h * weight).sum(1) / weight.sum(1))


class Classification(AbstractModelOutput):
    """The text classification task of the QNLI tutorial."""

    def __init__(self):
        super().__init__()

    @staticmethod
    def get_output(model, weights, buffers, input_id, token_type_id, attention_mask, label):
        inputs = {
            "input_ids": input_id.unsqueeze(0),
            "token_type_ids": token_type_id.unsqueeze(0),
            "attention_mask": attention_mask.unsqueeze(0),
        }
        logits = functional_call(model, (weights, buffers), args=(), kwargs=inputs)
        bindex = torch.arange(1)
        correct = logits[bindex, label.unsqueeze(0)]
        others = logits.clone()
        others[bindex, label.unsqueeze(0)] = torch.tensor(-torch.inf)
        return (correct - others.logsumexp(dim=-1)).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        input_ids, token_type_ids, attention_mask, labels = batch
        inputs = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
        }
        logits = functional_call(model, (weights, buffers), args=(), kwargs=inputs)
        p = logits.softmax(-1)[torch.arange(len(labels)), labels]
        return (1 - p).clone().detach().unsqueeze(-1)


def sentences(n, seed):
    """What a Hugging Face data set yields: input_ids, token_type_ids, attention_mask, labels."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(3, 8, (n, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, 20, (n, 7), generator=generator),
        "token_type_ids": torch.randint(0, 2, (n, 7), generator=generator),
        "attention_mask": mask.long(),
        "labels": torch.randint(0, 2, (n,), generator=generator),
    }


def qnli(package, model, save_dir, *_):
    """The QNLI tutorial: a custom task, dicts from the loader made into tuples."""
    traker = made(package, model, save_dir, Classification(), lambda_reg=LAMBDA)

    def batches(data):
        columns = list(data.values())
        return DataLoader(TensorDataset(*columns), batch_size=8)

    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in batches(sentences(N, 0)):
        traker.featurize(batch=batch, num_samples=batch[0].shape[0])
    traker.finalize_features()
    traker.start_scoring_checkpoint("qnli", model.state_dict(), model_id=0, num_targets=M)
    for batch in batches(sentences(M, 1)):
        traker.score(batch=batch, num_samples=batch[0].shape[0])
    return traker.finalize_scores("qnli")


def loop(package, model, save_dir, train, targets):
    """trak's tests: its loop over samples, with the name of the task that goes with it."""
    task, computer = "iterative_image_classification", IterativeGradientComputer
    options = {"lambda_reg": LAMBDA, "gradient_computer": computer}
    return whole(made(package, model, save_dir, task, **options), model, train, targets)


class Remembering(IterativeGradientComputer):
    """Takes Q from the forward of the gradients, as trak's order of calls allows."""

    q = None

    def compute_per_sample_grad(self, batch):
        self.q = self.modelout_fn.get_out_to_loss_grad(self.model, None, None, batch)
        return super().compute_per_sample_grad(batch)

    def compute_loss_grad(self, batch):
        return self.q.clone()  # of the last batch whose gradients were taken


def remembering(package, model, save_dir, train, targets):
    """A gradient computer that keeps what the second of its methods returns."""
    task = "iterative_image_classification"
    options = {"lambda_reg": LAMBDA, "gradient_computer": Remembering}
    return whole(made(package, model, save_dir, task, **options), model, train, targets)


def whole(traker, model, train, targets):
    """The scores of one checkpoint."""
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    cases.score(traker, model, 0, targets)
    return traker.finalize_scores("test")


@pytest.mark.parametrize(
    ("script", "make"),
    [
        (quickstart, cases.net),
        (slurm, cases.net),
        (qnli, Encoder),
        (loop, cases.net),
        (remembering, cases.net),
    ],
)
def test_the_same_script_on_both_packages(tmp_path, script, make):
    """With one projector; trak divides each checkpoint's scores by mean |(XtX)^-1|."""
    torch.manual_seed(0)
    model = make()
    train, targets = cases.data(N), cases.data(M, seed=5)
    ours = np.array(script(fastproj, model, tmp_path / "ours", train, targets))
    theirs = np.array(script(trak, model, tmp_path / "trak", train, targets))
    assert ours.shape == theirs.shape == (N, M)
    if script is slurm:  # two checkpoints, each with a factor of its own
        correlation = np.corrcoef(ours.ravel(), theirs.ravel())[0, 1]
        assert correlation > 0.95
    else:
        factor = (ours * theirs).sum() / (theirs * theirs).sum()
        np.testing.assert_allclose(ours, factor * theirs, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


def test_what_a_gradient_computer_keeps_is_of_the_batch_at_hand(tmp_path):
    """Where a run was interrupted inside a batch, and for samples that are not stored."""
    model, train, targets = cases.net(), cases.data(N), cases.data(M, seed=5)
    task = "iterative_image_classification"
    options = {"lambda_reg": LAMBDA, "gradient_computer": Remembering}
    traker = made(fastproj, model, tmp_path, task, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize([part[3:9] for part in train], inds=range(3, 9))
    stored = np.array(whole(traker, model, train, targets))
    expected = made(fastproj, model, tmp_path / "auto", lambda_reg=LAMBDA)
    close = {"rtol": 1e-3, "atol": 1e-4 * np.abs(stored).max()}
    np.testing.assert_allclose(stored, whole(expected, model, train, targets), **close)
    again = [
        traker.score([p[rows] for p in train], stream=True) for rows in torch.arange(N).split(9)
    ]
    np.testing.assert_allclose(np.concatenate(again), stored, **close)


def test_dicts_as_they_come_from_a_tokenizer(tmp_path):
    """The same features from {"input_ids": ..., "labels": ...} as from the tuple."""

    class FromDict(Classification):
        @staticmethod
        def get_output(model, weights, buffers, sample):
            return Classification.get_output(model, weights, buffers, *sample.values())

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return super().get_out_to_loss_grad(model, weights, buffers, tuple(batch[0].values()))

    torch.manual_seed(0)
    model = Encoder()
    data = sentences(N, 0)
    found = []
    for name, task, batch in (
        ("tuple", Classification(), tuple(data.values())),
        ("dict", FromDict(), data),
    ):
        traker = fastproj.TRAKer(model, task, N, tmp_path / name, device="cpu", proj_dim=K)
        traker.load_checkpoint(model.state_dict(), 0)
        traker.featurize(batch, num_samples=N)
        found.append((traker.saver.matrix(0), traker.saver.out_to_loss(0)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_several_experiments_over_a_loaded_save_dir(tmp_path):
    """load_from_save_dir: another process scores other targets from the same features."""
    model = cases.net()
    train = cases.data(N)
    first = np.array(cases.whole_run(tmp_path, [model], train, cases.data(M, seed=5)))
    again = cases.make(model, tmp_path, N)
    cases.score(again, model, 0, cases.data(M, seed=5), exp_name="second")
    np.testing.assert_allclose(
        again.finalize_scores("second"), first, rtol=1e-5, atol=1e-6 * np.abs(first).max()
    )
    assert again.saver.model_ids == {0: {"is_featurized": 1, "is_finalized": 1}}
    np.testing.assert_array_equal(again.finalize_scores("test", model_ids=[0]), first)


class OwnSolve(ScoreComputer):
    """With a solution of k x k of its own."""

    def solve(self, gram, lambda_reg):
        return super().solve(gram, lambda_reg)


# ---- signatures ----------------------------------------------------------------------------------

METHODS = [
    "__init__",
    *(
        name
        for name, _ in inspect.getmembers(trak.TRAKer, inspect.isfunction)
        if not name.startswith("_") and name != "init_projector"  # a part of __init__
    ),
]
OTHER_DEFAULTS = {
    "device": None,  # where the model is
    "gradient_computer": "auto",
    "lambda_reg": "auto",
    "proj_dim": None,  # by the number of samples
}


@pytest.mark.parametrize(
    ("n", "width", "options", "expected"),
    [
        (2048, 4000, {}, 16384),  # 40,010 parameters
        (2048, 700, {}, 8192),  # 7,010
        (2048, 300, {}, 4096),  # 3,010
        (2049, 4000, {}, 4096),
        (2048, 4000, {"kind": "sjlt", "block": 32}, 16384),
        (2048, 4000, {"kind": "rademacher"}, 4096),  # twice the dimensions are twice the time
        (2048, 4000, {"factored": 4}, 16384),
        (2048, 4000, {"curvature": "trak"}, 16384),
        (2048, 4000, {"curvature": Fisher(draws=2)}, 4096),  # of 6144 rows
        (1365, 4000, {"curvature": Fisher(draws=2)}, 16384),
        (2048, 4000, {"score_computer": OwnSolve}, 4096),  # it takes k x k
        (2048, 4000, {"proj_dim": 64}, 64),
    ],
)
def test_the_dimension_where_none_is_named(tmp_path, n, width, options, expected):
    net = torch.nn.Linear(width, 10)
    traker = fastproj.TRAKer(net, "image_classification", n, tmp_path, **options)
    assert traker.proj_dim == traker.projector.proj_dim == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_of_trak_is_in_its_place(method):
    theirs = inspect.signature(getattr(trak.TRAKer, method)).parameters
    ours = inspect.signature(getattr(fastproj.TRAKer, method)).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == OTHER_DEFAULTS.get(name, parameter.default), name
    own = list(ours.values())[len(theirs) :]
    assert all(parameter.default is not parameter.empty for parameter in own)


def test_a_registered_model_id_is_gone_on_with_whatever_the_flag_of_trak_says(tmp_path):
    """trak 0.3.2 looks at it only where model_id is not there, when it has nothing to refuse."""
    model, (images, labels) = cases.net(), cases.data(N)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for flag, rows in ((False, range(8)), (True, range(8, N)), (False, range(N))):
        traker = cases.make(model, tmp_path / "ours", N, proj_dim=K)
        traker.load_checkpoint(state, 0, _allow_featurizing_already_registered=flag)
        rows = list(rows)
        traker.featurize((images[rows], labels[rows]), inds=rows)
        theirs = made(trak, model, tmp_path / "theirs")
        theirs.load_checkpoint(state, 0, _allow_featurizing_already_registered=flag)
        theirs.featurize((images[rows], labels[rows]), inds=np.array(rows))
    traker.finalize_features()
