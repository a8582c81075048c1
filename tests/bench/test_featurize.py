"""bench.featurize: every workload and provider on tiny models, and how figures are judged."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import featurize, record
from bench.featurization import measure, summary
from bench.featurization.job import Prepared, Unsupported
from bench.featurization.measure import Sizes, work
from bench.featurization.providers import PROVIDERS, Provider, layers, ours
from bench.featurization.workloads import WORKLOADS, logits_of, losses_of, steps
from bench.targets import FAIL, NOT_HERE, PASS
from tests.essential import essential


@pytest.fixture(autouse=True)
def quick_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's garbage collection is half of the time of tiny models."""
    monkeypatch.setattr(measure.memory.gc, "collect", lambda: 0)


OURS = [name for name, provider in PROVIDERS.items() if not provider.against]


def sizes(workload: str) -> Sizes:
    return Sizes(*WORKLOADS[workload].quick, proj_dim=64, repeats=1, threads=1, quick=True)


@pytest.mark.parametrize("workload", essential(WORKLOADS, ("resnet9", "gpt_36m")))
def test_features_have_the_norms_of_gradients(workload: str) -> None:
    row = work("sjlt", workload, sizes(workload))
    assert row["note"] == ""
    assert row["details"] == {"computer": "hooks"}
    assert len(row["seconds"]) == len(row["plain_seconds"]) == 1
    assert row["peak_mib"] > 0
    assert row["plain_peak_mib"] > 0
    assert list(summary.wrong([row])) == []


@pytest.mark.parametrize("provider", essential(OURS, ("plain", "sjlt", "factored-16", "default")))
def test_every_provider_of_ours_runs(provider: str) -> None:
    row = work(provider, "gpt_36m", sizes("gpt_36m"))
    assert row["note"] == "" or row.get("missing")
    assert row["seconds"] or row.get("missing")
    assert list(summary.wrong([row])) == []
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in OURS])
def test_peers_run_or_say_what_installs_them(provider: str) -> None:
    row = work(provider, "gpt_36m", sizes("gpt_36m"))
    if row.get("missing"):
        assert f"; python -m pip install {PROVIDERS[provider].install}" in row["note"]
    else:
        assert row["note"] == ""
        assert row["times"] > 0
    assert provider != "trak" or row["seconds"]  # it is installed


def test_models_for_others_compute_the_same() -> None:
    kind = WORKLOADS["gpt_36m"]
    model, batch = kind.model(quick=True), kind.batch(*kind.quick, number=0, quick=True)
    linear = layers.with_linear_layers(model)
    torch.testing.assert_close(logits_of(linear, batch), logits_of(model, batch))
    kinds = [type(module).__name__ for module in linear.modules()]
    assert "Conv1D" not in kinds
    assert kinds.count("Linear") == 1 + 4 * 2  # the output layer, and those of two blocks
    names = layers.called_on_positions(model, batch)
    assert "transformer.h.1.mlp.c_fc" in names
    assert "transformer.wte" not in names


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_yardstick_is_the_gradient_of_the_mean_loss(workload: str) -> None:
    kind = WORKLOADS[workload]
    model, batch = kind.model(quick=True), kind.batch(*kind.quick, number=0, quick=True)
    steps(model)(batch)
    found = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    model.zero_grad(set_to_none=True)
    for row in range(kind.quick[0]):  # sample by sample
        sample = {name: part[row : row + 1] for name, part in batch.items()}
        (losses_of(model, sample).sum() / kind.quick[0]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, found[name], rtol=1e-3, atol=1e-5)


def test_batches_and_models_are_the_same_in_every_process() -> None:
    for kind in WORKLOADS.values():
        first, again = (kind.batch(*kind.quick, number=3, quick=True) for _ in range(2))
        torch.manual_seed(1)
        assert all(torch.equal(first[name], again[name]) for name in first)
        other = kind.batch(*kind.quick, number=4, quick=True)
        assert not torch.equal(next(iter(first.values())), next(iter(other.values())))
        one, two = kind.model(quick=True), kind.model(quick=True)
        parameters = zip(one.parameters(), two.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in parameters)


def test_what_is_missing_or_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        def prepare(job: Any) -> Prepared:
            raise error

        return Provider("it", prepare)

    for error, said in (
        (Unsupported("no such argument"), "missing: no such argument"),
        (ModuleNotFoundError("No module named 'it'"), "missing: No module named 'it'"),
        (RuntimeError("out\n of memory"), "FAILED: RuntimeError: out of memory"),
    ):
        monkeypatch.setitem(measure.PROVIDERS, "it", raises(error))
        row = work("it", "resnet9", sizes("resnet9"))
        assert row["note"] == said
        assert row["seconds"] == []
        assert said in summary.table([row])


