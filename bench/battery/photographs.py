"""Patches of photographs that scikit-learn and matplotlib ship: what, where and beside what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.battery.models import CNN, MLP, Sides
from bench.battery.problem import Labels, Pairs, Problem, Regression, separate
from fastproj.testbed.ensembles import Training


@cache
def sample_images() -> list[Any]:
    """scikit-learn's two photographs, uint8 [427, 640, 3]."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


@cache
def grey_images() -> list[Any]:
    """The same two, float64 [427, 640] in 0..1."""
    return [image.mean(2) / 255.0 for image in sample_images()]


@cache
def portrait_image() -> Any:
    """matplotlib's portrait of Grace Hopper, uint8 [600, 512, 3]."""
    from matplotlib import get_data_path
    from PIL import Image

    with Image.open(f"{get_data_path()}/sample_data/grace_hopper.jpg") as picture:
        return np.asarray(picture.convert("RGB"))


def photos(n: int = 800, targets: int = 100) -> Problem:
    """Which of 8 regions of scikit-learn's two photographs a 24 x 24 patch is from.

    10 % of the labels are wrong, and training stops early.
    """
    rng = np.random.default_rng(0)
    pictures = grey_images()
    images, labels = [], []
    for number in range(n + targets):
        label = number % 8
        picture, column = pictures[label // 4], label % 4
        y, x = int(rng.integers(0, 427 - 24)), int(rng.integers(160 * column, 160 * column + 136))
        images.append(picture[y : y + 24, x : x + 24])
        labels.append(label)
    # By NumPy, whose sums don't depend on the number of threads: the fingerprint must not.
    stacked = np.stack(images)
    stacked = (stacked - stacked.mean()) / stacked.std()
    x_all = torch.tensor(stacked, dtype=torch.float32).unsqueeze(1)
    samples, asked = separate(x_all, torch.tensor(labels), n, targets, 0)
    training = Training(epochs=12, batch=40, learning_rate=0.05, weight_decay=1e-3, clip=2.0)
    problem = Problem("photos", samples, asked, lambda: CNN(24, 8), training, held_out=True)
    return problem.with_wrong_labels(0.1, 8)


def pixels(n: int = 600, targets: int = 100) -> Problem:
    """How bright the middle of 9 x 9 pixels of the photographs is, without its 5 x 5 neighbours."""
    rng = np.random.default_rng(1)
    pictures = grey_images()
    around = np.ones((9, 9), np.bool_)
    around[2:7, 2:7] = False
    x, y = [], []
    for number in range(n + targets):
        row, column = int(rng.integers(0, 427 - 9)), int(rng.integers(0, 640 - 9))
        patch = pictures[number % 2][row : row + 9, column : column + 9]
        x.append(patch[around])
        y.append(patch[4, 4])
    x_all, y_all = np.stack(x), np.array(y)
    x_all = (x_all - x_all.mean()) / x_all.std()
    y_all = (y_all - y_all.mean()) / y_all.std()
    samples, asked = separate(
        torch.tensor(x_all, dtype=torch.float32),
        torch.tensor(y_all, dtype=torch.float32),
        n,
        targets,
        0,
    )
    training = Training(epochs=30, batch=40, learning_rate=0.02, weight_decay=1e-3, clip=5.0)
    return Problem(
        "pixels", samples, asked, lambda: MLP(56, 32, 1), training, Regression(), held_out=True
    )


def neighbours(n: int = 800, targets: int = 100) -> Problem:
    """Which of the 8 x 8 pixels around 8 x 8 of the photographs are brighter than these."""
    rng = np.random.default_rng(9)
    pictures = grey_images()
    inner, brighter = [], []
    for number in range(n + targets):
        y, x = int(rng.integers(0, 427 - 24)), int(rng.integers(0, 640 - 24))
        patch = pictures[number % 2][y : y + 24, x : x + 24]
        means = patch.reshape(3, 8, 3, 8).mean((1, 3)).reshape(9)
        inner.append(patch[8:16, 8:16])
        brighter.append(np.delete(means > means[4], 4))
    stacked = np.stack(inner)[:, None]
    images = torch.tensor((stacked - stacked.mean()) / stacked.std(), dtype=torch.float32)
    samples, asked = separate(images, torch.tensor(np.stack(brighter)).long(), n, targets, 0)
    training = Training(epochs=40, batch=40, learning_rate=0.5, weight_decay=1e-4)
    return Problem(
        "neighbours", samples, asked, lambda: CNN(8, 8), training, Labels(), held_out=True
    )


def sides(n: int = 800, targets: int = 100) -> Problem:
    """Which right half belongs to the left one of 16 x 16 pixels of the photographs."""
    rng = np.random.default_rng(5)
    pictures = grey_images()
    patches = []
    for number in range(n + targets):
        y, x = int(rng.integers(0, 427 - 16)), int(rng.integers(0, 640 - 16))
        patches.append(pictures[number % 2][y : y + 16, x : x + 16])
    stacked = np.stack(patches)
    stacked = (stacked - stacked.mean()) / stacked.std()
    left, right = (
        torch.tensor(half.reshape(n + targets, -1), dtype=torch.float32)
        for half in (stacked[:, :, :8], stacked[:, :, 8:])
    )
    samples = (left[:n], right[:n])
    return Problem(
        "sides",
        samples,
        (left[n:], right[n:]),
        lambda: Sides(128),
        Training(epochs=30, batch=80, learning_rate=0.05, weight_decay=1e-3, clip=1.0),
        Pairs(samples, 200),
        held_out=True,
        retrainings=3,
    )


def portrait(n: int = 800, targets: int = 100) -> Problem:
    """Which of 8 regions of the portrait a patch of 16 x 16 pixels in colour is from.

    10 % of the labels are wrong, and training stops where half of the right ones are fitted.
    """
    images, labels = patches_of_regions([portrait_image()], (4, 2), 16, n + targets, 11)
    samples, asked = separate(images, labels, n, targets, 0)
    training = Training(epochs=10, batch=40, learning_rate=0.05, weight_decay=1e-3, clip=2.0)
    problem = Problem("portrait", samples, asked, lambda: CNN(16, 8, colours=3), training)
    return problem.with_wrong_labels(0.1, 8)


def regions(n: int = 800, targets: int = 100) -> Problem:
    """Which of 32 regions of the two photographs, at half size, a 16 x 16 patch in colour is from.

    Training goes on until nearly all is fitted.
    """
    pictures = [picture[::2, ::2] for picture in sample_images()]
    images, labels = patches_of_regions(pictures, (4, 4), 16, n + targets, 12)
    samples, asked = separate(images, labels, n, targets, 0)
    training = Training(epochs=60, batch=40, learning_rate=0.1, weight_decay=1e-3, clip=2.0)
    return Problem("regions", samples, asked, lambda: CNN(16, 32, colours=3), training)


def patches_of_regions(
    pictures: Sequence[Any], grid: tuple[int, int], side: int, count: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Patches [count, 3, side, side], standardised, and the region [count] that each is from.

    Regions are rows and columns of pictures: ``grid`` says how many. Each has as many patches.
    """
    rng = np.random.default_rng(seed)
    rows, columns = grid
    found, labels = [], []
    for number in range(count):
        label = number % (len(pictures) * rows * columns)
        picture = pictures[label // (rows * columns)]
        row, column = divmod(label % (rows * columns), columns)
        height, width = picture.shape[0] // rows, picture.shape[1] // columns
        y = row * height + int(rng.integers(0, height - side))
        x = column * width + int(rng.integers(0, width - side))
        found.append(picture[y : y + side, x : x + side].transpose(2, 0, 1))
        labels.append(label)
    stacked = np.stack(found)  # by NumPy: see photos
    stacked = (stacked - stacked.mean()) / stacked.std()
    return torch.tensor(stacked, dtype=torch.float32), torch.tensor(labels)
