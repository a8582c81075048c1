"""The CUDA toolchain: which nvcc, which disassembler, which architectures and their flags.

``build_native`` runs the compilers; ``build_machine_code`` reads what they made.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's packages install it
OLDEST_NVCC = (12, 4)
OLDEST_ARCH = 80  # the first whose tensor cores multiply bf16
# Built where nothing else is asked for: each that this nvcc knows, with PTX of the last one.
OURS = ("80", "86", "89", "90a", "100", "120")
# What TORCH_CUDA_ARCH_LIST may say instead of numbers.
FAMILIES = {
    "maxwell": "5.0;5.2+PTX",
    "pascal": "6.0;6.1+PTX",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere": "8.0;8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}


class ArchError(ValueError):
    """An architecture list that can't be built."""


@dataclass(frozen=True)
class Arch:
    """Code for one architecture, such as "90a"; with `ptx` also for later ones, by the driver."""

    name: str
    ptx: bool = False

    def __str__(self) -> str:
        return self.name + "+PTX" * self.ptx

    def flags(self) -> list[str]:
        """nvcc's flags. PTX of "90a" would run on 9.0 alone, so that of "90" is kept."""
        if not self.ptx:
            return [f"-gencode=arch=compute_{self.name},code=sm_{self.name}"]
        base = self.name.rstrip("af")
        if base != self.name:
            return [*Arch(self.name).flags(), f"-gencode=arch=compute_{base},code=compute_{base}"]
        return [f"-gencode=arch=compute_{base},code=[sm_{base},compute_{base}]"]


# ------------------------------------------------------------------------------------ the compiler


def run(command: Sequence[str]) -> tuple[bool, str]:
    """Whether `command` exits with 0, and all it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def find_nvcc() -> str | None:
    """Path of the nvcc to use: that of CUDA_HOME or CUDA_PATH, else the first on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and Path(home, "bin", "nvcc").is_file():
            return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def nvcc_version(nvcc: str) -> tuple[int, int] | None:
    """Such as (13, 0); None where nvcc doesn't say."""
    match = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"])[1])
    return (int(match[1]), int(match[2])) if match else None


