"""The HTML page: self-contained, well-formed, showing what the scores say."""

from __future__ import annotations

import base64
import re
import struct
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from fastproj.commands.report import main
from fastproj.trak import lds
from fastproj.trak.report import Page, png, render, to_uint8, write_report
from tests.trak import cases

VOID = {"meta", "img", "br"}  # HTML elements without an end tag that the page uses


class Checker(HTMLParser):
    """Collects attributes and text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.tags, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attr) for attr in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page(**options):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 6)).astype(np.float32)
    masks = rng.random((30, 40)) < 0.5
    measured = masks @ scores + rng.normal(size=(30, 6))
    return Page(
        **{
            "title": "A & B <c>",
            "scores": scores,
            "targets": [4, 1],
            "top": 3,
            "train_images": rng.integers(0, 256, (40, 8, 8)).astype(np.uint8),
            "target_images": rng.random((6, 3, 5, 7)),
            "train_labels": [f"<{i}>" for i in range(40)],
            "target_labels": list(range(6)),
            "target_notes": ["a note & more"] * 6,
            "lds": lds(scores, masks, measured),
            "ceiling": 0.87,
            "facts": {"seed": 0, "model": "<net>"},
            "scatters": [("target 1", measured[:, 1], (masks @ scores)[:, 1])],
            **options,
        }
    )


def test_page_refers_to_nothing_outside():
    text = render(page())
    checked = Checker(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(checked.tags)
    for tag, name, value in checked.attributes:
        assert name not in {"href", "srcset", "onload", "style"}, (tag, name)
        if name == "src":
            assert value.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert 'charset="utf-8"' in text
    assert "prefers-color-scheme: dark" in text
    assert "color-scheme: light dark" in text


def test_texts_are_escaped():
    text = render(page())
    assert "<c>" not in text
    assert "<net>" not in text
    assert not re.search(r"<\d", text)
    assert "A & B <c>" in Checker(text).text


def test_each_target_shows_its_extremes_in_order():
    shown = page()
    text = Checker(render(shown)).text
    blocks = re.split(r"target (?=\d+label)", text)[1:]
    assert [block[0] for block in blocks] == ["4", "1"]
    for block, target in zip(blocks, shown.targets, strict=True):
        column = shown.scores[:, target]
        order = np.argsort(-column)
        wanted = [*order[:3], *order[::-1][:3]]
        assert [int(i) for i in re.findall(r"#(\d+)", block)] == wanted
        found = [float(s) for s in re.findall(r"#\d+([+-][\d.e-]+)", block)]
        np.testing.assert_allclose(found, column[wanted], rtol=6e-3)


def test_lds_and_its_interval_are_there():
    shown = page()
    text = Checker(render(shown)).text
    assert f"{shown.lds.mean:.3f}" in text
    assert f"{shown.lds.low:.3f} to {shown.lds.high:.3f}" in text
    assert "about 0.87" in text


def test_only_scores_will_do():
    text = render(Page("bare", page().scores, [0]))
    assert "<img" not in text
    Checker(text)


def test_no_side_shows_samples_of_the_wrong_sign():
    scores = np.array([[1.0], [2.0], [0.0]], np.float32)
    text = Checker(render(Page("one-sided", scores, [0]))).text
    assert text.rstrip().endswith("most helpful#1+2#0+1most harmfulnone")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": np.zeros(4)}, r"scores \[4\]"),
        ({"train_images": np.zeros((39, 8, 8))}, "39 train_images"),
        ({"target_labels": [1]}, "1 target_labels"),
        ({"targets": [6]}, "target 6; expected 0 <= target < 6"),
        ({"train_images": np.zeros((40, 8, 8, 5))}, r"shape \[8, 8, 5\]"),
    ],
)
def test_parts_that_do_not_fit_leave_no_file(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "page.html", page(**wrong))
    assert not list(tmp_path.iterdir())


def read_png(data):
    """The pixels of an 8-bit PNG without filters, and its colour type (PNG specification)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (crc,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    lines = lines.reshape(height, 1 + width * channels)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape((height, width) if channels == 1 else (height, width, 3))


@pytest.mark.parametrize("shape", [(1, 1), (8, 5), (3, 4, 3)])
def test_png_round_trip(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(read_png(png(picture)), picture)


def test_pictures_of_torch_and_of_floats():
    images = np.linspace(-1, 1, 2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    picture = to_uint8(images, 1)
    assert picture.shape == (5, 7, 3)
    assert picture.max() == 255
    assert picture.min() >= 127  # scaled by the range of all pictures, not of this one
    assert to_uint8(np.zeros((2, 1, 8, 8)), 0).shape == (8, 8)
    source = re.search(r'base64,([^"]+)"', render(page())).group(1)
    assert read_png(base64.b64decode(source)).shape == (5, 7, 3)


def test_command(tmp_path, capsys):
    shown = page()
    np.save(tmp_path / "scores.npy", shown.scores)
    np.save(tmp_path / "images.npy", shown.train_images)
    out = tmp_path / "out" / "page.html"
    arguments = [str(tmp_path / "scores.npy"), "--out", str(out), "--targets", "2", "3"]
    assert main([*arguments, "--train-images", str(tmp_path / "images.npy")]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Checker(out.read_text()).tags.count("img") == 2 * 2 * 8
    assert main([str(tmp_path / "missing.npy")]) == 1
    assert "missing.npy" in capsys.readouterr().err
    assert main([*arguments, "--train-labels", str(tmp_path / "images.npy"), "--top", "0"]) == 0


def test_extremes_make_the_same_page_as_all_scores(tmp_path, capsys):
    """A run's scores and its top scores, as files."""
    models = [cases.net(0)]
    train, targets = cases.data(20), cases.data(4, seed=5)
    cases.whole_run(tmp_path, models, train, targets)
    traker = cases.make(models[0], tmp_path, 20)
    traker.finalize_scores("test", top_k=3)
    pages = []
    for name in ("test.mmap", "test.top.safetensors"):
        arguments = [str(tmp_path / "scores" / name), "--top", "3", "--title", "same"]
        out = tmp_path / f"{name}.html"
        assert main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().err
        pages.append(out.read_text().replace(name, "file"))
    assert pages[0] == pages[1]
    assert pages[0].count('class="target"') == 4


def test_damaged_or_wrong_score_files_are_named(tmp_path, capsys):
    cases.whole_run(tmp_path, [cases.net(0)], cases.data(20), cases.data(4, seed=5))
    path = tmp_path / "scores" / "test.mmap"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    np.save(tmp_path / "line.npy", np.zeros(5))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name, message in (
        ("scores/test.mmap", "is damaged"),
        ("nan.npy", "the score nan of sample 0 for target 0"),
        ("line.npy", "holds [5] float64; expected scores [n, m]"),
        ("empty.npy", "can't read scores from"),
    ):
        out = tmp_path / "page.html"
        assert main([str(tmp_path / name), "--out", str(out)]) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()
