"""Tasks: what TRAK attributes. Each gives f(z; theta) of a sample, and Q = -dL/df."""

from __future__ import annotations

from fastproj.trak.tasks.base import AbstractModelOutput, BatchedModelOutput, Terms
from fastproj.trak.tasks.clip import CLIPModelOutput
from fastproj.trak.tasks.function import FunctionModelOutput
from fastproj.trak.tasks.image import ImageClassificationModelOutput
from fastproj.trak.tasks.language import (
    CausalLMModelOutput,
    MaskedLMModelOutput,
    Seq2SeqModelOutput,
    TokenClassificationModelOutput,
)
from fastproj.trak.tasks.margin import margins
from fastproj.trak.tasks.names import TASKS, resolve_task
from fastproj.trak.tasks.text import TextClassificationModelOutput
from fastproj.trak.tasks.training import (
    SeveralOutputs,
    TokenOutput,
    TrainingOutput,
    belongs_together,
    has_likelihood,
    learns_along_output,
)

__all__ = [
    "TASKS",
    "AbstractModelOutput",
    "BatchedModelOutput",
    "CLIPModelOutput",
    "CausalLMModelOutput",
    "FunctionModelOutput",
    "ImageClassificationModelOutput",
    "MaskedLMModelOutput",
    "Seq2SeqModelOutput",
    "SeveralOutputs",
    "Terms",
    "TextClassificationModelOutput",
    "TokenClassificationModelOutput",
    "TokenOutput",
    "TrainingOutput",
    "belongs_together",
    "has_likelihood",
    "learns_along_output",
    "margins",
    "resolve_task",
]
