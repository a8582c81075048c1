"""Memory that is not enough, told from other errors."""

from __future__ import annotations

import torch

# PyTorch has a class for a GPU's memory alone. These are words of its other errors.
SAID = (
    "allocate memory",  # "can't", DefaultCPUAllocator; "Cannot", the system
    "not enough memory",  # the same on Windows
    "out of memory",
    "bad_alloc",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "size calculation overflowed",  # a tensor of more bytes than there are addresses
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. Another way to compute would need more of it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
