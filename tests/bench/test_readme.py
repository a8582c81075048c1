"""bench/README.md names every benchmark, and nothing else."""

from __future__ import annotations

import re

from tests import ROOT


def test_every_benchmark_has_its_command() -> None:
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    programs = {
        path.stem
        for path in (ROOT / "bench").glob("*.py")
        if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    assert set(re.findall(r"python -m bench\.(\w+)", text)) == programs
    for name in re.findall(r"`([\w/]+\.(?:py|json))`", text):
        assert (ROOT / name).exists() or (ROOT / "bench" / name).exists(), name
