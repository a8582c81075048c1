"""A scikit-learn transformer on fastproj: random projection without a stored matrix.

It has the place of ``sklearn.random_projection.GaussianRandomProjection``, and with kind "sjlt" of
``SparseRandomProjection``: fit, transform, inverse_transform, get_feature_names_out, pipelines and
grid searches.
"""

from __future__ import annotations

import math
import numbers
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fastproj
from fastproj import checks
from fastproj.compat.pieces import block_below
from fastproj.compat.sketch import gram
from fastproj.spec import MAX_BLOCK, MAX_COLS, MatrixKey, sjlt_entries

try:
    from scipy.sparse import csr_matrix, issparse
    from sklearn.base import (
        BaseEstimator,
        ClassNamePrefixFeaturesOutMixin,
        TransformerMixin,
    )
    from sklearn.exceptions import DataDimensionalityWarning
    from sklearn.random_projection import johnson_lindenstrauss_min_dim
    from sklearn.utils import check_array, check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"fastproj.compat.sklearn: received {error!r}; expected scikit-learn 1.6 or newer "
        "(pip install 'scikit-learn>=1.6')"
    ) from error

__all__ = ["FastRandomProjection"]

NAME = "FastRandomProjection"  # in errors

DENSE = 1 << 24  # entries of sparse input made dense at a time: 128 MB in float64
DTYPES = (np.float64, np.float32)


