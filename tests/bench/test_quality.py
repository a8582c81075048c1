"""Distortion against theory, and the LDS of kinds: small sizes, and formulas by brute force."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastproj
from bench import distortion, lds_of_kinds, quality, record
from bench.distortion import Kind


def test_rademacher_variance_is_that_of_all_signs() -> None:
    a, b = torch.tensor([[1.0, 2.0, -0.5]]), torch.tensor([[0.3, -1.0, 4.0]])
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3))).T  # one column each
    products = (a @ signs) * (b @ signs) / (a.norm() * b.norm())
    expected = products.var(correction=0) / 7
    found = distortion.inner_variance(Kind("rademacher"), 7, a, b)
    torch.testing.assert_close(found, expected.double().reshape(1))


def test_sjlt_variance_is_that_of_all_places_and_signs() -> None:
    """One column over two tiles of 4 rows: every pair of places, every pair of signs."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 8, generator=generator)
    cross = torch.tensor(
        [
            s * t * a[0, p] * b[0, 4 + q] + s * t * a[0, 4 + q] * b[0, p]
            for p, q in itertools.product(range(4), repeat=2)
            for s, t in itertools.product((-1, 1), repeat=2)
        ]
    )
    # K columns of independent signs, each sum scaled by W / K; squares within tiles are constant.
    cols, block = 8, 4
    variance = cols * (block / cols) ** 2 * cross.var(correction=0)
    expected = variance / (a.norm() * b.norm()) ** 2
    found = distortion.inner_variance(Kind("sjlt", block), cols, a, b)
    torch.testing.assert_close(found, expected.double().reshape(1))


def test_one_nonzero_is_kept_but_by_the_gaussian() -> None:
    (a,) = distortion.nonzeros(1)(1, 64, torch.Generator().manual_seed(0)).unsqueeze(0)
    assert float(distortion.norm_variance(Kind("rademacher"), 32, a)) == pytest.approx(0)
    assert float(distortion.norm_variance(Kind("sjlt", 16), 32, a)) == pytest.approx(0)
    assert float(distortion.norm_variance(Kind("gaussian"), 32, a)) == pytest.approx(2 / 32)
    with pytest.raises(ValueError, match="srht"):
        distortion.norm_variance(Kind("srht"), 32, a)


def test_kinds_have_blocks_that_exist() -> None:
    assert [k.name for k in distortion.kinds_of(64)] == [
        "rademacher",
        "gaussian",
        "sjlt 1",
        "sjlt 2",
        "sjlt 4",
    ]
    assert {k.block for k in distortion.kinds_of(8192)} == {0, 8192, 4096, 2048, 1024, 512}
    assert len(distortion.kinds_of(100)) == 2


def test_families_have_their_structure() -> None:
    for name, make in distortion.FAMILIES.items():
        for rows in (1024, 4096):
            a = make(5, rows, torch.Generator().manual_seed(1))
            assert a.shape == (5, rows), name
            assert (a.norm(dim=1) > 0).all(), name
        again = make(5, rows, torch.Generator().manual_seed(1))
        assert torch.equal(a, again), name
    counts = {
        name: {int(row.count_nonzero()) for row in make(5, 1024, torch.Generator())}
        for name, make in distortion.FAMILIES.items()
    }
    assert counts["1 nonzero"] == {1}
    assert counts["10 nonzeros"] == {10}
    assert counts["2 chunks of 16"] == {32}
    assert counts["embedding"] == {12 * 32}


def test_measured_variance_is_that_of_theory_and_a_wrong_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    families = {name: distortion.FAMILIES[name] for name in ("normal", "10 nonzeros")}
    rows = distortion.measure(families, 256, 64, 60, 8)
    assert len(rows) == 2 * 5
    assert [fault for row in rows for fault in distortion.disagrees(row)] == []
    table = distortion.table_of(rows, "norm")
    assert "10 nonzeros" in table
    assert "sjlt 4" in table
    real = fastproj.project

    def longer(*args: Any, **options: Any) -> torch.Tensor:
        return 1.3 * real(*args, **options)

    monkeypatch.setattr(distortion.fastproj, "project", longer)
    spoiled = distortion.measure({"normal": distortion.normal}, 256, 64, 60, 8)
    assert all(distortion.disagrees(row) for row in spoiled)


def lds_row(kind: str, seed: int, per_target: list[float], problem: str = "p") -> dict[str, Any]:
    mean = float(np.mean(per_target))
    facts = {"problem": problem, "k": 64, "kind": kind, "seed": seed, "per_target": per_target}
    return {**facts, "mean": mean, "low": mean - 0.3, "high": mean + 0.3}


def test_difference_to_the_dense_kind_is_paired_and_knows_the_matrices() -> None:
    far = [0.1, 0.9, 0.5, 0.2]
    rows = [lds_row("rademacher", seed, far) for seed in (0, 1)]
    rows += [lds_row("sjlt 4", seed, [r + 0.01 * (1 + 2 * seed) for r in far]) for seed in (0, 1)]
    dense, sparse = lds_of_kinds.against_dense(rows)
    assert (dense["difference"], dense["difference_low"]) == (0, 0)
    assert sparse["difference"] == pytest.approx(0.02)
    assert sparse["spread"] == pytest.approx(0.02 / math.sqrt(2))
    # Seeds apart by 0.02 in one of two kinds: 0.0002 over 2 degrees, twice a half of it.
    assert sparse["difference_high"] - 0.02 == pytest.approx(1.96 * 0.01)
    assert "+0.0200" in lds_of_kinds.table_of([dense, sparse])
    assert lds_of_kinds.against_dense(rows[2:]) == []
    one = [row for row in rows if row["seed"] == 0]
    _, alone = lds_of_kinds.against_dense(one)
    assert alone["difference_high"] == pytest.approx(alone["difference_low"])  # no spread known


def test_problems_are_averaged() -> None:
    rows = [lds_row("rademacher", 0, [0.1, 0.3], problem) for problem in "ab"]
    rows += [
        lds_row("sjlt 4", 0, values, p) for p, values in (("a", [0.2, 0.4]), ("b", [0.0, 0.4]))
    ]
    (mean,) = [
        row
        for row in lds_of_kinds.against_dense(rows)
        if (row["problem"], row["kind"]) == ("mean", "sjlt 4")
    ]
    assert mean["difference"] == pytest.approx(0.05)
    # Differences of targets: +0.1 +0.1, and -0.1 +0.1: variances of the means 0 and 0.01.
    assert mean["difference_variance"] == pytest.approx(0.01 / 4)


def test_it_runs_draws_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    words = "--quick --rows 512 --cols 64 --draws 3 --vectors 4 --problem wine --dims 64".split()
    words += "--checkpoints 1 --subsets 6".split()
    words += ["--cache", str(tmp_path / "cache"), "--log", str(tmp_path / "log")]
    quality.main(words)
    (path,) = (tmp_path / "results").glob("*-quality-quick.json")
    content = json.loads(path.read_text())
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "LDS" in path.with_suffix(".txt").read_text()
    assert {row["kind"] for row in content["lds"]} == {
        kind.name for kind in distortion.kinds_of(64)
    }
    assert len(content["distortion"]) == 10 * 5
    assert {row["problem"] for row in content["lds"]} == {"wine"}
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 5

    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(lds_of_kinds.traker, "run", fails)
    quality.main([*words, "--no-write"])
