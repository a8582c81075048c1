"""bench/preflight.py: its logic with stand-ins, its micro-kernel as compiled, and on a GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402
import build_machine_code  # noqa: E402
import fastproj  # noqa: E402
from bench import preflight  # noqa: E402
from fastproj.backends import cuda  # noqa: E402

H100 = {"name": "Stand-in", "arch": "90", "multiprocessors": 132, "sm90a": True, "problem": ""}


class FakeModule(types.SimpleNamespace):
    """fastproj._cuda on a machine with one H100, or what a test makes of it."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**{"toolkit": "13.0", "problem": "", "gpus": [dict(H100)], **facts})

    def build(self) -> dict[str, str]:
        return {"toolkit": self.toolkit, "architectures": "90"}

    def count(self) -> tuple[int, str]:
        return len(self.gpus), self.problem

    def gpu(self, index: int) -> dict[str, Any]:
        return self.gpus[index]


class Event:
    """torch.cuda.Event: every call takes a millisecond."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: Event) -> float:
        return 1.0


class Stream:
    """torch.cuda.Stream and what is entered with it."""

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeModule:
    """A machine that seems to have an H100 with driver r580; the CPU computes."""
    module = FakeModule()
    monkeypatch.setattr(cuda, "_module", lambda: module)
    monkeypatch.setattr(cuda, "not_built", lambda: None)
    monkeypatch.delenv(cuda.VARIANT_VARIABLE, raising=False)
    monkeypatch.setattr(preflight, "DEVICE", "cpu")
    monkeypatch.setattr(preflight, "driver_version", lambda: (580, 65, 6))
    monkeypatch.setattr(preflight, "launched", lambda call: ["project_rademacher_sm90_kernel"])
    stand_ins: dict[str, Any] = {
        "get_device_capability": lambda index=0: (9, 0),
        "get_device_name": lambda index=0: "Stand-in",
        "current_device": lambda: 0,
        "current_stream": lambda: None,
        "device_count": lambda: 1,
        "synchronize": lambda index=0: None,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "_sleep": lambda clocks: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def project(grads: torch.Tensor, cols: int, **options: Any) -> torch.Tensor:
        return fastproj.project(grads, cols, scale=None, backend="cpu", **options)

    monkeypatch.setattr(preflight, "project", project)
    return module


# ---- the driver ----------------------------------------------------------------------------------

TOO_OLD = "the driver is for an older CUDA than this module"


@pytest.mark.parametrize(
    ("installed", "toolkit", "fix"),
    [
        ((580, 65, 6), "13.0", None),
        ((590, 1), "13.1", None),
        ((575, 57, 8), "12.9", None),
        (None, "13.0", None),  # unknown, and the module finds a GPU
        ((575, 57, 8), "13.0", "r580 or newer, or install a CUDA 12 toolkit (12.4 or newer), which "
         "r575.57.8 takes"),
        ((470, 1), "12.8", "install driver r525 or newer"),
        ((580, 65, 6), "14.0", None),
        ((570, 1), "14.0", "install driver r580 or newer, or install a CUDA 12"),
        ((550, 54), "13.0", None),  # with the package for forward compatibility
    ],
)  # fmt: skip
def test_the_driver_against_the_toolkit(
    machine: FakeModule,
    monkeypatch: pytest.MonkeyPatch,
    installed: tuple[int, ...] | None,
    toolkit: str,
    fix: str | None,
) -> None:
    monkeypatch.setattr(preflight, "driver_version", lambda: installed)
    monkeypatch.setattr(preflight, "toolkits", list)
    machine.toolkit = toolkit
    machine.problem = TOO_OLD if fix else ""
    line = preflight.driver()
    assert line.verdict == (preflight.OK if fix is None else preflight.FAIL), line
    assert (fix or "") in line.do
    assert f"CUDA {toolkit}" in line.found


def test_the_fix_names_the_toolkit_that_is_there(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("cuda-12.4", "cuda-12.10", "cuda-13.0", "cuda-x"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch()
    found = preflight.toolkits(tmp_path)
    assert [path.name for path in found] == ["cuda-13.0", "cuda-12.10", "cuda-12.4"]
    monkeypatch.setattr(preflight, "toolkits", lambda: found)
    monkeypatch.setattr(preflight, "driver_version", lambda: (550, 54))
    machine.problem = TOO_OLD
    line = preflight.driver()
    assert f"CUDA_HOME={tmp_path / 'cuda-12.10'} make gpu-build" in line.do


def test_a_driver_that_finds_nothing(machine: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpus, machine.problem = [], "no NVIDIA driver"
    assert "no NVIDIA driver" in preflight.driver().found
    monkeypatch.setattr(cuda, "not_built", lambda: "fastproj._cuda is not built (x)")
    line = preflight.driver()
    assert (line.verdict, line.do[:14]) == (preflight.FAIL, "make gpu-build")


# ---- the kernels ---------------------------------------------------------------------------------


def test_auto_uses_wgmma(machine: FakeModule) -> None:
    line = preflight.kernels()
    assert line.verdict == preflight.OK, line
    assert "auto launches sm90" in line.found


def test_a_silent_fall_to_other_kernels_is_a_failure(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.gpus[0]["sm90a"] = False
    line = preflight.kernels()
    assert line.verdict == preflight.FAIL
    assert "no code for sm_90a runs there" in line.found
    assert "FASTPROJ_CUDA_ARCHS=90a make gpu-build" in str(line)
    machine.gpus[0]["sm90a"] = True
    monkeypatch.setenv(cuda.VARIANT_VARIABLE, "sm80")
    line = preflight.kernels()
    assert (line.verdict, line.do) == (preflight.FAIL, f"unset {cuda.VARIANT_VARIABLE}")
    monkeypatch.delenv(cuda.VARIANT_VARIABLE)
    names = ["project_gaussian_sm80_kernel"]
    monkeypatch.setattr(preflight, "launched", lambda call: names)
    assert "auto launched project_gaussian_sm80_kernel" in preflight.kernels().found
    # On another GPU they are the right ones.
    machine.gpus[0].update(arch="80", sm90a=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    assert preflight.kernels().verdict == preflight.OK
    machine.gpus[0]["problem"] = "built for 90, Stand-in is 80"
    assert "gpu 0: built for 90" in preflight.kernels().found


def test_without_a_profiler_the_module_is_believed(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(call: Any) -> list[str]:
        raise RuntimeError("CUPTI is in use")

    monkeypatch.setattr(preflight, "launched", refuses)
    line = preflight.kernels()
    assert line.verdict == preflight.OK
    assert "the profiler does not run (CUPTI is in use)" in line.found


# ---- correctness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("check", preflight.CORRECTNESS, ids=lambda each: each.__name__)
def test_right_sums_pass_and_wrong_ones_fail(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, check: Any
) -> None:
    line = check()
    if check is preflight.second_device:
        assert line.verdict == preflight.SKIPPED
        return
    assert line.verdict == preflight.OK, line
    right = preflight.project

    def wrong(grads: torch.Tensor, cols: int, **options: Any) -> torch.Tensor:
        result = right(grads, cols, **options)
        with torch.no_grad():
            result.reshape(-1)[-1] += 1  # a single sum
        return result

    monkeypatch.setattr(preflight, "project", wrong)
    line = check()
    assert line.verdict == preflight.FAIL
    assert re.search(r"1 of \d+ sums are wrong, by up to 1", line.found)
    assert "do: " in str(line)


def test_a_call_that_fails_in_another_thread_is_told(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = preflight.project

    def bound_to_one_thread(grads: torch.Tensor, cols: int, **options: Any) -> torch.Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("cuTensorMapEncodeTiled failed with code 201")
        return right(grads, cols, **options)

    monkeypatch.setattr(preflight, "project", bound_to_one_thread)
    line = preflight.threads()
    assert line.verdict == preflight.FAIL
    assert "a new thread: RuntimeError: cuTensorMapEncodeTiled failed with code 201" in line.found
    assert "bind the device's primary context" in line.do


def test_a_second_device_is_used_where_there_is_one(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = preflight.integers
    monkeypatch.setattr(preflight, "integers", lambda b, p, dtype, device: made(b, p, dtype))
    line = preflight.second_device()
    assert line.verdict == preflight.FAIL
    assert "the result is on cpu" in line.found  # not on device 1


def test_gradients_are_such_as_tensor_copies_take() -> None:
    grads = preflight.integers(3, 70, torch.bfloat16, "cpu")
    assert grads.shape == (3, 70)
    assert (grads.stride(0) * 2) % 16 == 0
    assert grads.unique().numel() > 10


@pytest.mark.parametrize("dtype", preflight.DTYPES, ids=str)
def test_gradients_that_no_tensor_copy_takes_are_asked_about(
    machine: FakeModule, dtype: torch.dtype
) -> None:
    aligned, moved = preflight.layouts(3, 70, dtype).values()
    assert aligned.data_ptr() % 16 == 0
    assert moved.shape == aligned.shape
    assert moved.data_ptr() % 16 != 0


# ---- speed ---------------------------------------------------------------------------------------


def figures(scale: float = 1.0, clusters: int = 66) -> dict[str, Any]:
    bare = {str(n): scale * n / 2 for n in (16, 32, 64)}
    made = {str(n): max(n / 2, preflight.MADE_SLOTS) for n in (16, 32, 64)}
    return {"multiprocessors": 132, "clusters": clusters, "bare": bare, "made": made}


def test_what_the_micro_kernel_measures_is_judged(machine: FakeModule, tmp_path: Path) -> None:
    assert preflight.wgmma(figures(1.1)).verdict == preflight.OK
    line = preflight.wgmma(figures(1.3))
    assert line.verdict == preflight.SLOW
    assert line.do.startswith("bare N=16, bare N=32, bare N=64: the bounds in csrc/cuda/README.md")
    assert preflight.clusters(figures()).verdict == preflight.OK
    line = preflight.clusters(figures(clusters=60))
    assert (line.verdict, "plan with 120 blocks" in line.do) == (preflight.SLOW, True)
    program = tmp_path / "rate"
    assert "make gpu-build compiles it" in str(preflight.measured_rates(program))
    program.write_text(f"#!/bin/sh\necho '{json.dumps(figures())}'\n")
    program.chmod(0o755)
    assert preflight.measured_rates(program) == figures()
    program.write_text("#!/bin/sh\necho launch failed: x >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="launch failed: x"):
        preflight.measured_rates(program)


def test_micro_kernel_is_for_one_architecture(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 9))
    found = preflight.measured_rates(tmp_path)
    assert found == "for sm_90 only"
    assert preflight.wgmma(found).verdict == preflight.SKIPPED
    assert preflight.clusters(found).verdict == preflight.SKIPPED


@pytest.mark.skipif(build_cuda.find_nvcc() is None, reason="no nvcc to compile with")
def test_micro_kernel_as_compiled(tmp_path: Path) -> None:
    """The loops hold products with A from registers and the logic that is named, nothing else."""
    program = tmp_path / "wgmma_rate"
    assert preflight.compile_rate(program) is None
    said = program.with_name("wgmma_rate.txt").read_text()
    assert build_machine_code.faults(said) == []
    tool = build_cuda.find_disassembler(build_cuda.find_nvcc())
    if tool is None:
        pytest.skip("no cuobjdump (install triton)")
    command = [tool, "-sass", str(program)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert build_machine_code.hazards(sass) == []
    seen = set()
    for name, instructions in build_machine_code.read_sass(sass).items():
        match = re.search(r"rate_kernelILi(\d+)ELb([01])", name)
        if match is None:
            continue
        code = build_machine_code.Code(instructions)
        bodies = [[code.instructions[i] for i in sorted(body)] for _, body in code.loops]
        (body,) = [body for body in bodies if any(each.base == "HGMMA" for each in body)]
        count = Counter(each.base for each in body)
        products = [each.text for each in body if each.base == "HGMMA"]
        width = int(match[1])
        assert len(products) == 64
        assert all(f"64x{width}x16" in text for text in products)
        assert all(re.search(r"HGMMA\S+ R\d+, R\d+, gdesc", text) for text in products)
        assert sum("DEPBAR" in each.text for each in body) == 16  # one wait for four products
        assert count["LOP3"] == (256 if match[2] == "1" else 0)
        most = 64 * preflight.MADE_SLOTS if match[2] == "1" else 2 * 64
        assert len(body) <= most
        seen.add((width, match[2]))
    assert seen == {(n, made) for n in (16, 32, 64) for made in "01"}


def test_a_missing_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    assert preflight.main(["--build", str(tmp_path / "rate")]) == 1
    assert "install the CUDA toolkit" in capsys.readouterr().err


def test_speeds_are_shown(machine: FakeModule, monkeypatch: pytest.MonkeyPatch) -> None:
    real, deviations = preflight.project, []

    def project(grads: torch.Tensor, cols: int, **options: Any) -> torch.Tensor:
        deviations.append(float(grads.std()))
        return real(grads, cols, **options)

    monkeypatch.setattr(preflight, "project", project)
    assert preflight.bandwidth(1 << 20).found == "0.00 TB/s"
    assert preflight.peak(64).figures == {"flops": 2 * 64**3 / 1e-3}
    line = preflight.first_figures(rows=512, cols=64)
    assert line.found.startswith("TFLOP/s at B = 64, K = 64: bf16 ")
    assert list(line.figures or ()) == ["bf16", "fp32 medium", "fp32 high", "fp32 highest"]
    assert all(0.9 < deviation < 1.1 for deviation in deviations)  # random, as those of the peak


# ---- all of them ---------------------------------------------------------------------------------


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of nothing."""
    for name in ("bandwidth", "peak", "first_figures"):
        line = preflight.Line(name, preflight.OK, "1", "x")
        monkeypatch.setattr(preflight, name, lambda line=line: line)


