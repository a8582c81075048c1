"""scikit-learn's handwritten digits, and a CNN for them: one, or many at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.testbed.ensembles import Ensemble


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in 0..1 and their labels [1797]. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16.0, dtype=torch.float32, device="cpu").unsqueeze(1)
    return images, torch.tensor(data.target, device="cpu")


class DigitsCNN(nn.Module):
    """Two strided convolutions and a linear layer; 3,530 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)  # 8 x 8 -> 4 x 4
        self.conv2 = nn.Conv2d(16, 32, 2, stride=2)  # 4 x 4 -> 2 x 2
        self.fc = nn.Linear(32 * 2 * 2, classes)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return self.fc(x.flatten(1))


def patches(images: Tensor) -> Tensor:
    """The 3 x 3 neighbourhoods that conv1 sees, [n, 16, 9], the four of a conv2 cell together."""
    n = len(images)
    cells = F.unfold(images, 3, padding=1, stride=2).mT  # [n, 4 * 4, 9]
    cells = cells.reshape(n, 2, 2, 2, 2, 9).transpose(2, 3)  # y, dy, x, dx -> y, x, dy, dx
    return cells.reshape(n, 16, 9).contiguous()


def ensemble_logits(params: Ensemble, x: Tensor) -> Tensor:
    """Logits [M, B, 10] of M models, each on its own images, x [M, B, 16, 9] as from ``patches``.

    ``DigitsCNN`` for all models at once: both convolutions are matrix products over patches.
    """
    m, b = x.shape[:2]
    w1 = params["conv1.weight"].flatten(2).mT  # [M, 9, 16]
    h = torch.baddbmm(params["conv1.bias"].unsqueeze(1), x.reshape(m, b * 16, 9), w1).relu()
    w2 = params["conv2.weight"].permute(0, 3, 4, 2, 1).reshape(m, 64, 32)  # dy, dx, channel
    h = torch.baddbmm(params["conv2.bias"].unsqueeze(1), h.reshape(m, b * 4, 64), w2).relu()
    w3 = params["fc.weight"].reshape(m, -1, 32, 4).permute(0, 3, 2, 1).reshape(m, 128, -1)
    return torch.baddbmm(params["fc.bias"].unsqueeze(1), h.reshape(m, b, 128), w3)
