"""`make gpu`, step by step, with stand-ins for Python and the sanitizer: no GPU, nothing built."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

CALLS = {
    "gpu-first": "gpu-build gpu-preflight gpu-ladder gpu-bench",
    "gpu-tests": "gpu-build gpu-test-cuda gpu-test-rest",
    "gpu-more": "gpu-build gpu-test-triton gpu-memcheck gpu-racecheck gpu-synccheck",
    "gpu-sweep": "gpu-build gpu-bench-all",
}
TEN_MINUTES = 600
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def stand_in(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def make(
    folder: Path,
    target: str = "gpu",
    *,
    fails: str = "",
    say: str = "",
    does: str = "",
    out: str = "",
) -> tuple[int, str, list[str]]:
    """Status, output and the commands of `make gpu` in a folder with nothing but the Makefile.

    fails : a pattern (of bash) of commands that exit with 1; say : what Python prints;
    does : what Python does before that, in bash.
    """
    shutil.copy(ROOT / "Makefile", folder)
    log = folder / "commands"
    judge = f'[[ -n "{fails}" && "$*" == {fails or "x"} ]] && exit 1\necho "{say}"; exit 0'
    python = stand_in(folder / "python", f'echo "$*" >> {log}\n{does}\n{judge}')
    sanitizer = stand_in(folder / "sanitizer", f'echo "sanitizer $*" >> {log}\n{judge}')
    dropped = ("FASTPROJ", "MAKE", "OUT", "PYTEST_ARGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    done = subprocess.run(
        ["make", target, "VENV=", f"PYTHON={python}", f"SANITIZER={sanitizer}", f"OUT={out}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    commands = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout, commands


def test_every_step_runs_and_nothing_is_installed(tmp_path: Path) -> None:
    status, output, commands = make(tmp_path, say="90")
    assert status == 0, output
    told = re.findall(r"^== (\S+) passed after", output, re.MULTILINE)
    assert told == " ".join(CALLS.values()).split()
    assert "FAILED" not in output
    assert "make gpu: everything passed" in output
    text = "\n".join(commands)
    assert "pip" not in text
    assert "-m venv" not in text
    assert "setup.py -q build --build-base build/gpu --build-lib build/gpu/lib" in text
    assert "-m bench.preflight --build build/gpu/wgmma_rate" in text
    pytests = [line for line in commands if "-m pytest" in line]
    assert len(pytests) == 6
    assert all("-m gpu" in line for line in pytests)
    tools = [line for line in commands if line.startswith("sanitizer")]
    assert [line.split()[2] for line in tools] == ["memcheck", "racecheck", "synccheck"]
    assert all("--error-exitcode" in line for line in tools)
    assert ["--report-api-errors no" in line for line in tools] == [True, False, False]
    assert [line for line in commands if "-m bench.project --device cuda" in line] == [
        "-m bench.project --device cuda --ladder --repeats 5 --max-seconds 1",
        "-m bench.project --device cuda --acceptance --budget 150",
        "-m bench.project --device cuda --budget 360",
    ]
    for step in told:
        assert (tmp_path / "build" / "gpu" / "logs" / f"{step}.log").is_file()


@pytest.mark.parametrize("call", CALLS)
def test_a_call_takes_less_than_ten_minutes_and_says_so(tmp_path: Path, call: str) -> None:
    """By its steps' limits, each with the 10 seconds after which it is killed."""
    status, output, _ = make(tmp_path, call, say="90")
    assert status == 0, output
    steps = re.findall(r"^== (\S+): at most (\d+) s$", output, re.MULTILINE)
    assert [step for step, _ in steps] == CALLS[call].split()
    most = sum(int(limit) + 10 for _, limit in steps)
    assert f"== {call}: {CALLS[call]}; at most {most} s\n" in output
    assert most < TEN_MINUTES
    assert f"make {call}: everything passed" in output


def test_the_first_call_asks_the_first_questions_first(tmp_path: Path) -> None:
    _, _, commands = make(tmp_path, "gpu-first", say="90")
    runs = [line for line in commands if line.startswith("-m bench.")]
    assert runs[1] == "-m bench.preflight --output build/gpu/logs --rate build/gpu/wgmma_rate"
    assert "--ladder" in runs[2]
    makefile = (ROOT / "Makefile").read_text()
    limit = re.search(r"LIMIT_gpu-preflight := (\d+)", makefile)
    assert limit is not None
    assert int(limit[1]) <= 45


def test_without_a_module_for_the_gpu_there_is_one_for_the_cpu(tmp_path: Path) -> None:
    """Results on a GPU, of Triton, are compared with it; NumPy would take minutes a case."""
    told = 'echo "FASTPROJ_CUDA=$FASTPROJ_CUDA"; [[ "$*$FASTPROJ_CUDA" == *setup.py*1 ]] && exit 1'
    status, output, _ = make(tmp_path, "gpu-build", say="90", does=told)
    assert status != 0
    assert re.findall("FASTPROJ_CUDA=(.+)", output)[-2:] == ["1", "0"]
    built = tmp_path / "build" / "gpu" / "lib" / "fastproj" / "_cpu.so"
    built.parent.mkdir(parents=True)
    built.touch()  # and what is there, such as from another machine, is left as it is
    _, output, _ = make(tmp_path, "gpu-build", say="90", does=told)
    assert re.findall("FASTPROJ_CUDA=(.+)", output)[-1:] == ["1"]


def test_another_gpu_needs_no_wgmma(tmp_path: Path) -> None:
    _, _, commands = make(tmp_path, "gpu-build", say="89")
    assert not [line for line in commands if "preflight" in line]


