"""bergson 2.5: GradientCollector, both sides of each layer projected.

Compared: forward and backward with its hooks, and writing to its index. It takes layers on
[B, T, n]: no embeddings, norms, biases, convolutions or pooled heads. ``recommended`` keeps 16 x 16
numbers of each layer, ``equal`` so many that all together are at most K.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.featurization.job import Job, Prepared, Unsupported
from bench.featurization.providers.layers import called_on_positions, output_layer
from bench.featurization.workloads import losses_of


def recommended(job: Job) -> Prepared:
    """16 x 16 numbers of each layer."""
    return collect(job, lambda layers: 16)


def equal(job: Job) -> Prepared:
    """As many numbers of each layer as make at most K."""
    return collect(job, lambda layers: max(1, math.isqrt(job.proj_dim // layers)))


def collect(job: Job, side_of: Any) -> Prepared:
    """Its collector on all layers that it takes; ``side_of`` their number is the dimension."""
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor, LayerAdapter
    from datasets import Dataset

    model: Any = job.model
    fitting = called_on_positions(model, job.first)
    kinds = LayerAdapter.supported_modules
    head = output_layer(model)
    layers = {
        name
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and name in fitting and layer is not head
    }
    if not layers:
        raise Unsupported("bergson takes layers on [B, T, n] only")
    side = side_of(len(layers))
    config = IndexConfig(run_path=str(Path(job.folder) / "index"), projection_dim=side)
    config.partial_run_path.mkdir(parents=True)
    collector = GradientCollector(
        model=model,
        target_modules=layers,
        processor=GradientProcessor(projection_dim=side),
        data=Dataset.from_dict({"input_ids": [[0]] * job.count}),
        cfg=config,
    )
    done = [0]

    def call(batch: dict[str, Tensor]) -> None:
        with collector.with_batch(None):
            losses = losses_of(model, batch)
            losses.sum().backward()
            model.zero_grad()
        collector.process_batch(list(range(done[0], done[0] + len(losses))), losses=losses)
        done[0] += len(losses)

    return Prepared(call, side * side * len(layers))
