"""The fastproj command: what it passes on, what it refuses, and how it ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastproj import cli
from fastproj.backends import registry
from fastproj.commands import info
from fastproj.commands.arguments import size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["bench", "--kind", "sjlt", "--block", "48"],
            "error: --block: received W=48; expected a power",
        ),
        (["bench", "--kind", "sjlt", "--block", "0"], "received '0'; expected a power of two from"),
        (["plan", "--block", "x"], "--block: received 'x'; expected a power of two from 16 to"),
        (["info", "--block", "20.5"], "--block: received '20.5'; expected a power of two from 16"),
        (["bench", "--block", "32"], "W=32 with --kind rademacher; expected --kind sjlt"),
        (["bench", "--rows", "0"], "received '0'; expected an integer of at least 1"),
        (["bench", "--rows", "many"], "received 'many'"),
        (["bench", "--kind", "cauchy"], "invalid choice: 'cauchy'"),
        (["bench", "--rows", "0**-1"], "received '0**-1'; expected an integer of at least 1"),
        (["bench", "--rows", "1e7", "--cols", "1e9"], "expected at most the"),
        (["bench", "--rows", "1e18"], "grad_dim=1000000000000000000; expected 1 <= grad_dim"),
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


@pytest.mark.filterwarnings("default")
def test_warnings_are_what_the_command_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the file and the line of code that they come from."""
    module = types.ModuleType("fastproj.commands.demo")
    module.main = lambda argv: warnings.warn("few samples", stacklevel=1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastproj.commands.demo", module)
    shown = warnings.showwarning
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().err == "fastproj demo: warning: few samples\n"
    assert warnings.showwarning is shown


def test_demo_names_the_package_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["demo"]) == 1
    assert "needs sklearn; pip install scikit-learn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("1e7", 10**7), ("1E7", 10**7), ("10**8", 10**8), ("1.2e8", 12 * 10**7)],
)
def test_sizes(text: str, number: int) -> None:
    assert size(text) == number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9" * 19, "below 2^63"),
        ("2**63", "below 2^63"),
        ("1e999999", "below 2^63"),
        ("inf", "of at least 1"),
        ("10**999999999999", "of at least 1"),
        ("1e9999999999999999999999", "of at least 1"),
        ("nan", "of at least 1"),
        ("-1", "of at least 1"),
        ("2**0.5", "of at least 1"),
        ("", "of at least 1"),
    ],
)
def test_what_is_no_size(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r}; expected an integer {expected}")):
        size(text)
    assert size("3**39") == 3**39  # exact, where floats are not


# ---- where the output goes ----------------------------------------------------------------------


def fastproj(words: str, redirected: str = "", **environment: str) -> tuple[int, str, str]:
    """Status and both outputs of a command line of a shell; Python buffers as by default."""
    line = f"{shlex.quote(sys.executable)} -m fastproj {words} {redirected}"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", f"exec {line}"], env={**kept, **environment}, capture_output=True
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize("words", ["info --json", "--help"])
def test_a_full_disk_is_said_in_a_line(words: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    status, _, err = fastproj(words, "> /dev/full")
    assert status == 1
    assert err.endswith(": can't write to standard output (No space left on device)\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "closed"),
    [("info --json", ">&- 2>&- <&-"), ("--help", ">&-"), ("--help", "2>&-"), ("x", ">&- 2>&-")],
)
def test_outputs_may_be_closed(words: str, closed: str) -> None:
    status, out, err = fastproj(words, closed)
    assert status == (2 if words == "x" else 0)
    assert err == ""
    assert bool(out) == (closed == "2>&-")


def test_a_help_whose_reader_leaves_is_no_error() -> None:
    status, _, err = fastproj("--help", "> >(exec true)")
    assert err == ""
    assert status in (0, 1, -signal.SIGPIPE)


def test_the_locale_c_is_enough(tmp_path: Path) -> None:
    """Which knows ASCII alone, as Python has it where nothing makes UTF-8 of it."""
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    np.save(tmp_path / "scores.npy", np.eye(3))
    (tmp_path / "texts.txt").write_text("日本\nä\nb\n", encoding="utf-8")
    page = tmp_path / "ü" / "page.html"
    words = f"report {tmp_path}/scores.npy --train-texts {tmp_path}/texts.txt --out {page}"
    status, out, err = fastproj(words, **plain)
    assert (status, err) == (0, "")
    assert out.startswith(str(tmp_path))
    assert "日本" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_every_terminal_can_show_the_help(word: str) -> None:
    assert cli.load(word).build_parser().format_help().isascii()
    assert cli.build_parser().format_help().isascii()


def test_names_that_are_not_text_are_shown_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file may be called by any bytes, and half a pair of surrogates may stand in JSON."""
    scores = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.npy")
    try:
        with open(scores, "wb") as file:
            np.save(file, np.eye(3))
    except OSError:
        pytest.skip("this disk takes no such names")
    (tmp_path / "texts.json").write_text('["\\ud83d", "b", "c"]')
    page = tmp_path / "page.html"
    texts = ["--train-texts", str(tmp_path / "texts.json"), "--out", str(page)]
    assert cli.main(["report", scores, *texts]) == 0
    assert capsys.readouterr().err == ""
    assert "caf?.npy" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("columns", ["1", "20", "500"])
def test_a_terminal_of_any_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.build_parser().format_help()
    for word in cli.COMMANDS:
        assert cli.load(word).build_parser().format_help()


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
