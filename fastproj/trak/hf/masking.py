"""Tokens hidden from a masked language model: for each sample the same each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.spec import philox4x32_10
from fastproj.trak.tasks.language import IGNORE_INDEX

SHARE = 0.15  # of a sample's tokens, as BERT is trained
SALTS = {"train": 0x48696465, "targets": 0x4D61736B}
WORD = 0xFFFFFFFF


class Masking:
    """Which tokens of a sample are hidden: a function of the seed, its number and their places.

    Parameters
    ----------
    tokenizer : has ``mask_token_id`` and ``all_special_ids``.
    of : "train" | "targets": the two hide other places.
    share : of the tokens that are not special; at least one is hidden.
    seed : 0 <= seed < 2^64.

    Raises
    ------
    ValueError
        For a tokenizer without a mask token.
    """

    def __init__(self, tokenizer: Any, of: str, share: float = SHARE, seed: int = 0) -> None:
        if getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(
                f"HFTRAKer: received tokenizer of class {type(tokenizer).__name__} without a mask "
                "token; expected the tokenizer of a masked language model, or samples with tokens "
                f"hidden in input_ids and labels that are {IGNORE_INDEX} everywhere else"
            )
        self.mask_token = int(tokenizer.mask_token_id)
        self.special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device="cpu")
        self.share = share
        self._key = (seed & WORD) ^ SALTS[of], seed >> 32

    def hide(
        self, index: int, ids: Tensor, never: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """input_ids [T] of sample ``index`` with tokens hidden, and their labels [T].

        never : [T], not 0 where a token is special; None: the tokenizer's special tokens are.
        mask : [T], 0 where the model sees no token; None: it sees all.
        """
        free = ~torch.isin(ids, self.special) if never is None else never == 0
        if mask is not None:
            free &= mask != 0
        places = np.arange(len(ids), dtype=np.uint64)
        words = philox4x32_10((index & WORD, places, index >> 32, 0), self._key)
        draw = torch.from_numpy(words[0].astype(np.int64)).masked_fill(~free, 1 << 32)
        hidden = draw < self.share * 2.0**32
        if bool(free.any()):
            hidden[draw.argmin()] = True
        labels = ids.masked_fill(~hidden, IGNORE_INDEX)
        return ids.masked_fill(hidden, self.mask_token), labels
