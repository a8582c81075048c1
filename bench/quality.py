"""How good a projection of each kind is: distortion beside theory, and the LDS of TRAK scores.

    python -m bench.quality             all of it
    python -m bench.quality --quick     small sizes: about a minute

Kinds are rademacher, gaussian, and sjlt with 1 to 16 entries a row (blocks K .. K / 16). Distortion
is measured on vectors of several structures; bench/distortion.py states and derives the theory. The
LDS is of fastproj.TRAKer as it comes, on the problems of bench/battery, with the same
checkpoints for all kinds. No speed is measured: it may run beside other work.

The command fails where a measured variance is not what theory says.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import distortion, lds_of_kinds
from bench.battery import PROBLEMS, training
from bench.record import end_with, write_result
from fastproj.commands.arguments import positive

ROWS = 16384  # P of the vectors, zeros behind those that are shorter
DISTORTION_COLS = (512, 2048)
LDS_COLS = (512, 2048, 8192)
RUN = ("problem", "k", "kind", "seed", "mean", "low", "high")  # what a result keeps of an LDS


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rows", type=positive, metavar="P", help=f"of the vectors: {ROWS}")
    parser.add_argument("--cols", type=positive, nargs="+", metavar="K", help="512 2048")
    parser.add_argument("--draws", type=positive, help="matrices of each kind: 300")
    parser.add_argument("--vectors", type=positive, default=16, help="of a family in each draw: 16")
    parser.add_argument("--problem", nargs="*", choices=list(PROBLEMS), help="of the LDS")
    parser.add_argument("--dims", type=positive, nargs="+", metavar="K", help="of the LDS")
    parser.add_argument("--seeds", type=positive, default=1, help="matrices for each LDS: 1")
    parser.add_argument("--checkpoints", type=positive, default=5, metavar="M")
    parser.add_argument("--subsets", type=positive, metavar="S", help="random halves; 120")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="LDS rows are kept there, and not measured again"
    )
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    parser.add_argument("--cache", type=Path, default=training.default_cache(), metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 where distortion and theory disagree."""
    options = build_parser().parse_args(argv)
    quick = options.quick
    said: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    families: dict[str, distortion.Family] = {
        **distortion.FAMILIES,
        "real gradients": distortion.real_gradients(epochs=10 if quick else None),
    }
    of_vectors: list[dict[str, Any]] = []
    draws = options.draws or (40 if quick else 300)
    for cols in options.cols or ([512] if quick else DISTORTION_COLS):
        rows = options.rows or (4096 if quick else ROWS)
        found = distortion.measure(families, rows, cols, draws, options.vectors)
        of_vectors += found
        say(distortion.table_of(found, "norm"))
        say(distortion.table_of(found, "inner"))
    of_scores = measure_lds(options)
    compared = lds_of_kinds.against_dense(of_scores)
    if compared:
        say(lds_of_kinds.table_of(compared))
    faults = [fault for row in of_vectors for fault in distortion.disagrees(row)]
    for fault in faults:
        say(f"DISAGREES {fault}")
    if not options.no_write:
        content = {
            "draws": draws,
            "vectors": options.vectors,
            "distortion": of_vectors,
            "lds": compared,
            "lds_runs": [{k: r[k] for k in RUN} for r in of_scores],
        }
        path = write_result("quality-quick" if quick else "quality", content, "\n".join(said))
        picture = path.with_suffix(".png")
        draw(of_vectors, compared, picture)
        print(f"\n{path}\n{picture}")
    return 1 if faults else 0


def measure_lds(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of lds_of_kinds.scored for every problem; those in ``--log`` are taken from there."""
    names = options.problem
    if names is None:
        names = ["wine"] if options.quick else list(PROBLEMS)
    dims = options.dims or ((512,) if options.quick else LDS_COLS)
    subsets = options.subsets or (30 if options.quick else 120)
    rows = read_log(options.log)
    for name in names:
        problem = PROBLEMS[name]()
        if options.quick:
            problem = problem.with_training(epochs=problem.training.epochs // 3)
        setting = {
            "data": problem.fingerprint(),
            "checkpoints": options.checkpoints,
            "subsets": subsets,
        }
        known = {(r["k"], r["seed"], r["kind"]) for r in rows if r["setting"] == setting}
        for row in lds_of_kinds.scored(
            problem,
            dims,
            range(options.seeds),
            options.checkpoints,
            subsets,
            options.cache,
            known=known,
        ):
            rows.append({**row, "setting": setting})
            if options.log is not None:
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def read_log(path: Path | None) -> list[dict[str, Any]]:
    """The rows that a run before this one has written."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


COLOURS = {
    "rademacher": "#444444",
    "gaussian": "#a9a9a9",
    "sjlt 1": "#c2571a",
    "sjlt 2": "#e09b3d",
    "sjlt 4": "#2f6fde",
    "sjlt 8": "#4d8f4d",
    "sjlt 16": "#8a5fbf",
}


def draw(
    of_vectors: Sequence[dict[str, Any]], compared: Sequence[dict[str, Any]], path: Path
) -> None:
    """Variance and tails by family at the smallest K, and the difference in LDS, as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cols = min(row["cols"] for row in of_vectors)
    shown = [row for row in of_vectors if row["cols"] == cols]
    families = list(dict.fromkeys(row["family"] for row in shown))
    kinds = list(dict.fromkeys(row["kind"] for row in shown))
    figure, axes = plt.subplots(
        1, 3, figsize=(15, 5), layout="constrained", width_ratios=(1, 1, 1.15)
    )
    for axis, part, title in (
        (axes[0], "measured", f"variance of |aR|²/|a|² over 2/K, K = {cols}\n(bars: theory)"),
        (axes[1], "tail", "99.9 % of its errors are below\nso many sqrt(2/K)"),
    ):
        for place, kind in enumerate(kinds):
            rows = [row for row in shown if row["kind"] == kind]
            y = [families.index(row["family"]) + 0.11 * (place - 3) for row in rows]
            if part == "measured":
                axis.barh(
                    y, [r["norm"]["theory"] for r in rows], 0.1, color=COLOURS[kind], alpha=0.3
                )
            x = [row["norm"][part] for row in rows]
            axis.plot(x, y, "o", ms=4, color=COLOURS[kind], label=kind)
        axis.set_yticks(range(len(families)), families if axis is axes[0] else [""] * len(families))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.25)
    axes[1].legend(fontsize=8, loc="lower right")
    draw_lds(axes[2], compared)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_lds(axis: Any, compared: Sequence[dict[str, Any]]) -> None:
    """The difference to dense Rademacher, a line for each problem and K."""
    places = list(dict.fromkeys((row["problem"], row["k"]) for row in compared))
    for offset, kind in enumerate(COLOURS):
        rows = [row for row in compared if row["kind"] == kind and kind != lds_of_kinds.BASE]
        y = [places.index((row["problem"], row["k"])) + 0.11 * (offset - 3) for row in rows]
        x = [row["difference"] for row in rows]
        reach = [
            [row["difference"] - row["difference_low"] for row in rows],
            [row["difference_high"] - row["difference"] for row in rows],
        ]
        axis.errorbar(x, y, xerr=reach, fmt="o", ms=3, lw=1, color=COLOURS[kind])
    axis.axvline(0, color="#444444", lw=1)
    axis.set_yticks(
        range(len(places)), [f"{problem}, K = {k}" for problem, k in places], fontsize=8
    )
    axis.invert_yaxis()
    axis.set_title("LDS minus that of dense Rademacher (95 %)", fontsize=10)
    axis.grid(axis="x", alpha=0.25)


if __name__ == "__main__":
    end_with(main)
