"""The scikit-learn transformer."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.exceptions import DataDimensionalityWarning, NotFittedError
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import GaussianRandomProjection
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastproj
from fastproj.compat.sklearn import FastRandomProjection
from tests.compat.bounds import assert_keeps_inner_products
from tests.compat.packages import load


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@parametrize_with_checks(
    [
        FastRandomProjection(n_components=3, random_state=0),
        FastRandomProjection(n_components=30, kind="gaussian", random_state=0),
        FastRandomProjection(n_components=3, kind="sjlt", density="auto", random_state=0),
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
    np.testing.assert_array_equal(Y, copy.deepcopy(t).transform(X))
    np.testing.assert_array_equal(Y, clone(t).fit_transform(X))
    np.testing.assert_array_equal(Y[::2], t.transform(X[::2]))
    np.testing.assert_array_equal(Y, t.transform(np.asfortranarray(X)))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@pytest.mark.parametrize(
    ("features", "components", "density", "block"),
    [
        (300, 40, "auto", 16),
        (5000, 100, "auto", 64),
        (300, 200, 1 / 64, 64),
        (300, 40, 1 / 50, 32),
        (300, 40, 1 / 3, 16),
        (9, 20, 1, 16),
        (9, 20, 1e-9, 1 << 16),
    ],
)
def test_density_and_components_of_the_sparse_kind(
    features: int, components: int, density: object, block: int
) -> None:
    """What users of SparseRandomProjection read."""
    X = data(features=features)
    t = FastRandomProjection(components, kind="sjlt", density=density, random_state=7).fit(X)
    assert (t.block_, t.density_) == (block, 1 / block)
    R = fastproj.matrix(features, components, 7, "sjlt", block=block, dtype=torch.float64).numpy()
    assert scipy.sparse.issparse(t.components_)
    assert t.components_.nnz == np.count_nonzero(R)
    assert t.components_.has_canonical_format
    np.testing.assert_array_equal(t.components_.toarray(), R.T * (block / components) ** 0.5)
    np.testing.assert_allclose(t.transform(X), X @ t.components_.T, atol=1e-9)
    same = FastRandomProjection(components, kind="sjlt", block=block, random_state=7).fit(X)
    np.testing.assert_array_equal(same.transform(X), t.transform(X))


def test_density_and_components_that_cant_be() -> None:
    X = data()
    for wrong in (0, -0.1, 1.5, float("nan"), True, "some", [0.1]):
        with pytest.raises(ValueError, match="expected a number above 0 and at most 1, 'auto'"):
            FastRandomProjection(4, kind="sjlt", density=wrong).fit(X)
    for others in ({}, {"kind": "sjlt", "block": 16}):
        with pytest.raises(ValueError, match="expected density=None, or kind='sjlt' and block="):
            FastRandomProjection(4, density=0.1, **others).fit(X)
    with pytest.raises(NotFittedError):
        _ = FastRandomProjection(4, kind="sjlt").components_
    dense = FastRandomProjection(4).fit(X)
    assert dense.density_ == 1
    with pytest.raises(AttributeError, match=r"kind='rademacher'.*expected fastproj\.matrix"):
        _ = dense.components_


@pytest.mark.parametrize("kinds", [("rademacher", "sjlt"), ("sjlt", "gaussian")])
def test_parameters_set_after_fit_wait_for_the_next_fit(kinds: tuple[str, str]) -> None:
    X = data()
    t = FastRandomProjection(8, kind=kinds[0], random_state=3).fit(X)
    same = FastRandomProjection(8, kind=kinds[0], random_state=3).fit(X)
    t.set_params(kind=kinds[1], block=None)
    Y = t.transform(X)
    np.testing.assert_array_equal(Y, same.transform(X))
    np.testing.assert_array_equal(t.inverse_transform(Y), same.inverse_transform(Y))
    if kinds[0] == "sjlt":
        np.testing.assert_allclose(Y, X @ t.components_.T, atol=1e-9)
    else:
        with pytest.raises(AttributeError, match="kind='rademacher'"):
            _ = t.components_


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@pytest.mark.parametrize(("features", "components"), [(300, 8), (5, 20)])
def test_inverse_components_are_scikit_learns(features: int, components: int) -> None:
    t = FastRandomProjection(components, kind="sjlt", random_state=3)
    with pytest.raises(NotFittedError):
        _ = t.inverse_components_
    t.fit(data(6, features))
    expected = np.linalg.pinv(t.components_.toarray())
    assert t.inverse_components_.shape == (features, components)
    np.testing.assert_allclose(t.inverse_components_, expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@pytest.mark.parametrize(("features", "components"), [(20, 5), (5, 20), (9, 9), (600, 64)])
def test_inverse_transform_is_the_pseudo_inverse(
    features: int, components: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastproj.compat.sketch.BLOCK", 40)  # several blocks
    X = data(6, features)
    t = FastRandomProjection(components, kind="gaussian", random_state=1)
    if components > features:
        with pytest.warns(DataDimensionalityWarning, match=r"n_components=20 and X \[6, 5\]"):
            t.fit(X)
    t.fit(X)
    A = fastproj.matrix(features, components, 1, "gaussian", dtype=torch.float64).numpy()
    Y = t.transform(X)
    back = t.inverse_transform(Y)
    np.testing.assert_allclose(back, Y @ np.linalg.pinv(A / components**0.5), atol=1e-9)
    np.testing.assert_allclose(t.transform(back), Y, atol=1e-9)  # sklearn's promise
    if components > features:
        np.testing.assert_allclose(back, X, atol=1e-9)
    eager = clone(t).set_params(compute_inverse_components=True).fit(X)
    monkeypatch.delattr("fastproj.compat.sklearn.gram")  # all is there
    np.testing.assert_array_equal(eager.inverse_transform(Y), back)
    np.testing.assert_array_equal(eager.inverse_transform(scipy.sparse.csr_array(Y)), back)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.DataDimensionalityWarning")
@pytest.mark.parametrize("components", [5, 40])
def test_it_works_on_the_cpu_whatever_the_default_device(components: int) -> None:
    X = data(6, 20)
    t = FastRandomProjection(components, compute_inverse_components=True, random_state=1)
    expected = t.fit(X).inverse_transform(t.transform(X))
    with torch.device("meta"):
        found = t.fit(X).inverse_transform(t.transform(X))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("container", [scipy.sparse.csr_array, scipy.sparse.csc_matrix])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_input_gives_what_dense_gives(
    container: type, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastproj.compat.sklearn.DENSE", 700)  # blocks of two rows, one of one
    X = data(13, dtype=dtype)
    X[X < 1] = 0
    t = FastRandomProjection(40, random_state=7).fit(container(X))
    assert (t.n_features_in_, t.n_components_) == (300, 40)
    Y = t.transform(container(X))
    assert Y.dtype == dtype
    np.testing.assert_array_equal(Y, t.transform(X))


def test_names_and_frames() -> None:
    pandas = load("pandas")
    frame = pandas.DataFrame(data(), columns=[f"f{i}" for i in range(300)])
    t = FastRandomProjection(4, random_state=7).set_output(transform="pandas").fit(frame)
    Y = t.transform(frame)
    assert list(Y.columns) == [f"fastrandomprojection{i}" for i in range(4)]
    np.testing.assert_array_equal(Y.to_numpy(), clone(t).fit(data()).transform(data()))
    with pytest.raises(ValueError, match="feature names"):
        t.transform(frame.rename(columns={"f0": "g0"}))


def test_in_a_grid_search() -> None:
    pipeline = make_pipeline(FastRandomProjection(3, random_state=0), Ridge())
    search = GridSearchCV(pipeline, {"fastrandomprojection__n_components": [2, 30]}, cv=2)
    X = data(40)
    search.fit(X, X[:, 0])
    assert search.best_estimator_[0].n_components_ in (2, 30)


def test_auto_is_the_lemmas_dimension() -> None:
    X = data(20, 2000)
    t = FastRandomProjection(eps=0.5, random_state=0).fit(X)
    assert t.n_components_ == int(4 * np.log(20) / (0.5**2 / 2 - 0.5**3 / 3))
    assert list(t.get_feature_names_out()[:2]) == ["fastrandomprojection0", "fastrandomprojection1"]
    with pytest.raises(ValueError, match=r"eps=0.1 and X \[20, 300\].*larger eps"):
        FastRandomProjection().fit(data(20, 300))
    with pytest.raises(ValueError, match="expected an int >= 1 or 'auto'"):
        FastRandomProjection("many").fit(X)
    with pytest.raises(ValueError, match="FastRandomProjection: received n_components=0; expected"):
        FastRandomProjection(0).fit(X)
    for wrong in (10.0, True, None):
        expected = r"FastRandomProjection: received n_components={}\b.*; expected an int >= 1 or 'a"
        with pytest.raises(TypeError, match=expected.format(wrong)):
            FastRandomProjection(wrong).fit(X)
    for wrong in (
        {"kind": "sparse"},
        {"kind": "sjlt", "block": 48},
        {"block": 16},
        {"precision": "low"},
        {"backend": "tpu"},
    ):
        name, value = list(wrong.items())[-1]
        with pytest.raises(ValueError, match=f"^FastRandomProjection: received {name}={value!r}"):
            FastRandomProjection(3, **wrong).fit(X)
    assert FastRandomProjection(np.int64(3), random_state=2**40).fit(X).seed_ == 2**40
    with pytest.raises(ValueError, match=r"received X \[20, 2000\]; expected \[n, "):
        t.inverse_transform(X)
    with pytest.raises(NotFittedError):
        FastRandomProjection(3).transform(X)


@pytest.mark.parametrize("state", [-1, 1 << 64, 1.0, "0", np.random.default_rng(0)])
def test_a_bad_random_state_is_named(state: object) -> None:
    said = f"FastRandomProjection: received random_state={re.escape(repr(state))}; expected "
    with pytest.raises(ValueError, match=said):
        FastRandomProjection(3, random_state=state).fit(data())


@pytest.mark.parametrize("state", [True, np.True_, False])
def test_truth_values_are_the_random_states_that_scikit_learn_takes(state: object) -> None:
    """True is the seed 1 there; NumPy's is none."""
    X = data()
    try:
        theirs = GaussianRandomProjection(3, random_state=state).fit(X).components_
    except ValueError:
        with pytest.raises(ValueError, match=r"received random_state=.*True.*; expected an i"):
            FastRandomProjection(3, random_state=state).fit(X)
        return
    same = GaussianRandomProjection(3, random_state=int(state)).fit(X).components_
    np.testing.assert_array_equal(theirs, same)
    seed = FastRandomProjection(3, random_state=state).fit(X).seed_
    assert (seed, type(seed)) == (int(state), int)


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
    X = data(10, 5000)
    t = make_pipeline(StandardScaler(), FastRandomProjection(4096, random_state=3))
    Y = torch.from_numpy(t.fit_transform(X))
    scaled = torch.from_numpy(StandardScaler().fit_transform(X))
    assert_keeps_inner_products(scaled, Y * 4096**0.5, 4096)
