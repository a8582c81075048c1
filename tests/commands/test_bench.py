"""fastproj bench: it checks before it times."""

from __future__ import annotations

import pytest

import fastproj
from fastproj import cli


def test_bench_checks_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "3000", "--cols", "33", "--batch", "3", "--repeats", "1"]
    assert cli.main(["bench", *sizes]) == 0
    out = capsys.readouterr().out
    assert "fastproj medium" in out
    assert "WRONG" not in out


def test_results_that_are_zero_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The only row that is projected has no entry in the only column."""
    assert not fastproj.matrix(slice(0, 1), slice(0, 1), kind="sjlt", block=16).any()
    sizes = ["--rows", "1", "--cols", "1", "--batch", "1", "--repeats", "1", "--kind", "sjlt"]
    assert cli.main(["bench", *sizes]) == 0
    assert "WRONG" not in capsys.readouterr().out


def test_bench_gives_no_speed_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastproj.project

    def wrong(*args: object, **kwargs: object) -> object:
        return right(*args, **kwargs) * 1.1  # type: ignore[arg-type]

    monkeypatch.setattr(fastproj, "project", wrong)
    sizes = ["--rows", "3000", "--cols", "33", "--batch", "3", "--repeats", "1"]
    assert cli.main(["bench", *sizes]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastproj")]
    assert len(lines) == 3
    assert all("WRONG" in line for line in lines)
