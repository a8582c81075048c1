"""The multi-class margin, log(p / (1 - p)), and what its logits and labels must be."""

from __future__ import annotations

import torch
from torch import Tensor

from fastproj.checks import describe


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


def check_logits(task: str, logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless ``logits`` are [B, C >= 2] and every label is a class of theirs."""
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"{task}: the model returned {describe(logits)} for {len(labels)} "
            "samples; expected logits [B, C] with C >= 2"
        )
    bad = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"{task}: received label {int(labels[first])} at row {first} of the "
            f"batch; expected classes 0..{logits.shape[1] - 1}, as many as the model has logits"
        )


def classification_q(task: str, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """1 - p of each sample, [B]; from the margin, so that it keeps its digits near p = 1."""
    check_logits(task, logits, labels)
    return torch.sigmoid(-margins(logits / temperature, labels))
