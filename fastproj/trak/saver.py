"""What ``traker.saver`` holds of a save_dir: features, solutions, and TRAK's names for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fastproj.trak.solving.systems import Systems
from fastproj.trak.store.scores import read_scores
from fastproj.trak.store.store import NotReadyError, Store


class Saver(Store):
    """``traker.saver``: a ``Store``, and what was solved for its checkpoints.

    Attributes
    ----------
    features_of : gives TRAK's "features" [n, k] of a model_id; None: ``current_store`` lacks them.
    """

    features_of: Callable[[int], Tensor] | None = None

    @cached_property
    def systems(self) -> Systems:
        """The Gram matrices and lambdas."""
        return Systems(self)

    @property
    def model_ids(self) -> dict[int, dict[str, int]]:
        """Each model_id on disk with ``is_featurized`` and ``is_finalized`` (0 or 1)."""
        return {
            model_id: {
                "is_featurized": int(self.index(model_id).done.all()),
                "is_finalized": int(self.systems.is_finalized(model_id)),
            }
            for model_id in self.ids()
        }

    @property
    def current_store(self) -> CurrentStore:
        """The arrays of the current model_id under TRAK's names."""
        if self.current_model_id is None:
            raise NotReadyError("TRAKer: no checkpoint is loaded; call load_checkpoint first")
        return CurrentStore(self, self.current_model_id)


class CurrentStore(Mapping[str, Any]):
    """TRAK's ``saver.current_store``: arrays of one model_id, read from disk when asked for.

    ``grads`` [n, k], ``features`` [n, k] (grads times the inverse of XtX), ``out_to_loss`` [n, 1],
    ``is_featurized`` [n, 1], and ``<exp_name>_grads`` [m, k] and ``<exp_name>_scores`` [n, m].
    """

    NAMES = ("grads", "features", "out_to_loss", "is_featurized")

    def __init__(self, store: Saver, model_id: int) -> None:
        self.store = store
        self.model_id = model_id

    def __getitem__(self, name: str) -> Any:
        store, model_id = self.store, self.model_id
        if name == "grads":
            return store.matrix(model_id).numpy()
        if name == "features" and store.features_of is not None:
            return store.features_of(model_id).numpy()
        if name == "out_to_loss":
            return store.out_to_loss(model_id).numpy()[:, None]
        if name == "is_featurized":
            return store.index(model_id).done.astype(np.int32)[:, None]
        exp_name, _, what = name.rpartition("_")
        if what == "grads" and exp_name in store.experiments:
            return store.matrix(model_id, exp_name).numpy()
        if what == "scores" and store.scores_path(exp_name).exists():
            return read_scores(store.scores_path(exp_name))
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.NAMES
        yield from (f"{name}_grads" for name in self.store.experiments)

    def __len__(self) -> int:
        return len(self.NAMES) + len(self.store.experiments)
