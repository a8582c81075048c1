"""The build of fastproj._cuda: when it is made, for which architectures, and what stops it.

nvcc is a script here; tests/cuda/test_compiled.py has the real one.
"""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

import build_cuda
import build_machine_code
import build_native
from tests import ROOT
from tests.cuda import compiled

CUDA_12_4 = {"50", "60", "70", "75", "80", "86", "87", "89", "90"}
CUDA_13 = {"75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"}
VARIABLES = ("FASTPROJ_CUDA", "FASTPROJ_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH")


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build_native, "find_compiler", lambda variable="CXX": ["c++"])


def nvcc(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, release: str = "13.0", says: str = "exit 0"
) -> None:
    """An nvcc that says it is of ``release``, knows the architectures of CUDA 13, and, asked to
    compile, does ``says``."""
    script = folder / "cuda" / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    archs = "\\n".join(f"compute_{number}" for number in sorted(CUDA_13))
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) printf "nvcc: NVIDIA\\nCuda release {release}, V{release}\\nx\\n"'
        f';; --list-gpu-arch) printf "{archs}\\n";; *) {says};; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "cuda"))


def names(known: set[str]) -> list[str]:
    return [str(arch) for arch in build_cuda.choose_archs(known)[0]]


# ---- architectures -----------------------------------------------------------------------------


