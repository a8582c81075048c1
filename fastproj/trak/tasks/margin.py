"""The multi-class margin, log(p / (1 - p)), and what its logits and labels must be."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak import batches
from fastproj.trak.tasks.base import is_index
from fastproj.trak.tasks.contrasts import contrasts


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of each label: its logit minus the logsumexp of the other logits.

    ``p`` is the softmax probability of the label (arXiv 2303.14186, section 3.3). It can be
    differentiated once; of the logits it keeps no copy.

    Parameters
    ----------
    logits : [..., C], floating point.
    labels : [...], integers in 0..C-1.

    Returns
    -------
    [...], dtype of the logits.
    """
    found = contrasts(logits, labels)
    return (found.own - found.rest).to(logits.dtype)


def logits_of_classes(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [B, C] as they are; [B, 2] of one logit [B] or [B, 1], which is that of class 1."""
    if logits.shape in ((len(labels),), (len(labels), 1)):
        one = logits.reshape(-1, 1)
        return torch.cat([torch.zeros_like(one), one], 1)
    return logits


def yes_or_no(logits: Tensor, labels: Tensor) -> Tensor:
    """The log-odds of what is right, [B, L]: of a label that is 1 its logit, otherwise minus it."""
    return torch.where(labels != 0, logits, -logits)


def check_labels(task: str, labels: object, kind: str) -> None:
    """Raise TypeError or ValueError, saying what would work, unless ``labels`` are classes [B].

    kind : the class of the task.
    """
    if isinstance(labels, batches.SampleList | batches.SampleTuple) and labels:
        cure = "number the classes once for the whole data set"
        if isinstance(labels[0], numbers.Number):
            cure = "torch.as_tensor(labels) is one"
        elif isinstance(labels[0], Tensor):
            cure = "torch.stack(labels) is one"
        raise TypeError(
            f"{task}: received labels as a list of {type(labels[0]).__name__}; expected a tensor "
            f"[B] of class numbers, int64 ({cure})"
        )
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{task}: received labels of type {type(labels).__name__}; expected a tensor [B] of "
            "class numbers, int64"
        )
    if labels.dim() == 1 and is_index(labels):
        return
    raise ValueError(
        f"{task}: received labels {describe(labels)}; expected [B] class numbers, int64 "
        f"({cure_of(task, labels, kind)})"
    )


def check_multilabel(task: str, labels: object) -> None:
    """Raise ValueError unless ``labels`` are 0 and 1, [B, L]."""
    expected = "expected [B, L] of 0 and 1, whether the sample has each of L labels"
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"{task}: received labels of type {type(labels).__name__} with multilabel=True; "
            f"{expected}"
        )
    if labels.dim() != 2 or labels.is_complex():
        raise ValueError(
            f"{task}: received labels {describe(labels)} with multilabel=True; {expected}"
        )
    wrong = ((labels != 0) & (labels != 1)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{task}: received label {labels[row, column].item():g} at row {row}, column {column} "
            f"of the batch with multilabel=True; {expected}"
        )


def check_multilabel_logits(task: str, logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless there is one logit for each label."""
    if logits.shape != labels.shape:
        raise ValueError(
            f"{task}: the model returned {describe(logits)} for labels {list(labels.shape)} with "
            "multilabel=True; expected one logit for each label"
        )


OWN = "a function of (model, batch) as the task"


def cure_of(task: str, labels: Tensor, kind: str) -> str:
    """How class numbers [B] come from labels of another form, or what to do without."""
    if labels.is_complex():
        return "complex numbers name no class"
    whole = is_index(labels) or labels.dtype == torch.bool or bool((labels == labels.round()).all())
    long = "" if is_index(labels) else ".long()"
    if labels.dim() > 2:
        return (
            f"{task} takes one label a sample; for labels of pixels or other parts of a sample "
            f"give {OWN}, with the sum of their margins as its output"
        )
    if labels.dim() == 1 or labels.shape[1] == 1:
        squeeze = "" if labels.dim() == 1 else ".squeeze(1)"
        if whole:
            return f"labels{squeeze}{long} if these are class numbers"
        return f"these are no class numbers; for regression or soft labels give {OWN}"
    if bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all()):
        return f"labels{long}.argmax(1), if every sample has one class only"
    if whole and bool(((labels == 0) | (labels == 1)).all()):
        return (
            "several classes of a sample at once, or none, have no number; give "
            f"{kind}(multilabel=True) as the task"
        )
    if whole:
        return (
            f"{labels.shape[1]} numbers a sample are not one class; labels of tokens go with "
            "task='causal_lm' or 'seq2seq', several labels of a sample as [B, L] of 0 and 1 with "
            f"{kind}(multilabel=True)"
        )
    return f"soft labels have no number; give {OWN}"


def check_logits(task: str, logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless ``logits`` are [B, C >= 2] and every label is a class of theirs."""
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"{task}: the model returned {describe(logits)} for {len(labels)} "
            "samples; expected logits [B, C], or one logit of class 1 for each"
        )
    labels = labels.long()  # in 8 or 16 bits the number of classes would count modulo 2^8 or 2^16
    bad = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{task}: received label {int(labels[first])} at row {first} of the "
            f"batch; expected classes 0..{logits.shape[1] - 1}, as many as the model has logits"
        )
