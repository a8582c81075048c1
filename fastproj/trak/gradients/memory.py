"""Memory that runs out while gradients are computed: what would work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastproj.memory import is_out_of_memory


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
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        kind = torch.OutOfMemoryError if on_gpu else MemoryError
        first_line = str(error).strip().partition("\n")[0]
        raise kind(
            "TRAKer: memory ran out while the gradients of a batch were computed; nothing of it "
            "was kept. Expected smaller batches, or shorter samples where the batch is of one "
            f"(docs/gradients.md says what takes memory). PyTorch said: {first_line[:300]}"
        ) from error
