"""What waits on what in machine code: control bits, scoreboards and the stages of a pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import build_machine_code  # noqa: E402

Code, Control = build_machine_code.Code, build_machine_code.Control

# The loop in which a producer thread fed fp32 through registers, two chunks a stage, as nvcc 13.0
# compiled it for sm_90a (Rademacher, two terms, BLOCK_B 16). Its rare branches are cut out.
REGISTER_FED = ROOT / "tests" / "data" / "register_fed_producer.sass"


@pytest.mark.parametrize(
    ("high", "text"),
    [
        (0x000E220000000800, "B------:R-:W0:-:S01"),  # LDC
        (0x000E620000002100, "B------:R-:W1:-:S01"),  # S2R
        (0x000FE20000000000, "B------:R-:W-:-:S01"),  # UMOV
        (0x000FCA00078E00FF, "B------:R-:W-:Y:S05"),  # IMAD.MOV.U32
        (0x001FDA0003F05270, "B0-----:R-:W-:Y:S13"),  # ISETP of what an S2R before it wrote
        (0x0003E40000100C00, "B------:R1:W-:-:S02"),  # STG: its operands are read late
        (0x000EA2000C1E1900, "B------:R-:W2:-:S01"),  # LDG
    ],
)
def test_control_bits(high, text):
    """Words that others published with their bits, in CuAssembler's notation."""
    assert str(Control.decode(0x7919, high)) == text


def test_reused_operands():
    assert Control.decode(0, 0x080FE20000000000).reuse == 2
    assert Control.decode(0, 0x000FE20000000000).reuse == 0


def words(bits: str) -> tuple[int, int]:
    """An instruction's two words with these bits, the rest nonsense."""
    wait, read, write, yields, stall = re.fullmatch(r"B(.{6}):R(.):W(.):(.):S(\d\d)", bits).groups()
    word = int(stall) | (yields == "-") << 4
    word |= (7 if write == "-" else int(write)) << 5 | (7 if read == "-" else int(read)) << 8
    word |= sum(1 << int(digit) for digit in wait if digit != "-") << 11
    return 0x0123456789ABCDEF, word << 41 | 0x1FFFFFFFFFF


def listing(*lines: str) -> str:
    """Instructions with their bits, as cuobjdump prints them."""
    printed = ["\t\tFunction : kernel"]
    for i, line in enumerate(lines):
        bits, text = line.split(maxsplit=1) if line.startswith("B") and ":" in line else ("", line)
        low, high = words(bits or "B------:R-:W-:-:S01")
        printed.append(f"        /*{16 * i:04x}*/    {text} ;    /* 0x{low:016x} */")
        printed.append(f"                            /* 0x{high:016x} */")
    return "\n".join(printed)


def loops(text: str) -> list:
    (code,) = build_machine_code.read_sass(text).values()
    return list(build_machine_code.stage_loops(Code(code)))


def test_bits_are_read_from_a_listing():
    (code,) = build_machine_code.read_sass(listing("B-1-3--:R2:W4:Y:S11 MOV R1, R2")).values()
    assert str(code[0].control) == "B-1-3--:R2:W4:Y:S11"
    assert str(code[0]) == "00000 [B-1-3--:R2:W4:Y:S11] MOV R1, R2"
    with pytest.raises(ValueError, match="can't read"):
        build_machine_code.read_sass(listing("MOV R1, R2").rpartition("\n")[0] + "\n nonsense")


def test_loads_through_registers_are_waited_for_too_soon():
    """The recorded producer: the chunk loaded last is waited for with the one loaded first."""
    (loop,) = loops(REGISTER_FED.read_text())
    assert (loop.products, len(loop.ends), loop.clocks) == (0, 1, 294)
    assert [each.name for each in loop.fences] == ["MEMBAR.ALL.CTA", "FENCE.VIEW.ASYNC.S"]
    told = {
        (wait.load.address, wait.waiter.address, wait.after.clocks, wait.after.stages)
        for wait in loop.waits
    }
    assert told == {
        (0x9B80, 0x8D00, 173, 1),
        (0x9B90, 0x8D00, 169, 1),
        (0xAE60, 0x8D00, 57, 1),  # just issued
        (0xAE70, 0x8D00, 53, 1),
    }
    assert [wait.load.address for wait in loop.too_soon] == [0xAE60, 0xAE70]
    (line,) = [line for line in loop.report().splitlines() if "0ae60" in line]
    assert line == (
        "  TOO SOON 08d00 FFMA       waits on SB5 for 0ae60 LDG.E.NA.128.CONSTANT R20, "
        "desc[UR44][R2.64]: issued 57 clocks and 1 stage(s) before, used after 193 clocks"
    )


def test_a_scoreboard_for_each_chunk_is_right():
    """The recorded loop, with scoreboard 3 for the second chunk and for nothing else."""
    text = REGISTER_FED.read_text()
    (code,) = build_machine_code.read_sass(text).values()
    use = next(each for each in code if 20 in each.touched[1])
    second = iter(text.splitlines())
    lines = []
    for line in second:
        lines.append(line)
        if found := re.search(r"/\*([0-9a-f]{4})\*/", line):
            address = int(found[1], 16)
            word = int(next(second).strip()[3:-3], 16) & ~(1 << 55)
            if address in (0xAE60, 0xAE70):
                word = word & ~(7 << 46) | 3 << 46
            if address == use.address:
                word |= 1 << 55
            lines.append(f"    /* 0x{word:016x} */")
    (loop,) = loops("\n".join(lines))
    assert len(loop.waits) == 4
    assert loop.too_soon == []


