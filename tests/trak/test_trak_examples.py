"""The example scripts run, on little data."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_image_classification(tmp_path, monkeypatch, capsys):
    options = {"train": 64, "targets": 5, "models": 2, "epochs": 1, "proj-dim": 16}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    script = EXAMPLES / "image_classification.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), "--out", str(tmp_path), "--device", "cpu", *arguments]
    )
    results = []
    for _ in range(2):  # the second time from what the first has kept
        runpy.run_path(str(script), run_name="__main__")
        results.append(np.load(tmp_path / "trak-64-1-16" / "scores" / "held_out.mmap"))
    assert "scores [64, 5]" in capsys.readouterr().out
    assert results[0].shape == (64, 5)
    np.testing.assert_array_equal(*results)
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "report.html").read_text().count('class="target"') == 5
