"""LogIX 0.1 (logix-ai): LoGra, per-sample gradients of a 64 x 64 bottleneck in each layer.

Compared: forward and backward with its hooks, gradients saved by its log saver. It takes linear
layers and 2-d convolutions; the other parameters are frozen, as it does itself. ``recommended`` has
its rank of 64, ``equal`` one with which all layers together keep at most K numbers.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.featurization.job import Job, Prepared
from bench.featurization.providers.layers import with_linear_layers
from bench.featurization.workloads import losses_of


def recommended(job: Job) -> Prepared:
    """Rank 64."""
    return log(job, lambda layers: 64)


def equal(job: Job) -> Prepared:
    """The rank that makes at most K numbers."""
    return log(job, lambda layers: max(1, math.isqrt(job.proj_dim // layers)))


def log(job: Job, rank_of: Any) -> Prepared:
    """LogIX with random projections of the rank that ``rank_of`` their number gives the layers."""
    from logix import LogIX, LogIXScheduler
    from logix.config import LoRAConfig

    logging.disable(logging.WARNING)
    model = with_linear_layers(job.model)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    config = Path(job.folder) / "config.yaml"
    config.write_text(f"root_dir: {job.folder}\n")
    run = LogIX(project="bench", config=str(config))
    run.set_lora_config(LoRAConfig(rank=rank_of(len(layers))))
    run.watch(model)
    scheduler = LogIXScheduler(run, lora="random", hessian="none", save="grad")
    next(iter(scheduler))
    kept = sum(p.numel() for name, p in model.named_parameters() if "logix_lora_B" in name)
    done = [0]

    def call(batch: dict[str, Tensor]) -> None:
        size = len(batch["labels"])
        model.zero_grad()
        with run(data_id=[str(number) for number in range(done[0], done[0] + size)]):
            losses_of(model, batch).sum().backward()
        done[0] += size

    return Prepared(call, kept)
