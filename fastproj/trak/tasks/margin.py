"""The multi-class margin, log(p / (1 - p)), and what its logits and labels must be."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak import batches
from fastproj.trak.tasks.base import is_index


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of each label: its logit minus the logsumexp of the other logits.

    ``p`` is the softmax probability of the label (arXiv 2303.14186, section 3.3).

    Parameters
    ----------
    logits : [..., C], floating point.
    labels : [...], integers in 0..C-1.

    Returns
    -------
    [...], dtype of the logits.
    """
    index = labels.long().unsqueeze(-1)  # [..., 1]
    correct = logits.gather(-1, index).squeeze(-1)
    return correct - logits.scatter(-1, index, -torch.inf).logsumexp(-1)


def check_labels(task: str, labels: object) -> None:
    """Raise TypeError or ValueError, saying what would work, unless ``labels`` are classes [B]."""
    if isinstance(labels, batches.SampleList | batches.SampleTuple) and labels:
        number = isinstance(labels[0], numbers.Number)
        cure = (
            "torch.as_tensor(labels) is one"
            if number
            else "number the classes once for the whole data set"
        )
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
        f"({cure_of(task, labels)})"
    )


OWN = "a function of (model, batch) as the task"


def cure_of(task: str, labels: Tensor) -> str:
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
            f"several classes of a sample at once, or none, have no number; give {OWN}, with the "
            "sum of their log-odds as its output"
        )
    if whole:
        return (
            f"{labels.shape[1]} numbers a sample are not one class; labels of tokens go with "
            "task='causal_lm' or 'seq2seq', several labels of a sample with " + OWN
        )
    return f"soft labels have no number; give {OWN}"


def check_logits(task: str, logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless ``logits`` are [B, C >= 2] and every label is a class of theirs."""
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"{task}: the model returned {describe(logits)} for {len(labels)} "
            f"samples; expected logits [B, C] with C >= 2{one_logit(logits)}"
        )
    bad = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{task}: received label {int(labels[first])} at row {first} of the "
            f"batch; expected classes 0..{logits.shape[1] - 1}, as many as the model has logits"
        )


def one_logit(logits: Tensor) -> str:
    """What to do with a model that has one logit for two classes."""
    if logits.dim() > 2 or (logits.dim() == 2 and logits.shape[1] != 1):
        return ""
    return (
        ". With one logit z for two classes give FunctionModelOutput(lambda model, batch: "
        "(2 * batch[1] - 1) * model(batch[0]).reshape(-1), loss=lambda f: "
        "torch.nn.functional.softplus(-f)) as the task, labels [B] in 0 and 1"
    )


def classification_q(task: str, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """1 - p of each sample, [B]; from the margin, so that it keeps its digits near p = 1."""
    check_logits(task, logits, labels)
    return torch.sigmoid(-margins(logits / temperature, labels))
