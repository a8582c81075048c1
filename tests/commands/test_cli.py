"""The fastproj command: what it passes on, what it refuses, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types

import pytest

from fastproj import cli
from fastproj.backends import registry
from fastproj.commands import info


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--kind", "sjlt", "--block", "48"], "expected a power of two"),
        (["bench", "--rows", "0"], "received '0'; expected an integer of at least 1"),
        (["bench", "--rows", "many"], "received 'many'"),
        (["bench", "--kind", "cauchy"], "invalid choice: 'cauchy'"),
        (["nonsense"], "invalid choice: 'nonsense'"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["FASTPROJ_BACKEND", "FASTPROJ_CPU_ISA"])
def test_a_variable_that_names_nothing_is_named(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if variable == "FASTPROJ_CPU_ISA" and "cpu" not in registry.available_backends():
        pytest.skip("the cpu backend is not built here")
    monkeypatch.setenv(variable, "abacus")
    assert cli.main(["info"]) == 0
    capsys.readouterr()
    assert cli.main(["bench", "--rows", "10"]) == 1
    said = capsys.readouterr().err
    assert variable in said
    assert "'abacus'" in said


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().err


def test_interrupt_ends_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "print_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "fastproj info: stopped\n"


def test_demo_arguments_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = types.ModuleType("fastproj.commands.demo")
    module.main = lambda arguments: seen.append(arguments)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastproj.commands.demo", module)
    assert cli.main(["demo", "--help", "--seed", "3"]) == 0
    assert seen == [["--help", "--seed", "3"]]


def test_demo_names_the_package_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["demo"]) == 1
    assert "needs sklearn; pip install scikit-learn" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    """`fastproj info | head -1`: no traceback, whatever the buffers hold."""
    command = [sys.executable, "-u", "-m", "fastproj", "info"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert done.returncode in (1, -signal.SIGPIPE)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastproj", "info"],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "FASTPROJ_NOTE": "日"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "FASTPROJ_NOTE" in done.stdout
    assert r"\u65e5" in done.stdout
