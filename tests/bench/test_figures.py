"""The README's and the pages' numbers are those of the results, and follow a newer one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import figures
from tests import ROOT


def test_pages_say_what_the_results_say() -> None:
    """`make figures` mends what this finds."""
    assert figures.out_of_date() == []


def test_every_region_is_written_and_every_figure_used() -> None:
    used = []
    for name in figures.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        regions = figures.REGION.findall(text)
        assert len(regions) == text.count("<!-- figures:") == text.count("<!-- end of figures -->")
        used += [region[1] for region in regions]
    assert sorted(used) == sorted(figures.FIGURES)


def write(folder: Path, day: str, name: str, **content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{day}-0123456789-{name}.json"
    machine = {"cpu": "Abacus", "flags": ["avx2"], "threads": 3}
    path.write_text(json.dumps({"time": f"{day}T00:00:00", "machine": machine, **content}))
    return path


def timed(provider: str, seconds: float, kind: str = "rademacher", **other: Any) -> dict[str, Any]:
    shape = {"batch": 32, "rows": 10**6, "cols": 4096, "wrong": False}
    return {"provider": provider, "kind": kind, "seconds": [seconds], **shape, **other}


ROWS = [
    timed("torch.matmul stored R fp32", 3.2),
    timed("TRAK BasicProjector", 6.4, rows=10**5),
    timed("fastproj highest avx512", 0.32),
    timed("fastproj highest portable", 3.2),
    timed("fastproj highest avx512", 0.032, kind="sjlt"),
]
OPTIONS = {"kind": ["rademacher", "sjlt"], "batch": [32], "rows": [1000], "cols": [4096]}


def test_table_of_speed(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", "project-float32", rows=ROWS, options=OPTIONS)
    assert figures.speed(tmp_path).splitlines() == [
        "| projector | ms per sample and million parameters | times as fast |",
        "|---|---|---|",
        "| `torch.matmul`, `R` stored in float32 | 100 | 20× |",
        "| TRAK's projector (`BasicProjector`) | 2,000 | 1× |",
        "| fastproj, `rademacher` | 10 | 200× |",
        "| fastproj, `sjlt` | 1 | 2,000× |",
        "",
        "32 float32 gradients at a time, to 4,096 dimensions, on 3 threads of Abacus (AVX2): "
        "`python -m bench.project --kind "
        "rademacher sjlt --batch 32 --rows 1000 --cols 4096` "
        "([result](bench/results/2026-01-01-0123456789-project-float32.json)).",
    ]


def test_the_newest_of_the_fullest_results_counts(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-02", "project-float32", rows=ROWS, options=OPTIONS)
    write(tmp_path, "2026-01-01", "project-acceptance", rows=ROWS, options=OPTIONS)
    write(tmp_path, "2026-01-03", "project-sjlt", rows=ROWS[-1:], options=OPTIONS)
    wrong = [{**row, "wrong": True} for row in ROWS[1:]] + [
        timed("TRAK BasicProjector", 1, batch=8)
    ]
    write(tmp_path, "2026-01-04", "project-float32", rows=wrong, options=OPTIONS)
    assert "2026-01-02" in figures.speed(tmp_path)
    write(tmp_path, "2026-01-05", "project-acceptance", rows=ROWS, options={"acceptance": True})
    assert "`python -m bench.project --acceptance` ([result](" in figures.speed(tmp_path)


def scored(provider: str, problem: str, k: int, seconds: float, lds: float, **other: Any) -> Any:
    known = {"checkpoints": 5, "cpu_seconds": seconds, "output": lds, "held_out": True}
    return {"provider": provider, "problem": problem, "k": k, **known, **other}


LDS = [
    scored("default", "a", 512, 1.0, 0.4),
    scored("default", "b", 512, 4.0, 0.6),
    scored("default", "b", 512, 4.0, 0.1, checkpoints=1),
    scored("ekfac", "a", 0, 16.0, 0.3),
    scored("ekfac", "b", 0, 25.0, 0.2),
    scored("trak_rule", "a", 512, 1.0, 0.9),
    scored("bm25", "c", 0, 1.0, 0.9),
]


def test_points_are_of_the_problems_that_all_have(tmp_path: Path) -> None:
    source = figures.Source(write(tmp_path, "2026-01-01", "lds", rows=LDS), {"rows": LDS})
    points, problems, count = figures.lds_points(source)
    assert (problems, count) == (["a", "b"], 5)
    found = [(p.provider, p.k, round(p.seconds, 9), round(p.lds, 9)) for p in points]
    assert found == [("default", 512, 2.0, 0.5), ("ekfac", 0, 20.0, 0.25)]
    text = figures.lds_seconds(tmp_path)
    assert "fastproj, k = 512: 0.50 in 2 s; EK-FAC (kronfluence): 0.25 in 20 s](" in text
    assert (
        "the mean over 2 held-out problems, with 5 checkpoints and gradients projected to k" in text
    )


def test_a_result_with_more_ways_to_score_is_drawn_and_newer_ones_after(tmp_path: Path) -> None:
    write(tmp_path, "2026-01-01", "lds", rows=LDS)
    few = [row for row in LDS if row["provider"] == "default"]
    write(tmp_path, "2026-01-02", "lds", rows=few)
    old = [{"problem": "a", "fastproj_seconds": 1, "provider": "trak", "checkpoints": 1, "k": 2}]
    write(tmp_path, "2026-01-03", "lds", rows=old)
    write(tmp_path, "2026-01-04", "lds-curve", problems=[])
    assert figures.lds_source(tmp_path).path.name.startswith("2026-01-01")
    write(tmp_path, "2026-01-05", "lds", rows=LDS)
    assert figures.lds_source(tmp_path).path.name.startswith("2026-01-05")


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    for figure in figures.FIGURES.values():
        with pytest.raises(figures.NoResult, match="bench/results has no result"):
            figure(tmp_path)


def test_other_numbers_make_pages_and_picture_out_of_date(tmp_path: Path) -> None:
    """The copy of what is committed is up to date; with a newer result it isn't, until written."""
    pytest.importorskip("matplotlib")
    for name in (*figures.PAGES, figures.PICTURE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    folder = tmp_path / "results"
    shutil.copytree(figures.RESULTS, folder)
    assert figures.out_of_date(tmp_path, folder) == []
    rows = figures.lds_source(folder).content["rows"]
    write(folder, "2126-01-01", "lds", rows=[{**row, "output": row["output"] / 2} for row in rows])
    assert figures.out_of_date(tmp_path, folder) == ["README.md", figures.PICTURE]
    source = figures.lds_source(folder)
    figures.draw_lds(tmp_path / figures.PICTURE, source)
    page = tmp_path / "README.md"
    page.write_text(figures.rewritten(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    assert figures.out_of_date(tmp_path, folder) == []
    svg = (tmp_path / figures.PICTURE).read_text(encoding="utf-8")
    figures.draw_lds(tmp_path / figures.PICTURE, source)
    assert (tmp_path / figures.PICTURE).read_text(encoding="utf-8") == svg
