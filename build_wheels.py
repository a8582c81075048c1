"""Release files: the sdist, and a manylinux wheel for each Python that is found (`make wheels`).

A wheel must load wherever pip installs it, so it needs nothing newer than glibc 2.17
(manylinux2014) and no C++ library: `zig c++`, from PyPI, compiles what calls them and links. The
kernels call neither; the usual compiler and nvcc make them. One wheel holds every instruction set
of its architecture and, where there is an nvcc, the CUDA kernels.
"""

from __future__ import annotations

import argparse
import glob
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import build_cuda
import build_native

ROOT = Path(__file__).resolve().parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
GLIBC = "2.17"
MOST_BYTES = 30_000_000
# The oldest Linux driver that runs what a CUDA release compiled: the table of minimum drivers for
# minor version compatibility in its release notes.
OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}


class WheelError(Exception):
    """A release file can't be made, or is not what it must be."""


def run(command: list[str], env: dict[str, str] | None = None) -> str:
    """What a command prints; raises WheelError with all of it when the command fails."""
    done = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    if done.returncode:
        raise WheelError(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stdout}")
    return done.stdout


def find_python(version: str) -> str | None:
    """An interpreter of this version that can make environments: on PATH, or one of pyenv's."""
    name = f"python{version}"
    homes = [os.environ.get("PYENV_ROOT", ""), os.path.expanduser("~/.pyenv")]
    found: list[str | None] = [shutil.which(name)]
    for home in filter(None, homes):
        found += glob.glob(os.path.join(home, "versions", f"{version}.*", "bin", name))
    for python in filter(None, found):
        probe = [python, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(probe, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    return None


def environment(cuda: bool) -> dict[str, str]:
    """The compilers of a wheel; GPU architectures are all of ours unless FASTPROJ_CUDA_ARCHS."""
    kernel_compiler = build_native.find_compiler()
    if isinstance(kernel_compiler, str):
        raise WheelError(kernel_compiler)
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "PYTHONPATH")}
    zig = [sys.executable, "-m", "ziglang", "c++"]
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    caches = {f"ZIG_{name}_CACHE_DIR": str(ROOT / "build" / "zig") for name in ("GLOBAL", "LOCAL")}
    return {
        **kept,
        **caches,
        "FASTPROJ_CPU": "1",
        "FASTPROJ_CUDA": "1" if cuda else "0",
        "FASTPROJ_KERNEL_CXX": shlex.join(kernel_compiler),
        "CXX": shlex.join([*zig, "-target", target]),
        "LDFLAGS": "-Wl,-s",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def build_sdist(output: Path) -> Path:
    """The sdist, in ``output``."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", str(output), str(ROOT)])
    return max(output.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime_ns)


def build_wheel(python: str, output: Path, env: dict[str, str]) -> Path:
    """The wheel for one interpreter, repaired for manylinux and looked at, in ``output``."""
    work = ROOT / "build" / "wheels"
    shutil.rmtree(work, ignore_errors=True)
    for left in glob.glob(str(ROOT / "build" / "lib*")):  # it may hold modules that are gone
        shutil.rmtree(left)
    run([python, "-m", "venv", str(work / "venv")])
    pip = [str(work / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "-w", str(work / "raw"), str(ROOT)], env)
    (raw,) = (work / "raw").glob("*.whl")
    plat = f"manylinux_{GLIBC.replace('.', '_')}_{platform.machine()}"
    repair = [sys.executable, "-m", "auditwheel", "repair", "--plat", plat, "--only-plat"]
    run([*repair, "-w", str(work / "repaired"), str(raw)], env)
    (repaired,) = (work / "repaired").glob("*.whl")
    check_wheel(repaired, cuda=env["FASTPROJ_CUDA"] == "1")
    return Path(shutil.copy2(repaired, output))


def built(wheel: Path) -> dict[str, dict[str, object]]:
    """What the build recorded in fastproj/_build_info.py."""
    with zipfile.ZipFile(wheel) as archive:
        scope: dict[str, dict[str, dict[str, object]]] = {}
        exec(archive.read("fastproj/_build_info.py"), scope)
    return scope["BUILT"]


def check_wheel(wheel: Path, cuda: bool) -> None:
    """Raise WheelError for a wheel that is too large, or lacks something, or holds too much."""
    faults = []
    size = wheel.stat().st_size
    if size > MOST_BYTES:
        faults.append(f"it has {size / 1e6:.1f} MB; at most {MOST_BYTES / 1e6:.0f} are meant")
    record = built(wheel)
    machine = platform.machine()
    here = {isa for isa, (arch, _) in build_native.ISAS.items() if arch == machine}
    missing = sorted({"portable", *here} - set(list_of(record["cpu"], "isas")))
    if missing:
        faults.append(f"no code for {', '.join(missing)}: use g++ >= 11 (CXX)")
    if bool(record["cuda"]["built"]) != cuda:
        faults.append(f"CUDA kernels: {record['cuda']['reason'] or 'not asked for'}")
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    extra = [top for top in tops if top != "fastproj" and not top.endswith(".dist-info")]
    if extra:  # a vendored library, such as libstdc++
        faults.append(f"it also installs {', '.join(extra)}")
    if faults:
        raise WheelError(f"{wheel.name}: {'; '.join(faults)}")


def list_of(record: dict[str, object], key: str) -> list[str]:
    """A list of a module's record; empty where the module was not built."""
    value = record.get(key, [])
    assert isinstance(value, list)
    return value


def lines(wheel: Path) -> Iterator[str]:
    """What a wheel is, for people."""
    record = built(wheel)
    yield f"{wheel.name}  {wheel.stat().st_size / 1e6:.1f} MB"
    yield f"    CPU: {', '.join(list_of(record['cpu'], 'isas'))}"
    if record["cuda"]["built"]:
        archs = ", ".join(f"sm_{arch}" for arch in list_of(record["cuda"], "archs"))
        yield f"    CUDA: {archs}; {driver(str(record['cuda']['compiler']))}"
    else:
        yield f"    no CUDA: {record['cuda']['reason']}"


def driver(compiler: str) -> str:
    """The driver that kernels of this nvcc need."""
    match = re.search(r"release (\d+)\.(\d+)", compiler)
    if match is None:
        return f"compiled by {compiler}"
    oldest = OLDEST_DRIVER.get(int(match[1]), "of its release notes")
    return f"compiled by CUDA {match[1]}.{match[2]}, needs driver {oldest} or newer"


def main() -> int:
    """Build what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, prog="build_wheels.py")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder (dist)")
    parser.add_argument(
        "--pythons", nargs="+", default=list(VERSIONS), metavar="X.Y", help="versions to build for"
    )
    parser.add_argument("--no-cuda", action="store_true", help="leave the CUDA kernels out")
    parser.add_argument("--all", action="store_true", help="fail where an interpreter is missing")
    options = parser.parse_args()
    if sys.platform != "linux":
        print("build_wheels.py: manylinux wheels are made on Linux; here use `pip wheel .`")
        return 2
    pythons = {version: find_python(version) for version in options.pythons}
    cuda = not options.no_cuda and build_cuda.find_nvcc() is not None
    options.output.mkdir(parents=True, exist_ok=True)
    made = []
    try:
        sdist = build_sdist(options.output)
        print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
        for python in filter(None, pythons.values()):
            made.append(build_wheel(python, options.output, environment(cuda)))
            print("\n".join(lines(made[-1])), flush=True)
    except WheelError as error:
        print(f"build_wheels.py: {error}", file=sys.stderr)
        return 1
    missing = [version for version, python in pythons.items() if python is None]
    if missing:
        print(f"no wheel for Python {', '.join(missing)}: no such interpreter on PATH or in pyenv")
    return 1 if not made or (missing and options.all) else 0


if __name__ == "__main__":
    sys.exit(main())