def test_by_default_ours_that_this_nvcc_knows_with_ptx_of_the_last() -> None:
    assert names(CUDA_13) == ["80", "86", "89", "90a", "100", "120+PTX"]
    assert names(CUDA_12_4) == ["80", "86", "89+PTX", "90a"]
    with pytest.raises(build_cuda.ArchError, match="none of 80, 86"):
        names({"50"})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ["90a"]),
        ("9.0a", ["90a"]),
        ("8.0;9.0+PTX", ["80", "90a+PTX"]),
        ("8.0 8.6, 12.0+PTX", ["80", "86", "120+PTX"]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["80", "86", "90a", "100", "120+PTX"]),
        ("8.0;8.0+PTX", ["80+PTX"]),
        ("Hopper", ["90a+PTX"]),
        ("Turing;Ampere;Ada", ["80", "86+PTX", "89+PTX"]),
        ("Ampere+Tegra", ["87"]),
        ("10.3 12.1", ["103", "121"]),
        ("All", ["80", "86", "89", "90a", "100", "120+PTX"]),
        ("  ", ["80", "86", "89", "90a", "100", "120+PTX"]),
    ],
)
def test_torchs_list(monkeypatch: pytest.MonkeyPatch, asked: str, expected: list[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert names(CUDA_13) == expected


def test_torchs_list_may_name_what_these_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images set it for everything that is built in them; what is left out is said."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 10.0+PTX")
    archs, notes = build_cuda.choose_archs(CUDA_12_4)
    assert [str(arch) for arch in archs] == ["80"]
    assert "75 is left out: sm_75 multiplies no bf16" in notes[0]
    assert "100+PTX is left out: this nvcc does not know sm_100; its newest is sm_90" in notes[1]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    with pytest.raises(build_cuda.ArchError, match="sm_80 is the first"):
        names(CUDA_13)


def test_make_test_asks_an_older_nvcc_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours must be right, so `make test` would fail where it names what an nvcc lacks."""
    makefile = (ROOT / "Makefile").read_text()
    ((variable, otherwise),) = re.findall(r"@(\w+)=(.*\$\(TEST_ARCHS\).*) \\", makefile)
    assert otherwise == f'"$${{{variable}-$(TEST_ARCHS)}}"'  # what is set already stays
    monkeypatch.setenv(variable, compiled.INSTALLED)
    assert names(CUDA_13) == ["80", "90a", "120+PTX"]
    assert names(CUDA_12_4) == ["80", "90a"]


def test_our_list_comes_first_and_must_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", "90a;120")
    assert names(CUDA_13) == ["90a", "120"]
    for asked, said in (
        ("75", "multiplies no bf16"),
        ("100", "does not know sm_100"),
        ("hoper", "expected a list such as"),
        ("8.0;sm_90", "expected a list such as"),
        (";", "no architecture"),
    ):
        monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", asked)
        with pytest.raises(build_cuda.ArchError, match=said):
            names(CUDA_12_4)


def test_flags() -> None:
    def flags(name: str, ptx: bool = False) -> list[str]:
        return [flag.removeprefix("-gencode=") for flag in build_cuda.Arch(name, ptx).flags()]

    assert flags("80") == ["arch=compute_80,code=sm_80"]
    assert flags("120", True) == ["arch=compute_120,code=[sm_120,compute_120]"]
    assert flags("90a", True) == [
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ]


# ---- whether it is built -----------------------------------------------------------------------


def skipped() -> build_native.Skipped:
    module = build_native.cuda_module("0")
    assert isinstance(module, build_native.Skipped)
    return module


def test_it_is_built_wherever_an_nvcc_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(tmp_path, monkeypatch)
    module = build_native.cuda_module("0")
    assert isinstance(module, build_native.Module)
    assert list(module.archs) == ["80", "86", "89", "90a", "100", "120+PTX"]
    device = {unit.source.stem for unit in module.units if unit.source.suffix == ".cu"}
    assert device == {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert "-lcudart_static" in module.libraries
    monkeypatch.setenv("FASTPROJ_CUDA", "0")
    assert "on request" in skipped().reason


def test_nothing_that_calls_the_cpp_library_is_compiled_by_the_compiler_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be another one than that of CXX, which links."""
    nvcc(tmp_path, monkeypatch)
    compilers = {"CXX": ["new++"], build_native.KERNEL_CXX: ["fast++"]}
    monkeypatch.setattr(build_native, "find_compiler", lambda variable="CXX": compilers[variable])
    cpu, cuda = build_native.cpu_module("0"), build_native.cuda_module("0")
    assert isinstance(cpu, build_native.Module)
    assert isinstance(cuda, build_native.Module)
    for unit in cpu.units:
        kernel = unit.source.stem.startswith("isa_")
        assert unit.command[0] == ("fast++" if kernel else "new++"), unit.source
    for unit in cuda.units:
        if unit.source.stem in ("launch", "bindings"):
            assert unit.command[0] == "new++"
        else:
            at = list(unit.command).index("-ccbin")
            assert unit.command[at + 1] == "fast++"
    assert cpu.link[0] == cuda.link[0] == "new++"
    archs = [word for unit in cuda.units for word in unit.command if "__CUDA_ARCH_LIST__" in word]
    assert archs == ["-D__CUDA_ARCH_LIST__=800,860,890,900,1000,1200"]


@pytest.mark.parametrize(
    ("release", "says", "reason"),
    [
        ("13.0", "echo 'unsupported GNU version!' >&2; exit 1", "unsupported GNU version"),
        ("12.3", "exit 0", "is of CUDA 12.3; install the CUDA toolkit 12.4 or newer"),
        ("", "exit 0", "does not run"),
    ],
)
def test_an_nvcc_that_does_not_work_is_passed_over_unless_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, says: str, reason: str
) -> None:
    nvcc(tmp_path, monkeypatch, release=release, says=says)
    assert reason in skipped().reason
    assert skipped().loud
    monkeypatch.setenv("FASTPROJ_CUDA", "1")
    with pytest.raises(build_native.BuildError, match=r"FASTPROJ_CUDA=1, but .*nvcc"):
        build_native.cuda_module("0")


def test_without_an_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    assert "no nvcc was found" in skipped().reason
    assert not skipped().loud
    monkeypatch.setenv("FASTPROJ_CUDA", "1")
    with pytest.raises(build_native.BuildError, match="FASTPROJ_CUDA=1, but no nvcc"):
        build_native.cuda_module("0")


def test_a_wrong_list_of_ours_fails_the_build_and_torchs_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc(tmp_path, monkeypatch)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    assert "multiplies no bf16" in skipped().reason
    monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", "75")
    with pytest.raises(build_native.BuildError, match="FASTPROJ_CUDA_ARCHS: received '75'"):
        build_native.cuda_module("0")


# ---- what ptxas says ---------------------------------------------------------------------------

REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4goodv' for 'sm_80'
ptxas info    : Function properties for _Z4goodv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4wornv' for 'sm_90a'
ptxas info    : Function properties for _Z4wornv
    16 bytes stack frame, {spills} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to insufficient register resources for the wgmma pipeline in the function x\n"
)


