"""``fastproj info``: what this machine can do, and what it lacks."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch

import fastproj
from fastproj import namesake
from fastproj.backends import built, registry
from fastproj.commands.arguments import add_json, command_parser
from fastproj.commands.block import read_block
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.spec import KINDS


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj info``."""
    parser = command_parser(
        "info",
        "What this machine can do, and what it lacks: processors, backends and why one can't be "
        "used, optional packages, environment variables.",
        """
        fastproj info
        fastproj info --json
        fastproj info --launch 64 1e7 4096 bf16   # what the GPU backends would start; needs no GPU
        """,
    )
    add_json(parser)
    parser.add_argument(
        "--launch",
        nargs=4,
        metavar=("B", "P", "K", "DTYPE"),
        help="the tiles, stages, splits, grid and workspace that the GPU backends would use for "
        "gradients [B, P] of DTYPE (fp32, bf16, fp16, fp64) and K columns",
    )
    parser.add_argument(
        "--kind", default=None, choices=KINDS, help="of --launch (default: rademacher)"
    )
    parser.add_argument(
        "--block", type=read_block, metavar="W", help="of --launch, for kind sjlt (default: by K)"
    )
    parser.add_argument(
        "--precision",
        default=None,
        choices=["highest", "high", "medium"],
        help="of --launch (default: highest)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj info``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.launch is None:
        for name in ("kind", "block", "precision"):
            if getattr(options, name) is not None:
                parser.error(f"received --{name} without --launch; expected both, or neither")
        return execute("info", options, print_info)
    from fastproj.commands import launch  # it needs fastproj.kernels

    options.kind = options.kind or "rademacher"
    options.precision = options.precision or "highest"
    try:
        options.found = launch.plans_of(options)
    except ValueError as refusal:
        said = str(refusal)
        parser.error(said if said.startswith("--") else f"--launch: {said}")
    return execute("info", options, launch.print_plans)


def collect_info() -> dict[str, Any]:
    """All that `fastproj info` prints, as plain values."""
    backends: dict[str, dict[str, Any]] = {}
    for name in registry.NAMES:
        reason = registry.unavailable(name)
        details = {} if reason else registry.load(name).describe()
        backends[name] = {"usable": reason is None, "reason": reason or "", "details": details}
    optional: dict[str, str] = {}
    for package in ("safetensors", "tqdm", "scikit-learn", "scipy", "triton"):
        try:
            optional[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            optional[package] = ""
    return {
        "fastproj": fastproj.__version__,
        "spec_version": fastproj.SPEC_VERSION,
        "problem": next(filter(None, problems()), ""),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": backends,
        "built": {
            name: {key: value for key, value in module.items() if key != "sources"}
            for name, module in built.record().items()
        },
        "optional": optional,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTPROJ_")},
    }


def problems() -> Iterator[str | None]:
    """What is wrong with this installation, the worst first; None for what is right."""
    yield namesake.problem()
    yield built.among_sources()
    yield from map(built.outdated, built.record())


def print_info(options: argparse.Namespace) -> Outcome:
    """Print what ``collect_info`` finds."""
    info = collect_info()
    if options.json:
        return DONE, info
    precision = info["float32_matmul_precision"]
    rows = [
        ("fastproj", f"{info['fastproj']}, matrix spec {info['spec_version']}"),
        ("python", info["python"]),
        ("torch", f'{info["torch"]}, {info["threads"]} threads, default precision "{precision}"'),
        ("numpy", info["numpy"]),
        ("cpu", f"{info['cpu']}, {info['cores']} cores"),
        ("gpu", ", ".join(info["gpus"]) or "none that this torch can use"),
    ]
    rows += [("problem", info["problem"])] if info["problem"] else []
    print_rows(rows)
    print("\nbackends, in the order in which they are tried")
    for name, backend in info["backends"].items():
        state = "usable" if backend["usable"] else f"not usable: {backend['reason']}"
        print(f"  {name:<11}{state}")
        details = [(key, value) for key, value in backend["details"].items() if value]
        print_rows(details, " " * 13)
    print("\ncompiled modules of this installation")
    for name, module in info["built"].items():
        facts = [str(module.get("compiler", "")), " ".join(module.get("isas", []))]
        facts += [" ".join(f"sm_{arch}" for arch in module.get("archs", []))]
        made = "; ".join(fact for fact in facts if fact)
        print(f"  _{name:<10}{made if module['built'] else 'not built: ' + module['reason']}")
    print("\noptional packages")
    print_rows([(name, found or "not installed") for name, found in info["optional"].items()], "  ")
    if info["environment"]:
        print("\nenvironment")
        print_rows(list(info["environment"].items()), "  ")
    return DONE, info


def print_rows(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Two columns, the first as wide as it needs to be."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        print(f"{indent}{name:<{width}}{value}")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name, or its architecture where the system doesn't say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
