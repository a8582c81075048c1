"""TRAK on top of the projection: attribution of model outputs to training samples."""

from __future__ import annotations

try:
    from fastproj.trak.estimator import TRAKer
    from fastproj.trak.files import StoreCorruptError, StoreError
    from fastproj.trak.gradients import (
        AbstractGradientComputer,
        FunctionalGradientComputer,
        HookGradientComputer,
        HooksError,
        IterativeGradientComputer,
    )
    from fastproj.trak.metrics import LDS, lds, noise_ceiling
    from fastproj.trak.solve import ScoreComputer, SingularXtXWarning
    from fastproj.trak.store import NotReadyError, Store, StoreMismatchError
    from fastproj.trak.tasks import (
        AbstractModelOutput,
        BatchedModelOutput,
        CausalLMModelOutput,
        CLIPModelOutput,
        FunctionModelOutput,
        ImageClassificationModelOutput,
        Seq2SeqModelOutput,
        TextClassificationModelOutput,
    )
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("safetensors", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f"fastproj.trak needs {missing}: pip install 'fastproj[trak]'", name=missing
    ) from error

__all__ = [
    "LDS",
    "AbstractGradientComputer",
    "AbstractModelOutput",
    "BatchedModelOutput",
    "CLIPModelOutput",
    "CausalLMModelOutput",
    "FunctionModelOutput",
    "FunctionalGradientComputer",
    "HookGradientComputer",
    "HooksError",
    "ImageClassificationModelOutput",
    "IterativeGradientComputer",
    "NotReadyError",
    "ScoreComputer",
    "Seq2SeqModelOutput",
    "SingularXtXWarning",
    "Store",
    "StoreCorruptError",
    "StoreError",
    "StoreMismatchError",
    "TRAKer",
    "TextClassificationModelOutput",
    "lds",
    "noise_ceiling",
]
