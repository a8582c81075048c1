"""The ``fastproj`` command: parses info and bench, passes the other commands on."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

INTERRUPTED = 130  # what a shell reports for Ctrl-C
PASSED_ON = {  # command -> module:function(argv) that does the work
    "demo": "fastproj.trak.demo:main",
    "report": "fastproj.trak.report:main",
    "lds": "fastproj.trak.evaluate:lds_main",
    "loo": "fastproj.trak.evaluate:loo_main",
    "brittleness": "fastproj.trak.evaluate:brittleness_main",
    "mislabel": "fastproj.trak.evaluate:mislabel_main",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: sys.argv) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A path in letters that the terminal lacks must not end hours of work in an error.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\nfastproj: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) is gone: leave nothing for the interpreter to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(arguments: list[str]) -> int:
    """Parse ``arguments`` and call the command they name."""
    if arguments and arguments[0] in PASSED_ON:
        return pass_on(arguments[0], arguments[1:])
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    status: int = options.command(options)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but what PASSED_ON modules parse themselves."""
    parser = argparse.ArgumentParser(
        prog="fastproj",
        description="Random projection with matrices made on the fly, and TRAK on top.",
    )
    parser.add_argument("--version", action="version", version=f"fastproj {version()}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    info = commands.add_parser("info", help="what this machine can do, and what it lacks")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.add_argument(
        "--plan",
        nargs=4,
        metavar=("B", "P", "K", "DTYPE"),
        help="the tiles, stages, splits, grid and workspace that the GPU backends would use for "
        "gradients [B, P] of DTYPE (fp32, bf16, fp16, fp64) and K columns",
    )
    info.add_argument(
        "--kind", default="rademacher", choices=["rademacher", "gaussian"], help="of the plan"
    )
    info.add_argument(
        "--precision", default="highest", choices=["highest", "high", "medium"], help="of the plan"
    )
    info.set_defaults(command=print_info)

    commands.add_parser("demo", help="TRAK on real data, from training to an HTML report")
    commands.add_parser("report", help="an HTML page of finished scores")
    commands.add_parser("lds", help="how well scores predict models trained on random subsets")
    commands.add_parser("loo", help="how well scores predict leaving single samples out")
    commands.add_parser("brittleness", help="predictions that flip without what helps them most")
    commands.add_parser("mislabel", help="how well self-influence finds wrong labels")

    bench = commands.add_parser(
        "bench",
        help="time this machine against a stored matrix, in under a minute",
        description="Times fastproj against torch.matmul with the matrix in memory; every row is "
        "checked against float64 first. The full benchmark is bench/project.py in the sources.",
    )
    bench.add_argument("--batch", type=positive, nargs="+", default=[8, 32], metavar="B")
    bench.add_argument("--rows", type=positive, default=65536, metavar="P", help="default 65536")
    bench.add_argument("--cols", type=positive, default=1024, metavar="K", help="default 1024")
    bench.add_argument("--kind", choices=["rademacher", "gaussian"], default="rademacher")
    bench.add_argument("--repeats", type=positive, default=5, help="timed calls, default 5")
    bench.set_defaults(command=run_bench)
    return parser


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    try:
        value = int(float(text)) if "e" in text.lower() else int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"received {text!r}; expected an integer of at least 1")
    return value


def version() -> str:
    """Version of the installed package."""
    from fastproj import __version__

    return __version__


def pass_on(command: str, arguments: list[str]) -> int:
    """Call the function that owns ``command`` with its arguments."""
    name, _, function = PASSED_ON[command].partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or "a module"
        if missing.startswith("fastproj"):
            print(f"fastproj {command}: not part of this installation ({error})", file=sys.stderr)
        else:
            package = {"sklearn": "scikit-learn"}.get(missing, missing)
            print(f"fastproj {command}: needs {missing}; pip install {package}", file=sys.stderr)
        return 1
    entry: Callable[[list[str]], int | None] | None = getattr(module, function, None)
    if entry is None:
        print(f"fastproj {command}: not part of this version", file=sys.stderr)
        return 1
    return entry(arguments) or 0


# --------------------------------------------------------------------------------------------- info


def collect_info() -> dict[str, Any]:
    """All that `fastproj info` prints, as plain values."""
    import numpy
    import torch

    from fastproj import SPEC_VERSION
    from fastproj.backends import registry

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
        "fastproj": version(),
        "spec_version": SPEC_VERSION,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": backends,
        "built": built(),
        "optional": optional,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTPROJ_")},
    }


def print_info(options: argparse.Namespace) -> int:
    """The command `fastproj info`."""
    if options.plan is not None:
        return print_plans(options)
    info = collect_info()
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    precision = info["float32_matmul_precision"]
    rows = [
        ("fastproj", f"{info['fastproj']}, matrix spec {info['spec_version']}"),
        ("python", info["python"]),
        ("torch", f'{info["torch"]}, {info["threads"]} threads, default precision "{precision}"'),
        ("numpy", info["numpy"]),
        ("cpu", f"{info['cpu']}, {info['cores']} cores"),
        ("gpu", ", ".join(info["gpus"]) or "none that this torch can use"),
    ]
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
    return 0


