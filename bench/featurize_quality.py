"""What a way to featurize is worth, beside what it costs: LDS against time.

    python -m bench.featurize_quality --costs bench/results/<day>-<commit>-featurize.json
    python -m bench.featurize_quality --quick      one problem, tiny sizes: a minute or two
    python -m bench.featurize_quality --again bench/results/<day>-<commit>-featurize-quality.json

The last draws what was measured before, measuring nothing, as a rule with other ``--costs``.

For dense and sparse matrices and factored gradients of rank 8 to 128, at each K: the LDS of
fastproj.TRAKer's defaults with its bootstrap interval, and the difference to the dense one with the
interval of a paired comparison, on a language model, a text classifier and a CNN of bench/battery.
Beside it the seconds of featurizing 1,000 samples, drawing for the Fisher matrix included, as a
multiple of a plain forward and backward of the same samples: a pass of one comes before each pass
of the other, and the median over checkpoints counts.

These models are tiny: most of their time is that of calls. ``--costs`` takes the times of a large
model from a result of bench.featurize, and the picture shows the LDS against these.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from tqdm import tqdm

from bench import lds_of_kinds
from bench.battery import PROBLEMS, training
from bench.battery.problem import Batch, Problem
from bench.battery.providers import traker
from bench.battery.providers.job import Job
from bench.lds_of_kinds import BASE
from bench.record import ROOT, end_with, write_result
from fastproj.commands.arguments import positive
from fastproj.trak.evaluation.metrics import lds

Row = dict[str, Any]

CHOSEN = ("docstring_words", "modules", "glyphs")  # a language model, a text classifier, a CNN
DIMS = (2048, 8192)
RANKS = (8, 16, 32, 64, 128)
PICTURE = ROOT / "docs" / "pictures" / "featurization.png"
MODEL = "gpt_36m"  # whose costs are shown
# Names in the tables -> (the outer matrix, options of TRAKer, the provider of bench.featurize).
WAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    BASE: ("rademacher", {}, "dense"),
    "sjlt": ("sjlt", {}, "sjlt"),
    **{f"factored {r}": ("sjlt", {"factored": r}, f"factored-{r}") for r in RANKS},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(argv)
    costs = costs_of(options.costs, options.model)
    if options.again is not None:
        places = summary(json.loads(options.again.read_text(encoding="utf-8"))["runs"], costs)
        print(table(places))
        if options.picture is not None:
            draw(places, options.model, options.picture)
        return 0
    rows: list[Row] = []
    for name in options.problem:
        problem = PROBLEMS[name](**({"n": 200, "targets": 20} if options.quick else {}))
        if options.quick:
            problem = problem.with_training(epochs=2)
        rows += measured(problem, options)
        report(rows, costs, options)  # after each problem: a run that is stopped leaves what it has
    print(report(rows, costs, options))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with their defaults filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one problem, tiny sizes")
    parser.add_argument("--problem", nargs="+", choices=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--dims", type=positive, nargs="+", metavar="K", help="2048 8192")
    parser.add_argument("--way", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", type=positive, default=1, help="matrices for each LDS: 1")
    parser.add_argument("--checkpoints", type=positive, metavar="M", help="5")
    parser.add_argument("--subsets", type=positive, metavar="S", help="random halves; 200")
    parser.add_argument(
        "--costs", type=Path, nargs="+", default=[], metavar="FILE", help="of bench.featurize"
    )
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="a result of this: draw it, measure nothing"
    )
    parser.add_argument("--model", default=MODEL, help=f"of --costs: {MODEL}")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="also draw there: docs/pictures/ as a rule"
    )
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument("--cache", type=Path, default=training.default_cache(), metavar="DIR")
    options = parser.parse_args(argv)
    quick = options.quick
    options.problem = options.problem or (["modules"] if quick else list(CHOSEN))
    options.dims = options.dims or ([64] if quick else list(DIMS))
    options.checkpoints = options.checkpoints or (2 if quick else 5)
    options.subsets = options.subsets or (20 if quick else 200)
    if options.picture is None and not (quick or options.no_write):
        options.picture = PICTURE
    return options


# ---- measuring ----------------------------------------------------------------------------------


def measured(problem: Problem, options: argparse.Namespace) -> Iterator[Row]:
    """A row for each K, way and seed of the matrix."""
    truth = training.ground_truth(problem, options.subsets, options.cache)
    outputs = truth.output.mean(0).numpy()  # [S, m]
    kept = training.checkpoints(problem, options.checkpoints, options.cache)
    cases = [
        (k, seed, way) for k in options.dims for seed in range(options.seeds) for way in options.way
    ]
    for k, seed, way in tqdm(cases, desc=problem.name, leave=False, disable=None):
        kind, extra, _ = WAYS[way]
        with tempfile.TemporaryDirectory() as folder:
            job = Job(problem, kept, [options.checkpoints], k, kind, folder)
            made = traker.make(job, {**extra, "projector_seed": seed})
            seconds, plain = zip(*passes(made, job), strict=True)
            scores = traker.score(made, job).finalize_scores("targets")
            found = lds(scores, truth.masks.numpy(), outputs)
        yield {
            "problem": problem.name,
            "n": problem.n,
            "parameters": sum(p.numel() for p in kept[0].values()),
            "k": k,
            "seed": seed,
            "kind": way,
            "mean": found.mean,
            "low": found.low,
            "high": found.high,
            "per_target": [round(float(r), 5) for r in found.per_target],
            "seconds": list(seconds),
            "plain_seconds": list(plain),
        }


def passes(made: Any, job: Job) -> Iterator[tuple[float, float]]:
    """Seconds of (featurizing, forward and backward) of all samples, for each checkpoint."""
    model = job.problem.model().eval()
    for model_id in range(len(job.checkpoints)):
        plain = timed(lambda: learn(job.problem, model, job.batches()))
        yield timed(partial(traker.featurize, made, job, model_id)), plain


def learn(problem: Problem, model: nn.Module, batches: Iterator[Batch]) -> None:
    """Forward and backward of the mean loss of each batch."""
    weights = dict(model.named_parameters())
    for batch in batches:
        model.zero_grad(set_to_none=True)
        problem.question.loss(model, weights, batch).backward()


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def costs_of(paths: Sequence[Path], model: str) -> dict[tuple[str, int], float]:
    """(way, K) -> times a plain forward and backward, of a model in results of bench.featurize."""
    found = [json.loads(path.read_text(encoding="utf-8"))["rows"] for path in paths]
    ways = {provider: way for way, (_, _, provider) in WAYS.items()}
    return {
        (ways[row["provider"]], row["proj_dim"]): row["times"]
        for rows in found
        for row in rows
        if row["workload"] == model and row["provider"] in ways and row["seconds"]
    }


# ---- reporting ----------------------------------------------------------------------------------


def report(
    rows: Sequence[Row], costs: dict[tuple[str, int], float], options: argparse.Namespace
) -> str:
    """The tables, written and drawn where that is wanted."""
    compared = lds_of_kinds.against_dense(rows)
    places = summary(rows, costs)
    parts = [lds_of_kinds.table_of(compared)] if compared else []
    text = "\n".join([*parts, table(places)])
    pictures = []
    if not options.no_write:
        settings = {name: getattr(options, name) for name in ("checkpoints", "subsets", "seeds")}
        runs = [{name: row[name] for name in row if name != "per_target"} for row in rows]
        content = {"settings": settings, "lds": compared, "runs": runs, "places": places}
        name = "featurize-quality-quick" if options.quick else "featurize-quality"
        path = write_result(name, content, text)
        pictures.append(path.with_suffix(".png"))
        text += f"\n\n{path}"
    pictures += [options.picture] if options.picture else []
    for picture in pictures:
        draw(places, options.model, picture)
        text += f"\n{picture}"
    return text


def summary(rows: Sequence[Row], costs: dict[tuple[str, int], float]) -> list[Row]:
    """For each problem, K and way: LDS and interval, means over seeds, and the cost."""
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["problem"], row["k"], row["kind"]), []).append(row)
    made = []
    for (problem, k, way), runs in groups.items():
        seconds = median(second for run in runs for second in run["seconds"])
        plain = median(second for run in runs for second in run["plain_seconds"])
        made.append(
            {
                "problem": problem,
                "k": k,
                "kind": way,
                **{
                    name: sum(run[name] for run in runs) / len(runs)
                    for name in ("mean", "low", "high")
                },
                "seconds": 1000 * seconds / runs[0]["n"],
                "times": seconds / plain,
                "large_times": costs.get((way, k)),
            }
        )
    return made


def table(places: Sequence[Row]) -> str:
    """A line for each problem, K and way."""
    lines = [
        f"\n{'problem':<18}{'K':>6}  {'way':<14}{'LDS (95% CI)':<25}{'s / 1000 samples':>17}"
        f"{'x plain':>9}{'x plain, large':>16}"
    ]
    for row in places:
        large = "" if row["large_times"] is None else f"{row['large_times']:.2f}"
        lines.append(
            f"{row['problem']:<18}{row['k']:>6}  {row['kind']:<14}{row['mean']:.3f} "
            f"({row['low']:.3f} to {row['high']:.3f})   {row['seconds']:>17.3f}"
            f"{row['times']:>9.2f}{large:>16}".rstrip()
        )
    return "\n".join(lines)


COLOURS = {2048: "#2f6fde", 8192: "#c2571a"}


def draw(places: Sequence[Row], model: str, path: Path) -> None:
    """LDS, a column for each problem, against a large model's cost; against seconds without one."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    problems = list(dict.fromkeys(row["problem"] for row in places))
    name, label = "seconds", "seconds of featurizing 1,000 samples"
    if any(row["large_times"] is not None for row in places):
        name, label = "large_times", f"cost on {model}, x forward + backward"
    size = 5.2 * len(problems), 4.2
    figure, axes = plt.subplots(1, len(problems), figsize=size, squeeze=False, layout="constrained")
    for axis, problem in zip(axes[0], problems, strict=True):
        some = [row for row in places if row["problem"] == problem and row[name] is not None]
        for k in dict.fromkeys(row["k"] for row in some):
            draw_line(axis, [row for row in some if row["k"] == k], name, k)
        axis.set_xlabel(label)
        axis.set_title(problem, fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="lower right")
    axes[0][0].set_ylabel("linear datamodeling score")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_line(axis: Any, rows: Sequence[Row], name: str, k: int) -> None:
    """The ways at one K: those that are factored joined, each point with its interval."""
    colour = COLOURS.get(k, "#444444")
    factored = [row for row in rows if row["kind"].startswith("factored")]
    axis.plot([r[name] for r in factored], [r["mean"] for r in factored], "-", color=colour, lw=1)
    for row in rows:
        reach = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        whole = row not in factored
        axis.errorbar(
            row[name],
            row["mean"],
            yerr=reach,
            fmt="s" if whole else "o",
            ms=6 if whole else 4,
            color=colour,
            elinewidth=0.8,
            label=f"K = {k}" if row is rows[0] else None,
        )
        short = {BASE: "dense"}.get(row["kind"], row["kind"].replace("factored ", "r = "))
        axis.annotate(
            short, (row[name], row["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7
        )


if __name__ == "__main__":
    end_with(main)
