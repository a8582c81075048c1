"""Models, adapters, tokenizers and checkpoints in local folders. Nothing asks the network."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fastproj.checks import listed
from fastproj.memory import is_out_of_memory
from fastproj.trak.checkpoints import adapter_names, hint
from fastproj.trak.files import parsed_json, read_text
from fastproj.trak.hf.heads import (
    AUTO_CLASSES,
    TABLES,
    check_peft_type,
    has_adapters,
    kind_of,
)
from fastproj.trak.hf.settings import other_adapters, other_settings
from fastproj.trak.tasks.language import base_of

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OF_ONE_TRAINING = (
    "expected checkpoints of one training, and as the model one of their folders, or what "
    "load_model makes of it"
)
PREFIX = "base_model.model."  # of peft's names where a model had its adapters put in directly

logger = logging.getLogger("fastproj.trak")

Checkpoint = str | os.PathLike[str] | Mapping[str, Tensor]


def load_model(
    path: str | os.PathLike[str],
    task: str | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str = "auto",
) -> Any:
    """A transformers model, or one with peft's adapters, from a local folder.

    Parameters
    ----------
    path : a folder that ``save_pretrained`` wrote, such as a checkpoint of a ``Trainer``: a whole
        model, or adapters.
    task : "causal_lm", "seq2seq", "text_classification", "masked_lm" or "token_classification";
        None is what the folder's configuration says.
    base : the folder of the model that adapters belong to; None is where they say, if that is a
        local folder.
    dtype : of the parameters, as ``from_pretrained`` takes it; "auto" is that of the files.

    Returns
    -------
    The model in eval mode. Adapters have ``requires_grad``, and the base model hasn't.

    Raises
    ------
    FileNotFoundError
        Where there is no such folder, or no model in it.
    ValueError
        For a class without a head, weights that lack parameters of the model, or adapters with
        virtual tokens, such as those of prompt tuning.
    """
    folder = local_folder("load_model", path)
    if (folder / ADAPTER_CONFIG).exists():
        return load_adapters(folder, task, base, dtype)
    if base is not None:
        raise ValueError(
            f"load_model: received base={str(base)!r} with {folder}, which holds a whole model; "
            f"expected a folder of adapters ({ADAPTER_CONFIG}), or no base"
        )
    if not (folder / CONFIG).exists():
        raise nothing_in("load_model", folder)
    name = model_class_of(folder, task)
    return from_folder(getattr(transformers, name), folder, dtype).eval()


def load_adapters(
    folder: Path, task: str | None, base: str | os.PathLike[str] | None, dtype: torch.dtype | str
) -> Any:
    """The base model of adapters with the adapters in it."""
    peft = import_peft()
    config = read_config(folder / ADAPTER_CONFIG)
    check_peft_type("load_model", str(folder), config.get("peft_type"))
    if base is None:
        base = base_folder(folder)
        if base is None:
            named = config.get("base_model_name_or_path")
            raise FileNotFoundError(
                f"load_model: the adapters in {folder} belong to {named!r}, which is no folder "
                "here; expected base= (--base on the command line), the local folder of that model"
            )
    model = load_model(base, task or task_of_peft(config.get("task_type")), dtype=dtype)
    try:
        prefixes = config.get("peft_type") == "PREFIX_TUNING"  # peft loads none to be trained
        found = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=not prefixes)
    except Exception as error:
        raise unreadable(folder, "adapters", error) from error
    if prefixes:
        found.prompt_encoder.requires_grad_(True)
    return found.eval()


def base_folder(folder: Path) -> Path | None:
    """The local folder of the model that a folder's adapters name; None where there is none."""
    config = folder / ADAPTER_CONFIG
    named = read_config(config).get("base_model_name_or_path") if config.exists() else None
    return Path(named) if isinstance(named, str) and named and Path(named).is_dir() else None


