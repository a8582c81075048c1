"""The benchmark: it runs, checks before it times, and writes where its numbers come from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import featurize, record
from bench.providers import Case, Provider, ours
from bench.targets import Target
from bench.timing import time_case
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
    assert done.stdout.count("TRAK BasicProjector") == 2  # one for each kind


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


def test_targets_judge_in_the_right_direction() -> None:
    assert Target("rate", 3.0, 3.0, at_least=True).verdict == "PASS"
    assert Target("rate", 2.9, 3.0, at_least=True).verdict == "FAIL"
    assert Target("error", 1e-6, 1e-6, at_least=False).verdict == "FAIL"
    assert Target("error", 9e-7, 1e-6, at_least=False).verdict == "PASS"
    assert Target("rate", 9.0, 3.0, at_least=True, judged=False).verdict == "N-A"
    assert Target("rate", None, 3.0, at_least=True).verdict == "N-A"


def test_featurize_measures_and_judges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    monkeypatch.setattr(featurize, "resnet9", lambda: small)
    rows = {name: featurize.work(name, 2, 8, 1) for name in featurize.PROVIDERS}
    assert {name: row["computer"] for name, row in rows.items() if row["computer"]} == {
        "fastproj": "hooks"
    }
    for row in rows.values():
        assert row["samples_per_second"] > 0
        assert 0 < row["projection_share"] < 1
        assert row["peak_mib"] >= row["before_mib"] > 0
    rows["fastproj"].update(samples_per_second=10.0, peak_mib=1.0)
    rows["traker"].update(samples_per_second=1.0, peak_mib=2.0)
    monkeypatch.setattr(featurize, "run_worker", lambda name, *sizes: rows[name])
    assert featurize.main(["--no-write"]) == 0
    assert "PASS: 10.0x the samples per second of trak" in capsys.readouterr().out
    rows["fastproj"]["peak_mib"] = 3.0
    assert featurize.main(["--no-write"]) == 1
    rows["fastproj"].update(peak_mib=1.0, norms=[1.0, 2.0])
    assert featurize.main(["--no-write"]) == 1
    assert "different features" in capsys.readouterr().out


def test_a_copy_without_its_repository_is_told_its_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("FASTPROJ_COMMIT", "0123abc")
    assert record.commit() == "0123abc"
    monkeypatch.delenv("FASTPROJ_COMMIT")
    assert record.commit() == ""
