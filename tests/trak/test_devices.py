"""TRAKer with its model on another device than the CPU: nothing is left behind on the CPU."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import backend_registration

from fastproj.trak import gradients
from tests import ROOT
from tests.trak import cases

COMPUTERS = {
    "func": gradients.FunctionalGradientComputer,
    "loop": gradients.IterativeGradientComputer,
    "hooks": gradients.HookGradientComputer,
}


CURVATURES = ("trak", "fisher")


def scores(save_dir, device, computer, curvature):
    """From featurizing to scores of two checkpoints, the batches coming from the CPU."""
    train, targets = cases.data(33), cases.data(7, seed=5)
    options = {"device": device, "gradient_computer": COMPUTERS[computer], "lambda_reg": 0.1}
    options["curvature"] = curvature
    traker = cases.make(cases.net(), save_dir, 33, proj_dim=6, **options)
    for model_id in range(2):
        cases.featurize(traker, cases.net(model_id), model_id, train)
    traker.finalize_features()
    for model_id in range(2):
        cases.score(traker, cases.net(model_id), model_id, targets)
    return np.array(traker.finalize_scores("test"))


def on_the_pretended_device(folder):
    """In a process of its own: a device is registered before the first backward, and for good."""
    from tests.trak.pretend_device import PretendDevice

    save_dir = Path(folder)
    for computer, curvature in product(("func", "loop"), CURVATURES):
        how = save_dir / computer / curvature
        wanted = scores(how / "cpu", "cpu", computer, curvature)
        with PretendDevice():
            x = torch.ones(2, 2, device="pretend")
            with pytest.raises(RuntimeError, match="of the CPU"):
                x @ torch.ones(2, 2)
            found = scores(how / "pretend", "pretend", computer, curvature)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no devices written in Python",
)
def test_all_is_on_the_device_of_the_model(tmp_path):
    call = (
        "from tests.trak import test_devices as tests\n"
        f"tests.on_the_pretended_device({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("computer", COMPUTERS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_gpu_gives_the_scores_of_the_cpu(tmp_path, computer, curvature, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    wanted = scores(tmp_path / "cpu", "cpu", computer, curvature)
    found = scores(tmp_path / "cuda", "cuda", computer, curvature)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())
