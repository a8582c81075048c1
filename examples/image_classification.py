"""TRAK for an image classifier: train a small ResNet, attribute its outputs, write a page.

    python examples/image_classification.py

The data are scikit-learn's digits; for your own, replace `load_data` and `SmallResNet`. Stop it at
any time: the checkpoints and features are in --out, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from fastproj import TRAKer
from fastproj.trak.evaluation.report import Page, write_report


def load_data(train: int) -> tuple[TensorDataset, TensorDataset]:
    """Training digits, and the rest to explain: images [n, 1, 8, 8] in 0..1 and labels [n]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target[order])
    return TensorDataset(images[:train], labels[:train]), TensorDataset(
        images[train:], labels[train:]
    )


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Two residual blocks; about 76,000 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 32, 1), Block(32, 64, 2))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def train_model(data: TensorDataset, seed: int, epochs: int, device: str) -> dict[str, Tensor]:
    """A state dict of a model trained on ``data``."""
    torch.manual_seed(seed)
    model = SmallResNet().to(device).train()
    loader = DataLoader(data, batch_size=min(64, len(data)), shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=max(1, epochs * len(loader))
    )
    for _ in tqdm(range(epochs), desc=f"training model {seed}", leave=False):
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: t.cpu() for name, t in model.state_dict().items()}


def main() -> None:
    """Train, featurize, score, report."""
    parser = argparse.ArgumentParser(description="TRAK for an image classifier.")
    parser.add_argument("--out", type=Path, default=Path("fastproj-demo-images"))
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--targets", type=int, default=60, help="images to explain")
    parser.add_argument("--models", type=int, default=3, help="checkpoints to average over")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--proj-dim", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    train, held_out = load_data(options.train)
    targets = TensorDataset(*held_out[: options.targets])
    train_loader = DataLoader(train, batch_size=128)  # in order: no shuffling here
    target_loader = DataLoader(targets, batch_size=128)

    options.out.mkdir(parents=True, exist_ok=True)
    checkpoints = []
    for seed in range(options.models):
        path = options.out / f"model-{seed}-{options.epochs}-{options.train}.pt"
        if not path.exists():
            unfinished = path.with_suffix(".tmp")
            torch.save(train_model(train, seed, options.epochs, options.device), unfinished)
            unfinished.replace(path)
        checkpoints.append(torch.load(path, weights_only=True))

    # From here on, everything is as with trak.TRAKer.
    traker = TRAKer(
        model=SmallResNet().to(options.device),
        task="image_classification",
        train_set_size=len(train),
        save_dir=options.out / f"trak-{options.train}-{options.epochs}-{options.proj_dim}",
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for batch in tqdm(train_loader, desc=f"featurizing under model {model_id}", leave=False):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()

    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint(
            "held_out", checkpoint, model_id=model_id, num_targets=len(targets)
        )
        for batch in target_loader:
            traker.score(batch=batch, num_samples=len(batch[0]))
    scores = traker.finalize_scores("held_out")  # [n_train, n_targets]

    train_images, train_labels = train.tensors
    target_images, target_labels = targets.tensors
    same = (train_labels[scores.argmax(0)] == target_labels).float().mean()
    print(f"scores {list(scores.shape)}; the most helpful image has the target's label: {same:.0%}")
    page = Page(
        title="TRAK for an image classifier",
        scores=scores,
        targets=range(min(12, len(targets))),
        train_images=1 - train_images.numpy(),
        target_images=1 - target_images.numpy(),
        train_labels=train_labels.tolist(),
        target_labels=target_labels.tolist(),
        facts={name: value for name, value in vars(options).items() if name != "out"},
    )
    print(f"report: {write_report(options.out / 'report.html', page)}")


if __name__ == "__main__":
    main()
