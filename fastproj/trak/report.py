"""A self-contained HTML page of TRAK scores: which training samples help and hurt each target."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastproj.trak.files import write_atomic
from fastproj.trak.metrics import LDS
from fastproj.trak.writer import TopScores

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #ffffff; --soft: #667080;
  --line: #d5dae1; --panel: #f5f7f9; --good: #14733c; --bad: #b3261e; --mark: #2f6fde; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --back: #14171b; --soft: #98a2b0;
  --line: #343b45; --panel: #1d2127; --good: #5fce8e; --bad: #ff8a80; --mark: #82aaff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); }
.big { font-size: 1.9rem; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 1.2rem 2rem; align-items: flex-start; }
.target { border: 1px solid var(--line); background: var(--panel); border-radius: .5rem;
  padding: .8rem 1rem; margin: .8rem 0; display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; }
.samples { display: flex; flex-wrap: wrap; gap: .5rem; }
.side { flex: 1 1 20rem; }
.side h3 { font-size: .9rem; margin: 0 0 .3rem; font-weight: 600; }
figure { margin: 0; text-align: center; font-size: .78rem; line-height: 1.3;
  font-variant-numeric: tabular-nums; }
img { display: block; margin: 0 auto .15rem; height: 3.4rem; min-width: 3.4rem;
  image-rendering: pixelated; border: 1px solid var(--line); }
.target > figure img { height: 6.4rem; }
.help { color: var(--good); } .hurt { color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: .12rem 1.2rem .12rem 0; vertical-align: top; }
td:first-child { color: var(--soft); }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } svg .mark { fill: var(--mark); }
"""


