"""Pictures of a report: images as inlined PNG files, plots as inlined SVG."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL = 64  # pixels: up to here, an image that is enlarged shows its pixels


class Pictures:
    """Pictures, whose common range is looked for once, in one after another: they may be mapped.

    images : an array, a tensor, or pictures of several sizes.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        return np.asarray(self.images[index])

    @cached_property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest value; NaN where there is one."""
        ends = [(p.min(), p.max()) for p in map(np.asarray, self.images) if p.size]
        lows, highs = np.asarray(ends, np.float64).T
        return float(lows.min()), float(highs.max())


def image(images: Any, index: int, alt: str) -> str:
    """An <img> of one picture, inlined; nothing where there are no pictures."""
    if images is None:
        return ""
    picture = to_uint8(images, index)
    encoded = base64.b64encode(png(picture)).decode()
    small = ' class="small"' if max(picture.shape) <= SMALL else ""
    return f'<img{small} alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'


def to_uint8(images: Any, index: int) -> npt.NDArray[np.uint8]:
    """Picture ``index`` as uint8 [H, W] or [H, W, 3]; floats are scaled from their common range."""
    images = images if isinstance(images, Pictures) else Pictures(images)
    picture = images[index]
    if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.shape[2] not in (1, 3):
        picture = np.moveaxis(picture, 0, 2)  # channels first, as torch has them
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[:, :, 0]
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
        raise ValueError(
            f"report: received an image of shape {list(picture.shape)}; expected [H, W], "
            "[H, W, 3] or [3, H, W]"
        )
    if picture.dtype.kind not in "biuf" or not picture.size:
        raise ValueError(
            f"report: received an image {list(picture.shape)} of dtype {picture.dtype}; expected "
            "uint8, or real numbers"
        )
    if picture.dtype == np.uint8:
        return picture
    low, high = images.span
    if not np.isfinite(high - low):  # all pictures would be black
        raise ValueError(
            f"report: received images with values from {low} to {high}; expected finite ones"
        )
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
    axis = f'<line class="axis" x1="10" x2="{width - 10}" y1="{base}" y2="{base}"/>'
    said = ""
    if len(values):
        low, middle, high = np.quantile(values, [0, 0.5, 1])
        said = f": from {low:.2f} to {high:.2f}, half of them above {middle:.2f}"
    return svg(width, height, bars + axis + ticks, caption, said)


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
    return svg(width, height, frame + dots, caption, f"; {len(x)} points, predicted and measured")


def svg(width: int, height: int, inner: str, caption: str, said: str) -> str:
    """A figure around an inline SVG; ``said`` is what a screen reader says after the caption."""
    return (
        f'<figure><svg role="img" aria-label="{html.escape(caption + said)}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">{inner}</svg>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
