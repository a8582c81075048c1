"""Compile kernels without a GPU and read the machine code: ``python -m fastproj.kernels.aot``.

It makes the table in ``kernels/RESOURCES.md``. The table gives, for each kernel, shape and
architecture: registers, spills, matrix instructions, whether R's operand stays in registers, and
instructions per entry of R. These are counts in the compiled code, not timings.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import config
from .entries import matrix_kernel
from .launch_product import BLOCK_T, part_of, stretch_of, warps_of
from .product import project_product_kernel
from .project import project_gaussian_kernel, project_rademacher_kernel, reduce_kernel
from .sjlt import matrix_sjlt_kernel, project_sjlt_kernel, project_transpose_sjlt_kernel
from .transpose import project_transpose_kernel

POINTER = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}


@dataclass(frozen=True)
class Case:
    """One kernel as ``launch`` would compile it, for gradients that are contiguous and aligned."""

    operation: str  # "project", "product", "transpose", "matrix" or "reduce"
    kind: str = "rademacher"
    dtype: str = "bfloat16"
    terms: int = 1
    B: int = 64
    K: int = 4096
    masked: bool = False
    aligned: int = 16
    block: int = 0  # of kind sjlt

    def __str__(self) -> str:
        notes = [self.operation, self.kind, self.dtype]
        if self.block:
            notes.append(f"block {self.block}")
        if (
            self.kind != "sjlt"
            and self.dtype == "float32"
            and self.operation in ("project", "transpose")
        ):
            notes[-1] += f" x{self.terms}"
        notes += ["masked"] * self.masked
        if self.aligned != 16:
            notes.append(f"aligned to {self.aligned}")
        return " ".join(notes)


@dataclass(frozen=True)
class Report:
    """What the compiled code holds; from ``register_operand`` on, what NVIDIA's alone shows."""

    case: Case
    arch: str
    tiles: str
    registers: int
    spills: int  # local-memory instructions
    spills_in_loop: int
    shared: int  # bytes
    matrix_instruction: str  # "wgmma", "mma", "mfma" or ""
    register_operand: bool | None = (
        None  # R's tile reaches the matrix instruction without shared memory
    )
    # Instructions a thread issues for each entry of R that it makes (kind sjlt: that it adds, one
    # for each sample).
    per_entry: float | None = None
    loop: dict[str, int] = field(default_factory=dict)  # opcodes of the main loop
    waits: int = 0  # waits for wgmma in the loop
    groups: int = 0  # wgmma groups committed in the loop
    in_flight: int | None = None  # tiles of G that the loop leaves on their way when it waits
    barriers: int = 0  # in the loop


