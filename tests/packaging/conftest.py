"""Builds the sdist and the wheel once, and makes empty environments to install into."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.building import Built, Venv, copy_sources, environment, pip_wheel, run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """sdist of the sources, and the wheel built from the unpacked sdist."""
    work = tmp_path_factory.mktemp("built")
    sources = copy_sources(work / "sources")
    command = (sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", work)
    run(*command, sources, cwd=work)
    (sdist,) = work.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(work, filter="data")
        else:
            archive.extractall(work)
    tree = work / sdist.name.removesuffix(".tar.gz")
    return Built(sdist, tree, pip_wheel(tree, work / "wheel"))


@pytest.fixture
def new_venv(tmp_path: Path) -> Callable[[], Venv]:
    """Makes an empty environment that can import torch."""

    def make() -> Venv:
        venv = Venv(tmp_path / "venv")
        venv.see_this_environment()
        return venv

    return make


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH holds nothing."""
    empty = tmp_path / "empty-bin"
    empty.mkdir()
    return environment(PATH=str(empty))
