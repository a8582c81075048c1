"""What the machine code shows: faults that fail the build, and what waits on what.

``build_native`` runs the compilers and ``cuobjdump``; everything here is a function of what they
print.

The hardware finds no hazards by itself: each instruction carries control bits that say when it may
start (`Control`). A load sets one of six scoreboards, and whoever waits on that scoreboard waits
for every load that set it, for those of a later pipeline stage too. `stage_loops` finds them.

    python build_machine_code.py OBJECT [--arch sm_90a] [--kernel TEXT]

prints the loops of every kernel: which load sets which scoreboard, and what waits for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path

import build_cuda

SM90_REGISTERS = 168  # of a thread, in kernels that move registers from one warpgroup to another

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


@dataclass(frozen=True)
class Control:
    """The scheduling bits of an instruction, bits 105 to 125 of its 128 (Volta to Blackwell).

    stall : clocks until the next instruction of this warp may issue
    yields : another warp may go first
    write : scoreboard that is set until the result is written, None for none
    read : scoreboard that is set until the operands are read, None for none
    wait : scoreboards that must be clear before this instruction issues
    reuse : operands that stay in the register cache

    The places of the bits are those of CuAssembler (CuAsm/CuAsmParser, CuSMVersion) and of Jia et
    al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018, table 2.1.
    """

    stall: int
    yields: bool
    write: int | None
    read: int | None
    wait: tuple[int, ...]
    reuse: int

    @classmethod
    def decode(cls, low: int, high: int) -> Control:
        """From the two 64-bit words of an instruction, as cuobjdump prints them."""
        word = (high << 64 | low) >> 105
        write, read, wait = word >> 5 & 7, word >> 8 & 7, word >> 11 & 63
        return cls(
            stall=word & 15,
            yields=not word >> 4 & 1,  # the bit is set where the warp stays
            write=None if write == 7 else write,
            read=None if read == 7 else read,
            wait=tuple(i for i in range(6) if wait >> i & 1),
            reuse=word >> 17 & 15,
        )

    def __str__(self) -> str:
        """Such as `B0--3--:R1:W-:Y:S02`, the notation of maxas and CuAssembler."""
        waits = "".join(str(i) if i in self.wait else "-" for i in range(6))
        read, write = ("-" if each is None else each for each in (self.read, self.write))
        return f"B{waits}:R{read}:W{write}:{'Y' if self.yields else '-'}:S{self.stall:02}"


FREE = Control(1, False, None, None, (), 0)  # waits for nothing and sets nothing


@dataclass(frozen=True)
class Instruction:
    """One instruction of a kernel; `address` in bytes from its start."""

    address: int
    text: str
    control: Control = FREE

    def __str__(self) -> str:
        return f"{self.address:05x} [{self.control}] {self.text}"

    @cached_property
    def name(self) -> str:
        """The name with its suffixes, such as `LDG.E.128`, without a predicate."""
        return re.sub(r"^@!?U?PT?\d*\s+", "", self.text).split()[0]

    @cached_property
    def base(self) -> str:
        """The name alone, such as `LDG`."""
        return self.name.split(".")[0]

    @property
    def predicated(self) -> bool:
        """Whether it may do nothing."""
        return self.text.startswith("@")

    @cached_property
    def touched(self) -> tuple[frozenset[int], frozenset[int]]:
        """Vector registers that it writes and reads."""
        return _touched(self)

    @cached_property
    def target(self) -> int | None:
        """Address that a branch goes to."""
        branch = _BRANCH.search(self.text)
        return int(branch[1], 16) if branch else None


Instructions = list[Instruction]

# What writes no vector register, whatever its first operand is.
_NO_RESULT = frozenset(
    "BAR BRA BSSY BSYNC DEPBAR EXIT FSETP ISETP LOP3P MEMBAR NOP PLOP3 R2UR RED ST STG STS SYNCS "
    "UTMALDG VOTEU WARPGROUP WARPSYNC".split()
)
_VECTOR = re.compile(r"\bR(\d+)\b")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)? .*?(0x[0-9a-f]+)$")
# Registers of D, A, B and C in products of 16-bit operands with fp32 sums.
_PRODUCT_WIDTHS = {"16816": (4, 4, 2, 4), "1688": (4, 2, 1, 4)}
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);(?:\s*/\* 0x([0-9a-f]{16}) \*/)?")
_SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def read_sass(text: str) -> dict[str, Instructions]:
    """The instructions of every kernel in what `cuobjdump -sass` or `nvdisasm -hex` prints.

    Text without encodings, as `cuobjdump` prints none with some options, reads as FREE.
    """
    functions: dict[str, Instructions] = {}
    current: Instructions = []
    lines = iter(text.splitlines())
    for line in lines:
        if header := re.match(r"\s*Function : (\S+)", line):
            current = functions.setdefault(header[1], [])
        elif found := _LINE.match(line):
            control = FREE
            if found[3]:
                second = _SECOND_WORD.match(next(lines, ""))
                if second is None:
                    raise ValueError(f"a disassembly that this build can't read:\n{line}")
                control = Control.decode(int(found[3], 16), int(second[1], 16))
            current.append(Instruction(int(found[1], 16), found[2].strip(), control))
    return functions


def _touched(instruction: Instruction) -> tuple[frozenset[int], frozenset[int]]:
    name, base = instruction.name, instruction.base
    rest = instruction.text.partition(name)[2]
    operands = [operand.strip() for operand in rest.split(",")]
    # A comparison's or a carry's predicate stands before the result.
    first = next((i for i, each in enumerate(operands) if not re.match(r"!?U?PT?\d*$", each)), 0)
    width = 4 if ".128" in name else 1
    if re.search(r"\.64\b", name) or re.match(r"IMAD\.WIDE|DADD|DMUL|DFMA", name):
        width = 2
    if matrices := re.match(r"LDSM\S*\.M?T?88(?:\.(\d))?|LDSM\S*\.(\d)$", name):
        width = int(matrices[1] or matrices[2] or 1)
    widths: Sequence[int] = (width,)
    if product := re.match(r"HMMA\.(\d+)\.", name):
        widths = _PRODUCT_WIDTHS.get(product[1], widths)
    written: set[int] = set()
    read: set[int] = set()
    for i, operand in enumerate(operands):
        for match in _VECTOR.finditer(operand):
            number = int(match[1])
            if i == first and "[" not in operand and base not in _NO_RESULT:
                written.update(range(number, number + widths[0]))
            elif len(widths) > 1:
                read.update(range(number, number + widths[min(i, len(widths) - 1)]))
            else:
                stored = width if base.startswith("ST") and "[" not in operand else 1
                stored = 2 if ".64" in operand else stored
                read.update(range(number, number + stored))
    return frozenset(written), frozenset(read)


# ------------------------------------------------------------------- wgmma and registers in flight


def _unfinished(code: Instructions) -> list[str]:
    """Instructions that touch what a wgmma in flight still reads or writes.

    In the order of the code; a loop with products is gone through twice.
    """
    position = {each.address: i for i, each in enumerate(code)}
    repeated: set[int] = set()
    found: list[str] = []
    groups: list[tuple[set[int], set[int]]] = []  # sums and fragments of a committed group
    sums: set[int] = set()
    fragments: set[int] = set()
    i = 0
    while i < len(code):
        instruction = code[i]
        address, text = instruction.address, instruction.text
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
        written, read = instruction.touched
        for busy_sums, busy_fragments in [*groups, (sums, fragments)]:
            if written & (busy_sums | busy_fragments) or read & busy_sums:
                found.append(f"{address:#x} {text}")
                break
        start = position.get(instruction.target) if instruction.target is not None else None
        if start is not None and start < i and address not in repeated:
            repeated.add(address)
            if any("HGMMA" in each.text for each in code[start:i]):
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


# ----------------------------------------------------------------------------- what waits on what

# Loads whose result lies in registers until something waits for its scoreboard. LDGDEPBAR stands
# for a group of cp.async: it sets a scoreboard once their data are in shared memory.
_MEMORY = frozenset({"LDG", "LD", "LDGDEPBAR"})
_SHARED = frozenset({"LDS", "LDSM"})
# Copies into shared memory that an mbarrier (UBLKCP, UTMALDG) or a group (LDGSTS) speaks for. Their
# scoreboard says only that the addresses were read.
COPIES = frozenset({"UBLKCP", "UTMALDG", "LDGSTS"})
_STAGE_ENDS = ("FENCE.VIEW.ASYNC", "SYNCS.ARRIVE", "BAR.SYNC", "BAR.ARV")


class Code:
    """A kernel's instructions, and which may follow which."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = list(instructions)
        self.place = {each.address: i for i, each in enumerate(self.instructions)}
        self.following = [self._following(i) for i in range(len(self.instructions))]

    def _following(self, i: int) -> tuple[int, ...]:
        instruction = self.instructions[i]
        after = (i + 1,) if i + 1 < len(self.instructions) else ()
        if instruction.target is not None:
            to = self.place.get(instruction.target)
            # BRA.U, BRA.DIV and their like have a condition of their own.
            always = not instruction.predicated and re.match(r"BRA 0x", instruction.text)
            return (() if always else after) + (() if to is None else (to,))
        if instruction.base in ("EXIT", "RET") and not instruction.predicated:
            return ()
        return after

    @cached_property
    def loops(self) -> list[tuple[int, frozenset[int]]]:
        """Every natural loop: its first instruction, which all paths into it pass, and its body.

        A jump back alone makes no loop: ptxas moves rare blocks, such as repeated tries of a wait,
        to the kernel's end.
        """
        before: dict[int, list[int]] = {}
        for i, following in enumerate(self.following):
            for j in following:
                before.setdefault(j, []).append(i)
        reached = self._reached(None)
        backward: dict[int, list[int]] = {}
        for i, following in enumerate(self.following):
            for head in following:
                if head <= i and i in reached:
                    backward.setdefault(head, []).append(i)
        found: list[tuple[int, frozenset[int]]] = []
        for head, sources in backward.items():
            around = self._reached(head)
            body, stack = {head}, [i for i in sources if i not in around]
            while stack:
                i = stack.pop()
                if i not in body:
                    body.add(i)
                    stack += before.get(i, [])
            if len(body) > 1:
                found.append((head, frozenset(body)))
        return found

    def _reached(self, without: int | None) -> set[int]:
        """Places that are reached from the first without passing one of them."""
        found: set[int] = set()
        stack = [0]
        while stack:
            i = stack.pop()
            if i not in found and i != without:
                found.add(i)
                stack += self.following[i]
        return found

    def named(self, places: Iterable[int], *names: str) -> list[int]:
        """Those of `places` whose instruction starts with one of `names`, in order."""
        return [i for i in sorted(places) if self.instructions[i].name.startswith(names)]


