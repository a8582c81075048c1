"""How `fastproj._cuda` is built: which nvcc, which architectures, and what ptxas must not say.

``build_native`` runs the compilers; everything here is a function of what they print.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_NVCC = (12, 4)
OLDEST_ARCH = 80  # the first whose tensor cores multiply bf16
SM90_REGISTERS = 168  # of a thread, in kernels that move registers from one warpgroup to another
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


# ---------------------------------------------------------------------------------- ptxas's report


@dataclass(frozen=True)
class Function:
    """One kernel in a report of ptxas -v; `name` is mangled, sizes are bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int


def read_report(report: str) -> list[Function]:
    """Every kernel that a report of ptxas -v speaks of."""
    found = []
    for block in re.split(r"(?=Compiling entry function ')", report)[1:]:
        head = re.match(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", block)
        registers = re.search(r"Used (\d+) registers", block)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        if head is None or registers is None or frame is None:
            raise ValueError(f"a report of ptxas -v that this build can't read:\n{block[:500]}")
        stack, stores, loads = map(int, frame.groups())
        found.append(Function(head[1], head[2], int(registers[1]), stack, stores + loads))
    return found


def faults(report: str) -> list[str]:
    """What makes a build fail: spilled registers, and wgmma that ptxas serialised (C75xx).

    And a wgmma kernel that starts with fewer registers than its warpgroups share out among
    themselves: its consumers would wait forever.
    """
    functions = read_report(report)
    found = [
        f"{function.name} for sm_{function.arch} spills registers: {function.spills} bytes"
        for function in functions
        if function.spills
    ]
    found += [
        f"{function.name} for sm_90a starts with {function.registers} registers a thread; "
        f"csrc/cuda/project_sm90.cuh counts on {SM90_REGISTERS}"
        for function in functions
        if "_sm90_kernel" in function.name
        and function.arch == "90a"
        and function.registers != SM90_REGISTERS
    ]
    found += [f"ptxas: {line}" for line in re.findall(r"\(C75\d+\)[^\n]*", report)]
    return found


# ------------------------------------------------------------------------------- the machine code

# What writes no vector register, whatever its first operand is.
_NO_RESULT = frozenset(
    "BAR BRA BSSY BSYNC DEPBAR EXIT FSETP ISETP LOP3P MEMBAR NOP PLOP3 R2UR RED ST STG STS SYNCS "
    "UTMALDG VOTEU WARPGROUP WARPSYNC".split()
)
_VECTOR = re.compile(r"\bR(\d+)\b")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)? .*?(0x[0-9a-f]+)$")

Instructions = list[tuple[int, str]]  # address, text


def find_disassembler(nvcc: str) -> str | None:
    """The toolkit's cuobjdump: beside nvcc, in CUDA's own folder, or on PATH."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(nvcc).resolve().parent, *(Path(home, "bin") for home in homes if home)]
    for folder in folders:
        if (folder / "cuobjdump").is_file():
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def read_sass(text: str) -> dict[str, Instructions]:
    """The instructions of every kernel in what `cuobjdump -sass` prints."""
    functions: dict[str, Instructions] = {}
    current: Instructions = []
    for line in text.splitlines():
        if header := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault(header[1], [])
        elif instruction := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            current.append((int(instruction[1], 16), instruction[2].strip()))
    return functions


def _touched(text: str) -> tuple[set[int], set[int]]:
    """Vector registers that an instruction writes and reads."""
    name, _, rest = re.sub(r"^@!?U?P\w+ ", "", text).partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    base = name.split(".")[0]
    # A comparison's or a carry's predicate stands before the result.
    first = next((i for i, each in enumerate(operands) if not re.match(r"!?U?PT?\d*$", each)), 0)
    width = 4 if ".128" in name else 1
    if re.search(r"\.64\b", name) or re.match(r"IMAD\.WIDE|DADD|DMUL|DFMA", name):
        width = 2
    written: set[int] = set()
    read: set[int] = set()
    for i, operand in enumerate(operands):
        for match in _VECTOR.finditer(operand):
            number = int(match[1])
            if i == first and "[" not in operand and base not in _NO_RESULT:
                written.update(range(number, number + width))
            else:
                stored = width if base.startswith("ST") and "[" not in operand else 1
                read.update(range(number, number + stored))
    return written, read


def _unfinished(code: Instructions) -> list[str]:
    """Instructions that touch what a wgmma in flight still reads or writes.

    In the order of the code; a loop with products is gone through twice.
    """
    position = {address: i for i, (address, _) in enumerate(code)}
    repeated: set[int] = set()
    found: list[str] = []
    groups: list[tuple[set[int], set[int]]] = []  # sums and fragments of a committed group
    sums: set[int] = set()
    fragments: set[int] = set()
    i = 0
    while i < len(code):
        address, text = code[i]
        i += 1
        if product := re.search(r"\bHGMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+)|gdesc)", text):
            count, sum_, fragment = product[1], product[2], product[3]
            sums.update(range(int(sum_), int(sum_) + int(count) // 2))
            if fragment:
                fragments.update(range(int(fragment), int(fragment) + 4))
            if "gsb0" in text:
                groups.append((sums, fragments))
                sums, fragments = set(), set()
            continue
        if wait := re.search(r"\bWARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)", text):
            groups = groups[max(0, len(groups) - int(wait[1], 16)) :]
            continue
        written, read = _touched(text)
        for busy_sums, busy_fragments in [*groups, (sums, fragments)]:
            if written & (busy_sums | busy_fragments) or read & busy_sums:
                found.append(f"{address:#x} {text}")
                break
        branch = _BRANCH.search(text)
        start = position.get(int(branch[1], 16)) if branch else None
        if start is not None and start < i and address not in repeated:
            repeated.add(address)
            if any("HGMMA" in line for _, line in code[start:i]):
                i = start
    return found


def hazards(sass: str) -> list[str]:
    """What `cuobjdump -sass` shows of registers that are touched while a wgmma uses them.

    The tensor cores read fragments, and read and write sums, until `wgmma.wait_group` has waited
    for them (PTX ISA, wgmma.wait_group). ptxas before CUDA 13.3 does not always see to that: see
    the release notes of 13.3.
    """
    found = []
    for name, code in read_sass(sass).items():
        wrong = _unfinished(code)
        if wrong:
            found.append(
                f"{name} touches registers that a wgmma in flight uses, {len(wrong)} times; "
                f"first {wrong[0]}"
            )
    return found
