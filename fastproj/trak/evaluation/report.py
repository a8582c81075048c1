"""A self-contained HTML page of TRAK scores: which training samples help and hurt each target."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastproj.trak.evaluation.metrics import LDS
from fastproj.trak.evaluation.passages import Passage, Weights, render_passage
from fastproj.trak.evaluation.pictures import Pictures, histogram, image, scatter
from fastproj.trak.evaluation.style import STYLE
from fastproj.trak.files import StoreError, make_dir, write_atomic
from fastproj.trak.store.scores import TopScores

TOKENS = (
    "passage, with token_scores; expected train_texts as lists of tokens, which make the text when "
    "joined"
)
OF_TRAIN = [f"train_{what}" for what in ("images", "labels", "texts", "rows")]
OF_TARGETS = [f"target_{what}" for what in ("images", "labels", "texts", "rows", "notes")]


@dataclass
class Page:
    """What a page shows. Everything but the scores is optional, and may be combined: images with
    texts are pairs, as those of CLIP.

    title, intro : of the page; a text below the title.
    scores : [n, m], training samples by targets, or TopScores (``finalize_scores`` with top_k).
    targets : which of the m targets to show, in order.
    top : how many training samples to show on each side of a target.
    train_images, target_images : [n, ...] and [m, ...], grey [H, W] or colour [H, W, 3], uint8, or
        floats that are scaled from their common range.
    train_texts, target_texts : n and m passages. A passage is a text, or a list of its tokens as
        strings, white space included: they make the text when joined.
    token_scores : what each token of a training sample adds to its score: [m, n, T], or a mapping
        from (target, training sample) to [T]. Entries of an array beyond a passage's last token are
        left out. Passages that a mapping lacks are shown without marks. ``train_texts`` must be
        tokens.
    train_rows, target_rows : n and m rows of a table, each of len(columns) values.
    columns : the names of the table's columns.
    train_labels, target_labels : n and m short texts or numbers.
    target_notes : a line for each of the m targets.
    lds, ceiling : how good the scores are, and the LDS that perfect ones would reach.
    facts : parameters and results of the run, as rows of a table.
    scatters : (title, x, y) of plots of predicted against measured outputs.
    lang : the language that the samples' texts are in, such as "en".
    """

    title: str
    scores: npt.NDArray[Any] | TopScores
    targets: Sequence[int]
    top: int = 8
    intro: str = ""
    train_images: npt.NDArray[np.generic] | None = None
    target_images: npt.NDArray[np.generic] | None = None
    train_texts: Sequence[Passage] | None = None
    target_texts: Sequence[Passage] | None = None
    token_scores: npt.NDArray[Any] | Mapping[tuple[int, int], npt.ArrayLike] | None = None
    train_rows: Sequence[Sequence[object]] | npt.NDArray[Any] | None = None
    target_rows: Sequence[Sequence[object]] | npt.NDArray[Any] | None = None
    columns: Sequence[str] = ()
    train_labels: Sequence[object] | None = None
    target_labels: Sequence[object] | None = None
    target_notes: Sequence[str] | None = None
    lds: LDS | None = None
    ceiling: float | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    scatters: Sequence[tuple[str, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = ()
    lang: str = "en"


def write_report(path: Path | str, page: Page) -> Path:
    """Write ``page`` to ``path``, in full or not at all; returns the path.

    Raises
    ------
    ValueError
        Where the parts of the page don't fit together.
    StoreError
        Where the file can't be written.
    """
    path = Path(path)
    check(page)
    make_dir(path.parent)
    if path.exists() and not path.is_file():  # a device would be replaced
        raise StoreError(f"can't write {path}, which is no file; expected the path of one")
    data = render(page).encode(errors="replace")  # half of a pair of surrogates is no letter
    write_atomic(path, lambda file: file.write(data), len(data))
    return path


def check(page: Page) -> None:
    """Raise ValueError where the parts of a page don't fit together."""
    if len(page.scores.shape) != 2:
        raise ValueError(
            f"report: received scores {list(page.scores.shape)}; expected [n_train, n_targets]"
        )
    n, m = page.scores.shape
    for name in (*OF_TRAIN, *OF_TARGETS):
        part, wanted = getattr(page, name), n if name in OF_TRAIN else m
        if part is not None and len(part) != wanted:
            raise ValueError(
                f"report: received {len(part)} {name} with scores [{n}, {m}]; expected {wanted}"
            )
    bad = [t for t in page.targets if not 0 <= t < m]
    if bad:
        raise ValueError(f"report: received target {bad[0]}; expected 0 <= target < {m}")
    if page.target_rows is not None and page.train_rows is None:
        raise ValueError("report: received target_rows alone; expected train_rows beside them")
    check_tokens(page)