def target(arch: str) -> GPUTarget:
    """Triton's target for "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def _specialise(case: Case, arch: str) -> tuple[Any, dict[str, Any], dict[str, str], int, int]:
    """Kernel, constants, pointer types, warps and stages."""
    if case.kind == "sjlt":
        return _specialise_sjlt(case, arch)
    gaussian = case.kind == "gaussian"
    pointers = {"table_ptr": "*i16"}
    if case.operation == "project":
        chosen = config.choose(
            arch,
            case.dtype,
            case.kind,
            case.terms,
            case.B,
            case.K,
            direct=case.aligned > 1 and not case.masked,
        )
        kernel = project_gaussian_kernel if gaussian else project_rademacher_kernel
        constants = {
            "BLOCK_B": chosen.BLOCK_B,
            "BLOCK_K": chosen.BLOCK_K,
            "STEP_ROWS": chosen.STEP_ROWS,
            "TERMS": case.terms,
            "CONTIGUOUS": True,
            "ALIGNED": 1 if case.masked else case.aligned,
            "MASKED": case.masked,
            "UNIT": config.unit(arch),
            "NUM_WARPS": chosen.num_warps,
        }
        pointers |= {
            "g_ptr": POINTER[case.dtype],
            "workspace_ptr": "*fp64" if case.dtype == "float64" else "*fp32",
        }
        return kernel, constants, pointers, chosen.num_warps, chosen.num_stages
    if case.operation == "transpose":
        block_b, block_k, warps = config.choose_transpose(case.dtype, case.kind, case.B)
        constants = {
            "GAUSSIAN": gaussian,
            "BLOCK_B": block_b,
            "BLOCK_K": block_k,
            "TERMS": case.terms,
            "UNIT": config.unit(arch),
            "NUM_WARPS": warps,
        }
        out = "*fp64" if case.dtype == "float64" else "*fp32"
        pointers |= {"y_ptr": POINTER[case.dtype], "out_ptr": out}
        return project_transpose_kernel, constants, pointers, warps, 2
    if case.operation == "matrix":
        constants = {"GAUSSIAN": gaussian, "BLOCK_K": 64, "NUM_WARPS": 4}
        return matrix_kernel, constants, pointers | {"out_ptr": POINTER[case.dtype]}, 4, 2
    if case.operation == "reduce":
        constants = {"ACCUMULATE": True, "BLOCK": 512}
        pointers = {"workspace_ptr": "*fp32", "out_ptr": "*fp32"}
        return reduce_kernel, constants, pointers, 4, 2
    raise ValueError(f"received operation {case.operation!r}; expected one of Case's")


def _specialise_sjlt(case: Case, arch: str) -> tuple[Any, dict[str, Any], dict[str, str], int, int]:
    """``_specialise`` of kind sjlt."""
    constants: dict[str, Any] = {"LOG2": case.block.bit_length() - 1}
    sums = "*fp64" if case.dtype == "float64" else "*fp32"
    if case.operation == "project":
        chosen = config.choose(
            arch, case.dtype, case.kind, case.terms, case.B, case.K, direct=not case.masked
        )
        constants |= {"BLOCK_B": chosen.BLOCK_B, "BLOCK_K": chosen.BLOCK_K}
        constants |= {"UNIT_STRIDE": True, "MASKED": case.masked}
        halves = case.dtype in ("bfloat16", "float16") and case.aligned >= 4
        constants["PAIRS"] = halves and not case.masked
        pointers = {"g_ptr": POINTER[case.dtype], "workspace_ptr": sums}
        return project_sjlt_kernel, constants, pointers, chosen.num_warps, chosen.num_stages
    if case.operation == "product":
        stretch = stretch_of(case.block)
        constants |= {"STRETCH": stretch, "PART": part_of(stretch), "BLOCK_T": BLOCK_T[case.dtype]}
        constants |= {"ALIGNED": not case.masked, "PRECISION": "ieee", "UNIT": config.unit(arch)}
        factor = POINTER[case.dtype]
        pointers = {"left_ptr": factor, "right_ptr": factor, "workspace_ptr": sums}
        return project_product_kernel, constants, pointers, warps_of(stretch), 2
    if case.operation == "transpose":
        block_b, rows, warps = config.choose_transpose_sjlt(case.dtype, case.B, case.block)
        constants |= {"BLOCK_B": block_b, "ROWS": rows}
        pointers = {"y_ptr": POINTER[case.dtype], "out_ptr": sums}
        return project_transpose_sjlt_kernel, constants, pointers, warps, 1
    if case.operation == "matrix":
        rows, warps = config.choose_matrix_sjlt(case.block)
        constants |= {"ROWS": rows}
        return matrix_sjlt_kernel, constants, {"out_ptr": POINTER[case.dtype]}, warps, 1
    raise ValueError(f"received operation {case.operation!r}; expected one of Case's")


def compile_case(case: Case, arch: str) -> tuple[Any, dict[str, Any], int]:
    """Triton's compiled kernel, its constants and its warps."""
    kernel, constants, pointers, warps, stages = _specialise(case, arch)
    annotations = kernel.fn.__annotations__
    signature = {
        name: "constexpr"
        if name in constants
        else pointers.get(name, "i64" if "int64" in str(annotations.get(name)) else "i32")
        for name in kernel.arg_names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in pointers
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, **config.OPTIONS}
    return triton.compile(source, target=target(arch), options=options), constants, warps


