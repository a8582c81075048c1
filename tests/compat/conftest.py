"""Every test of the drop-ins starts and ends with nothing installed, on one torch thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from fastproj import compat


@pytest.fixture(autouse=True)
def _nothing_installed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    for name in ("trak", "dattri", "bergson", "sjlt"):
        module = sys.modules.get(f"fastproj.compat.{name}")
        if module is not None:
            module.uninstall()
    compat.uninstall()
    torch.set_num_threads(before)
