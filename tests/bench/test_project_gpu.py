"""The GPU benchmark where there is no GPU: cases, checks, tables, targets, and what it writes.

``gpu_stand_in`` runs all of it on the CPU: events are clocks, and both backends are `cpu`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastproj
from bench import project, project_gpu, record, targets_gpu, timing
from bench.providers import Case, Inputs, others_gpu, ours_gpu
from bench.timing import Row
from fastproj.backends import registry
from tests import ROOT


class Event:
    """torch.cuda.Event by the clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, stop: Event) -> float:
        return 1e3 * (stop.at - self.at) + 1e-6


@pytest.fixture
def gpu_stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that seems to have an H100; returns where results go."""
    device = types.SimpleNamespace(
        name="Stand-in", multi_processor_count=132, total_memory=80 << 30
    )
    stand_ins = {
        "is_available": lambda: True,
        "Event": Event,
        "mem_get_info": lambda: (64 << 20, 80 << 30),
        "empty_cache": lambda: None,
        "current_device": lambda: 0,
        "get_device_name": lambda index=0: device.name,
        "get_device_properties": lambda index=0: device,
        "get_device_capability": lambda index=0: (9, 0),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)

    class Timer(timing.GpuTimer):
        def __init__(self) -> None:
            self.room = torch.empty(1024)

    def project(grads: torch.Tensor, **options: Any) -> torch.Tensor:
        return fastproj.project(grads, **{**options, "backend": "cpu"})

    monkeypatch.setattr(timing, "GpuTimer", Timer)
    monkeypatch.setattr(project_gpu, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(project_gpu, "memory_targets", list)
    monkeypatch.setattr(project_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(registry, "unavailable", lambda name: None)
    monkeypatch.setattr(ours_gpu, "fastproj", types.SimpleNamespace(project=project))
    monkeypatch.setattr(ours_gpu, "PROBE_ROWS", 64)
    return tmp_path


SMALL = "--device cuda --rows 3000 --cols 512 --batch 8 --repeats 2 --square 256".split()


def bench(*words: str) -> int:
    return project.main([*SMALL, *words])


def test_all_of_it_runs_checks_and_writes(
    gpu_stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--dtype", "float32", "bfloat16", "--kind", "rademacher", "gaussian") == 0
    out = capsys.readouterr().out
    (path,) = gpu_stand_in.glob("*-project-gpu.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".txt").read_text().strip() in out
    assert content["gpu"]["arch"] == "sm_90"
    assert content["gpu"]["name"] == "Stand-in"
    assert content["copy_bytes_per_second"] == 3e12
    rows = content["rows"]
    assert not any(row["wrong"] for row in rows)
    timed = {row["provider"] for row in rows if row["seconds"]}
    assert timed == {
        "torch peak bf16",
        "torch peak tf32",
        "torch.matmul stored R bf16",
        "torch.matmul stored R tf32",
        "torch.matmul R in blocks",
        *(f"fastproj {b} {p}" for b in ("cuda", "triton") for p in ("highest", "high", "medium")),
    }
    for row in rows:
        if row["seconds"]:
            assert len(row["seconds"]) == 2
            assert row["error"] is not None
        else:
            assert row["note"]
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes["fast_jl"].startswith("not importable")
    assert {target["verdict"] for target in content["targets"]} == {"N-A"}  # P is too small
    assert "cuda against stored R, B = 64" in out


def test_the_cache_is_emptied_by_reading(gpu_stand_in: Path) -> None:
    """What is written to empty it, the timed call would have to write back."""
    timer = timing.GpuTimer()
    timer.room.fill_(1.0)
    assert timer(lambda: None) > 0
    assert (timer.room == 1.0).all()


def test_a_wrong_result_is_not_timed_and_fails(
    gpu_stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(grads: torch.Tensor, **options: Any) -> torch.Tensor:
        return fastproj.project(grads, **{**options, "backend": "cpu"}) * 1.001

    monkeypatch.setattr(ours_gpu, "fastproj", types.SimpleNamespace(project=wrong))
    assert bench("--provider", "fastproj cuda highest", "--no-write") == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_result_that_is_not_finite_fails_and_the_others_are_written(
    gpu_stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An infinite error, which JSON has no number for, must not end the run."""

    def infinite(grads: torch.Tensor, **options: Any) -> torch.Tensor:
        result = fastproj.project(grads, **{**options, "backend": "cpu"})
        return result.fill_(torch.inf) if options["backend"] == "cuda" else result

    monkeypatch.setattr(ours_gpu, "fastproj", types.SimpleNamespace(project=infinite))
    assert bench("--provider", "cuda highest", "triton highest") == 1
    assert "WRONG: error inf" in capsys.readouterr().out
    (path,) = gpu_stand_in.glob("*.json")
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["fastproj cuda highest"]["error"], rows["fastproj cuda highest"]["wrong"]) == (
        None,
        True,
    )
    assert len(rows["fastproj triton highest"]["seconds"]) == 2


