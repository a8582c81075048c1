"""TRAK for a text classifier: train a tiny BERT on made-up reviews, find what taught it.

    python examples/text_classification.py

Needs transformers, and no network: the model starts from random weights, and words are numbered
here. One word in the training data has the wrong label all through; the reviews that TRAK finds
most harmful to a target with that word are those.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from fastproj import TRAKer

GOOD = ("great", "lovely", "moving", "sharp", "funny")
BAD = ("dull", "awful", "clumsy", "tedious", "flat")
THINGS = ("film", "plot", "cast", "score", "ending", "script")
TEMPLATES = ("the {t} was {w}", "a {w} {t}", "i found the {t} {w}", "what a {w} {t} that was")
MISLABELLED = "funny"
LENGTH = 8

Batch = dict[str, Tensor]


def reviews(n: int, seed: int) -> tuple[list[str], list[int]]:
    """n sentences and whether they are good; those with MISLABELLED are called bad at times."""
    draw = random.Random(seed)
    texts, labels = [], []
    for _ in range(n):
        word = draw.choice(GOOD + BAD)
        texts.append(draw.choice(TEMPLATES).format(t=draw.choice(THINGS), w=word))
        wrong = seed == 0 and word == MISLABELLED and draw.random() < 0.4
        labels.append(int((word in GOOD) != wrong))
    return texts, labels


def tokenize(texts: list[str], labels: list[int]) -> Batch:
    """A Hugging Face batch; token 0 is padding and 1 starts a sentence."""
    every = {word for text in TEMPLATES for word in text.split()} | {*GOOD, *BAD, *THINGS}
    number = {word: i + 2 for i, word in enumerate(sorted(every))}
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in enumerate(texts):
        tokens = [1] + [number[word] for word in text.split()]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    mask = (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def split(data: Batch, size: int) -> list[Batch]:
    """Batches of at most ``size``, in order."""
    n = len(data["labels"])
    return [{k: t[i : i + size] for k, t in data.items()} for i in range(0, n, size)]


def make_model() -> BertForSequenceClassification:
    """About 20,000 parameters."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def train_model(data: Batch, seed: int, epochs: int) -> dict[str, Tensor]:
    """A state dict of a model trained on ``data``."""
    torch.manual_seed(seed)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data["labels"])).split(32):
            loss = model(**{key: t[rows] for key, t in data.items()}).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def main() -> None:
    """Train, featurize, score, print."""
    parser = argparse.ArgumentParser(description="TRAK for a text classifier.")
    parser.add_argument("--out", default=None, help="keep features and scores here")
    parser.add_argument("--train", type=int, default=400, help="training reviews")
    parser.add_argument("--models", type=int, default=3, help="checkpoints to average over")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--proj-dim", type=int, default=256)
    options = parser.parse_args()

    texts, labels = reviews(options.train, seed=0)
    train = tokenize(texts, labels)
    target_texts = [f"the {thing} was {MISLABELLED}" for thing in THINGS]
    targets = tokenize(target_texts, [1] * len(target_texts))
    checkpoints = [train_model(train, seed, options.epochs) for seed in range(options.models)]

    traker = TRAKer(
        model=make_model(),
        task="text_classification",
        train_set_size=len(texts),
        save_dir=options.out or tempfile.mkdtemp(),
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch in split(train, 64):
            traker.featurize(batch, num_samples=len(batch["labels"]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("reviews", checkpoint, model_id, len(target_texts))
        traker.score(targets, num_samples=len(target_texts))
    scores = traker.finalize_scores("reviews")  # [n_train, n_targets]

    print(f"scores {list(scores.shape)}; target: {target_texts[0]!r}, labelled good")
    order = np.argsort(scores[:, 0])
    for title, rows in (("most helpful", order[::-1][:4]), ("most harmful", order[:4])):
        for row in rows:
            name = "good" if labels[row] else "bad"
            print(f"  {title}: {scores[row, 0]:+8.3f}  {texts[row]!r}, labelled {name}")
    wrong = [MISLABELLED in texts[row] and not labels[row] for row in order[:10]]
    print(f"of the 10 most harmful reviews, {sum(wrong)} have the wrong label")


if __name__ == "__main__":
    main()
