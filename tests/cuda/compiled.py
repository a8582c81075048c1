"""What nvcc makes of csrc/cuda: registers, spills, serialised wgmma, instructions in the main loop.

``python tests/cuda/compiled.py`` compiles everything for every architecture and rewrites
``resources.txt``, the committed table.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import emulation

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("resources.txt")
ARCHS = ("80", "86", "89", "90a", "100", "120")
SM90_UNITS = ("sm90_rademacher", "sm90_rademacher_split", "sm90_gaussian", "sm90_gaussian_split")
SM80_UNITS = ("sm80_rademacher", "sm80_rademacher_split", "sm80_gaussian", "sm80_gaussian_split")
OTHER_UNITS = ("transpose", "simple")
KERNEL = re.compile(
    r"project_(?P<kind>rademacher|gaussian)_(?P<variant>sm80|sm90)_kernel"
    r"INS0_(?:4(?P<bf16>Bf16)|3F16)ELi(?P<terms>\d+)ELi(?P<block_b>\d+)E"
)


@dataclass(frozen=True)
class Function:
    """One kernel in one cubin; slots: instructions of its main loop per k16 step and 64 columns."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    products: int = 0  # HGMMA or HMMA
    local: int = 0  # loads and stores of local memory in the whole kernel
    slots: float | None = None
    fold: float | None = None  # of the slots, additions that fold accumulators

    @property
    def shared(self) -> int | None:
        """Dynamic shared memory of a projection kernel."""
        match = re.fullmatch(r"(\w+) (sm\d+) (\w+) x(\d) B(\d+)", self.name)
        if match is None:
            return None
        kind, variant, operand, terms, block_b = match.groups()
        return emulation.kernel_facts(variant, kind, operand, int(terms), int(block_b))["shared"]


@cache
def nvcc() -> str | None:
    """The compiler: that of CUDA_HOME or CUDA_PATH, else the first on PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        candidate = Path(os.environ.get(variable, "")) / "bin" / "nvcc"
        if os.environ.get(variable) and candidate.is_file():
            return str(candidate)
    return shutil.which("nvcc")


@cache
def toolkit() -> str:
    """The compiler's release, such as 13.0."""
    compiler = nvcc()
    assert compiler is not None
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    assert match is not None, text
    return match[1]


@cache
def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one in Triton's wheel."""
    compiler = nvcc()
    if compiler is not None:
        beside = Path(compiler).resolve().parent / "cuobjdump"
        if beside.is_file():
            return str(beside)
    found = shutil.which("cuobjdump")
    if found is None:
        import importlib.util

        spec = importlib.util.find_spec("triton")
        if spec is not None and spec.origin is not None:
            inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            found = str(inside) if inside.is_file() else None
    return found


@cache
def digest() -> str:
    """Of the sources and the compiler."""
    files = sorted([*(ROOT / "csrc").glob("*.hpp"), *(ROOT / "csrc" / "cuda").glob("*.*")])
    content = b"".join(path.read_bytes() for path in files) + toolkit().encode()
    return hashlib.sha256(content).hexdigest()[:16]


