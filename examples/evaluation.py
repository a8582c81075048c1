"""Are the scores any good? Four answers, on digits of which some have a wrong label.

    python examples/evaluation.py [--out evaluation-example] [--jobs 2]

Scores 200 training digits with TRAK, then asks: do the scores predict models trained on random
halves (LDS), models that miss one sample (leave-one-out), predictions without their best support
(brittleness), and do they find the wrong labels (AUC)?

`train` and `outputs` make this file a recipe, so that the commands do the same on a score file:

    fastproj lds examples/evaluation.py --scores evaluation-example/trak/scores/held_out.mmap
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from fastproj.trak import (
    TRAKer,
    all_but,
    brittleness,
    lds,
    loo_correlation,
    mislabel_auc,
    most_helpful,
    random_subsets,
    train_subsets,
)

N, M = 200, 30

digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.data))
X = torch.tensor(digits.data[order] / 16, dtype=torch.float32)
y = torch.tensor(digits.target[order])
flipped = np.arange(N) % 10 == 0  # the label of every tenth training digit is wrong
y[:N][flipped] = (y[:N][flipped] + 1) % 10
train_set, targets = (X[:N], y[:N]), (X[N : N + M], y[N : N + M])


def train(indices: np.ndarray, seed: int) -> torch.nn.Module:
    """A model trained on some of the training samples."""
    model = torch.nn.Linear(64, 10)  # a model with a random start would get it from the seed
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    images, labels = train_set[0][indices], train_set[1][indices]
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in model.parameters())
        value = F.cross_entropy(model(images), labels, reduction="sum") + 0.5 * decay
        value.backward()
        return value

    optimizer.step(loss)
    return model


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """The margin of each target: positive where the model is right."""
    logits = model(targets[0]).detach()
    right = logits.gather(1, targets[1][:, None])
    others = logits.scatter(1, targets[1][:, None], -torch.inf).logsumexp(1)
    return right[:, 0] - others


def attribute(save_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """TRAK scores [n, m] of the targets, and [n] of the training samples on themselves."""
    checkpoint = train(np.arange(N), seed=0).state_dict()
    traker = TRAKer(
        torch.nn.Linear(64, 10), "image_classification", N, save_dir, proj_dim=256,
        logging_level="WARNING",
    )  # fmt: skip
    traker.load_checkpoint(checkpoint, model_id=0)
    traker.featurize(train_set, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("held_out", checkpoint, model_id=0, num_targets=M)
    traker.score(targets, num_samples=M)
    return traker.finalize_scores("held_out"), traker.self_influence()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("evaluation-example"))
    parser.add_argument("--jobs", type=int, default=1, help="models trained at once")
    options = parser.parse_args()
    scores, self_influence = attribute(options.out / "trak")
    # All models go to one directory: each is known by the samples that it was trained on.
    settings = {"recipe": __file__, "directory": options.out / "models", "jobs": options.jobs}

    truth = train_subsets(masks=random_subsets(N, 40), **settings)
    print(lds(scores, truth.masks, truth.mean))

    removed = np.random.default_rng(1).permutation(N)[:30]
    truth = train_subsets(masks=all_but(N, removed), **settings)
    print(loo_correlation(scores, removed, truth.mean))

    sizes, count = [5, 20], 10
    helpful = most_helpful(scores, max(sizes), range(count))  # [targets, 20]
    without = [helpful[t, :size] for size in sizes for t in range(count)]
    truth = train_subsets(masks=all_but(N, [np.empty(0, int), *without]), **settings)
    base, changed = truth.mean[0, :count], truth.mean[1:].reshape(len(sizes), count, M)
    print(brittleness(changed[:, range(count), range(count)], base, sizes))

    print(mislabel_auc(self_influence, flipped))


if __name__ == "__main__":
    main()
