"""Writes the numbers and pictures of README.md and docs/ from the results in bench/results/.

    python -m bench.figures           rewrite what has changed
    python -m bench.figures --check   change nothing; 1 where something is out of date

What stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` in a page is written by
the function of that name below, from the newest result that has what it needs. A picture carries
the result that it was drawn from, and a digest of what is drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/evaluation.md")
PICTURE = "docs/pictures/lds-seconds.svg"
REGION = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)

# What the battery's providers are to a reader, in the order of the legend.
SCORES = {
    "default": "fastproj",
    "trak": "trak 0.3.2",
    "trak_own_sweep": "trak 0.3.2, best lambda in hindsight",
    "trak_sweep": "fastproj with TRAK's formula, best lambda in hindsight",
    "ekfac": "EK-FAC (kronfluence)",
    "ekfac_sweep": "EK-FAC, best damping in hindsight",
    "cosine": "gradient cosines",
    "bm25": "BM25",
}
# Rows of the table of speed: (kind, words of the provider's name, what it is).
SPEED = (
    ("rademacher", "torch.matmul stored R fp32", "`torch.matmul`, `R` stored in float32"),
    ("rademacher", "TRAK BasicProjector", "TRAK's projector (`BasicProjector`)"),
    ("rademacher", "fastproj highest", "fastproj, `rademacher`"),
    ("sjlt", "fastproj highest", "fastproj, `sjlt`"),
)
BATCH, COLS = 32, 4096

Result = dict[str, Any]
Row = dict[str, Any]


class NoResult(RuntimeError):
    """No committed result has what a figure needs."""


@dataclass(frozen=True)
class Source:
    """A result, and the file that it is from."""

    path: Path
    content: Result

    @property
    def link(self) -> str:
        """Its path from the repository's root."""
        return f"bench/results/{self.path.name}"


def results(folder: Path, name: str) -> list[Source]:
    """The results called ``<day>-<commit>-<name>.json``, the newest first; name is a pattern."""
    found = [
        Source(path, json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("*.json")
        if re.fullmatch(rf"\d{{4}}-\d\d-\d\d-[\w-]+?-{name}\.json", path.name)
    ]
    return sorted(found, key=lambda source: source.content["time"], reverse=True)


def fullest(sources: Iterable[Source], count: Callable[[Source], int], what: str) -> Source:
    """The source that has the most of what is wanted, the first of those."""
    ranked = sorted(sources, key=count, reverse=True)  # a stable sort
    if not ranked or not count(ranked[0]):
        raise NoResult(f"bench/results has no result with {what}")
    return ranked[0]


# ---- speed --------------------------------------------------------------------------------------


def speed_rows(source: Source) -> list[tuple[str, Row]]:
    """(what it is, row) of SPEED that a result has, right and timed, at BATCH and COLS."""
    found = []
    for kind, words, what in SPEED:
        rows = [
            row
            for row in source.content["rows"]
            if row["kind"] == kind
            and row["provider"].startswith(words)
            and (row["batch"], row["cols"]) == (BATCH, COLS)
            and row.get("dtype", "float32") == "float32"
            and row["seconds"]
            and not row["wrong"]
        ]
        if rows:
            found.append((what, min(rows, key=per_entry)))
    return found


def per_entry(row: Row) -> float:
    """Seconds for each entry of the gradients, at the median."""
    return median(row["seconds"]) / (row["batch"] * row["rows"])


def speed(folder: Path) -> str:
    """The table of projectors on a CPU."""
    wanted = " and ".join(what for _, _, what in SPEED)
    source = fullest(results(folder, "project-.*"), lambda s: len(speed_rows(s)), wanted)
    rows = speed_rows(source)
    slowest = max(per_entry(row) for _, row in rows)
    machine = source.content["machine"]
    lines = [
        "| projector | ms per sample and million parameters | times as fast |",
        "|---|---|---|",
        *(
            f"| {what} | {digits(1e9 * per_entry(row))} | {times(slowest / per_entry(row))} |"
            for what, row in rows
        ),
        "",
        f"{BATCH} float32 gradients at a time, to {COLS:,} dimensions, on {machine['threads']} "
        f"threads of {machine['cpu']} ({', '.join(isas(machine))}): "
        f"`{speed_command(source)}` ([result]({source.link})).",
    ]
    return "\n".join(lines)


def speed_command(source: Source) -> str:
    """The command of a result of bench.project."""
    options = source.content["options"]
    if options.get("acceptance"):
        return "python -m bench.project --acceptance"
    words = ["python -m bench.project"]
    for name in ("kind", "batch", "rows", "cols", "dtype"):
        value = options.get(name)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words.append(f"--{name} {' '.join(map(str, values))}")
    return " ".join(words)


def isas(machine: Row) -> list[str]:
    """The instruction sets of a machine, as a reader names them."""
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "amx_bf16": "AMX", "asimd": "NEON"}
    return [names[flag] for flag in machine["flags"] if flag in names][-1:] or ["no vectors"]