def compile_unit(unit: str, arch: str) -> tuple[str, Path]:
    """The compiler's report on csrc/cuda/`unit`.cu for `arch`, and the cubin; both are kept."""
    compiler = nvcc()
    assert compiler is not None
    folder = ROOT / "build" / "cubins" / digest()
    folder.mkdir(parents=True, exist_ok=True)
    cubin, report = folder / f"{unit}-{arch}.cubin", folder / f"{unit}-{arch}.txt"
    if not report.exists():
        command = [compiler, "-std=c++17", "-O3", "-DNDEBUG", f"-I{ROOT / 'csrc'}", "-cubin"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v,-warn-spills"]
        partial = folder / f"{unit}-{arch}.{os.getpid()}.cubin"
        command += [str(ROOT / "csrc" / "cuda" / f"{unit}.cu"), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        partial.replace(cubin)
        report.write_text(done.stdout + done.stderr)
    return report.read_text(), cubin


def compile_pairs(pairs: list[tuple[str, str]]) -> None:
    """Compile (unit, arch) pairs; MAX_JOBS at once, one a processor if unset."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: compile_unit(*pair), pairs))


def kernel_name(mangled: str) -> str | None:
    """A short name; None for the empty stand-ins of sm_90a kernels on other architectures."""
    match = KERNEL.search(mangled)
    if match is not None:
        operand = "bf16" if match["bf16"] else "f16"
        return f"{match['kind']} {match['variant']} {operand} x{match['terms']} B{match['block_b']}"
    match = re.search(r"cuda\d+(\w+?_kernel)", mangled)
    if match is None:
        return None
    kind = re.search(r"NS_4KindE(\d)", mangled)
    number = re.search(r"Li(\d)EEE", mangled)
    words = [match[1].removesuffix("_kernel").replace("_", " ")]
    words += [("rademacher", "gaussian")[int(kind[1])]] if kind else []
    words += [f"x{number[1]}"] if number and "transpose_sm80" in mangled else []
    words += ["double"] if "kernelIdE" in mangled else ["float"] if "kernelIfE" in mangled else []
    return " ".join(words)


def resources(report: str, arch: str) -> list[Function]:
    """The kernels in a report of ptxas -v."""
    found = []
    blocks = re.split(r"Compiling entry function '", report)[1:]
    for block in blocks:
        name = kernel_name(block.split("'")[0])
        registers = re.search(r"Used (\d+) registers", block)
        frame = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        assert name is not None
        assert registers is not None
        assert frame is not None
        if "sm90" in name and arch != "90a":
            continue
        stack, stores, loads = map(int, frame.groups())
        found.append(Function(name, arch, int(registers[1]), stack, stores + loads))
    return found


def serialised(report: str) -> list[str]:
    """ptxas's complaints about wgmma and register reallocation, C75xx."""
    return re.findall(r"\(C75\d+\)[^\n]*", report)


@cache
def disassemble(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Instructions (address, text) of each kernel in a cubin."""
    tool = disassembler()
    assert tool is not None
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
    functions: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in text.splitlines():
        header = re.match(r"\s*Function : (\S+)", line)
        if header:
            current = functions.setdefault(header[1], [])
        instruction = re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if instruction:
            current.append((int(instruction[1], 16), instruction[2].strip()))
    return functions


def main_loop(instructions: list[tuple[int, str]]) -> list[str]:
    """The innermost loop that holds products."""
    products = [address for address, text in instructions if re.search(r"\bH(G)?MMA\b", text)]
    loops = []
    for address, text in instructions:
        target = re.search(r"\bBRA(?:\.\S+)? .*?(0x[0-9a-f]+)$", text)
        if target and int(target[1], 16) <= address:
            start = int(target[1], 16)
            inside = sum(start <= product <= address for product in products)
            if inside:
                loops.append((inside / (address - start), start, address))
    assert loops, "no loop with products"
    _, start, end = max(loops)
    return [text for address, text in instructions if start <= address <= end]


def inspect(unit: str, arch: str) -> list[Function]:
    """Resources of a unit's kernels, with what the disassembly of the sm_90a ones says."""
    report, cubin = compile_unit(unit, arch)
    functions = resources(report, arch)
    if arch != "90a" or unit not in SM90_UNITS:
        return functions
    by_name = {kernel_name(name): code for name, code in disassemble(cubin).items()}
    result = []
    for function in functions:
        code = by_name[function.name]
        texts = [text for _, text in code]
        body = main_loop(code)
        words = Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for text in body)
        terms = int(function.name.split(" x")[1][0])
        steps = words["HGMMA"] / terms
        local = sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in texts)
        result.append(
            replace(
                function,
                products=sum("HGMMA" in text for text in texts),
                local=local,
                slots=len(body) / steps,
                fold=words["FADD"] / steps,
            )
        )
    return result


def table_line(function: Function) -> str:
    """One line of the table."""
    cells = [
        f"{function.name:28}", f"{function.arch:>4}", f"{function.registers:9}",
        f"{function.spills:6}", f"{'-' if function.shared is None else function.shared:>7}",
        f"{'-' if function.slots is None else format(function.slots, '.1f'):>6}",
        f"{'-' if function.fold is None else format(function.fold, '.1f'):>5}",
    ]  # fmt: skip
    return " ".join(cells).rstrip()


def read_table() -> tuple[str, set[str]]:
    """The toolkit that made the committed table, and its lines."""
    lines = TABLE.read_text().splitlines()
    match = re.search(r"nvcc (\d+\.\d+)", lines[0])
    assert match is not None
    return match[1], {line for line in lines if line and not line.startswith("#")}


def write_table() -> None:
    """Compile everything and rewrite the committed table."""
    pairs = [(unit, arch) for arch in ARCHS for unit in (*SM80_UNITS, *OTHER_UNITS)]
    pairs += [(unit, "90a") for unit in SM90_UNITS]
    compile_pairs(pairs)
    functions = [function for pair in pairs for function in inspect(*pair)]
    head = [
        f"# Made by `python tests/cuda/compiled.py` with nvcc {toolkit()}. slots: instructions in",
        "# the main loop per warp, k16 step and 64 columns (issue slots); fold: those of them that",
        "# add accumulators up. Kernels of one or two terms fold outside the loop.",
        "# kernel                    arch registers spills  shared  slots  fold",
    ]
    TABLE.write_text("\n".join([*head, *map(table_line, functions)]) + "\n")


if __name__ == "__main__":
    write_table()
    print(TABLE.read_text())
