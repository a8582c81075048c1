"""One call as one value: ``ops`` builds it after its checks, and it travels whole to a backend.

This module also numbers dtypes, kinds and precisions for compiled code. These numbers stand here
and in csrc/call.hpp, nowhere else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastproj.spec import KINDS, MatrixKey

DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
}
KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
# How many 16-bit terms a float32 value is multiplied as.
TERMS = {"highest": 3, "high": 2, "medium": 1}


class Call(NamedTuple):
    """Which rows of which matrix, and how the result is made. The strings have been checked.

    key : the matrix.
    row_offset : the row of R that the first column of G meets.
    scale : what the product is multiplied by.
    accumulate : add to the output instead of overwriting it.
    precision : a key of TERMS; "" (torch's own setting) never reaches a backend.
    """

    key: MatrixKey
    row_offset: int = 0
    scale: float = 1.0
    accumulate: bool = False
    precision: str = "highest"

    def numbers(self) -> dict[str, float]:
        """The fields of ``Call`` in csrc/call.hpp, by name."""
        key = self.key
        return {
            "kind": KIND_NUMBERS[key.kind],
            "seed": key.seed,
            "stream": key.stream,
            "block_log2": key.block.bit_length() - 1 if key.block else 0,
            "row_offset": self.row_offset,
            "scale": self.scale,
            "accumulate": self.accumulate,
            "terms": TERMS[self.precision],
        }


def view(t: Tensor) -> tuple[int, ...]:
    """A 2-D tensor as the fields of ``View`` in csrc/call.hpp, in order.

    Raises ValueError for one whose storage was resized to nothing, as FSDP does, on which kernels
    would end the process.
    """
    data = t.data_ptr()
    if data == t.storage_offset() * t.element_size() and t.numel() > 0:  # it begins at address 0
        raise ValueError(
            f"received a tensor {list(t.shape)} whose storage is empty (resized to 0, as FSDP does "
            "with parameters not in use); expected one with memory"
        )
    return (data, DTYPES[t.dtype], *t.shape, *t.stride())


def terms_of(dtype: torch.dtype, precision: str) -> int:
    """How many 16-bit terms one value of ``dtype`` is multiplied as."""
    return TERMS[precision] if dtype is torch.float32 else 1