def digits(value: float) -> str:
    """Two significant digits, or the whole number."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def times(ratio: float) -> str:
    """How many times as fast as the slowest."""
    return f"{digits(ratio)}×"


# ---- LDS against seconds ------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A way to score: its seconds (geometric mean) and its LDS (mean) over the same problems."""

    provider: str
    k: int
    seconds: float
    lds: float


def lds_points(source: Source) -> tuple[list[Point], list[str], int]:
    """(points, problems, checkpoints) of a result of bench.lds, with the most checkpoints.

    The problems are those that every provider drawn has an LDS of, at each of its k. Where that
    leaves none, providers with the fewest problems go first.
    """
    rows = [row for row in source.content["rows"] if seconds_of(row) and "output" in row]
    rows = [row for row in rows if row["provider"] in SCORES]
    count = max((row["checkpoints"] for row in rows), default=0)
    by: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row["checkpoints"] == count:
            by.setdefault((row["provider"], row["k"]), {})[row["problem"]] = row
    while by and not set.intersection(*(set(found) for found in by.values())):
        del by[min(by, key=lambda key: len(by[key]))]
    problems = sorted(set.intersection(*(set(found) for found in by.values()))) if by else []
    order = list(SCORES)
    points = [
        Point(
            provider,
            k,
            geometric_mean(seconds_of(found[name]) for name in problems),
            mean(found[name]["output"] for name in problems),
        )
        for (provider, k), found in sorted(
            by.items(), key=lambda i: (order.index(i[0][0]), i[0][1])
        )
    ]
    return points, problems, count


def seconds_of(row: Row) -> float:
    """CPU seconds of a provider; 0 where they were not measured."""
    return float(row.get("seconds") or row.get("cpu_seconds") or 0.0)


def others_than_ours(source: Source) -> int:
    """How many ways to score a result can be drawn with, beside the default."""
    points = lds_points(source)[0]
    ours = any(point.provider == "default" for point in points)
    return len({point.provider for point in points} - {"default"}) if ours else 0


def lds_source(folder: Path) -> Source:
    """The result that is drawn."""
    wanted = "LDS and CPU seconds of TRAKer's default and another way to score"
    return fullest(results(folder, "lds"), others_than_ours, wanted)


def lds_seconds(folder: Path) -> str:
    """The picture, with its numbers as its text, and what it shows."""
    source = lds_source(folder)
    points, problems, count = lds_points(source)
    said = "; ".join(
        f"{SCORES[point.provider]}{f', k = {point.k}' if point.k else ''}: "
        f"{point.lds:.2f} in {digits(point.seconds)} s"
        for point in points
    )
    kept = {row["problem"] for row in source.content["rows"] if row.get("held_out")}
    held_out = " held-out" if set(problems) <= kept else ""
    return (
        f"![LDS against CPU seconds. {said}]({PICTURE})\n\n"
        "The [LDS](docs/evaluation.md) says how well scores predict the outputs of models that "
        f"are trained on other data. A point is the mean over {len(problems)}{held_out} problems, "
        f"with {count} checkpoint{'s' * (count > 1)} and gradients projected to k dimensions "
        f"(`python -m bench.lds`, [result]({source.link}))."
    )


def marker(source: Source, points: Sequence[Point]) -> str:
    """What a picture carries of its source: another result, or other numbers, make another."""
    rounded = [(SCORES[p.provider], p.k, f"{p.seconds:.3g}", f"{p.lds:.4f}") for p in points]
    digest = hashlib.sha256(json.dumps(rounded).encode()).hexdigest()[:16]
    return f"{source.path.name} {digest}"


