"""Pictures and captions made here, for two towers as in CLIP."""

from __future__ import annotations

import torch

from bench.battery.images import grid
from bench.battery.models import TwoTowers
from bench.battery.problem import Pairs, Problem
from bench.battery.sentences import Vocabulary
from fastproj.testbed.ensembles import Training

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "white": (1, 1, 1),
    "black": (0, 0, 0),
}
SHAPES = ("disc", "square", "cross", "ring")
SIZES = {"small": 2.5, "large": 4.5}
SIDE = 16


def captions(n: int = 600, targets: int = 100) -> Problem:
    """A 16 x 16 shape on a ground, and "a large red ring on a blue ground"."""
    draw = torch.Generator().manual_seed(0)
    colours = list(COLOURS)
    images, texts = [], []
    for _ in range(n + targets):
        first, second = torch.randperm(len(colours), generator=draw)[:2].tolist()
        shape = SHAPES[int(torch.randint(len(SHAPES), (), generator=draw))]
        size = list(SIZES)[int(torch.randint(2, (), generator=draw))]
        place = 3 * torch.rand(2, generator=draw) - 1.5
        inside = covered(shape, SIZES[size], place)  # [SIDE, SIDE]
        on, off = (
            torch.tensor(COLOURS[colours[i]], dtype=torch.float32)[:, None, None]
            for i in (first, second)
        )
        images.append(torch.where(inside, on, off) - 0.5)
        texts.append(f"a {size} {colours[first]} {shape} on a {colours[second]} ground".split())
    vocabulary = Vocabulary(texts, 100)
    x = torch.stack(images)
    x = x + 0.15 * torch.randn(x.shape, generator=draw)
    ids = vocabulary.encode(texts, 8)
    samples = (x[:n], ids[:n])
    return Problem(
        "captions",
        samples,
        (x[n:], ids[n:]),
        lambda: TwoTowers(len(vocabulary), 8, SIDE),
        Training(epochs=30, batch=50, learning_rate=0.05, weight_decay=1e-3, clip=1.0),
        Pairs(samples, 100),
        retrainings=6,  # seeds change more here than halves do
    )


def covered(shape: str, size: float, place: torch.Tensor) -> torch.Tensor:
    """The pixels inside a shape, bool [SIDE, SIDE]."""
    y, x = grid(SIDE)
    y, x = (y - place[0]).abs(), (x - place[1]).abs()
    radius = (y * y + x * x).sqrt()
    return {
        "disc": radius < size,
        "square": torch.maximum(y, x) < size * 0.9,
        "cross": (torch.minimum(y, x) < size / 3) & (torch.maximum(y, x) < size * 1.2),
        "ring": (radius < size * 1.2) & (radius > size * 0.6),
    }[shape]
