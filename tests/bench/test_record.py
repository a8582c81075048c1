"""bench.record: processes that measure, and how a command ends."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bench import limits, record

ROOT = Path(record.__file__).parent

KILLED = """
import os, pathlib, signal, tempfile
pathlib.Path(tempfile.mkdtemp(), "features").write_bytes(b"0" * 1000)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, package = tmp_path / "temporary", tmp_path / "bench"
    temporary.mkdir()
    package.mkdir()
    (package / "killed.py").write_text(KILLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    (package / "__init__.py").touch()
    with pytest.raises(RuntimeError, match="status -9"):
        record.in_fresh_process("killed")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(("returned", "status"), [(0, 0), (1, 1), (None, None)])
def test_a_command_ends_with_its_status(returned: int | None, status: int | None) -> None:
    with pytest.raises(SystemExit) as ended:
        record.end_with(lambda: returned)
    assert ended.value.code == status


def test_ctrl_c_ends_a_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        record.end_with(main)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


# These are over in seconds, the preflight in half a minute.
SHORT = {"figures.py", "measured_table.py", "preflight.py"}


def test_every_long_command_ends_so() -> None:
    commands = {
        path.name: path.read_text(encoding="utf-8")
        for path in ROOT.glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(commands) > SHORT
    for name in set(commands) - SHORT:
        assert commands[name].endswith("    end_with(main)\n"), name


@pytest.mark.parametrize("words", [["memory", "sjlt"], ["latency", "3"]])
def test_limits_refuses_values_that_it_would_not_use(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        limits.main(words)
    assert ended.value.code == 2
    assert f"received {' '.join(words)}; values go with memory" in capsys.readouterr().err