def draw_lds(path: Path, source: Source) -> None:
    """The picture as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    points, _, count = lds_points(source)
    with plt.rc_context():
        plt.rcParams.update({"svg.hashsalt": "fastproj", "svg.fonttype": "path", "font.size": 9})
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        for place, provider in enumerate(dict.fromkeys(point.provider for point in points)):
            mine = [point for point in points if point.provider == provider]
            ours = provider == "default"
            axis.plot(
                [p.seconds for p in mine],
                [p.lds for p in mine],
                marker="o" if ours else "sD^vP*X"[place % 7],
                markersize=8 if ours else 6,
                linewidth=2.2 if ours else 1.2,
                color="#1a7f37" if ours else f"C{place}",
                label=SCORES[provider],
                zorder=3 if ours else 2,
            )
            for p in mine:
                if p.k:
                    axis.annotate(
                        f"k = {p.k}", (p.seconds, p.lds), textcoords="offset points", xytext=(7, -9)
                    )
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(f"CPU seconds of scoring with {count} checkpoints")
        axis.set_ylabel("linear datamodeling score")
        axis.margins(x=0.18, y=0.15)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", frameon=False, ncols=2)
        metadata = {"Date": None, "Description": marker(source, points)}
        figure.savefig(path, format="svg", metadata=metadata)
        plt.close(figure)


def is_drawn(path: Path, source: Source) -> bool:
    """Whether a picture is of a source, as far as what it carries says."""
    points, _, _ = lds_points(source)
    return path.exists() and marker(source, points) in path.read_text(encoding="utf-8")


# ---- LDS against trained models -----------------------------------------------------------------

CURVE_ROWS = {
    "TRAK": 'TRAK, `TRAKer(curvature="trak")`',
    "TracIn-style": "gradient inner products (TracIn-style)",
    "datamodels (ridge)": "datamodels (ridge on other random halves)",
}
CURVE_MODELS = (1, 5, 10, 20, 100, 500)


def lds_curve(folder: Path) -> str:
    """LDS against trained models: the picture beside a result, and some of its numbers."""
    found = results(folder, "lds-curve")
    if not found:
        raise NoResult("bench/results has no result of bench.lds_curve")
    source = found[0]
    (problem,) = source.content["problems"]
    known = {(p["method"], p["models"]): p["lds"] for p in problem["points"]}
    methods = [name for name in CURVE_ROWS if any(name == method for method, _ in known)]
    models = [count for count in CURVE_MODELS if any((m, count) in known for m in methods)]
    heads = [*map(str, models[:-1]), f"{models[-1]} models"]
    picture = f"![LDS against trained models](../{source.link.removesuffix('.json')}.png)"
    lines = [picture, "", f"| | {' | '.join(heads)} |", "|---" * (len(models) + 1) + "|"]
    for method in methods:
        cells = [f"{known[method, c]:.2f}" if (method, c) in known else "" for c in models]
        lines.append(f"| {CURVE_ROWS[method]} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- pages --------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Path], str]] = {
    "speed": speed,
    "lds-seconds": lds_seconds,
    "lds-curve": lds_curve,
}


def rewritten(text: str, folder: Path) -> str:
    """A page with its regions as they should be. Raises KeyError for a region of no figure."""
    return REGION.sub(lambda m: f"{m[1]}{FIGURES[m[2]](folder)}\n{m[3]}", text)


def out_of_date(root: Path = ROOT, folder: Path = RESULTS) -> list[str]:
    """The pages and pictures that aren't what the results say."""
    found = []
    for name in PAGES:
        text = (root / name).read_text(encoding="utf-8")
        if rewritten(text, folder) != text:
            found.append(name)
    if not is_drawn(root / PICTURE, lds_source(folder)):
        found.append(PICTURE)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite, or only look."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(argv)
    stale = out_of_date()
    for name in stale:
        print(f"{name}: {'out of date; make figures' if options.check else 'written'}")
        if options.check:
            continue
        path = ROOT / name
        if name == PICTURE:
            draw_lds(path, lds_source(RESULTS))
        else:
            text = path.read_text(encoding="utf-8")
            path.write_text(rewritten(text, RESULTS), encoding="utf-8")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