def test_every_line_is_told_and_written(
    machine: FakeModule,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small(monkeypatch)
    assert preflight.main(["--output", str(tmp_path / "out"), "--rate", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "preflight.json").read_text())
    names = [line["name"] for line in content["lines"]]
    assert names == [
        "driver", "kernels", "values", "kinds", "edges", "threads", "streams", "device 1",
        "clusters", "wgmma", "bandwidth", "peak", "first_figures",
    ]  # fmt: skip
    assert content["device"] == "Stand-in"
    assert (tmp_path / "out" / "preflight.txt").read_text().strip() in printed
    assert printed.count("means: ") == len(names)
    assert printed.rstrip().endswith("preflight: 13 lines, 0 FAIL, 0 SLOW")


def test_what_was_answered_is_there_when_a_kernel_hangs(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hangs() -> preflight.Line:
        raise KeyboardInterrupt  # what a time limit makes of it

    monkeypatch.setattr(preflight, "CORRECTNESS", (preflight.values, hangs))
    with pytest.raises(KeyboardInterrupt):
        preflight.main(["--output", str(tmp_path)])
    content = json.loads((tmp_path / "preflight.json").read_text())
    assert [line["name"] for line in content["lines"]] == ["driver", "kernels", "values"]


def test_after_a_failed_kernel_nothing_is_asked(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small(monkeypatch)

    def fails() -> preflight.Line:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(preflight, "CORRECTNESS", (fails, preflight.streams))
    lines = preflight.run(tmp_path, 30.0, lambda line: None)
    assert [line.verdict for line in lines[2:4]] == [preflight.FAIL, preflight.OK]
    assert "illegal memory access" in lines[2].found

    def dead(index: int = 0) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    lines = preflight.run(tmp_path, 30.0, lambda line: None)
    assert {line.verdict for line in lines[3:]} == {preflight.SKIPPED}
    assert "takes no more calls after what failed in fails" in lines[3].found


def test_a_refusal_is_an_answer(
    machine: FakeModule,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A module without code for this GPU: fastproj refuses the backend by a ValueError."""

    def refuses(grads: torch.Tensor, cols: int, **options: Any) -> torch.Tensor:
        raise ValueError("received backend='cuda', which can't run here: built for 90")

    small(monkeypatch)
    machine.gpus[0]["problem"] = "built for 90, Stand-in is 80"
    monkeypatch.setattr(preflight, "project", refuses)
    monkeypatch.setattr(preflight, "launched", lambda call: call())
    lines = preflight.run(tmp_path, 30.0, lambda line: None)
    assert len(lines) == 13
    found = {line.name: line for line in lines}
    assert found["kernels"].verdict == preflight.FAIL
    assert "gpu 0: built for 90, Stand-in is 80" in found["kernels"].found
    assert "ValueError: received backend='cuda'" in found["values"].found
    assert found["bandwidth"].verdict == preflight.OK


def test_nothing_starts_after_the_budget_or_without_a_driver(
    machine: FakeModule, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = preflight.run(tmp_path, -1.0, lambda line: None)
    assert {line.found for line in lines[1:]} == {"not asked: -1 seconds were used up"}
    machine.problem = "no NVIDIA driver"
    assert preflight.main([]) == 1
    lines = preflight.run(tmp_path, 30.0, lambda line: None)
    assert {line.found for line in lines[1:]} == {"not asked: the driver does not take this module"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_drivers_version_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: said)
    assert preflight.driver_version() == (580, 65, 6)
    monkeypatch.undo()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/bash\necho 550.54.15\n")
    tool.chmod(0o755)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert preflight.driver_version() == (550, 54, 15)
    tool.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.driver_version() is None


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(cuda.unavailable() is not None, reason=f"cuda: {cuda.unavailable()}")
@pytest.mark.parametrize(
    "check",
    [preflight.driver, preflight.kernels, *preflight.CORRECTNESS],
    ids=lambda each: each.__name__,
)
def test_lines_of_correctness(check: Any) -> None:
    line = check()
    assert line.verdict in (preflight.OK, preflight.SKIPPED), str(line)
