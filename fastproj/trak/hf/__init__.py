"""TRAK for Hugging Face: from a transformers model and a tokenised dataset to scores."""

from __future__ import annotations

try:
    from fastproj.trak.hf.callback import TRAKCallback
    from fastproj.trak.hf.folders import checkpoints_in, load_model, load_tokenizer
    from fastproj.trak.hf.reading import read_samples
    from fastproj.trak.hf.texts import tokenize
    from fastproj.trak.hf.traker import HFTRAKer
except ModuleNotFoundError as error:
    missing = (error.name or "").partition(".")[0]
    if missing != "transformers":
        raise
    raise ModuleNotFoundError(
        f"fastproj.trak.hf needs {missing}: pip install 'torch-fastproj[hf]'", name=missing
    ) from error

__all__ = [
    "HFTRAKer",
    "TRAKCallback",
    "checkpoints_in",
    "load_model",
    "load_tokenizer",
    "read_samples",
    "tokenize",
]
