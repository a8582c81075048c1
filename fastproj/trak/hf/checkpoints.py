"""The checkpoints that ``HFTRAKer`` is given: by model_id, and none in another's memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.trak.checkpoints import COPIES, storage
from fastproj.trak.hf.folders import Checkpoint

AS_IT_IS = "the model as it is"


def numbered(function: str, checkpoints: Any) -> dict[int, Any]:
    """Checkpoints by model_id."""
    if checkpoints is None:
        return {0: AS_IT_IS}
    if isinstance(checkpoints, str | os.PathLike):
        raise TypeError(
            f"{function}: received checkpoints={str(checkpoints)!r}; expected a list of local "
            f"folders, such as [{str(checkpoints)!r}], or fastproj.trak.hf.checkpoints_in of it"
        )
    if isinstance(checkpoints, Mapping):
        if not all(isinstance(key, int) for key in checkpoints):
            raise TypeError(
                f"{function}: received checkpoints as a dict with the key "
                f"{next(iter(checkpoints), None)!r}; expected a list of checkpoints (a state_dict "
                "goes in as [state_dict]), or a dict whose keys are model_ids"
            )
        found = dict(checkpoints)
    elif not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"{function}: received checkpoints={checkpoints!r:.80}; expected a list of local "
            "folders or state_dicts, a dict of them by model_id, or None for the model as it is"
        )
    else:
        found = dict(enumerate(checkpoints))
    if not found:
        raise ValueError(f"{function}: received no checkpoints; expected at least one")
    return found


def kept_apart(
    function: str, model: nn.Module, checkpoints: Mapping[int, Checkpoint]
) -> dict[int, Checkpoint]:
    """The checkpoints, with copies of the tensors that are the model's own: loading another
    checkpoint into the model would write to them.

    Raises ValueError for two state_dicts whose parameters are the same memory.
    """
    buffers = {name for name, _ in model.named_buffers()}
    seen: dict[Any, int] = {}
    for model_id, checkpoint in checkpoints.items():
        if not isinstance(checkpoint, Mapping):
            continue
        # A base model may be in many: only where all parameters are shared is nothing another.
        parameters = {
            name: place(t)
            for name, t in checkpoint.items()
            if isinstance(t, Tensor) and t.numel() and name not in buffers
        }
        other = seen.setdefault(frozenset(parameters.items()), model_id)
        if parameters and other != model_id:
            raise ValueError(
                f"{function}: received checkpoints {other} and {model_id}, state_dicts whose "
                "parameters are the same memory, so both hold the weights that were written last; "
                f"expected {COPIES}"
            )
    live = {storage(t) for t in chain(model.parameters(), model.buffers())}
    copies: dict[Any, Tensor] = {}  # what several checkpoints share is copied once

    def own(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.numel() or storage(t) not in live:
            return t
        if place(t) not in copies:
            copies[place(t)] = t.detach().clone()
        return copies[place(t)]

    return {
        model_id: {name: own(t) for name, t in checkpoint.items()}
        if isinstance(checkpoint, Mapping)
        else checkpoint
        for model_id, checkpoint in checkpoints.items()
    }


def place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are, and how they are read."""
    read = (t.storage_offset(), t.stride()) if t.layout == torch.strided else ()
    return *storage(t), t.dtype, t.shape, *read
