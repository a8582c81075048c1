"""TRAKer(factored=r): features by the projector, stores that keep r, the same promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastproj
from fastproj.trak import StoreMismatchError
from tests.trak import cases

N, M, R = 20, 4, 3
TRAIN, TARGETS = cases.data(N), cases.data(M, seed=5)


def run(folder, **options):
    return cases.whole_run(folder, [cases.net(0), cases.net(1)], TRAIN, TARGETS, **options)


def test_features_are_those_of_the_projector(tmp_path):
    model = cases.net()
    traker = cases.make(model, tmp_path, N, proj_dim=32, factored=R, curvature="trak")
    cases.featurize(traker, model, 5, TRAIN)
    projector = fastproj.FactoredProjector(model, R, 32, scale=None)
    assert projector.inner_dim < projector.grad_dim
    exact = projector.project(cases.gradients(model, TRAIN), 5) * math.sqrt(projector.block)
    exact /= math.sqrt(projector.grad_dim)
    torch.testing.assert_close(traker.saver.matrix(5).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sjlt", "rademacher"])
def test_r_above_all_sides_changes_nothing(kind, tmp_path):
    plain = run(tmp_path / "plain", kind=kind, proj_dim=32)
    large = run(tmp_path / "large", kind=kind, proj_dim=32, factored=75)
    np.testing.assert_allclose(large, plain, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
    small = run(tmp_path / "small", kind=kind, proj_dim=32, factored=R)
    assert np.abs(small - plain).max() > 0.01 * np.abs(plain).max()


def test_a_projector_of_other_parameters_is_refused(tmp_path):
    model = cases.net()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    cases.make(model, tmp_path, N, projector=fastproj.FactoredProjector(shapes, R, 32))
    first, *rest = shapes
    others = (
        dict(reversed(shapes.items())),
        {name: shapes[name] for name in rest},
        shapes | {"more": (3, 4)},
        shapes | {first: (*shapes[first], 2)},
    )
    for other in others:
        with pytest.raises(ValueError, match="in the place of"):
            cases.make(model, tmp_path, N, projector=fastproj.FactoredProjector(other, R, 32))


class Halved(fastproj.FactoredProjector):
    """Another map by a ``project`` of its own."""

    def project(self, grads, model_id=0):
        return super().project({name: g / 2 for name, g in grads.items()}, model_id)


@pytest.mark.parametrize("computer", ["hooks", "func", "loop"])
@pytest.mark.parametrize("curvature", ["trak", "fisher"])
def test_a_project_of_its_own_is_used(tmp_path, curvature, computer):
    """Also by hooks, which compress the gradients of other FactoredProjectors by themselves."""
    model, features = cases.net(), []
    for kind in (fastproj.FactoredProjector, Halved):
        projector = kind(model, R, 32, scale=None)
        how = {"gradient_computer": computer, "curvature": curvature, "projector": projector}
        traker = cases.make(model, tmp_path / kind.__name__, N, **how)
        cases.featurize(traker, model, 0, TRAIN)
        features.append(traker.saver.matrix(0))
    torch.testing.assert_close(features[1], features[0] / 2)
    with pytest.raises(StoreMismatchError, match=r"projector .*Projector' in .*\.Halved' in this"):
        cases.make(model, tmp_path / "FactoredProjector", N, **how)


def test_parts_of_a_gradient_do_not_go_to_a_project_of_its_own(tmp_path):
    model = cases.net()
    traker = cases.make(model, tmp_path, N, projector=Halved(model, R, 32, scale=None))
    cases.featurize(traker, model, 0, TRAIN)
    traker.finalize_features()
    traker.start_scoring_checkpoint("t", model.state_dict(), 0, M)
    with pytest.raises(ValueError, match=r"a Halved, .* whose project is not overridden"):
        traker.score(TARGETS, per="module")


def test_a_store_keeps_r_and_refuses_another(tmp_path):
    cases.make(cases.net(), tmp_path, N, factored=R)
    cases.make(cases.net(), tmp_path, N, factored=R)
    for other, words in ((4, "factored.*(3.*4|4.*3)"), (None, "factored.*3")):
        with pytest.raises(StoreMismatchError, match=words):
            cases.make(cases.net(), tmp_path, N, factored=other)
    plain = tmp_path / "plain"
    cases.make(cases.net(), plain, N)
    with pytest.raises(StoreMismatchError, match="factored"):
        cases.make(cases.net(), plain, N, factored=R)


def test_a_stopped_run_goes_on(tmp_path):
    """Bit for bit: batches that were stored are not computed again, later ones are the same."""
    model = cases.net()
    kept = []
    for stopped in (False, True):
        folder = tmp_path / str(stopped)
        for until in (N // 2, N) if stopped else (N,):
            traker = cases.loaded(model, folder, N, proj_dim=32, factored=R)
            for rows in torch.arange(until).split(5):
                traker.featurize((TRAIN[0][rows], TRAIN[1][rows]), num_samples=len(rows))
        kept.append(traker.saver.matrix(0))
    assert torch.equal(*kept)


def test_what_it_refuses(tmp_path):
    model = cases.net()
    with pytest.raises(ValueError, match="factored=0"):
        cases.make(model, tmp_path, N, factored=0)
    with pytest.raises(TypeError, match=r"factored=2\.5"):
        cases.make(model, tmp_path, N, factored=2.5)
    projector = fastproj.Projector(sum(p.numel() for p in model.parameters()), 8, scale=None)
    with pytest.raises(ValueError, match="factored=4 and a projector"):
        cases.make(model, tmp_path, N, factored=4, projector=projector)
    for name, value in (("kind", "gaussian"), ("block", 16)):
        with pytest.raises(ValueError, match=f"received {name}={value!r} and a projector"):
            cases.make(model, tmp_path, N, projector=projector, **{name: value})
