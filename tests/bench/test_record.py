"""bench.record: processes that measure."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bench import record

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
