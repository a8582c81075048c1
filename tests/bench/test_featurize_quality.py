"""bench.featurize_quality: it measures, tells costs apart by K, draws and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import featurize_quality, record
from bench.featurization.providers import PROVIDERS
from bench.featurize_quality import WAYS, costs_of, summary, table


def test_every_way_has_its_cost() -> None:
    assert {provider for _, _, provider in WAYS.values()} <= set(PROVIDERS)


def row(way: str, k: int, seconds: list[float], seed: int = 0) -> dict[str, Any]:
    measures = {"mean": 0.5 + seed, "low": 0.4, "high": 0.6, "n": 500, "problem": "it"}
    return {
        **measures,
        "k": k,
        "kind": way,
        "seed": seed,
        "seconds": seconds,
        "plain_seconds": [1.0, 2.0, 9.0],
    }


def test_costs_are_medians_and_go_by_k(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    rows = [
        {"workload": "gpt_36m", "provider": "dense", "proj_dim": 64, "times": 4.0, "seconds": [1]},
        {"workload": "gpt_36m", "provider": "sjlt", "proj_dim": 64, "times": 2.0, "seconds": []},
        {"workload": "gpt2", "provider": "sjlt", "proj_dim": 64, "times": 7.0, "seconds": [1]},
        {"workload": "gpt_36m", "provider": "plain", "proj_dim": 64, "times": 1.0, "seconds": [1]},
    ]
    result.write_text(json.dumps({"rows": rows}))
    costs = costs_of([result], "gpt_36m")
    assert costs == {("rademacher", 64): 4.0}
    assert costs_of([], "gpt_36m") == {}
    runs = [row("rademacher", 64, [3.0, 4.0, 90.0]), row("rademacher", 128, [6.0, 6.0, 6.0])]
    first, second = summary(runs, costs)
    assert first["seconds"] == 8.0
    assert first["times"] == 2.0
    assert first["large_times"] == 4.0
    assert second["large_times"] is None
    assert "4.00" in table([first])


def test_seeds_are_averaged() -> None:
    (place,) = summary([row("sjlt", 64, [1.0]), row("sjlt", 64, [3.0], seed=1)], {})
    assert place["mean"] == 1.0
    assert place["seconds"] == 4.0


@pytest.mark.slow
def test_it_measures_draws_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    picture, cache = tmp_path / "picture.png", tmp_path / "cache"
    costs = tmp_path / "costs.json"
    made = {"workload": "gpt_36m", "proj_dim": 32, "seconds": [1.0]}
    rows = [{**made, "provider": p, "times": 2.0} for p in ("dense", "sjlt", "factored-8")]
    costs.write_text(json.dumps({"rows": rows}))
    words = ["--quick", "--problem", "digits", "--dims", "32", "--cache", cache]
    words += ["--way", "rademacher", "sjlt", "factored 8", "--costs", costs, "--picture", picture]
    assert featurize_quality.main([str(word) for word in words]) == 0
    (path,) = tmp_path.glob("*-featurize-quality-quick.json")
    content = json.loads(path.read_text())
    assert [place["kind"] for place in content["places"]] == ["rademacher", "sjlt", "factored 8"]
    for place in content["places"]:
        assert place["low"] <= place["mean"] <= place["high"]
        assert place["seconds"] > 0
        assert place["large_times"] == 2.0
    assert len(content["lds"]) == 3
    assert picture.stat().st_size > 10_000
    assert path.with_suffix(".png").exists()


def test_what_was_measured_is_drawn_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a large model's costs, which came later."""
    result, costs, picture = (tmp_path / name for name in ("it.json", "costs.json", "picture.png"))
    result.write_text(json.dumps({"runs": [row("sjlt", 64, [1.0])]}))
    made = {"workload": "gpt_36m", "proj_dim": 64, "seconds": [1.0]}
    costs.write_text(json.dumps({"rows": [{**made, "provider": "sjlt", "times": 1.23}]}))
    words = ["--again", result, "--costs", costs, "--picture", picture]
    assert featurize_quality.main([str(word) for word in words]) == 0
    assert "1.23" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
