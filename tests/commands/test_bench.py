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
