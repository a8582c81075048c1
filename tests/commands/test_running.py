"""What commands share: help that teaches, exit statuses, JSON, Ctrl-C, completion by tab."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj import cli
from fastproj.commands import running
from fastproj.trak.evaluation.retrain import GroundTruth
from tests.essential import slow
from tests.trak.recipe_files import trained, write_recipe

PARSERS = {word: cli.load(word).build_parser() for word in cli.COMMANDS}


def fastproj(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose standard error is no terminal."""
    command = [sys.executable, "-m", "fastproj", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


# ---- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", PARSERS)
def test_every_help_has_examples_that_can_be_typed(word: str) -> None:
    """Each line of them that begins with fastproj is a command line that the parser takes."""
    text = PARSERS[word].format_help().partition("examples:")[2].replace("\\\n", " ")
    lines = re.findall(rf"^ *fastproj {word}(.*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        PARSERS[word].parse_args(shlex.split(line.partition(" > ")[0], comments=True))


@pytest.mark.parametrize("word", PARSERS)
def test_every_option_says_what_it_is(word: str) -> None:
    for action in PARSERS[word]._actions:
        name = action.option_strings or action.dest
        said = action.help or ""
        assert len(said.split()) >= 2, name
        if action.default not in (None, False, argparse.SUPPRESS, []):
            assert f"(default: {str(action.default).strip('[').split(',')[0]}" in said, name
    assert "--json" in PARSERS[word].format_help()


def test_help_has_the_exit_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for status in (running.DONE, running.FAILED, running.MISUSED, running.INTERRUPTED):
        assert re.search(rf"^ +{status} +\w", text, re.MULTILINE), status
    for word, purpose in cli.COMMANDS.items():
        assert re.search(rf"^ +{word}\s", text, re.MULTILINE)
        assert purpose.split()[0] in text


# ---- exit statuses and --json -------------------------------------------------------------------


def options(**named: object) -> argparse.Namespace:
    return argparse.Namespace(json=False, **named)


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        ((0, {}), 0, ""),
        ((1, {}), 1, ""),
        (ValueError("received 3"), 1, "fastproj word: received 3\n"),
        (OSError("no room"), 1, "fastproj word: no room\n"),
        (MemoryError(), 1, "fastproj word: not enough memory (MemoryError)\n"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4000 bytes.\nmore"
            ),
            1,
            "fastproj word: not enough memory (DefaultCPUAllocator: can't allocate memory: you "
            "tried to allocate 4000 bytes.)\n",
        ),
        (KeyboardInterrupt(), 130, "fastproj word: stopped. All is kept\n"),
    ],
)
def test_each_end_has_its_status_and_one_line(
    outcome: object, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: argparse.Namespace) -> running.Outcome:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[return-value]

    assert running.execute("word", options(), run, kept="All is kept") == status
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RuntimeError("expected contiguous memory format")]
)
def test_errors_of_the_program_keep_their_traceback(error: Exception) -> None:
    def run(_: argparse.Namespace) -> running.Outcome:
        raise error

    with pytest.raises(type(error)):
        running.execute("word", options(), run)


def test_torch_says_that_there_is_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> running.Outcome:
        torch.empty(10**15)
        return 0, {}

    assert running.execute("word", options(), run) == 1
    err = capsys.readouterr().err
    assert err.startswith("fastproj word: not enough memory (")
    assert "4000000000000000 bytes" in err
    assert "enforce" not in err


def test_one_process_of_several_prints_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    wanted = argparse.Namespace(json=True)
    assert running.execute("word", wanted, lambda _: (0, None)) == 0
    assert capsys.readouterr().out == ""
    assert running.execute("word", wanted, lambda _: (0, {})) == 0
    assert json.loads(capsys.readouterr().out)["fastproj"]


