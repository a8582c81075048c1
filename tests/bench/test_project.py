"""The benchmark: it runs, checks before it times, and writes where its numbers come from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastproj
from bench import project, project_sparse, record
from bench.providers import Case, Inputs, Prepared, Provider, memory, ours, sparse_stored, stored
from bench.targets import Target
from bench.timing import Row, time_case
from tests import ROOT

SMALL = (
    "--rows 2000 --cols 96 --batch 3 --repeats 1 --trak-rows 500 --square 256 --no-write".split()
)


def test_every_provider_runs_and_is_right() -> None:
    command = [sys.executable, "-m", "bench.project", *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    for name in ("torch peak bf16", "stored R fp32", "fastproj highest portable"):
        assert name in done.stdout
    assert done.stdout.count("TRAK BasicProjector") == 2  # one for each dense kind
    assert "\nsjlt, block 24" not in done.stdout  # a power of two at or below K / 4
    assert "\nsjlt, block 16 (6 a row), float32, B = 3, K = 96" in done.stdout
    for name in ("read G", "copy G", "torch.sparse CSR", "scipy.sparse CSR"):
        assert done.stdout.count(name) == 1
    assert done.stdout.count("fastproj highest portable") >= 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--block", "64"], "received block=64 for kind='rademacher'"),
        (["--kind", "sjlt", "--block", "48"], "received block=48; expected a power of two"),
    ],
)
def test_a_block_that_is_none_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        project.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_sparse_cases_are_four_entries_a_row_over_b_and_k() -> None:
    parse = project.build_parser().parse_args
    shapes = project_sparse.shapes_of(parse(["--kind", "sjlt"]))
    assert len(shapes) == len(set(shapes)) == 2 * (3 + 4 - 1)
    assert {s.cols // s.block for s in shapes} == {4}
    assert {s.cols for s in shapes} == {1024, 4096, 16384, 65536}
    assert {s.batch for s in shapes} == {1, 8, 32}
    assert {s.batch * s.rows for s in shapes} == {1 << 25}
    named = ["--cols", "1024", "--block", "64", "256", "--rows", "99"]
    assert project_sparse.shapes_of(parse(named)) == [
        project_sparse.SparseShape("float32", 8, 99, 1024, 64),
        project_sparse.SparseShape("float32", 8, 99, 1024, 256),
    ]


def test_blocks_have_their_own_exact_results() -> None:
    for block in (16, 64):
        case = Case(3, 1500, 64, "sjlt", torch.float32, 2**20, 500, 5.0, block=block)
        inputs = Inputs(case)
        matrix = fastproj.matrix(1500, 64, kind="sjlt", block=block).double()
        exact = inputs.grads(1500).double() @ matrix
        result = torch.cat([exact[:, columns] for columns in inputs.check_columns()], dim=1)
        torch.testing.assert_close(inputs.exact(1500), result)
        assert case.flops(10) == 3 * 10 * 64 / block
        assert case.read_bytes(10) == 3 * 10 * 4


@pytest.mark.parametrize("prepare", [sparse_stored.prepare_torch, sparse_stored.prepare_scipy])
def test_stored_sparse_matrices_are_ours(prepare: Any) -> None:
    for rows, room in ((999, 2**20), (100_000, 12 * 4 * 5000)):
        case = Case(3, rows, 64, "sjlt", torch.float32, room, 500, 5.0, block=16)
        prepared = prepare(case, Inputs(case))
        assert prepared.rows == min(rows, 5000)
        assert prepared.error(prepared.call()) <= prepared.bound
        assert prepared.error(-prepared.call()) > prepared.bound


@pytest.mark.parametrize("arithmetic", ["fp32", "bf16"])
def test_products_of_torch_are_as_large_as_a_call_may_take(arithmetic: str) -> None:
    case = Case(3, 2000, 64, "rademacher", torch.float32, 2**30, 500, 1e9, square=1024)
    inputs = Inputs(case)
    for prepare, whole, least in (
        (stored.prepare_peak, 1024, 512),
        (stored.prepare_stored, 2000, 1),
    ):
        prepared = prepare(case, inputs, arithmetic=arithmetic)
        assert isinstance(prepared, Prepared)
        assert prepared.rows == whole
        assert "may take" not in prepared.note
        hurried = prepare(replace(case, max_seconds=1e-12), inputs, arithmetic=arithmetic)
        assert isinstance(hurried, Prepared)
        assert hurried.rows == least
        assert "a call may take 1e-12 s" in hurried.note
        for one in (prepared, hurried):
            assert one.error(one.call()) <= one.bound


def test_the_growth_with_k_is_shown_of_what_was_timed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kind", "sjlt", "--batch", "1", "--rows", "99", "--cols", "64", "--no-write"]
    for provider, shown in (("scipy", False), ("highest", True)):
        assert project.main([*words, "--provider", provider]) == 0
        assert ("nanoseconds an entry" in capsys.readouterr().out) == shown


def test_a_call_has_a_row_however_little_it_may_take() -> None:
    case = Case(3, 999, 64, "sjlt", torch.float32, 2**20, 500, 1e-12, block=16)
    (row, *_) = time_case(case, ours.providers(("highest",)), 1)
    assert (row.rows, row.wrong) == (1, False)


def test_reading_counts_once_and_copying_twice() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        case = Case(3, 1001, 64, "sjlt", dtype, 2**20, 500, 5.0, block=16)
        read, copy = time_case(case, memory.providers(), 1)
        assert not read.wrong, read.note
        assert not copy.wrong, copy.note
        assert copy.moved_bytes == 2 * 3003 * dtype.itemsize
        assert 3002 * dtype.itemsize <= read.moved_bytes <= 3003 * dtype.itemsize


def sparse_row(provider: str, batch: int, seconds: float, **other: Any) -> Row:
    facts = {"cols": 4096, "block": 1024, "rows": (1 << 25) // batch, **other}
    moved = 4.0 * (1 << 25)
    return Row(provider, "sjlt", batch, seconds=[seconds], moved_bytes=moved, **facts)


def test_sparse_targets() -> None:
    ours, dense = "fastproj highest avx512", "fastproj highest avx512 rademacher"
    rows = [sparse_row("read G", batch, 0.6) for batch in (1, 8, 32)]
    rows += [sparse_row(ours, 1, 2.0), sparse_row(ours, 8, 1.0), sparse_row(ours, 32, 0.9)]
    rows += [sparse_row(dense, 32, 36.0)]
    for cols, seconds in ((1024, 1.0), (16384, 1.2), (65536, 1.6)):
        rows.append(sparse_row(ours, 8, seconds, cols=cols, block=cols // 4))
    targets = project_sparse.sparse_targets(rows, ["portable", "avx2", "avx512"])
    assert [t.verdict for t in targets] == ["FAIL", "PASS", "PASS", "PASS", "FAIL"]
    assert [t.figure for t in targets] == pytest.approx([0.3, 0.6, 0.6 / 0.9, 40.0, 1.6])
    other_block = [sparse_row("read G", 8, 0.6), sparse_row(ours, 8, 1.0, block=512)]
    assert project_sparse.sparse_targets(other_block, ["avx512"])[1].figure is None
    assert {t.verdict for t in project_sparse.sparse_targets([], ["avx2"])} == {"N-A"}
    table = project_sparse.sparse_table_of([rows[1], rows[4]])
    assert "0.60" in table
    growth = project_sparse.growth_table_of(rows, ours)
    assert growth.count("4 a row") == 6


def test_an_unknown_provider_is_named() -> None:
    command = [sys.executable, "-m", "bench.project", "--provider", "nobody"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "nobody" in done.stderr


def test_a_wrong_result_has_no_time() -> None:
    case = Case(3, 1500, 64, "gaussian", torch.float32, 2**20, 500, 5.0)
    prepare = partial(ours.prepare, precision="highest", isa="portable")

    def spoiled(case: Case, inputs: object) -> object:
        prepared = prepare(case, inputs)
        return replace(prepared, call=lambda: prepared.call() + 0.01)

    good, bad = time_case(case, [Provider("good", prepare), Provider("bad", spoiled)], 2)
    assert len(good.seconds) == 2
    assert good.rate > 0
    assert not good.wrong
    assert bad.wrong
    assert bad.seconds == []
    assert bad.rate == 0


def test_a_result_of_nan_has_no_time() -> None:
    case = Case(1, 600, 8, "rademacher", torch.float32, 2**20, 500, 5.0)
    prepare = partial(ours.prepare, precision="highest", isa="portable")

    def spoiled(case: Case, inputs: object) -> object:
        prepared = prepare(case, inputs)
        return replace(prepared, call=lambda: prepared.call() * math.nan)

    (row,) = time_case(case, [Provider("nan", spoiled)], 1)
    assert row.wrong


def test_result_files_say_where_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    path = record.write_result("check", {"rows": []})
    content = json.loads(path.read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["cores"] >= 1
    assert set(content) >= {"commit", "time", "built", "rows"}


def test_another_run_keeps_the_results_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    first = record.write_result("check", {"rows": [1]}, "one")
    assert record.write_result("check", {"rows": [2]}, "two") == first
    record.path_of.cache_clear()  # as another process would begin
    second = record.write_result("check", {"rows": [3]}, "three")
    assert [json.loads(path.read_text())["rows"] for path in (first, second)] == [[2], [3]]
    assert [path.with_suffix(".txt").read_text() for path in (first, second)] == [
        "two\n",
        "three\n",
    ]
    assert second.name.endswith("-2-check.json")


def test_targets_judge_in_the_right_direction() -> None:
    assert Target("rate", 3.0, 3.0, at_least=True).verdict == "PASS"
    assert Target("rate", 2.9, 3.0, at_least=True).verdict == "FAIL"
    assert Target("error", 1e-6, 1e-6, at_least=False).verdict == "FAIL"
    assert Target("error", 9e-7, 1e-6, at_least=False).verdict == "PASS"
    assert Target("rate", 9.0, 3.0, at_least=True, judged=False).verdict == "N-A"
    assert Target("rate", None, 3.0, at_least=True).verdict == "N-A"


def test_a_copy_without_its_repository_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("FASTPROJ_COMMIT", "0123abc")
    assert record.commit() == "0123abc"
    monkeypatch.delenv("FASTPROJ_COMMIT")
    assert record.commit() == ""
