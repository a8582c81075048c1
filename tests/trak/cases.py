"""Small models and data, and TRAK written out in float64, for the tests of fastproj.trak."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastproj
from fastproj import TRAKer
from fastproj.spec import default_block
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.solving import finalizing, scoring
from fastproj.trak.store import features, shards


class Net(nn.Module):
    """Convolution, batch norm with running statistics, dropout, a scalar parameter."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.fc = nn.Linear(3 * 5 * 5, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))) * self.gain
        return self.fc(self.drop(h).flatten(1))


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    """A Net whose running statistics are not the initial ones."""
    torch.manual_seed(seed)
    model = Net()
    model.train()
    model(torch.randn(16, 1, 5, 5))
    return model.to(dtype).eval()


def trained(seed: int, train: tuple[Tensor, Tensor], steps: int = 30) -> Net:
    """A Net that has fitted its training set: one that lambda "auto" finds a training ridge for."""
    model = net(seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(train[0]), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def data(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 5, 5] and labels [n] of 4 classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, 5, 5, generator=generator).to(dtype)
    return images, torch.randint(0, 4, (n,), generator=generator)


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Margin gradients by plain autograd, one sample at a time, float64 [n, P]."""
    rows = []
    for image, label in zip(*batch, strict=True):
        logits = model(image.unsqueeze(0))[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        margin = logits[label] - others.logsumexp(0)
        parts = torch.autograd.grad(margin, list(model.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).double()


def q(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1 - p of the label, float64 [n]."""
    with torch.no_grad():
        logits = model(batch[0]).double()
    return 1 - logits.softmax(1)[torch.arange(len(logits)), batch[1]]


def projected(grads: Tensor, proj_dim: int, model_id: int, seed: int = 0) -> Tensor:
    """Gradients times TRAKer's default matrix, materialised, over sqrt(P), float64 [n, k]."""
    size = grads.shape[1]
    return grads @ default_matrix(size, proj_dim, seed, model_id) / size**0.5


def default_matrix(size: int, proj_dim: int, seed: int = 0, model_id: int = 0) -> Tensor:
    """The matrix that a TRAKer has without ``kind``, as long as a dense one, float64 [P, k]."""
    if proj_dim < 16:
        return fastproj.matrix(size, proj_dim, seed, stream=model_id, dtype=torch.float64)
    block = default_block(proj_dim)
    matrix = fastproj.matrix(
        size, proj_dim, seed, "sjlt", block=block, stream=model_id, dtype=torch.float64
    )
    return matrix * block**0.5


def explicit_trak(
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    proj_dim: int,
    lambda_reg: float,
    seed: int = 0,
) -> Tensor:
    """The paper's formula with explicit inverses, float64 [n, m]."""
    total, weight = torch.zeros(()), torch.zeros(())
    for model_id, model in enumerate(models):
        phi = projected(gradients(model, train), proj_dim, model_id, seed)
        phi_target = projected(gradients(model, targets), proj_dim, model_id, seed)
        inverse = torch.linalg.inv(phi.T @ phi + lambda_reg * torch.eye(proj_dim).double())
        total = total + phi @ inverse @ phi_target.T
        weight = weight + q(model, train)
    count = len(models)
    return (total / count) * (weight / count)[:, None]


def in_metric(model: nn.Module, grads: Tensor, fisher: Fisher) -> Tensor:
    """Gradients [n, P] times what ``fisher.size_power`` says."""
    sizes = torch.tensor([p.numel() for p in model.parameters()])
    factors = (sizes / sizes.max()).double() ** (fisher.size_power or 0.0)
    return grads * factors.repeat_interleave(sizes)