def check_tokens(page: Page) -> None:
    """Raise ValueError where there are token scores of what has no tokens."""
    if page.token_scores is None:
        return
    if page.train_texts is None:
        raise ValueError(f"report: received no train_texts as {TOKENS}")
    if isinstance(page.token_scores, Mapping):
        return
    n, m = page.scores.shape
    shape = page.token_scores.shape
    if len(shape) != 3 or shape[:2] != (m, n):
        raise ValueError(
            f"report: received token_scores {list(shape)} with scores [{n}, {m}]; expected "
            f"[{m}, {n}, T]: targets, training samples, tokens"
        )


def render(page: Page) -> str:
    """The page as HTML."""
    parts: dict[str, Any] = {n: by_place(getattr(page, n)) for n in (*OF_TRAIN, *OF_TARGETS)}
    for name in ("train_images", "target_images"):
        parts[name] = None if parts[name] is None else Pictures(parts[name])
    page = replace(page, **parts)
    title = html.escape(page.title)
    head = [f"<h1>{title}</h1>"]
    if page.intro:
        head.append(f"<p>{html.escape(page.intro)}</p>")
    targets = list(dict.fromkeys(page.targets))  # each once: its section has a name
    links = "".join(f'<li><a href="#target-{t}">target {t}</a></li>' for t in targets)
    if len(targets) > 1:
        head.append(f'<nav aria-label="targets"><ul>{links}</ul></nav>')
    body = [] if page.lds is None else [render_lds(page)]
    body.append(
        '<section aria-labelledby="samples"><h2 id="samples">Most helpful and most harmful '
        "training samples</h2>"
    )
    body.append(
        '<p class="soft">A positive score: with this sample in the training set, the model\'s '
        "output for the target is expected to be higher. A negative one: lower. A classifier or a "
        "language model is then surer of the target, or less sure. A regression predicts a larger "
        "or a smaller number, which need not be nearer to the label or farther from it.</p>"
    )
    if page.token_scores is not None:
        body.append(
            '<p class="soft">Marked tokens add most to a score: <mark class="h3">underlined</mark> '
            'to help, <mark class="d3">dashed</mark> to harm; the darker, the more.</p>'
        )
    body += [render_target(page, target) for target in targets]
    body.append("</section>")
    if page.facts:
        rows = "".join(
            f'<tr><th scope="row">{html.escape(str(name))}</th>'
            f"<td>{html.escape(str(value))}</td></tr>"
            for name, value in page.facts.items()
        )
        body.append(
            f'<section aria-labelledby="run"><h2 id="run">The run</h2><table>{rows}</table>'
            "</section>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><header>"
        + "\n".join(head)
        + "</header>\n<main>"
        + "\n".join(body)
        + "</main></body></html>\n"
    )


def by_place(part: Any) -> Any:
    """A part whose [i] is that of sample i. In pandas it is what has the name i in its index."""
    if not hasattr(part, "iloc"):
        return part
    return list(part.itertuples(index=False)) if part.ndim == 2 else part.tolist()


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
        '<section aria-labelledby="lds"><h2 id="lds">Linear datamodeling score</h2>'
        '<div class="row"><div>'
        f'<div class="big">{lds.mean:.3f}</div><div class="soft">{lds.confidence:.0%} interval '
        f"{lds.low:.3f} to {lds.high:.3f}</div></div>"
        f"<p>Rank correlation between the output that the scores predict for models trained on "
        f"random subsets, and the output of {lds.n_subsets} subsets' models that were really "
        f"trained; mean over {len(lds.per_target)} targets.{ceiling}</p></div>"
        f'<div class="row">{"".join(plots)}</div></section>'
    )


