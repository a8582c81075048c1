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
        "cuda": {"built": cuda, "reason": "" if cuda else "no nvcc was found"},
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
    script = [sys.executable, sources / "build_wheels.py", "--no-cuda", "--output", tmp_path]
    said = run(*script, "--pythons", here, "3.1", cwd=sources, env=environment())
    assert "no wheel for Python 3.1:" in said
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
