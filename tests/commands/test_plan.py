"""fastproj plan: its arithmetic against a run's real files, its rates, and what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastproj
from bench import out_of_core
from fastproj import cli
from fastproj.commands import plan, rates
from fastproj.commands.costs import Layers, Run
from fastproj.trak import TRAKer
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.solving import ridge, solve
from fastproj.trak.store import features
from tests.trak import cases
from tests.trak.gradients.test_memory import most_bytes

WORDS = ["plan", "--model-parameters", "1e5", "--samples", "5e4", "--proj-dim", "64"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates without measuring: 1e9 entries of G a second on the CPU, everything else 1e9 too."""

    def projection_rate(backend: str, *_: Any) -> rates.Rate:
        return rates.Rate(backend, 1e9) if backend == "cpu" else rates.Rate(backend, 0.0, "no GPU")

    monkeypatch.setattr(rates, "projection_rate", projection_rate)
    monkeypatch.setattr(plan, "matmul_rate", lambda dtype: 1e9)
    monkeypatch.setattr(plan, "cholesky_rate", lambda: 1e9)


def planned(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert cli.main([*WORDS, *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("n", "proj_dim", "curvature", "half"),
    [(300, 64, "fisher", True), (70, 256, "fisher", False), (70, 256, "trak", True)],
)
def test_disk_is_what_a_run_leaves_there(
    tmp_path: Path, n: int, proj_dim: int, curvature: str, half: bool
) -> None:
    """Beside file headers, and the few numbers that don't go by the sample."""
    cases.whole_run(
        *(tmp_path, [cases.net(0)], cases.data(n), cases.data(40, seed=5)),
        proj_dim=proj_dim,
        curvature=curvature,
        use_half_precision=half,
    )
    run = Run(0, n, proj_dim, 40, 1, curvature == "fisher", half)
    of_rows = set(tmp_path.glob("models/0/train-*"))
    has_step = (tmp_path / "models/0/halving_step.safetensors").exists()
    no_step = 8 * proj_dim if run.fisher and not has_step else 0
    for files, name, extra in (
        (of_rows, "features", 0),
        (set(tmp_path.glob("models/0/drawn/*")), "drawn rows of the Fisher matrix", 0),
        (set(tmp_path.glob("models/0/targets/*/*")), "features of targets", 0),
        (set(tmp_path.glob("models/0/*.safetensors")) - of_rows, "matrices", run.rows + proj_dim),
        (set(tmp_path.glob("scores/*")), "scores", 0),
    ):
        real = sum(path.stat().st_size for path in files)
        wanted = run.disk().get(name, 0) - (no_step if name == "matrices" else 0)
        assert wanted <= real <= wanted + 16 * extra + 2048 * len(files), name


@pytest.mark.parametrize(
    ("n", "proj_dim", "targets", "curvature"),
    [
        *((1100, 1024, 9, "fisher"), (500, 1280, 9, "fisher")),
        *((1000, 512, 900, "trak"), (1000, 512, 900, "fisher")),
    ],
)
def test_memory_is_what_finalising_and_scoring_take(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n: int,
    proj_dim: int,
    targets: int,
    curvature: str,
) -> None:
    for module, name in (
        *((features, "BLOCK_ROWS"), (ridge, "COLUMNS")),
        *((solve, "GRAM_TILE"), (solve, "GRAM_COLUMNS")),
    ):
        monkeypatch.setattr(module, name, 64)  # so that systems are most of it
    monkeypatch.setattr(solve, "EXACT_FLOPS", 0.0)  # as of large ones
    planned = Run(0, n, proj_dim, targets, 1, curvature == "fisher").memory()
    given = argparse.Namespace(
        samples=n, proj_dim=proj_dim, targets=targets, curvature=curvature, kind="sjlt"
    )
    out_of_core.write_features(tmp_path, given)
    traker, _ = out_of_core.make(tmp_path, given)
    finalising = most_bytes(traker.finalize_features)
    assert 0.7 * planned["finalising"] < finalising <= planned["finalising"]
    out_of_core.write_targets(tmp_path, given)
    scoring = most_bytes(lambda: traker.finalize_scores("bench"))
    assert 0.5 * planned["scoring"] < scoring <= planned["scoring"]


@pytest.mark.parametrize(("n", "k"), [(100, 8), (1000, 64), (50, 64), (16, 4)])
def test_drawn_rows_are_those_of_a_run(n: int, k: int) -> None:
    """A last run of fewer samples may or may not be among those that are drawn for."""
    found = Run(1, n, k, 1, 1, True).drawn
    assert 0 <= found - Draws(n, k, Fisher(), 0).count < 16


def test_known_answers(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--checkpoints", 3, "--targets", 10, "--curvature", "trak")
    assert found["disk_bytes"]["features"] == 3 * 50_000 * (2 * 64 + 24)
    assert found["disk_bytes"]["scores"] == 4 * 50_000 * 10
    assert found["disk_bytes"]["matrices"] == 3 * 8 * 64 * 64
    assert found["stored_matrix_bytes"] == 4 * 10**5 * 64
    assert found["seconds"]["scoring"] == pytest.approx(2 * 3 * 50_000 * 10 * 64 / 1e9)
    projected = found["project_seconds"]
    assert projected["cpu"]["seconds"] == pytest.approx(3 * 50_010 * 1e5 / 1e9)
    assert projected["cuda"] == {"entries_per_second": 0.0, "seconds": None, "reason": "no GPU"}
    more = planned(capsys, "--gradient-seconds", 0.5, "--curvature", "trak", "--targets", 10)
    assert more["seconds"]["gradients"] == 0.5 * 50_010
    fisher = planned(capsys, "--targets", 10)
    assert fisher["project_seconds"]["cpu"]["seconds"] == pytest.approx(50_138 * 1e5 / 1e9)
    assert fisher["disk_bytes"]["drawn rows of the Fisher matrix"] == 128 * (2 * 64 + 24)
    whole = planned(capsys, "--full-precision", "--curvature", "trak")
    assert whole["disk_bytes"]["features"] == 50_000 * (4 * 64 + 24)


@pytest.mark.parametrize(("fisher", "factors"), [(True, 2 * (4 + 1 + 2)), (False, 2 * 4)])
def test_checkpoints_of_the_fisher_matrix_alone_are_compared(fisher: bool, factors: int) -> None:
    assert Run(1, 100, 8, 1, 2, fisher).solve_operations() == pytest.approx(factors * 8**3 / 3)


def test_factored_says_what_it_assumes(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--factored", "16", "--width", "100", "--tokens", "7", "--curvature", "trak"]
    found = planned(capsys, *words, "--targets", 1)
    assert found["factored"] == {
        **{"rank": 16, "count": 10.0, "width": 100, "tokens": 7, "entries": 10 * 16 * 16}
    }
    operations = 2 * 7 * 10 * (100 * 16 + 100 * 16 + 16 * 16)
    seconds = found["seconds"]["compressing both sides"]
    assert seconds == pytest.approx(operations * 50_001 / 1e9)
    assert cli.main([*WORDS, *words]) == 0
    out = capsys.readouterr().out
    assert "assumed are 10 linear layers of 100 x 100 and 7 tokens a sample" in out
    assert "a gradient then has 2,560 entries" in out


def test_layers_are_those_of_a_transformer() -> None:
    """GPT-2: 85 million parameters in 12 blocks of width 768."""
    layers = Layers.assumed(12 * 12 * 768**2, None, 512)
    assert layers.width == 768
    assert layers.count == pytest.approx(144)
    assert layers.entries(1000) == 12 * 12 * 768**2  # a side not larger than the rank stays
    assert layers.operations(1000) == 2 * 512 * 12 * 12 * 768**2
    assert Layers.assumed(1, None, 512).entries(1) == 1


@pytest.mark.parametrize(
    ("n", "options"), [(50, {}), (3000, {}), (50, {"kind": "rademacher"}), (50, {"block": 64})]
)
def test_defaults_are_those_of_a_run(
    quick: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    n: int,
    options: dict[str, Any],
) -> None:
    net = torch.nn.Linear(1000, 10)
    traker = TRAKer(net, "image_classification", n, tmp_path, **options)
    words = ["plan", "--model-parameters", "10010", "--samples", str(n)]
    assert cli.main([*words, *(f"--{name}={value}" for name, value in options.items())]) == 0
    block = getattr(traker.projector, "block", None)
    shown = f"{traker.projector.kind}{f' with block {block}' if block else ''}"
    assert f"K = {traker.proj_dim}, {shown}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parameters", "most"), [("1e5", 32 * 4e5), ("1e8", 1 << 29), ("1e9", 4e9)]
)
def test_gradients_of_a_batch_take_what_a_chunk_of_them_takes(
    quick: None, capsys: pytest.CaptureFixture[str], parameters: str, most: float
) -> None:
    """docs/gradients.md: 512 MiB, or one sample's."""
    found = planned(capsys, "--model-parameters", parameters, "--batch", 32)
    assert found["memory_bytes"]["gradients of a batch, at most"] == most


def test_text(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*WORDS, "--kind", "sjlt"]) == 0
    out = capsys.readouterr().out
    assert "100,000 parameters, 50,000 training samples, 100 targets, 1 checkpoint\n" in out
    assert "K = 64, sjlt with block 16, curvature fisher" in out
    assert "not usable: no GPU" in out
    assert "Not counted: the model's forward and backward passes (--gradient-seconds)" in out
    for word in ("disk", "memory", "time on this machine", "finalising", "scoring", "projecting"):
        assert word in out


@pytest.mark.parametrize("kind", ["rademacher", "sjlt"])
def test_rates_are_measured_on_the_backends_that_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "ENOUGH", 0.0)
    found = {rate.backend: rate for rate in rates.projection_rates(100, 32, kind, None, 2)}
    usable = fastproj.available_backends()
    for name, rate in found.items():
        on_cpu = name in ("cpu", "reference")
        assert (rate.entries > 0) == (name in usable and on_cpu), name
        assert bool(rate.reason) == (rate.entries == 0)
    assert rates.matmul_rate(torch.float32) > 0
    assert rates.cholesky_rate() > 0


