"""TRAK for CLIP: train a tiny one on coloured shapes with captions, attribute how well pairs match.

    python examples/clip.py

Needs transformers, and no network: the images are drawn here. The training pairs most helpful for
a pair are those of the same shape and colour.
"""

from __future__ import annotations

import argparse
import random
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastproj import TRAKer
from fastproj.trak import CLIPModelOutput

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "cross", "stripe")
WORDS = ("a", *COLOURS, *SHAPES)
SIZE = 16
END = 1

Batch = dict[str, Tensor]


def draw(colour: str, shape: str, dice: random.Random) -> Tensor:
    """An image [3, SIZE, SIZE] in 0..1 with some noise."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    y, x, r = rows - dice.randint(5, 10), columns - dice.randint(5, 10), dice.randint(3, 5)
    inside = {
        "square": (y.abs() <= r) & (x.abs() <= r),
        "disc": y**2 + x**2 <= r**2,
        "cross": ((y.abs() <= 1) & (x.abs() <= r)) | ((x.abs() <= 1) & (y.abs() <= r)),
        "stripe": y.abs() <= 1,
    }[shape]
    noise = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(dice.getrandbits(32)))
    return 0.8 * inside * torch.tensor(COLOURS[colour]).view(3, 1, 1) + 0.2 * noise


def pairs(n: int, seed: int) -> tuple[list[str], Batch]:
    """n captions, and the batch of images and token numbers."""
    dice = random.Random(seed)
    captions, images, ids = [], [], []
    for _ in range(n):
        colour, shape = dice.choice(list(COLOURS)), dice.choice(SHAPES)
        captions.append(f"a {colour} {shape}")
        images.append(draw(colour, shape, dice))
        ids.append([2 + WORDS.index(word) for word in captions[-1].split()] + [END])
    return captions, {"input_ids": torch.tensor(ids), "pixel_values": torch.stack(images)}


def make_model() -> CLIPModel:
    """About 50,000 parameters."""
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    text = {"vocab_size": 16, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": END}
    config = CLIPConfig(
        text_config={**shared, **text},
        vision_config={**shared, "image_size": SIZE, "patch_size": 4},
        projection_dim=16,
    )
    return CLIPModel(config)


def train_model(data: Batch, seed: int, epochs: int) -> dict[str, Tensor]:
    """A state dict of a model trained on ``data`` with the contrastive loss."""
    torch.manual_seed(seed)
    model = make_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data["input_ids"])).split(32):
            logits = model(**{key: t[rows] for key, t in data.items()}).logits_per_image
            own = torch.arange(len(rows))
            loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.state_dict()


def main() -> None:
    """Train, featurize, score, print."""
    parser = argparse.ArgumentParser(description="TRAK for CLIP.")
    parser.add_argument("--out", default=None, help="keep features and scores here")
    parser.add_argument("--train", type=int, default=300, help="training pairs")
    parser.add_argument("--targets", type=int, default=20, help="pairs to explain")
    parser.add_argument("--models", type=int, default=2, help="checkpoints to average over")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--proj-dim", type=int, default=256)
    options = parser.parse_args()

    captions, train = pairs(options.train, seed=0)
    target_captions, targets = pairs(options.targets, seed=1)
    checkpoints = [train_model(train, seed, options.epochs) for seed in range(options.models)]
    loader = [
        {key: t[rows] for key, t in train.items()} for rows in torch.arange(len(captions)).split(64)
    ]

    traker = TRAKer(
        model=make_model(),
        task=CLIPModelOutput(simulated_batch_size=100),
        train_set_size=len(captions),
        save_dir=options.out or tempfile.mkdtemp(),
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        traker.task.get_embeddings(traker.model, loader)  # the pairs that f compares with
        for batch in loader:
            traker.featurize(batch, num_samples=len(batch["input_ids"]))
    traker.finalize_features()
    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("pairs", checkpoint, model_id, len(target_captions))
        traker.score(targets, num_samples=len(target_captions))
    scores = traker.finalize_scores("pairs")  # [n_train, n_targets]

    print(f"scores {list(scores.shape)}; target: {target_captions[0]!r}")
    for row in np.argsort(-scores[:, 0])[:5]:
        print(f"  most helpful: {scores[row, 0]:+8.3f}  {captions[row]!r}")
    best = scores.argmax(0)
    same = [captions[row] == caption for row, caption in zip(best, target_captions, strict=True)]
    print(f"the most helpful pair has the target's caption: {np.mean(same):.0%}")


if __name__ == "__main__":
    main()
