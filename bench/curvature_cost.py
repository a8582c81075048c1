"""What drawn rows of the Fisher matrix add to featurizing, where n is many times K.

    python -m bench.curvature_cost                     # n = 20 K = 10,240
    python -m bench.curvature_cost --times 2           # rows for all samples

Rows are drawn for 2 K samples. TRAKer's default curvature, and curvature="trak", which draws
nothing, featurize the same data batch by batch in turns, so that a processor whose speed changes
changes it for both. What is compared is CPU time on one thread. The command fails where the median
ratio is above --limit.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.record import end_with, write_result
from fastproj import TRAKer
from fastproj.commands.arguments import positive

CURVATURES = ("trak", "auto")


def network() -> nn.Module:
    """A CNN of 75,000 parameters for 24 x 24 images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32)]
    return nn.Sequential(*layers).eval()


def cpu_seconds(data: tuple[Tensor, Tensor], proj_dim: int, batch: int) -> dict[str, float]:
    """CPU seconds for the featurization of all samples, by curvature; they take turns by batch."""
    models = {curvature: network() for curvature in CURVATURES}
    count = len(data[0])
    seconds = dict.fromkeys(CURVATURES, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        trakers = {
            curvature: TRAKer(
                model,
                "image_classification",
                count,
                f"{folder}/{curvature}",
                proj_dim=proj_dim,
                curvature=curvature,
                logging_level="ERROR",
            )
            for curvature, model in models.items()
        }
        for curvature, traker in trakers.items():
            traker.load_checkpoint(models[curvature].state_dict(), 0)
        for rows in torch.arange(count).split(batch):
            for curvature, traker in trakers.items():
                start = time.process_time()
                traker.featurize((data[0][rows], data[1][rows]), num_samples=len(rows))
                seconds[curvature] += time.process_time() - start
    return seconds


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--proj-dim", type=positive, default=512, metavar="K")
    parser.add_argument("--times", type=positive, default=20, help="n / K")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--limit", type=float, default=1.1, help="of the ratio")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    count = options.times * options.proj_dim
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randn(count, 3, 24, 24, generator=generator),
        torch.randint(0, 32, (count,), generator=generator),
    )
    cpu_seconds((data[0][:64], data[1][:64]), options.proj_dim, options.batch)  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in CURVATURES}
    for _ in tqdm(range(options.repeats), unit="turn", disable=None):
        found = cpu_seconds(data, options.proj_dim, options.batch)
        for name, values in seconds.items():
            values.append(found[name])
    ratios = [own / plain for own, plain in zip(seconds["auto"], seconds["trak"], strict=True)]
    text = (
        f"n = {count}, K = {options.proj_dim}, batches of {options.batch}: CPU seconds "
        f"{median(seconds['trak']):.1f} without drawn rows, {median(seconds['auto']):.1f} with: "
        f"{median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(text)
    if options.save:
        settings = {name: getattr(options, name) for name in ("proj_dim", "times", "batch")}
        print(write_result("curvature-cost", {**settings, "cpu_seconds": seconds}, text))
    return int(median(ratios) > options.limit)


if __name__ == "__main__":
    end_with(main)
