"""The precision in which PyTorch multiplies float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products and convolutions without TF32, bf16 or autocast, whatever the caller has
    set. cuDNN's convolutions are in TF32 by default, which rounds to 11 bits.
    """
    backends: Any = torch.backends
    places: list[Any] = []
    if hasattr(backends.mkldnn, "conv"):  # torch >= 2.9, where these have no older setting
        places = [backends.mkldnn.conv, backends.mkldnn.rnn]
    before = None
    try:
        before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        set_older("highest", False)
    except RuntimeError:  # torch's newer settings for each operation, set by the caller
        places += [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        places += [backends.mkldnn.matmul]
    of_places = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for place, precision in zip(places, of_places, strict=True):
            place.fp32_precision = precision
        if before is not None:
            set_older(*before)


def set_older(matmul: str, tf32_of_cudnn: bool) -> None:
    """Set what PyTorch has had since before 2.9."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32_of_cudnn
