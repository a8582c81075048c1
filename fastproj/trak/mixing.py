"""Warnings where samples, targets or a simulated batch hold other data than before."""

from __future__ import annotations

import warnings

import numpy as np

from fastproj.trak.callers import stack_to_caller
from fastproj.trak.files import Indices
from fastproj.trak.saver import Saver


class OtherDataWarning(UserWarning):
    """A sample holds other data than those that its features in the store were made of.

    Attributes
    ----------
    found : which sample, without what to do about it.
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            f"featurize: {found} than this batch holds. What is in save_dir is kept: fine if the "
            "loader augments at random, or pads samples by batch; if it shuffles, or the data set "
            "has changed, samples are mixed up: use shuffle=False, or inds= with the samples' "
            "numbers in the data set, and load_from_save_dir=False or a new save_dir"
        )
        self.found = found


class ContentWatch:
    """Compares the content of samples that a store has and is given; warns once of each kind.

    Attributes
    ----------
    beside : another checkpoint that batches are compared with; None: it is to be found.
    """

    def __init__(self, saver: Saver) -> None:
        self.saver = saver
        self.beside: int | None = None
        self._changed: set[int] = set()  # checkpoints that were warned about
        self._mixed: set[str | None] = set()  # the training set (None) or experiments
        self._others: set[tuple[int, str | None]] = set()  # made with several simulated batches

    def check_batch(self, model_id: int, inds: Indices, content: Indices) -> None:
        """Compare a batch of training samples with what is there of it, here and elsewhere."""
        index = self.saver.index(model_id)
        other = inds[index.done[inds] & (index.content[inds] != content)]
        if len(other) and model_id not in self._changed:
            self._changed.add(model_id)
            found = f"sample {other[0]} of model_id {model_id} was featurized from other data"
            warnings.warn(OtherDataWarning(found), stacklevel=stack_to_caller())
        if self.beside is None:
            others = (i for i in self.saver.ids() if i != model_id and self.saver.is_registered(i))
            self.beside = next((i for i in others if self.saver.index(i).done.any()), model_id)
        if self.beside != model_id:
            index = self.saver.index(self.beside)
            both = index.done[inds]
            other = inds[both & (index.content[inds] != content)]
            self._warn("featurize", other, int(both.sum()), (model_id, self.beside), None)

    def check_pairs(self, model_id: int, exp_name: str | None, pairs: str) -> None:
        """Compare the simulated pairs (a hash) that features depend on with those of the first."""
        key = model_id, exp_name
        if key in self._others or self.saver.same_pairs(*key, pairs):
            return
        self._others.add(key)
        function, of, again = "featurize", "", "load_from_save_dir=False or a new save_dir"
        if exp_name is not None:
            function, of, again = "score", f" of {exp_name!r}", "another exp_name"
        warnings.warn(
            f"{function}: get_embeddings took other pairs for the simulated batch of model_id "
            f"{model_id} than when the first features{of} were made. What is in save_dir is kept, "
            "and what comes is made with the other pairs. For the same pairs, give get_embeddings "
            "a loader with the same data in the same order (shuffle=False, without random "
            "augmentation), and the same simulated_batch_size, seed and size; to begin again, use "
            f"{again}",
            stacklevel=stack_to_caller(),
        )

    def compare(self, function: str, ids: list[int], exp_name: str | None = None) -> None:
        """Compare all samples, or all targets of an experiment, under some checkpoints."""
        first = self.saver.index(ids[0], exp_name)
        for model_id in ids[1:]:
            index = self.saver.index(model_id, exp_name)
            both = first.done & index.done
            other = np.flatnonzero(both & (first.content != index.content))
            self._warn(function, other, int(both.sum()), (model_id, ids[0]), exp_name)

    def _warn(
        self, function: str, other: Indices, of: int, ids: tuple[int, int], exp_name: str | None
    ) -> None:
        if not len(other) or exp_name in self._mixed:
            return
        self._mixed.add(exp_name)
        what, inside = "sample", ""
        again = "load_from_save_dir=False, load_checkpoint and featurize again for all checkpoints"
        if exp_name is not None:
            what, inside = "target", f" of {exp_name!r}"
            again = "score again under all checkpoints"
        warnings.warn(
            f"{function}: {what} {other[0]}{inside} held other data under model_id {ids[0]} than "
            f"under {ids[1]}, as {len(other)} of {of} {what}s did; their scores are averaged as if "
            f"they were the same. If the loader shuffles, {what}s are mixed up: use shuffle=False, "
            f"or inds= with the {what}s' numbers in the data set, and {again}. If it augments at "
            f"random, or pads {what}s as others of their batch need it, the {what}s are the same "
            "and nothing is wrong",
            stacklevel=stack_to_caller(),
        )
