"""A ResNet-9 for 32 x 32 images, 5.1 million parameters."""

from __future__ import annotations

from torch import Tensor, nn

WIDTH = 96  # trak's example has 64, and 2.3 million parameters


def block(
    channels_in: int, channels: int, kernel: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


class Residual(nn.Module):
    """``x + two blocks of x``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(block(channels, channels), block(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def resnet9(classes: int = 10, width: int = WIDTH) -> nn.Module:
    """The network of trak's CIFAR-10 example, half as wide again."""
    w = width
    return nn.Sequential(
        block(3, w),
        block(w, 2 * w, kernel=5, stride=2, padding=2),
        Residual(2 * w),
        block(2 * w, 4 * w),
        nn.MaxPool2d(2),
        Residual(4 * w),
        block(4 * w, 2 * w, padding=0),
        nn.AdaptiveMaxPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(2 * w, classes),
    )