def test_calls_grow_until_they_take_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of G takes a millisecond here: 64 rows are enough."""
    seen = []

    def seconds_of(call: Any, device: str, repeats: int) -> float:
        seen.append(call.__defaults__[0].shape[1])
        return seen[-1] / 1000

    monkeypatch.setattr(rates, "seconds_of", seconds_of)
    monkeypatch.setattr(rates, "FIRST", 10)
    assert rates.projection_rate("reference", 1000, 8, "rademacher", None, 4).entries == 4000.0
    assert seen == [10, 20, 40, 80]
    seen.clear()
    monkeypatch.setattr(rates, "REFERENCE_ENTRIES", 40)
    assert rates.projection_rate("reference", 1000, 8, "rademacher", None, 4).entries == 4000.0
    assert seen[0] == 5
    seen.clear()
    assert rates.projection_rate("reference", 1000, 80, "rademacher", None, 4).entries == 4000.0
    assert seen[0] == 1
    monkeypatch.undo()
    monkeypatch.setattr(rates, "seconds_of", seconds_of)
    monkeypatch.setattr(rates, "FIRST", 10)
    seen.clear()
    assert rates.projection_rate("reference", 25, 8, "rademacher", None, 4).entries == 4000.0
    assert seen == [10, 20, 25]


def test_calls_stay_small_at_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def seconds_of(call: Any, device: str, repeats: int) -> float:
        seen.append(call.__defaults__[0].shape)
        return 1.0

    monkeypatch.setattr(rates, "seconds_of", seconds_of)
    most = rates.LARGEST // 4
    for batch, rows, cols in ((10**9, 10**9, 64), (10**6, 10**9, 10**6), (32, 10, 1 << 22)):
        rates.projection_rate("reference", rows, cols, "sjlt", 16, batch)
        b, part = seen[-1]
        assert b == 1 or b * max(part, cols) <= most
    seen.clear()
    for cols, reason in (
        (1 << 29, "one projected gradient takes 2147483648 bytes"),
        (1 << 28, "it makes the 268435456 entries of a row of R one by one"),
    ):
        found = rates.projection_rate("reference", 10, cols, "sjlt", 16, 1)
        assert (found.entries, found.reason) == (0.0, f"not tried: {reason}")
    assert not seen


def test_the_largest_numbers_are_planned(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    most = ["--samples", "9e18", "--targets", "9e18", "--checkpoints", "9e18", "--batch", "9e18"]
    shape = ["plan", "--model-parameters", "2**56", "--proj-dim", "2**32", *most]
    assert cli.main(shape) == 0
    assert cli.main([*shape, "--factored", "3", "--tokens", "9e18", "--width", "9e18"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--kind", "sjlt", "--block", "48"],
            "--block: received W=48; expected a power of two from 16 to 65536",
        ),
        (
            ["--kind", "gaussian", "--block", "64"],
            "--block: received W=64 with --kind gaussian; expected --kind sjlt, or no --block",
        ),
        (["--samples", "1.5"], "received '1.5'; expected an integer of at least 1"),
        (["--gradient-seconds", "-1"], "received '-1'; expected seconds, above 0"),
        (["--width", "64"], "--width goes with --factored"),
        (["--factored", "65536"], "--factored: received r=65536; expected 1 <= r < 2^16"),
        (["--model-parameters", "1e18"], "--model-parameters: received P=1000000000000000000;"),
        (["--proj-dim", "1e10"], "--proj-dim: received K=10000000000; expected 1 <= K < "),
        (["--curvature", "none"], "invalid choice: 'none'"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*WORDS, *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (819_200, "819 kB"), (4e12, "4 TB")],
)
def test_bytes(value: float, text: str) -> None:
    assert plan.in_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.034, "0.034 s"), (99, "99 s"), (720, "12 min"), (1e6, "12 days"), (1e9, "32 years")],
)
def test_times(value: float, text: str) -> None:
    assert plan.in_time(value) == text
