"""Batches as TRAK sees them: tuples, dicts or nests of tensors of one first dimension."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.checks import describe


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nest of tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from leaves(value)
    else:
        array = hasattr(tree, "shape") and hasattr(tree, "dtype")
        content = f"{list(tree.shape)} {tree.dtype}" if array else f"{tree!r:.60}"
        raise TypeError(
            f"received {type(tree).__name__} {content} inside the batch; expected tensors "
            "(torch.as_tensor turns arrays and lists of numbers into one)"
        )


def map_leaves(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """``tree`` with ``function`` applied to each of its tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    return tuple(map_leaves(function, value) for value in tree)


def prepare(function: str, batch: Any, device: torch.device) -> tuple[tuple[Any, ...], int]:
    """``batch`` as a tuple on ``device``, and its size B; a dict becomes a tuple of one dict.

    Raises TypeError or ValueError, naming ``function``, for anything but a sequence or dict of
    tensors (or nests of tensors) whose first dimensions agree.
    """
    if isinstance(batch, Mapping):
        batch = (batch,)
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        received = describe(batch) if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"{function}: received a batch of type {received}; expected a tuple or list such as "
            "(images, labels), or a dict; a single input goes in as (input,)"
        )
    try:
        tensors = list(leaves(batch))
    except TypeError as error:
        raise TypeError(f"{function}: {error}") from None
    if not tensors:
        raise ValueError(f"{function}: received an empty batch; expected at least one tensor")
    for t in tensors:
        if t.layout != torch.strided:
            raise TypeError(
                f"{function}: received a batch with a tensor of layout {t.layout}; expected "
                "dense tensors (to_dense() makes one)"
            )
        if t.dim() == 0 or t.shape[0] != (tensors[0].shape[0] if tensors[0].dim() else -1):
            more = f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""
            raise ValueError(
                f"{function}: received a batch of {', '.join(map(describe, tensors[:4]))}{more}; "
                "expected tensors that share their first dimension, the batch size (a list of "
                "samples becomes that by torch.utils.data.default_collate)"
            )
    return tuple(map_leaves(lambda t: constant(t, device), p) for p in batch), tensors[0].shape[0]


def constant(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``, as what nothing is differentiated by; also one of inference mode."""
    t = t.detach().to(device)
    return t.clone() if t.is_inference() else t


def size(batch: Any) -> int:
    """B, the number of samples of a prepared batch."""
    return int(next(leaves(batch)).shape[0])


def select(batch: Any, rows: Any) -> Any:
    """The samples ``rows`` (a slice, mask or index) of a prepared batch."""
    return map_leaves(lambda t: t[rows], batch)


def content_ids(batch: tuple[Any, ...], batch_size: int) -> npt.NDArray[np.int64]:
    """64 bits of a hash of each sample's bytes, int64 [B]: equal inputs have equal ids."""
    digests = [hashlib.blake2b(digest_size=8) for _ in range(batch_size)]
    for t in leaves(batch):
        kind = f"{t.dtype}{list(t.shape[1:])}".encode()
        for digest, row in zip(digests, byte_rows(t), strict=True):
            digest.update(kind)
            digest.update(row)
    return np.frombuffer(b"".join(d.digest() for d in digests), dtype=np.int64)


def byte_rows(t: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of ``t`` [B, ...], uint8 [B, bytes per sample]."""
    flat = t.detach().cpu().contiguous().reshape(t.shape[0], -1)  # [B, p]
    if flat.shape[1] == 0:
        return np.zeros((t.shape[0], 0), dtype=np.uint8)
    return flat.view(torch.uint8).numpy()
