"""Compiled without a GPU: registers, spills, matrix instructions, and where R lives."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import triton

import build_machine_code
from fastproj.kernels import aot, config
from fastproj.kernels.aot import Case, Report

RESOURCES = Path(aot.__file__).parent / "RESOURCES.md"
UNITS = {"sm_80": "mma", "sm_90": "wgmma", "gfx942": "mfma"}

# case, architecture, most instructions for an entry of R
ESSENTIAL = [
    (Case("project", B=16), "sm_90", 1.95),
    (Case("project", B=64), "sm_90", 2.35),
    (Case("project", dtype="float32", terms=3), "sm_90", 5.0),
    (Case("project", "gaussian"), "sm_90", 13.5),
    (Case("project", B=16), "sm_80", 1.85),
    (Case("project", dtype="float32", terms=3), "sm_80", 6.0),
    (Case("project", "sjlt", B=8, block=1024), "sm_90", 6.6),
    (Case("project", "sjlt", "float32", B=8, block=1024), "sm_90", 6.0),
    (Case("project", "sjlt", B=8, K=1024, block=256), "sm_80", 6.0),
    (Case("project", "sjlt", B=8, block=1024), "gfx942", None),
    (Case("transpose", "sjlt", block=1024), "sm_80", None),
    (Case("product", "sjlt", block=1024), "sm_90", None),
    (Case("product", "sjlt", block=1024, masked=True), "sm_80", None),
    (Case("transpose"), "sm_80", None),
    (Case("project"), "gfx942", None),
]


# Counts are promises about the Triton that made the committed table; docs/triton.md says what
# others make of the same source.
PROMISED = f"Triton\n{triton.__version__}," in RESOURCES.read_text()


def inspect(case: Case, arch: str) -> Report:
    """The compiled code; skips where this Triton comes without AMD's linker."""
    try:
        return aot.inspect(case, arch)
    except Exception as error:
        if arch.startswith("gfx") and "linker" in str(error):
            pytest.skip(f"Triton {triton.__version__}: {error}")
        raise


def check(report: Report) -> None:
    case = report.case
    assert report.registers <= (512 if report.arch.startswith("gfx") else 255)
    if PROMISED:
        assert report.spills_in_loop == 0
    if case.kind == "sjlt":
        if case.operation == "project" and PROMISED:
            assert report.barriers <= 2  # one exchange among threads for four tiles
        if case.operation == "product" and case.dtype != "float32":
            unit = UNITS[report.arch]  # wgmma takes no 16 rows
            assert report.matrix_instruction == unit.removeprefix("wg")
        return
    if case.operation in ("project", "transpose") and case.dtype != "float64":
        assert report.matrix_instruction == UNITS[report.arch]
    if case.operation != "project" or case.dtype == "float64":
        return
    if report.arch != "gfx942" and (PROMISED or case.kind == "rademacher"):
        assert report.register_operand
    if report.arch == "sm_90":
        # As many waits as products: were wgmma serialised, each instruction would have its own.
        assert report.waits == report.groups
        assert report.loop["HGMMA"] >= 4 * report.waits
    if case.aligned == 16 and not case.masked and report.arch.startswith("sm_"):
        assert report.loop["LDGSTS"] > 0  # G goes to shared memory by itself
        chosen = config.choose(
            report.arch, case.dtype, case.kind, case.terms, case.B, case.K, direct=True
        )
        assert report.in_flight is not None
        assert (report.in_flight > 0) == (chosen.num_stages > 2)
        if report.arch == "sm_90" and case.kind == "rademacher" and case.dtype != "float32":
            assert report.loop.get("STS", 0) == 0  # and nothing else does


@pytest.mark.parametrize(("case", "arch", "most"), ESSENTIAL, ids=str)
def test_compiled(case: Case, arch: str, most: float | None) -> None:
    report = inspect(case, arch)
    check(report)
    if PROMISED:
        if most is not None:
            assert report.per_entry is not None
            assert report.per_entry <= most
        assert aot.markdown([report]).splitlines()[-1] in RESOURCES.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("arch", UNITS)
@pytest.mark.parametrize("case", aot.cases(), ids=str)
def test_all_compiled(case: Case, arch: str) -> None:
    check(inspect(case, arch))


def disassemble(case: Case, arch: str, folder: Path) -> str:
    """What cuobjdump prints of a case's machine code."""
    compiled, _, _ = aot.compile_case(case, arch)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-sass", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def clocks_to_arrive(case: Case, arch: str, folder: Path) -> tuple[int, int]:
    """Issue clocks that the main loop leaves a copy before it waits for it, and of an iteration."""
    (code,) = build_machine_code.read_sass(disassemble(case, arch, folder)).values()
    loops = build_machine_code.stage_loops(build_machine_code.Code(code))
    (loop,) = [loop for loop in loops if loop.products]
    groups = [wait.after.clocks for wait in loop.waits if wait.load.base == "LDGDEPBAR"]
    return min(groups), loop.clocks * len(loop.ends)


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        (Case("project", B=64), "sm_90"),
        (Case("project", dtype="float32", terms=2), "sm_90"),
        (Case("project", "gaussian"), "sm_80"),
    ],
    ids=str,
)
def test_tiles_are_asked_for_an_iteration_ahead(
    case: Case, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one program fills a multiprocessor, nothing else hides the wait for memory."""
    clocks, iteration = clocks_to_arrive(case, arch, tmp_path)
    assert clocks >= iteration
    monkeypatch.setenv(config.ENVIRONMENT, "num_stages=2")
    clocks, iteration = clocks_to_arrive(case, arch, tmp_path)
    assert clocks < iteration / 10  # what it was: waits for what it has just asked for


def check_products_in_flight(case: Case, folder: Path) -> None:
    """ptxas before CUDA 13.3 may reuse a fragment's registers while a wgmma still reads them."""
    sass = disassemble(case, "sm_90", folder)
    assert sass.count("HGMMA") > 0
    assert build_machine_code.hazards(sass) == []


@pytest.mark.parametrize(
    "case",
    [case for case, arch, _ in ESSENTIAL if arch == "sm_90" and case.kind != "sjlt"],
    ids=str,
)
def test_registers_of_products_in_flight_are_left_alone(case: Case, tmp_path: Path) -> None:
    check_products_in_flight(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case
        for case in aot.cases()
        if case.operation in ("project", "transpose")
        and case.dtype != "float64"
        and case.kind != "sjlt"
    ],
    ids=str,
)
def test_all_registers_of_products_in_flight(case: Case, tmp_path: Path) -> None:
    check_products_in_flight(case, tmp_path)