def test_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def provider(name: str, fails_at: int = 99) -> Provider:
        def call(batch: Any) -> None:
            turns.append(name)
            if turns.count(name) == fails_at:
                raise RuntimeError("full")

        return Provider(name, lambda job: Prepared(call, dims=1, warm_up=1), by_dim=False)

    made = {"a": provider("a"), "b": provider("b"), "full": provider("full", fails_at=2)}
    for name, one in made.items():
        monkeypatch.setitem(measure.PROVIDERS, name, one)
    most = sizes("resnet9")._replace(repeats=20)
    a, b, full = measure.work_in_turn(list(made), "resnet9", most)
    assert turns[:3] == ["a", "b", "full"]  # they warm up
    assert turns.count("a") == turns.count("b") == 21
    rounds = "".join(turn for turn in turns[3:] if turn != "full")
    pairs = {rounds[at : at + 2] for at in range(0, len(rounds), 2)}
    assert pairs == {"ab", "ba"}  # each once in a round, in an order that changes
    assert len(a["seconds"]) == len(b["seconds"]) == len(a["plain_seconds"]) == 20
    assert full["note"] == "FAILED: RuntimeError: full"
    assert full["seconds"] == []
    assert summary.table([a, b, full]).count("FAILED") == 1
    assert a["times"] > 0


def test_what_takes_too_long_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*words: object, limit: float) -> None:
        raise subprocess.TimeoutExpired("it", limit)

    monkeypatch.setattr(featurize, "in_fresh_process", slow)
    (row,) = featurize.run_worker(["sjlt"], "gpt2", sizes("gpt2"), 7)
    assert row["note"] == "stopped: not done after 7 s (--limit)"


def test_a_process_of_its_own_gives_the_row() -> None:
    (row,) = featurize.run_worker(["plain"], "resnet9", sizes("resnet9"), 300)
    assert row["note"] == ""
    assert row["seconds"]
    assert row["threads"] == 1


def row_of(provider: str, times: float, memory: float) -> dict[str, Any]:
    return {
        **sizes("gpt_36m")._asdict(),
        "workload": "gpt_36m",
        "provider": provider,
        "quick": False,
        "seconds": [times],
        "times": times,
        "samples_per_second": 1 / times,
        "memory_times": memory,
    }


def test_targets_judge_in_the_right_direction() -> None:
    rows = [row_of("sjlt", 2.0, 1.2), row_of("factored-64", 1.3, 1.4)]
    verdicts = [target.verdict for target in summary.targets(rows)]
    assert verdicts == [PASS, FAIL, PASS, PASS, FAIL]
    assert {t.verdict for t in summary.targets(rows[:1])} == {PASS, FAIL, NOT_HERE}
    quick = [{**row, "quick": True} for row in rows]
    assert {target.verdict for target in summary.targets(quick)} == {NOT_HERE}


def test_peers_are_compared_with_what_they_compete_with(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Provider("peer", lambda job: Prepared(print, 0), against="sjlt")
    monkeypatch.setitem(summary.PROVIDERS, "peer", peer)
    for times, verdict in ((4.0, PASS), (1.0, FAIL)):
        rows = [row_of("sjlt", 2.0, 1.0), row_of("peer", times, 1.0)]
        assert summary.targets(rows)[-1].verdict == verdict
        assert summary.targets(rows)[-1].figure == times / 2


def test_features_of_other_norms_are_wrong() -> None:
    good, bad = (dict(row_of("sjlt", 1.0, 1.0), norm_ratio=ratio) for ratio in (1.2, 0.3))
    assert list(summary.wrong([good])) == []
    assert len(list(summary.wrong([bad]))) == 1
    assert len(list(summary.wrong([dict(bad, norm_ratio=float("nan"))]))) == 1


def test_a_gradient_that_lacks_a_layer_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = partial(ours.prepare, **ours.FEATURES, grad_wrt=["transformer.wpe.weight"])
    monkeypatch.setitem(measure.PROVIDERS, "it", Provider("it", prepare))
    row = work("it", "gpt_36m", sizes("gpt_36m"))
    assert len(list(summary.wrong([row]))) == 1


@pytest.mark.parametrize("more", [[], ["--in-turn"]])
def test_the_command_measures_prints_and_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def here(providers: list[str], *words: Any, in_turn: bool = False) -> list[measure.Row]:
        if in_turn:
            return measure.work_in_turn(providers, *words[:2])
        return [work(provider, *words[:2]) for provider in providers]

    monkeypatch.setattr(featurize, "run_worker", here)
    words = ["--quick", "--threads", "1", "--repeats", "1", "--model", "resnet9"]
    assert featurize.main([*words, *more, "--provider", "plain", "sjlt"]) == 0
    said = capsys.readouterr().out
    assert "forward + backward" in said
    assert "fastproj sjlt" in said
    (path,) = tmp_path.glob("*-featurize-quick.json")
    content = json.loads(path.read_text())
    assert [row["provider"] for row in content["rows"]] == ["plain", "sjlt"]
    assert all(target["verdict"] == NOT_HERE for target in content["targets"])
    assert path.with_suffix(".txt").exists()