@dataclass
class Page:
    """What a page shows. Images and labels are optional.

    scores : [n, m], training samples by targets, or TopScores (``finalize_scores`` with top_k).
    targets : which of the m targets to show, in order.
    train_images, target_images : [n, ...] and [m, ...], grey [H, W] or colour [H, W, 3], uint8, or
        floats that are scaled from their common range.
    train_labels, target_labels : n and m short texts or numbers.
    target_notes : a line for each of the m targets.
    facts : parameters and results of the run, as rows of a table.
    scatters : (title, x, y) of plots of predicted against measured outputs.
    """

    title: str
    scores: npt.NDArray[Any] | TopScores
    targets: Sequence[int]
    top: int = 8
    intro: str = ""
    train_images: npt.NDArray[np.generic] | None = None
    target_images: npt.NDArray[np.generic] | None = None
    train_labels: Sequence[object] | None = None
    target_labels: Sequence[object] | None = None
    target_notes: Sequence[str] | None = None
    lds: LDS | None = None
    ceiling: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    scatters: Sequence[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = ()


def write_report(path: Path | str, page: Page) -> Path:
    """Write ``page`` to ``path``, in full or not at all; returns the path."""
    path = Path(path)
    check(page)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = render(page).encode()
    write_atomic(path, lambda file: file.write(data), len(data))
    return path


def check(page: Page) -> None:
    """Raise ValueError where the parts of a page don't fit together."""
    if len(page.scores.shape) != 2:
        raise ValueError(
            f"report: received scores {list(page.scores.shape)}; expected [n_train, n_targets]"
        )
    n, m = page.scores.shape
    for name, part, wanted in (
        ("train_images", page.train_images, n),
        ("train_labels", page.train_labels, n),
        ("target_images", page.target_images, m),
        ("target_labels", page.target_labels, m),
        ("target_notes", page.target_notes, m),
    ):
        if part is not None and len(part) != wanted:
            raise ValueError(
                f"report: received {len(part)} {name} with scores [{n}, {m}]; expected {wanted}"
            )
    bad = [t for t in page.targets if not 0 <= t < m]
    if bad:
        raise ValueError(f"report: received target {bad[0]}; expected 0 <= target < {m}")


def render(page: Page) -> str:
    """The page as HTML."""
    title = html.escape(page.title)
    body = [f"<h1>{title}</h1>"]
    if page.intro:
        body.append(f"<p>{html.escape(page.intro)}</p>")
    if page.lds is not None:
        body.append(render_lds(page))
    body.append("<h2>Most helpful and most harmful training samples</h2>")
    body.append(
        '<p class="soft">A positive score: with this sample in the training set, the model is '
        "expected to be surer of the target's label. A negative one: less sure.</p>"
    )
    body += [render_target(page, target) for target in page.targets]
    if page.facts:
        rows = "".join(
            f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
            for name, value in page.facts.items()
        )
        body.append(f"<h2>The run</h2><table>{rows}</table>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def render_lds(page: Page) -> str:
    """The score of the scores, how it spreads over targets, and the scatter plots."""
    lds = page.lds
    assert lds is not None
    ceiling = (
        ""
        if page.ceiling is None
        else f" A perfect prediction would reach about {page.ceiling:.2f}: the rest is the "
        "randomness of training."
    )
    spread = lds.per_target[np.isfinite(lds.per_target)]
    plots = [histogram(spread, "targets by their rank correlation")]
    plots += [scatter(x, y, name) for name, x, y in page.scatters]
    return (
        '<h2>Linear datamodeling score</h2><div class="row"><div>'
        f'<div class="big">{lds.mean:.3f}</div><div class="soft">{lds.confidence:.0%} interval '
        f"{lds.low:.3f} to {lds.high:.3f}</div></div>"
        f"<p>Rank correlation between the output that the scores predict for models trained on "
        f"random subsets, and the output of {lds.n_subsets} subsets' models that were really "
        f"trained; mean over {len(lds.per_target)} targets.{ceiling}</p></div>"
        f'<div class="row">{"".join(plots)}</div>'
    )


def render_target(page: Page, target: int) -> str:
    """One target with its extremes."""
    helpful, harmful = extremes(page.scores, target, page.top)
    notes = [f"target {target}"]
    if page.target_labels is not None:
        notes.append(f"label {page.target_labels[target]}")
    if page.target_notes is not None:
        notes.append(page.target_notes[target])
    picture = image(page.target_images, target)
    return (
        f'<div class="target"><figure>{picture}<figcaption>'
        f"{'<br>'.join(html.escape(note) for note in notes)}</figcaption></figure>"
        + render_side(page, helpful, "help", "most helpful")
        + render_side(page, harmful, "hurt", "most harmful")
        + "</div>"
    )


Samples = list[tuple[int, float]]  # (training sample, score)


def extremes(
    scores: npt.NDArray[Any] | TopScores, target: int, count: int
) -> tuple[Samples, Samples]:
    """The ``count`` most helpful and most harmful samples of a target, with their scores."""
    if isinstance(scores, TopScores):
        sides = (
            (scores.helpful_indices[target], scores.helpful_scores[target]),
            (scores.harmful_indices[target], scores.harmful_scores[target]),
        )
    else:
        column = np.asarray(scores[:, target], np.float64)
        wrong = np.flatnonzero(~np.isfinite(column))
        if len(wrong):
            raise ValueError(
                f"report: received the score {column[wrong[0]]} of sample {wrong[0]} for target "
                f"{target}; expected finite scores"
            )
        order = np.argsort(-column, kind="stable")
        sides = (order, column[order]), (order[::-1], column[order[::-1]])
    helpful, harmful = (
        [(int(i), float(score)) for i, score in zip(inds[:count], values[:count], strict=True)]
        for inds, values in sides
    )
    return [s for s in helpful if s[1] > 0], [s for s in harmful if s[1] < 0]


def render_side(page: Page, samples: Samples, style: str, title: str) -> str:
    """Training samples with their scores and labels."""
    figures = []
    for i, score in samples:
        label = "" if page.train_labels is None else f"{html.escape(str(page.train_labels[i]))} · "
        figures.append(
            f"<figure>{image(page.train_images, i)}<figcaption>{label}#{i}<br>"
            f'<span class="{style}">{score:+.3g}</span></figcaption></figure>'
        )
    inner = "".join(figures) or '<span class="soft">none</span>'
    return f'<div class="side"><h3>{title}</h3><div class="samples">{inner}</div></div>'


# ---- pictures -----------------------------------------------------------------------------------


def image(images: npt.NDArray[np.generic] | None, index: int) -> str:
    """An <img> of one picture, inlined; nothing where there are no pictures."""
    if images is None:
        return ""
    encoded = base64.b64encode(png(to_uint8(images, index))).decode()
    return f'<img alt="sample {index}" src="data:image/png;base64,{encoded}">'


def to_uint8(images: npt.NDArray[np.generic], index: int) -> npt.NDArray[np.uint8]:
    """Picture ``index`` as uint8 [H, W] or [H, W, 3]; floats are scaled from their common range."""
    picture = np.asarray(images[index])
    if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.shape[2] not in (1, 3):
        picture = np.moveaxis(picture, 0, 2)  # channels first, as torch has them
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
        raise ValueError(
            f"report: received an image of shape {list(picture.shape)}; expected [H, W], "
            "[H, W, 3] or [3, H, W]"
        )
    if picture.dtype == np.uint8:
        return picture
    low, high = float(np.min(images)), float(np.max(images))
    scaled = (picture.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.rint(255 * scaled).astype(np.uint8)


def png(picture: npt.NDArray[np.uint8]) -> bytes:
    """An 8-bit PNG of [H, W] grey or [H, W, 3] colour (PNG specification, section 5)."""
    height, width = picture.shape[:2]
    colour_type = 2 if picture.ndim == 3 else 0
    lines = np.ascontiguousarray(picture).reshape(height, -1)
    raw = b"".join(b"\0" + line.tobytes() for line in lines)  # filter 0 before each line

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )


def histogram(values: npt.NDArray[np.float64], caption: str, bins: int = 20) -> str:
    """An inline SVG histogram over -1..1."""
    width, height, base = 320, 150, 122
    counts, edges = np.histogram(values, bins=bins, range=(-1, 1))
    unit = (base - 10) / max(1, counts.max())
    step = (width - 20) / bins
    bars = "".join(
        f'<rect class="mark" x="{10 + i * step + 1:.1f}" y="{base - c * unit:.1f}" '
        f'width="{step - 2:.1f}" height="{c * unit:.1f}"><title>{edges[i]:.1f} to '
        f"{edges[i + 1]:.1f}: {c}</title></rect>"
        for i, c in enumerate(counts)
    )
    ticks = "".join(
        f'<text x="{10 + (width - 20) * (v + 1) / 2:.0f}" y="{base + 14}" '
        f'text-anchor="middle">{v:g}</text>'
        for v in (-1, -0.5, 0, 0.5, 1)
    )
    return svg(
        width,
        height,
        f'{bars}<line class="axis" x1="10" x2="{width - 10}" y1="{base}" y2="{base}"/>{ticks}',
        caption,
    )


def scatter(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], caption: str) -> str:
    """An inline SVG scatter plot; predicted to the right, measured upwards."""
    width, height = 220, 150

    def place(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.float64]:
        span = float(np.ptp(values)) or 1.0
        return low + (values - values.min()) / span * (high - low)

    dots = "".join(
        f'<circle class="mark" fill-opacity=".6" cx="{a:.1f}" cy="{b:.1f}" r="2"/>'
        for a, b in zip(place(x, 26, width - 8), place(y, height - 26, 8), strict=True)
    )
    frame = (
        f'<path class="axis" fill="none" d="M20 4V{height - 20}H{width - 4}"/>'
        f'<text x="{width - 4}" y="{height - 6}" text-anchor="end">predicted</text>'
        f'<text x="14" y="8" transform="rotate(-90 14 8)" text-anchor="end">measured</text>'
    )
    return svg(width, height, frame + dots, caption)


def svg(width: int, height: int, inner: str, caption: str) -> str:
    """A figure around an inline SVG."""
    return (
        f'<figure><svg role="img" aria-label="{html.escape(caption)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{inner}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