def test_reports_are_read() -> None:
    good, worn = build_machine_code.read_report(REPORT.format(spills=4))
    assert (good.name, good.arch, good.registers, good.spills) == ("_Z4goodv", "80", 168, 0)
    assert (worn.name, worn.arch, worn.registers, worn.spills) == ("_Z4wornv", "90a", 255, 12)
    assert build_machine_code.faults(REPORT.format(spills=4)) == [
        "_Z4wornv for sm_90a spills registers: 12 bytes"
    ]
    assert len(build_machine_code.faults(SERIALISED)) == 1
    starved = REPORT.format(spills=0).replace(" 8 bytes spill loads", " 0 bytes spill loads")
    assert build_machine_code.faults(starved) == []
    (fault,) = build_machine_code.faults(starved.replace("_Z4wornv", "_Z20project_x_sm90_kernel"))
    assert "starts with 255 registers a thread" in fault
    with pytest.raises(ValueError, match="can't read"):
        build_machine_code.read_report(
            "ptxas info : Compiling entry function 'x' for 'sm_80'\nnonsense\n"
        )


@pytest.mark.parametrize("report", [REPORT.format(spills=4), SERIALISED], ids=["spill", "serial"])
def test_what_ptxas_complains_of_fails_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    """An nvcc that makes objects and says that they are bad: no module, now or the next time."""
    (tmp_path / "report.txt").write_text(report)
    says = (
        'while [ "$1" != -o ]; do shift; done; echo > "$2"; : > "$2.d"; '
        f"cat {tmp_path / 'report.txt'} >&2"
    )
    nvcc(tmp_path, monkeypatch, says=says)
    monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", "80")
    module = build_native.cuda_module("0")
    assert isinstance(module, build_native.Module)
    units = [unit for unit in module.units if unit.source.name == "simple.cu"]
    module = build_native.Module(module.name, units, module.link, module.info, module.archs)
    for _ in range(2):
        with pytest.raises(build_native.BuildError, match="FASTPROJ_CUDA=0 leaves the module out"):
            build_native.build_module(module, tmp_path / "objects", tmp_path / "out.so")
        assert not (tmp_path / "out.so").exists()
    (tmp_path / "report.txt").write_text("")
    build_native.build_module(module, tmp_path / "again", tmp_path / "out.so")
    assert (tmp_path / "out.so").exists()


def test_a_check_that_can_not_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    says = 'while [ "$1" != -o ]; do shift; done; echo > "$2"; : > "$2.d"'
    nvcc(tmp_path, monkeypatch, says=says)
    monkeypatch.setattr(build_cuda, "find_disassembler", lambda _: None)
    for arch, told in (("80", False), ("90a", True)):
        monkeypatch.setenv("FASTPROJ_CUDA_ARCHS", arch)
        module = build_native.cuda_module("0")
        assert isinstance(module, build_native.Module)
        units = [unit for unit in module.units if unit.source.name == "simple.cu"]
        module = build_native.Module(module.name, units, module.link, module.info, module.archs)
        build_native.build_module(module, tmp_path / arch, tmp_path / "out.so")
        assert ("no cuobjdump with nvdisasm beside nvcc" in capfd.readouterr().err) == told


def test_a_disassembler_is_one_with_what_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuobjdump alone can't disassemble: the next one that can is taken."""

    def tools(folder: Path, *names: str) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_text("#!/bin/sh\n")
            (folder / name).chmod(0o755)
        return str(folder)

    nvcc = f"{tools(tmp_path / 'toolkit', 'nvcc', 'cuobjdump')}/nvcc"
    monkeypatch.setenv("PATH", tools(tmp_path / "path"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setattr(build_cuda, "TOOLKIT", tmp_path / "none")
    monkeypatch.setattr(build_cuda.importlib.util, "find_spec", lambda name: None)
    assert build_cuda.find_disassembler(nvcc) is None
    package = tmp_path / "site" / "nvidia"
    tools(package / "cu13" / "bin", "cuobjdump", "nvdisasm")
    monkeypatch.setattr(
        build_cuda.importlib.util,
        "find_spec",
        lambda name: types.SimpleNamespace(
            submodule_search_locations=[str(package)] if name == "nvidia" else None
        ),
    )
    assert build_cuda.find_disassembler(nvcc) == str(package / "cu13" / "bin" / "cuobjdump")
    tools(tmp_path / "path", "nvdisasm")
    assert build_cuda.find_disassembler(nvcc) == str(tmp_path / "toolkit" / "cuobjdump")
