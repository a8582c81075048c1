"""How the compiled modules are built: probe the compiler, write a ninja file, run it.

Each module has one function that returns its build parameters (`cpu_module`, `cuda_module`): a
`Module` when it can be built, or a `Skipped` with the reason and the fix. A missing tool skips a
module; a compile error in a module that was started always fails the build.

Environment variables:

==================== ===========================================================================
FASTPROJ_CPU         0 leaves `fastproj._cpu` out, 1 makes a missing compiler an error
FASTPROJ_CUDA        the same for `fastproj._cuda`, which is built wherever an nvcc is found
FASTPROJ_CUDA_ARCHS  such as "80;90a" or "9.0+PTX"; unset: TORCH_CUDA_ARCH_LIST, or all of ours
FASTPROJ_SANITIZE    1 builds `fastproj._cpu` with the address and undefined-behaviour sanitizers
CXX                  the C++ compiler
FASTPROJ_KERNEL_CXX  another C++ compiler, for the kernels: isa_*.cpp, and what nvcc gives to one.
                     They call nothing of the C++ library, so it may be another one than CXX has
CXXFLAGS, LDFLAGS    flags added to every C++ compilation, and to the link
MAX_JOBS             how many compilations run at once; unset: ninja decides
==================== ===========================================================================
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

import build_cuda
import build_machine_code
from build_cuda import run

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
SOURCES = (".cpp", ".cu", ".cuh", ".hpp")
# pip keeps the wheel that it made of an sdist, and would install it again.
REINSTALL = "reinstall fastproj (pip install --force-reinstall --no-deps --no-cache-dir)"
KERNEL_CXX = "FASTPROJ_KERNEL_CXX"

# Instruction sets beyond the baseline: name -> (architecture, flags). csrc/cpu/isa_<name>.cpp is
# compiled alone, so that no flag leaks into another file; machine.cpp is told by
# -DFASTPROJ_HAVE_<NAME>.
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
ISAS: dict[str, tuple[str, list[str]]] = {
    "avx2": ("x86_64", ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]),
    "avx512": ("x86_64", _AVX512),
    "amx": ("x86_64", [*_AVX512, "-mavx512vbmi", "-mamx-tile", "-mamx-bf16"]),
    "neon": ("aarch64", []),  # all of AArch64 has it
}


def isa_probe(arch: str) -> str:
    """Source that compiles where the compiler makes code for `arch`, whatever machine this is."""
    header = {"x86_64": "immintrin.h", "aarch64": "arm_neon.h"}[arch]
    return (
        f"#ifndef __{arch}__\n#error another architecture\n#endif\n"
        f"#include <{header}>\nint probe() {{ return 0; }}\n"
    )


class BuildError(BaseError):
    """A native build that was required, or had started, failed."""


@dataclass(frozen=True)
class Compile:
    """One translation unit; `command` is the compiler with its flags, without input and output."""

    source: Path
    command: Sequence[str]
    label: str = "CXX"


@dataclass(frozen=True)
class Module:
    """One extension module; `link` is the link command without objects, libraries and output."""

    name: str
    units: Sequence[Compile]
    link: Sequence[str]
    info: dict[str, object] = field(default_factory=dict)
    archs: Sequence[str] = ()  # of GPUs
    libraries: Sequence[str] = ()


@dataclass(frozen=True)
class Skipped:
    """A module that is not built: `reason` says why and what to do about it."""

    name: str
    reason: str
    loud: bool = True


def switch(variable: str) -> bool | None:
    """Value of an on/off environment variable: True, False, or None when unset or empty."""
    value = os.environ.get(variable, "").strip()
    if value not in ("", "0", "1"):
        raise BuildError(
            f"{variable}: received {value!r}; expected 0 (leave out), 1 (require) or unset"
        )
    return None if value == "" else value == "1"


# ------------------------------------------------------------------------------------ the compiler


def compiles(command: Sequence[str], text: str) -> tuple[bool, str]:
    """Whether compiler and flags `command` take `text`, and what the compiler said."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(text)
        return run([*command, str(source), "-o", str(Path(folder, "probe.out"))])


