"""TRAK in several processes: the script of one process, started by torchrun.

    python examples/distributed.py                                # one process
    torchrun --nproc-per-node 2 examples/distributed.py           # two, or one for each GPU
    torchrun --nproc-per-node 2 examples/distributed.py --sharded # gradients of a sharded model

Nothing in the first part knows of processes: each skips the batches that are another's. Stop it at
any time, and start it again with any number of processes: it goes on from --out.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastproj import Projector, TRAKer


def load_data(train: int, targets: int) -> tuple[TensorDataset, TensorDataset]:
    """Training digits and digits to explain: 64 pixels in 0..1, and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    cut = slice(train, train + targets)
    return TensorDataset(pixels[:train], labels[:train]), TensorDataset(pixels[cut], labels[cut])


def make_model() -> nn.Sequential:
    """A small classifier."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def train_model(data: TensorDataset, seed: int) -> dict[str, torch.Tensor]:
    """A state dict; every process trains the same model."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(data.tensors[0]), data.tensors[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def attribute(options: argparse.Namespace) -> None:
    """Features, scores and the most helpful samples of the targets."""
    train, targets = load_data(options.train, options.targets)
    checkpoints = [train_model(train, seed) for seed in range(2)]
    traker = TRAKer(
        model=make_model(),
        task="image_classification",
        train_set_size=len(train),
        save_dir=options.out,
        proj_dim=options.proj_dim,
    )
    for model_id, checkpoint in enumerate(checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        # This process's share, less what is there: what others do is not even loaded. The plain
        # loop, with num_samples=len(batch[0]), is shared out as well.
        todo = traker.remaining_batches(32)
        for inds, batch in zip(todo, DataLoader(train, batch_sampler=todo), strict=True):
            traker.featurize(batch, inds=inds)
    traker.finalize_features()

    for model_id, checkpoint in enumerate(checkpoints):
        traker.start_scoring_checkpoint("held_out", checkpoint, model_id, len(targets))
        for batch in DataLoader(targets, batch_size=8):
            traker.score(batch, num_samples=len(batch[0]))
    scores = traker.finalize_scores("held_out")  # [n_train, n_targets]
    top = traker.finalize_scores("held_out", top_k=5)
    if traker.ranks.first:
        same = train.tensors[1][top.helpful_indices[:, 0]] == targets.tensors[1]
        print(f"scores {list(scores.shape)}, norm {np.linalg.norm(scores):.5g}")
        print(f"the most helpful sample has the target's label: {same.float().mean():.0%}")


def project_a_sharded_model() -> None:
    """Gradients under FSDP2, that no process has whole, beside those of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from fastproj.trak.sharded import project_sharded

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole = make_model()
    model = make_model()
    model.load_state_dict(whole.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    projector = Projector(sum(p.numel() for p in whole.parameters()), proj_dim=256)

    for net in (model, whole):
        net(torch.ones(1, 64)).logsumexp(1).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}  # DTensors
    features = project_sharded(projector, grads, batched=False)  # [1, 256], on every process
    exact = projector.project([p.grad.unsqueeze(0) for p in whole.parameters()])
    if dist.get_rank() == 0:
        error = float((features - exact).abs().max() / exact.abs().max())
        print(f"{grads['0.weight'].placements}: largest difference {error:.1e}")
    dist.destroy_process_group()


def main() -> None:
    """Choose the part."""
    parser = argparse.ArgumentParser(description="TRAK in several processes.")
    parser.add_argument("--out", type=Path, default=Path("fastproj-demo-distributed"))
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--targets", type=int, default=40)
    parser.add_argument("--proj-dim", type=int, default=256)
    parser.add_argument("--sharded", action="store_true", help="gradients of a model under FSDP2")
    options = parser.parse_args()
    if options.sharded:
        if "RANK" not in os.environ:
            raise SystemExit("start it with torchrun --nproc-per-node 2 ... --sharded")
        project_a_sharded_model()
    else:
        attribute(options)


if __name__ == "__main__":
    main()
