"""The sdist and the wheel: what is in them, and that the wheel works far from the sources."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import build_native
import fastproj
from tests import ROOT
from tests.packaging.building import Built, Venv

USE = """
import sys
import torch
import fastproj
from fastproj import _cpu

grads = torch.arange(-3.0, 7.0).repeat(2, 150)  # [2, 1500]: small integers, so sums are exact
want = fastproj.project(grads, 77, seed=3, scale=None, backend="reference")
assert torch.equal(fastproj.project(grads, 77, seed=3, scale=None, backend="cpu"), want)
assert fastproj.available_backends().index("cpu") < fastproj.available_backends().index("reference")
print(fastproj.__file__, _cpu.__file__, fastproj.__version__, sep="\\n")
"""


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_built(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "build_native.py",
        "build_cuda.py",
        "build_machine_code.py",
        "pyproject.toml",
        "LICENSE",
        "constraints.txt",
    } <= names
    for path in (ROOT / "csrc").rglob("*.*pp"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "tests/data/rademacher_v1.txt" in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc", "_build_info.py"))]


@pytest.mark.slow
def test_wheel_has_one_top_level_package(built: Built) -> None:
    names = names_in(built.wheel)
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"fastproj", f"torch_fastproj-{fastproj.__version__}.dist-info"}
    assert [name for name in names if re.fullmatch(r"fastproj/_cpu\.[\w.-]+\.so", name)]
    assert "fastproj/_build_info.py" in names
    assert {"fastproj/backends/measured.json", "fastproj/py.typed"} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".hpp", ".o"))]


@pytest.mark.slow
def test_wheel_has_the_kernels_inside_fastproj(built: Built) -> None:
    wanted = {f"fastproj/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert wanted, "kernels/ has no modules"
    assert wanted <= set(names_in(built.wheel))


@pytest.mark.slow
def test_every_package_of_the_sources_is_in_the_wheel(built: Built) -> None:
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fastproj").rglob("*.py")
        if path.name != "_build_info.py"
    }
    assert modules <= set(names_in(built.wheel))


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(built: Built, new_venv: Callable[[], Venv]) -> None:
    venv = new_venv()
    venv.install(built.wheel)
    package, module, version = venv.run("-c", USE).splitlines()
    home = str(venv.python.parents[1])
    assert package.startswith(home)
    assert module.startswith(home)
    assert version == fastproj.__version__
    assert "not importable" in venv.run(
        "-c", "import importlib.util as u; print(u.find_spec('kernels') or 'not importable')"
    )
    venv.run("-c", "import fastproj.kernels")
    assert "usable" in venv.run("-m", "fastproj", "info")


@pytest.mark.slow
def test_every_instruction_set_was_compiled(built: Built) -> None:
    info = (built.tree / "build" / "lib").parent.glob("lib*/fastproj/_build_info.py")
    scope: dict[str, dict[str, dict[str, object]]] = {}
    exec(next(iter(info)).read_text(), scope)
    sources = {path.stem.removeprefix("isa_") for path in (ROOT / "csrc/cpu").glob("isa_*.cpp")}
    assert sources == {"portable", *build_native.ISAS}
    machine = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    here = {isa for isa, (arch, _) in build_native.ISAS.items() if arch == machine}
    assert set(scope["BUILT"]["cpu"]["isas"]) == {"portable", *here}  # type: ignore[call-overload]


def ninja_commands(built: Built) -> dict[str, list[str]]:
    """Object name -> words of its compile command."""
    (text,) = [path.read_text() for path in built.tree.glob("build/ninja-*/cpu/build.ninja")]
    found = re.findall(r"^build (\S+\.o): compile .*\n  tool = (.*)$", text, re.MULTILINE)
    return {name: command.split() for name, command in found}


@pytest.mark.slow
def test_only_the_instruction_set_units_have_machine_flags(built: Built) -> None:
    commands = ninja_commands(built)
    bindings = f"bindings.{sys.implementation.cache_tag}.o"
    assert {"isa_portable.o", "machine.o", bindings} <= set(commands)
    for name, words in commands.items():
        machine = [word for word in words if word.startswith("-m")]
        assert "-march=native" not in machine
        if not name.startswith("isa_") or name == "isa_portable.o":
            assert machine == []


def tool_output(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed (binutils)")
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(built: Built) -> list[Path]:
    return sorted(built.tree.glob("build/ninja-*/cpu/*.o"))


@pytest.mark.slow
def test_baseline_objects_use_no_wide_registers(built: Built) -> None:
    for path in objects(built):
        text = tool_output("objdump", "-d", "--no-show-raw-insn", path)
        wide = re.search(r"%[yz]mm\d", text)
        is_set = path.stem.startswith("isa_") and path.stem != "isa_portable"
        assert bool(wide) == is_set, path.name


@pytest.mark.slow
def test_units_share_no_function_that_the_linker_could_merge(built: Built) -> None:
    # A template or inline function that two units define is kept once: perhaps the AVX-512 copy.
    owners: dict[str, list[str]] = {}
    for path in objects(built):
        for line in tool_output("nm", "--defined-only", path).splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "WVu":
                owners.setdefault(symbol, []).append(path.stem)
    wide = {"isa_avx2", "isa_avx512", "isa_amx"}
    shared = {s: units for s, units in owners.items() if len(units) > 1 and wide & set(units)}
    assert shared == {}


@pytest.mark.slow
def test_module_links_to_neither_torch_nor_cuda(built: Built) -> None:
    (module,) = built.tree.glob("build/lib*/fastproj/_cpu*.so")
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool_output("readelf", "-d", module))
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda", name)]


def test_compiled_sources_include_no_torch_headers() -> None:
    paths = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(paths) > 5
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)/", text), path
