"""``fastproj plan``: disk, memory and time of a TRAK run, before it is started."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastproj.checks import check_integer
from fastproj.commands.arguments import add_json, add_option, command_parser, positive
from fastproj.commands.costs import Layers, Run
from fastproj.commands.matrix import add_matrix, resolve_matrix
from fastproj.commands.rates import cholesky_rate, matmul_rate, projection_rates
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.factored import MAX_FACTORED
from fastproj.spec import MAX_COLS, MAX_ROWS
from fastproj.trak.curvature import CURVATURES
from fastproj.trak.inputs import default_proj_dim
from fastproj.trak.solving.systems import TRAK

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj plan``."""
    parser = command_parser(
        "plan",
        "How much disk, memory and time a TRAK run will take on this machine. The sizes are "
        "arithmetic. The times come from rates that the command measures, in a few seconds, for "
        "every backend that works here. The model's own forward and backward passes depend on the "
        "model: measure them for one sample and give --gradient-seconds to have them counted.",
        """
        fastproj plan --model-parameters 1.2e8 --samples 5e4 --proj-dim 8192 --kind sjlt
        fastproj plan --model-parameters 1e6 --samples 1e4 --proj-dim 2048 --checkpoints 10
        fastproj plan --model-parameters 7e9 --samples 1e5 --proj-dim 4096 --kind sjlt \\
            --factored 16 --width 4096 --tokens 2048 --json
        """,
    )
    required = parser.add_argument_group("what is asked")
    required.add_argument(
        "--model-parameters",
        type=positive,
        required=True,
        metavar="P",
        help="parameters whose gradients are taken, such as 1.2e8",
    )
    required.add_argument(
        "--samples", type=positive, required=True, metavar="N", help="training samples"
    )
    add_matrix(parser)
    add_option(parser, "--targets", 100, "M", "outputs that are asked about", positive)
    add_option(
        parser, "--checkpoints", 1, "C", "trained models that scores are averaged over", positive
    )
    add_option(
        parser, "--batch", 32, "B", "samples whose gradients are projected together", positive
    )
    parser.add_argument(
        "--curvature",
        choices=CURVATURES,
        default=CURVATURES[0],
        help='of the loss (default: auto, which is counted as "fisher")',
    )
    parser.add_argument(
        "--full-precision", action="store_true", help="features stored as float32, not float16"
    )
    parser.add_argument(
        "--gradient-seconds",
        type=seconds,
        metavar="S",
        help="time of one sample's gradient, as you measured it",
    )
    parser.add_argument(
        "--factored",
        type=positive,
        metavar="r",
        help="both sides of each linear layer's gradient are compressed to r. The "
        "cost depends on the layers; see the next two options",
    )
    parser.add_argument(
        "--width",
        type=positive,
        metavar="D",
        help="with --factored: assume P / D^2 layers of D x D (default: the D of a "
        "transformer with D / 64 blocks)",
    )
    add_option(parser, "--tokens", 512, "T", "with --factored: tokens a sample", positive)
    add_json(parser)
    return parser