def test_a_package_that_is_missing_only_when_it_is_used_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: list[str]) -> int:
        raise ModuleNotFoundError("no", name="sklearn")

    monkeypatch.setattr(cli.load("mislabel"), "main", main)
    assert cli.main(["mislabel"]) == 1
    assert capsys.readouterr().err == (
        "fastproj mislabel: needs sklearn; pip install scikit-learn\n"
    )


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    """What a recipe and its worker processes print goes to standard error."""
    write_recipe(tmp_path, "print('training', flush=True)")
    np.save(tmp_path / "scores.npy", np.random.default_rng(0).normal(size=(24, 5)))
    words = ("lds", "recipe.py", "--scores", "scores.npy", "--subsets", 4, "--json")
    done = fastproj(*words, "--jobs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["n_subsets"], found["n_targets"]) == (4, 5)
    assert "LDS" in done.stderr
    assert "training" in done.stderr
    assert "\r" not in done.stderr  # no bar: it is no terminal


def test_a_failure_prints_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--scores", str(tmp_path / "a.npy"), "--flipped", str(tmp_path / "b.npy"))
    assert cli.main(["mislabel", *files, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastproj mislabel: ")
    assert err.count("\n") == 1


# ---- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [slow(1), 2])
def test_interrupted_retraining_keeps_what_is_trained(tmp_path: Path, jobs: int) -> None:
    """The third training sends what Ctrl-C sends, to the command's own process, and never ends."""
    process = "os.getpid()" if jobs == 1 else "multiprocessing.parent_process().pid"
    write_recipe(
        tmp_path,
        "import multiprocessing\n"
        f"    if count == 3: os.kill({process}, signal.SIGINT); signal.pause()",
    )
    words = ("lds", "recipe.py", "--train-set-size", 24, "--subsets", 6, "--out", "truth")
    stopped = fastproj(*words, "--jobs", jobs, cwd=tmp_path)
    assert stopped.stderr == (
        "fastproj lds: stopped. Finished models are kept in truth; the same command goes on from "
        "there\n"
    )
    assert stopped.returncode == 130
    if jobs == 1:
        assert fastproj(*words, cwd=tmp_path).returncode == 0
        assert GroundTruth.load(tmp_path / "truth").masks.shape == (6, 24)
        assert len(trained(tmp_path)) == 3 + 4


@pytest.mark.parametrize("package", ["numpy", "torch"])
@pytest.mark.parametrize("begun", ["sys.exit(cli.main())", "runpy.run_module('fastproj')"])
def test_interrupted_while_packages_are_imported(package: str, begun: str) -> None:
    """Which takes seconds on a busy machine: the command is there before, in both ways to start."""
    program = (
        "import os, runpy, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {package!r}: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from fastproj import cli\n"
        "sys.argv[1:] = ['demo']\n"
        f"{begun}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fastproj demo: stopped\n")


def test_interrupted_in_a_module_that_takes_it_for_a_failed_import() -> None:
    """As NumPy's compiled modules do, which lose the KeyboardInterrupt."""
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name != 'numpy': return\n"
        "        try: os.kill(os.getpid(), signal.SIGINT)\n"
        "        except KeyboardInterrupt: pass\n"
        "        raise ImportError('PyCapsule_Import could not import module \"datetime\"')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from fastproj import cli\n"
        "sys.argv[1:] = ['demo']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fastproj demo: stopped\n")


def test_a_second_interrupt_is_too_late() -> None:
    """While the first one is being said."""
    program = (
        "import os, signal, sys\n"
        "from fastproj import cli\n"
        "def stop(arguments): raise KeyboardInterrupt\n"
        "said = cli.interrupted\n"
        "def again(word): os.kill(os.getpid(), signal.SIGINT); return said(word)\n"
        "cli.run, cli.interrupted = stop, again\n"
        "sys.argv[1:] = ['info']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "fastproj info: stopped\n")


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [("os.kill(os.getpid(), signal.SIGINT)", 130, "fastproj info: stopped\n"), ("0, {}", 0, "")],
)
def test_an_interrupt_does_not_break_into_the_exit(ends: str, status: int, said: str) -> None:
    program = (
        "import atexit, os, signal\n"
        "from fastproj import cli\n"
        "from fastproj.commands import info\n"
        f"def stop(options): return {ends}\n"
        "info.print_info = stop\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "import sys; sys.argv[1:] = ['info']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


# ---- completion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("", ["brittleness", "demo", "info", "plan", "report"]),
        ("re", ["report"]),
        ("plan --ki", ["--kind"]),
        ("plan --kind ", ["gaussian", "rademacher", "sjlt"]),
        ("lds --sc", ["--scores"]),
        ("lds --scores sco", ["scores.npy"]),
        ("lds rec", ["recipe.py"]),
    ],
)
def test_bash_completes(
    line: str, offered: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", "bash"]) == 0
    made = capsys.readouterr().out
    (tmp_path / "scores.npy").touch()
    (tmp_path / "recipe.py").touch()
    words = ["fastproj", *line.split(" ")]
    script = (
        f"{made}\nCOMP_WORDS=({' '.join(map(shlex.quote, words))})\n"
        f"COMP_CWORD={len(words) - 1}\n_shtab_fastproj\n" + 'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    assert set(offered) <= set(done.stdout.split()), done.stdout


@pytest.mark.parametrize(("shell", "first"), [("zsh", "#compdef fastproj"), ("tcsh", "# AUTO")])
def test_other_shells_have_scripts_too(
    shell: str, first: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    assert text.startswith(first)
    assert all(word in text for word in cli.COMMANDS)


def test_completion_without_shtab_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.delitem(sys.modules, "fastproj.commands.completion", raising=False)
    assert cli.main(["--print-completion", "bash"]) == 1
    assert "needs shtab; pip install shtab" in capsys.readouterr().err