@dataclass(frozen=True)
class Distance:
    """How far two instructions lie apart: ends of stages between them, and issue clocks at least.

    Clocks are the sum of stall counts along the shortest path, so what one warp needs if nothing
    else keeps it.
    """

    stages: int
    clocks: int


@dataclass(frozen=True)
class Wait:
    """An instruction that waits until a load has finished.

    after : from the load to the wait
    use : from the load to the first instruction that touches what it loads; None where none does
    """

    load: Instruction
    waiter: Instruction
    after: Distance
    use: Distance | None

    def __str__(self) -> str:
        """Such as `11370 FFMA waits on SB5 for 15e80 LDG R8, ...`."""
        load, waiter = self.load, self.waiter
        use = "never used" if self.use is None else f"used after {self.use.clocks} clocks"
        return (
            f"{waiter.address:05x} {waiter.base:<10} waits on SB{load.control.write} for "
            f"{load.address:05x} {' '.join(load.text.split())}: issued {self.after.clocks} clocks "
            f"and {self.after.stages} stage(s) before, {use}"
        )


@dataclass(frozen=True)
class StageLoop:
    """An innermost loop over pipeline stages, and what its loads are waited for by.

    start, size : address of its first instruction, and how many it has
    ends : the instructions that end a stage
    clocks : issue clocks of one stage at least
    copies : instructions that copy into shared memory past the registers
    fences : memory barriers; one may wait for all loads in flight
    products : of tensor cores
    """

    start: int
    size: int
    ends: tuple[Instruction, ...]
    clocks: int
    copies: tuple[Instruction, ...]
    fences: tuple[Instruction, ...]
    products: int
    waits: tuple[Wait, ...]

    @property
    def too_soon(self) -> list[Wait]:
        """Waits that are paid with the latency of memory.

        For a load of a later stage than the one that waits; or for a load from global memory that
        had less than one stage to arrive, although its own first use comes later than this wait.
        """
        return [wait for wait in self.waits if self._is_too_soon(wait)]

    def _is_too_soon(self, wait: Wait) -> bool:
        if wait.use is None or wait.use.clocks - wait.after.clocks <= LATE:
            return False
        just_issued = wait.load.base in _MEMORY and wait.after.clocks < self.clocks
        return wait.after.stages < wait.use.stages or just_issued

    def report(self) -> str:
        """One paragraph for a reader: the loop, then a line for each wait."""
        lines = [
            f"loop at {self.start:05x}, {self.size} instructions, {self.products} products: "
            f"{len(self.ends)} stage(s), each ended by {self.ends[0].name} after at least "
            f"{self.clocks} issue clocks"
        ]
        if self.copies:
            names = ", ".join(sorted({each.name for each in self.copies}))
            lines.append(f"  {len(self.copies)} copies past the registers: {names}")
        if self.fences:
            lines.append(f"  fences: {', '.join(each.name for each in self.fences)}")
        bad = set(self.too_soon)
        for wait in self.waits:
            lines.append(f"  {'TOO SOON ' if wait in bad else ''}{wait}")
        return "\n".join(lines)


