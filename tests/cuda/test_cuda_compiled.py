"""csrc/cuda compiles for every architecture: no spills, no serialised wgmma, few issue slots."""

from __future__ import annotations

import re
import subprocess
import sys

import compiled
import emulation
import pytest

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
UNITS = [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS]


@pytest.fixture(scope="module", autouse=True)
def everything():
    """All units for all architectures, compiled together: about two processor-minutes, once."""
    compiled.compile_pairs(PAIRS)


@pytest.mark.parametrize(("unit", "arch"), UNITS)
def test_no_spills_and_nothing_serialised(unit, arch):
    report, _ = compiled.compile_unit(unit, arch)
    assert compiled.serialised(report) == []
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
        assert line[:33].strip() in names, f"run {sys.executable} tests/cuda/compiled.py"
        if compiled.toolkit() == made_with:
            assert line in lines, f"run {sys.executable} tests/cuda/compiled.py"


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
    _, cubin = compiled.compile_unit(unit, "90a")
    for name, code in compiled.disassemble(cubin).items():
        body = compiled.main_loop(code)
        waits = sum("WARPGROUP.DEPBAR" in text for text in body)
        assert (name, 2 * waits) <= (name, sum("HGMMA" in text for text in body))


def test_every_listed_kernel_is_compiled():
    """The table names each instantiation of kernels.hpp, and each has its shared memory."""
    text = (compiled.ROOT / "csrc" / "cuda" / "kernels.hpp").read_text()
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
    assert count == 31


def test_spills_and_serialisation_are_seen(tmp_path):
    """The two conditions that fail a build do show in reports: a kernel made to have both."""
    compiler = compiled.nvcc()
    assert compiler is not None
    source = tmp_path / "bad.cu"
    source.write_text(
        '#include "cuda/project_sm90.cuh"\n'
        "namespace fastproj::cuda {\n"
        "__global__ void __launch_bounds__(1024, 1) bad_kernel(volatile float* p) {\n"
        "    float d[8], e[96]; std::uint32_t a[4] = {1, 2, 3, 4};\n"
        "    for (int i = 0; i < 96; ++i) e[i] = p[i];\n"
        "    for (int i = 0; i < 8; ++i) d[i] = p[i];\n"
        "    for (int s = 0; s < 4; ++s) {\n"
        "        wgmma_fence(); wgmma_m64k16<Bf16, 16>(d, a, 0, 1); wgmma_commit();\n"
        "        a[0] += s; d[0] += e[s];\n"
        "    }\n"
        "    wgmma_wait<0>();\n"
        "    for (int i = 0; i < 96; ++i) p[i] = e[i] * e[(i * 7) % 96] + d[i % 8];\n"
        "}\n}\n"
    )
    done = subprocess.run(
        [
            compiler, "-std=c++17", "-O3", f"-I{compiled.ROOT / 'csrc'}", "-cubin",
            "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v", str(source),
            "-o", str(tmp_path / "bad.cubin"),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    assert compiled.serialised(report)
    assert sum(function.spills for function in compiled.resources(report, "90a")) > 0
