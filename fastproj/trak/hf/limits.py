"""How much a transformers model can take: tokens, positions and classes."""

from __future__ import annotations

from typing import Any

from fastproj.trak.tasks.language import base_of


def vocabulary_of(model: Any) -> int | None:
    """How many tokens a model has embeddings of; None where it doesn't say."""
    try:
        table = base_of(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers', where a model has none
        return None
    found = getattr(table, "num_embeddings", None)
    return found if isinstance(found, int) else None


def positions_of(model: Any) -> int | None:
    """The most tokens that a model has positions for; None where it doesn't say.

    RoBERTa's and others' first position is the one after the padding token's number, which their
    configuration counts, too.
    """
    base = base_of(model)
    most = getattr(base.config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    for name, module in base.named_modules():
        pad = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(pad, int):
            return most - pad - 1
    return most


def num_classes_of(model: Any) -> int | None:
    """How many classes a classifier tells apart; None where it doesn't say."""
    found = getattr(base_of(model).config, "num_labels", None)
    return found if isinstance(found, int) and found > 1 else None
