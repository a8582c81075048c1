"""Samples as a batch: padded on the right alone, with labels and attention masks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.trak.hf.heads import is_regression
from fastproj.trak.hf.labels import LABELS, OF_CLASSES, OF_TOKENS, fault_of, labels_of
from fastproj.trak.hf.lengths import padded_shapes
from fastproj.trak.hf.limits import num_classes_of, vocabulary_of
from fastproj.trak.hf.masking import Masking
from fastproj.trak.hf.samples import Sample, Samples
from fastproj.trak.tasks.language import IGNORE_INDEX, base_of, forward_names, seen_tokens

SOURCE = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
TARGET = ("decoder_input_ids", "decoder_attention_mask")
PLACES = {"start_positions", "end_positions", "entity_position_ids"}  # numbers of input tokens

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
    settled : whether it is known that padding changes nothing, or nothing is padded.
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
        self.words = vocabulary_of(model)
        self.classes = num_classes_of(model)
        self.pads = dict.fromkeys((*SOURCE, *TARGET), 0)
        pad = padding_token(base_of(model).config, tokenizer)
        self.pads.update(input_ids=pad, decoder_input_ids=pad, labels=IGNORE_INDEX)
        self._say_what_is_left_out(samples[0])
        self.token_labels = kind in OF_TOKENS or (kind is None and all(map(of_tokens, samples)))
        self.lengths = [self._lengths(index, sample) for index, sample in enumerate(samples)]
        placed = kind == "causal_lm" and "position_ids" in self.takes
        self.packed = placed and any(map(is_packed, samples))
        self.shapes = padded_shapes(self.lengths)
        self.settled = self.shapes == self.lengths

    def most_padded(self, most: int) -> list[int]:
        """The numbers of the samples that get the most padding, at most so many; one of each
        remainder of the length by ``most`` comes first, because models that join tokens, such as
        CANINE by 4, may leave out padding where the length is a multiple.
        """
        added = [sum(s) - sum(n) for s, n in zip(self.shapes, self.lengths, strict=True)]
        order = sorted(range(len(added)), key=lambda index: -added[index])
        order = [index for index in order if added[index]]
        firsts = {self.lengths[index][0] % most: index for index in reversed(order)}
        return [*firsts.values(), *(i for i in order if i not in firsts.values())][:most]

    def unpadded(self, index: int) -> dict[str, Tensor]:
        """One sample as a batch, as long as it is."""
        return self._batch([index], self.lengths)

    def pad_nothing(self) -> None:
        """Let each sample be as long as it is."""
        self.shapes = list(self.lengths)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples ``indices``, which have one shape, as a batch of the model's arguments."""
        return self._batch(indices, self.shapes)

    def _batch(
        self, indices: Sequence[int], shapes: Sequence[tuple[int, ...]]
    ) -> dict[str, Tensor]:
        rows = [self._row(index) for index in indices]
        for index, row in zip(indices, rows, strict=True):
            if row.keys() != rows[0].keys():
                raise ValueError(
                    f"HFTRAKer: sample {index} of {self.name} has {', '.join(row)}, sample "
                    f"{indices[0]} has {', '.join(rows[0])}; expected the same entries in all"
                )
        tokens = [len(row["input_ids"]) for row in rows]
        return {
            name: self._stacked(
                indices, shapes[indices[0]], tokens, name, [row[name] for row in rows]
            )
            for name in rows[0]
        }

    def _lengths(self, index: int, sample: Sample) -> tuple[int, ...]:
        ids = sample["input_ids"]
        if not hasattr(ids, "__len__"):
            raise self._wrong(index, f"has input_ids {ids!r:.60}", "a list of token numbers")
        sample = self._shown(index, sample)
        lengths = [len(sample["input_ids"])]
        if self.kind == "seq2seq":
            labels = labels_of(sample)
            if labels is None:
                raise self._wrong(index, "has no labels", "the tokens of its target as 'labels'")
            lengths.append(len(labels))
        if 0 in lengths:
            raise self._wrong(index, "has no tokens", "at least one")
        return tuple(lengths)

    def _shown(self, index: int, sample: Sample) -> Sample:
        """A sample without the padding that it came with: tokens at its ends that a mask hides.

        On the left it would move all tokens to other positions than they have without.
        """
        labels = labels_of(sample)
        if labels is not None:
            sample = {**sample, "labels": labels}
        own = ("labels",) if self.token_labels else ()
        sample = self._cut(index, sample, "input_ids", "attention_mask", (*SOURCE, *own))
        if self.kind == "seq2seq" and labels is not None:
            target = (*TARGET, "labels")
            sample = self._cut(index, sample, "labels", "decoder_attention_mask", target)
        return sample

    def _cut(
        self, index: int, sample: Sample, of: str, mask_name: str, names: tuple[str, ...]
    ) -> Sample:
        """A sample whose entries ``names`` begin and end with tokens that a mask shows, or, at the
        end, whose label counts.

        of : the entry that has these tokens.
        """
        tokens, mask = sample[of], sample.get(mask_name)
        if not is_long(mask, len(tokens)):
            return sample
        size, shown = len(tokens), self._tensor(index, mask_name, mask) != 0
        if shown.dim() != 1 or bool(shown[0] & shown[-1]) or not bool(shown.any()):
            return sample
        long = {name for name, part in sample.items() if is_long(part, size)}
        others = long - {*SOURCE, *TARGET, *LABELS}
        if self.takes & others:  # they are of the same tokens, and can't be padded anew
            return sample
        first, last = (int(shown.nonzero()[end]) for end in (0, -1))
        counting = sorted(PLACES & self.takes & sample.keys())
        if first and counting:
            raise self._wrong(
                index,
                f"has {counting[0]}, by which the {first} tokens at its start that {mask_name} "
                "hides count, too",
                "samples that are not padded, or padded on the right",
            )
        if "labels" in names and "labels" in sample:
            if "labels" not in long:  # which is refused
                return sample
            labels = self._tensor(index, "labels", sample["labels"]).reshape(size, -1)
            counted = (labels != IGNORE_INDEX).any(1).nonzero()
            if len(counted) and int(counted[0]) < first:
                raise self._wrong(
                    index,
                    f"has labels that count for the {first} tokens at its start that {mask_name} "
                    "hides",
                    f"{IGNORE_INDEX} there, or samples that are not padded",
                )
            last = max(last, *counted.flatten().tolist())
        cut = {name: sample[name][first : last + 1] for name in long.intersection(names)}
        return {**sample, **cut}

    def _row(self, index: int) -> dict[str, Tensor]:
        """The arguments of the model for a sample, not padded, and its labels."""
        sample = self._shown(index, self.samples[index])
        row = {
            name: self._tensor(index, name, value)
            for name, value in sample.items()
            if name in self.takes and name not in LABELS and value is not None
        }
        ids = row["input_ids"]
        self._check_ids(index, ids)
        mask = row.get("attention_mask", torch.ones_like(ids))
        if mask.dim() == 1 and len(mask) != len(ids):
            raise self._wrong(
                index,
                f"has an attention_mask of {len(mask)} and {len(ids)} input_ids",
                "1 for each token, 0 where one is hidden, or no attention_mask",
            )
        other = mask[(mask != 0) & (mask != 1)] if mask.dim() == 1 else mask.new_empty(0)
        if len(other):
            raise self._wrong(
                index,
                f"has an attention_mask with the value {other[0].item()}",
                "1 for each token, 0 where one is hidden, or no attention_mask",
            )
        if "attention_mask" in self.takes and not (self.packed and "attention_mask" not in row):
            row["attention_mask"] = mask
        given = labels_of(sample)
        if given is not None:
            row["labels"] = self._labels(index, self._tensor(index, "labels", given), len(ids))
        elif self.kind == "causal_lm":
            row["labels"] = seen_tokens(ids, mask)
        elif self.masking is not None:
            never = sample.get("special_tokens_mask")
            never = None if never is None else as_tensor(never)
            row["input_ids"], row["labels"] = self.masking.hide(index, ids, never, mask)
        elif self.kind is not None:
            raise self._wrong(index, "has no labels", "'labels' (or 'label') in every sample")
        self._check_something_counts(index, row)
        return row

    def _tensor(self, index: int, name: str, value: Any) -> Tensor:
        """An entry of a sample as a tensor."""
        try:
            return as_tensor(value)
        except (TypeError, ValueError):
            names = name == "labels" and self.kind in OF_CLASSES
            cure = " (fastproj.trak.hf.tokenize makes them of names, by label2id)"
            raise self._wrong(
                index,
                f"has {name} {value!r:.60}",
                f"numbers, in lists of one length{cure if names else ''}",
            ) from None

    def _check_ids(self, index: int, ids: Tensor) -> None:
        """Raise ValueError unless they are token numbers that the model knows."""
        if ids.dim() != 1 or ids.is_floating_point():
            what = "of floating-point numbers" if ids.dim() == 1 else str(list(ids.shape))
            raise self._wrong(index, f"has input_ids {what}", "one list of token numbers a sample")
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or (self.words is not None and high >= self.words):
            known = f"0..{self.words - 1}, which the model knows" if self.words else "0 or more"
            raise self._wrong(
                index,
                f"has the token {low if low < 0 else high}",
                f"tokens {known} (is the tokenizer another model's?)",
            )

    def _check_something_counts(self, index: int, row: Mapping[str, Tensor]) -> None:
        """Raise ValueError where no label of a sample counts."""
        if self.kind not in (*OF_TOKENS, "seq2seq"):
            return
        labels = row["labels"][1:] if self.kind == "causal_lm" else row["labels"]
        if not bool((labels != IGNORE_INDEX).any()):
            why = f"all that the model predicts are {IGNORE_INDEX}" if len(labels) else "one token"
            raise self._wrong(
                index,
                f"has no label that counts ({why})",
                "at least one token to predict, or a data set without this sample",
            )

    def _labels(self, index: int, labels: Tensor, tokens: int) -> Tensor:
        """The labels of a sample, checked against what the task takes."""
        fault = fault_of(labels, self.kind, tokens, self.classes, self.number)
        if fault is not None:
            raise self._wrong(index, *fault)
        if self.number:
            return labels.to(torch.float32).reshape(())
        return labels.reshape(()) if self.kind == "text_classification" else labels

    def _stacked(
        self,
        indices: Sequence[int],
        shape: tuple[int, ...],
        tokens: list[int],
        name: str,
        parts: list[Tensor],
    ) -> Tensor:
        """One argument of all samples, [B, ...]."""
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


def of_tokens(sample: Sample) -> bool:
    """Whether a sample has a label for each token."""
    labels = labels_of(sample)
    return np.ndim(labels) > 0 and is_long(sample["input_ids"], len(labels))


def is_packed(sample: Sample) -> bool:
    """Whether a sample is several texts, whose positions begin again with each.

    Models of transformers tell them apart by that, where there is no mask: any mask would let each
    text see those before it.
    """
    places = sample.get("position_ids")
    if places is None or sample.get("attention_mask") is not None or np.ndim(places) != 1:
        return False
    return bool((np.diff(np.asarray(places)) != 1).any())


def is_long(part: Any, size: int) -> bool:
    """Whether an entry of a sample has so many parts."""
    try:
        return not isinstance(part, str) and len(part) == size
    except TypeError:  # None, a number
        return False


def as_tensor(value: Any) -> Tensor:
    """A list, number, array or tensor as a tensor: whole numbers as int64."""
    t = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
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
