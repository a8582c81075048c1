"""What a transformers model is for, read off its class, and the task that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fastproj.checks import listed
from fastproj.trak.tasks.base import logits_of
from fastproj.trak.tasks.function import FunctionModelOutput
from fastproj.trak.tasks.language import TokenModelOutput, base_of
from fastproj.trak.tasks.names import TASKS
from fastproj.trak.tasks.text import TextClassificationModelOutput

# The task -> transformers' table of its classes, and how names of other classes end. Where tables
# overlap (BART is among the masked models, too), the first counts.
TABLES = {
    "seq2seq": ("SEQ_TO_SEQ_CAUSAL_LM", ()),
    "text_classification": ("SEQUENCE_CLASSIFICATION", ("ForSequenceClassification",)),
    "token_classification": ("TOKEN_CLASSIFICATION", ("ForTokenClassification",)),
    "causal_lm": ("CAUSAL_LM", ("ForCausalLM", "LMHeadModel")),
    "masked_lm": ("MASKED_LM", ("ForMaskedLM",)),
}
AUTO_CLASSES = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "text_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
}
VIRTUAL_TOKENS = ("CPT", "MULTITASK_PROMPT_TUNING", "PROMPT_TUNING", "P_TUNING")  # peft's types
AMBIGUOUS = (
    "FlaubertWithLMHeadModel",  # masked, causal and translating
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",  # sees all tokens, or what perm_mask shows, and predicts each at its place
)


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into the model."""
    return getattr(model, "peft_config", None) is not None or bool(
        getattr(model, "_hf_peft_config_loaded", False)
    )


def check_adapters(function: str, model: nn.Module) -> None:
    """Raise ValueError for adapters that ``check_peft_type`` refuses, and for merged ones: these
    have no gradient, and loading others leaves the weights that hold them as they are.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        check_peft_type(function, "a model", getattr(config, "peft_type", None))
    modules = model.named_modules()
    merged = [name for name, module in modules if getattr(module, "merged_adapters", None)]
    if merged:
        raise ValueError(
            f"{function}: received a model with adapters that are merged into its weights "
            f"({listed(merged)}); expected them apart (model.unmerge_adapter() of peft)"
        )


def check_peft_type(function: str, holder: str, peft_type: Any) -> None:
    """Raise ValueError for adapters that put tokens of their own before those of a sample: the
    model's outputs are then of other positions than the labels.

    holder : what has them, for the message.
    """
    name = getattr(peft_type, "value", peft_type)
    if name in VIRTUAL_TOKENS:
        raise ValueError(
            f"{function}: received {holder} with adapters of peft's type {name}, which put virtual "
            "tokens before those of a sample; expected adapters without any, such as LoRA's, or "
            "prefix tuning, whose prefixes are no tokens"
        )


def kind_of(name: str) -> str | None:
    """The task of a model class by its name; None where the name doesn't say."""
    if name in AMBIGUOUS:
        return None
    for task, (table, _) in TABLES.items():
        if name in classes_of(table):
            return task
    for task, (_, endings) in TABLES.items():
        if name.endswith(endings):
            return task
    return None


@cache
def classes_of(table: str) -> frozenset[str]:
    """The names of the classes in one of transformers' tables."""
    values = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
    return frozenset(name for v in values for name in ((v,) if isinstance(v, str) else v))


def kind_of_model(function: str, model: nn.Module) -> str:
    """The task that the model's class is for. Raises ValueError where the class doesn't say."""
    base = base_of(model)
    kind = kind_of(type(base).__name__)
    if kind is None:
        heads = ", ".join(AUTO_CLASSES.values())
        raise ValueError(
            f"{function}: received a model of class {type(base).__name__}, which doesn't say what "
            f"it predicts; expected one with a head, as {heads} load it, or task= one of "
            f"{', '.join(map(repr, TABLES))}, or a task of your own with labels as it takes them"
        )
    if kind == "seq2seq" and not base.config.is_encoder_decoder:
        return "causal_lm"  # transformers' table has decoders that listen, too, such as Voxtral
    return kind


def kind_of_task(task: Any) -> str | None:
    """The task by name whose samples ``task`` takes; None for one of the user's own."""
    if isinstance(task, str):
        return task if task in TASKS else None
    ours = isinstance(task, TokenModelOutput | TextClassificationModelOutput)
    if not ours or getattr(task, "multilabel", False):  # of which a sample has several labels
        return None
    return task.name if task.name in TASKS else None


def task_for(function: str, model: nn.Module, kind: str) -> Any:
    """What ``TRAKer(task=...)`` takes for a model of this kind."""
    if kind != "text_classification":
        return kind
    config = base_of(model).config
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(
            f"{function}: received a model with problem_type={problem!r}, where a sample may have "
            "several labels or none; expected one class a sample, or task= a function of "
            "(model, batch) that returns one output for each sample, such as the log-odds of the "
            "label that is asked about"
        )
    if problem == "regression" and config.num_labels != 1:
        raise ValueError(
            f"{function}: received a model that predicts {config.num_labels} numbers for each "
            "sample; expected one, or task= a function of (model, batch) that returns one output "
            "for each sample"
        )
    if problem == "regression" or config.num_labels == 1:
        return FunctionModelOutput(predicted_number, likelihood=gaussian)
    return kind


def is_regression(task: Any) -> bool:
    """Whether labels are numbers to predict, not classes."""
    return isinstance(task, FunctionModelOutput) and task.output is predicted_number


def predicted_number(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """What a regression model predicts, [B]; its squared error is the loss."""
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    return logits_of("regression", model(**inputs)).squeeze(-1)


def gaussian(output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-likelihood of numbers with variance 1, [B]: minus half the squared error."""
    return -0.5 * (batch["labels"] - output) ** 2
