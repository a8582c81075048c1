"""Samples as a batch: padded on the right, with labels and attention masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.trak.hf.heads import is_regression
from fastproj.trak.hf.lengths import padded_shapes
from fastproj.trak.hf.masking import Masking
from fastproj.trak.hf.samples import Sample, Samples
from fastproj.trak.tasks.language import IGNORE_INDEX, base_of, forward_names, seen_tokens

LABELS = ("labels", "label", "label_ids")  # Hugging Face's names for them
OF_TOKENS = ("causal_lm", "masked_lm", "token_classification")  # a label for each input token
SOURCE = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
TARGET = ("decoder_input_ids", "decoder_attention_mask")

logger = logging.getLogger("fastproj.trak")


class Collator:
    """Makes batches of samples as a model and a task take them.

    Parameters
    ----------
    samples : the data set.
    model : the transformers model; what its forward doesn't take is left out, with a log line.
    kind : the task by name, or None for one of the user's own: labels are then stacked.
    task : as ``TRAKer`` takes it.
    tokenizer : for the padding token, where the model's configuration has none.
    masking : hides tokens of a masked language model where samples have no labels.
    name : of the data set, for messages.

    Attributes
    ----------
    lengths : the tokens of each sample, (input_ids,) or (input_ids, labels) of a seq2seq model.
    shapes : how long each sample is padded.
    """

    def __init__(
        self,
        samples: Samples,
        model: nn.Module,
        kind: str | None,
        task: Any,
        tokenizer: Any,
        masking: Masking | None,
        name: str,
    ) -> None:
        self.samples, self.kind, self.name = samples, kind, name
        self.masking = masking
        self.number = is_regression(task)
        self.takes = forward_names(model)
        self.pads = dict.fromkeys((*SOURCE, *TARGET), 0)
        pad = padding_token(base_of(model).config, tokenizer)
        self.pads.update(input_ids=pad, decoder_input_ids=pad, labels=IGNORE_INDEX)
        self._say_what_is_left_out(samples[0])
        self.lengths = [self._lengths(index, sample) for index, sample in enumerate(samples)]
        self.token_labels = kind in OF_TOKENS or (kind is None and all(map(of_tokens, samples)))
        self.shapes = padded_shapes(self.lengths)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples ``indices``, which have one shape, as a batch of the model's arguments."""
        rows = [self._row(index) for index in indices]
        for index, row in zip(indices, rows, strict=True):
            if row.keys() != rows[0].keys():
                raise ValueError(
                    f"HFTRAKer: sample {index} of {self.name} has {', '.join(row)}, sample "
                    f"{indices[0]} has {', '.join(rows[0])}; expected the same entries in all"
                )
        tokens = [len(row["input_ids"]) for row in rows]
        return {
            name: self._stacked(indices, tokens, name, [row[name] for row in rows])
            for name in rows[0]
        }

    def _lengths(self, index: int, sample: Sample) -> tuple[int, ...]:
        lengths = [len(sample["input_ids"])]
        if self.kind == "seq2seq":
            labels = labels_of(sample)
            if labels is None:
                raise self._wrong(index, "has no labels", "the tokens of its target as 'labels'")
            lengths.append(len(labels))
        if 0 in lengths:
            raise self._wrong(index, "has no tokens", "at least one")
        return tuple(lengths)

    def _row(self, index: int) -> dict[str, Tensor]:
        """The arguments of the model for a sample, not padded, and its labels."""
        sample = self.samples[index]
        row = {
            name: as_tensor(value)
            for name, value in sample.items()
            if name in self.takes and name not in LABELS and value is not None
        }
        ids = row["input_ids"]
        if ids.dim() != 1:
            raise self._wrong(
                index, f"has input_ids {list(ids.shape)}", "one list of token numbers a sample"
            )
        if "attention_mask" in self.takes and "attention_mask" not in row:
            row["attention_mask"] = torch.ones_like(ids)
        given = labels_of(sample)
        if given is not None:
            row["labels"] = self._labels(index, as_tensor(given), len(ids))
        elif self.kind == "causal_lm":
            row["labels"] = seen_tokens(ids, row.get("attention_mask", torch.ones_like(ids)))
        elif self.masking is not None:
            never = sample.get("special_tokens_mask")
            never = None if never is None else as_tensor(never)
            row["input_ids"], row["labels"] = self.masking.hide(index, ids, never)
        elif self.kind is not None:
            raise self._wrong(index, "has no labels", "'labels' (or 'label') in every sample")
        return row

    def _labels(self, index: int, labels: Tensor, tokens: int) -> Tensor:
        """The labels of a sample, checked against what the task takes."""
        if self.kind in OF_TOKENS and labels.shape != (tokens,):
            raise self._wrong(
                index,
                f"has labels {list(labels.shape)} and {tokens} input_ids",
                f"a label for each token, {IGNORE_INDEX} where none counts",
            )
        if self.number:
            return labels.to(torch.float32).reshape(())
        if self.kind == "text_classification" and labels.dim():
            if labels.numel() != 1:
                raise self._wrong(index, f"has {labels.numel()} labels", "one class number")
            return labels.reshape(())
        return labels

    def _stacked(
        self, indices: Sequence[int], tokens: list[int], name: str, parts: list[Tensor]
    ) -> Tensor:
        """One argument of all samples, [B, ...]."""
        shape = self.shapes[indices[0]]
        by_token = all(p.dim() and len(p) == n for p, n in zip(parts, tokens, strict=True))
        if self.kind == "seq2seq" and name in ("labels", *TARGET):
            return padded(parts, shape[1], self.pads[name])
        if name == "labels" and self.token_labels:
            return padded(parts, shape[0], self.pads[name])
        if name in SOURCE and by_token:
            return padded(parts, shape[0], self.pads[name])
        for index, part in zip(indices, parts, strict=True):
            if part.shape != parts[0].shape:
                raise self._wrong(
                    index,
                    f"has {name} {list(part.shape)}, where sample {indices[0]} has "
                    f"{list(parts[0].shape)}",
                    "one shape in all samples, or one number for each token of input_ids in "
                    f"{', '.join(SOURCE)}",
                )
        return torch.stack(parts)

    def _wrong(self, index: int, received: str, expected: str) -> ValueError:
        return ValueError(
            f"HFTRAKer: sample {index} of {self.name} {received}; expected {expected}"
        )

    def _say_what_is_left_out(self, sample: Sample) -> None:
        out = [name for name in sample if name not in self.takes and name not in LABELS]
        out = [name for name in out if name != "special_tokens_mask"]
        if out:
            logger.info(
                "HFTRAKer: the model takes no %s; left out of %s", ", ".join(out), self.name
            )


def labels_of(sample: Sample) -> Any:
    """The labels of a sample under any of their names, or None."""
    return next((sample[name] for name in LABELS if sample.get(name) is not None), None)


def of_tokens(sample: Sample) -> bool:
    """Whether a sample has a label for each token."""
    labels = labels_of(sample)
    return np.ndim(labels) > 0 and len(labels) == len(sample["input_ids"])


def as_tensor(value: Any) -> Tensor:
    """A list, number, array or tensor as a tensor: whole numbers as int64."""
    t = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if t.is_floating_point():
        return t.to(torch.float32)
    return t if t.dtype == torch.bool else t.to(torch.int64)


def padded(parts: list[Tensor], length: int, pad: int) -> Tensor:
    """Rows [T_i, ...] as [B, length, ...], filled up at the end."""
    whole = parts[0].new_full((len(parts), length, *parts[0].shape[1:]), pad)
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole


def padding_token(config: Any, tokenizer: Any) -> int:
    """The number of the padding token: the model's, which may tell by it where a text ends; else
    the tokenizer's, else 0. Masks and labels hide it.
    """
    for holder in (config, tokenizer):
        found = getattr(holder, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0
