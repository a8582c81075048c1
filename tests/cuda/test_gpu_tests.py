"""The tests that are meant for a GPU, run on the emulation: see gpu_on_cpu.py.

So that on the day of a GPU a failure speaks of the kernels, not of the tests.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.cuda import emulation

HERE = Path(__file__).resolve().parent
PLUGIN = "tests.cuda.gpu_on_cpu"
# What needs more than the values of three functions: streams, graphs, the allocator, threads.
NOT_HERE = "not ({})".format(
    " or ".join("stream graph allocation two_gpus thread backward gradient".split())
)
SOME = (
    "matrix_is_the_spec or sjlt_small or extreme or adjoint or (error_against and 512)"
    " or of_a_thread or bf16_projection"
)


def on_the_emulation(*arguments: str) -> None:
    """pytest with the plugin, on some of the GPU tests: all must pass, and some must run."""
    emulation.library()  # built once, by this process
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN]
    done = subprocess.run(
        [*command, "-m", "gpu and not slow", *arguments],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
def test_some_of_them() -> None:
    on_the_emulation("test_gpu.py", "test_gpu_sjlt.py", "test_sanitize.py", "-k", SOME)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on the GPU itself")
def test_what_the_sanitizers_see() -> None:
    """All of test_gpu.py takes half an hour or more: by hand, as ``on_the_emulation`` does."""
    on_the_emulation("test_sanitize.py", "-k", NOT_HERE)
