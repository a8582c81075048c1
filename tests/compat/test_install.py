"""install(), FASTPROJ_AS_FAST_JL, python -m fastproj.compat: ``import fast_jl`` finds ours."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastproj import compat
from fastproj.compat import __main__ as command
from fastproj.compat import bergson, dattri
from fastproj.compat import fast_jl as ours
from tests.compat.packages import load
from tests.dense import integers

REAL = importlib.util.find_spec("fast_jl") is not None
without_real = pytest.mark.skipif(REAL, reason="a real fast_jl is installed here")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != compat.ENVIRONMENT} | environment
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command changes in this process, to be put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for name in (compat.ENVIRONMENT, "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


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


def test_a_second_call_keeps_the_place_of_the_first(
    other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trak.install() calls install() too, and so does a spawned process with the variable set."""
    load("trak.projectors")
    from fastproj.compat import trak

    assert compat.install(shadow=True)
    trak.install()
    assert not hasattr(importlib.import_module("fast_jl"), "real")
    del sys.modules["fast_jl"]
    monkeypatch.setenv(compat.ENVIRONMENT, "1")
    importlib.reload(compat)
    assert compat.install()
    assert sys.path.count(compat.FAST_JL_PATH) == 1
    assert not hasattr(importlib.import_module("fast_jl"), "real")


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


PROGRAM = """
import importlib.util, multiprocessing, subprocess, sys
import beside

def found(_):
    return importlib.util.find_spec("fast_jl") is not None

if __name__ == "__main__":
    import fast_jl, torch
    y = fast_jl.project_rademacher_8(torch.ones(1, 9), 3, 0, 1)
    print(sys.argv, __file__, y.tolist(), flush=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(found, [0]), flush=True)
    code = "import importlib.util as u; print(u.find_spec('fast_jl').name)"
    subprocess.run([sys.executable, "-c", code])
    raise SystemExit(7)
"""


@without_real
def test_the_command_runs_a_script(tmp_path: Path) -> None:
    """And the processes that it starts, of both kinds, find fast_jl too."""
    (tmp_path / "beside.py").write_text("x = 1\n")
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    arguments = [str(script), "--shadow", "-h", "--", "a b"]
    result = python("-m", "fastproj.compat", "--", *arguments)
    y = ours.project_rademacher_8(torch.ones(1, 9), 3, 0, 1).tolist()
    expected = f"{arguments} {script} {y}\n[True]\nfast_jl\n"
    assert result.stdout == expected, result.stderr
    assert result.returncode == 7


def test_the_command_leaves_a_real_one_alone_unless_asked(other: Path, tmp_path: Path) -> None:
    """For the script and for the processes that it starts."""
    (tmp_path / "package").mkdir()
    script = tmp_path / "package" / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "code = 'import importlib.util as u; print(u.find_spec(\"fast_jl\").origin, flush=True)'\n"
        "exec(code)\n"
        "subprocess.run([sys.executable, '-c', code])\n"
    )
    mine = Path(compat.FAST_JL_PATH) / "fast_jl.py"
    for options, expected in (([], other / "fast_jl.py"), (["--shadow"], mine)):
        result = python("-m", "fastproj.compat", *options, str(script), PYTHONPATH=str(other))
        assert result.stdout == f"{expected}\n{expected}\n", result.stderr


def test_the_command_ends_as_the_script_does(tmp_path: Path, command_line: None) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, signal, sys\nos.kill(os.getpid(), signal.SIGINT)\nprint('on')\n")
    result = python("-m", "fastproj.compat", str(script))
    assert result.returncode == -signal.SIGINT
    assert result.stdout == ""
    script.write_text("def f():\n    raise RuntimeError('of the script')\nf()\n")
    with pytest.raises(RuntimeError, match="of the script") as error:
        command.main([str(script)])
    assert (str(error.traceback[-1].path), error.traceback[-1].lineno) == (str(script), 1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has -P from 3.11 on")
def test_the_command_adds_no_folder_in_safe_path_mode(
    tmp_path: Path, command_line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.seen = list(sys.path)\n")
    before = [path for path in sys.path if path != compat.FAST_JL_PATH]
    names = [name for name in dir(sys.flags) if not name.startswith("_")]
    flags = {name: getattr(sys.flags, name) for name in names} | {"safe_path": True}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags))
    command.main([str(tmp_path / "script.py")])
    assert [path for path in sys.seen if path != compat.FAST_JL_PATH] == before
    del sys.seen


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


@without_real
def test_enable_in_a_folder_with_any_letters_leaves_every_locale_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """site decodes the file by the locale, and an interpreter that can't read it doesn't start."""
    folder = tmp_path / "à moi"
    shutil.copytree(compat.FAST_JL_PATH, folder)
    monkeypatch.setattr(compat, "FAST_JL_PATH", str(folder))
    monkeypatch.setattr(command.sysconfig, "get_path", lambda name: str(tmp_path))
    assert command.main(["--enable"]) == 0
    start = f"import site; site.addsitedir({str(tmp_path)!r}); import importlib.util as u\n"
    finds = start + "print(u.find_spec('fast_jl') is not None)"
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for locale in ({}, ascii_only):
        assert python("-c", finds, FASTPROJ_AS_FAST_JL="1", **locale).stdout == "True\n"


