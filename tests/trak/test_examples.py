"""The example scripts run, on little data."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("epochs", [0, 1])
def test_image_classification(tmp_path, monkeypatch, capsys, epochs):
    # Fewer images than a batch of the training.
    options = {"train": 40, "targets": 5, "models": 2, "epochs": epochs, "proj-dim": 16}
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    script = EXAMPLES / "image_classification.py"
    monkeypatch.setattr(
        sys, "argv", [str(script), "--out", str(tmp_path), "--device", "cpu", *arguments]
    )
    results = []
    for _ in range(2):  # the second time from what the first has kept
        runpy.run_path(str(script), run_name="__main__")
        results.append(np.load(tmp_path / f"trak-40-{epochs}-16" / "scores" / "held_out.mmap"))
    assert "scores [40, 5]" in capsys.readouterr().out
    assert results[0].shape == (40, 5)
    np.testing.assert_array_equal(*results)
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "report.html").read_text().count('class="target"') == 5


def test_evaluation(tmp_path, monkeypatch, capsys):
    script = EXAMPLES / "evaluation.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--out", str(tmp_path)])
    printed = []
    for _ in range(2):  # the second time from what the first has kept
        runpy.run_path(str(script), run_name="__main__")
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    found = [float(text) for text in re.findall(r"(?:LDS|correlation|AUC) (-?\d\.\d+)", printed[0])]
    assert len(found) == 3
    assert found[0] > 0.5
    assert found[1] > 0.2
    assert found[2] > 0.9
    assert "brittleness of" in printed[0]


SMALL = {"train": 24, "models": 1, "epochs": 1, "proj-dim": 8}
OTHERS = {
    "text_classification": ({}, 6, "most harmful reviews"),
    "causal_lm": ({}, 10, "most helpful sentence"),
    "seq2seq": ({"targets": 4}, 4, "digits shared"),
    "clip": ({"targets": 4}, 4, "the target's caption"),
}


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "image_classification",
        "evaluation",
        "distributed",  # by test_distributed.py
        "data_selection",
        *OTHERS,
    }


@pytest.mark.slow
def test_data_selection(tmp_path, monkeypatch, capsys):
    """What scores choose beats chance, by more than seeds differ."""
    options = {"out": tmp_path, "pool": 160, "share": 0.1, "seeds": 2, "proj-dim": 128}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["data_selection", *arguments])
    runpy.run_path(str(EXAMPLES / "data_selection.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "scores [160, 1]" in printed
    found = re.findall(r"(selected|random) +[\d.]+ \(from ([\d.]+) to ([\d.]+)", printed)
    (_, _, worst), (_, best, _) = found
    assert float(worst) < float(best)


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_tasks(name, tmp_path, monkeypatch, capsys):
    more, targets, last_line = OTHERS[name]
    options = {**SMALL, **more, "out": tmp_path}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a gradient computer that had to give way
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert f"scores [24, {targets}]" in printed
    assert last_line in printed
    (scores,) = tmp_path.glob("scores/*.mmap")
    assert np.isfinite(np.load(scores)).all()
