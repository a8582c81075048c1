"""Ways to install: without a compiler, with a broken source, editable, isolated, other Pythons."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import build_wheels
from tests import ROOT
from tests.packaging.building import (
    Built,
    Venv,
    attempt,
    copy_sources,
    environment,
    pip_wheel,
    run,
)

PIP_WHEEL = (sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation")


def test_without_a_compiler_it_installs_and_says_what_is_missing(
    tmp_path: Path, new_venv: Callable[[], Venv], no_compiler: dict[str, str]
) -> None:
    sources = copy_sources(tmp_path / "sources")
    said = run(*PIP_WHEEL, "-w", tmp_path / "wheel", sources, cwd=tmp_path, env=no_compiler)
    assert "fastproj._cpu is NOT built: no C++ compiler was found" in said
    assert "reference" in said
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    venv = new_venv()
    venv.install(wheel)
    use = "import torch, fastproj; print(fastproj.project(torch.ones(1, 600), 3).shape)"
    said = venv.run("-c", use)
    assert "torch.Size([1, 3])" in said
    assert "reference" in said
    assert "install one, e.g. `apt-get install g++`, and reinstall fastproj (pip " in said
    assert "--no-cache-dir" in said  # pip would install the same wheel again
    info = venv.run("-m", "fastproj", "info")
    assert "no C++ compiler was found" in info


def test_without_a_compiler_a_required_kernel_fails_the_build(
    tmp_path: Path, no_compiler: dict[str, str]
) -> None:
    sources = copy_sources(tmp_path / "sources")
    env = {**no_compiler, "FASTPROJ_CPU": "1"}
    done = attempt(*PIP_WHEEL, "-w", tmp_path / "wheel", sources, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "FASTPROJ_CPU=1, but no C++ compiler was found" in done.stdout


@pytest.mark.parametrize(("variable", "value"), [("FASTPROJ_CPU", "yes"), ("FASTPROJ_CUDA", "on")])
def test_a_misspelt_switch_is_refused(tmp_path: Path, variable: str, value: str) -> None:
    sources = copy_sources(tmp_path / "sources")
    env = environment(**{"FASTPROJ_CPU": "0", variable: value})
    done = attempt(*PIP_WHEEL, "-w", tmp_path / "wheel", sources, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert f"{variable}: received {value!r}; expected 0" in done.stdout


@pytest.mark.slow
def test_a_compile_error_fails_the_build(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler here")
    sources = copy_sources(tmp_path / "sources")
    with open(sources / "csrc" / "cpu" / "machine.cpp", "a", encoding="utf-8") as file:
        file.write("\nint broken(\n")
    env = environment(MAX_JOBS="1")
    # A folder of objects that compile would only take time: the broken unit is the only one left.
    for path in (sources / "csrc" / "cpu").glob("isa_*.cpp"):
        path.write_text("")
    done = attempt(*PIP_WHEEL, "-w", tmp_path / "wheel", sources, cwd=tmp_path, env=env)
    assert done.returncode != 0
    assert "machine.cpp" in done.stdout
    assert "fastproj._cpu did not compile" in done.stdout
    assert not list(tmp_path.glob("wheel/*.whl"))


def test_editable_install_finds_the_kernels(tmp_path: Path, new_venv: Callable[[], Venv]) -> None:
    sources = copy_sources(tmp_path / "sources")
    venv = new_venv()
    env = environment(FASTPROJ_CPU="0")
    # pip builds with the target's Python, which sees this environment's build tools.
    venv.install("-q", "--no-build-isolation", "-e", sources, env=env)
    found = venv.run(
        "-c",
        "import fastproj, fastproj.kernels, importlib.util as u;"
        "print(fastproj.__file__, fastproj.kernels.__file__, u.find_spec('kernels'), sep='\\n')",
    )
    package, kernels, top = found.splitlines()
    assert Path(package) == sources / "fastproj" / "__init__.py"
    assert Path(kernels) == sources / "kernels" / "__init__.py"
    assert top == "None"


def test_sources_that_python_takes_for_the_package_say_so(
    tmp_path: Path, new_venv: Callable[[], Venv]
) -> None:
    """After `pip install .`, in the checkout: Python finds the folder `fastproj` there first."""
    sources = copy_sources(tmp_path / "sources")
    venv = new_venv()
    fault = f"Python took fastproj from the sources in {sources}, where it is not installed"
    use = "import torch, fastproj; print(fastproj.project(torch.ones(1, 600), 3).shape)"
    said = run(venv.python, "-c", use, cwd=sources)
    assert "torch.Size([1, 3])" in said
    assert fault in said
    assert "run Python in another folder, or `pip install -e .` in that one" in said
    info = run(venv.python, "-m", "fastproj", "info", cwd=sources)
    assert re.search(rf"^problem +{fault}", info, re.MULTILINE)
    launch = ("info", "--launch", "8", "600", "3", "fp32")
    done = attempt(venv.python, "-m", "fastproj", *launch, cwd=sources)
    assert done.returncode == 1
    assert fault in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.slow
def test_isolated_build_needs_nothing_installed(
    tmp_path: Path, new_venv: Callable[[], Venv]
) -> None:
    """`pip install .` as a stranger would: pip fetches the build requirements itself."""
    sources = copy_sources(tmp_path / "sources")
    venv = new_venv()
    venv.install("-q", sources)
    venv.run("-c", "from fastproj import _cpu")


@pytest.mark.slow
@pytest.mark.parametrize("version", build_wheels.VERSIONS)
def test_builds_and_runs_on_every_supported_python(version: str, tmp_path: Path) -> None:
    """Without torch for that Python: every module compiles, `_cpu` gives the known answers."""
    python = build_wheels.find_python(version)
    if python is None:
        pytest.skip(f"there is no working python{version} here")
    sources = copy_sources(tmp_path / "sources")
    run(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    mine = tmp_path / "venv" / "bin" / "python"
    env = environment(FASTPROJ_CPU="1")
    run(mine, "-m", "pip", "install", "-q", "--no-deps", sources, cwd=tmp_path, env=env)
    site = run(
        mine, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path
    )
    package = Path(site.strip()) / "fastproj"
    run(mine, "-W", "error", "-m", "compileall", "-q", "-f", package, cwd=tmp_path)
    check = (
        "import importlib.util as u, sys\n"
        "spec = u.spec_from_file_location('_cpu', sys.argv[1])\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(' '.join(f'{word:08x}' for word in module.philox4x32_10([0] * 4, [0] * 2)))\n"
        "print(module.isas()['portable'] == '')\n"
    )
    (module,) = package.glob("_cpu*.so")
    words, portable = run(mine, "-c", check, module, cwd=tmp_path).splitlines()
    assert words == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"  # tests/data/philox4x32_10.txt, line one
    assert portable == "True"


def test_version_is_said_once() -> None:
    """pyproject.toml takes the version from fastproj/__init__.py, and the changelog knows it."""
    import fastproj

    assert 'version = { attr = "fastproj.__version__" }' in (ROOT / "pyproject.toml").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(fastproj.__version__)}\b", changelog, re.MULTILINE)


@pytest.mark.slow
def test_rebuilding_without_the_kernel_leaves_none_behind(built: Built, tmp_path: Path) -> None:
    """A build folder that holds `_cpu` from before must not leak into a wheel without it."""
    tree = tmp_path / "tree"
    shutil.copytree(built.tree, tree)
    wheel = pip_wheel(tree, tmp_path / "wheel", env=environment(FASTPROJ_CPU="0"))
    listing = run(sys.executable, "-m", "zipfile", "-l", wheel, cwd=tmp_path)
    assert "fastproj/__init__.py" in listing
    assert "_cpu." not in listing
