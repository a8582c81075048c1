"""What a step builds on must be there: which checkpoints, samples, targets and lambdas are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastproj.trak.callers import stack_to_caller
from fastproj.trak.saver import Saver
from fastproj.trak.solving.solve import Lambda
from fastproj.trak.store.store import NotReadyError
from fastproj.trak.tasks import learns_along_output


def known_ids(saver: Saver, function: str, model_ids: Iterable[int] | None) -> list[int]:
    """The given model_ids, or all; raises NotReadyError unless each is in the store."""
    known = saver.ids()
    ids = known if model_ids is None else list(model_ids)
    missing = [model_id for model_id in ids if model_id not in known]
    if missing or not ids:
        unused = ", and some of an earlier run, unused for load_from_save_dir=False"
        raise NotReadyError(
            f"{function}: received model_ids {missing or ids}; {saver.save_dir} has "
            f"{known or 'none'}{unused if saver.earlier else ''}. Call load_checkpoint and "
            "featurize first"
        )
    return ids


def require_all(
    saver: Saver, function: str, model_id: int, exp_name: str | None = None, processes: int = 1
) -> None:
    """Raise NotReadyError unless all training samples are featurized, or all targets scored.

    processes : how many share the work. Samples lack where each has a directory of its own.
    """
    done = saver.index(model_id, exp_name).done
    if not done.all():
        missing = np.flatnonzero(~done)
        of, cure = "training samples", "call featurize for them"
        declared, another = "train_set_size", "save_dir"
        if processes > 1:
            cure += (
                f", with one save_dir in all {processes} processes, whose files all of them see "
                f"(here it is {saver.save_dir})"
            )
        if exp_name is not None:
            of, cure = (
                f"targets of {exp_name!r}",
                "call start_scoring_checkpoint and score for them",
            )
            declared, another = "num_targets", "exp_name"
            cure += ", or pass allow_skip=True" if function == "finalize_scores" else ""
        there = len(done) - len(missing)
        if 0 < there == missing[0]:  # as where a loader drops its last batch
            cure += f"; if there are no more than these, {declared}={there} and another {another}"
        raise NotReadyError(
            f"{function}: model_id {model_id} lacks {len(missing)} of {len(done)} {of} "
            f"(the first: {missing[0]}); {cure}"
        )


def require_finalized(saver: Saver, function: str, model_id: int) -> None:
    """Raise NotReadyError unless a checkpoint is featurized and finalised."""
    known_ids(saver, function, [model_id])
    require_all(saver, function, model_id)
    if not saver.systems.is_finalized(model_id):
        raise NotReadyError(
            f"{function}: model_id {model_id} is not finalised; call finalize_features first"
        )


def finalized_ids(saver: Saver) -> list[int]:
    """The checkpoints that are finalised: those whose scores are averaged in the end."""
    return [model_id for model_id in saver.ids() if saver.systems.is_finalized(model_id)]


def require_outputs(task: Any, function: str, lambda_reg: Lambda, scaled: bool) -> None:
    """Raise ValueError unless the training features are gradients of f, as TRAK's are.

    scaled : whether gradients by each parameter were multiplied by a number of its own.
    """
    if scaled or not learns_along_output(task):
        raise ValueError(
            f"{function}: received lambda_reg={lambda_reg!r}, which is TRAK's formula, where the "
            f"features of {type(task).__name__} were made for the Fisher matrix; expected "
            'lambda_reg="auto", or TRAKer(..., curvature="fisher") to add it to that matrix, or '
            'TRAKer(..., curvature="trak") with another save_dir, and featurize'
        )


def scored_ids(
    saver: Saver, function: str, exp_name: str, model_ids: Iterable[int] | None, skip: bool
) -> list[int]:
    """The checkpoints under which all targets are scored; all of ``model_ids``, or with ``skip``
    a warning about each of the others. Raises NotReadyError.
    """
    ids = []
    for model_id in known_ids(saver, function, model_ids):
        try:
            require_finalized(saver, function, model_id)
            require_all(saver, function, model_id, exp_name)
            ids.append(model_id)
        except NotReadyError as error:
            if not skip:
                raise
            warnings.warn(f"{error}; skipped", stacklevel=stack_to_caller())
    if not ids:
        raise NotReadyError(
            f"{function}: no checkpoint in {saver.save_dir} is ready for {exp_name!r}"
        )
    return ids
