"""install(), FASTPROJ_AS_FAST_JL, python -m fastproj.compat: ``import fast_jl`` finds ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from dense import integers
from packages import load

from fastproj import compat
from fastproj.compat import __main__ as command
from fastproj.compat import fast_jl as ours

REAL = importlib.util.find_spec("fast_jl") is not None
without_real = pytest.mark.skipif(REAL, reason="a real fast_jl is installed here")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != compat.ENVIRONMENT} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fast_jl of another make on sys.path."""
    (tmp_path / "fast_jl.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("fast_jl", None)


@without_real
def test_import_and_find_spec() -> None:
    assert importlib.util.find_spec("fast_jl") is None
    assert compat.install()
    assert compat.install()  # twice is once
    assert sys.path.count(compat.FAST_JL_PATH) == 1
    spec = importlib.util.find_spec("fast_jl")
    assert spec is not None
    assert spec.origin == str(Path(compat.FAST_JL_PATH) / "fast_jl.py")
    import fast_jl

    assert fast_jl.project_rademacher_8 is ours.project_rademacher_8
    assert sorted(fast_jl.__all__) == sorted(ours.__all__)
    assert importlib.util.find_spec("fast_jl") is not None  # also of the imported module
    compat.uninstall()
    assert importlib.util.find_spec("fast_jl") is None
    with pytest.raises(ImportError):
        importlib.import_module("fast_jl")


def test_a_real_one_is_not_shadowed(other: Path) -> None:
    assert not compat.install()
    assert importlib.import_module("fast_jl").real
    assert not compat.install()


def test_unless_asked(other: Path) -> None:
    assert compat.install(shadow=True)
    assert not hasattr(importlib.import_module("fast_jl"), "real")
    compat.uninstall()
    assert importlib.import_module("fast_jl").real


def test_also_where_the_real_one_was_imported(other: Path) -> None:
    real = importlib.import_module("fast_jl")
    assert compat.install(shadow=True)
    assert importlib.import_module("fast_jl") is not real
    compat.uninstall()
    assert sys.modules["fast_jl"] is real


def test_a_stand_in_without_a_file_counts_as_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_jl", ModuleType("fast_jl"))
    assert not compat.install()


def test_a_folder_of_that_name_is_no_fast_jl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkout of TRAK there is a folder fast_jl/: a namespace package to Python."""
    if REAL:
        pytest.skip("a real fast_jl is installed here")
    (tmp_path / "fast_jl").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert compat.install()
    assert importlib.import_module("fast_jl").project_normal_8 is ours.project_normal_8


@without_real
def test_the_command_runs_a_script(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("x = 1\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, importlib.util, torch\n"
        "import beside\n"
        "assert importlib.util.find_spec('fast_jl') is not None\n"
        "import fast_jl\n"
        "y = fast_jl.project_rademacher_8(torch.ones(1, 9), 3, 0, 1)\n"
        "print(__name__, sys.argv[1:], y.tolist())\n"
        "raise SystemExit(7)\n"
    )
    result = python("-m", "fastproj.compat", "--", str(script), "--flag", "-h", "a b")
    y = ours.project_rademacher_8(torch.ones(1, 9), 3, 0, 1).tolist()
    assert result.stdout == f"__main__ ['--flag', '-h', 'a b'] {y}\n", result.stderr
    assert result.returncode == 7


@without_real
def test_the_environment_variable() -> None:
    program = (
        "import importlib, os, fastproj.compat as c\n"
        "found = lambda: importlib.util.find_spec('fast_jl') is not None\n"
        "first = found()\n"
        "os.environ['FASTPROJ_AS_FAST_JL'] = '1'\n"
        "importlib.reload(c)\n"
        "print(first, found())\n"
    )
    assert python("-c", program, FASTPROJ_AS_FAST_JL="0").stdout == "False True\n"


@without_real
def test_the_path_serves_programs_that_never_heard_of_us() -> None:
    program = "import importlib.util as u; print(u.find_spec('fast_jl').origin)"
    result = python("-c", program, PYTHONPATH=compat.FAST_JL_PATH)
    assert result.stdout.strip().endswith("fast_jl.py"), result.stderr


@without_real
def test_enable_lets_the_variable_work_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(tmp_path))
    assert command.main(["--enable"]) == 0
    start = f"import site; site.addsitedir({str(tmp_path)!r}); import importlib.util as u\n"
    finds = start + "print(u.find_spec('fast_jl') is not None)"
    assert python("-c", finds, FASTPROJ_AS_FAST_JL="1").stdout == "True\n"
    assert python("-c", finds).stdout == "False\n"
    assert command.main(["--disable"]) == 0
    assert python("-c", finds, FASTPROJ_AS_FAST_JL="1").stdout == "False\n"
    assert command.main(["--disable"]) == 0
    capsys.readouterr()
    assert command.main(["--path"]) == 0
    assert capsys.readouterr().out == compat.FAST_JL_PATH + "\n"


def test_the_command_runs_a_module_with_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    projectors = load("trak.projectors")
    (tmp_path / "a_module.py").write_text(
        "import sys, fast_jl\n"
        "from trak.projectors import BasicProjector\n"
        "print(__name__, sys.argv[1:], fast_jl.__file__, BasicProjector.__module__)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setenv(compat.ENVIRONMENT, "0")
    before = projectors.BasicProjector
    arguments = ["--shadow", "--patch", "trak", "--", "-m", "a_module", "--x"]
    assert command.main(arguments) == 0
    file = Path(compat.FAST_JL_PATH) / "fast_jl.py"
    assert capsys.readouterr().out == f"__main__ ['--x'] {file} fastproj.compat.trak\n"
    assert os.environ[compat.ENVIRONMENT] == "1"  # for the processes that it starts
    assert projectors.BasicProjector is not before


def test_the_command_without_a_program_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "-- (script.py | -m module)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="expected -m module"):
        command.main(["--", "-m"])


@without_real
def test_spawned_processes_find_it_too() -> None:
    compat.install()
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(importlib.util.find_spec, ("fast_jl",)) is not None


def test_results_are_those_of_fastproj() -> None:
    compat.install(shadow=True)
    x = integers((2, 40))
    import fast_jl

    assert torch.equal(fast_jl.project_normal_16(x, 5, 1, 9), ours.project_normal_16(x, 5, 1, 9))
