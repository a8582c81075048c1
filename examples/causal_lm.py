"""TRAK for a language model: train a tiny GPT-2 on made-up facts, trace a fact to its sentences.

    python examples/causal_lm.py

Needs transformers, and no network. Each fact is said a few times in other words; the sentences
that TRAK finds most helpful for a question should be those that say the fact. The last line says
how often the first of them does: one in ten would be chance, the tiny model gets about six.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastproj import TRAKer

PEOPLE = ("ada", "ben", "cleo", "dan", "eve", "finn", "gail", "hugo", "iris", "jack")
TOWNS = ("oslo", "lima", "cairo", "delhi", "quito", "paris", "tunis", "hanoi")
TEMPLATES = ("{p} lives in {t}", "the home of {p} is {t}", "you find {p} in {t}")
LENGTH = 8
IGNORED = -100  # a label that doesn't count

Batch = tuple[Tensor, Tensor, Tensor]


def facts(n: int) -> tuple[list[str], dict[str, str]]:
    """n sentences about who lives where, and the facts."""
    draw = random.Random(0)
    home = {person: draw.choice(TOWNS) for person in PEOPLE}
    chosen = [draw.choice(PEOPLE) for _ in range(n)]
    return [draw.choice(TEMPLATES).format(p=p, t=home[p]) for p in chosen], home


def tokenize(texts: list[str], last_only: bool = False) -> Batch:
    """(input_ids, attention_mask, labels): all words are predicted, or the last of each text."""
    every = {word for text in TEMPLATES for word in text.split()} | {*PEOPLE, *TOWNS}
    number = {word: i + 2 for i, word in enumerate(sorted(every))}
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens = [1] + [number[word] for word in text.split()]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    mask = (ids > 0).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    if last_only:
        last = torch.arange(LENGTH) == mask.sum(1, keepdim=True) - 1
        labels = labels.masked_fill(~last, IGNORED)
    return ids, mask, labels


def make_model() -> GPT2LMHeadModel:
    """About 30,000 parameters."""
    config = GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=LENGTH,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def train_model(data: Batch, seed: int, epochs: int) -> dict[str, Tensor]:
    """A state dict of a model trained on ``data``."""
    torch.manual_seed(seed)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids, mask, labels = data
    for _ in range(epochs):
        for rows in torch.randperm(len(ids)).split(32):
            loss = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def main() -> None:
    """Train, featurize, score, print."""
    parser = argparse.ArgumentParser(description="TRAK for a language model.")
    parser.add_argument("--out", default=None, help="keep features and scores here")
    parser.add_argument("--train", type=int, default=300, help="training sentences")
    parser.add_argument("--models", type=int, default=3, help="checkpoints to average over")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--proj-dim", type=int, default=256)
    options = parser.parse_args()

    texts, home = facts(options.train)
    train = tokenize(texts)
    questions = [TEMPLATES[0].format(p=person, t=home[person]) for person in PEOPLE]
    targets = tokenize(questions, last_only=True)  # f is about the town alone
    checkpoints = [train_model(train, seed, options.epochs) for seed in range(options.models)]

    traker = TRAKer(
        model=make_model(),
        task="causal_lm",
        train_set_size=len(texts),
        save_dir=options.out or tempfile.mkdtemp(),
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for rows in torch.arange(len(texts)).split(64):
            traker.featurize(tuple(t[rows] for t in train), num_samples=len(rows))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("facts", checkpoint, model_id, len(questions))
        traker.score(targets, num_samples=len(questions))
    scores = traker.finalize_scores("facts")  # [n_train, n_targets]

    print(f"scores {list(scores.shape)}; target: {questions[0]!r}, its last word")
    for row in np.argsort(-scores[:, 0])[:5]:
        print(f"  most helpful: {scores[row, 0]:+8.3f}  {texts[row]!r}")
    best = scores.argmax(0)
    found = [person in texts[row].split() for person, row in zip(PEOPLE, best, strict=True)]
    print(f"the most helpful sentence is about the person asked for in {np.mean(found):.0%}")


if __name__ == "__main__":
    main()
