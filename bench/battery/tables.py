"""Tables that scikit-learn and mlxtend ship or make: classifications and regressions."""

from __future__ import annotations

import torch

from bench.battery.models import MLP
from bench.battery.problem import Problem, Regression, separate
from fastproj.testbed.ensembles import Training


def breast_cancer(n: int = 450, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 569 breast tumours, 30 measurements, two classes, with an MLP."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0), dtype=torch.float32)
    samples, asked = separate(x, torch.tensor(data.target), n, targets, seed)
    return Problem(
        "breast_cancer",
        samples,
        asked,
        lambda: MLP(30, 64, 32, 2),
        Training(epochs=60, learning_rate=0.03, weight_decay=1e-2),
    )


def wine(n: int = 128, targets: int = 50, seed: int = 0) -> Problem:
    """scikit-learn's 178 wines, 13 measurements, three classes, with an MLP."""
    from sklearn.datasets import load_wine

    data = load_wine()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0), dtype=torch.float32)
    samples, asked = separate(x, torch.tensor(data.target), n, targets, seed)
    return Problem(
        "wine",
        samples,
        asked,
        lambda: MLP(13, 32, 32, 3),
        Training(epochs=80, batch=32, learning_rate=0.05, weight_decay=5e-3),
    )


def unequal(n: int = 600, targets: int = 100) -> Problem:
    """A table that scikit-learn makes: 20 measurements, 5 classes of 45, 25, 15, 10 and 5 %."""
    from sklearn.datasets import make_classification

    x, y = make_classification(
        n + targets,
        n_informative=8,
        n_classes=5,
        n_clusters_per_class=1,
        weights=[0.45, 0.25, 0.15, 0.1],
        flip_y=0.05,
        random_state=3,
    )
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    samples, asked = separate(x, torch.tensor(y), n, targets, 0)
    training = Training(epochs=30, batch=40, learning_rate=0.05, weight_decay=1e-3)
    return Problem("unequal", samples, asked, lambda: MLP(20, 32, 5), training)


def diabetes(n: int = 340, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 442 patients, 10 measurements: regression on the disease's progress."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = torch.tensor(data.data / data.data.std(0), dtype=torch.float32)
    y = torch.tensor((data.target - data.target.mean()) / data.target.std(), dtype=torch.float32)
    samples, asked = separate(x, y, n, targets, seed)
    return Problem(
        "diabetes",
        samples,
        asked,
        lambda: MLP(10, 64, 32, 1),
        Training(epochs=60, batch=34, learning_rate=0.02, weight_decay=1e-2, clip=5.0),
        Regression(),
    )


def auto_mpg(n: int = 280, targets: int = 100, seed: int = 0) -> Problem:
    """mlxtend's 392 cars, 7 properties: regression on miles per gallon, with a tanh MLP."""
    from mlxtend.data import autompg_data

    data, miles = autompg_data()
    data, miles = data[:, :7], torch.tensor(miles, dtype=torch.float32)  # the others name the car
    x = torch.tensor((data - data.mean(0)) / data.std(0), dtype=torch.float32)
    samples, asked = separate(x, (miles - miles.mean()) / miles.std(), n, targets, seed)
    return Problem(
        "auto_mpg",
        samples,
        asked,
        lambda: MLP(7, 48, 1, activation=torch.tanh),
        Training(epochs=30, batch=40, learning_rate=0.03, weight_decay=1e-3),
        Regression(),
    )
