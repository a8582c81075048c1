"""Times featurization at real model sizes: fastproj and others, against forward and backward.

    python -m bench.featurize                    all models, K = 2048 and 4096
    python -m bench.featurize --model gpt_36m    one model
    python -m bench.featurize --quick            tiny models: a minute or two, nothing is judged

A provider featurizes batches of training samples through its package's public calls. Each runs in
a process of its own, on the same model, batches and number of threads. Before each of its calls
comes a plain forward and backward of the same batch (the mean loss, gradients of all parameters);
"x plain" is the median time over the median time of these. Memory is the peak resident set during
the provider's calls, over that of the process during plain forward and backward before the
provider was made. Models are in eval mode, their weights random, but for minilm's.

fastproj's times are of whole calls of TRAKer.featurize, writing to disk included, and of features
alone (curvature="trak"): the default curvature draws for at most 2 K samples of a training set,
which "default" does for each. Batches 1, 2, 4, 8 ... are checked against plain autograd: the first
four don't count for the time, but for the memory. Others: see bench/featurization/providers, where
each file says what is compared.

With --in-turn, all providers share one process and take turns batch by batch, in an order that
changes. That tells small differences of time apart where the machine's speed wanders. Memory and
norms are not looked at.

A provider that isn't installed, fails, or takes longer than --limit is reported as such. The
command fails where a target is missed, or features have other norms than gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from bench.featurization import memory, summary
from bench.featurization.measure import Row, Sizes, empty, work, work_in_turn
from bench.featurization.providers import PROVIDERS
from bench.featurization.workloads import WORKLOADS
from bench.record import end_with, in_fresh_process, write_result
from bench.targets import FAIL, Target, as_dicts, list_of
from fastproj.commands.arguments import positive
from fastproj.commands.info import usable_cores

DIMS = (2048, 4096)
QUICK_DIMS = (64,)
DEFAULT = [name for name, provider in PROVIDERS.items() if provider.by_default]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=DEFAULT)
    parser.add_argument("--proj-dim", type=positive, nargs="+", metavar="K", help="2048 4096")
    parser.add_argument("--batch", type=positive, help="samples of a batch: the model's own number")
    parser.add_argument(
        "--length", type=positive, help="tokens of a sample: the model's own number"
    )
    parser.add_argument("--threads", type=positive, default=usable_cores())
    parser.add_argument("--repeats", type=positive, help="timed calls: 5")
    parser.add_argument(
        "--limit", type=positive, default=900, metavar="SECONDS", help="of a provider on a model"
    )
    parser.add_argument("--in-turn", action="store_true", help="providers in one process")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def sizes_of(options: argparse.Namespace, workload: str, proj_dim: int) -> Sizes:
    """The sizes of a workload, but for what was asked for."""
    kind = WORKLOADS[workload]
    size, length = kind.quick if options.quick else (kind.size, kind.length)
    return Sizes(
        options.batch or size,
        options.length or length,
        proj_dim,
        options.repeats or (2 if options.quick else 5),
        options.threads,
        options.quick,
    )


def run_worker(
    providers: Sequence[str], workload: str, sizes: Sizes, limit: int, in_turn: bool = False
) -> list[Row]:
    """``work`` of one provider, or ``work_in_turn`` of several, in a fresh process."""
    words: list[object] = ["--worker", "--provider", *providers, "--model", workload]
    for name in ("proj_dim", "batch", "length", "threads", "repeats"):
        words += ["--" + name.replace("_", "-"), getattr(sizes, name)]
    words += ["--quick"] if sizes.quick else []
    words += ["--in-turn"] if in_turn else []
    try:
        rows: list[Row] = in_fresh_process("featurize", *words, limit=limit)
        return rows
    except subprocess.TimeoutExpired:
        note = f"stopped: not done after {limit} s (--limit)"
    except RuntimeError as error:
        note = f"FAILED: {' '.join(str(error).split())[-80:]}"
    return [{**empty(name, workload, sizes), "note": note} for name in providers]


def rows_of(
    options: argparse.Namespace, workload: str, sizes: Sizes, once: dict[str, Row]
) -> list[Row]:
    """The rows of one workload and K; ``once`` keeps those that are the same at every K."""
    if options.in_turn:
        limit = options.limit * len(options.provider)
        return run_worker(options.provider, workload, sizes, limit, in_turn=True)
    rows = []
    for provider in tqdm(options.provider, desc=workload, leave=False, disable=None):
        row = once.get(provider) or run_worker([provider], workload, sizes, options.limit)[0]
        if not PROVIDERS[provider].by_dim:
            once[provider] = row
        rows.append({**row, "proj_dim": sizes.proj_dim})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a target is missed or features are wrong."""
    options = build_parser().parse_args(argv)
    dims = options.proj_dim or (QUICK_DIMS if options.quick else DIMS)
    if options.worker:
        (workload,) = options.model
        sizes = sizes_of(options, workload, dims[0])
        torch.set_num_threads(options.threads)
        memory.bounded()
        if options.in_turn:
            print(json.dumps(work_in_turn(options.provider, workload, sizes)))
        else:
            print(json.dumps([work(name, workload, sizes) for name in options.provider]))
        return 0
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    rows: list[Row] = []
    said: list[str] = []
    judged: list[Target] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    for workload in options.model:
        once: dict[str, Row] = {}
        for proj_dim in dims:
            sizes = sizes_of(options, workload, proj_dim)
            made = rows_of(options, workload, sizes, once)
            rows += made
            judged += summary.targets(made)
            say(summary.table(made))
            if not options.no_write:  # a run that is stopped leaves what it has
                write(options, rows, judged, said)
    faults = list(summary.wrong(rows))
    for fault in faults:
        say(fault)
    missed = [target for target in judged if target.verdict == FAIL]
    say(list_of(judged))
    if not options.no_write:
        print(f"\nwrote {write(options, rows, judged, said)}")
    return 1 if faults or missed else 0


def write(
    options: argparse.Namespace, rows: Sequence[Row], judged: Sequence[Target], said: Sequence[str]
) -> Any:
    """Write the result files, in place of those written before."""
    name = "featurize-quick" if options.quick else "featurize"
    content = {"options": vars(options), "rows": rows, "targets": as_dicts(judged)}
    return write_result(name, content, "\n".join(said))


if __name__ == "__main__":
    end_with(main)
