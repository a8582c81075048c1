"""The HTML page: self-contained, well-formed, showing what the scores say."""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastproj.commands.report import main
from fastproj.trak import StoreError, read_top_scores
from fastproj.trak.distributed import Ranks
from fastproj.trak.evaluation import passages
from fastproj.trak.evaluation.pictures import png, to_uint8
from fastproj.trak.evaluation.report import Page, render, write_report
from fastproj.trak.evaluation.style import DARK, LIGHT
from fastproj.trak.store.scores import TopWriter
from tests.trak import cases
from tests.trak.evaluation.pages import FACTS, PAGES, image_page, pair_page, table_page, text_page

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


@pytest.mark.parametrize("kind", PAGES)
def test_page_refers_to_nothing_outside(kind):
    text = render(PAGES[kind]())
    checked = Checker(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(checked.tags)
    names = {value for _, name, value in checked.attributes if name == "id"}
    for tag, name, value in checked.attributes:
        assert name not in {"srcset", "onload", "style"}, (tag, name)
        if name == "src":
            assert value.startswith("data:image/png;base64,")
        if name == "href":
            assert value.startswith("#")
            assert value[1:] in names
        if name in ("aria-labelledby", "aria-describedby"):
            assert value in names
    assert len(names) == sum(name == "id" for _, name, _ in checked.attributes)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub('base64,[^"]*', "", text))
    assert 'charset="utf-8"' in text
    assert "prefers-color-scheme: dark" in text
    assert "color-scheme: light dark" in text