def test_a_step_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """Its limit is set to a second; it would end by itself only when the test's time is up. It is
    interrupted first, so that it can tell what it has found, and killed where it goes on.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    goes_on = 'trap "echo found so far" INT; while :; do tail -f /dev/null; done'
    does = f'[[ "$*" == *preflight\\ --output* ]] && {{ {goes_on}; }}'
    python = stand_in(tmp_path / "python", f"{does}\necho 90")
    arguments = ["VENV=", f"PYTHON={python}", "LIMIT_gpu-preflight=1", "GPU_KILL=1"]
    done = subprocess.run(
        ["make", "gpu-first", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        # What runs the tests may ignore interrupts, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode != 0
    assert "found so far" in done.stdout
    assert "== gpu-preflight FAILED after" in done.stdout
    assert "== gpu-bench passed after" in done.stdout
    assert "make gpu-first: failed: gpu-preflight\n" in done.stderr


def test_results_and_logs_go_to_the_folder_that_is_named(tmp_path: Path) -> None:
    """What a benchmark writes is copied after its step, even where the step fails."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "old.json").touch()
    out = tmp_path / "out"
    does = (
        f'case "$*" in *--ladder*) echo 1 > {tmp_path}/bench/results/ladder.json; exit 1;; '
        f"*--acceptance*) echo 2 > {tmp_path}/bench/results/targets.json;; esac"
    )
    status, output, commands = make(tmp_path, "gpu-first", say="90", does=does, out=str(out))
    assert "make gpu-first: failed: gpu-ladder\n" in output
    assert status != 0
    assert sorted(path.name for path in out.glob("*.json")) == ["ladder.json", "targets.json"]
    assert sorted(path.stem for path in (out / "logs").glob("*.log")) == sorted(
        CALLS["gpu-first"].split()
    )
    assert f"-m bench.preflight --output {out}/logs --rate build/gpu/wgmma_rate" in commands


@pytest.mark.parametrize(
    ("fails", "call", "step"),
    [
        ("*setup.py*", "gpu-first", "gpu-build"),
        ("*preflight\\ --output*", "gpu-first", "gpu-preflight"),
        ("*tests/kernels", "gpu-more", "gpu-test-triton"),
        ("*racecheck*", "gpu-more", "gpu-racecheck"),
        ("*--ladder*", "gpu-first", "gpu-ladder"),
    ],
)
def test_a_step_that_fails_is_named_and_the_later_ones_run(
    tmp_path: Path, fails: str, call: str, step: str
) -> None:
    status, output, _ = make(tmp_path, call, fails=fails, say="90")
    assert status != 0
    assert f"== {step} FAILED" in output
    assert f"make {call}: failed: {step}\n" in output
    passed = re.findall(r"^== (\S+) passed after", output, re.MULTILINE)
    assert passed == [other for other in CALLS[call].split() if other != step]


def test_a_call_that_fails_is_named_and_the_later_ones_run(tmp_path: Path) -> None:
    status, output, commands = make(tmp_path, fails="*--ladder*", say="90")
    assert status != 0
    assert "make gpu: failed: gpu-first\n" in output
    assert "make gpu-sweep: everything passed" in output
    assert "-m bench.project --device cuda --budget 360" in commands


# Those that test triton itself, and what a conftest leaves out where the extra [hf] isn't there.
LEFT_OUT = {"kernels", "hf", "tests/commands/test_trak.py"}


def test_what_the_tests_import_is_what_the_first_step_asks_for() -> None:
    """A module that fails to import costs its whole step where nothing else is installed."""
    makefile = (ROOT / "Makefile").read_text()
    asked_for = re.search(r'missing = \[n for n in "([^"]+)"\.split\(\)', makefile)
    assert asked_for is not None
    own = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]  # scripts import the latter by name
    here = {path.stem for path in own} | {"bench", "fastproj", "tests"}
    known = {*asked_for[1].split(), *here, *sys.stdlib_module_names}
    foreign = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in ("tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.parse(path.read_text()).body
        for name in imported(node)
        if name not in known
        and not LEFT_OUT & {path.parent.name, path.relative_to(ROOT).as_posix()}
    }
    assert not foreign


def imported(node: ast.stmt) -> list[str]:
    """The top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.partition(".")[0]]
    return []


def test_without_a_gpu_nothing_starts(tmp_path: Path) -> None:
    status, output, commands = make(tmp_path, fails="*is_available*")
    assert status != 0
    assert not [line for line in commands if "setup.py" in line or "-m pytest" in line]
    assert "== gpu-build" not in output


def check(folder: Path, python: str) -> str:
    """What the first step says of a Python: a script of bash that gets its arguments."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    stand_in(folder / "python", python)
    done = subprocess.run(
        ["make", "gpu-check", "VENV=", f"PYTHON={folder / 'python'}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    return done.stderr


def test_an_old_python_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    """It knows no PYTHONSAFEPATH: it would import the sources, which have no compiled module."""
    as_old = "import sys; sys.version_info = (3, 10, 12); exec(sys.argv[1])"
    said = check(tmp_path, f'exec {sys.executable} -c "{as_old}" "$2"')
    assert "python is Python 3.10; expected 3.11 or newer" in said


@pytest.mark.parametrize("name", ["setuptools", "pybind11"])
def test_tools_too_old_for_the_build_are_named(tmp_path: Path, name: str) -> None:
    """Setuptools before 77 refuses pyproject.toml, in forty lines that don't say why."""
    package = tmp_path / "site" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.12.1"\n')
    said = check(tmp_path, f'PYTHONPATH={tmp_path}/site exec {sys.executable} "$@"')
    needed = re.search(rf'"{name}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert needed is not None
    assert f"python has {name} 2.12.1; expected {name}>={needed[1]}\n" in said
