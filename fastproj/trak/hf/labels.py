"""Labels of samples: under which names they come, and what a task takes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastproj.trak.tasks.language import IGNORE_INDEX

LABELS = ("labels", "label", "label_ids")  # Hugging Face's names for them
OF_TOKENS = ("causal_lm", "masked_lm", "token_classification")  # a label for each input token
OF_CLASSES = ("text_classification", "token_classification")


def labels_of(sample: Mapping[str, Any]) -> Any:
    """The labels of a sample under any of their names, or None."""
    return next((sample[name] for name in LABELS if sample.get(name) is not None), None)


def label_entry(task: str) -> str:
    """The name that ``tokenize`` has for the labels of a tokenised sample."""
    return "label" if task == "text_classification" else "labels"


def fault_of(
    labels: Tensor, kind: str | None, tokens: int, classes: int | None, number: bool
) -> tuple[str, str] | None:
    """What is wrong with the labels of a sample, and what would work; None where they are right.

    Parameters
    ----------
    kind : the task; None is one of the user's own, which takes what it likes.
    tokens : of input_ids.
    classes : that the model tells apart, or None where it doesn't say.
    number : whether the label is a number to predict.
    """
    if kind in OF_TOKENS and labels.shape != (tokens,):
        return (
            f"has labels {list(labels.shape)} and {tokens} input_ids",
            f"a label for each token, {IGNORE_INDEX} where none counts",
        )
    if (number or kind == "text_classification") and labels.numel() != 1:
        return f"has {labels.numel()} labels", "one number" if number else "one class number"
    if number or kind is None:
        return None
    wrong = labels.flatten()
    if labels.dtype.is_signed and not labels.is_floating_point():
        if kind not in OF_CLASSES or classes is None:
            return None
        ignored = (wrong == IGNORE_INDEX) & (kind in OF_TOKENS)
        wrong = wrong[((wrong < 0) | (wrong >= classes)) & ~ignored]
    if not len(wrong):
        return None
    value = wrong[0].item()
    return (
        f"has the label {round(value, 6) if isinstance(value, float) else value}",
        what_counts(kind, classes),
    )


def what_counts(kind: str, classes: int | None) -> str:
    """The labels that a task takes, for messages."""
    if kind not in OF_CLASSES:
        return f"integers, the tokens to predict, {IGNORE_INDEX} where none counts"
    known = "" if classes is None else f" 0..{classes - 1} (config.num_labels is {classes})"
    none = f", or {IGNORE_INDEX} where a token has none" if kind in OF_TOKENS else ""
    return f"an integer, the class{known}{none}"
