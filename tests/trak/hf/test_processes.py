"""Several processes (gloo over loopback): HFTRAKer and the callback share the work."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests import ROOT
from tests.trak.hf.training import SAMPLES

pytestmark = pytest.mark.slow


def run(what, folder, size):
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(size), "-m", "tests.trak.hf.run", what, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return (
        [np.load(folder / f"scores-{rank}.npy") for rank in range(size)] if what != "plain" else []
    )


def test_batches_are_shared_out(tmp_path):
    (wanted,) = run("traker", tmp_path / "one", 1)
    for found in run("traker", tmp_path / "two", 2):
        np.testing.assert_array_equal(found, wanted)
    shares = [json.loads((tmp_path / "two" / f"computed-{r}.json").read_text()) for r in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(2 * list(range(SAMPLES)))
    assert abs(len(shares[0]) - len(shares[1])) <= 8


def test_the_callback_in_a_training_of_several_processes(tmp_path):
    run("plain", tmp_path / "plain", 2)
    first, second = run("callback", tmp_path / "run", 2)
    np.testing.assert_array_equal(first, second)
    assert np.isfinite(first).all()
    wanted, found = (torch.load(tmp_path / name / "state.pt") for name in ("plain", "run"))
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(found[name], t), name
