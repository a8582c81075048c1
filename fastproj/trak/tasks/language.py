"""Language modelling: every token of a sequence is a classification over the vocabulary."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak.tasks.base import (
    Batch,
    BatchedModelOutput,
    Params,
    Terms,
    call,
    check_masks,
    check_temperature,
    describe_parts,
    is_index,
    logits_of,
)
from fastproj.trak.tasks.likelihood import prediction_terms
from fastproj.trak.tasks.margin import margins

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss and Hugging Face: no target here
TELLING = 8  # labels that are all the next token: not by chance


class TokenModelOutput(BatchedModelOutput):
    """Margins of the target tokens of a sequence, summed (arXiv 2303.14186, section 5.2).

    ``f(z; theta) = sum_t log(p_t / (1 - p_t))`` over the tokens t whose label is not -100, with
    ``p_t`` the probability of the right token given those before it. ``Q = mean_t (1 - p_t)``:
    minus the derivative of the loss ``sum_t -log p_t`` by f where all margins move together.

    Parameters
    ----------
    reduction : "sum" | "mean" over the tokens of a sample. With "mean", long sequences count no
        more than short ones. Q is the same.
    likelihood_temperature : divides the logits in the log-likelihood by whose gradient training
        samples count, with curvature "fisher". None is the task's own, ``softens``: 1 unless its
        class says so.
    """

    name: str
    expected = "(input_ids, attention_mask, labels), or a dict with labels"
    softens = 1.0

    knows_likelihood = True

    def __init__(self, reduction: str = "sum", likelihood_temperature: float | None = None) -> None:
        name = type(self).__name__
        if reduction not in ("sum", "mean"):
            raise ValueError(f"{name}: received reduction={reduction!r}; expected 'sum' or 'mean'")
        self.reduction = reduction
        self.likelihood_temperature = self.softens
        if likelihood_temperature is not None:
            self.likelihood_temperature = check_temperature(
                name, likelihood_temperature, "likelihood_temperature"
            )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The batch as keyword arguments and "labels"; empty if it isn't one of this task's."""
        return as_dict(batch, ("input_ids", "attention_mask", "labels"), least=3)

    @abstractmethod
    def predictions(
        self, model: Any, weights: Params, buffers: Params, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V], and the label [B, T] that each of them predicts."""

    def check_batch(self, batch: Batch) -> None:
        """Token ids, and labels of which every sample has at least one."""
        inputs = self.inputs(batch)
        labels, ids = inputs.get("labels"), inputs.get("input_ids")
        if labels is None:
            raise ValueError(
                f"{self.name}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                f"expected {self.expected}"
            )
        for what, t in (("labels", labels), *((("input_ids", ids),) if ids is not None else ())):
            if not isinstance(t, Tensor) or not is_index(t) or t.dim() != 2:
                raise ValueError(
                    f"{self.name}: received {what} {describe(t)}; expected token numbers [B, T], "
                    f"int64{token_cure(self.name, what, t)}"
                )
        check_masks(self.name, inputs)
        empty = (~(self.targets(labels) != IGNORE_INDEX).any(1)).nonzero()
        if len(empty):
            raise ValueError(
                f"{self.name}: row {int(empty[0])} of the batch has no target token: all of its "
                f"labels that the model predicts are {IGNORE_INDEX}"
            )

    @abstractmethod
    def targets(self, labels: Tensor) -> Tensor:
        """The labels that have a prediction: those that ``predictions`` returns."""

    def counted_places(self, batch: Batch) -> Tensor:
        """The numbers [t] of the predictions that count for some sample."""
        labels = self.targets(self.inputs(batch)["labels"])
        return (labels != IGNORE_INDEX).any(0).nonzero().flatten()

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """f of each sample, [B]."""
        logits, labels = self.predictions(model, weights, buffers, self.inputs(batch))
        return self._by_token(logits, labels).sum(1)

    def token_outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """What each label adds to f, [B, T]; 0 where it does not count."""
        return self._by_token(*self.predictions(model, weights, buffers, self.inputs(batch)))

    def _by_token(self, logits: Tensor, labels: Tensor) -> Tensor:
        margin, mask = token_margins(logits, labels)
        margin = torch.where(mask, margin, 0.0)
        return margin / mask.sum(1, keepdim=True) if self.reduction == "mean" else margin

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """Q: the mean of 1 - p over the target tokens of each sample, [B]."""
        with torch.no_grad():
            logits, labels = self.predictions(model, weights, buffers, self.inputs(batch))
            self._check_logits(logits, labels)
            margin, mask = token_margins(logits, labels)
            return torch.where(mask, torch.sigmoid(-margin), 0.0).sum(1) / mask.sum(1)

    def num_predictions(self, batch: Batch) -> int:
        """The number of labels of a sample."""
        return int(self.targets(self.inputs(batch)["labels"]).shape[1])

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """Those of every target token; with reduction "mean", of their mean log-likelihood."""
        logits, labels = self.predictions(model, weights, buffers, self.inputs(batch))
        if not torch.is_grad_enabled():  # values are looked at, once for each batch
            self._check_logits(logits, labels)
        mask = labels != IGNORE_INDEX
        counts = mask.to(torch.promote_types(logits.dtype, torch.float32))
        if self.reduction == "mean":
            counts = counts / counts.sum(1, keepdim=True)
        return prediction_terms(logits, labels, counts, noise, self.likelihood_temperature)

    def _check_logits(self, logits: Tensor, labels: Tensor) -> None:
        if logits.dim() != 3 or logits.shape[:2] != labels.shape or logits.shape[2] < 2:
            raise ValueError(
                f"{self.name}: the model returned {describe(logits)} for targets "
                f"{list(labels.shape)}; expected logits [B, T, V] with V >= 2"
            )
        bad = ((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= logits.shape[2]))).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"{self.name}: received label {int(labels[row, column])} at row {row} of the "
                f"batch; expected tokens 0..{logits.shape[2] - 1}, or {IGNORE_INDEX} for none"
            )


class CausalLMModelOutput(TokenModelOutput):
    """Next-token prediction (GPT-2, Llama, ...).

    A batch is (input_ids, attention_mask, labels), (input_ids, attention_mask), (input_ids,), or a
    dict of the model's keyword arguments and "labels". The label of position t is predicted from
    the positions before it, so labels are the input_ids, not shifted, with -100 where a token does
    not count (a prompt, padding). Without labels every token counts that the mask doesn't hide, but
    for the first of them.

    Parameters
    ----------
    reduction, likelihood_temperature : as in ``TokenModelOutput``; the temperature is 1.5 by
        default.
    """

    size_power = 0.5
    softens = 1.5  # docs/research/lambda.md, "Softer likelihoods"
    name = "causal_lm"
    expected = (
        "(input_ids, attention_mask, labels), without the last or the last two, or a dict with "
        "input_ids"
    )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments and labels; labels default to the unmasked input_ids."""
        inputs = as_dict(batch, ("input_ids", "attention_mask", "labels"), least=1)
        if "labels" not in inputs and isinstance(inputs.get("input_ids"), Tensor):
            mask = inputs.get("attention_mask")
            ids = as_labels(inputs["input_ids"])
            inputs["labels"] = ids if mask is None else seen_tokens(ids, mask)
        return inputs

    def check_batch(self, batch: Batch) -> None:
        """As of other tasks; and labels that are shifted already, as some training loops and
        BART as a causal model take them, would be shifted once more.
        """
        super().check_batch(batch)
        inputs = self.inputs(batch)
        labels, ids = inputs["labels"], as_labels(inputs.get("input_ids"))
        if ids is None or ids.shape != labels.shape:
            return
        counted = (labels != IGNORE_INDEX)[:, :-1]
        next_ones = ((labels[:, :-1] == ids[:, 1:]) | ~counted).all(1)
        own = ((labels[:, :-1] == ids[:, :-1]) | ~counted).all(1)
        shifted = (next_ones & ~own & (counted.sum(1) >= TELLING)).nonzero()
        if len(shifted):
            raise ValueError(
                f"{self.name}: row {int(shifted[0])} of the batch has as labels the tokens that "
                "come next in input_ids; expected labels that are not shifted, each token at its "
                f"own place: input_ids, with {IGNORE_INDEX} where none counts"
            )

    def targets(self, labels: Tensor) -> Tensor:
        """All but the first, which nothing comes before."""
        return labels[:, 1:]

    def predictions(
        self, model: Any, weights: Params, buffers: Params, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits of positions 0..T-2, and the labels of 1..T-1."""
        labels = inputs.pop("labels")
        output = call(model, weights, buffers, **inputs, **without_cache(model))
        return logits_of(self.name, output)[:, :-1], self.targets(labels)


class Seq2SeqModelOutput(TokenModelOutput):
    """A sequence from a sequence (T5, mT5, BART, ...).

    A batch is (input_ids, attention_mask, labels), or a dict of the model's keyword arguments and
    "labels". The decoder sees the labels shifted by one: "decoder_input_ids" of the dict, or what
    the model makes of the labels by ``prepare_decoder_input_ids_from_labels`` or in its forward.

    Parameters
    ----------
    reduction, likelihood_temperature : as in ``TokenModelOutput``; the temperature is 1 by
        default.
    """

    size_power = -0.125
    name = "seq2seq"

    def targets(self, labels: Tensor) -> Tensor:
        """All."""
        return labels

    def predictions(
        self, model: Any, weights: Params, buffers: Params, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits of all positions of the decoder, and the labels."""
        labels = inputs.pop("labels")
        if "decoder_input_ids" not in inputs:
            shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if shift is not None:
                # FSMT's writes to them.
                inputs["decoder_input_ids"] = shift(labels=labels.clone())
            elif {"decoder_input_ids", "labels"} <= forward_names(model):
                inputs["labels"] = labels  # M2M100's forward shifts them, and NLLB's
            else:
                raise ValueError(
                    f"{self.name}: {type(model).__name__} has no "
                    "prepare_decoder_input_ids_from_labels, and its forward doesn't shift labels; "
                    "expected decoder_input_ids in the batch, or an encoder-decoder (a decoder "
                    "alone goes with task='causal_lm')"
                )
        output = call(model, weights, buffers, **inputs, **without_cache(model))
        return logits_of(self.name, output), labels


class MaskedLMModelOutput(TokenModelOutput):
    """Tokens that are hidden from an encoder (BERT, RoBERTa, ...).

    A batch is (input_ids, attention_mask, labels), or a dict of the model's keyword arguments and
    "labels". The input_ids have tokens hidden; the labels are these tokens at their own positions,
    and -100 everywhere else, as Hugging Face's data collators make them. Hide the same tokens of a
    sample each time: what is hidden belongs to the sample.

    Parameters
    ----------
    reduction, likelihood_temperature : as in ``TokenModelOutput``; the temperature is 1 by
        default.
    """

    size_power = 0.5
    name = "masked_lm"

    def targets(self, labels: Tensor) -> Tensor:
        """All."""
        return labels

    def predictions(
        self, model: Any, weights: Params, buffers: Params, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Logits of all positions, and the labels."""
        labels = inputs.pop("labels")
        return logits_of(self.name, call(model, weights, buffers, **inputs)), labels


class TokenClassificationModelOutput(MaskedLMModelOutput):
    """A class for each token (named entities, parts of speech).

    A batch is that of ``MaskedLMModelOutput``, with nothing hidden. The labels are the classes of
    the tokens, and -100 where a token has none.

    Parameters
    ----------
    reduction, likelihood_temperature : as in ``TokenModelOutput``; the temperature is 2 by
        default.
    """

    name = "token_classification"
    softens = 2.0  # docs/research/lambda.md, "Softer likelihoods"


def token_cure(task: str, what: str, t: Any) -> str:
    """How token numbers [B, T] come from something of another form, or nothing."""
    by_token = task in ("masked_lm", "token_classification")
    if not isinstance(t, Tensor):
        if what == "input_ids":
            return " (a padded tensor, as a tokenizer gives with padding=True, return_tensors='pt')"
        collator = f"DataCollatorFor{'TokenClassification' if by_token else 'Seq2Seq'}"
        return (
            f" (a tensor padded with {IGNORE_INDEX}, as transformers.{collator}(tokenizer) makes "
            "it beside padded input_ids)"
        )
    if t.dtype == torch.bool and t.dim() == 2 and what == "labels":
        # Elsewhere the inputs aren't what is predicted.
        if task == "causal_lm":
            return f" (input_ids.masked_fill(~labels, {IGNORE_INDEX}) where True marks what counts)"
        return " (labels.long() if these are classes)" if task == "token_classification" else ""
    if t.dim() == 3 and t.shape[2] == 1 and is_index(t):
        return f" ({what}.squeeze(2))"
    if t.dim() == 1 and what == "labels":
        return "; class numbers [B] go with task='text_classification'"
    if t.dim() == 2 and t.is_floating_point() and bool((t == t.round()).all()):
        return f" ({what}.long() if these are token numbers)"
    return ""


def token_margins(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins [B, T] of the labels, and which of them count; the others are of token 0."""
    mask = labels != IGNORE_INDEX
    return margins(logits, torch.where(mask, labels, 0)), mask


def seen_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    """The labels of tokens [..., T] that are their own: -100 for those that the mask hides, and for
    the one that only hidden ones come before.
    """
    seen = mask != 0
    first = seen & (seen.cumsum(-1) == 1)
    first[..., :1] = False  # nothing predicts it
    return ids.masked_fill(~seen | first, IGNORE_INDEX)


def as_dict(batch: Batch, names: tuple[str, ...], least: int) -> dict[str, Any]:
    """A copy of the dict of a batch, or its parts by name; empty for anything else."""
    found: dict[str, Any] = {}
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        found = dict(batch[0])
    elif least <= len(batch) <= len(names):
        found = dict(zip(names, batch, strict=False))
    if "labels" in found:
        found["labels"] = as_labels(found["labels"])
    return found


def as_labels(labels: Any) -> Any:
    """Integers as int64; anything else as it is. Against a tensor of 8 or 16 bits, IGNORE_INDEX and
    the number of tokens would count modulo 2^8 or 2^16.
    """
    return labels.long() if is_index(labels) else labels


def without_cache(model: Any) -> dict[str, bool]:
    """``use_cache=False`` for models that would keep keys and values for generation."""
    return {"use_cache": False} if "use_cache" in forward_names(model) else {}


def forward_names(model: Any) -> set[str]:
    """The names of the arguments of a model's forward; peft's wrapper takes those of its model."""
    return set(inspect.signature(base_of(model).forward).parameters)


def base_of(model: Any) -> Any:
    """The model inside peft's wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model