def fisher_of(
    model: nn.Module, model_id: int, train: tuple[Tensor, Tensor], proj_dim: int, fisher: Fisher
) -> tuple[Tensor, Tensor, Tensor]:
    """A classifier's Fisher matrix plus the empirical one, [k, k], gradients of the log-likelihood
    [n, k], projected, and what a Newton step from the network's logits is fitted to, [k].

    The other classes are those that Draws chooses, by the inverse of their distribution.
    """
    count = len(train[0])
    draws = Draws(count, proj_dim, fisher, 0)
    chosen = draws.chosen(np.arange(count))
    uniform = draws.noise(model_id, np.arange(count), 1)[:, :, 0, 0]
    own = gradients(model, train)
    slopes = q(model, train)
    rows, weights, values, drawn_values = [], [], [], []
    for i, (image, label) in enumerate(zip(*train, strict=True)):
        logits = model(image.unsqueeze(0))[0]
        pi = logits.detach().clone()
        pi[label] = -torch.inf
        pi = pi.double().softmax(0)
        values.append((logits[label] - pi @ logits).detach())
        for u in uniform[i] if chosen[i] else ():
            other = int((pi.cumsum(0) <= float(u)).sum())
            contrast = (slopes[i] / fisher.draws).sqrt() * (logits[other] - pi @ logits)
            parts = torch.autograd.grad(contrast, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
            weights.append(count / chosen.sum())
            drawn_values.append(contrast.detach())
    phi = projected(in_metric(model, own, fisher), proj_dim, model_id)
    drawn = in_metric(model, torch.stack(rows).double(), fisher)
    drawn = projected(drawn, proj_dim, model_id)
    weight = torch.tensor(weights)
    matrix = (phi * slopes[:, None]).T @ phi  # p q + q^2
    matrix += (drawn * weight[:, None]).T @ drawn
    response = phi.T @ (slopes * torch.stack(values) + slopes)
    response += drawn.T @ (weight * torch.stack(drawn_values))
    return matrix, phi * slopes[:, None], response


def multiple_of_mean(
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    proj_dim: int,
    solved: list[dict[str, Any]],
    fisher: Fisher,
) -> float:
    """By how much lambdas that were chosen grow, so that checkpoints tell what the others say."""
    if len(models) < 2 or not all(one.get("peers") for one in solved):
        return 1.0
    images, labels = train
    said = []
    for model in models:
        logits = model(images).detach().double()
        own = torch.zeros_like(logits).scatter(1, labels[:, None], torch.inf)
        others = (logits - own).softmax(1)
        said.append(logits.gather(1, labels[:, None])[:, 0] - (others * logits).sum(1))
    curves = torch.zeros(9, dtype=torch.float64)
    for model_id, model in enumerate(models):
        matrix, _, response = fisher_of(model, model_id, train, proj_dim, fisher)
        phi = projected(in_metric(model, gradients(model, train), fisher), proj_dim, model_id)
        rest = torch.stack([one for i, one in enumerate(said) if i != model_id]).mean(0)
        for power in range(len(curves)):
            ridge = 1.5**power * solved[model_id]["lambda_reg"]
            step = torch.linalg.solve(matrix + ridge * torch.eye(proj_dim).double(), response)
            curves[power] += torch.corrcoef(torch.stack([phi @ step, rest]))[0, 1]
    for count in (2, 5, 9):
        best = int(curves[:count].argmax())
        if best < count - 1:
            break
    return 1.5**best


def ridges_of_mean(
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    proj_dim: int,
    solved: list[dict[str, Any]],
    fisher: Fisher,
) -> list[list[tuple[float, float]]]:
    """The ridges, and their weights, with which the scores of the checkpoints are averaged. A
    number is one ridge. A lambda that was chosen is a third of it, times two numbers whose product
    is 1 and whose ratio is 30; both grow by their share of as many checkpoints, and by
    ``multiple_of_mean``.
    """
    grown = (1 + 2 / len(solved)) * multiple_of_mean(models, train, proj_dim, solved, fisher)
    two = [(grown / 3 * 30**-0.5, 1 / (1 + 30**0.5)), (grown / 3 * 30**0.5, 1 / (1 + 30**-0.5))]
    return [
        [(one["lambda_reg"] * by, weight) for by, weight in two]
        if one["lambda"] == "auto"
        else [(one["lambda_reg"], 1.0)]
        for one in solved
    ]


def averaged_inverse(matrix: Tensor, ridges: list[tuple[float, float]]) -> Tensor:
    """The weighted mean of the inverses of a matrix [k, k] with ridges."""
    eye = torch.eye(len(matrix)).double()
    return sum(weight * torch.linalg.inv(matrix + ridge * eye) for ridge, weight in ridges)


def explicit_fisher(
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    proj_dim: int,
    solved: list[dict[str, Any]],
    fisher: Fisher | None = None,
) -> Tensor:
    """The scores with the Fisher matrix, at the lambdas and training ridges of the checkpoints,
    float64 [n, m].
    """
    total = torch.zeros(len(train[0]), len(targets[0]), dtype=torch.float64)
    fisher = fisher or Fisher()
    ridges = ridges_of_mean(models, train, proj_dim, solved, fisher)
    for model_id, (model, found) in enumerate(zip(models, solved, strict=True)):
        matrix, of_likelihood, response = fisher_of(model, model_id, train, proj_dim, fisher)
        ridge = found["training_ridge"]
        if found["halved"] is not None:
            whole, half = (
                torch.linalg.solve(matrix + r * torch.eye(proj_dim).double(), response)
                for r in (ridge, 2 * ridge)
            )
            slopes = q(model, train)
            change = of_likelihood @ (half - whole) / slopes
            moved = 1 / (1 + (1 / slopes - 1) * change.exp())  # 1 - p
            of_likelihood *= (moved / slopes)[:, None]
        of_targets = in_metric(model, gradients(model, targets), fisher)
        of_targets = projected(of_targets, proj_dim, model_id)
        total += of_likelihood @ averaged_inverse(matrix, ridges[model_id]) @ of_targets.T
    return total / len(models)


def explicit_own(
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    proj_dim: int,
    ridges: list[list[tuple[float, float]]],
    fisher: Fisher | None = None,
) -> Tensor:
    """What samples do to their own log-likelihoods, at the ridges of the checkpoints, [n]."""
    total = torch.zeros(len(train[0]), dtype=torch.float64)
    for model_id, (model, of_model) in enumerate(zip(models, ridges, strict=True)):
        matrix, slopes, _ = fisher_of(model, model_id, train, proj_dim, fisher or Fisher())
        total += (slopes @ averaged_inverse(matrix, of_model) * slopes).sum(1)
    return total / len(models)


def small_blocks(setattr: Any = setattr) -> None:
    """Blocks, parts of sums and chunks of targets so small that tests have several of each.

    Shards are merged by twos.
    """
    setattr(features, "BLOCK_ROWS", 5)
    setattr(shards, "FAN", 2)
    setattr(scoring, "TARGET_ROWS", 2)
    setattr(finalizing, "PART_ROWS", 5)
    setattr(finalizing, "PART_ROWS_PER_DIM", 0)
    setattr(finalizing, "KERNEL_PART_BYTES", 1)


def make(
    model: nn.Module, save_dir: Path, n: int, task: Any = "image_classification", **options: Any
) -> TRAKer:
    """A TRAKer on the CPU."""
    settings = {"proj_dim": 8, "use_half_precision": False, "device": "cpu", **options}
    return TRAKer(model, task, n, save_dir=save_dir, **settings)


def loaded(model: nn.Module, save_dir: Path, n: int, *task: Any, **options: Any) -> TRAKer:
    """The same with the model's own weights as the checkpoint that is featurized."""
    traker = make(model, save_dir, n, *task, **options)
    traker.load_checkpoint(model.state_dict(), 0)
    return traker


def featurized(
    model: nn.Module, save_dir: Path, train: tuple[Tensor, Tensor], **options: Any
) -> TRAKer:
    """The same with the features of a training set."""
    traker = make(model, save_dir, len(train[0]), **options)
    featurize(traker, model, 0, train)
    return traker


def featurize(
    traker: TRAKer, model: nn.Module, model_id: int, train: tuple[Tensor, Tensor], batch: int = 7
) -> None:
    """One checkpoint over the whole training set."""
    traker.load_checkpoint(model.state_dict(), model_id)
    for rows in torch.arange(len(train[0]), device="cpu").split(batch):
        traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))


def score(
    traker: TRAKer,
    model: nn.Module,
    model_id: int,
    targets: tuple[Tensor, Tensor],
    exp_name: str = "test",
) -> None:
    """One checkpoint over all targets."""
    traker.start_scoring_checkpoint(exp_name, model.state_dict(), model_id, len(targets[0]))
    for rows in torch.arange(len(targets[0]), device="cpu").split(4):
        traker.score((targets[0][rows], targets[1][rows]), num_samples=len(rows))


def whole_run(
    save_dir: Path,
    models: list[nn.Module],
    train: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    **options: Any,
) -> np.ndarray:
    """Everything from features to scores."""
    traker = make(models[0], save_dir, len(train[0]), **options)
    models = [deepcopy(model) for model in models]  # checkpoints are loaded into the first
    for model_id, model in enumerate(models):
        featurize(traker, model, model_id, train)
    traker.finalize_features()
    for model_id, model in enumerate(models):
        traker.start_scoring_checkpoint("test", model.state_dict(), model_id, len(targets[0]))
        traker.score(targets, num_samples=len(targets[0]))
    scores = traker.finalize_scores("test")
    traker.model.load_state_dict(models[0].state_dict())
    return scores
