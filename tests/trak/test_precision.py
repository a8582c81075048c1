"""Full precision: whatever was set is off within, and set again after."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastproj.trak import FunctionModelOutput, HookGradientComputer
from fastproj.trak.precision import full_precision

NEWER = """
import torch
from fastproj.trak.precision import full_precision
backends = torch.backends
places = {
    "matmul": (backends.cuda.matmul, backends.mkldnn.matmul),
    "conv": (backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.conv, backends.mkldnn.rnn),
}
every = [place for some in places.values() for place in some]
backends.mkldnn.conv.fp32_precision = "bf16"
with full_precision():
    assert backends.mkldnn.conv.fp32_precision == "ieee"
assert backends.mkldnn.conv.fp32_precision == "bf16"
for which in places.values():
    for place in which:
        place.fp32_precision = "tf32" if which is places["matmul"] else "ieee"
    before = [place.fp32_precision for place in every]
    with full_precision():
        assert {place.fp32_precision for place in every} == {"ieee"}
    assert [place.fp32_precision for place in every] == before
"""


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has older settings alone"
)
def test_torchs_newer_settings():
    """In a process of its own: once used, they make the older functions raise."""
    subprocess.run([sys.executable, "-c", NEWER], check=True)


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_torchs_older_settings(matmul, cudnn):
    backends = torch.backends
    before = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(matmul)
        backends.cudnn.allow_tf32 = cudnn
        with full_precision(), backends.cudnn.flags(enabled=False):  # as a model's forward may
            assert torch.get_float32_matmul_precision() == "highest"
        with full_precision():
            assert not backends.cudnn.allow_tf32
        assert (torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32) == (matmul, cudnn)
    finally:
        torch.set_float32_matmul_precision(before[0])
        backends.cudnn.allow_tf32 = before[1]


def test_threads_that_overlap_leave_what_was_set():
    """The settings are those of all threads; the one that ends first must not end it for others."""
    backends = torch.backends
    with backends.cudnn.flags(allow_tf32=True):
        first, second = full_precision(), full_precision()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not backends.cudnn.allow_tf32
        second.__exit__(None, None, None)
        assert backends.cudnn.allow_tf32


class Tf32Like(nn.Module):
    """Rounds as TF32 does where it is allowed, and not the same way in a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        z = self.layer(x).squeeze(1)
        off = 0.01 if torch.backends.cudnn.allow_tf32 and len(x) == 1 else 0.0
        return z * (1 + off)


def test_the_rounding_of_tf32_does_not_count_as_samples_that_mix(caplog):
    torch.manual_seed(0)
    task = FunctionModelOutput(lambda model, batch: model(*batch))
    computer = HookGradientComputer(Tf32Like(), task)
    with torch.backends.cudnn.flags(allow_tf32=True):  # its default, which others may have changed
        assert not computer.mixes((torch.randn(3, 4),))
    assert "depend on the other samples" not in caplog.text