# Clocks by which a use may follow a wait and still be the one that it is for: the other half of a
# chunk, the next step of the same sum.
LATE = 64


def _first(
    code: Code,
    start: int,
    ends: frozenset[int],
    stop: Callable[[Instruction, int], bool | None],
    inside: frozenset[int] | None = None,
    most: int = 8,
) -> dict[int, Distance]:
    """Where paths from an instruction first meet what stops them, and how far that is.

    stop : says of an instruction, and of how many others set the same scoreboard since, whether it
        is met and ends the path (True), is met (False), or neither (None)
    """
    board = code.instructions[start].control.write
    best: dict[tuple[int, int], tuple[int, int]] = {}
    met: dict[int, Distance] = {}
    first = max(1, code.instructions[start].control.stall)
    queue = [(0, first, j, 0) for j in code.following[start]]
    while queue:
        stages, clocks, i, later = heappop(queue)
        if (i, later) in best or (inside is not None and i not in inside):
            continue
        best[i, later] = stages, clocks
        each = code.instructions[i]
        verdict = stop(each, later)
        if verdict is not None:
            met.setdefault(i, Distance(stages, clocks))
            if verdict:
                continue
        if board is not None and each.control.write == board:
            later = min(later + 1, 63)  # what DEPBAR can count to
        stages += i in ends
        clocks += max(1, each.control.stall)
        if stages <= most:
            for j in code.following[i]:
                heappush(queue, (stages, clocks, j, later))
    return met


