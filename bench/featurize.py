"""Times TRAK's features: samples per second and peak memory, fastproj beside trak 0.3.2.

    python -m bench.featurize               a ResNet-9 of 5.1M parameters, k = 2048, batches of 32
    python -m bench.featurize --quick       k = 64, batches of 4: seconds, and no result file

Every provider runs in a process of its own, on the same model, data and number of threads, through
its package's public calls: TRAKer(...), load_checkpoint, featurize. Times are of whole `featurize`
calls, writing to disk included; the median counts. The share of the projection is that of the time
inside `projector.project`. Memory is the peak resident set of the process, and that less what it
had before the TRAKer was made. The features of fastproj's gradient computers are compared with each
other; a provider whose features differ is an error.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bench.record import in_fresh_process, write_result
from bench.resnet9 import resnet9
from fastproj.commands.arguments import positive

TARGET_SPEEDUP = 5.0
PROVIDERS = {
    "fastproj": "fastproj, default (hooks)",
    "fastproj-func": "fastproj, torch.func",
    "fastproj-loop": "fastproj, loop",
    "traker": "trak 0.3.2, float32",
}
COMPUTERS = {"fastproj": "auto", "fastproj-func": "func", "fastproj-loop": "loop"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=positive, help="samples in a call of featurize: 32")
    parser.add_argument("--proj-dim", type=positive, help="2048")
    parser.add_argument("--repeats", type=positive, default=5, help="timed calls of fastproj")
    parser.add_argument(
        "--traker-repeats", type=positive, default=1, help="timed calls of trak: a minute or more"
    )
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=None)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument("--worker", choices=list(PROVIDERS), help=argparse.SUPPRESS)
    return parser


# ---- one provider, in its own process -----------------------------------------------------------


def peak_mib() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def batch_of(size: int, number: int) -> list[Tensor]:
    """Images [B, 3, 32, 32] and labels [B]."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return [images, torch.randint(0, 10, (size,), generator=generator)]


def make_traker(provider: str, n: int, proj_dim: int, save_dir: str) -> Any:
    """The TRAKer of a provider, with its defaults but for what is asked for."""
    torch.manual_seed(0)
    model = resnet9().eval()
    common: dict[str, Any] = {
        "model": model,
        "task": "image_classification",
        "train_set_size": n,
        "proj_dim": proj_dim,
        "save_dir": save_dir,
        "device": "cpu",
        "logging_level": "ERROR",
    }
    if provider == "traker":
        from trak import TRAKer as Trak

        return Trak(**common, use_half_precision=False)  # its float16 is far slower on a CPU
    from fastproj import TRAKer

    return TRAKer(**common, gradient_computer=COMPUTERS[provider])


def timed(function: Callable[..., Any], total: list[float]) -> Callable[..., Any]:
    """``function``, adding the seconds of each call to ``total[0]``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        total[0] += time.perf_counter() - start
        return result

    return run


def work(provider: str, batch: int, proj_dim: int, repeats: int) -> dict[str, Any]:
    """Featurize ``repeats`` batches after one that doesn't count."""
    before = peak_mib()
    warm = batch if provider != "traker" else 1  # trak draws the whole matrix for one sample too
    with tempfile.TemporaryDirectory() as save_dir:
        n = warm + repeats * batch
        traker = make_traker(provider, n, proj_dim, save_dir)
        traker.load_checkpoint(traker.model.state_dict(), model_id=0)
        inside = [0.0]
        traker.projector.project = timed(traker.projector.project, inside)
        start = time.perf_counter()
        traker.featurize(batch_of(warm, 0), inds=np.arange(warm))
        warm_seconds = time.perf_counter() - start
        seconds, projecting = [], []
        for number in range(repeats):
            data = batch_of(batch, number + 1)
            inds = np.arange(batch) + warm + number * batch
            inside[0] = 0.0
            start = time.perf_counter()
            traker.featurize(data, inds=inds)
            seconds.append(time.perf_counter() - start)
            projecting.append(inside[0])
        norms: list[float] = []
        if provider != "traker":
            norms = traker.saver.matrix(0)[warm : warm + 3].norm(dim=1).tolist()
    middle = median(seconds)
    return {
        "provider": provider,
        "batch": batch,
        "proj_dim": proj_dim,
        "parameters": sum(p.numel() for p in traker.model.parameters()),
        "computer": getattr(traker.gradient_computer, "name", None),
        "seconds": seconds,
        "warm_up_seconds": warm_seconds,
        "projection_seconds": projecting,
        "samples_per_second": batch / middle,
        "projection_share": median(projecting) / middle,
        "peak_mib": peak_mib(),
        "before_mib": before,
        "norms": norms,
    }


# ---- all of them --------------------------------------------------------------------------------


def run_worker(provider: str, batch: int, proj_dim: int, repeats: int) -> dict[str, Any]:
    """``work`` in a fresh process."""
    sizes = ("--batch", batch, "--proj-dim", proj_dim, "--repeats", repeats)
    result: dict[str, Any] = in_fresh_process("featurize", "--worker", provider, *sizes)
    return result


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """One line for each provider."""
    print(
        f"\n{'':<34}{'samples/s':>10}{'s/batch':>9}{'projection':>12}{'peak MiB':>10}{'added':>8}"
    )
    for row in rows:
        print(
            f"{PROVIDERS[row['provider']]:<34}{row['samples_per_second']:>10.2f}"
            f"{median(row['seconds']):>9.2f}{row['projection_share']:>12.0%}"
            f"{row['peak_mib']:>10.0f}{row['peak_mib'] - row['before_mib']:>8.0f}"
        )


def agree(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether fastproj's providers found features of the same norms."""
    norms = [np.array(row["norms"]) for row in rows if row["norms"]]
    return all(np.allclose(other, norms[0], rtol=2e-3) for other in norms[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when the target is missed or features differ."""
    options = build_parser().parse_args(argv)
    batch = options.batch or (4 if options.quick else 32)
    proj_dim = options.proj_dim or (64 if options.quick else 2048)
    if options.worker:
        print(json.dumps(work(options.worker, batch, proj_dim, options.repeats)))
        return 0
    providers = options.provider or list(PROVIDERS)
    rows = []
    for provider in tqdm(providers, desc="providers", leave=False, disable=None):
        repeats = options.traker_repeats if provider == "traker" else options.repeats
        rows.append(run_worker(provider, batch, proj_dim, repeats))
    print(
        f"ResNet-9, {rows[0]['parameters']:,} parameters, k = {proj_dim}, batches of {batch}, "
        f"{torch.get_num_threads()} threads"
    )
    print_table(rows)
    verdict = None
    found = {row["provider"]: row for row in rows}
    if "fastproj" in found and "traker" in found:
        ours, theirs = found["fastproj"], found["traker"]
        speedup = ours["samples_per_second"] / theirs["samples_per_second"]
        memory = ours["peak_mib"] / theirs["peak_mib"]
        verdict = speedup >= TARGET_SPEEDUP and memory < 1
        print(
            f"\n{'PASS' if verdict else 'FAIL'}: {speedup:.1f}x the samples per second of trak "
            f"(target {TARGET_SPEEDUP:g}x) in {memory:.2f}x its memory (target below 1)"
        )
    same = agree(rows)
    if not same:
        print("FAIL: fastproj's gradient computers found different features")
    if not options.no_write and not options.quick:
        print(f"\nwrote {write_result('featurize', {'options': vars(options), 'rows': rows})}")
    return 0 if same and verdict is not False else 1


if __name__ == "__main__":
    sys.exit(main())
