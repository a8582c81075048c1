"""`make wheels`: what a release wheel must be, and that one can be made."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import build_native
import build_wheels
from tests import ROOT
from tests.packaging.building import Built, Venv, copy_sources, environment, run

HERE = sorted(isa for isa, (arch, _) in build_native.ISAS.items() if arch == platform.machine())
ISAS = ["portable", *HERE]


def wheel(folder: Path, *, isas: list[str] = ISAS, cuda: bool = False, **files: bytes) -> Path:
    """A file with what `check_wheel` reads; ``files``: folders with a file of these bytes."""
    record: dict[str, dict[str, object]] = {
        "cpu": {"built": True, "reason": "", "isas": isas},
        "cuda": {"built": cuda, "reason": "" if cuda else "no nvcc was found", "compiler": "nvcc"},
    }
    path = folder / "torch_fastproj-0-cp311-cp311-manylinux_2_17_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("fastproj/_build_info.py", build_native.build_info_text(record))
        archive.writestr("torch_fastproj-0.dist-info/METADATA", "")
        for name, data in files.items():
            archive.writestr(f"{name}/file", data)
    return path


def test_a_good_wheel_passes(tmp_path: Path) -> None:
    build_wheels.check_wheel(wheel(tmp_path), cuda=False)
    build_wheels.check_wheel(wheel(tmp_path, cuda=True), cuda=True)


@pytest.mark.skipif(not HERE, reason="this architecture has the portable kernels only")
def test_a_lost_instruction_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(build_wheels.WheelError, match=f"no code for {HERE[-1]}"):
        build_wheels.check_wheel(wheel(tmp_path, isas=["portable", *HERE[:-1]]), cuda=False)


@pytest.mark.parametrize("cuda", [True, False])
def test_cuda_kernels_are_there_if_and_only_if_asked_for(tmp_path: Path, cuda: bool) -> None:
    with pytest.raises(build_wheels.WheelError, match="CUDA kernels"):
        build_wheels.check_wheel(wheel(tmp_path, cuda=not cuda), cuda=cuda)


def test_a_large_wheel_and_a_vendored_library_are_refused(tmp_path: Path) -> None:
    large = wheel(tmp_path, fastproj=os.urandom(build_wheels.MOST_BYTES))
    with pytest.raises(build_wheels.WheelError, match=r"it has 30\.\d MB; at most 30"):
        build_wheels.check_wheel(large, cuda=False)
    with pytest.raises(build_wheels.WheelError, match=r"also installs torch_fastproj\.libs"):
        build_wheels.check_wheel(wheel(tmp_path, **{"torch_fastproj.libs": b""}), cuda=False)


def test_the_driver_is_said() -> None:
    said = build_wheels.driver("Cuda compilation tools, release 12.8, V12.8.93")
    assert said == "compiled by CUDA 12.8, needs driver 525.60.13 or newer"
    assert "580" in build_wheels.driver("Cuda compilation tools, release 13.0, V13.0.88")


def test_versions_are_those_that_pyproject_supports() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert tuple(re.findall(r"Python :: (3\.\d+)\"", text)) == build_wheels.VERSIONS
    assert f'requires-python = ">={build_wheels.VERSIONS[0]}"' in text


# ---- what is built, with stand-ins for what takes minutes ---------------------------------------


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What ``main`` does, as (step, its FASTPROJ_CUDA); there is an nvcc, and every Python."""
    done: list[tuple[str, ...]] = []

    def build_sdist(output: Path) -> Path:
        (output / "x.tar.gz").touch()
        return output / "x.tar.gz"

    def build_wheel(python: str, output: Path, env: dict[str, str], cuda: bool) -> Path:
        done.append((python, env.get("FASTPROJ_CUDA", ""), str(cuda)))
        return wheel(output, cuda=cuda)

    def compile_kernels(env: dict[str, str]) -> None:
        done.append(("kernels", env.get("FASTPROJ_CUDA", "")))

    monkeypatch.setattr(build_wheels, "compile_kernels", compile_kernels)
    monkeypatch.setattr(build_wheels, "build_sdist", build_sdist)
    monkeypatch.setattr(build_wheels, "build_wheel", build_wheel)
    monkeypatch.setattr(build_wheels, "find_python", lambda version: f"python{version}")
    monkeypatch.setattr(build_wheels.build_cuda, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build_wheels.build_native, "find_compiler", lambda: ["c++"])
    monkeypatch.delenv("FASTPROJ_CUDA", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    return done


@pytest.mark.parametrize(
    ("variable", "nvcc", "cuda"),
    [
        (None, "nvcc", True),
        (None, None, False),
        ("0", "nvcc", False),
        ("0", None, False),
        ("1", "nvcc", True),
        ("1", None, True),  # and the build says that there is none
    ],
)
def test_cuda_is_as_the_variable_says(
    variable: str | None,
    nvcc: str | None,
    cuda: bool,
    steps: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build_wheels.build_cuda, "find_nvcc", lambda: nvcc)
    if variable is not None:
        monkeypatch.setenv("FASTPROJ_CUDA", variable)
    assert build_wheels.main(["--output", str(tmp_path)]) == 0
    given = "1" if cuda else variable or ""  # unset, the wheel says that no nvcc was found
    wheels = [(f"python{version}", given, str(cuda)) for version in build_wheels.VERSIONS]
    assert steps == [("kernels", given), *wheels]


def test_only_the_versions_that_are_asked_for(
    steps: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_wheels.main(["--output", str(tmp_path), "--pythons", "3.11", "3.13"]) == 0
    assert [step[0] for step in steps] == ["kernels", "python3.11", "python3.13"]
    out = capsys.readouterr().out
    assert "the wheel for Python 3.13" in out
    steps.clear()
    with pytest.raises(SystemExit) as caught:
        build_wheels.main(["--output", str(tmp_path), "--pythons", "3.9"])
    assert caught.value.code == 2
    assert not steps


def test_a_version_that_is_not_here_is_named_before_anything_is_built(
    steps: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = {"3.11": "python3.11"}
    monkeypatch.setattr(build_wheels, "find_python", here.get)
    words = ["--output", str(tmp_path)]
    assert build_wheels.main([*words, "--all"]) == 1
    assert not steps
    assert "no wheel for Python 3.10, 3.12, 3.13: no such interpreter" in capsys.readouterr().out
    assert build_wheels.main(words) == 0
    assert [step[0] for step in steps] == ["kernels", "python3.11"]
    steps.clear()
    assert build_wheels.main([*words, "--pythons", "3.12"]) == 1
    assert not steps


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FASTPROJ_CUDA", "no", "FASTPROJ_CUDA: received 'no'; expected 0"),
        ("", "", "it failed"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line(
    variable: str,
    value: str,
    said: str,
    steps: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(env: dict[str, str]) -> None:
        raise build_wheels.WheelError("it failed")

    monkeypatch.setattr(build_wheels, "compile_kernels", fail)
    if variable:
        monkeypatch.setenv(variable, value)
    assert build_wheels.main(["--output", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert not steps


def test_make_passes_on_the_versions(tmp_path: Path) -> None:
    """`make wheels PYTHONS=...`, and a check of no wheel."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    dry = ["make", "-n", "wheels", "PYTHONS=3.11 3.12"]
    said = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True).stdout
    assert "build_wheels.py --pythons 3.11 3.12" in said
    (tmp_path / "venv").mkdir()
    for name in ("constraints.txt", "venv/.tools"):
        (tmp_path / name).touch()
    (tmp_path / "venv" / "bin").mkdir()
    (tmp_path / "venv" / "bin" / "python").touch()
    check = ["make", "wheels-check", "VENV=venv"]
    done = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "dist/ has no wheel; make wheels" in done.stderr


def test_the_oldest_torch_is_the_oldest_that_is_taken() -> None:
    script = (ROOT / "tests" / "packaging" / "check_wheel.sh").read_text()
    oldest = re.search(r"oldest\) want=torch==([\d.]+)", script)
    assert oldest is not None
    assert f'"torch>={oldest[1].removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


def test_an_interpreter_is_known_by_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python3.10").write_text("#!/bin/sh\necho 3.12\n")
    (tmp_path / "python3.10").chmod(0o755)
    for name in ("HOME", "PYENV_ROOT"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_wheels.find_python("3.10") is None
    assert build_wheels.find_python("3.13") is None
    here = "{}.{}".format(*sys.version_info[:2])
    (tmp_path / f"python{here}").symlink_to(sys.executable)
    assert build_wheels.find_python(here) == str(tmp_path / f"python{here}")


@pytest.mark.slow
def test_a_wheel_for_old_systems(tmp_path: Path, new_venv: Callable[[], Venv]) -> None:
    """Made, repaired, looked at, installed into an empty environment and asked."""
    if sys.platform != "linux" or importlib.util.find_spec("ziglang") is None:
        pytest.skip("make wheels installs ziglang and auditwheel, for Linux")
    sources = copy_sources(tmp_path / "sources")
    here = "{}.{}".format(*sys.version_info[:2])
    script = [sys.executable, sources / "build_wheels.py", "--output", tmp_path]
    said = run(*script, "--pythons", here, cwd=sources, env=environment())  # FASTPROJ_CUDA=0
    assert "no CUDA: left out on request" in said
    (made,) = tmp_path.glob("*.whl")
    assert "manylinux_2_17" in made.name
    venv = new_venv()
    venv.install("-q", made)
    answers = venv.run(ROOT / "tests" / "packaging" / "known_answers.py", "cpu")
    assert re.search(r"\d passed, 0 failed", answers)
    folder = venv.run("-c", "import fastproj; print(fastproj.__path__[0])")
    assert folder.startswith(str(tmp_path))
    assert f"of {folder}\n" in answers


@pytest.mark.slow
def test_the_sdist_builds_without_network_beyond_what_it_declares(
    built: Built, tmp_path: Path
) -> None:
    text = (built.tree / "pyproject.toml").read_text()
    declared = re.search(r"^requires = (\[.*\])$", text, re.MULTILINE)
    assert declared
    pip = [sys.executable, "-m", "pip"]
    found = tmp_path / "found"
    run(*pip, "download", "-q", "-d", found, *json.loads(declared[1]), cwd=tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(found), "PIP_CONFIG_FILE": os.devnull}
    env = environment(FASTPROJ_CPU="1", PIP_EXTRA_INDEX_URL="", **offline)
    if shutil.which("unshare") and not subprocess.call(["unshare", "-rn", "true"]):
        pip = ["unshare", "-rn", *pip]  # no network at all
    run(*pip, "wheel", "-q", "--no-deps", "-w", tmp_path, built.sdist, cwd=tmp_path, env=env)
    assert list(tmp_path.glob("torch_fastproj-*.whl"))