def test_the_command_runs_a_module_with_patches(
    tmp_path: Path,
    command_line: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    projectors = load("trak.projectors")
    (tmp_path / "a_module.py").write_text(
        "import sys, fast_jl\n"
        "from trak.projectors import BasicProjector\n"
        "print(__name__, sys.argv[1:], fast_jl.__file__, BasicProjector.__module__)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = projectors.BasicProjector
    arguments = ["--shadow", "--patch", "trak", "--", "-m", "a_module", "--x"]
    assert command.main(arguments) == 0
    file = Path(compat.FAST_JL_PATH) / "fast_jl.py"
    assert capsys.readouterr().out == f"__main__ ['--x'] {file} fastproj.compat.trak\n"
    assert os.environ[compat.ENVIRONMENT] == "1"  # for the processes that it starts
    assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == compat.FAST_JL_PATH
    assert projectors.BasicProjector is not before


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_the_script_gets_its_arguments_as_they_are(
    tmp_path: Path, command_line: None, separator: list[str]
) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.seen = sys.argv\n")
    arguments = [str(tmp_path / "script.py"), "--path", "-m", "--", "--", "--patch", "", "a b"]
    assert command.main([*separator, *arguments]) == 0
    assert sys.__dict__.pop("seen") == arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "-- (script.py | -m module)"),
        (["--", "-m"], "received -m alone; expected -m module"),
        (["--", "nowhere.py"], "received 'nowhere.py', which is no file; expected script.py"),
        (["--", "-c", "print(1)"], "received '-c', which is no file"),
        (["--patch", "captum", "--", "x.py"], "invalid choice: 'captum'"),
        (["-m", "module"], "unrecognized arguments: -m"),
    ],
)
def test_a_command_that_cant_run_says_how(
    arguments: list[str], message: str, command_line: None, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = command.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@without_real
def test_torchrun_starts_the_command(tmp_path: Path) -> None:
    """docs/dropin.md: its workers are told to, because they are programs of their own."""
    load("trak.projectors")
    (tmp_path / "train.py").write_text(
        "import fast_jl, sys\n"
        "from trak.projectors import CudaProjector\n"
        "open(f'{sys.argv[1]}/{__import__(\"os\").environ[\"RANK\"]}', 'w').write(\n"
        "    fast_jl.__name__ + CudaProjector.__module__)\n"
    )
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = python(
        *launch, "-m", "fastproj.compat", "--patch", "trak", "--",
        str(tmp_path / "train.py"), str(tmp_path), OMP_NUM_THREADS="1",
    )  # fmt: skip
    for rank in "01":
        assert (tmp_path / rank).read_text() == "fast_jlfastproj.compat.trak", result.stderr


@pytest.mark.slow
def test_a_call_outside_the_guard_reaches_spawned_processes(tmp_path: Path) -> None:
    """docs/dropin.md: a spawned process imports the script, and nothing else of its parent."""
    load("trak.projectors")
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "import trak.projectors\n"
        "from fastproj.compat import trak as ours\n"
        "ours.install()\n"
        "def where(_):\n"
        "    return trak.projectors.CudaProjector.__module__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(where, [0]))\n"
    )
    result = python(str(script))
    assert result.stdout == "['fastproj.compat.trak']\n", result.stderr


# ---- where the other packages aren't -------------------------------------------------------------

OTHERS = ("trak", "sklearn", "scipy", "dattri", "bergson", "fast_jl", "quanda", "captum", "sjlt")


def test_without_the_other_packages_all_but_one_module_works() -> None:
    """Nothing else is imported; what needs a package names it."""
    result = python(
        "-c",
        "import sys\n"
        f"for name in {OTHERS}:\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from fastproj.compat import bergson, dattri, fast_jl, sjlt, trak\n"
        "x = torch.ones(2, 5)\n"
        "print(trak.CudaProjector(5, 3, 0, 'normal', 'cpu', 8).project(x, 0).shape)\n"
        "print(dattri.random_project(x, 2, 3, 8)(x).shape)\n"
        "print(bergson.project_global('a', x, 3).shape)\n"
        "sjlt.install()\n"
        "from sjlt import SJLTProjection\n"
        "print(SJLTProjection(5, 3, device='cpu').project(x).shape)\n"
        "for module in (trak, dattri, bergson):\n"
        "    try:\n"
        "        module.install()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
        "import fastproj.compat.sklearn\n",
    )
    shape = "torch.Size([2, 3])"
    *shapes, trak, dattri, bergson = result.stdout.splitlines()
    assert shapes == [shape] * 4
    for said, function, package in (
        (trak, "trak.install", "traker"),
        (dattri, "dattri.install", "dattri"),
        (bergson, "bergson.install", "bergson"),
    ):
        assert said.startswith(f"{function}: received ModuleNotFoundError(")
        assert said.endswith(f"expected the package {package} (pip install {package})")
    assert "ImportError: fastproj.compat.sklearn: received" in result.stderr
    assert "expected scikit-learn 1.6 or newer (pip install" in result.stderr


def of_dattri_0_2(param_shape_list, feature_batch_size, proj_dim, proj_max_batch_size, device):
    """Unscaled there."""


def of_bergson_0_13(identifier, m, n, dtype, device, projection_type="normal"):
    """With rows of length 1 there."""


@pytest.mark.parametrize(
    ("package", "module", "name", "old", "wanted"),
    [
        (
            dattri,
            "dattri.func.projection",
            "make_random_projector",
            of_dattri_0_2,
            r"without proj_type; expected .*'dattri>=0\.3'",
        ),
        (
            bergson,
            "bergson.collector.collector",
            "create_projection_matrix",
            of_bergson_0_13,
            r"without projection_scale; expected .*'bergson>=0\.13\.1'",
        ),
    ],
)
def test_versions_of_another_scale_are_refused(
    package, module, name, old, wanted, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ModuleType(module)
    setattr(theirs, name, old)
    monkeypatch.setitem(sys.modules, module, theirs)
    with pytest.raises(ImportError, match=wanted):
        package.install()
    assert getattr(theirs, name) is old


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