def render_target(page: Page, target: int) -> str:
    """One target with its extremes."""
    helpful, harmful = extremes(page.scores, target, page.top)
    largest = largest_weight(page, target, [*helpful, *harmful])
    notes = []
    if page.target_labels is not None:
        notes.append(f"label {page.target_labels[target]}")
    if page.target_notes is not None:
        notes.append(page.target_notes[target])
    alt = ", ".join([f"target {target}", *notes])
    picture = image(page.target_images, target, alt)
    caption = "<br>".join(html.escape(note) for note in notes)
    if picture or caption:
        caption = f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
    if page.target_texts is not None:
        caption += in_language(page, render_passage(page.target_texts[target]))
    kind = "target" if page.train_texts is None else "target texts"
    only_rows = page.train_rows is not None and page.train_images is page.train_texts is None
    sides = ""
    if not only_rows:
        sides = render_side(page, target, helpful, "help", "most helpful", largest)
        sides += render_side(page, target, harmful, "hurt", "most harmful", largest)
    return (
        f'<section class="{kind}" aria-labelledby="target-{target}">'
        f'<h3 id="target-{target}" tabindex="-1">target {target}</h3>'
        + (f'<div class="question">{caption}</div>' if caption else "")
        + sides
        + render_rows(page, target, helpful, harmful)
        + "</section>"
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
        # among equal scores the lower number first, as in TopScores
        best, worst = (np.argsort(signed, kind="stable") for signed in (-column, column))
        sides = (best, column[best]), (worst, column[worst])
    helpful, harmful = (
        [(int(i), float(score)) for i, score in zip(inds[:count], values[:count], strict=True)]
        for inds, values in sides
    )
    return [s for s in helpful if s[1] > 0], [s for s in harmful if s[1] < 0]


def weights_of(page: Page, target: int, sample: int) -> Weights | None:
    """What the tokens of a training sample add to its score; None where nothing is known."""
    if page.token_scores is None or page.train_texts is None:
        return None
    passage = page.train_texts[sample]
    if isinstance(passage, str):
        raise ValueError(f"report: received the text {passage[:40]!r} as training {TOKENS}")
    count = len(passage)
    if isinstance(page.token_scores, Mapping):
        found = page.token_scores.get((target, sample))
        if found is None:
            return None
        weights = np.asarray(found, np.float64)
    else:
        weights = np.asarray(page.token_scores[target, sample, :count], np.float64)
    if weights.shape != (count,) or not np.isfinite(weights).all():
        raise ValueError(
            f"report: received token_scores {list(weights.shape)} of training sample {sample} for "
            f"target {target}; expected [{count}], one for each token, all finite"
        )
    return weights


def largest_weight(page: Page, target: int, samples: Samples) -> float:
    """The largest weight of a token among a target's samples, without its sign."""
    found = [weights_of(page, target, i) for i, _ in samples]
    return max((float(np.abs(w).max(initial=0)) for w in found if w is not None), default=0.0)


def in_language(page: Page, inner: str) -> str:
    """Passages, in their own language where that is another than the page's."""
    lang = "" if page.lang == "en" else f' lang="{html.escape(page.lang)}"'
    return f"<div{lang}>{inner}</div>"


def render_side(
    page: Page, target: int, samples: Samples, style: str, title: str, largest: float
) -> str:
    """Training samples with their scores, labels, images and texts."""
    items = []
    for i, score in samples:
        label = "" if page.train_labels is None else f"{html.escape(str(page.train_labels[i]))} · "
        alt = f"training sample {i}"
        if page.train_labels is not None:
            alt += f", label {page.train_labels[i]}"
        text = ""
        if page.train_texts is not None:
            weights = weights_of(page, target, i)
            text = in_language(page, render_passage(page.train_texts[i], weights, largest))
        items.append(
            f"<li><figure>{image(page.train_images, i, alt)}<figcaption>{label}#{i}<br>"
            f'<span class="{style}">{score:+.3g}</span></figcaption></figure>{text}</li>'
        )
    inner = f'<ul class="samples" role="list">{"".join(items)}</ul>'
    if not items:
        inner = '<p class="soft">none</p>'
    return f'<div class="side"><h4>{title}</h4>{inner}</div>'


def render_rows(page: Page, target: int, helpful: Samples, harmful: Samples) -> str:
    """A table of the target's row and those of its samples, wider than the page if need be."""
    if page.train_rows is None:
        return ""
    heads = "".join(f'<th scope="col">{html.escape(str(name))}</th>' for name in page.columns)
    rows = []
    if page.target_rows is not None:
        rows.append(
            '<tr><th scope="row">target</th><td></td>' + cells(page, page.target_rows[target])
        )
    for samples, style in ((helpful, "help"), (harmful, "hurt")):
        for i, score in samples:
            name = f"#{i}" if page.train_labels is None else f"#{i} · {page.train_labels[i]}"
            rows.append(
                f'<tr><th scope="row">{html.escape(name)}</th>'
                f'<td class="{style}">{score:+.3g}</td>' + cells(page, page.train_rows[i])
            )
    return (
        f'<p class="soft" id="rows-{target}">The row of target {target}, the most helpful and the '
        "most harmful samples.</p>"
        f'<div class="wide" role="region" aria-labelledby="rows-{target}" tabindex="0"><table>'
        f'<thead><tr><th scope="col">sample</th><th scope="col">score</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cells(page: Page, row: Sequence[object] | npt.NDArray[Any]) -> str:
    """The values of a row, and its end."""
    if len(row) != len(page.columns):
        raise ValueError(
            f"report: received a row of {len(row)} values with {len(page.columns)} columns; "
            "expected as many of one as of the other"
        )
    return "".join(f"<td>{html.escape(in_short(value))}</td>" for value in row) + "</tr>"


def in_short(value: object) -> str:
    """A value of a table; of numbers four digits are enough."""
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)
