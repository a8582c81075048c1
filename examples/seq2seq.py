"""TRAK for a sequence-to-sequence model: train a tiny mT5 to spell numbers, attribute its answers.

    python examples/seq2seq.py

Needs transformers, and no network. The model learns to read numbers in words ("four hundred six")
and write their digits; the training pairs most helpful for an answer share digits with it in the
same places.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import numpy as np
import torch
from torch import Tensor
from transformers import MT5Config, MT5ForConditionalGeneration

from fastproj import TRAKer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = (*DIGITS, *TENS[2:], "hundred")
IGNORED = -100  # a label that doesn't count
END = 1

Batch = dict[str, Tensor]


def words(number: int) -> list[str]:
    """The words of a number of three digits, of which the second is 0 or at least 2."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    return [
        DIGITS[hundreds],
        "hundred",
        *([TENS[tens]] if tens else []),
        *([DIGITS[ones]] if ones else []),
    ]


def numbers(n: int) -> list[int]:
    """n different numbers that ``words`` can say."""
    possible = [i for i in range(100, 1000) if i // 10 % 10 != 1]
    return random.Random(0).sample(possible, n)


def tokenize(chosen: list[int]) -> Batch:
    """Words in, digits out; token 0 is padding and 1 the end."""
    ids = torch.zeros(len(chosen), 6, dtype=torch.long)
    labels = torch.full((len(chosen), 4), IGNORED)
    for row, number in enumerate(chosen):
        tokens = [WORDS.index(word) + 2 for word in words(number)] + [END]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        digits = [int(digit) + 30 for digit in str(number)] + [END]
        labels[row, : len(digits)] = torch.tensor(digits)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def make_model() -> MT5ForConditionalGeneration:
    """About 60,000 parameters."""
    config = MT5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return MT5ForConditionalGeneration(config)


def train_model(data: Batch, seed: int, epochs: int) -> dict[str, Tensor]:
    """A state dict of a model trained on ``data``."""
    torch.manual_seed(seed)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data["labels"])).split(32):
            loss = model(**{key: t[rows] for key, t in data.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def main() -> None:
    """Train, featurize, score, print."""
    parser = argparse.ArgumentParser(description="TRAK for a sequence-to-sequence model.")
    parser.add_argument("--out", default=None, help="keep features and scores here")
    parser.add_argument("--train", type=int, default=400, help="training pairs")
    parser.add_argument("--targets", type=int, default=20, help="pairs to explain")
    parser.add_argument("--models", type=int, default=2, help="checkpoints to average over")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--proj-dim", type=int, default=256)
    options = parser.parse_args()

    chosen = numbers(options.train + options.targets)
    asked = chosen[options.train :]
    train, targets = tokenize(chosen[: options.train]), tokenize(asked)
    checkpoints = [train_model(train, seed, options.epochs) for seed in range(options.models)]

    traker = TRAKer(
        model=make_model(),
        task="seq2seq",
        train_set_size=options.train,
        save_dir=options.out or tempfile.mkdtemp(),
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for rows in torch.arange(options.train).split(64):
            traker.featurize({k: t[rows] for k, t in train.items()}, num_samples=len(rows))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("numbers", checkpoint, model_id, len(asked))
        traker.score(targets, num_samples=len(asked))
    scores = traker.finalize_scores("numbers")  # [n_train, n_targets]

    print(f"scores {list(scores.shape)}; target: {' '.join(words(asked[0]))!r} -> {asked[0]}")
    for row in np.argsort(-scores[:, 0])[:5]:
        print(f"  most helpful: {scores[row, 0]:+8.3f}  {' '.join(words(chosen[row]))!r}")

    def shared(a: int, b: int) -> int:
        return sum(x == y for x, y in zip(str(a), str(b), strict=True))

    best = scores.argmax(0)
    helpful = np.mean(
        [shared(chosen[row], number) for row, number in zip(best, asked, strict=True)]
    )
    usual = np.mean([shared(a, b) for a in chosen[: options.train] for b in asked])
    print(f"digits shared with the most helpful pair: {helpful:.1f} of 3 ({usual:.1f} by chance)")


if __name__ == "__main__":
    main()