LOAD = "B------:R1:W5:-:S02 LDG.E.128 R20, [R2.64]"
USE = "B-----5:R-:W-:-:S05 FADD R0, R20, R21"
WORK = ["B------:R-:W-:-:S15 MOV R1, R2"] * 8
END = "B------:R-:W-:-:S06 FENCE.VIEW.ASYNC.S"
BACK = "B------:R-:W-:-:S05 @P0 BRA 0x0"


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        # Loaded at the end of a stage for the whole of the next one.
        ([USE, *WORK, LOAD, END, BACK], 0),
        ([LOAD, *WORK, USE, END, BACK], 0),
        # A wait on the same scoreboard by something else, a stage before the load is used.
        ([USE, *WORK, LOAD, "B-----5:R-:W-:-:S05 FADD R7, R8, R9", *WORK, END, BACK], 1),
        ([USE, *WORK, LOAD, "B----4-:R-:W-:-:S05 FADD R7, R8, R9", *WORK, END, BACK], 0),
        # Such a wait just before the use costs nothing.
        ([USE, *WORK, LOAD, *WORK, "B-----5:R-:W-:-:S05 FADD R7, R8, R9", END, BACK], 0),
        # The same for loads from shared memory; those of one stage may share a scoreboard.
        (["B---3--:R-:W-:-:S05 FADD R0, R8, R9", "B------:R-:W3:-:S02 LDS R8, [R1]",
          "B---3--:R-:W-:-:S05 FADD R6, R7, R7", *WORK, END, BACK], 1),
        (["B------:R-:W3:-:S02 LDS R8, [R1]", "B------:R-:W3:-:S02 LDS R9, [R1+0x4]",
          "B---3--:R-:W-:-:S05 FADD R0, R8, R8", "FADD R1, R9, R9", END, BACK], 0),
        # Loaded a stage ahead into another register, and then moved: what is loaded is used.
        (["B-----5:R-:W-:-:S05 MOV R4, R20", LOAD, *WORK, "FADD R0, R4, R4", END, BACK], 0),
        # A predicated write is no end of what a load wrote.
        ([USE, *WORK, LOAD, "@P1 MOV R20, RZ", END, BACK], 0),
    ],
)  # fmt: skip
def test_waits_that_come_too_soon(lines, wrong):
    (loop,) = loops(listing(*lines, "EXIT"))
    assert len(loop.ends) == 1
    assert len(loop.too_soon) == wrong, loop.report()


def test_groups_of_cp_async_are_waited_for_by_number():
    """`DEPBAR.LE SB0, 0x2` leaves the two groups in flight that were committed last."""
    wait = "B------:R-:W-:Y:S04 DEPBAR.LE SB0, 0x2"
    copy = "B------:R1:W-:-:S02 LDGSTS.E.BYPASS.128 [R9], [R40.64]"
    commit = "B------:R-:W0:-:S01 LDGDEPBAR"
    barrier = "B------:R-:W-:-:S06 BAR.SYNC.DEFER_BLOCKING 0x0"
    (loop,) = loops(listing(wait, barrier, copy, commit, *WORK, BACK, "EXIT"))
    (told,) = loop.waits
    assert (told.load.base, told.waiter.base, told.after.stages) == ("LDGDEPBAR", "DEPBAR", 2)
    assert [each.base for each in loop.copies] == ["LDGSTS"]
    (loop,) = loops(listing(wait.replace("0x2", "0x0"), barrier, copy, commit, BACK, "EXIT"))
    assert loop.waits[0].after.stages == 0


def test_rare_blocks_at_the_end_make_no_loop():
    """ptxas puts repeated tries of a wait behind the kernel's end and jumps back from there."""
    tries = "B------:R-:W0:-:S02 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R44+URZ], R7"
    body = [tries, "B0-----:R-:W-:Y:S12 @!P1 BRA 0x60", LOAD, USE, END, BACK]
    again = [tries, "B0-----:R-:W-:Y:S05 @!P1 BRA 0x60", "BRA 0x20"]
    code = build_machine_code.read_sass(listing(*body, *again))["kernel"]
    heads = [head for head, _ in Code(code).loops]
    assert heads == [0, 6]
    (loop,) = build_machine_code.stage_loops(Code(code))
    assert (loop.start, loop.size) == (0, 9)


def test_registers_of_wide_operands():
    def touched(text: str) -> tuple[set, set]:
        return build_machine_code.Instruction(0, text).touched

    assert touched("LDG.E.NA.128.CONSTANT R24, desc[UR44][R6.64]") == ({24, 25, 26, 27}, {6, 7})
    assert touched("LDSM.16.M88.4 R96, [R64+0x800]") == ({96, 97, 98, 99}, {64})
    assert touched("LDSM.16.MT88.2 R96, [R64]") == ({96, 97}, {64})
    assert touched("STS.64 [R56+0x2000], R58") == (set(), {56, 58, 59})
    product = "HMMA.16816.F32.BF16 R4, R20, R30, R8"
    assert touched(product) == ({4, 5, 6, 7}, {*range(20, 24), 30, 31, *range(8, 12)})
    assert touched("@!P3 FADD R5, R24, R5") == ({5}, {24, 5})


def test_the_report_as_a_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build_machine_code.py", str(REGISTER_FED)])
    assert build_machine_code.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("project_rademacher_sm90_kernel\nloop at 08c90, 161 instructions")
    assert printed.count("TOO SOON") == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kernel", "gaussian"])
    assert build_machine_code.main() == 0
    assert capsys.readouterr().out == ""
    command = [sys.executable, str(ROOT / "build_machine_code.py"), str(ROOT / "LICENSE")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "can't read" in done.stderr or "no cuobjdump" in done.stderr
