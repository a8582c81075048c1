"""What drawn rows of the Fisher matrix add to featurizing, where n is many times K.

    python -m bench.curvature_cost                     # n = 20 K = 10,240
    python -m bench.curvature_cost --times 2           # rows for all samples

Rows are drawn for 2 K samples. Two processes' worth of work run in turns in one process: TRAKer's
default curvature, and curvature="trak", which draws nothing. What is compared is CPU time in user
mode, on one thread: it is the same on a busy machine. The command fails where the median ratio is
above --limit.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.record import write_result
from fastproj import TRAKer
from fastproj.commands.arguments import positive

CURVATURES = ("trak", "auto")


def network() -> nn.Module:
    """A CNN of 75,000 parameters for 24 x 24 images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(576, 32)]
    return nn.Sequential(*layers).eval()


def user_seconds(curvature: str, data: tuple[Tensor, Tensor], proj_dim: int, batch: int) -> float:
    """CPU seconds of this process for the featurization of all samples."""
    model, count = network(), len(data[0])
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model,
            "image_classification",
            count,
            folder,
            proj_dim=proj_dim,
            curvature=curvature,
            logging_level="ERROR",
        )
        traker.load_checkpoint(model.state_dict(), 0)
        start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        for rows in torch.arange(count).split(batch):
            traker.featurize((data[0][rows], data[1][rows]), num_samples=len(rows))
        return resource.getrusage(resource.RUSAGE_SELF).ru_utime - start


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
    seconds: dict[str, list[float]] = {name: [] for name in CURVATURES}
    for _ in tqdm(range(options.repeats), unit="turn", disable=None):
        for name, values in seconds.items():
            values.append(user_seconds(name, data, options.proj_dim, options.batch))
    ratios = [own / plain for own, plain in zip(seconds["auto"], seconds["trak"], strict=True)]
    text = (
        f"n = {count}, K = {options.proj_dim}, batches of {options.batch}: user seconds "
        f"{median(seconds['trak']):.1f} without drawn rows, {median(seconds['auto']):.1f} with: "
        f"{median(ratios):.3f} times ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(text)
    if options.save:
        settings = {name: getattr(options, name) for name in ("proj_dim", "times", "batch")}
        print(write_result("curvature-cost", {**settings, "user_seconds": seconds}, text))
    return int(median(ratios) > options.limit)


if __name__ == "__main__":
    sys.exit(main())