@pytest.mark.parametrize("kind", PAGES)
def test_structure_for_those_who_do_not_see(kind):
    """Landmarks, headings that skip no level, and a text for every picture."""
    checked = Checker(render(PAGES[kind]()))
    assert [checked.tags.count(tag) for tag in ("header", "main", "nav", "h1")] == [1, 1, 1, 1]
    levels = [int(tag[1]) for tag in checked.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    alts = [value for tag, name, value in checked.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == checked.tags.count("img")
    assert all(re.match(r"(target|training sample) \d", alt) for alt in alts)
    plots = [v for tag, name, v in checked.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(plots) == checked.tags.count("svg")
    assert ("lang", "en") in {(name, value) for _, name, value in checked.attributes}


def luminance(colour):
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(colours):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for back in ("back", "panel"):
        for text in ("text", "soft", "good", "bad", "mark"):
            assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    marks = [name for name in colours if name[1:].isdigit()]
    assert len(marks) == 2 * passages.LEVELS
    for back in marks:
        assert contrast(colours["text"], colours[back]) >= 4.5, back
    for sign in "hd":  # the more a token matters, the further its mark is from the page
        away = [contrast(colours[f"{sign}{n}"], colours["back"]) for n in range(1, 5)]
        assert away == sorted(away)


def test_texts_are_escaped():
    text = render(image_page())
    assert "<c>" not in text
    assert "<net>" not in text
    assert not re.search(r"<\d", text)
    assert "A & B <c>" in Checker(text).text


def test_each_target_shows_its_extremes_in_order():
    shown = image_page()
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


def test_a_target_that_is_named_twice_is_shown_once():
    text = render(image_page(targets=[4, 1, 4]))
    assert re.findall(r'<h3 id="target-(\d)"', text) == ["4", "1"]


def test_lds_and_its_interval_are_there():
    shown = image_page()
    text = Checker(render(shown)).text
    assert f"{shown.lds.mean:.3f}" in text
    assert f"{shown.lds.low:.3f} to {shown.lds.high:.3f}" in text
    assert "about 0.87" in text


def test_only_scores_will_do():
    text = render(Page("bare", image_page().scores, [0]))
    assert "<img" not in text
    assert "A regression predicts a larger or a smaller number" in Checker(text).text


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
        ({"train_texts": ["a"]}, "1 train_texts"),
        ({"target_rows": [[1]]}, "1 target_rows"),
        ({"target_rows": [[1]] * 6}, "target_rows alone; expected train_rows beside them"),
        ({"train_rows": [[1, 2]] * 40, "columns": ["a"]}, "a row of 2 values with 1 columns"),
        ({"token_scores": np.zeros((6, 40, 3))}, "no train_texts as passage, with token_scores"),
        (
            {"train_texts": ["a text"] * 40, "token_scores": np.zeros((6, 40, 3))},
            "the text 'a text' as training passage, with token_scores; expected train_texts as",
        ),
        (
            {"train_texts": [["a", "b"]] * 40, "token_scores": np.zeros((40, 6, 3))},
            r"token_scores \[40, 6, 3\] with scores \[40, 6\]; expected \[6, 40, T\]",
        ),
        (
            {"train_texts": [["a", "b"]] * 40, "token_scores": np.zeros((6, 40, 1))},
            r"token_scores \[1\] of training sample \d+ for target 4; expected \[2\]",
        ),
        (
            {"train_texts": [["a", "b"]] * 40, "token_scores": np.full((6, 40, 2), np.nan)},
            "one for each token, all finite",
        ),
        ({"train_images": np.zeros((40, 8, 8, 5))}, r"shape \[8, 8, 5\]"),
    ],
)
def test_parts_that_do_not_fit_leave_no_file(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "page.html", image_page(**wrong))
    assert not list(tmp_path.iterdir())


def test_parts_in_pandas_go_by_place_and_not_by_their_index():
    """As of rows that were shuffled before they became a training set."""
    pandas = pytest.importorskip("pandas")
    n, order = 40, np.random.default_rng(0).permutation(40)
    parts = {
        "train_labels": [f"label-{i}" for i in range(n)],
        "train_texts": [f"text-{i}" for i in range(n)],
    }
    rows = {"year": list(range(1_234_500, 1_234_500 + n)), "size": np.linspace(0, 1, n)}
    expected = render(
        image_page(**parts, columns=list(rows), train_rows=list(zip(*rows.values(), strict=True)))
    )
    series = {name: pandas.Series(part, index=order) for name, part in parts.items()}
    frame = pandas.DataFrame(rows, index=order)
    assert render(image_page(**series, columns=list(frame), train_rows=frame)) == expected


# ---- passages, pairs, tables --------------------------------------------------------------------


def marks_of(text):
    """(class, token) of each marked token."""
    return re.findall(r'<mark class="(\w+)" title="[^"]*">([^<]*)</mark>', text)


def test_tokens_that_matter_are_marked_by_sign_and_size():
    words = ["All", " cats", " are", " grey", ".", " "]
    weights = np.array([0.1, 1.0, 0.4, -0.6, -0.01, 5.0])
    text = passages.render_passage(words, weights, largest=1.0)
    assert marks_of(text) == [("h4", "cats"), ("h2", "are"), ("d3", "grey")]
    assert "most: “cats” +1, “grey” -0.6, “are” +0.4" in text
    assert Checker(text).text.startswith("All cats are grey. ")


def test_without_weights_a_passage_is_text():
    for passage in ("a <b>", ["a", " <b>"]):
        assert passages.render_passage(passage) == ('<p class="passage" dir="auto">a &lt;b&gt;</p>')
    nothing = passages.render_passage(["a"], np.zeros(1), largest=0.0)
    assert nothing == '<p class="passage" dir="auto">a</p>'


def test_a_long_passage_is_shown_where_it_matters_and_can_be_opened():
    words = [f" w{i}" for i in range(1000)]
    weights = np.zeros(1000)
    weights[700], weights[730] = 2.0, -1.0
    text = passages.render_passage(words, weights, largest=2.0)
    shown, _, rest = text.partition("<details>")
    assert 0 < len(re.findall(r"w\d+", Checker(shown).text.split("most:")[0])) <= 60
    assert marks_of(shown) == [("h4", "w700"), ("d3", "w730")]
    assert "".join(words) in rest
    long = passages.render_passage("word " * 10_000)
    assert long.count("word ") < 10_000 / 2
    assert "(50,000 characters in all)" in long
    assert "…" in long.partition("<details>")[0]


@pytest.mark.parametrize("text", [" " * 400 + "end", "\n " * 200, " " + "a" * 400])
def test_a_long_passage_may_begin_with_white_space(text):
    shown, _, rest = passages.render_passage(text).partition("<details>")
    assert "…" in shown
    assert text in rest


def test_text_page_marks_the_tokens_of_its_samples():
    shown = text_page(targets=[3], top=1)
    text = render(shown)
    (helps, harms) = (int(i) for i in re.findall(r"#(\d+)<br>", text))
    column = shown.scores[:, 3]
    assert (helps, harms) == (column.argmax(), column.argmin())
    pair = [shown.token_scores[3, i, : len(shown.train_texts[i])] for i in (helps, harms)]
    largest = max(np.abs(weights).max() for weights in pair)
    for i, weights in zip((helps, harms), pair, strict=True):
        assert passages.render_passage(shown.train_texts[i], weights, largest) in text
    mapping = {(3, helps): pair[0]}
    some = render(text_page(targets=[3], top=1, token_scores=mapping))
    assert passages.render_passage(shown.train_texts[helps], pair[0], np.abs(pair[0]).max()) in some
    assert passages.render_passage(shown.train_texts[harms]) in some
    bare = render(text_page(token_scores=None))
    assert "<mark" not in bare
    assert "Marked tokens" not in bare
    assert 'lang="fi"' in render(text_page(lang="fi"))


def test_pairs_have_image_and_text():
    shown = pair_page(targets=[2], top=2)
    checked = Checker(render(shown))
    assert checked.tags.count("img") == 1 + 2 * 2
    for i in np.argsort(-shown.scores[:, 2])[:2]:
        assert f"#{i}" in checked.text
        assert shown.train_texts[i][:40] in checked.text
    assert FACTS[2] in checked.text


def test_rows_stand_under_their_columns():
    shown = table_page(targets=[1], top=2)
    text = render(shown)
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in text.split("<tr>")[1:]]
    assert rows[0] == ["sample", "score", *shown.columns]
    assert rows[1][:2] == ["target", ""]
    column = shown.scores[:, 1]
    wanted = [*np.argsort(-column)[:2], *np.argsort(column)[:2]]
    assert [int(row[0][1:].split()[0]) for row in rows[2:]] == wanted
    assert [float(row[1]) for row in rows[2:]] == pytest.approx(column[wanted], rel=6e-3)
    assert float(rows[2][2]) == pytest.approx(shown.train_rows[wanted[0]][0], rel=1e-3)
    assert rows[2][-1] == "&lt;Kyoto&gt;"
    assert "most helpful</h4>" not in text  # the table says it
    both = render(table_page(train_images=image_page().train_images))
    assert "most helpful</h4>" in both


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
    source = re.search(r'base64,([^"]+)"', render(image_page())).group(1)
    assert read_png(base64.b64decode(source)).shape == (5, 7, 3)