def seconds(text: str) -> float:
    """An argument that must be a time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"received {text!r}; expected seconds, above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj plan``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        check_integer("--model-parameters", "P", options.model_parameters, 1, MAX_ROWS + 1)
        if options.proj_dim is None:
            options.proj_dim = default_proj_dim(
                options.samples, options.model_parameters, options.kind
            )
        check_integer("--proj-dim", "K", options.proj_dim, 1, MAX_COLS + 1)
        if options.factored is not None:
            check_integer("--factored", "r", options.factored, 1, MAX_FACTORED)
        options.kind, options.block = resolve_matrix(options.kind, options.block, options.proj_dim)
    except ValueError as refusal:
        parser.error(str(refusal))
    if options.width is not None and options.factored is None:
        parser.error("--width goes with --factored")
    return execute("plan", options, run)


def run(options: argparse.Namespace) -> Outcome:
    """Count, measure, print."""
    whole = Run(
        options.model_parameters,
        options.samples,
        options.proj_dim,
        options.targets,
        options.checkpoints,
        options.curvature != TRAK,
        not options.full_precision,
        options.batch,
    )
    layers = None
    if options.factored is not None:
        layers = Layers.assumed(whole.parameters, options.width, options.tokens)
    entries = whole.parameters if layers is None else layers.entries(options.factored)
    began = time.perf_counter()
    rates = projection_rates(
        entries, whole.proj_dim, options.kind, options.block or None, whole.batch
    )
    product = {dtype: matmul_rate(dtype) for dtype in (torch.float32, torch.float64)}
    spent = {
        "finalising": whole.gram_operations()
        / product[torch.float64 if whole.gram_is_exact() else torch.float32]
        + whole.solve_operations() / cholesky_rate(),
        "scoring": whole.score_operations() / product[torch.float32],
    }
    measured = time.perf_counter() - began
    if options.gradient_seconds is not None:
        spent = {"gradients": options.gradient_seconds * whole.gradients, **spent}
    if layers is not None:
        compress = layers.operations(options.factored) * whole.gradients
        spent = {"compressing both sides": compress / product[torch.float32], **spent}
    backends = {
        rate.backend: {
            "entries_per_second": rate.entries,
            "seconds": whole.gradients * entries / rate.entries if rate.entries else None,
            "reason": rate.reason,
        }
        for rate in rates
    }
    content = {
        "run": {**vars(whole), "kind": options.kind, "block": options.block},
        "factored": layers and {"rank": options.factored, **vars(layers), "entries": entries},
        "disk_bytes": whole.disk(),
        "disk_bytes_while_finalising": whole.disk_while_finalising(),
        "memory_bytes": whole.memory(),
        "stored_matrix_bytes": whole.stored_matrix(),
        "project_seconds": backends,
        "seconds": spent,
        "threads": torch.get_num_threads(),
    }
    if not options.json:
        print_plan(whole, options, layers, entries, backends, spent, measured)
    return DONE, content


def print_plan(
    whole: Run,
    options: argparse.Namespace,
    layers: Layers | None,
    entries: int,
    backends: Mapping[str, Mapping[str, Any]],
    spent: Mapping[str, float],
    measured: float,
) -> None:
    """Three tables, and what they leave out."""
    block = f" with block {options.block}" if options.block else ""
    curvature = "fisher" if whole.fisher else "trak"
    print(
        f"{whole.parameters:,} parameters, {whole.samples:,} training samples, {whole.targets:,} "
        f"targets, {whole.checkpoints} checkpoint{'s' * (whole.checkpoints > 1)}\n"
        f"K = {whole.proj_dim}, {options.kind}{block}, curvature {curvature}, "
        f"{whole.gradients:,} gradients in all"
    )
    if layers is not None:
        print(
            f"factored to {options.factored}: assumed are {layers.count:.0f} linear layers of "
            f"{layers.width} x {layers.width} and {layers.tokens} tokens a sample (--width, "
            f"--tokens); a gradient then has {entries:,} entries"
        )
    disk = whole.disk()
    print_table("disk", {name: in_bytes(size) for name, size in disk.items()})
    print_row("in all", in_bytes(sum(disk.values())))
    if parts := whole.disk_while_finalising():
        print_row("and while finalising", in_bytes(parts))
    print_table(
        "memory, beside the model, Python and torch",
        {name: in_bytes(size) for name, size in whole.memory().items()},
    )
    print("  (gradients: hooks hold one layer's at a time)")
    print(f"  A stored R would take {in_bytes(whole.stored_matrix())}; none is stored.")
    threads = torch.get_num_threads()
    print_table(
        f"time on this machine, {threads} thread{'s' * (threads > 1)} (rates measured in "
        f"{measured:.1f} s)",
        {name: in_time(value) for name, value in spent.items()},
    )
    print("  projecting, by backend")
    for name, found in backends.items():
        if found["seconds"] is None:
            print(f"    {name:<32}not usable: {found['reason']}")
            continue
        rate = f"{found['entries_per_second']:.2g} entries of G a second"
        print(f"    {name:<32}{in_time(found['seconds']):<12} {rate}")
    left_out = ["reading and writing files"]
    if options.gradient_seconds is None:
        left_out.insert(0, "the model's forward and backward passes (--gradient-seconds)")
    print(f"\nNot counted: {', '.join(left_out)}.")


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """A title, and a row for each entry."""
    print(f"\n{title}")
    for name, value in rows.items():
        print_row(name, value)


def print_row(name: str, value: str) -> None:
    """Two columns."""
    print(f"  {name:<34}{value}")


def in_bytes(count: float) -> str:
    """Such as "819 MB", in powers of 1000."""
    unit = 0
    while count >= 999.5 and unit < len(UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.3g} {UNITS[unit]}"


def in_time(value: float) -> str:
    """Such as "3.4 s", "12 min", "1.5 h", "40 days" or "7 years"."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if value < limit:
            return f"{value / unit:.2g} {name}"
    days = value / 86400
    return f"{days:,.0f} days" if days < 1000 else f"{days / 365.25:,.0f} years"
