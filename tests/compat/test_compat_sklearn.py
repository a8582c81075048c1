"""The scikit-learn transformer."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from bounds import assert_keeps_inner_products
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastproj
from fastproj.compat.sklearn import FastRandomProjection


@parametrize_with_checks(
    [
        FastRandomProjection(n_components=3, random_state=0),
        FastRandomProjection(n_components=30, kind="gaussian", random_state=0),
    ]
)
def test_scikit_learns_own_checks(estimator, check) -> None:
    check(estimator)


def data(n: int = 12, features: int = 300, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, features)).astype(dtype)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_is_the_documented_matrix(kind: str, dtype: type) -> None:
    X = data(dtype=dtype)
    t = FastRandomProjection(40, kind=kind, random_state=7).fit(X)
    assert (t.n_components_, t.n_features_in_, t.seed_) == (40, 300, 7)
    R = fastproj.matrix(300, 40, 7, kind, dtype=torch.float64).numpy()
    Y = t.transform(X)
    assert Y.dtype == dtype
    np.testing.assert_allclose(Y, X.astype(np.float64) @ R / 40**0.5, atol=1e-5)
    np.testing.assert_array_equal(Y, pickle.loads(pickle.dumps(t)).transform(X))
    np.testing.assert_array_equal(Y, clone(t).fit_transform(X))


@pytest.mark.parametrize(("features", "components"), [(20, 5), (5, 20), (9, 9), (600, 64)])
def test_inverse_transform_is_the_pseudo_inverse(
    features: int, components: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastproj.compat.sketch.BLOCK", 40)  # several blocks
    X = data(6, features)
    t = FastRandomProjection(components, kind="gaussian", random_state=1).fit(X)
    A = fastproj.matrix(features, components, 1, "gaussian", dtype=torch.float64).numpy()
    Y = t.transform(X)
    back = t.inverse_transform(Y)
    np.testing.assert_allclose(back, Y @ np.linalg.pinv(A / components**0.5), atol=1e-9)
    np.testing.assert_allclose(t.transform(back), Y, atol=1e-9)  # sklearn's promise
    if components > features:
        np.testing.assert_allclose(back, X, atol=1e-9)


def test_auto_is_the_lemmas_dimension() -> None:
    X = data(20, 2000)
    t = FastRandomProjection(eps=0.5, random_state=0).fit(X)
    assert t.n_components_ == int(4 * np.log(20) / (0.5**2 / 2 - 0.5**3 / 3))
    assert list(t.get_feature_names_out()[:2]) == ["fastrandomprojection0", "fastrandomprojection1"]
    with pytest.raises(ValueError, match=r"eps=0.1 and X \[20, 300\].*larger eps"):
        FastRandomProjection().fit(data(20, 300))
    with pytest.raises(ValueError, match="expected an int >= 1 or 'auto'"):
        FastRandomProjection("many").fit(X)
    with pytest.raises(ValueError, match="proj_dim=0"):
        FastRandomProjection(0).fit(X)
    with pytest.raises(ValueError, match=r"received X \[20, 2000\]; expected \[n, "):
        t.inverse_transform(X)
    with pytest.raises(NotFittedError):
        FastRandomProjection(3).transform(X)


def test_random_states_draw_seeds() -> None:
    X = data()
    seeds = {
        FastRandomProjection(3, random_state=state).fit(X).seed_
        for state in (np.random.RandomState(0), np.random.RandomState(1), 5)
    }
    assert len(seeds) == 3
    state = np.random.RandomState(0)
    first = FastRandomProjection(3, random_state=state).fit(X).seed_
    assert FastRandomProjection(3, random_state=state).fit(X).seed_ != first


def test_in_a_pipeline_it_keeps_inner_products() -> None:
    X = data(10, 3000)
    t = make_pipeline(StandardScaler(), FastRandomProjection(4096, random_state=3))
    Y = torch.from_numpy(t.fit_transform(X))
    scaled = torch.from_numpy(StandardScaler().fit_transform(X))
    assert_keeps_inner_products(scaled, Y * 4096**0.5, 4096)
