"""Memory that is not enough: told from other errors, and what would work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Before torch 2.5 it has its older name alone.
OutOfMemoryError: Any = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError

# PyTorch has a class for a GPU's memory alone. These are words of its other errors.
SAID = (
    "can't allocate memory",  # DefaultCPUAllocator
    "not enough memory",  # the same on Windows
    "out of memory",
    "bad_alloc",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. Another way to compute would need more of it."""
    if isinstance(error, (MemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


@contextmanager
def enough_memory() -> Iterator[None]:
    """Within the block gradients of a batch are computed; that memory ran out is said with a cure.

    Raises torch.OutOfMemoryError where PyTorch does, MemoryError for a CPU's.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kind = OutOfMemoryError if isinstance(error, OutOfMemoryError) else MemoryError
        first_line = str(error).strip().partition("\n")[0]
        raise kind(
            "TRAKer: memory ran out while the gradients of a batch were computed; nothing of it "
            "was kept. Expected smaller batches, or shorter samples where the batch is of one "
            f"(docs/gradients.md says what takes memory). PyTorch said: {first_line[:300]}"
        ) from error
