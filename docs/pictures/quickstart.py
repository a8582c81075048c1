"""Makes docs/pictures/quickstart.png: what helps and what harms a network on held-out digits.

    python docs/pictures/quickstart.py

Trains ten small CNNs on 1,200 of scikit-learn's digits, scores the others with TRAK, and draws the
three held-out digits that the networks are least sure of beside the training digits with their
highest and lowest scores. Needs `pip install ".[trak]" matplotlib`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fastproj import TRAKer

TRAIN, MODELS, SHOWN, EPOCHS = 1200, 10, 4, 30
HELPS, HARMS = "#1a7f37", "#c62828"


def make_model() -> nn.Module:
    """Two strided convolutions and a linear layer for images [B, 1, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def train(images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """The state dict of a model trained on all images."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.state_dict()


def main() -> None:
    """Train, score, draw."""
    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target[order])
    data, targets = (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:], labels[TRAIN:])
    checkpoints = [train(*data, seed) for seed in range(MODELS)]

    model = make_model()
    with tempfile.TemporaryDirectory() as save_dir:
        traker = TRAKer(model, "image_classification", TRAIN, save_dir, proj_dim=1024)
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id)
            traker.featurize(data, num_samples=TRAIN)
        traker.finalize_features()
        count = len(targets[0])
        for model_id, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint("held_out", checkpoint, model_id, count)
            traker.score(targets, num_samples=count)
        scores = torch.tensor(traker.finalize_scores("held_out"))  # [TRAIN, count]

    right = torch.zeros(count)
    for checkpoint in checkpoints:
        model.load_state_dict(checkpoint)
        with torch.no_grad():
            right += model(targets[0]).softmax(1)[torch.arange(count), targets[1]] / MODELS

    widths = [1.2, 0.25, *[1] * SHOWN, 0.25, *[1] * SHOWN]
    figure, axes = plt.subplots(3, len(widths), figsize=(8, 3.1), width_ratios=widths)
    for row, target in enumerate(right.argsort()[:3].tolist()):
        ranked = scores[:, target].argsort(descending=True).tolist()
        label, p = int(targets[1][target]), float(right[target])
        draw(axes[row, 0], targets, target, f"a {label}: p = {p:.2f}", "black")
        for place in range(SHOWN):
            for column, chosen, colour in (
                (2 + place, ranked[place], HELPS),
                (3 + SHOWN + place, ranked[-1 - place], HARMS),
            ):
                score = f"{data[1][chosen]}: {scores[chosen, target]:+.2f}"
                draw(axes[row, column], data, chosen, score, colour)
        axes[row, 1].axis("off")
        axes[row, 2 + SHOWN].axis("off")
    for x, text, colour in ((0.075, "target", "black"), (0.345, "training digits that help", HELPS),
                            (0.79, "training digits that harm", HARMS)):  # fmt: skip
        figure.text(x, 0.95, text, ha="center", color=colour, weight="bold", size=10)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.84, wspace=0.12, hspace=0.32)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, pil_kwargs={"optimize": True})


def draw(axis: plt.Axes, of: tuple[Tensor, Tensor], index: int, title: str, colour: str) -> None:
    """One digit, dark on light, with a title."""
    axis.imshow(1 - of[0][index, 0], cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, size=8, color=colour, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_color(colour)


if __name__ == "__main__":
    main()
