"""Release files: the sdist, and a manylinux wheel for each Python that is found (`make wheels`).

A wheel must load wherever pip installs it, so it needs nothing newer than glibc 2.17
(manylinux2014) and no C++ library: `zig c++`, from PyPI, compiles what calls them and links. The
kernels call neither; the usual compiler and nvcc make them. One wheel holds every instruction set
of its architecture and, where there is an nvcc, the CUDA kernels; FASTPROJ_CUDA=0 leaves these out,
and 1 makes it an error that they can't be made.

Everything but the bindings is compiled once, for all versions of Python.
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
import time
import zipfile
from collections.abc import Iterator, Sequence
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


def run(command: list[str], env: dict[str, str] | None = None, aloud: bool = False) -> None:
    """Run a command; raises WheelError when it fails, with what it printed unless ``aloud``."""
    output = None if aloud else subprocess.PIPE
    done = subprocess.run(
        command, env=env, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    if done.returncode:
        said = "; its messages are above" if aloud else f":\n{done.stdout}"
        raise WheelError(f"{shlex.join(command)} exited with {done.returncode}{said}")


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


def with_cuda() -> bool:
    """Whether wheels hold the CUDA kernels: as FASTPROJ_CUDA says, else where there is an nvcc."""
    wanted = build_native.switch("FASTPROJ_CUDA")
    return build_cuda.find_nvcc() is not None if wanted is None else wanted


def environment(cuda: bool) -> dict[str, str]:
    """The compilers of a wheel; GPU architectures are all of ours unless FASTPROJ_CUDA_ARCHS."""
    kernel_compiler = build_native.find_compiler()
    if isinstance(kernel_compiler, str):
        raise WheelError(kernel_compiler)
    dropped = ("TORCH_CUDA_ARCH_LIST", "PYTHONPATH", "FASTPROJ_SANITIZE")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    if cuda:
        kept["FASTPROJ_CUDA"] = "1"
    zig = [sys.executable, "-m", "ziglang", "c++"]
    target = f"{platform.machine()}-linux-gnu.{GLIBC}"
    caches = {f"ZIG_{name}_CACHE_DIR": str(ROOT / "build" / "zig") for name in ("GLOBAL", "LOCAL")}
    return {
        **kept,
        **caches,
        "FASTPROJ_CPU": "1",
        "FASTPROJ_KERNEL_CXX": shlex.join(kernel_compiler),
        "CXX": shlex.join([*zig, "-target", target]),
        "LDFLAGS": "-Wl,-s",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def compile_kernels(env: dict[str, str]) -> None:
    """Compile what wheels for all Pythons share, in the folders where their builds look for it.

    Aloud, for it takes minutes; and in this environment, which has what looks at the machine code.
    """
    work = ROOT / "build" / "wheels"
    build = [sys.executable, "setup.py", "-q", "build_ext"]
    run([*build, "--build-lib", str(work / "lib"), "--build-temp", str(work)], env, aloud=True)


def build_sdist(output: Path) -> Path:
    """The sdist, in ``output``."""
    run([sys.executable, "-m", "build", "--sdist", "--outdir", str(output), str(ROOT)])
    return max(output.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime_ns)


def build_wheel(python: str, output: Path, env: dict[str, str], cuda: bool) -> Path:
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
    check_wheel(repaired, cuda)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Build what was asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="build_wheels.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder (dist)")
    parser.add_argument(
        "--pythons", nargs="+", default=VERSIONS, choices=VERSIONS, metavar="X.Y",
        help=f"versions to build for ({' '.join(VERSIONS)})",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="fail where an interpreter is missing")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("build_wheels.py: manylinux wheels are made on Linux; here use `pip wheel .`")
        return 2
    try:
        return build_all(options)
    except (WheelError, build_native.BuildError) as error:
        print(f"build_wheels.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build_wheels.py: stopped; what is compiled is kept", file=sys.stderr)
        return 130


def build_all(options: argparse.Namespace) -> int:
    """Build, and say what each step is and how long it took; returns the exit status."""
    pythons = {version: find_python(version) for version in options.pythons}
    missing = [version for version, python in pythons.items() if python is None]
    if missing:
        print(f"no wheel for Python {', '.join(missing)}: no such interpreter on PATH or in pyenv")
    if len(missing) == len(pythons) or (missing and options.all):
        return 1
    cuda = with_cuda()
    env = environment(cuda)
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def step(what: str) -> None:
        print(f"== {time.monotonic() - began:4.0f} s: {what}", flush=True)

    step(f"compiling the kernels{' and those for GPUs, which takes minutes' if cuda else ''}")
    compile_kernels(env)
    step("the sdist")
    sdist = build_sdist(options.output)
    print(f"{sdist.name}  {sdist.stat().st_size / 1e6:.1f} MB", flush=True)
    for version, python in pythons.items():
        if python is not None:
            step(f"the wheel for Python {version}")
            made = build_wheel(python, options.output, env, cuda)
            print("\n".join(lines(made)), flush=True)
    step("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
