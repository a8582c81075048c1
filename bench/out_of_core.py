"""Finalising and scoring features that are larger than memory should hold: time, and peak memory.

    python -m bench.out_of_core                                   # n = 131,072, k = 4096
    python -m bench.out_of_core --samples 1000000 --repeats 1     # 8 GB of features
    python -m bench.out_of_core --curvature fisher --samples 50000 --proj-dim 32768 --alone

Synthetic features are written as `TRAKer.featurize` writes them (float16, 512 samples a file), for
"fisher" with drawn rows. `finalize_features`, lambda included, `finalize_scores` and
`finalize_scores(top_k=100)` then run in a process of their own whose peak resident set is printed,
and the most that its directory held. Beside them, in the same process and in turns: reading the
same files once, and the same matrix products at torch's rate (blocks of 2,048 float32 rows that are
in memory already); `--alone` leaves these out. The page cache is emptied of the files before each
reading, where the system allows it. The directory is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bench.featurization.memory import peak_mib
from bench.record import end_with, in_fresh_process, write_result
from fastproj import TRAKer
from fastproj.commands.arguments import positive
from fastproj.trak import AbstractModelOutput
from fastproj.trak.files import Indices
from fastproj.trak.solving.systems import FISHER, TRAK
from fastproj.trak.store.features import BLOCK_ROWS
from fastproj.trak.store.store import DRAWN

SHARD_ROWS = 512
TOP_K = 100
KINDS = ("sjlt", "rademacher", "gaussian")
LOOK = 0.1  # seconds between looks at the directory


class Given(AbstractModelOutput):
    """A task that is never asked: the features are there."""

    def get_output(self, *_: Any) -> torch.Tensor:
        """Not called."""
        raise NotImplementedError

    def get_out_to_loss_grad(self, *_: Any) -> torch.Tensor:
        """Not called."""
        raise NotImplementedError


def make(save_dir: Path, options: argparse.Namespace) -> tuple[TRAKer, dict[str, torch.Tensor]]:
    """A TRAKer of a tiny model, and its checkpoint."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    fisher = options.curvature == FISHER
    traker = TRAKer(
        model,
        "image_classification" if fisher else Given(),
        options.samples,
        save_dir,
        proj_dim=options.proj_dim,
        logging_level="WARNING",
        kind=options.kind,
        curvature=options.curvature,
    )
    return traker, model.state_dict()


def write_features(save_dir: Path, options: argparse.Namespace) -> None:
    """Features of all samples through the store, as featurizing would leave them."""
    traker, checkpoint = make(save_dir, options)
    traker.load_checkpoint(checkpoint, 0)
    samples, generator = options.samples, torch.Generator().manual_seed(0)
    for start in tqdm(range(0, samples, SHARD_ROWS), desc="writing features", disable=None):
        inds = np.arange(start, min(start + SHARD_ROWS, samples))
        features = torch.randn(len(inds), options.proj_dim, generator=generator)
        q = torch.rand(len(inds), generator=generator).square()  # of a model that has fitted most
        columns = {}
        if options.curvature == FISHER:
            columns = write_drawn(traker, inds, q, generator)
        traker.saver.write_shard(0, inds, inds, features, q, columns=columns)