def _tool(name: str, *arguments: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(folder / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Code:
    """Instructions in order, each with its text, and where labels point."""

    lines: list[str]
    labels: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> Code:
        lines: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if label := re.match(r"\s*(\.L_\S+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                lines.append(instruction[1].strip())
        return cls(lines, labels)

    def branch_target(self, i: int) -> int | None:
        match = re.search(r"BRA\S*\s.*?`\((\.L_\S+)\)", self.lines[i])
        return self.labels.get(match[1]) if match else None

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) of every backward branch."""
        targets = [(self.branch_target(i), i) for i in range(len(self.lines))]
        return [(first, i) for first, i in targets if first is not None and first <= i]


def opcode(line: str) -> str:
    """``@P0 IMAD.WIDE.U32 R1, ...`` to ``IMAD.WIDE``; other suffixes are dropped."""
    name = re.sub(r"^@!?U?PT?\d*\s+", "", line).split()[0]
    base, *suffixes = name.split(".")
    return f"{base}.WIDE" if base == "IMAD" and "WIDE" in suffixes else base


def _weights(code: Code, first: int, last: int) -> list[float]:
    """How often an instruction of the loop is issued in an iteration: 1/2 behind a branch.

    The one branch of a loop decides whether a half panel needs new words: every second time.
    """
    weights = [1.0] * (last - first + 1)
    for i in range(first, last + 1):
        stop = code.branch_target(i)
        if stop is not None and i < stop <= last and code.lines[i].startswith("@"):
            for j in range(i + 1, stop):
                weights[j - first] = 0.5
    return weights


def inspect_nvidia(case: Case, arch: str) -> Report:
    """Compile for an NVIDIA architecture and read the SASS."""
    compiled, constants, warps = compile_case(case, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = Code.parse(_tool("nvdisasm", "-c", file.name))
        usage = _tool("cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    spill = re.compile(r"\b(LDL|STL)\b")
    name = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
    used = Counter(map(opcode, code.lines))
    matrix = next((op for op in name if used[op]), None)
    body: list[str] = []
    per_entry = register_operand = None
    loop: dict[str, int] = {}
    of_loop = "LDG" if case.kind == "sjlt" else matrix
    if of_loop is not None and code.loops():
        first, last = max(
            code.loops(),
            key=lambda span: sum(opcode(x) == of_loop for x in code.lines[span[0] : span[1] + 1]),
        )
        body = code.lines[first : last + 1]
        loop = dict(Counter(map(opcode, body)).most_common())
        if case.kind == "sjlt" and case.operation == "project":
            threads = 32 * warps
            entries = 4 * constants["BLOCK_K"] * constants["BLOCK_B"] / threads
            per_entry = len(body) / entries
        elif case.operation == "project":
            entries = constants["BLOCK_K"] * constants["STEP_ROWS"] / (32 * warps)
            per_entry = sum(_weights(code, first, last)) / entries
            register_operand = _in_registers(compiled.asm["ttgir"], constants)
            if matrix == "HGMMA":
                operands = [re.search(r"HGMMA\S* R\d+, R\d+", x) for x in body if "HGMMA" in x]
                register_operand = register_operand and all(operands)
    return Report(
        case,
        arch,
        _tiles(constants, warps),
        int(registers[1]),
        sum(bool(spill.search(line)) for line in code.lines),
        sum(bool(spill.search(line)) for line in body),
        compiled.metadata.shared,
        name.get(matrix or "", ""),
        register_operand,
        per_entry,
        loop,
        sum("WARPGROUP.DEPBAR" in line for line in body),
        sum("WARPGROUP.ARRIVE" in line for line in body),
        _in_flight(body),
        loop.get("BAR", 0),
    )


def _in_flight(body: list[str]) -> int | None:
    """The fewest groups of cp.async that a wait in a loop leaves; None where there are none."""
    if not any("LDGDEPBAR" in line for line in body):
        return None
    waits = [re.search(r"\bDEPBAR\.LE SB\d, (0x[0-9a-f]+)", line) for line in body]
    return min((int(wait[1], 16) for wait in waits if wait), default=None)


def _in_registers(ttgir: str, constants: dict[str, Any]) -> bool:
    """Whether no tile of R, and no words for one, change layout or go to shared memory in a loop.

    That a tile is R's shows in its first dimension, so this needs BLOCK_B != BLOCK_K.
    """
    loop = ttgir[ttgir.index("scf.for") : ttgir.rindex("scf.yield")]
    moves = re.findall(r"ttg\.(?:convert_layout|local_alloc|local_store) .*", loop)
    return not any(f"tensor<{constants['BLOCK_K']}x" in move for move in moves)


def _tiles(constants: dict[str, Any], warps: int) -> str:
    """The sizes among a kernel's constants, and its warps."""
    names = ("BLOCK_B", "BLOCK_K", "STEP_ROWS", "ROWS", "STRETCH")
    sizes = {name: value for name, value in constants.items() if name in names}
    return " ".join(f"{name}={value}" for name, value in (sizes | {"warps": warps}).items())


def inspect_amd(case: Case, arch: str) -> Report:
    """Compile for an AMD architecture and read the assembly."""
    compiled, constants, warps = compile_case(case, arch)
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None
        return int(match[1])

    return Report(
        case,
        arch,
        _tiles(constants, warps),
        number("vgpr_count"),
        number("vgpr_spill_count"),
        number("vgpr_spill_count"),
        compiled.metadata.shared,
        "mfma" if "v_mfma" in text else "",
    )


def inspect(case: Case, arch: str) -> Report:
    """Compile ``case`` for ``arch`` ("sm_80", "sm_90", "gfx942", ...) and read the code."""
    return inspect_nvidia(case, arch) if arch.startswith("sm_") else inspect_amd(case, arch)


def cases() -> list[Case]:
    """What the table shows: every operation, kind and dtype, and the batch buckets."""
    table = [Case("project", B=B) for B in (16, 32, 64)]
    table += [Case("project", K=512), Case("project", B=16, K=64), Case("project", dtype="float16")]
    table += [Case("project", dtype="float32", terms=t, B=B) for t in (1, 2, 3) for B in (16, 64)]
    table += [
        Case("project", masked=True),
        Case("project", aligned=1),
        Case("project", dtype="float64"),
    ]
    table += [Case("project", "gaussian", B=B) for B in (16, 64, 128)]
    table += [Case("project", "gaussian", "float16")]
    table += [Case("project", "gaussian", "float32", t, B=B) for t in (1, 3) for B in (16, 64)]
    table += [Case("project", "gaussian", "float64")]
    for kind in ("rademacher", "gaussian"):
        table += [Case("transpose", kind, "float32", 3), Case("transpose", kind)]
        table += [Case("matrix", kind, "float32")]
    table += [Case("project", "sjlt", B=B, K=4 * W, block=W) for B in (1, 8) for W in (256, 1024)]
    table += [Case("project", "sjlt", B=8, K=65536, block=16384)]
    table += [Case("project", "sjlt", B=B, K=64, block=16) for B in (1, 64)]
    table += [Case("project", "sjlt", dtype, B=8, block=1024) for dtype in ("float32", "float64")]
    table += [Case("project", "sjlt", "float16", B=8, block=1024)]
    table += [Case("project", "sjlt", B=8, block=1024, masked=True)]
    table += [Case("project", "sjlt", B=8, block=1024, aligned=1)]
    table += [Case("product", "sjlt", dtype, block=1024) for dtype in ("float32", "bfloat16")]
    table += [Case("product", "sjlt", block=1024, masked=True), Case("product", "sjlt", block=256)]
    table += [Case("transpose", "sjlt", dtype, block=1024) for dtype in ("float32", "bfloat16")]
    table += [Case("matrix", "sjlt", "float32", block=1024)]
    return [*table, Case("reduce", dtype="float32")]


def markdown(reports: list[Report]) -> str:
    """The table, a row for each report."""
    yes = {True: "yes", False: "no", None: ""}
    rows = [
        "| kernel | B, K | tiles | arch | registers | spills (in loop) | shared, bytes "
        "| matrix unit | R in registers | instructions per entry | copies in flight |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        size = "" if r.case.operation in ("matrix", "reduce") else f"{r.case.B}, {r.case.K}"
        count = "" if r.per_entry is None else f"{r.per_entry:.2f}"
        copies = "" if r.in_flight is None else r.in_flight
        rows.append(
            f"| {r.case} | {size} | {r.tiles} | {r.arch} | {r.registers} "
            f"| {r.spills} ({r.spills_in_loop}) | {r.shared} | {r.matrix_instruction} "
            f"| {yes[r.register_operand]} | {count} | {copies} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastproj.kernels.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "gfx942"])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--loop", action="store_true", help="print the opcodes of each main loop")
    parser.add_argument("--output", type=Path, help="write a Markdown file instead of printing")
    options = parser.parse_args()
    reports = []
    for case in cases():
        if options.only in str(case):
            for arch in options.arch:
                reports.append(inspect(case, arch))
                if options.loop:
                    print(case, arch, reports[-1].tiles, reports[-1].loop)
    text = markdown(reports)
    if options.output is None:
        print(text)
    else:
        options.output.write_text(_PREFACE.format(version=triton.__version__) + text + "\n")


_PREFACE = """# What the compiled kernels use

Made by `python -m fastproj.kernels.aot --output kernels/RESOURCES.md` with Triton
{version}, without a GPU. The figures are counts in compiled code, not timings.

- *Instructions per entry*: what a thread issues in the main loop for each entry of R that it makes.
  An entry then serves B products. For kind sjlt the count is for each entry and sample that is
  added, hashing included.
- *Spills*: local-memory instructions (NVIDIA) or spilled registers (AMD).
- *Copies in flight*: tiles of G that are still on their way after the main loop has waited for
  some. With 0 the loop waits for what it has just asked for.
- A figure that can't be read off the code is left empty.

"""

if __name__ == "__main__":
    main()