def task_of_peft(task_type: str | None) -> str | None:
    """The task by peft's name for it."""
    return {
        "CAUSAL_LM": "causal_lm",
        "SEQ_2_SEQ_LM": "seq2seq",
        "SEQ_CLS": "text_classification",
        "TOKEN_CLS": "token_classification",
    }.get(task_type or "")


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, by name, for anything else."""
    config = parsed_json(path, read_text(path))
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a JSON object")
    return config


def model_class_of(folder: Path, task: str | None) -> str:
    """The class that a folder's model has, or the automatic class of a task."""
    if task is not None:
        if task not in AUTO_CLASSES:
            raise ValueError(
                f"load_model: received task={task!r}; expected one of "
                f"{', '.join(map(repr, TABLES))}, or None for what {folder / CONFIG} says"
            )
        return AUTO_CLASSES[task]
    names = read_config(folder / CONFIG).get("architectures") or ["(none)"]
    if kind_of(names[0]) is None or not hasattr(transformers, names[0]):
        raise ValueError(
            f"load_model: {folder / CONFIG} names the class {names[0]}, which is none that this "
            f"transformers can load and that says what it predicts; expected task= (--task) one of "
            f"{', '.join(map(repr, TABLES))}, or a model that you load yourself, for HFTRAKer"
        )
    return str(names[0])


def from_folder(model_class: Any, folder: Path, dtype: Any) -> Any:
    """``from_pretrained`` of a local folder, which must have all of the model's parameters."""
    try:
        model, info = model_class.from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # of transformers, torch, safetensors, tokenizers
        if str(error).startswith("Unrecognized configuration class"):
            raise ValueError(
                f"{folder} holds a model that {model_class.__name__} can't load; expected another "
                "task (--task), or none: the folder says what the model is for"
            ) from None
        raise unreadable(folder, "model", error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        prefixed = hint({}, missing, sorted(info["unexpected_keys"]))  # of torch.compile, or DDP
        raise ValueError(
            f"{folder} lacks {len(missing)} parameters of {type(model).__name__} "
            f"({listed(missing)}), which transformers would fill at random; expected the folder "
            f"of a trained model of that class{prefixed or ' (is this its base, before training?)'}"
        )
    return model


def load_tokenizer(*paths: str | os.PathLike[str]) -> Any:
    """The tokenizer in the first of these local folders that has one.

    Raises
    ------
    FileNotFoundError
        Where none has one.
    """
    folders = [local_folder("load_tokenizer", path) for path in paths]
    for folder in folders:
        if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            try:
                return transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True
                )
            except Exception as error:
                raise unreadable(folder, "tokenizer", error) from error
    raise FileNotFoundError(
        f"load_tokenizer: found no tokenizer in {', '.join(map(str, folders))}; expected a local "
        "folder with tokenizer.json or tokenizer_config.json, as tokenizer.save_pretrained(folder) "
        "writes it"
    )


def unreadable(folder: Path, what: str, error: Exception) -> Exception:
    """The error where another package can't read what is in a folder: of damage, or of memory."""
    if isinstance(error, ModuleNotFoundError) or is_out_of_memory(error):
        return error
    said = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{folder}: no {what} that can be read ({type(error).__name__}: {said:.300})")


