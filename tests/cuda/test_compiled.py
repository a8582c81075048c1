"""csrc/cuda compiles for every architecture: no spills, no serialised wgmma, few issue slots."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest

import build_machine_code
import build_native
from tests import ROOT
from tests.cuda import compiled, emulation
from tests.essential import essential

pytestmark = pytest.mark.skipif(compiled.nvcc() is None, reason="no nvcc to compile with")

# Issue slots per k16 step and 64 columns of a warp on sm_90a, by kind and terms. Three-term kernels
# fold every 64 rows inside the loop; those additions are counted too.
MOST_SLOTS = {
    ("rademacher", 1): 14.0,
    ("rademacher", 2): 15.0,
    ("rademacher", 3): 20.0,
    ("gaussian", 1): 80.0,
    ("gaussian", 2): 80.0,
    ("gaussian", 3): 80.0,
}
PAIRS = [
    *[(unit, "90a") for unit in compiled.SM90_UNITS],
    *[(u, arch) for arch in compiled.ARCHS for u in (*compiled.SM80_UNITS, *compiled.OTHER_UNITS)],
]
UNITS = essential(PAIRS, [pair for pair in PAIRS if pair[1] in compiled.ESSENTIAL])


@pytest.mark.parametrize(("unit", "arch"), UNITS)
def test_no_spills_and_nothing_serialised(unit, arch):
    report = compiled.report(unit, arch)
    assert build_machine_code.faults(report) == []
    functions = compiled.resources(report, arch)
    assert functions
    for function in functions:
        assert (function.name, function.spills, function.stack) == (function.name, 0, 0)


@pytest.mark.parametrize(("unit", "arch"), UNITS)
def test_resources_are_those_of_the_table(unit, arch):
    """Registers, shared memory and slots as committed; other compilers may differ in those."""
    made_with, lines = compiled.read_table()
    functions = compiled.inspect(unit, arch)
    names = {line[:33].strip() for line in lines}
    for function in functions:
        line = compiled.table_line(function)
        assert line[:33].strip() in names, f"run {sys.executable} -m tests.cuda.compiled"
        if compiled.toolkit() == made_with:
            assert line in lines, f"run {sys.executable} -m tests.cuda.compiled"


@pytest.mark.skipif(compiled.disassembler() is None, reason="no cuobjdump (install triton)")
@pytest.mark.parametrize("unit", compiled.SM90_UNITS)
def test_wgmma_loop(unit):
    """wgmma in the loop, asynchronous, no local memory, and no more issue slots than promised."""
    for function in compiled.inspect(unit, "90a"):
        match = re.fullmatch(r"(\w+) sm90 \w+ x(\d) B\d+", function.name)
        assert match is not None
        assert function.products > 0
        assert function.local == 0
        assert function.slots is not None
        assert (function.name, function.slots) <= (
            function.name,
            MOST_SLOTS[match[1], int(match[2])],
        )


@pytest.mark.skipif(compiled.disassembler() is None, reason="no cuobjdump (install triton)")
@pytest.mark.parametrize("unit", compiled.SM90_UNITS)
def test_products_stay_in_flight(unit):
    """Serialised products show as one wait for every product in the loop."""
    for name, code in compiled.disassemble(unit, "90a").items():
        body = compiled.main_loop(code)
        waits = sum("WARPGROUP.DEPBAR" in text for text in body)
        assert (name, 2 * waits) <= (name, sum("HGMMA" in text for text in body))


@pytest.mark.skipif(compiled.disassembler() is None, reason="no cuobjdump (install triton)")
@pytest.mark.parametrize("unit", compiled.SM90_UNITS)
def test_registers_of_products_in_flight_are_left_alone(unit):
    assert compiled.sass(unit, "90a").count("HGMMA") > 0
    assert build_machine_code.hazards(compiled.sass(unit, "90a")) == []


@pytest.mark.skipif(compiled.disassembler() is None, reason="no cuobjdump (install triton)")
@pytest.mark.parametrize("unit", compiled.SM90_UNITS)
def test_producers_wait_for_no_load_of_a_later_stage(unit):
    """Nor for one that was just issued: a stage would cost the latency of memory."""
    for name, code in compiled.disassemble(unit, "90a").items():
        loops = list(build_machine_code.stage_loops(build_machine_code.Code(code)))
        producers = [loop for loop in loops if not loop.products]
        assert any(loop.copies for loop in producers), name
        for loop in loops:
            assert loop.too_soon == [], f"{name}\n{loop.report()}"


@pytest.mark.skipif(compiled.disassembler() is None, reason="no cuobjdump (install triton)")
@pytest.mark.parametrize("arch", essential(compiled.ARCHS, ("80", "90a")))
@pytest.mark.parametrize("unit", [*compiled.SM80_UNITS, "transpose"])
def test_mma_loops_wait_for_no_load_too_soon(unit, arch):
    """And what is converted comes past the registers."""
    for name, code in compiled.disassemble(unit, arch).items():
        loops = list(build_machine_code.stage_loops(build_machine_code.Code(code)))
        assert any(loop.products and loop.copies for loop in loops), name
        for loop in loops:
            assert loop.too_soon == [], f"{name}\n{loop.report()}"


def listing(*lines: str) -> str:
    """Instructions as cuobjdump prints them."""
    code = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
    return "\n".join(["\t\tFunction : kernel", *code])


PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, R40, gdesc[UR4], R24, gsb0"
OTHER = "HGMMA.64x16x16.F32.BF16 R32, R44, gdesc[UR4], R32, gsb0"
WAIT, WAIT_FOR_ALL_BUT_ONE = (f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}" for n in (0, 1))


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([PRODUCT, WAIT, "LOP3.LUT R43, R2, R3, R4, 0x96, !PT", "FADD R5, R24, R5"], None),
        ([PRODUCT, "LOP3.LUT R44, R40, R3, R4, 0x96, !PT", WAIT], None),  # read, and beside it
        ([PRODUCT, "@!P0 LOP3.LUT R43, R2, R3, R4, 0x96, !PT", WAIT], "0x10"),
        ([PRODUCT, "IMAD.WIDE.U32 R42, R2, R3, RZ", WAIT], "0x10"),
        ([PRODUCT, "LDS.128 R36, [R2]", "LDS.128 R37, [R2]", WAIT], "0x20"),
        ([PRODUCT, "FADD R5, R31, R5", WAIT], "0x10"),
        ([PRODUCT, OTHER, WAIT_FOR_ALL_BUT_ONE, "FADD R5, R31, R5", WAIT], None),
        ([PRODUCT, OTHER, WAIT_FOR_ALL_BUT_ONE, "FADD R5, R32, R5", WAIT], "0x30"),
        (["MOV R41, R2", PRODUCT, "@P0 BRA 0x0", WAIT], "0x0"),  # the next time round
        (["MOV R41, R2", PRODUCT, WAIT, "@P0 BRA 0x0"], None),
    ],
)
def test_touched_registers_are_found(lines, wrong):
    found = build_machine_code.hazards(listing(*lines))
    assert [text.rpartition("first ")[2].split()[0] for text in found] == [wrong] * bool(wrong)


def test_machine_code_that_touches_them_fails_the_build(tmp_path):
    """The disassembly is read once for each state of an object."""
    unit, tool = tmp_path / "sm90_x.cu.o", tmp_path / "cuobjdump"
    unit.write_text("")
    (tmp_path / "listing").write_text(listing(PRODUCT, "MOV R41, R2", WAIT))
    tool.write_text(f"#!/bin/sh\ncat {tmp_path}/listing\n")
    tool.chmod(0o755)
    faults = build_native.wgmma_faults(unit, str(tool))
    assert len(faults) == 1
    tool.unlink()
    assert build_native.wgmma_faults(unit, str(tool)) == faults
    module = build_native.Module("fastproj._cuda", [], [])
    with pytest.raises(build_native.BuildError, match="touches registers that a wgmma in flight"):
        build_native.check_machine_code(module, tmp_path / "module.so", "is wrong", faults)


def test_every_listed_kernel_is_compiled():
    """The table names each instantiation of kernels.hpp, and each has its shared memory."""
    text = (ROOT / "csrc" / "cuda" / "kernels.hpp").read_text()
    lists = re.findall(r"#define FASTPROJ_(SM\d+)_(\w+?)(?:_SPLIT)?\(X\)((?:.*\\\n)+.*\n)", text)
    _, lines = compiled.read_table()
    names = {line[:28].strip() for line in lines}
    count = 0
    for arch, kind, body in lists:
        for operand, terms, block_b in re.findall(r"X\((\w+), (\d), (\d+)", body):
            name = f"{kind.lower()} {arch.lower()} {operand.lower()} x{terms} B{block_b}"
            assert name in names
            facts = emulation.kernel_facts(
                arch.lower(), kind.lower(), operand.lower(), int(terms), int(block_b)
            )
            limit = 227 * 1024 if arch == "SM90" else 99 * 1024
            assert 0 < facts["shared"] <= limit
            count += 1
    assert count == 32


BAD = """#include "cuda/project_sm90.cuh"
namespace fastproj::cuda {
__global__ void __launch_bounds__(1024, 1) bad_kernel(volatile float* p) {
#if FASTPROJ_SM90A
    float d[8], e[96];
    std::uint32_t a[4] = {1, 2, 3, 4};
    for (int i = 0; i < 96; ++i) e[i] = p[i];
    for (int i = 0; i < 8; ++i) d[i] = p[i];
    for (int s = 0; s < 4; ++s) {
        wgmma_fence();
        wgmma_m64k16<Bf16, 16>(d, a, 0, 1);
        wgmma_commit();
        a[0] += s;
        d[0] += e[s];
    }
    wgmma_wait<0>();
    for (int i = 0; i < 96; ++i) p[i] = e[i] * e[(i * 7) % 96] + d[i % 8];
#endif
}
}
"""


def test_a_kernel_that_spills_or_is_serialised_fails_the_build(tmp_path, monkeypatch, capfd):
    """A kernel made to do both, through the build's own commands."""
    monkeypatch.setenv("FASTPROJ_CUDA", "1")
    monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", "90a")
    module = build_native.cuda_module("0")
    source = tmp_path / "bad.cu"
    source.write_text(BAD)
    unit = dataclasses.replace(module.units[0], source=source)
    bad = dataclasses.replace(module, units=[unit])
    output = tmp_path / "bad.so"
    with pytest.raises(build_native.BuildError) as caught:
        build_native.build_module(bad, tmp_path / "objects", output)
    message = str(caught.value)
    assert "bad_kernel" in message
    assert "sm_90a spills registers" in message
    assert "(C75" in message
    assert "FASTPROJ_CUDA=0 leaves the module out" in message.replace("\n", " ")
    assert not output.exists()
    with pytest.raises(build_native.BuildError):  # nor does the next build take what this one left
        build_native.build_module(bad, tmp_path / "objects", output)
