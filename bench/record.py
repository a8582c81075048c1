"""Result files, what they say about where they were made, and processes that measure."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any, NoReturn

import torch

from fastproj.backends import built, measured
from fastproj.commands.info import cpu_name, usable_cores

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def surroundings() -> dict[str, Any]:
    """Machine, versions and commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastproj", "numpy", "traker", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "built": built.record(),
        "machine": {
            "cpu": cpu_name(),
            "flags": cpu_flags(),
            "cores": usable_cores(),
            "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "gpu": gpu(),
    }


def gpu() -> dict[str, Any]:
    """The current GPU with its driver; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
    except OSError:
        driver = []
    return {
        "name": properties.name,
        "arch": measured.arch_of(torch.cuda.current_device()),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": driver[0] if driver else "",
        "torch_cuda": torch.version.cuda or torch.version.hip or "",
    }


def commit() -> str:
    """The commit that is measured, with `+changes` when tracked files differ from it.

    Where the sources came without their repository, $FASTPROJ_COMMIT says it.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "HEAD")
    if not name:
        return os.environ.get("FASTPROJ_COMMIT", "")
    return f"{name}+changes" if git("status", "--porcelain", "-uno") else name


def cpu_flags() -> list[str]:
    """Those of CPU_FLAGS that the processor has, where the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    words = set(found[1].split()) if found else set()
    return [flag for flag in CPU_FLAGS if flag in words]


@cache
def mark() -> str:
    """What names this run's files: the day and the commit, as they were at the first of them."""
    return f"{datetime.now(timezone.utc):%Y-%m-%d}-{commit()[:10] or 'no-commit'}"


@cache
def path_of(folder: Path, name: str) -> Path:
    """This run's file. What earlier runs of the same day and commit have left is kept."""
    marks = chain([mark()], (f"{mark()}-{number}" for number in count(2)))
    paths = (folder / f"{begin}-{name}.json" for begin in marks)
    return next(path for path in paths if not path.exists())


def write_result(name: str, content: dict[str, Any], text: str = "") -> Path:
    """Write ``content`` and the surroundings to bench/results/<day>-<commit>-<name>.json.

    A second call in one run replaces the file. Another run of this day and commit gets a file of
    its own, <day>-<commit>-2-<name>.json.

    text : what was printed, for a .txt beside it.
    """
    around = surroundings()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = path_of(RESULTS, name)
    path.write_text(json.dumps({**around, **content}, indent=1, allow_nan=False) + "\n")
    if text:
        path.with_suffix(".txt").write_text(text + "\n")
    return path


def end_with(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and exit with its status; with 130 and a line where Ctrl-C stops it.

    A terminal's Ctrl-C also reaches the processes of ``in_fresh_process``: these end so too.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def in_fresh_process(module: str, *words: object, limit: float | None = None) -> Any:
    """What ``python -m bench.<module> <words>`` prints in its last line, read as JSON.

    The process imports from where this one does, and reports errors where this one does. What it
    leaves in its directory for temporary files goes with it, however it ends.
    Raises RuntimeError where it fails, subprocess.TimeoutExpired where it takes longer than
    ``limit`` seconds.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    # A process that is killed removes nothing itself, and features may be gigabytes. Another that
    # it has started may still write: what then stays is no reason to lose the benchmark.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-m", f"bench.{module}", *map(str, words)],
            env={**environment, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            timeout=limit,
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)} failed with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])
