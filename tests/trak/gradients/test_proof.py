"""Nothing that plain autograd would not say is stored, whatever the batches are like."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from fastproj import TRAKer
from fastproj.trak import HooksError, NotReadyError
from tests.trak import cases, modules

N = 12


@modules.of(
    words=lambda: nn.Embedding(20, 8), mix=lambda: nn.Linear(8, 8), head=lambda: nn.Linear(8, 4)
)
def TimeMajor(self, ids):  # [B, T]
    """Rows of one dimension by place, then by sample: hooks ascribe them to other samples."""
    size, length = ids.shape
    rows = self.mix(self.words(ids).transpose(0, 1).reshape(-1, 8)).tanh()
    return self.head(rows.view(length, size, 8).mean(0))


class Switched(nn.Module):
    """Mixes the samples of a batch where ``mixes`` says so of it."""

    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        h = self.body(x).tanh()
        places = torch.eye(len(x), dtype=h.dtype)
        return self.head(h + 0.3 * (places.flip(0) if self.mixes(x) else places) @ h)


class Linearly(Switched):
    """Without a bound on what it hands on."""

    def forward(self, x):
        h = self.body(x)
        return self.head(0.2 * h + 0.8 * h.flip(0))


class Rolled(Switched):
    """Rolls along one dimension or another: the same operations, with other arguments."""

    def forward(self, x):
        h = self.body(x).tanh()
        return self.head(h + 0.3 * (h.roll(1, 0) if self.mixes(x) else h.roll(1, 1)))


class Branching(Switched):
    """Takes a branch for a whole batch by what its samples are together."""

    def forward(self, x):
        return self.head((self.body(x) if x.sum() > 0 else x).tanh())


def marked(x):
    return bool((x == 7).any())


def floats(n=N, seed=0):
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(model, save_dir, n=N, **options):
    return cases.loaded(model, save_dir, n, **options)


def featurize(traker, model, x, sizes):
    labels = torch.arange(len(x)) % 4
    begin = 0
    for size in sizes:
        rows = slice(begin, begin + size)
        traker.featurize((x[rows], labels[rows]), inds=range(begin, begin + size))
        begin += size


def truth(model, x):
    batch = (x, torch.arange(len(x)) % 4)
    return cases.projected(cases.gradients(model, batch), 8, 0)


def fitted(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.5)
    return model.double().eval()


def test_the_first_batch_of_several_is_checked_however_many_of_one_came_before(tmp_path):
    model = fitted(TimeMajor())
    generator = torch.Generator().manual_seed(0)
    traker = cases.loaded(model, tmp_path, 22)
    sizes = [(1, length) for length in range(20, 0, -1)] + [(2, 10)]
    shapes = [torch.randint(20, shape, generator=generator) for shape in sizes]
    data = [(ids, torch.arange(len(ids)) % 4) for ids in shapes]
    for batch in data[:-1]:
        traker.featurize(batch, num_samples=1)
    with pytest.warns(UserWarning, match="'hooks' can't take this model"):
        traker.featurize(data[-1], num_samples=2)
    wanted = [cases.projected(cases.gradients(model, batch), 8, 0) for batch in data]
    torch.testing.assert_close(traker.saver.matrix(0), torch.cat(wanted))


def test_every_structure_of_several_samples_is_checked(tmp_path):
    """Each batch has another shape, and the last is the first that mixes its samples."""

    class Late(TimeMajor):
        def forward(self, ids):
            return super().forward(ids) if ids.shape[1] == 20 else self.apart(ids)

        def apart(self, ids):
            return self.head(self.mix(self.words(ids)).tanh().mean(1))

    model = fitted(Late())
    traker = cases.loaded(model, tmp_path, 40)
    labels = torch.tensor([0, 1])
    for length in range(1, 20):
        ids = torch.full((2, length), length % 19) + torch.tensor([[0], [1]])
        traker.featurize((ids, labels), num_samples=2)
    ids = torch.tensor([[1], [2]]).expand(2, 20)
    with pytest.warns(UserWarning, match="38 training samples of model_id 0"):
        traker.featurize((ids, labels), num_samples=2)
    wanted = cases.projected(cases.gradients(model, (ids, labels)), 8, 0)
    torch.testing.assert_close(traker.saver.matrix(0)[38:], wanted)


@pytest.mark.parametrize("kind", [Switched, Rolled])
def test_mixing_by_values_is_noticed_or_another_structure(kind, tmp_path):
    """16 batches of one shape; the last 4 hold a sample that makes the model mix them."""
    model = fitted(kind(marked))
    x = floats(64)
    x[48::4, 0] = 7
    traker = make(model, tmp_path, 64)
    with pytest.warns(UserWarning, match="count as not computed now"):
        featurize(traker, model, x, [4] * 16)
    stored = traker.saver.index(0).done
    assert stored[60:].all()
    assert not stored[:48].any()
    with pytest.raises(NotReadyError, match="of 64 training samples"):
        traker.finalize_features()
    again = make(model, tmp_path, 64)  # in a new process
    with pytest.warns(UserWarning, match="have failed a check before"):
        featurize(again, model, x, [4] * 16)
    torch.testing.assert_close(again.saver.matrix(0), truth(model, x))
    again.finalize_features()


def test_with_hooks_alone_what_is_doubtful_is_taken_back_and_hooks_refuse(tmp_path):
    model = fitted(Switched(marked))
    x = floats()
    x[8] = 7
    traker = make(model, tmp_path, gradient_computer="hooks")
    featurize(traker, model, x, [1, 3, 4])
    with (
        pytest.warns(UserWarning, match=r"7 training samples of model_id 0 \(1, 2, 3"),
        pytest.raises(HooksError, match="samples mixed"),
    ):
        traker.featurize((x[8:10], torch.tensor([0, 1])), inds=range(8, 10))
    assert traker.saver.index(0).done.nonzero()[0].tolist() == [0]
    for one in (traker, make(model, tmp_path, gradient_computer="hooks")):
        with pytest.raises(HooksError, match=r'failed a check before; expected .*"loop"'):
            one.featurize((x[1:4], torch.tensor([1, 2, 3])), inds=range(1, 4))
    other = make(model, tmp_path, gradient_computer="loop")
    featurize(other, model, x, [12])
    torch.testing.assert_close(other.saver.matrix(0), truth(model, x))


def test_what_is_found_while_scoring_counts_for_the_training_samples(tmp_path):
    model = fitted(Switched(marked))
    x = floats()
    traker = make(model, tmp_path)
    featurize(traker, model, x, [4, 4, 4])
    traker.finalize_features()
    targets = floats(6, seed=1)
    targets[2] = 7
    scorer = cases.make(model, tmp_path, N)  # in a new process
    scorer.start_scoring_checkpoint("test", model.state_dict(), 0, 6)
    with pytest.warns(UserWarning, match="12 training samples of model_id 0"):
        scorer.score((targets, torch.arange(6) % 4), num_samples=6)
    torch.testing.assert_close(scorer.saver.matrix(0, "test"), truth(model, targets))
    with pytest.raises(NotReadyError, match="lacks 12 of 12 training samples"):
        scorer.finalize_scores("test")


@pytest.mark.parametrize("lambda_reg", [0.1, "auto"])
@pytest.mark.parametrize("n", [6, N], ids=["dual", "primal"])
def test_a_system_made_of_disproved_features_does_not_count(n, lambda_reg, tmp_path):
    """The data are the same when they are featurized again; their features are not."""
    model = fitted(Switched(marked))
    x = floats(n)
    x[5] = 7  # mixes a batch that is not checked: the third of its kind
    targets = floats(6, seed=1)
    targets[2] = 7
    options = {"lambda_reg": lambda_reg}

    def score(traker):
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 6)
        traker.score((targets, torch.arange(6) % 4), num_samples=6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traker = make(model, tmp_path / "auto", n, **options)
        featurize(traker, model, x, [2] * 3 + [1] * (n - 6))
        traker.finalize_features()
        score(traker)
        for one in (traker, make(model, tmp_path / "auto", n, **options)):
            one.load_checkpoint(model.state_dict(), 0)
            featurize(one, model, x, [1] * n)  # Q of a batch would be of mixed samples, too
            with pytest.raises(NotReadyError, match="not finalised; call finalize_features"):
                one.start_scoring_checkpoint("test", model.state_dict(), 0, 6)
        one.finalize_features()
        score(one)
        exact = make(model, tmp_path / "loop", n, gradient_computer="loop", **options)
        featurize(exact, model, x, [1] * n)
        exact.finalize_features()
        score(exact)
    torch.testing.assert_close(
        torch.tensor(one.finalize_scores("test")), torch.tensor(exact.finalize_scores("test"))
    )


def test_the_new_samples_of_a_half_done_batch_are_a_batch_of_their_own(tmp_path):
    model = fitted(Switched(lambda x: len(x) == 2))
    x = floats()
    traker = make(model, tmp_path)
    featurize(traker, model, x, [4])
    labels = torch.arange(N) % 4
    with pytest.warns(UserWarning, match="4 training samples"):
        traker.featurize((x[2:6], labels[2:6]), inds=range(2, 6))  # 4 and 5 are new
    torch.testing.assert_close(traker.saver.matrix(0)[4:6], truth(model, x)[4:6])


@pytest.mark.parametrize("seed", range(6))
def test_branches_by_the_sum_of_a_batch_are_never_stored(seed, tmp_path):
    """By chance the parts that a batch is checked in may all take its branch."""
    model = fitted(Branching(None))
    x = floats(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            featurize(make(model, tmp_path), model, x, [6, 4, 2])
            features = cases.make(model, tmp_path, N).saver.matrix(0)
            stored = ~features.isnan().any(1)
            torch.testing.assert_close(features[stored], cases_of(model, x)[stored])
    assert stored.all()


def cases_of(model, x):
    """``truth`` of a model that leaves some parameters unused for some samples."""
    rows = []
    for place, row in enumerate(x):
        logits = model(row.unsqueeze(0))[0]
        label = place % 4
        others = torch.cat([logits[:label], logits[label + 1 :]])
        margin = logits[label] - others.logsumexp(0)
        parts = torch.autograd.grad(margin, list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return cases.projected(torch.stack(rows), 8, 0)


class Kinked(Switched):
    """The inputs of the units are 0 but for rounding where a sample is marked: below 0 in a batch,
    ``alone`` for a sample by itself.
    """

    def __init__(self, alone=1e-12):
        super().__init__(None)
        self.alone = alone

    def forward(self, x):
        h = self.body(x)
        rounding = self.alone if len(x) == 1 else -1e-12
        return self.head(torch.where(x[:, :1] == 7, h - h.detach() + rounding, h).relu())


def test_a_unit_that_rounding_switches_is_no_fault_of_hooks(tmp_path, recwarn):
    model, x = fitted(Kinked()), floats()
    x[:4, 0] = 7
    traker = make(model, tmp_path, gradient_computer="hooks", curvature="trak")
    featurize(traker, model, x, [N])
    model.alone = -model.alone
    torch.testing.assert_close(traker.saver.matrix(0), truth(model, x))
    assert not recwarn.list


class MixesGradients(Switched):
    """Gives what a model without mixing gives: the gradients alone are mixed."""

    def forward(self, x):
        h = self.body(x).tanh()
        return self.head(h + h.flip(0) - h.flip(0).detach())


def test_mixing_that_no_output_shows_is_noticed(tmp_path):
    model, x = fitted(MixesGradients(None)), floats()
    traker = make(model, tmp_path, gradient_computer="hooks")
    with pytest.raises(HooksError, match="are samples mixed"):
        featurize(traker, model, x, [N])


@modules.of(body=lambda: nn.Linear(4, 4), head=lambda: nn.Linear(4, 4))
def Centred(self, x):
    z = self.body(x)
    return self.head(3 * (z - 0.5 * z.mean(0)))


@pytest.mark.filterwarnings("ignore:TRAKer. gradient_computer:UserWarning")
@pytest.mark.parametrize("options", [{}, {"lambda_reg": 0.1}])
@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
def test_of_mixed_samples_each_is_computed_alone(computer, options, tmp_path, caplog):
    """Gradients, Q and curvature are those of one function, whatever else is in a batch."""
    model, x = fitted(Centred()), floats()
    found = []
    for sizes in ([1] * N, [N], [1, N - 1]):
        name = str(len(sizes))
        traker = make(model, tmp_path / name, gradient_computer=computer, **options)
        featurize(traker, model, x, sizes)
        columns = ("curvature", "along") if not options else ()
        store = traker.saver
        found.append(
            [store.matrix(0), store.out_to_loss(0), *(store.column(0, name) for name in columns)]
        )
    for alone, *together in zip(*found, strict=True):
        for one in together:
            torch.testing.assert_close(one, alone)
    assert "each sample is computed alone" in caplog.text


def test_a_check_that_is_not_finite_proves_nothing_of_finite_gradients(tmp_path):
    """Autograd says NaN, the rule of the layer does not look."""

    @modules.of(body=lambda: nn.Linear(4, 4), head=lambda: nn.Linear(4, 4))
    def Hidden(self, x):
        h = self.body(x)
        root = (x[:, :1] * self.head.weight[0, 0] * 0).abs().sqrt()  # slope infinite at 0
        return self.head(h) + root

    model = fitted(Hidden())
    traker = make(model, tmp_path)
    with (
        pytest.warns(UserWarning, match="can't take this model"),
        pytest.raises(ValueError, match="features of samples 0, 1, 2"),
    ):
        featurize(traker, model, floats(), [4])
    assert not traker.saver.index(0).done.any()


@pytest.mark.parametrize("place", [0, 3])
def test_of_mixed_samples_those_that_are_not_finite_themselves_are_named(place, tmp_path):
    """Hooks would ascribe the NaN of one sample to others."""
    model = fitted(Rolled(lambda x: True))
    x = floats()
    x[place, 1] = torch.nan
    traker = make(model, tmp_path)
    with (
        pytest.warns(UserWarning, match="can't take this model"),
        pytest.raises(ValueError, match=f"features of sample {place} are not finite"),
    ):
        featurize(traker, model, x, [N])


def test_gradients_whose_squares_underflow_are_checked(tmp_path):
    model = fitted(Rolled(lambda x: True)).float()
    for p in model.head.parameters():
        p.data *= 1e-25
    traker = make(model, tmp_path, grad_wrt=["body.weight", "body.bias"])
    with pytest.warns(UserWarning, match="can't take this model"):
        featurize(traker, model, floats().float(), [N])


class MixesFaint(Switched):
    """Mixes the samples of small gradients where a sample with a large one is among them."""

    def forward(self, x):
        h = self.body(x)
        faint = x.abs().amax(1) < 100
        places = torch.arange(len(x))
        if not faint.all():
            places[faint] = places[faint].flip(0)
        return self.head(h + 0.3 * h[places])


class LosesFaint(Switched):
    """Their gradients are lost instead."""

    def forward(self, x):
        h = self.body(x)
        faint = x.abs().amax(1) < 100
        if not faint.all():
            h = torch.where(faint[:, None], h.detach(), h)
        return self.head(h)


@pytest.mark.parametrize("kind", [MixesFaint, LosesFaint])
@pytest.mark.parametrize("large", [1e2, 1e4, 1e5, 3e5])
@pytest.mark.parametrize("curvature", ["trak", "fisher"])
def test_errors_are_seen_beside_a_gradient_that_is_much_larger(kind, large, curvature, tmp_path):
    model = fitted(kind(None))
    x = floats()
    x[5] *= large / x[5].abs().max() * 1.01
    traker = make(model, tmp_path, curvature=curvature)
    with pytest.warns(UserWarning, match="can't take this model"):
        featurize(traker, model, x, [N])
    torch.testing.assert_close(traker.saver.matrix(0), truth(model, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_all_magnitudes_are_taken_by_hooks(dtype, tmp_path, recwarn):
    """Losses of samples that are sure have gradients of rounding errors: no proof of anything."""

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )
    model = model.to(dtype).eval()
    x = torch.randn(64, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))
    sure = model(x).argmax(1)
    with torch.no_grad():
        for p in model[4].parameters():
            p *= 60
    traker = TRAKer(model, loss, 64, tmp_path, proj_dim=8, use_half_precision=False)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((x, sure), num_samples=64)
    sizes = traker.saver.matrix(0).norm(dim=1)
    assert sizes.min() < 1e-5 * sizes.max()
    assert traker.gradient_computer.name == "hooks"


# ---- float16 ------------------------------------------------------------------------------------


def half_precise(model, x, save_dir):
    """A TRAKer in float16, its batch, and the features by plain autograd of each sample alone."""
    model, x = fitted(model).half(), x.half()
    batch = (x, torch.zeros(len(x), dtype=torch.int64))
    wanted = cases.projected(cases.gradients(model, batch), 8, 0)
    return make(model, save_dir, len(x)), batch, wanted


def adding_up(n, size):
    """Inputs of one sign, whose gradients add up."""
    return floats(n).abs().clamp(0.1, 1) * size


def linear():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("n", [2, 4, 24, 64])
@pytest.mark.parametrize("size", [1e4, 4e4])
def test_a_sum_that_overflows_float16_is_no_doubt_of_its_samples(n, size, tmp_path, recwarn):
    traker, batch, wanted = half_precise(linear(), adding_up(n, size), tmp_path)
    assert wanted.isfinite().all()
    traker.featurize(batch, num_samples=n)
    assert traker.gradient_computer.name == "hooks"
    assert not recwarn.list
    torch.testing.assert_close(traker.saver.matrix(0).double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("computer", ["auto", "func", "loop"])
@pytest.mark.parametrize("places", [[0], [3, 17], list(range(5, 17))])
def test_samples_that_overflow_float16_themselves_are_named(places, computer, tmp_path):
    """Also where there are more of them than are sought one by one."""
    x = adding_up(24, 1.0)
    x[places] *= 6e4 / x[places].amax(1, keepdim=True)
    model = fitted(linear())
    with torch.no_grad():
        model[1].weight *= 20
    batch = (x.half(), torch.zeros(24, dtype=torch.int64))
    options = {"gradient_computer": computer, "curvature": "trak"}
    traker = make(model.half(), tmp_path, 24, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="not finite") as error:
            traker.featurize(batch, num_samples=24)
    named = [int(word) for word in re.findall(r"\d+", str(error.value).split("are not")[0])]
    assert named == places[: len(named)]
    assert not traker.saver.index(0).done.any()
    rest = [i for i in range(24) if i not in places]
    traker.featurize((batch[0][rest], batch[1][rest]), inds=rest)


@pytest.mark.parametrize("n", [4, 24])
def test_mixed_samples_are_noticed_where_their_sum_overflows_float16(n, tmp_path):
    x = adding_up(n, 4e4)
    x[::2] *= 0.2
    traker, batch, wanted = half_precise(Linearly(None), x, tmp_path)
    with pytest.warns(UserWarning, match="can't take this model"):
        traker.featurize(batch, num_samples=n)
    error = traker.saver.matrix(0).double() - wanted
    assert (error.norm(dim=1) < 0.01 * wanted.norm(dim=1)).all()
