"""The fastproj command: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types

import pytest

import fastproj
from fastproj import cli
from fastproj.backends import registry
from fastproj.commands import info


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastproj.__version__ in out
    for name in registry.NAMES:
        assert name in out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec_version"] == fastproj.SPEC_VERSION
    usable = [name for name, backend in found["backends"].items() if backend["usable"]]
    assert usable == fastproj.available_backends()
    for backend in found["backends"].values():
        assert backend["usable"] == (backend["reason"] == "")


def test_bench_checks_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--rows", "3000", "--cols", "33", "--batch", "3", "--repeats", "1"]
    assert cli.main(["bench", *sizes]) == 0
    out = capsys.readouterr().out
    assert "fastproj medium" in out
    assert "WRONG" not in out


def test_bench_gives_no_speed_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fastproj.project

    def wrong(*args: object, **kwargs: object) -> object:
        return right(*args, **kwargs) * 1.1  # type: ignore[arg-type]

    monkeypatch.setattr(fastproj, "project", wrong)
    sizes = ["--rows", "3000", "--cols", "33", "--batch", "3", "--repeats", "1"]
    assert cli.main(["bench", *sizes]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fastproj")]
    assert len(lines) == 3
    assert all("WRONG" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
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
    assert cli.main(["bench", "--rows", "10"]) == 2
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
    assert capsys.readouterr().err == "\nfastproj: interrupted\n"


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


def test_plan_is_a_table_for_each_gpu_backend(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["info", "--plan", "64", "1e7", "4096", "bf16"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "B = 64, P = 10000000, K = 4096, bfloat16, rademacher, highest" in out
    for name in ("sm_80", "sm_90", "sm_120", "gfx942", "BLOCK_B", "grid", "stages", "splits of P"):
        assert name in out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == out


def test_plan_as_json_holds_what_the_kernels_choose(capsys: pytest.CaptureFixture[str]) -> None:
    from fastproj.backends import cuda

    words = ["--json", "--kind", "gaussian", "--precision", "high"]
    assert cli.main(["info", "--plan", "33", "10**6", "512", "fp32", *words]) == 0
    plans = json.loads(capsys.readouterr().out)
    for plan in plans:
        facts = plan["facts"]
        if plan["backend"] == "cuda" and cuda.not_built():
            assert "fastproj._cuda is not built" in plan["reason"]
            continue
        assert facts["terms"] == "2"
        assert int(facts["workspace bytes"]) <= 64 << 20
        assert facts["grid"]
    (hopper,) = [p for p in plans if p["backend"] == "triton" and p["arch"] == "sm_90"][:1]
    assert hopper["facts"]["matrix unit"] == "wgmma"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0", "10", "10", "fp32"], "received '0'; expected an integer of at least 1"),
        (["1", "1.5e0", "10", "fp32"], "received '1.5e0'"),
        (["1", "ten", "10", "fp32"], "received 'ten'; expected an integer of at least 1"),
        (["1.5", "10", "10", "fp32"], "received '1.5'; expected"),
        (["1", "1e400", "10", "fp32"], "received '1e400'; expected"),
        (["1", "10", "10**400", "fp32"], "received '10**400'; expected"),
        (["1", "10", "10", "int8"], "received DTYPE 'int8'; expected float32, fp32"),
    ],
)
def test_plan_names_a_wrong_word(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["info", "--plan", *words]) == 2
    assert said in capsys.readouterr().err
