"""The tasks by name, and what else ``TRAKer(task=...)`` takes."""

from __future__ import annotations

from typing import Any

from fastproj.trak.tasks.base import AbstractModelOutput
from fastproj.trak.tasks.clip import CLIPModelOutput
from fastproj.trak.tasks.function import FunctionModelOutput
from fastproj.trak.tasks.image import ImageClassificationModelOutput
from fastproj.trak.tasks.language import (
    CausalLMModelOutput,
    MaskedLMModelOutput,
    Seq2SeqModelOutput,
    TokenClassificationModelOutput,
)
from fastproj.trak.tasks.text import TextClassificationModelOutput

TASKS: dict[str, type[AbstractModelOutput]] = {
    "image_classification": ImageClassificationModelOutput,
    "iterative_image_classification": ImageClassificationModelOutput,  # TRAK's name for its loop
    "clip": CLIPModelOutput,
    "text_classification": TextClassificationModelOutput,
    "seq2seq": Seq2SeqModelOutput,
    "causal_lm": CausalLMModelOutput,
    "masked_lm": MaskedLMModelOutput,
    "token_classification": TokenClassificationModelOutput,
}
METHODS = ("get_output", "get_out_to_loss_grad")


def resolve_task(task: Any) -> Any:
    """The task that ``task`` names or is: a name of TASKS, a class, an instance, or a function.

    Anything with ``get_output`` and ``get_out_to_loss_grad`` will do, so a subclass of
    ``trak.modelout_functions.AbstractModelOutput`` works as it is.
    """
    expected = (
        f"expected one of {', '.join(TASKS)}, an instance of a "
        "fastproj.trak.AbstractModelOutput subclass, or a function of (model, batch)"
    )
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(f"TRAKer: received task={task!r}; {expected}")
        return TASKS[task]()
    missing = [name for name in METHODS if not hasattr(task, name)]
    if not missing:
        return task() if isinstance(task, type) else task
    if callable(task) and not isinstance(task, type) and len(missing) == len(METHODS):
        return FunctionModelOutput(task)
    raise TypeError(
        f"TRAKer: received task={task!r:.80} without {' and '.join(missing)}; {expected}"
    )