def shared_flags() -> list[str]:
    """Link flags for an extension module on this platform."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup"]
    return ["-shared"]


def user_flags(variable: str) -> list[str]:
    """The words of an environment variable that holds compiler flags."""
    return shlex.split(os.environ.get(variable, ""))


def find_compiler(variable: str = "CXX") -> list[str] | str:
    """The C++ compiler as a list of words, or the reason why there is none that works.

    variable : that may name it; the compiler of the kernels is that of CXX if it does not.
    """
    if sys.platform == "win32":
        return "the C++ kernels are not built on Windows yet; use Linux, macOS or WSL for them"
    named = user_flags(variable)
    if not named and variable != "CXX":
        return find_compiler()
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    present = [command for command in candidates if shutil.which(command[0])]
    if not present:
        looked = f"{variable}={shlex.join(named)}" if named else "c++, g++ and clang++"
        return (
            f"no C++ compiler was found (looked for {looked}); "
            f"install one, e.g. `apt-get install g++`, and {REINSTALL}"
        )
    probe = "#include <vector>\nint main() { return 0; }\n"
    said = ""
    for command in present:
        works, said = compiles([*command, "-std=c++17", "-fPIC", *shared_flags()], probe)
        if works:
            return command
    return (
        f"{shlex.join(present[-1])} can't compile a trivial C++17 file; reinstall it or set "
        f"{variable} ({' '.join(said.split())[-300:]})"
    )


def compiler_version(compiler: Sequence[str], line: int = 0) -> str:
    """The line of `compiler --version` that names it."""
    works, said = run([*compiler, "--version"])
    return said.splitlines()[line].strip() if works and said.strip() else shlex.join(compiler)


def binding_flags() -> list[str] | str:
    """Include flags of Python and pybind11, or the reason why Python's headers are missing."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").is_file():
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return (
            f"Python's headers are missing (no Python.h in {include}); "
            f"install them, e.g. `apt-get install {package}`, and {REINSTALL}"
        )
    try:
        pybind11 = importlib.import_module("pybind11")
    except ImportError as error:
        raise BuildError(
            "pybind11 is missing: `pip install pybind11 ninja`, or build with isolation"
        ) from error
    return [f"-I{pybind11.get_include()}", f"-I{include}"]


# ------------------------------------------------------------------------------------- the modules


def cpu_module(version: str) -> Module | Skipped:
    """Build parameters of `fastproj._cpu`: a unit per instruction set, baseline flags elsewhere."""
    name = "fastproj._cpu"
    wanted = switch("FASTPROJ_CPU")
    if wanted is False:
        return Skipped(name, f"left out on request (FASTPROJ_CPU=0); unset it and {REINSTALL}")
    compiler, kernel_compiler = find_compiler(), find_compiler(KERNEL_CXX)
    includes = binding_flags() if isinstance(compiler, list) else []
    problems = [found for found in (compiler, kernel_compiler, includes) if isinstance(found, str)]
    if isinstance(compiler, str) or isinstance(kernel_compiler, str) or problems:
        reason = problems[0]
        if wanted:
            raise BuildError(f"FASTPROJ_CPU=1, but {reason}")
        return Skipped(name, reason)

    sanitize = bool(switch("FASTPROJ_SANITIZE"))
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if sanitize else []
    mode = ["-O1", "-g", "-fno-omit-frame-pointer", *checks] if sanitize else ["-O3", "-DNDEBUG"]
    flags = ["-std=c++17", *mode, "-fPIC", "-fvisibility=hidden", "-pthread"]
    flags += ["-Wall", "-Wextra", f"-I{CSRC}", *user_flags("CXXFLAGS")]
    base, kernel = [*compiler, *flags], [*kernel_compiler, *flags]
    # gcc before 13 warns about its own AVX-512 headers (GCC bug 105593).
    quiet = [
        flag
        for flag in ("-Wno-maybe-uninitialized", "-Wno-uninitialized")
        if compiles([*kernel_compiler, "-Werror", flag, "-c"], "int probe();\n")[0]
    ]

    isas = {"portable": list[str]()}
    for isa, (arch, machine) in ISAS.items():
        source = CSRC / "cpu" / f"isa_{isa}.cpp"
        probe = [*kernel_compiler, "-std=c++17", "-c", *machine]
        if source.is_file() and compiles(probe, isa_probe(arch))[0]:
            isas[isa] = [*machine, *(quiet if "-mavx512f" in machine else [])]
    have = [f"-DFASTPROJ_HAVE_{isa.upper()}" for isa in isas if isa != "portable"]
    bind = [*base, *have, *includes, f'-DFASTPROJ_VERSION="{version}"']
    cpu = CSRC / "cpu"
    units = [Compile(cpu / f"isa_{isa}.cpp", [*kernel, *more]) for isa, more in isas.items()]
    units += [
        Compile(source, bind if source.stem == "bindings" else [*base, *have])
        for source in sorted(cpu.glob("*.cpp"))
        if not source.stem.startswith("isa_")
    ]
    link = [*compiler, *shared_flags(), "-pthread", *checks, *user_flags("LDFLAGS"), "-ldl"]
    info = {"compiler": compiler_version(kernel_compiler), "isas": list(isas), "sanitize": sanitize}
    return Module(name, units, link, info)