def _waits_for(load: Instruction) -> Callable[[Instruction, int], bool | None]:
    def stop(each: Instruction, later: int) -> bool | None:
        if load.control.write in each.control.wait:
            return True
        # DEPBAR.LE SBn, count: all but the last `count` that set SBn have finished.
        left = re.search(r"^(?:@\S+ )?DEPBAR\.LE SB(\d), (0x[0-9a-f]+)", each.text)
        if left and int(left[1]) == load.control.write and later >= int(left[2], 16):
            return True
        return None

    return stop


def _touches(load: Instruction) -> Callable[[Instruction, int], bool | None]:
    results = load.touched[0]

    def stop(each: Instruction, later: int) -> bool | None:
        written, read = each.touched
        if read & results:
            return True
        if written & results:
            return not each.predicated
        return None

    return stop


def _around(code: Code, head: int, ends: frozenset[int], body: frozenset[int]) -> Distance:
    """Once around a loop, the shortest way."""

    def stop(each: Instruction, later: int) -> bool | None:
        return each is code.instructions[head] or None

    return _first(code, head, ends, stop, body, most=len(ends))[head]


def stage_loops(code: Code) -> Iterator[StageLoop]:
    """The innermost loops that load and end stages.

    A stage ends with the fence before its arrival (what generic stores wrote becomes visible to
    wgmma), in a loop without that with its arrival, else with a barrier of the block.
    """
    pick = code.instructions
    loading = [
        (head, body)
        for head, body in code.loops
        if any(pick[i].base in _MEMORY | _SHARED | COPIES for i in body)
        and code.named(body, *_STAGE_ENDS)
    ]
    for head, body in sorted(loading):
        if any(other < body for _, other in loading):
            continue
        name = next(name for name in _STAGE_ENDS if code.named(body, name))
        ends = frozenset(code.named(body, name))
        at = sorted(body)
        waits: list[Wait] = []
        for i in at:
            load = pick[i]
            if load.base not in _MEMORY | _SHARED or load.control.write is None:
                continue
            uses = _first(code, i, ends, _touches(load), body) if load.touched[0] else {}
            use = min(uses.values(), key=lambda each: (each.stages, each.clocks), default=None)
            waits += [
                Wait(load, pick[j], after, use)
                for j, after in sorted(_first(code, i, ends, _waits_for(load), body).items())
            ]
        whole = _around(code, head, ends, body)
        yield StageLoop(
            start=pick[head].address,
            size=len(at),
            ends=tuple(pick[i] for i in sorted(ends)),
            clocks=whole.clocks // max(1, whole.stages),
            copies=tuple(pick[i] for i in at if pick[i].base in COPIES),
            fences=tuple(pick[i] for i in code.named(at, "MEMBAR", "FENCE", "ERRBAR")),
            products=len(code.named(at, "HGMMA", "HMMA")),
            waits=tuple(waits),
        )


def main() -> int:
    """Print what waits on what in the loops of a compiled object or cubin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="an object, a cubin, or what cuobjdump -sass printed (.sass)")
    parser.add_argument("--arch", help="such as sm_90a; unset: all in the file")
    parser.add_argument("--kernel", default="", help="kernels whose name contains this")
    parser.add_argument("--listing", action="store_true", help="every instruction with its bits")
    options = parser.parse_args()
    if options.file.endswith(".sass"):
        sass = Path(options.file).read_text()
    else:
        tool = build_cuda.find_disassembler(build_cuda.find_nvcc())
        if tool is None:
            print("no cuobjdump was found; install the CUDA toolkit or triton", file=sys.stderr)
            return 2
        arch = ["-arch", options.arch] if options.arch else []
        works, sass = build_cuda.run([tool, *arch, "-sass", options.file])
        if not works:
            print(f"{tool} can't read {options.file}: {sass[-300:]}", file=sys.stderr)
            return 2
    for name, instructions in read_sass(sass).items():
        if options.kernel not in name:
            continue
        print(name)
        if options.listing:
            print(*instructions, sep="\n")
        for loop in stage_loops(Code(instructions)):
            print(loop.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
