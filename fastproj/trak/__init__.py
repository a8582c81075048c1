"""TRAK on top of the projection: attribution of model outputs to training samples."""

from __future__ import annotations

try:
    from fastproj.trak.distributed import DistributedError
    from fastproj.trak.draws import Fisher
    from fastproj.trak.estimator import TRAKer
    from fastproj.trak.evaluation.metrics import (
        AUC,
        LDS,
        LOO,
        Brittleness,
        brittleness,
        lds,
        loo_correlation,
        mislabel_auc,
        most_helpful,
        noise_ceiling,
    )
    from fastproj.trak.evaluation.report import Page, write_report
    from fastproj.trak.evaluation.retrain import (
        GroundTruth,
        TrainingError,
        all_but,
        random_subsets,
        train_subsets,
    )
    from fastproj.trak.files import StoreCorruptError, StoreError, StoreMismatchError
    from fastproj.trak.gradients import (
        AbstractGradientComputer,
        FuncError,
        FunctionalGradientComputer,
        HookGradientComputer,
        HooksError,
        IterativeGradientComputer,
    )
    from fastproj.trak.mixing import OtherDataWarning
    from fastproj.trak.saver import Saver
    from fastproj.trak.solving.solve import ScoreComputer, SingularXtXWarning
    from fastproj.trak.store.scores import TopScores, load_scores, read_scores, read_top_scores
    from fastproj.trak.store.store import NotReadyError, Store
    from fastproj.trak.tasks import (
        AbstractModelOutput,
        BatchedModelOutput,
        CausalLMModelOutput,
        CLIPModelOutput,
        FunctionModelOutput,
        ImageClassificationModelOutput,
        MaskedLMModelOutput,
        Seq2SeqModelOutput,
        TextClassificationModelOutput,
        TokenClassificationModelOutput,
    )
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing not in ("safetensors", "tqdm"):
        raise
    raise ModuleNotFoundError(
        f"fastproj.trak needs {missing}: pip install 'torch-fastproj[trak]'", name=missing
    ) from error

__all__ = [
    "AUC",
    "LDS",
    "LOO",
    "AbstractGradientComputer",
    "AbstractModelOutput",
    "BatchedModelOutput",
    "Brittleness",
    "CLIPModelOutput",
    "CausalLMModelOutput",
    "DistributedError",
    "Fisher",
    "FuncError",
    "FunctionModelOutput",
    "FunctionalGradientComputer",
    "GroundTruth",
    "HookGradientComputer",
    "HooksError",
    "ImageClassificationModelOutput",
    "IterativeGradientComputer",
    "MaskedLMModelOutput",
    "NotReadyError",
    "OtherDataWarning",
    "Page",
    "Saver",
    "ScoreComputer",
    "Seq2SeqModelOutput",
    "SingularXtXWarning",
    "Store",
    "StoreCorruptError",
    "StoreError",
    "StoreMismatchError",
    "TRAKer",
    "TextClassificationModelOutput",
    "TokenClassificationModelOutput",
    "TopScores",
    "TrainingError",
    "all_but",
    "brittleness",
    "lds",
    "load_scores",
    "loo_correlation",
    "mislabel_auc",
    "most_helpful",
    "noise_ceiling",
    "random_subsets",
    "read_scores",
    "read_top_scores",
    "train_subsets",
    "write_report",
]
