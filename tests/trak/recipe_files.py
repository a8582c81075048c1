"""Tiny recipes as files, as the tests of retraining need them."""

from __future__ import annotations

from pathlib import Path

# Ridge regression with a little noise of the seed, on 24 samples and 5 targets. Each training adds
# a line to log.txt; what a test wants to go wrong stands in trouble.py.
RIDGE = '''
"""Ridge regression, for tests."""
import os
import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
numbers = np.random.default_rng(0)
X, y, Z = numbers.normal(size=(24, 4)), numbers.normal(size=24), numbers.normal(size=(5, 4))

def trouble(count, indices): ...

if os.path.exists(os.path.join(HERE, "trouble.py")):
    exec(open(os.path.join(HERE, "trouble.py")).read())

def train(indices, seed):
    with open(os.path.join(HERE, "log.txt"), "a+") as log:
        log.write(f"{' '.join(map(str, indices))} | {seed}\\n")
        log.seek(0)
        count = len(log.readlines())
    trouble(count, indices)
    a, b = X[indices], y[indices]
    return np.linalg.solve(a.T @ a + np.eye(4), a.T @ b) + 0.1 * torch.randn(4).numpy()

def outputs(model):
    return Z @ model
'''


def write_recipe(folder: Path, trouble: str = "", text: str = RIDGE) -> Path:
    """recipe.py in ``folder``, and trouble.py with the body of ``trouble(count, indices)``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.py").write_text(text)
    if trouble:
        (folder / "trouble.py").write_text(
            f"import os, signal\ndef trouble(count, indices):\n    {trouble}\n"
        )
    return folder / "recipe.py"


def trained(folder: Path) -> list[str]:
    """What was trained, a line for each."""
    log = folder / "log.txt"
    return log.read_text().splitlines() if log.exists() else []