def write_drawn(
    traker: TRAKer, inds: Indices, q: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Drawn rows of some samples, one each; what is kept of the samples beside their Q."""
    some = torch.from_numpy(traker.has_drawn_rows(inds))
    chosen = inds[some.numpy()]
    if len(chosen):
        rows = q[some].sqrt().unsqueeze(1) * torch.randn(
            len(chosen), traker.proj_dim, generator=generator
        )
        values = torch.randn(len(chosen), generator=generator)
        traker.saver.write_shard(0, chosen, chosen, rows, values, DRAWN)
    log_odds = torch.log1p(-q) - q.clamp(min=1e-6).log()
    return {"curvature": q, "along": log_odds, "drawn": some.float()}


def write_targets(save_dir: Path, options: argparse.Namespace) -> None:
    """Features of the targets, once the checkpoint is finalised."""
    traker, checkpoint = make(save_dir, options)
    targets = options.targets
    traker.start_scoring_checkpoint("bench", checkpoint, 0, targets)
    generator = torch.Generator().manual_seed(1)
    inds = np.arange(targets)
    features = torch.randn(targets, options.proj_dim, generator=generator)
    traker.saver.write_shard(0, inds, inds, features, exp_name="bench")


# ---- what is timed ------------------------------------------------------------------------------


def feature_files(save_dir: Path) -> list[Path]:
    """The files of the samples' features and of the drawn rows."""
    folder = save_dir / "models" / "0"
    return sorted(path for name in ("train-*", "drawn-*") for path in folder.rglob(name))


def matrix_files(save_dir: Path) -> list[Path]:
    """What finalising leaves."""
    names = ("weighted", "fisher", "fisher_kernel")
    paths = [save_dir / "models" / "0" / f"{name}.safetensors" for name in names]
    return [path for path in paths if path.exists()]


def forget_pages(save_dir: Path) -> None:
    """Drop the features from the page cache, so that they are read from the disk."""
    for path in feature_files(save_dir):
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_once(save_dir: Path) -> None:
    """Every byte of the features' files, into memory that is used again."""
    buffer = bytearray(64 << 20)
    for path in feature_files(save_dir):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def multiply_gram(samples: int, proj_dim: int) -> None:
    """The product of XtX, block by block, at torch's rate."""
    block = torch.randn(BLOCK_ROWS, proj_dim)
    out = torch.empty(proj_dim, proj_dim)
    for _ in range(-(-samples // BLOCK_ROWS)):
        torch.mm(block.mT, block, out=out)


def multiply_scores(samples: int, proj_dim: int, targets: int) -> None:
    """The product of the scores, block by block, at torch's rate."""
    block, weights = torch.randn(BLOCK_ROWS, proj_dim), torch.randn(targets, proj_dim)
    out = torch.empty(BLOCK_ROWS, targets)
    for _ in range(-(-samples // BLOCK_ROWS)):
        torch.mm(block, weights.mT, out=out)


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(save_dir: Path, options: argparse.Namespace) -> None:
    """Print JSON: seconds of each part, the peak resident set of finalising and scoring, disk."""
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any], *arguments: Any, cold: bool = True) -> None:
        if cold:
            forget_pages(save_dir)
        times.setdefault(name, []).append(seconds(function, *arguments))

    traker, _ = make(save_dir, options)
    sizes = options.samples, options.proj_dim
    before = peak_bytes()
    with watched(save_dir) as disk:
        for _ in tqdm(range(options.repeats), desc="measuring", unit="turn", disable=None):
            for path in matrix_files(save_dir):
                path.unlink()
            timed("finalize_features", traker.finalize_features)
            write_targets(save_dir, options)
            timed("finalize_scores", traker.finalize_scores, "bench")
            timed("finalize_scores top_k", lambda: traker.finalize_scores("bench", top_k=TOP_K))
            found = {"times": times, "before": before, "after": peak_bytes()}
            if not options.alone:
                timed("read", read_once, save_dir)
                timed("gram matmul", multiply_gram, *sizes, cold=False)
                timed("score matmul", multiply_scores, *sizes, options.targets, cold=False)
    found["features"] = sum(path.stat().st_size for path in feature_files(save_dir))
    print(json.dumps({**found, "disk": disk[0]}), flush=True)


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that the files of a folder had together, in a list of one."""
    most, ended = [0], threading.Event()

    def look() -> None:
        while not ended.wait(LOOK):
            most[0] = max(most[0], size_of(folder))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        most[0] = max(most[0], size_of(folder))


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder; those that go meanwhile count or don't."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def peak_bytes() -> int:
    """Peak resident set of this process so far; not of the process that started it."""
    return round(peak_mib() * 2**20)


def main(argv: Sequence[str] | None = None) -> None:
    """Write, measure, print, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=positive, default=131_072)
    parser.add_argument("--proj-dim", type=positive, default=4096)
    parser.add_argument("--targets", type=positive, default=128)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--curvature", choices=[TRAK, FISHER], default=TRAK)
    parser.add_argument("--kind", choices=KINDS, default="sjlt", help="what the store says it is")
    parser.add_argument("--alone", action="store_true", help="without what it is compared with")
    parser.add_argument("--dir", type=Path, help="where there is room; default: the system's")
    parser.add_argument("--keep", type=Path, help="write the features here, or use what is there")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        measure(options.measure, options)
        return
    folder = options.keep or Path(tempfile.mkdtemp(prefix="out-of-core-", dir=options.dir))
    try:
        if not feature_files(folder):
            write_features(folder, options)
        found = run(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    report(found, options)


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in a fresh process."""
    words: list[object] = ["--measure", folder.resolve()]
    for name in ("samples", "proj_dim", "targets", "repeats", "curvature", "kind"):
        words += [f"--{name.replace('_', '-')}", getattr(options, name)]
    words += ["--alone"] if options.alone else []
    found: dict[str, Any] = in_fresh_process("out_of_core", *words)
    return found


def report(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the table; keep it where asked to."""
    n, k, m = options.samples, options.proj_dim, options.targets
    middle = {name: median(values) for name, values in found["times"].items()}
    gigabytes = {name: found[name] / 1e9 for name in ("features", "disk")}
    print(f"{options.curvature}: n = {n:,}, k = {k}, m = {m}")
    print(f"{'':<26}{'seconds':>10}{'read + matmul':>16}{'ratio':>8}")
    ratios = {}
    for name, product in (
        ("finalize_features", "gram matmul"),
        ("finalize_scores", "score matmul"),
        ("finalize_scores top_k", "score matmul"),
    ):
        line = f"{name:<26}{middle[name]:>10.2f}"
        if not options.alone:
            bound = middle["read"] + middle[product]
            ratios[name] = middle[name] / bound
            line += f"{bound:>16.2f}{ratios[name]:>8.2f}"
        print(line)
    for name in () if options.alone else ("read", "gram matmul", "score matmul"):
        print(f"{name:<26}{middle[name]:>10.2f}")
    print(
        f"peak resident set {found['after'] / 2**20:,.0f} MiB; {found['before'] / 2**20:,.0f} MiB"
    )
    print("of that before the first call: Python and torch")
    print(f"on disk {gigabytes['disk']:.2f} GB at most, of features {gigabytes['features']:.2f} GB")
    if options.save:
        content = {
            "n": n,
            "k": k,
            "m": m,
            "curvature": options.curvature,
            "kind": options.kind,
            "feature_bytes": found["features"],
            "disk_bytes": found["disk"],
            "seconds": found["times"],
            "ratios": ratios,
            "peak_resident_bytes": found["after"],
            "peak_resident_bytes_before": found["before"],
        }
        print(write_result("out-of-core", content))


if __name__ == "__main__":
    end_with(main)
