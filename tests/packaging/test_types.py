"""What a type checker makes of the public names, in a project that uses them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.packaging.building import attempt, environment

RIGHT = """
import numpy as np
import numpy.typing as npt
import torch
import fastproj
import fastproj.compat
from fastproj import Projector, TRAKer, project
from fastproj.trak import TopScores

features: torch.Tensor = Projector(10, 5).project(project(torch.ones(2, 10), 10))
names: list[str] = fastproj.available_backends()
module: str = fastproj.ops.__name__ + fastproj.backends.registry.NAMES[0]
installed: bool = fastproj.compat.install()


def scores(traker: TRAKer, some: int | None) -> npt.NDArray[np.float32] | TopScores:
    every: npt.NDArray[np.float32] = traker.finalize_scores("test")
    extreme: TopScores = traker.finalize_scores("test", None, False, 5)
    assert every.shape == traker.finalize_scores("test", top_k=3).shape
    fastproj.trak.write_report
    return traker.finalize_scores("test", top_k=some) if some != 1 else extreme
"""
WRONG = """
import fastproj
from fastproj import Projektor
fastproj.projekt
fastproj.compat.instal()
"""


@pytest.mark.slow
def test_mypy_takes_what_is_right_and_names_what_is_not(tmp_path: Path) -> None:
    for name, text in (("right", RIGHT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    mypy = (sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent")
    cache = f"--cache-dir={os.devnull}"
    env = environment(MYPYPATH=str(ROOT))
    said = attempt(*mypy, cache, "right.py", "wrong.py", cwd=tmp_path, env=env).stdout
    faults = [line for line in said.splitlines() if ": error: " in line]
    assert [line.partition(" error: ")[0] for line in faults] == [
        "wrong.py:3:",
        "wrong.py:4:",
        "wrong.py:5:",
    ], said