class TritonError(Exception):
    """As Triton's errors are: of a kernel that doesn't compile, or needs more shared memory."""


FAILURES = [RuntimeError, TritonError]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_kernel_that_fails_in_the_last_targets_keeps_the_others(
    gpu_stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: type[Exception],
) -> None:
    def fails() -> list[Any]:
        raise failure("launch of project sjlt\n failed")

    monkeypatch.setattr(project_gpu, "memory_targets", fails)
    assert bench("--provider", "cuda highest") == 1
    out = capsys.readouterr().out
    assert "STOPPED at the targets of memory: launch of project sjlt failed" in out
    assert "cuda against stored R, B = 64" in out
    (path,) = gpu_stand_in.glob("*.json")
    content = json.loads(path.read_text())
    assert content["stopped"].startswith("the targets of memory")
    assert content["targets"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_kernel_that_fails_costs_its_own_row_only(
    gpu_stand_in: Path, monkeypatch: pytest.MonkeyPatch, failure: type[Exception]
) -> None:
    def failing(grads: torch.Tensor, **options: Any) -> torch.Tensor:
        if options["backend"] == "cuda":
            raise failure("launch of project sm90\n failed")
        if options["precision"] == "high":
            raise torch.cuda.OutOfMemoryError("no room")
        return fastproj.project(grads, **{**options, "backend": "cpu"})

    monkeypatch.setattr(ours_gpu, "fastproj", types.SimpleNamespace(project=failing))
    assert bench("--dtype", "float32") == 1
    (path,) = gpu_stand_in.glob("*.json")
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["fastproj cuda highest"]["note"] == "FAILED: launch of project sm90 failed"
    assert rows["fastproj cuda highest"]["wrong"]
    assert rows["fastproj triton high"]["note"] == "skipped: its memory does not fit"
    assert len(rows["fastproj triton highest"]["seconds"]) == 2


def test_a_dead_gpu_ends_the_run_and_keeps_what_there_is(
    gpu_stand_in: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = project_gpu.time_case

    def dies(case: Any, *rest: Any) -> Any:
        if case.batch == 2:
            raise RuntimeError("an illegal memory access was encountered")
        return real(case, *rest)

    monkeypatch.setattr(project_gpu, "time_case", dies)
    assert bench("--batch", "1", "2", "3", "--provider", "blocks") == 1
    assert "STOPPED at rademacher bfloat16 B=2 P=3000 K=512: an ill" in capsys.readouterr().out
    (path,) = gpu_stand_in.glob("*.json")
    content = json.loads(path.read_text())
    assert [row["batch"] for row in content["rows"]] == [1]
    assert "illegal memory access" in content["stopped"]


@pytest.mark.parametrize("place", ["time_case", "memory_targets"])
def test_an_interrupted_run_lists_the_targets_that_it_has(
    gpu_stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    """So ends a step of `make gpu` whose time is up."""
    real, calls = getattr(project_gpu, place), []

    def interrupted(*facts: Any) -> Any:
        calls.append(facts)
        if place == "memory_targets" or len(calls) == 2:
            raise KeyboardInterrupt
        return real(*facts)

    monkeypatch.setattr(project_gpu, place, interrupted)
    assert bench("--batch", "1", "2", "--provider", "blocks") == 1
    out = capsys.readouterr().out
    where = r"(rademacher \S+ B=2 .*|the targets of memory)"
    assert re.search(rf"STOPPED at {where}: KeyboardInterrupt", out)
    assert "cuda against stored R, B = 64" in out
    (path,) = gpu_stand_in.glob("*.json")
    content = json.loads(path.read_text())
    assert content["rows"]
    assert content["targets"]
    assert content["stopped"].endswith("KeyboardInterrupt")


def test_the_sparse_kind_names_every_peer_and_what_is_missing(
    gpu_stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--kind", "sjlt", "--dtype", "bfloat16", "float32", "--block", "64") == 0
    out = capsys.readouterr().out
    assert "sjlt, block 64 (8 a row), bfloat16, B = 8, K = 512" in out
    assert "fastproj triton highest: nanoseconds an entry of G" in out
    (path,) = gpu_stand_in.glob("*-project-gpu.json")
    rows = {(r["provider"], r["dtype"]): r for r in json.loads(path.read_text())["rows"]}
    assert not any(row["wrong"] for row in rows.values())
    timed = {name for (name, dtype), row in rows.items() if row["seconds"] and dtype == "float32"}
    assert timed == {
        "read G",
        "copy G",
        "fastproj cuda highest",
        "fastproj triton highest",
        "fastproj cuda highest rademacher",
        "torch.sparse CSR (cuSPARSE)",
    }
    for missing in ("sjlt", "fast_hadamard_transform"):
        assert rows[missing, "float32"]["note"].startswith("not importable")


def test_the_ladder_names_each_family(
    gpu_stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--ladder", "--provider", "fastproj", "--no-write") == 0
    out = capsys.readouterr().out
    for variant in ("simple", "sm80", "sm90"):
        assert f"fastproj cuda {variant} highest" in out


def test_the_budget_is_kept_and_what_it_cost_is_said(
    gpu_stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--batch", "1", "2", "--budget", "0", "--no-write") == 0
    assert "not run, --budget 0 s was used up: rademacher bfloat16 B=1" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench() == 2
    assert "finds no GPU" in capsys.readouterr().out


# ---- cases -------------------------------------------------------------------------------------


def shapes(*words: str) -> list[Any]:
    return project_gpu.shapes_of(project.build_parser().parse_args(["--device", "cuda", *words]))


def test_cases() -> None:
    quick = shapes("--quick")
    assert len(quick) == 11 + 12
    assert shapes("--acceptance") == quick
    everything = shapes()
    assert everything[: len(quick)] == quick
    assert len(everything) == len(set(everything)) == 6 * (8 + 4 + 2) + 12
    assert len(shapes("--full")) == 3 * 3 * 8 * 3 * 5
    assert len(shapes("--full", "--dtype", "float32", "--batch", "8", "64")) == 3 * 2 * 3 * 5
    (one,) = shapes("--batch", "3")
    assert str(one) == "rademacher bfloat16 B=3 P=10000000 K=4096"
    assert len(shapes("--ladder")) == 1
    sparse = shapes("--kind", "sjlt")
    assert set(sparse) <= set(quick)
    assert {shape.cols for shape in sparse} == {1024, 4096, 16384, 65536}
    assert {shape.batch for shape in sparse} == {1, 8, 64}
    assert {(shape.dtype, shape.cols // shape.block) for shape in sparse} == {
        ("bfloat16", 4),
        ("float32", 4),
    }
    blocks = shapes("--kind", "sjlt", "--block", "512", "1024", "--cols", "2048")
    assert [shape.block for shape in blocks] == [512, 1024]


def test_gradients_that_do_not_fit_lose_rows_and_say_so() -> None:
    shape = project_gpu.Shape("rademacher", "bfloat16", 512, 10**8, 4096)
    rows, reason = project_gpu.fitting_rows(shape, 80 * 2**30)
    assert rows % 512 == 0
    assert rows * 512 * 2 <= 0.4 * 80 * 2**30
    assert reason == "fewer rows: G [B, P] would take 95.4 GiB"
    assert project_gpu.fitting_rows(
        project_gpu.Shape("gaussian", "float32", 8, 10**6, 512), 80 * 2**30
    ) == (
        10**6,
        "",
    )


# ---- other packages ----------------------------------------------------------------------------


def prepared(
    prepare: Any, dtype: torch.dtype = torch.float32, kind: str = "rademacher", **other: int
) -> Any:
    sizes = {"batch": 8, "rows": 2000, "cols": 512, **other}
    case = Case(kind=kind, dtype=dtype, stored_bytes=1, trak_rows=0, max_seconds=1, **sizes)
    return prepare(case, Inputs(case))


def test_fast_jl_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(grads: torch.Tensor, proj_dim: int, seed: int, num_sms: int) -> torch.Tensor:
        calls.append((grads.dtype, num_sms))
        return fastproj.project(grads, proj_dim, scale=None, seed=seed)

    fake = types.ModuleType("fast_jl")
    for tile in (8, 16, 32):
        setattr(fake, f"project_rademacher_{tile}", kernel)
    monkeypatch.setitem(sys.modules, "fast_jl", fake)
    device = types.SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    ready = prepared(others_gpu.prepare_fast_jl, torch.bfloat16)
    assert ready.error(ready.call()) <= ready.bound
    assert ready.error(ready.call() * 2) > ready.bound
    assert calls[0] == (torch.float16, 108)
    assert "float16" in ready.note
    assert "multiples of 512" in prepared(others_gpu.prepare_fast_jl, cols=500)
    assert "multiples of 8" in prepared(others_gpu.prepare_fast_jl, batch=9)
    assert "dense" in prepared(others_gpu.prepare_fast_jl, kind="sjlt", block=64)


def test_sjlt_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class SJLTProjection:
        def __init__(self, original_dim: int, proj_dim: int, c: int) -> None:
            assert c in (1, 8)
            made.append(c)
            generator = torch.Generator().manual_seed(0)
            self.columns = torch.randint(proj_dim, (original_dim,), generator=generator)
            self.signs = torch.randint(2, (original_dim,), generator=generator) * 2.0 - 1
            self.proj_dim = proj_dim

        def __call__(self, grads: torch.Tensor) -> torch.Tensor:
            out = grads.new_zeros((grads.shape[0], self.proj_dim))
            return out.index_add_(1, self.columns, grads * self.signs)

    fake = types.ModuleType("sjlt")
    fake.SJLTProjection = SJLTProjection  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sjlt", fake)
    ready = prepared(others_gpu.prepare_sjlt)
    assert ready.error(ready.call()) <= ready.bound
    prepared(others_gpu.prepare_sjlt, kind="sjlt", block=64)
    assert made == [1, 8]  # entries a row


def test_hadamard_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def transform(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-1]
        step = 1
        while step < n:
            pairs = x.reshape(*x.shape[:-1], n // (2 * step), 2, step)
            a, b = pairs.unbind(-2)
            x = torch.stack([a + b, a - b], -2).reshape(x.shape)
            step *= 2
        return x

    fake = types.ModuleType("fast_hadamard_transform")
    fake.hadamard_transform = transform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fast_hadamard_transform", fake)
    monkeypatch.setattr(others_gpu, "HADAMARD_ROWS", 1024)
    ready = prepared(others_gpu.prepare_hadamard, kind="sjlt", block=128, batch=64)
    assert ready.rows == 1024
    assert ready.error(ready.call()) <= ready.bound
    assert ready.error(2 * ready.call()) > ready.bound
    assert "K <= 1024 <= P" in prepared(
        others_gpu.prepare_hadamard, kind="sjlt", cols=2048, block=512
    )


# ---- targets -----------------------------------------------------------------------------------


def row(provider: str, rate: float, batch: int, **other: Any) -> Any:
    facts = {"kind": "rademacher", "dtype": "bfloat16", "cols": 4096, "case_rows": 10**7, **other}
    return Row(provider, batch=batch, rows=10**6, flops=1e9 * rate, seconds=[1.0], **facts)


def verdicts(rows: list[Any], arch: str = "sm_90") -> dict[str, tuple[float | None, str]]:
    return {t.what: (t.figure, t.verdict) for t in targets_gpu.rate_targets(rows, arch)}


def test_targets_from_rates() -> None:
    rows = [
        row("fastproj cuda highest", 300.0, 16),
        row("torch.matmul stored R bf16", 100.0, 16),
        row("fast_jl", 16.0, 16),
        row("fastproj triton highest", 179.0, 16),
        row("torch.matmul R in blocks", 5.0, 16),
        row("fastproj cuda highest", 700.0, 64),
        row("torch.matmul stored R bf16", 701.0, 64),
        row("torch peak bf16", 900.0, 64),
        row("fastproj cuda highest", 200.0, 64, dtype="float32", error=1e-7),
        row("fastproj cuda high", 320.0, 64, dtype="float32", error=1e-5),
        row("torch.matmul stored R tf32", 250.0, 64, dtype="float32", error=3e-4),
        row("fastproj cuda highest", 240.0, 64, kind="gaussian"),
    ]
    found = verdicts(rows)
    assert found["cuda against stored R, B = 16"] == (3.0, "PASS")
    assert found["cuda against fast_jl, B = 16"] == (18.75, "FAIL")
    assert found["cuda against stored R, B = 8"] == (None, "N-A")
    assert found["cuda against stored R, B = 64"][1] == "FAIL"
    assert found["cuda against the bf16 peak, B = 64"][1] == "PASS"
    assert found["cuda float32 highest against bf16, B = 64"][1] == "FAIL"
    assert found["cuda float32 high against bf16, B = 64"][1] == "PASS"
    assert found["cuda float32 highest against a TF32 matmul, B = 64"][1] == "FAIL"
    assert found["cuda float32 high, error over that of TF32, B = 64"][1] == "PASS"
    assert found["cuda Gaussian against Rademacher, B = 64"][1] == "PASS"
    assert found["triton rademacher bfloat16 against cuda, B = 16"][1] == "FAIL"
    assert found["triton rademacher bfloat16 against R in blocks, B = 16"][1] == "PASS"


def test_targets_judge_nothing_elsewhere_or_on_small_problems() -> None:
    rows = [row("fastproj cuda highest", 1.0, 16), row("torch.matmul stored R bf16", 100.0, 16)]
    assert verdicts(rows)["cuda against stored R, B = 16"] == (0.01, "FAIL")
    assert verdicts(rows, "sm_80")["cuda against stored R, B = 16"] == (0.01, "N-A")
    small = [row(r.provider, 1.0, 16, case_rows=10**6) for r in rows]
    assert verdicts(small)["cuda against stored R, B = 16"] == (None, "N-A")
    other = [row("fastproj cuda highest", 10.0, 16), row("fastproj triton highest", 8.5, 16)]
    what = "triton rademacher bfloat16 against cuda, B = 16"
    assert verdicts(other)[what] == (0.85, "PASS")
    assert verdicts(other, "sm_80")[what] == (0.85, "FAIL")


def test_sparse_targets_against_copy_and_peers() -> None:
    facts = {"kind": "sjlt", "block": 1024, "moved_bytes": 0.0}
    rows = [
        row("copy G", 0.0, 8, **{**facts, "moved_bytes": 3e12}),
        row("fastproj cuda highest", 0.0, 8, **{**facts, "moved_bytes": 2.4e12}),
        row("fastproj triton highest", 0.0, 8, **{**facts, "moved_bytes": 2.3e12}),
        row("sjlt", 0.0, 8, **facts),
    ]
    rows[-1].seconds = [0.5]
    found = {t.what: (t.figure, t.verdict) for t in targets_gpu.sparse_targets(rows, "sm_90")}
    where = "bfloat16, B = 8, K = 4096, block 1024"
    assert found == {
        f"cuda sjlt, share of copy bandwidth, {where}": (0.8, "PASS"),
        f"cuda sjlt against sjlt, {where}": (0.5, "FAIL"),
        f"triton sjlt, share of copy bandwidth, {where}": (2.3e12 / 3e12, "FAIL"),
    }
    elsewhere = targets_gpu.sparse_targets(rows, "sm_80")
    assert {target.verdict for target in elsewhere} == {"N-A"}


# ---- the table of measurements -------------------------------------------------------------------


@pytest.mark.slow
def test_a_result_becomes_the_table_that_backends_are_chosen_by(gpu_stand_in: Path) -> None:
    from fastproj.backends import measured

    assert bench("--dtype", "float32", "bfloat16") == 0
    (result,) = gpu_stand_in.glob("*.json")
    table = gpu_stand_in / "measured.json"
    table.write_text(measured.TABLE.read_text())
    command = [sys.executable, "-m", "bench.measured_table", "--table", table]
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    done = run([*command, result])
    assert done.returncode == 0, done.stderr
    content = json.loads(table.read_text())
    assert content["architectures"]["sm_90"]["source"] == result.name
    rows = measured.parse(content)["sm_90"]
    assert {(m.dtype, m.terms, m.batch, m.cols) for m in rows} == {
        ("float32", 1, 8, 512),
        ("float32", 2, 8, 512),
        ("float32", 3, 8, 512),
        ("bfloat16", 1, 8, 512),
    }
    assert all({name for name, _ in m.rates} == {"cuda", "triton"} for m in rows)
    empty = gpu_stand_in / "empty.json"
    empty.write_text('{"rows": []}')
    done = run([*command, empty])
    assert done.returncode == 1
    assert "no shape on which cuda and triton were both timed" in done.stderr