class FastRandomProjection(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """``X @ R / sqrt(n_components)``, R made on the fly.

    For kind "sjlt", ``X @ R * sqrt(block / n_components)``.

    Parameters
    ----------
    n_components : K >= 1, or "auto" for what the Johnson-Lindenstrauss lemma asks for ``eps``.
    eps : the distortion of squared distances that "auto" allows, 0 < eps < 1.
    kind : "rademacher" (+1 / -1), "gaussian" or "sjlt" (sparse).
    block : of kind "sjlt", as in ``fastproj.project``.
    density : of kind "sjlt", in place of ``block``, the share of entries of R that aren't zero, as
        in ``SparseRandomProjection``: 0 < density <= 1, or "auto" for 1 / sqrt(P). It gives the
        block at or below 1 / density, a power of two from 16 to 65,536; ``density_`` holds the
        resulting density.
    random_state : an int is the matrix's seed itself, the same matrix everywhere; a RandomState or
        None draws one.
    compute_inverse_components : compute the pseudo-inverse in ``fit``, not in the first
        ``inverse_transform``.
    precision, backend : as in ``fastproj.project``.

    Attributes
    ----------
    n_components_ : K.
    seed_ : the seed. ``fastproj.matrix`` gives the matrix for P, K, ``seed_``, kind, ``block_``.
    block_ : the block of kind "sjlt", None for the others.
    density_ : 1 / ``block_`` for kind "sjlt", 1.0 for the others.
    components_ : of kind "sjlt", the scaled matrix [K, P] as a scipy.sparse.csr_matrix, float64;
        ``transform(X)`` is ``X @ components_.T``. Made at each access; nothing else needs it.
    inverse_components_ : the pseudo-inverse of that matrix [P, K], float64, dense. Made at each
        access; ``inverse_transform`` doesn't need it.
    n_features_in_ : P.

    Raises
    ------
    TypeError, ValueError
        On fit, for parameters that can't work.

    Warns
    -----
    DataDimensionalityWarning
        On fit, where K > P.
    """

    def __init__(
        self,
        n_components: int | str = "auto",
        *,
        eps: float = 0.1,
        kind: str = "rademacher",
        block: int | None = None,
        density: float | str | None = None,
        compute_inverse_components: bool = False,
        random_state: Any = None,
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.n_components = n_components
        self.eps = eps
        self.kind = kind
        self.block = block
        self.density = density
        self.compute_inverse_components = compute_inverse_components
        self.random_state = random_state
        self.precision = precision
        self.backend = backend

    def fit(self, X: Any, y: Any = None) -> FastRandomProjection:
        """Take the shape of ``X`` [n, P] and settle K and the seed."""
        X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=DTYPES)
        samples, features = X.shape
        wanted = self._components(samples, features)
        self.seed_ = self._seed()
        checks.check_kind(NAME, self.kind)
        block = self._wanted_block(features)
        checks.check_block(NAME, self.kind, block, wanted)
        checks.check_precision(NAME, self.precision)
        checks.check_backend(NAME, self.backend)
        self._projector = fastproj.Projector(
            features,
            wanted,
            self.seed_,
            self.kind,
            block=block,
            precision=self.precision,
            backend=self.backend,
        )
        self.n_components_ = self._projector.proj_dim
        self.block_ = self._projector.block
        self.density_ = 1 / (self.block_ or 1)
        if self.n_components_ > features:
            warnings.warn(
                f"FastRandomProjection: received n_components={self.n_components_} and X "
                f"[{samples}, {features}]; the result has more entries than X",
                DataDimensionalityWarning,
                stacklevel=2,
            )
        self._n_features_out = self.n_components_  # for get_feature_names_out
        self._pinv = self._inverse_gram() if self.compute_inverse_components else None
        return self

    def _components(self, samples: int, features: int) -> int:
        """K: n_components as it is, or the lemma's bound for ``samples`` points."""
        name, expected = NAME, "an int >= 1 or 'auto'"
        if not isinstance(self.n_components, str):
            return checks.check_integer(
                name, "n_components", self.n_components, 1, MAX_COLS + 1, expected
            )
        if self.n_components != "auto":
            raise ValueError(
                f"{name}: received n_components={self.n_components!r}; expected {expected}"
            )
        wanted = int(johnson_lindenstrauss_min_dim(n_samples=samples, eps=self.eps))
        if not 1 <= wanted <= features:
            raise ValueError(
                f"FastRandomProjection: received eps={self.eps} and X [{samples}, {features}], for "
                f"which the Johnson-Lindenstrauss lemma gives n_components={wanted}; expected "
                f"1 to {features}. Give n_components, or a larger eps"
            )
        return wanted

    def _seed(self) -> int:
        """``random_state`` if it is an int, which True is here and in scikit-learn; else drawn."""
        name, state = NAME, self.random_state
        if isinstance(state, numbers.Integral):
            return checks.check_integer(name, "random_state", int(state), 0, checks.MAX_SEED)
        try:
            return int(check_random_state(state).randint(np.iinfo(np.int32).max))
        except ValueError:
            raise ValueError(
                f"{name}: received random_state={state!r:.80}; expected an int from 0 to 2^64 - 1, "
                "a numpy.random.RandomState or None"
            ) from None

    def _wanted_block(self, features: int) -> int | None:
        """``block``, or what ``density`` gives for P = ``features``."""
        density: Any = self.density
        if density is None:
            return self.block
        if self.kind != "sjlt" or self.block is not None:
            raise ValueError(
                f"FastRandomProjection: received density={density!r} with kind={self.kind!r} and "
                f"block={self.block!r}; expected density=None, or kind='sjlt' and block=None"
            )
        if isinstance(density, str) and density == "auto":
            return block_below(math.isqrt(features))
        real = isinstance(density, numbers.Real) and not isinstance(density, bool)
        share = float(density) if real else 0.0
        if not 0 < share <= 1:
            raise ValueError(
                f"FastRandomProjection: received density={density!r}; expected a number above 0 "
                "and at most 1, 'auto' or None"
            )
        return block_below(int(min(1 / share, MAX_BLOCK)))

    @property
    def components_(self) -> csr_matrix:
        check_is_fitted(self)
        kind = self._projector.kind  # set_params changes self.kind alone, until the next fit
        if kind != "sjlt":
            raise AttributeError(
                f"FastRandomProjection: received a request for components_ of kind={kind!r}, "
                "which is not stored; expected fastproj.matrix(t.n_features_in_, "
                "t.n_components_, t.seed_, t.kind) / t.n_components_ ** 0.5, its transpose"
            )
        features, cols, block = self.n_features_in_, self.n_components_, self.block_ or 1
        key = MatrixKey(kind, self.seed_, 0, block)
        k = np.arange(cols, dtype=np.uint64)
        tiles = range(-(-features // block))
        found = [sjlt_entries(key, tile, k) for tile in tiles]
        rows = np.stack([row.astype(np.int64) + t * block for t, (row, _) in enumerate(found)], 1)
        signs = np.stack([sign for _, sign in found], 1)  # [K, tiles]
        kept = rows < features  # the last tile may go beyond
        starts = np.concatenate([[0], np.cumsum(kept.sum(1))])
        values = signs[kept] * math.sqrt(block / cols)
        return csr_matrix((values, rows[kept], starts), shape=(cols, features))

    @property
    def inverse_components_(self) -> NDArray[np.float64]:
        check_is_fitted(self)
        return np.ascontiguousarray(self.inverse_transform(np.eye(self.n_components_)).T)

    def transform(self, X: Any) -> NDArray[Any]:
        """[n, P] to [n, K], dense: float32 for float32, float64 otherwise.

        Sparse rows are made dense DENSE entries at a time.
        """
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=DTYPES, reset=False)
        if not issparse(X):
            return self._projector.project(_tensor(X)).numpy()
        X, step = X.tocsr(), max(1, DENSE // X.shape[1])
        blocks = (X[start : start + step].toarray() for start in range(0, X.shape[0], step))
        return np.concatenate([self._projector.project(_tensor(x)).numpy() for x in blocks])

    def inverse_transform(self, X: Any) -> NDArray[Any]:
        """The shortest [n, P] whose transform is (or comes nearest to) ``X`` [n, K].

        ``X`` times the pseudo-inverse of what ``transform`` multiplies by, from ``R.T @ R`` (or
        ``R @ R.T``, where P < K) in float64: the memory is that of this square matrix, made at the
        first call, not that of R.
        """
        check_is_fitted(self)
        X = check_array(X, accept_sparse=("csr", "csc"), dtype=DTYPES)
        if X.shape[1] != self.n_components_:
            raise ValueError(
                f"FastRandomProjection.inverse_transform: received X {list(X.shape)}; "
                f"expected [n, {self.n_components_}]"
            )
        if self._pinv is None:
            self._pinv = self._inverse_gram()
        y = _tensor(X.toarray() if issparse(X) else X).double()  # [n, K]
        if self.n_components_ <= self.n_features_in_:
            back = self._projector.project_transpose(y @ self._pinv)
        else:
            back = self._projector.project_transpose(y) @ self._pinv
        return back.numpy().astype(X.dtype, copy=False)

    def _inverse_gram(self) -> torch.Tensor:
        """The pseudo-inverse of the scaled matrix's Gram matrix, float64, of size min(P, K)."""
        rows, cols = self.n_features_in_, self.n_components_
        square = (self.block_ or 1) / cols
        found = gram(rows, cols, self.seed_, self._projector.kind, self.block_) * square
        return torch.linalg.pinv(found, hermitian=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _tensor(X: NDArray[Any]) -> torch.Tensor:
    """``X`` as a tensor; a copy where torch can't share its memory."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))