def nvcc_problem(nvcc: str, command: Sequence[str]) -> str | None:
    """None when `command` (nvcc and its flags) compiles and links a kernel, else why not."""
    version = nvcc_version(nvcc)
    if version is None:
        return f"{nvcc} does not run; reinstall the CUDA toolkit"
    if version < OLDEST_NVCC:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST_NVCC))
        return f"{nvcc} is of CUDA {found}; install the CUDA toolkit {oldest} or newer"
    probe = (
        "#include <cuda.h>\n#include <cuda_runtime.h>\n__global__ void probe() {}\n"
        "int launch() { probe<<<1, 1>>>(); return cudaGetLastError(); }\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(probe)
        output = str(Path(folder, "probe.so"))
        works, said = run([*command, "-shared", "-cudart", "static", str(source), "-o", output])
    if works:
        return None
    return (
        f"{nvcc} can't compile a trivial kernel; reinstall the CUDA toolkit or set CXX to a "
        f"compiler that it takes ({' '.join(said.split())[-300:]})"
    )


def toolkit_flags(nvcc: str) -> tuple[list[str], list[str]]:
    """Where `nvcc` has the toolkit's headers (-I) and libraries (-L)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("\n")
        said = run([nvcc, "--dryrun", "-c", str(source)])[1]
    found = {
        name: shlex.split(words) for name, words in re.findall(r"^#\$ (\w+)=(.*)$", said, re.M)
    }
    return found.get("INCLUDES", []), found.get("LIBRARIES", [])


def find_disassembler(nvcc: str | None) -> str | None:
    """A cuobjdump, with the nvdisasm that it calls: beside nvcc, in CUDA's own folders, on PATH, or
    in a package, Triton's or NVIDIA's.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT]
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(home, "bin") for home in homes if home]
    on_path = shutil.which("cuobjdump")
    folders += [Path(on_path).parent] if on_path else []
    for package, inside in (("triton", "backends/nvidia/bin"), ("nvidia", "cu*/bin")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            folders += sorted(Path(place).glob(inside))
    for folder in folders:
        helped = (folder / "nvdisasm").is_file() or shutil.which("nvdisasm")
        if (folder / "cuobjdump").is_file() and helped:
            return str(folder / "cuobjdump")
    return None


# -------------------------------------------------------------------------------- the architectures


def known_archs(nvcc: str) -> set[str]:
    """The numbers that this nvcc compiles for, such as "90", without the letter."""
    return {
        name.rstrip("af")
        for name in re.findall(r"compute_(\w+)", run([nvcc, "--list-gpu-arch"])[1])
    }


def parse_archs(text: str, variable: str) -> list[Arch]:
    """ "80;90a", "8.0 9.0+PTX" or "Hopper" as architectures. "9.0" means 90a: all of its GPUs
    have what the "a" adds.

    Raises ArchError for a word that is none of these.
    """
    archs: dict[str, bool] = {}
    for word in filter(None, re.split(r"[;,\s]+", text)):
        family = FAMILIES.get(word.lower())
        if family is not None:
            for arch in parse_archs(family, variable):
                archs[arch.name] = archs.get(arch.name, False) or arch.ptx
            continue
        match = re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?|(\d{2,3})([af]?)(\+PTX)?", word)
        if match is None:
            raise ArchError(
                f'{variable}: received {text!r}; expected a list such as "80;90a", "8.0 9.0+PTX" '
                f"or names of {', '.join(name.capitalize() for name in FAMILIES)}"
            )
        name = match[1] + match[2] + match[3] if match[1] else match[5] + match[6]
        name = "90a" if name == "90" else name
        archs[name] = archs.get(name, False) or bool(match[4] or match[7])
    return [Arch(name, ptx) for name, ptx in archs.items()]


def number(arch: Arch) -> int:
    """Such as 90 for "90a"."""
    return int(arch.name.rstrip("af"))


def choose_archs(known: set[str]) -> tuple[list[Arch], list[str]]:
    """Architectures to build for, and a sentence on each that was asked for and left out.

    FASTPROJ_CUDA_ARCHS is ours and must be right. TORCH_CUDA_ARCH_LIST speaks to other packages
    too: what is too old for these kernels, or not known to this nvcc, is left out of it.

    Raises ArchError where nothing is left.
    """
    notes: list[str] = []
    variable = "FASTPROJ_CUDA_ARCHS"
    text = os.environ.get(variable, "").strip()
    if not text:
        variable = "TORCH_CUDA_ARCH_LIST"
        text = os.environ.get(variable, "").strip()
    if not text or text.lower() in ("all", "common"):
        names = [name for name in OURS if name.rstrip("af") in known]
        if not names:
            raise ArchError(
                f"this nvcc compiles for none of {', '.join(OURS)}; set FASTPROJ_CUDA_ARCHS"
            )
        last = next((name for name in reversed(names) if name.isdigit()), None)
        return [Arch(name, name == last) for name in names], notes

    archs: list[Arch] = []
    for arch in parse_archs(text, variable):
        reason = ""
        if number(arch) < OLDEST_ARCH:
            reason = f"sm_{arch.name} multiplies no bf16; sm_{OLDEST_ARCH} is the first that does"
        elif arch.name.rstrip("af") not in known:
            newest = max(known, key=int, default="none")
            reason = f"this nvcc does not know sm_{arch.name}; its newest is sm_{newest}"
        if not reason:
            archs.append(arch)
        elif variable == "FASTPROJ_CUDA_ARCHS":
            raise ArchError(f"{variable}: received {text!r}: {reason}")
        else:
            notes.append(f"{variable}: {arch} is left out: {reason}")
    if not archs:
        raise ArchError(f"{variable}: received {text!r}: {'; '.join(notes) or 'no architecture'}")
    return archs, notes