def checkpoints_in(path: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, in the order of training.

    Of a ``Trainer``'s output directory these are its ``checkpoint-<step>`` folders; a folder with a
    model or adapters is a checkpoint by itself.

    Raises
    ------
    FileNotFoundError
        For a folder without any.
    """
    folder = local_folder("checkpoints_in", path)
    found = sorted(steps_in(folder).items())
    if found:
        return [checkpoint for _, checkpoint in found]
    if any((folder / name).exists() for name in (CONFIG, ADAPTER_CONFIG)):
        return [folder]
    raise nothing_in("checkpoints_in", folder)


def steps_in(folder: Path) -> dict[int, Path]:
    """The ``checkpoint-<step>`` folders in a folder, by step."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The state_dict of a checkpoint, for ``TRAKer.load_checkpoint(model=model)``.

    checkpoint : a state_dict as it is; or a local folder with a whole model of the same class, or,
        where ``model`` has peft's adapters, with adapters, which are put into the model here. The
        configuration in the folder must make the function that the model computes.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint
    folder = local_folder("HFTRAKer", checkpoint)
    places = adapter_folders(model, folder)
    if places:
        for name, place in places.items():
            put_adapters(model, place, name)
        return model.state_dict()
    if not (folder / CONFIG).exists():
        raise nothing_in("HFTRAKer", folder)
    if has_adapters(model):
        raise ValueError(
            f"HFTRAKer: received the checkpoint {folder}, a whole model, for a model with "
            f"adapters; expected folders of adapters ({ADAPTER_CONFIG}), as its save_pretrained "
            "writes them"
        )
    # The widest: what is narrower in the model is rounded as it is loaded.
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = reduce(torch.promote_types, {d for d in dtypes if d.itemsize > 1} or dtypes)
    base = base_of(model)
    found = from_folder(type(base), folder, dtype)
    other = other_settings(base.config, found.config, type(base).__name__)
    if other:
        raise ValueError(
            f"HFTRAKer: the model in {folder} computes another function than the one that was "
            f"given ({listed(other)}); {OF_ONE_TRAINING}"
        )
    return found.state_dict()


def adapter_folders(model: Any, folder: Path) -> dict[str, Path]:
    """Where a folder has the adapters that a model uses, by their names; empty where it has none.

    peft saves each that is not named "default" in a folder of its name.
    """
    here = (folder / ADAPTER_CONFIG).exists()
    if here and not has_adapters(model):
        raise ValueError(
            f"HFTRAKer: received the checkpoint {folder}, adapters, for a model without any; "
            "expected a model from load_model(folder, base=...) or peft's get_peft_model"
        )
    names = sorted(adapter_names(model)) if has_adapters(model) else []
    places = {
        name: folder / name if (folder / name / ADAPTER_CONFIG).exists() else folder
        for name in names
    }
    found = {name: place for name, place in places.items() if here or place != folder}
    if found and len(set(found.values())) < len(names):
        raise ValueError(
            f"HFTRAKer: received the checkpoint {folder}, which has not all of the adapters that "
            f"the model uses ({listed(names)}); expected a folder that peft's save_pretrained "
            "wrote of all, or a model of which one adapter is active (model.set_adapter)"
        )
    return found


def put_adapters(model: Any, folder: Path, name: str) -> None:
    """Load the adapters in a folder into those of a model that have a name."""
    peft = import_peft()
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise FileNotFoundError(
            f"HFTRAKer: {folder} has no {' or '.join(ADAPTER_WEIGHTS)}; expected adapters as "
            "save_pretrained writes them"
        )
    device = next(model.parameters()).device
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        weights = peft.load_peft_weights(str(folder), device=str(device))
    except Exception as error:
        raise unreadable(folder, "adapters", error) from error
    if not isinstance(model, peft.PeftModel):
        weights = {key.removeprefix(PREFIX): value for key, value in weights.items()}
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name)
    shapes = [key for key in wanted if key in weights and wanted[key].shape != weights[key].shape]
    other = [
        *other_adapters(model.peft_config[name], config),
        *sorted(set(wanted) ^ set(weights)),
        *shapes,
    ]
    if other:
        raise ValueError(
            f"HFTRAKer: the adapters in {folder} are not those of the model (they differ in "
            f"{listed(other)}); {OF_ONE_TRAINING}"
        )
    try:
        peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:  # prefixes are saved without the network that makes them
        raise ValueError(
            f"HFTRAKer: the adapters in {folder} don't go into those of the model "
            f"({' '.join(str(error).split()):.200}); expected a model from load_model(folder, "
            "base=...), in which they do"
        ) from error


def local_folder(function: str, path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path. Raises FileNotFoundError unless it is a folder here."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{function}: received {type(path).__name__}; expected the path of a local folder"
        )
    folder = Path(path).expanduser()
    if str(path) and folder.is_dir():  # Path("") is the working directory
        return folder
    what = "is a file" if folder.is_file() else "is no folder here"
    hub = f" (`hf download {path} --local-dir DIR` makes one of a model on the Hugging Face Hub)"
    like_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path)) and not folder.exists()
    raise FileNotFoundError(
        f"{function}: received {str(path)!r}, which {what}; expected a local folder, as "
        f"save_pretrained writes it{hub if like_hub else ''}"
    )


def nothing_in(function: str, folder: Path) -> FileNotFoundError:
    """The error where a folder holds no model."""
    steps = sorted(steps_in(folder).items())
    cure = (
        f"checkpoints_in({str(folder)!r}), which lists {steps[0][1].name} and others like it"
        if steps
        else f"{CONFIG} or {ADAPTER_CONFIG} and weights in it, as save_pretrained writes them"
    )
    return FileNotFoundError(
        f"{function}: received {str(folder)!r}, which holds no model; expected {cure}"
    )


def import_peft() -> Any:
    """peft, or an error that says how to get it."""
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError(
            "fastproj.trak.hf needs peft for adapters: pip install 'torch-fastproj[hf]'",
            name="peft",
        ) from None
    return peft
