"""Many small models trained at once, each on samples of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from fastproj.trak.progress import progress

Ensemble = dict[str, Tensor]  # parameter name -> [M, *shape]
# (parameters of M models, a batch of training samples for each [M, b]) -> the sum of the M losses
Loss = Callable[[Ensemble, Tensor], Tensor]


@dataclass(frozen=True)
class Training:
    """SGD with momentum 0.9; the rate rises over the first fifth and then falls to zero."""

    epochs: int
    batch: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 2e-3
    clip: float = 0.0  # largest norm of a model's gradient; 0: any


def split(
    x: Tensor, y: Tensor, n: int, targets: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n random samples to train on, x [n, ...] and y [n], and ``targets`` others."""
    if n + targets > len(x):
        raise ValueError(f"split: received n={n}, targets={targets}; expected <= {len(x)} together")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed), device="cpu")
    chosen, held_out = order[:n], order[len(x) - targets :]
    return x[chosen], y[chosen], x[held_out], y[held_out]


def random_halves(n: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(members [count, n // 2], masks [count, n] bool) of random halves of n training samples."""
    noise = torch.rand(count, n, generator=torch.Generator().manual_seed(seed), device="cpu")
    members = noise.argsort(1)[:, : n // 2].contiguous()
    masks = torch.zeros(count, n, dtype=torch.bool, device="cpu").scatter_(1, members, True)
    return members, masks


def train_ensemble(
    start: Ensemble,
    members: Tensor,
    make_loss: Callable[[], Loss],
    training: Training,
    *,
    group: int,
    seed: int,
    what: str,
) -> Ensemble:
    """Train M models from ``start``, model j on the training samples ``members[j]`` [M, s].

    ``group`` models are trained at once, each group in a thread with torch on one core: small
    products gain nothing from threads inside, and on a busy machine lose much. The result doesn't
    depend on how many cores there are.

    Parameters
    ----------
    make_loss : makes the loss of a group, in the thread that trains it.
    what : names the progress bar.
    """
    groups = torch.arange(len(members), device="cpu").split(group)
    threads = torch.get_num_threads()
    stopped = threading.Event()
    bar = progress(what, len(groups) * training.epochs, "epoch")

    def count_epoch() -> None:
        if not stopped.is_set():
            bar.update(1)

    with bar, ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            jobs = [
                pool.submit(
                    train_group,
                    {name: p[rows] for name, p in start.items()},
                    members[rows],
                    make_loss,
                    training,
                    torch.Generator().manual_seed(seed * 1009 + number),
                    count_epoch,
                    stopped,
                )
                for number, rows in enumerate(groups)
            ]
            finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in finished:
                job.result()  # raises what it raised
            trained = [job.result() for job in jobs]
        finally:
            stopped.set()  # where an error or Ctrl-C ended the wait, threads end at their next step
            torch.set_num_threads(threads)
    return {name: torch.cat([params[name] for params in trained]) for name in trained[0]}


def train_group(
    start: Ensemble,
    members: Tensor,
    make_loss: Callable[[], Loss],
    training: Training,
    generator: torch.Generator,
    count_epoch: Callable[[], object],
    stopped: threading.Event,
) -> Ensemble:
    """Train models at once from ``start``, model j on the samples ``members[j]`` [M, s].

    Calls ``count_epoch`` after each epoch, and returns early once ``stopped`` is set.
    """
    loss = make_loss()
    count, size = members.shape
    params = {name: p.clone().requires_grad_() for name, p in start.items()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    batch = min(training.batch, size)
    steps = size // batch
    total, step = steps * training.epochs, 0
    for _ in range(training.epochs):
        noise = torch.rand(count, size, generator=generator, device="cpu")
        shuffled = members.gather(1, noise.argsort(1))
        for rows in shuffled.split(batch, 1)[:steps]:  # [M, batch]
            if stopped.is_set():
                return params
            done = (step + 1) / total
            rate = training.learning_rate * min(done / 0.2, (1 - done) / 0.8)
            grads = torch.autograd.grad(loss(params, rows), list(params.values()))
            with torch.no_grad():
                if training.clip:
                    squares = [g.flatten(1).square().sum(1) for g in grads]
                    norm = sum(squares[1:], squares[0]).sqrt()
                    shrink = (training.clip / norm).clamp(max=1)  # [M]
                    grads = tuple(g * shrink.reshape(-1, *[1] * (g.dim() - 1)) for g in grads)
                for (name, p), g in zip(params.items(), grads, strict=True):
                    velocity[name].mul_(0.9).add_(g).add_(p, alpha=training.weight_decay)
                    p.sub_(velocity[name], alpha=rate)
            step += 1
        count_epoch()
    return {name: p.detach() for name, p in params.items()}