def size(text: str) -> int:
    """ "4096", "1e7" or "10**8" as an integer of at least 1. Raises ValueError."""
    base, power, exponent = text.partition("**")
    try:
        value = float(base) ** int(exponent) if power else float(text) if "e" in text else int(text)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value < math.inf or value != int(value):
        raise ValueError(f"received {text!r}; expected an integer of at least 1")
    return int(value)


def print_plans(options: argparse.Namespace) -> int:
    """The command `fastproj info --plan`: a table for each backend, a column for each GPU."""
    from fastproj import plans

    try:
        batch, rows, cols = (size(text) for text in options.plan[:3])
        if options.plan[3] not in plans.DTYPES:
            raise ValueError(
                f"received DTYPE {options.plan[3]!r}; expected {', '.join(plans.DTYPES)}"
            )
        dtype = plans.DTYPES[options.plan[3]]
        found = plans.plans(batch, rows, cols, dtype, options.kind, options.precision)
    except ValueError as refusal:
        print(f"fastproj info --plan: {refusal}", file=sys.stderr)
        return 2
    if options.json:
        content = [
            {"backend": plan.backend, **vars(plan.gpu), "facts": plan.facts, "reason": plan.reason}
            for plan in found
        ]
        print(json.dumps(content, indent=2))
        return 0
    name = str(dtype).removeprefix("torch.")
    print(f"B = {batch}, P = {rows}, K = {cols}, {name}, {options.kind}, {options.precision};")
    print("dense rows that start at multiples of 16 bytes, at row 0 of R")
    for backend in dict.fromkeys(plan.backend for plan in found):
        mine = [plan for plan in found if plan.backend == backend]
        if mine[0].reason:
            print(f"\n{backend}: {mine[0].reason}")
            continue
        heads = [[plan.gpu.arch for plan in mine], [plan.gpu.name for plan in mine]]
        cells = [("", *heads[0]), (backend, *heads[1])]
        cells.append(("multiprocessors", *(str(plan.gpu.multiprocessors) for plan in mine)))
        facts = dict.fromkeys(fact for plan in mine for fact in plan.facts)
        cells += [(fact, *(plan.facts.get(fact, "-") for plan in mine)) for fact in facts]
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        print()
        for row in cells:
            line = "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            print(line.rstrip())
    return 0


def print_rows(rows: Sequence[tuple[str, str]], indent: str = "") -> None:
    """Two columns, the first as wide as it needs to be."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    for name, value in rows:
        print(f"{indent}{name:<{width}}{value}")


def built() -> dict[str, dict[str, Any]]:
    """What the build recorded about each compiled module; empty for a tree that was never built."""
    try:
        record: dict[str, dict[str, Any]] = importlib.import_module("fastproj._build_info").BUILT
    except ModuleNotFoundError:
        return {}
    return record


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


# -------------------------------------------------------------------------------------------- bench


def run_bench(options: argparse.Namespace) -> int:
    """The command `fastproj bench`."""
    import torch

    import fastproj
    from fastproj.backends import registry

    rows, cols, kind = options.rows, options.cols, options.kind
    try:
        used = registry.choose("cpu", torch.float32, kind).NAME
        stored = fastproj.matrix(rows, cols, kind=kind)  # [P, K]
    except ValueError as refusal:  # FASTPROJ_BACKEND or FASTPROJ_CPU_ISA names what can't run here
        print(f"fastproj bench: {refusal}", file=sys.stderr)
        return 2
    print(
        f"P = {rows}, K = {cols}, {kind}, float32 in, backend {used}, "
        f"{torch.get_num_threads()} threads, median of {options.repeats}\n"
        f"{'':<28}{'B':>5}{'ms':>10}{'GF/s':>9}{'against float64':>18}"
    )
    status = 0
    generator = torch.Generator().manual_seed(0)
    for batch in options.batch:
        grads = torch.randn(batch, rows, generator=generator)  # [B, P]
        exact = grads.double() @ stored.double()  # [B, K]

        project = partial(fastproj.project, grads, cols, kind=kind, scale=None, backend=used)
        providers: list[tuple[str, Callable[[], Tensor], float]] = [
            ("torch.matmul, stored matrix", partial(torch.matmul, grads, stored), 1e-4),
            ("fastproj highest", partial(project, precision="highest"), 1e-5),
            ("fastproj high", partial(project, precision="high"), 1e-3),
            ("fastproj medium", partial(project, precision="medium"), 3e-2),
        ]
        for name, call, bound in providers:
            error = float((call().double() - exact).norm() / exact.norm())
            if not error <= bound:
                print(f"{name:<28}{batch:>5}   WRONG: error {error:.1e}, allowed {bound:.0e}")
                status = 1
                continue
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            rate = 2e-9 * batch * rows * cols / median(seconds)
            print(f"{name:<28}{batch:>5}{1e3 * median(seconds):>10.2f}{rate:>9.0f}{error:>18.1e}")
    return status


if __name__ == "__main__":
    sys.exit(main())
