"""Plain attributes of a model's modules that change between batches: a warning, never silence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastproj import TRAKer


class Net(nn.Module):
    """Attributes of its own that its forward writes to, and some that it reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 3)
        self.calls, self.longest = 0, 0
        self.temperature, self.mode = 2.0, "usual"
        self.nothing = float("nan")
        self._cache = 0

    def forward(self, x):
        self.calls += 1
        self._cache = len(x)
        self.longest = max(self.longest, len(x))
        return self.fc(self.norm(x)) / self.temperature


def begun(folder, n=20):
    model = Net().eval()
    traker = TRAKer(model, "image_classification", n, folder, proj_dim=16)
    traker.load_checkpoint(model.state_dict(), 0)
    return model, traker


def featurize(traker, size=4):
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
    traker.featurize((x, torch.arange(size) % 3), num_samples=size)


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        ("norm", "eps", 0.1, r"norm\.eps of the model was 1e-05 when .* is 0\.1 now"),
        ("", "temperature", 3.0, r"temperature of the model was 2\.0 .* is 3\.0 now"),
        ("", "mode", "other", "mode of the model was 'usual' .* is 'other' now"),
        ("norm", "track_running_stats", 1, "track_running_stats"),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_a_change_is_said_once(where, name, value, said, before, tmp_path, recwarn):
    model, traker = begun(tmp_path)
    for _ in range(before):
        featurize(traker)
    assert not recwarn.list
    setattr(model.get_submodule(where), name, value)
    if name == "track_running_stats":  # equal, though of another type
        featurize(traker)
    else:
        with pytest.warns(UserWarning, match=said):
            featurize(traker)
    recwarn.clear()
    featurize(traker)
    assert not recwarn.list
    traker.load_checkpoint(model.state_dict(), 1)  # which takes them as they are
    featurize(traker)
    assert not recwarn.list


def test_what_the_forward_writes_to_is_no_change(tmp_path, recwarn):
    model, traker = begun(tmp_path)
    for _ in range(3):
        model(torch.randn(3, 4))  # before and between batches
        featurize(traker)
    model._cache = 7
    model.train().eval()
    featurize(traker, 3)
    assert not recwarn.list
    assert model.calls > 3
