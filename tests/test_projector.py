"""Projector: the configured projection equals the function it stands for."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastproj
from tests.dense import KINDS, integers


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_function_with_its_configuration(backend: str, device: str, kind: str) -> None:
    grads = integers((3, 50)).to(device)
    projector = fastproj.Projector(
        50, 7, np.int64(9), kind, scale=None, precision="highest", backend=backend
    )
    how = {"kind": kind, "scale": None, "precision": "highest", "backend": backend}
    for model_id in (0, 3, 2**32 - 1):
        expected = fastproj.project(grads, 7, 9, stream=model_id, **how)
        assert torch.equal(projector.project(grads, model_id), expected)
        assert torch.equal(projector.project(grads, model_id=np.int32(model_id & 0xFF)),
            fastproj.project(grads, 7, 9, stream=model_id & 0xFF, **how))  # fmt: skip
        back = fastproj.project_transpose(expected, 50, 9, stream=model_id, **how)
        assert torch.equal(projector.project_transpose(expected, model_id), back)
        part = projector.project_transpose(expected, model_id, rows=slice(7, 31))
        torch.testing.assert_close(part, back[:, 7:31])
        out = torch.empty_like(back)
        assert projector.project_transpose(expected, model_id, out=out) is out
        assert torch.equal(out, back)


def test_models_have_matrices_of_their_own(backend: str, device: str) -> None:
    projector = fastproj.Projector(64, 64, backend=backend)
    matrices = [projector.matrix(model_id=m, device=device) for m in range(3)]
    for i, a in enumerate(matrices):
        assert a.shape == (64, 64)
        for b in matrices[:i]:
            # 4096 fair signs: more than 400 beyond half agree once in 10^35.
            assert abs((a == b).sum().item() - 2048) < 400


def test_pieces_of_the_gradient_accumulate(backend: str, device: str) -> None:
    grads = integers((4, 900)).to(device)
    projector = fastproj.Projector(900, 33, 1, scale=None, backend=backend)
    whole = projector.project(grads, 5)
    out = projector.project(grads[:, :500], 5, row_offset=0)
    projector.project(grads[:, 500:], 5, row_offset=500, out=out, accumulate=True)
    assert torch.equal(out, whole)
    tree = {"a": grads[:, :300].reshape(4, 10, 30), "b": grads[:, 300:]}
    assert torch.equal(projector.project(tree, 5), whole)


def test_matrix_is_what_project_multiplies_with(backend: str, device: str) -> None:
    projector = fastproj.Projector(300, 20, 4, scale=None, backend=backend)
    grads = integers((2, 300)).to(device)
    assert torch.equal(
        projector.project(grads, 6), grads @ projector.matrix(model_id=6, device=device)
    )
    block = projector.matrix(slice(5, 9), slice(3, 11), 6, device=device)
    assert torch.equal(block, projector.matrix(model_id=6, device=device)[5:9, 3:11])
    assert projector.matrix(dtype=torch.int8, device=device).dtype == torch.int8


def test_repr_and_pickle() -> None:
    projector = fastproj.Projector(10, 4, 2**64 - 1, "gaussian", scale=0.5, precision="high")
    assert repr(projector) == (
        "Projector(grad_dim=10, proj_dim=4, seed=18446744073709551615, kind='gaussian', "
        "scale=0.5, precision='high', backend=None)"
    )
    clone = pickle.loads(pickle.dumps(projector))
    assert repr(clone) == repr(projector)
    grads = integers((2, 10))
    assert torch.equal(clone.project(grads), projector.project(grads))


def test_a_scale_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="scaled: received scale=inf"):
        fastproj.Projector(10, 4, scale=1e200).scaled(1e200)


def test_a_fresh_process_unpickles_it() -> None:
    """As spawned workers do: its module is the first of fastproj that is imported there."""
    pickled = pickle.dumps(fastproj.Projector(10, 4, 3))
    program = f"import pickle; print(pickle.loads({pickled!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.startswith("Projector(grad_dim=10, proj_dim=4, seed=3,"), done.stderr


def test_it_is_differentiable(backend: str, device: str) -> None:
    projector = fastproj.Projector(10, 4, backend=backend)
    grads = integers((2, 10), dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(projector.project, (grads,))
    y = integers((2, 4), dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(projector.project_transpose, (y,))
