"""The curvature in the inverse: which one, and whether what a task says of it can be right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak.draws import Fisher
from fastproj.trak.files import Indices
from fastproj.trak.gradients import AbstractGradientComputer
from fastproj.trak.inputs import check_finite
from fastproj.trak.solving.solve import AUTO, Lambda
from fastproj.trak.solving.systems import FISHER, TRAK
from fastproj.trak.tasks import Terms, belongs_together, has_likelihood
from fastproj.trak.tasks.classification import ClassificationModelOutput

CURVATURES = (AUTO, FISHER, TRAK)


def resolve_curvature(
    curvature: Any, lambda_reg: Lambda, task: Any, gradient_computer: Any
) -> Fisher | None:
    """What ``TRAKer(curvature=...)`` says: the settings of "fisher", or None for "trak".

    "auto" is "fisher" where lambda is chosen and the task knows the likelihood of its labels.
    """
    named = isinstance(curvature, str) and curvature in CURVATURES
    if not named and not isinstance(curvature, Fisher):
        raise ValueError(
            f"TRAKer: received curvature={curvature!r:.80}; expected "
            f"{', '.join(map(repr, CURVATURES))}, or fastproj.trak.Fisher(...)"
        )
    ours = (
        isinstance(gradient_computer, AbstractGradientComputer) and gradient_computer.gives_rows()
    )
    if curvature == AUTO:
        return Fisher().of(task) if lambda_reg == AUTO and ours and has_likelihood(task) else None
    if curvature == TRAK:
        return None
    if not has_likelihood(task):
        warm = isinstance(task, ClassificationModelOutput) and belongs_together(task)
        why, cure = (
            (f" with temperature={task.temperature:g}", "temperature=1")
            if warm
            else ("", "a task of fastproj's")
        )
        raise ValueError(
            f"TRAKer: received curvature={curvature!r} with the task {type(task).__name__}, which"
            f"{why} doesn't say what the likelihood of its labels is; expected {cure}, "
            "FunctionModelOutput(..., likelihood=), one with likelihood_terms of its own, or "
            'curvature="trak"'
        )
    if not ours:
        raise ValueError(
            f"TRAKer: received curvature={curvature!r} with a gradient_computer that takes the "
            'gradients of one output only; expected "auto", "hooks", "func", "loop" or a subclass '
            'of one of these with compute_rows, or curvature="trak"'
        )
    return (curvature if isinstance(curvature, Fisher) else Fisher()).of(task)


def check_terms(terms: Terms, size: int, draws: int, inds: Indices) -> None:
    """Raise TypeError or ValueError unless what a task says of a likelihood can be right, finite or
    not.

    draws : how many rows there was noise for.
    """
    if not isinstance(terms, Terms):
        raise TypeError(
            f"featurize: the task's likelihood_terms returned {type(terms).__name__}; expected "
            "fastproj.trak.tasks.Terms"
        )
    for name, values in terms._asdict().items():
        if not isinstance(values, Tensor) or values.is_complex():
            raise TypeError(
                f"featurize: the task's likelihood_terms returned {name} {describe(values)}; "
                "expected a tensor of real numbers"
            )
        if name != "drawn" and values.shape != (size,):
            raise ValueError(
                f"featurize: the task's likelihood_terms returned {name} {list(values.shape)} for "
                f"a batch of {size}; expected [{size}]"
            )
    if terms.drawn.shape not in ((size, 0), (size, draws)):
        raise ValueError(
            f"featurize: the task's likelihood_terms returned drawn {list(terms.drawn.shape)} for "
            f"a batch of {size} and noise for {draws} row(s); expected [{size}, {draws}], or "
            f"[{size}, 0] where the curvature says all"
        )
    convex = (terms.curvature < 0).nonzero()
    if len(convex):
        row = int(convex[0])
        raise ValueError(
            f"featurize: sample {inds[row]} has the curvature {float(terms.curvature[row]):g}; "
            "expected none below 0, as of a log-likelihood that is concave in the output, and "
            "whose derivatives don't underflow (softplus(f) instead of log(1 + exp(f))); one that "
            "isn't concave goes with TRAKer(curvature='trak') and another save_dir"
        )


def check_finite_terms(terms: Terms, inds: Indices) -> None:
    """Raise ValueError where numbers that would be kept are not finite, naming samples.

    Check the features first: a model that mixes its samples may spread a NaN in the terms of a
    batch, and not in the gradients.
    """
    kept = {name: getattr(terms, name) for name in ("slope", "curvature", "along", "drawn")}
    if torch.isfinite(torch.cat([values.flatten() for values in kept.values()])).all():
        return
    for name, values in kept.items():
        if values.numel():  # there may be no drawn rows
            check_finite("featurize", name, values, inds)