def cuda_module(version: str) -> Module | Skipped:
    """Build parameters of `fastproj._cuda`: kernels by nvcc, launches and bindings by CXX."""
    name = "fastproj._cuda"
    wanted = switch("FASTPROJ_CUDA")
    if wanted is False:
        return Skipped(name, f"left out on request (FASTPROJ_CUDA=0); unset it and {REINSTALL}")

    def missing(reason: str, loud: bool) -> Skipped:
        if wanted:
            raise BuildError(f"FASTPROJ_CUDA=1, but {reason}")
        return Skipped(name, reason, loud)

    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if not sources:
        return missing("this source tree has no csrc/cuda/*.cu; use one that has", loud=False)
    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        looked = "CUDA_HOME, CUDA_PATH, PATH"
        return missing(f"no nvcc was found ({looked}); install the CUDA toolkit", loud=False)
    compiler, kernel_compiler = find_compiler(), find_compiler(KERNEL_CXX)
    includes = binding_flags() if isinstance(compiler, list) else []
    problems = [found for found in (compiler, kernel_compiler, includes) if isinstance(found, str)]
    if isinstance(compiler, str) or isinstance(kernel_compiler, str) or problems:
        return missing(problems[0], loud=True)
    through = [nvcc, "-ccbin", kernel_compiler[0]]
    problem = build_cuda.nvcc_problem(nvcc, [*through, "-std=c++17"])
    if problem is not None:
        return missing(problem, loud=True)
    try:
        archs, notes = build_cuda.choose_archs(build_cuda.known_archs(nvcc))
    except build_cuda.ArchError as error:
        if os.environ.get("FASTPROJ_CUDA_ARCHS"):  # ours: a mistake in it is never passed over
            raise BuildError(str(error)) from error
        return missing(str(error), loud=True)
    for note in notes:
        print(f"fastproj._cuda: {note}", file=sys.stderr, flush=True)

    through += [flag for arch in archs for flag in arch.flags()]
    device = [*through, "-std=c++17", "-O3", "-DNDEBUG", f"-I{CSRC}"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v,-warn-spills"]
    cuda_includes, cuda_libraries = build_cuda.toolkit_flags(nvcc)
    host = [*compiler, "-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-pthread"]
    host += ["-Wall", "-Wextra", f"-I{CSRC}", *user_flags("CXXFLAGS")]
    bind = [*host, *includes, f'-DFASTPROJ_VERSION="{version}"']
    # launch.cu holds no kernel, and calls the C++ library, which must be that of the bindings.
    listed = ",".join(str(10 * build_cuda.number(arch)) for arch in archs)
    launch = [*host, *cuda_includes, f"-D__CUDA_ARCH_LIST__={listed}", "-x", "c++"]
    units = [Compile(source, device, "NVCC") for source in sources if source.stem != "launch"]
    units += [Compile(source, launch) for source in sources if source.stem == "launch"]
    units.append(Compile(CSRC / "cuda" / "bindings.cpp", bind))
    link = [*compiler, *shared_flags(), "-pthread", *user_flags("LDFLAGS")]
    after = [*cuda_libraries, "-lcudart_static", "-ldl", "-lrt"]
    names = [str(arch) for arch in archs]
    info: dict[str, object] = {"compiler": compiler_version([nvcc], -2), "archs": names}
    return Module(name, units, link, info, names, after)


# ------------------------------------------------------------------------------------------- ninja

NINJA_RULES = """\
ninja_required_version = 1.8
rule compile
  command = $tool -MD -MF $out.d -c $in -o $out
  description = $label $in
  depfile = $out.d
  deps = gcc
rule compile_device
  command = $tool -MD -MF $out.d -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; exit 1; }
  description = $label $in
  depfile = $out.d
  deps = gcc
rule link
  command = $tool $in $libraries -o $out
  description = LINK $out
"""


def ninja_path(path: Path | str) -> str:
    """`path` as ninja wants it in a build line."""
    return re.sub(r"[$ :]", lambda match: "$" + match[0], str(path))


def ninja_text(module: Module, output: Path) -> str:
    """The ninja file of one module; objects lie beside it, named after their sources."""
    lines, objects = [NINJA_RULES], []
    for unit in module.units:
        stem = unit.source.stem if unit.source.suffix == ".cpp" else unit.source.name
        if stem == "bindings":  # all that the version of Python changes
            stem += f".{sys.implementation.cache_tag}"
        objects.append(ninja_path(f"{stem}.o"))
        tool = shlex.join(unit.command).replace("$", "$$")
        rule = "compile_device" if unit.label == "NVCC" else "compile"
        lines.append(f"build {objects[-1]}: {rule} {ninja_path(unit.source)}")
        lines.append(f"  tool = {tool}\n  label = {unit.label}")
    lines.append(f"build {ninja_path(output)}: link {' '.join(objects)}")
    lines.append(f"  tool = {shlex.join(module.link).replace('$', '$$')}")
    lines.append(f"  libraries = {shlex.join(module.libraries).replace('$', '$$')}\n")
    return "\n".join(lines)


def find_ninja() -> str:
    """The ninja of the Python package (a build requirement), or the one on PATH."""
    try:
        return str(Path(importlib.import_module("ninja").BIN_DIR, "ninja"))
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is missing: `pip install pybind11 ninja`, or build with isolation")
    return found


def object_folder(module: Module, flavour: str = "release") -> Path:
    """Where the objects of `module` are kept: one folder for each set of GPU architectures."""
    name = "-".join([module.name.rpartition("._")[2], *module.archs])
    return ROOT / "build" / f"ninja-{flavour}" / name


def build_module(module: Module, folder: Path, output: Path, *targets: str) -> None:
    """Compile and link `module` to `output`; `folder` is kept, so the next build is incremental.

    targets : objects to make; none makes all of them and links.
    """
    missing = [str(unit.source) for unit in module.units if not unit.source.is_file()]
    if missing:
        raise BuildError(f"{module.name}: source files are missing: {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_text(module, output.resolve()))
    jobs = os.environ.get("MAX_JOBS", "").strip()
    command = [find_ninja(), "-C", str(folder), *(["-j", jobs] if jobs else []), *targets]
    leave_out = module.name.replace("._", "_").upper()
    if subprocess.run(command).returncode != 0:
        raise BuildError(
            f"{module.name} did not compile; the compiler's message is above. If the compiler is "
            f"too old, set CXX to g++ >= 9 or clang++ >= 10; {leave_out}=0 leaves the module out"
        )
    reports = sorted(folder.glob("*.cu.o.txt"))
    faults = [
        fault for report in reports for fault in build_machine_code.faults(report.read_text())
    ]
    check_machine_code(
        module,
        output,
        "compiled to code that is slow for no visible reason",
        faults,
    )
    if not reports or not any(arch.startswith("90a") for arch in module.archs):
        return
    disassembler = build_cuda.find_disassembler(module.units[0].command[0])
    if disassembler is None:
        print(
            f"{module.name}: no cuobjdump with nvdisasm beside nvcc, in CUDA_HOME, on PATH or in "
            "Triton's wheel, so it was not checked that nothing touches registers while a wgmma "
            "uses them (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)",
            file=sys.stderr,
            flush=True,
        )
        return
    faults = [
        fault
        for unit in sorted(folder.glob("sm90_*.cu.o"))
        for fault in wgmma_faults(unit, disassembler)
    ]
    check_machine_code(module, output, "compiled to code that is wrong", faults)


def wgmma_faults(unit: Path, disassembler: str) -> list[str]:
    """The hazards of a compiled unit, kept beside it: disassembling takes seconds."""
    kept = unit.with_name(unit.name + ".hazards.txt")
    if not kept.is_file() or kept.stat().st_mtime_ns < unit.stat().st_mtime_ns:
        works, sass = run([disassembler, "-arch", "sm_90a", "-sass", str(unit)])
        if not works:
            raise BuildError(f"{disassembler} can't read {unit}: {sass[-300:]}")
        kept.write_text("\n".join(build_machine_code.hazards(sass)))
    return kept.read_text().splitlines()


def check_machine_code(module: Module, output: Path, what: str, faults: Sequence[str]) -> None:
    """Raise BuildError, and leave no module, where there are faults."""
    if not faults:
        return
    output.unlink(missing_ok=True)
    listed = "\n  ".join(faults)
    leave_out = module.name.replace("._", "_").upper()
    raise BuildError(
        f"{module.name} {what}:\n  {listed}\n"
        f"Try another CUDA toolkit, and report this with its version; {leave_out}=0 leaves the "
        "module out"
    )


# -------------------------------------------------------------------------- the setuptools command


def native_extensions() -> list[Extension]:
    """Names for setuptools; the build is ours, and optional because a module may be skipped."""
    return [
        Extension(name, sources=[], optional=True) for name in ("fastproj._cpu", "fastproj._cuda")
    ]


class NinjaBuild(build_ext):
    """`build_ext` through ninja; fastproj/_build_info.py records what was built, or why not."""

    def run(self) -> None:
        """Build, then keep an in-place tree free of modules that this build left out."""
        # The base class clears `inplace` while it builds, and copies the results afterwards.
        self._in_source_tree = bool(self.inplace)
        super().run()
        if self._in_source_tree:
            build_py = self.get_finalized_command("build_py")
            for extension in self.extensions:
                in_place, built = self._get_inplace_equivalent(build_py, extension)
                if not Path(built).exists():
                    Path(in_place).unlink(missing_ok=True)

    def build_extensions(self) -> None:
        """Build every module that can be, record all of them."""
        version = self.distribution.get_version()
        flavour = "sanitize" if switch("FASTPROJ_SANITIZE") else "release"
        record: dict[str, dict[str, object]] = {}
        for module in (cpu_module(version), cuda_module(version)):
            key = module.name.rpartition("._")[2]
            output = Path(self.get_ext_fullpath(module.name))
            if isinstance(module, Module):
                build_module(module, object_folder(module, flavour), output)
                record[key] = {"built": True, "reason": "", **module.info}
                record[key]["sources"] = source_digests(key)
            else:
                output.unlink(missing_ok=True)
                record[key] = {"built": False, "reason": module.reason}
                if module.loud:
                    warn(module)
        places = [Path(self.build_lib, "fastproj")]
        if self._in_source_tree:
            places.append(ROOT / "fastproj")
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            (place / "_build_info.py").write_text(build_info_text(record))


def warn(module: Skipped) -> None:
    """Say on stderr that a module is missing and what that costs."""
    bar = "*" * 98
    cost = {
        "fastproj._cpu": "fastproj will use its `reference` backend: correct, but far slower.",
        "fastproj._cuda": "On GPUs fastproj will use Triton; everything else works.",
    }
    print(
        f"\n{bar}\nWARNING: {module.name} is NOT built: {module.reason}.\n"
        f"{cost[module.name]}\n{bar}\n",
        file=sys.stderr,
        flush=True,
    )


def source_digests(key: str) -> dict[str, str]:
    """What the module "cpu" or "cuda" is compiled from: file, from the root -> digest.

    ``fastproj.backends.built`` compares them with what a checkout has later.
    """
    files = (path for folder in (CSRC, CSRC / key) for path in sorted(folder.iterdir()))
    return {
        path.relative_to(ROOT).as_posix(): hashlib.blake2b(
            path.read_bytes(), digest_size=8
        ).hexdigest()
        for path in files
        if path.suffix in SOURCES
    }


def build_info_text(record: dict[str, dict[str, object]]) -> str:
    """The source of fastproj/_build_info.py."""
    return (
        '"""What this installation was built with: written by the build."""\n\n'
        f"import json\n\nBUILT = json.loads({json.dumps(record, sort_keys=True)!r})\n"
    )