class Counted:
    """Pictures that count how often one of them is asked for."""

    def __init__(self, pictures):
        self.pictures, self.asked = pictures, 0

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        self.asked += 1
        return self.pictures[index]


def test_the_range_of_pictures_is_looked_for_once():
    """Pictures may be mapped and many: a page of each target took a pass over all of them."""
    images = np.random.default_rng(0).random((40, 3, 5, 7))
    counted = Counted(images)
    page = image_page(train_images=counted, targets=range(6), top=8)
    expected = render(image_page(train_images=images, targets=range(6), top=8))
    assert render(page) == expected
    assert counted.asked <= 41 + 6 * 2 * 8
    of_torch = torch.from_numpy(images)
    assert render(image_page(train_images=of_torch, targets=range(6), top=8)) == expected


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, np.float32, "images with values from nan to nan; expected finite"),
        (np.inf, np.float64, "images with values from 0.0 to inf; expected finite"),
        (1, np.complex64, r"an image \[5, 5\] of dtype complex64; expected uint8"),
    ],
)
def test_values_that_make_no_picture(value, dtype, message):
    images = np.zeros((3, 5, 5), dtype)
    images[2, 0, 0] = value  # of another picture: all are scaled alike
    with pytest.raises(ValueError, match=message):
        to_uint8(images, 0)


