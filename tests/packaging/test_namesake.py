"""The unrelated `fastproj` of PyPI beside this package, in both orders of installation."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fastproj import namesake
from tests import ROOT
from tests.packaging.building import Built, Venv, environment

# The files that its release 0.1.0 installs into our folder, and their contents where it matters.
FILES = {
    "fastproj/__init__.py": "",
    "fastproj/main.py": "def run(): ...\n",
    "fastproj-0.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: fastproj\nVersion: 0.1.0\n",
    "fastproj-0.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
    "Root-Is-Purelib: true\nTag: py3-none-any\n",
}
REPAIR = "pip uninstall -y fastproj.*pip install --force-reinstall --no-deps torch-fastproj"


def other_wheel(folder: Path) -> Path:
    """A wheel with the files of the other package."""
    path = folder / "fastproj-0.1.0-py3-none-any.whl"
    record = "fastproj-0.1.0.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as archive:
        rows = []
        for name, text in FILES.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            rows.append(f"{name},sha256={digest.decode().rstrip('=')},{len(text)}")
        archive.writestr(record, "\n".join([*rows, f"{record},,"]) + "\n")
    return path


def test_nothing_is_said_without_it() -> None:
    assert namesake.problem() is None


def test_the_name_is_said_once_right() -> None:
    """What people are told to install is what pyproject.toml calls it."""
    (name,) = re.findall(r'^name = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"pip install --force-reinstall --no-deps {name}" in (namesake._REPAIR)
    wrong = re.compile(r"pip install[^\n`]* ['\"]?fastproj\b")
    for folder, pattern in (("fastproj", "*.py"), ("docs", "*.md"), ("examples", "*.py")):
        for path in (ROOT / folder).rglob(pattern):
            assert not wrong.search(path.read_text(encoding="utf-8")), path


@pytest.mark.slow
def test_it_is_found_whichever_came_first(
    built: Built, new_venv: Callable[[], Venv], tmp_path: Path
) -> None:
    venv, other = new_venv(), other_wheel(tmp_path)
    use = "import torch, fastproj; print(fastproj.project(torch.ones(1, 600), 3).shape)"

    venv.install("-q", other)
    venv.install("-q", built.wheel)  # ours has overwritten __init__.py
    said = " ".join(venv.run("-W", "always", "-c", use).split())
    assert "torch.Size([1, 3])" in said
    assert re.search(REPAIR, said)
    assert re.search(f"problem .*{REPAIR}", venv.run("-W", "ignore", "-m", "fastproj", "info"))

    venv.install("-q", "--force-reinstall", other)  # and now the other one has
    done = subprocess.run(
        [venv.python, "-m", "fastproj", "info"],
        cwd=venv.elsewhere,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.search(REPAIR, done.stderr)
    assert "Traceback" not in done.stderr

    # Obeying the message mends it.
    venv.uninstall("fastproj")
    venv.install("-q", "--force-reinstall", built.wheel)
    said = venv.run("-W", "error", "-c", use)
    assert said == "torch.Size([1, 3])"
