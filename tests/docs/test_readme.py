"""The README's Python runs, and what it names exists."""

from __future__ import annotations

import re

from tests import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_in_order() -> None:
    assert len(BLOCKS) >= 2
    scope: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), scope)


def test_it_fits_two_screens() -> None:
    assert README.count("\n") <= 100


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "docs"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_paths_exist() -> None:
    for path in re.findall(r"`((?:bench|fastproj|tests)/[\w./-]+|\w+\.(?:py|txt))`", README):
        if path != "bench/results/":
            assert (ROOT / path).exists(), path