def test_command(tmp_path, capsys):
    shown = image_page()
    np.save(tmp_path / "scores.npy", shown.scores)
    np.save(tmp_path / "images.npy", shown.train_images)
    out = tmp_path / "out" / "page.html"
    arguments = [str(tmp_path / "scores.npy"), "--out", str(out), "--targets", "2", "3"]
    assert main([*arguments, "--train-images", str(tmp_path / "images.npy")]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert Checker(out.read_text()).tags.count("img") == 2 * 2 * 8
    assert main([str(tmp_path / "missing.npy")]) == 1
    assert "missing.npy" in capsys.readouterr().err
    assert main([*arguments, "--train-labels", str(tmp_path / "images.npy"), "--top", "1"]) == 0


def test_command_reads_texts_and_tables(tmp_path, capsys):
    texts, table = text_page(), table_page()
    np.save(tmp_path / "scores.npy", texts.scores)
    np.save(tmp_path / "tokens.npy", texts.token_scores)
    (tmp_path / "tokens.json").write_text(json.dumps(texts.train_texts))
    lines = [f"question\u2028{j}" for j in range(6)]
    (tmp_path / "targets.txt").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    for name, rows in (("train.csv", table.train_rows), ("targets.csv", table.target_rows)):
        lines = [table.columns, *rows]
        text = "".join(",".join(map(str, line)) + "\n" for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8-sig")

    def run(*words):
        files = [str(tmp_path / w) if "." in w else w for w in words]
        status = main([str(tmp_path / "scores.npy"), "--out", str(tmp_path / "p.html"), *files])
        return status, capsys.readouterr().err

    told = ("--train-texts", "tokens.json", "--token-scores", "tokens.npy")
    assert run(*told, "--target-texts", "targets.txt", "--top", "2") == (0, "")
    page = (tmp_path / "p.html").read_text()
    assert "question\u20285" in page
    assert "\ufeff" not in page
    assert marks_of(page)
    assert run("--train-table", "train.csv", "--target-table", "targets.csv") == (0, "")
    page = (tmp_path / "p.html").read_text()
    assert "<td>&lt;Kyoto&gt;</td>" in page
    assert '<th scope="col">cylinders</th>' in page
    (tmp_path / "other.csv").write_text("a,b\n" + "1,2\n" * 6)
    (tmp_path / "short.csv").write_text("a,b\n1,2\n3\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    for words, said in (
        (
            ("--train-table", "train.csv", "--target-table", "other.csv"),
            "other.csv has the columns",
        ),
        (("--train-table", "short.csv"), "short.csv, line 3: received 1 values; expected 2"),
        (("--train-texts", "bad.json"), "bad.json, line 1: no JSON"),
        (("--train-texts", "numbers.json"), "numbers.json holds something else; expected a list"),
        (("--train-texts", "missing.txt"), "missing.txt"),
        (("--train-texts", "targets.txt"), "received 6 train_texts with scores [40, 6]"),
    ):
        status, err = run(*words)
        assert status == 1
        assert said in err


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


def test_equal_scores_are_in_one_order(tmp_path):
    scores = np.array([[1, -1, -1, 0, 2, 2, -1]], np.float32).T
    top = TopWriter(tmp_path / "a.top.safetensors", scores.shape, 2, Ranks())
    top.add(np.arange(7), range(1), scores)
    top.finish()
    kept = read_top_scores(tmp_path / "a.top.safetensors")
    for given in (scores, kept):
        text = Checker(render(Page("ties", given, [0], top=2))).text
        assert text.rstrip().endswith("helpful#4+2#5+2most harmful#1-1#2-1")


def test_damaged_or_wrong_score_files_are_named(tmp_path, capsys):
    cases.whole_run(tmp_path, [cases.net(0)], cases.data(20), cases.data(4, seed=5))
    path = tmp_path / "scores" / "test.mmap"
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    np.save(tmp_path / "nan.npy", np.full((5, 2), np.nan))
    np.save(tmp_path / "line.npy", np.zeros(5))
    (tmp_path / "empty.npy").write_bytes(b"")
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    features = next((tmp_path / "models" / "0").glob("train-*"))
    for name, message in (
        ("scores/test.mmap", "is damaged"),
        ("nan.npy", "the score nan of sample 0 for target 0"),
        ("line.npy", "holds [5] float64; expected scores [n, m]"),
        ("empty.npy", "can't read scores from"),
        ("model.safetensors", "model.safetensors; expected <exp_name>.mmap, <exp_name>.top.safe"),
        (features, "grads, inds, out_to_loss; expected <exp_name>.top.safetensors, with harmful_"),
    ):
        out = tmp_path / "page.html"
        assert main([str(tmp_path / name), "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert ("Delete" in said) == (name == "scores/test.mmap")
        assert not out.exists()


def test_a_device_is_not_replaced_by_a_page(tmp_path):
    """As /dev/null would be, if its owner wrote there."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path / "link"):
        if path != fifo:
            path.symlink_to(fifo)
        with pytest.raises(StoreError, match=f"can't write {path}, which is no file"):
            write_report(path, image_page())
    assert fifo.is_fifo()
    with pytest.raises(StoreError, match=r"can't write \., which is no file"):
        write_report(".", image_page())


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"can't make the directory {tmp_path}/file"):
        write_report(tmp_path / "file" / "page.html", image_page())
