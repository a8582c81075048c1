"""Compiled models, run as they were written."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def eagerly() -> AbstractContextManager[Any]:
    """Within the block, what ``torch.compile`` made runs without its compiled code.

    Compiling again for hooks, for ``torch.func`` and for each batch size would take minutes. Before
    torch 2.6 nothing is switched off.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = set_stance("force_eager")
    return stance
