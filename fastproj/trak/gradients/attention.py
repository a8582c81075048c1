"""Attention that can be differentiated sample by sample."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fastproj.trak.gradients.running import vectorised


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Within the block, PyTorch's encoder layers call their submodules in eval mode too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Within the block, attention is made of matmuls and softmax, and masks are always made.

    ``torch.func.vmap`` has no rule for fused kernels, and can't follow Hugging Face models where
    they look at the values of a mask to leave it out if it hides nothing.
    """
    configs = {id(c): c for m in model.modules() for c in [attention_config(m)] if c is not None}
    before = {key: config._attn_implementation for key, config in configs.items()}
    masks = getattr(
        sys.modules.get("transformers.masking_utils"), "ALL_MASK_ATTENTION_FUNCTIONS", {}
    )
    usual = masks.get("eager")
    with no_fast_path(), vectorised(model):
        try:
            for config in configs.values():
                config._attn_implementation = "eager"
            if configs and usual is not None:
                masks["eager"] = partial(whole_mask, usual)
            yield
        finally:
            if configs and usual is not None:
                del masks["eager"]
            for key, config in configs.items():
                config._attn_implementation = before[key]


def whole_mask(make: Any, *args: Any, **options: Any) -> Any:
    """The mask of transformers' ``eager``, also where it would hide nothing."""
    return make(*args, **{**options, "allow_is_bidirectional_skip": False})


def attention_config(module: nn.Module) -> Any:
    """The Hugging Face configuration of a module that says how it attends, or None."""
    config = getattr(module, "config", None)
    return config if isinstance(getattr(config, "_attn_implementation", None), str) else None
