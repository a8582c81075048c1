"""TRAKer on another device than the CPU: nothing is left behind on the CPU; and on the CPU while
torch's default device is another: nothing goes there.
"""

from __future__ import annotations

import ast
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


# The functions of torch whose tensors go to the default device.
FACTORIES = set(
    "arange as_tensor asarray empty empty_permuted empty_strided eye full linspace logspace ones "
    "rand randint randn randperm scalar_tensor sparse_coo_tensor tensor tril_indices triu_indices "
    "zeros".split()
)


def unplaced(source):
    """The lines that make a tensor without saying on which device."""
    nodes = list(ast.walk(ast.parse(source)))
    calls = (node for node in nodes if isinstance(node, ast.Call))
    placed = [call for call in calls if any(k.arg in ("device", None) for k in call.keywords)]
    fine = {id(part) for call in placed for part in (call.func, *call.args)}  # partial(torch.ones)
    for node in nodes:
        of_torch = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch"
        if of_torch and node.attr in FACTORIES and id(node) not in fine:
            yield node.lineno


def test_each_new_tensor_has_a_device_of_its_own():
    assert list(unplaced("torch.ones(2)\nf(torch.eye)\ntorch.rand(1, device=None)")) == [1, 2]
    files = list((ROOT / "fastproj").rglob("*.py"))
    found = {path: list(unplaced(path.read_text("utf-8"))) for path in files}
    assert len(files) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("computer", "curvature", "proj_dim"),
    [("hooks", "fisher", 8), ("hooks", "trak", 64), ("loop", "fisher", 64), ("func", "trak", 8)],
)
def test_all_is_the_same_under_any_default_device(tmp_path, computer, curvature, proj_dim):
    """A tensor of the device "meta" has no values: one that is used shows, as on a GPU."""
    models = [cases.net(seed) for seed in range(2)]
    train, targets = cases.data(24), cases.data(5, seed=5)
    options = {"gradient_computer": COMPUTERS[computer], "curvature": curvature}

    def results(save_dir):
        scores = cases.whole_run(save_dir, models, train, targets, proj_dim=proj_dim, **options)
        again = cases.make(models[0], save_dir, 24, proj_dim=proj_dim, **options)
        top = again.finalize_scores("test", top_k=3)
        return scores, again.self_influence(), top.helpful_scores, top.harmful_indices

    wanted = results(tmp_path / "cpu")
    with torch.device("meta"):
        found = results(tmp_path / "meta")
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
