"""What nvcc makes of csrc/cuda: registers, spills, instructions in the main loop.

It reads the objects of the build, and the reports that the build keeps beside them.
``python -m tests.cuda.compiled`` rewrites ``resources.txt``, the committed table.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

import build_cuda
import build_machine_code
import build_native
from tests import ROOT
from tests.cuda import emulation

TABLE = Path(__file__).with_name("resources.txt")
ARCHS = ("80", "86", "89", "90a", "100", "120")
# Those that `make test` compiles; the others are compiled by the first of the slow tests.
INSTALLED = re.findall(r"^TEST_ARCHS := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[0]
ESSENTIAL = tuple(word.removesuffix("+PTX") for word in INSTALLED.split())
SM90_UNITS = ("sm90_rademacher", "sm90_rademacher_split", "sm90_gaussian", "sm90_gaussian_split")
SM80_UNITS = ("sm80_rademacher", "sm80_rademacher_split", "sm80_gaussian", "sm80_gaussian_split")
SJLT_UNITS = ("sjlt", "sjlt_f32", "sjlt_f64", "sjlt_bf16", "sjlt_f16")
OTHER_UNITS = ("transpose", "simple", *SJLT_UNITS)
KERNEL = re.compile(
    r"project_(?P<kind>rademacher|gaussian)_(?P<variant>sm80|sm90)_kernel"
    r"INS0_(?:4(?P<bf16>Bf16)|3F16)ELi(?P<terms>\d+)ELi(?P<block_b>\d+)E"
)
SJLT = re.compile(
    r"project_sjlt_kernelILNS_5DtypeE(?P<dtype>\d)ELi(?P<groups>\d+)ELi(?P<batch>\d)ELb(?P<staged>\d)E"
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
    """The compiler that the build would use."""
    return build_cuda.find_nvcc()


@cache
def toolkit() -> str:
    """The compiler's release, such as 13.0."""
    compiler = nvcc()
    assert compiler is not None
    version = build_cuda.nvcc_version(compiler)
    assert version is not None
    return ".".join(map(str, version))


def objects(arch: str) -> Path:
    """A folder of compiled units, each an object and a report, with `arch` among others."""
    return built_for(INSTALLED if arch in ESSENTIAL else "all")


@cache
def built_for(archs: str) -> Path:
    """Made by the build's own commands, in its own folder: after `make test` has installed the
    package there is nothing left to compile for INSTALLED.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTPROJ_CUDA_ARCHS", raising=False)
        patch.setenv("TORCH_CUDA_ARCH_LIST", archs)
        patch.setenv("FASTPROJ_CUDA", "1")
        module = build_native.cuda_module("0")
    assert isinstance(module, build_native.Module)
    folder = build_native.object_folder(module)
    device = [f"{unit.source.name}.o" for unit in module.units if unit.source.suffix == ".cu"]
    build_native.build_module(module, folder, folder / "unused.so", *device)
    return folder


@cache
def disassembler() -> str | None:
    """The cuobjdump that the build would use."""
    return build_cuda.find_disassembler(nvcc())


def report(unit: str, arch: str) -> str:
    """What nvcc and ptxas said of csrc/cuda/`unit`.cu, for `arch` and others."""
    return (objects(arch) / f"{unit}.cu.o.txt").read_text()


def kernel_name(mangled: str) -> str | None:
    """A short name; None for the empty stand-ins of sm_90a kernels on other architectures."""
    match = KERNEL.search(mangled)
    if match is not None:
        operand = "bf16" if match["bf16"] else "f16"
        return f"{match['kind']} {match['variant']} {operand} x{match['terms']} B{match['block_b']}"
    match = SJLT.search(mangled)
    if match is not None:
        dtype = ("f32", "f64", "bf16", "f16")[int(match["dtype"])]
        staged = "" if match["staged"] == "1" else " L2"
        return f"sjlt {dtype} groups {match['groups']} B{match['batch']}{staged}"
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


def resources(text: str, arch: str) -> list[Function]:
    """The kernels for `arch` in a report of ptxas -v."""
    found = []
    for function in build_machine_code.read_report(text):
        name = kernel_name(function.name)
        assert name is not None
        if function.arch == arch and (arch == "90a" or "sm90" not in name):
            found.append(Function(name, arch, function.registers, function.stack, function.spills))
    return found


@cache
def sass(unit: str, arch: str) -> str:
    """What cuobjdump prints of a unit for one architecture."""
    tool = disassembler()
    assert tool is not None
    command = [tool, "-arch", f"sm_{arch}", "-sass", str(objects(arch) / f"{unit}.cu.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def disassemble(unit: str, arch: str) -> dict[str, build_machine_code.Instructions]:
    """Instructions of each kernel of a unit for one architecture."""
    return build_machine_code.read_sass(sass(unit, arch))


def main_loop(instructions: build_machine_code.Instructions) -> list[str]:
    """The innermost loop that holds products."""
    products = [each.address for each in instructions if each.base in ("HMMA", "HGMMA")]
    loops = []
    for each in instructions:
        if each.target is not None and each.target <= each.address:
            inside = sum(each.target <= product <= each.address for product in products)
            if inside:
                loops.append((inside / (each.address - each.target), each.target, each.address))
    assert loops, "no loop with products"
    _, start, end = max(loops)
    return [each.text for each in instructions if start <= each.address <= end]


def inspect(unit: str, arch: str) -> list[Function]:
    """Resources of a unit's kernels, with what the disassembly of the sm_90a ones says."""
    functions = resources(report(unit, arch), arch)
    if arch != "90a" or unit not in SM90_UNITS:
        return functions
    by_name = {kernel_name(name): code for name, code in disassemble(unit, arch).items()}
    result = []
    for function in functions:
        code = by_name[function.name]
        texts = [each.text for each in code]
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
    functions = [function for pair in pairs for function in inspect(*pair)]
    head = [
        f"# Made by `python -m tests.cuda.compiled` with nvcc {toolkit()}. slots: instructions in",
        "# the main loop per warp, k16 step and 64 columns (issue slots); fold: those of them that",
        "# add accumulators up. Kernels of one or two terms fold outside the loop.",
        "# kernel                    arch registers spills  shared  slots  fold",
    ]
    TABLE.write_text("\n".join([*head, *map(table_line, functions)]) + "\n")


if __name__ == "__main__":
    write_table()
    print(TABLE.read_text())
