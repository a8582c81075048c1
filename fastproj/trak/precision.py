"""The precision in which PyTorch multiplies float32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Users:
    """Who needs full precision now. PyTorch's settings are those of all threads: the first user
    changes them, and the last sets them again.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.count = 0
        self.set_again: Callable[[], None]

    def enter(self) -> None:
        with self.lock:
            if self.count == 0:
                self.set_again = set_full_precision()
            self.count += 1

    def leave(self) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.set_again()


USERS = Users()


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products and convolutions without TF32, bf16 or autocast, whatever the caller has
    set. cuDNN's convolutions are in TF32 by default, which rounds to 11 bits.
    """
    USERS.enter()
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        USERS.leave()


def set_full_precision() -> Callable[[], None]:
    """Returns what sets everything as it was."""
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

    def set_again() -> None:
        for place, precision in zip(places, of_places, strict=True):
            place.fp32_precision = precision
        if before is not None:
            set_older(*before)

    return set_again


def set_older(matmul: str, tf32_of_cudnn: bool) -> None:
    """Set what PyTorch has had since before 2.9."""
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = tf32_of_cudnn
