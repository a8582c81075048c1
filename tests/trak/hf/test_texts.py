"""Texts in files as tokenised samples."""

from __future__ import annotations

import json
import logging

import datasets
import pytest

from fastproj.trak.hf import read_samples, tokenize
from tests.trak.hf import models

ROWS = [{"text": "w0 w1", "label": 1}, {"text": "w2", "label": 0}]
END = models.EOS


def write(folder, name):
    """ROWS in a file of this name."""
    path = folder / name
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".txt":
        path.write_text("w0 w1\n\nw2\n")
    elif path.suffix:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet", "folder"])
def test_files(tmp_path, name):
    assert list(read_samples(write(tmp_path, name))) == ROWS


def test_a_text_a_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fastproj.trak"):
        found = read_samples(str(write(tmp_path, "a.txt")))
    assert found == [{"text": "w0 w1"}, {"text": "w2"}]
    assert "1 of 3 lines are empty" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "is not here; expected a local path"),
        ("a.csv", "a,b\n", r"expected .jsonl \(or .json\), .txt, .parquet"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: no JSON"),
        ("a.jsonl", '{"text": "a"}\n5\n', "line 2: a int; expected an object"),
        ("a.json", "[1]", "entry 0: a int"),
        ("a.json", "[1,\n", "line 2: no JSON"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b", "text": "c"}\n',
            "line 2: .*'text' more than once",
        ),
        ("a.json", '[{"label": 1, "text": "b", "label": 2}]', "a.json: .*'label' more than once"),
        ("a.jsonl", "\n", "without a sample"),
        ("a.txt", "\n", "without a sample"),
        ("a.parquet", "nothing", "no parquet file"),
    ],
)
def test_files_that_can_not_be_read(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_samples(tmp_path / name)


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="holds no data set"):
        read_samples(tmp_path)
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"several splits; expected one of: .*splits/train"):
        read_samples(tmp_path / "splits")
    assert list(read_samples(tmp_path / "splits" / "train")) == ROWS


def test_a_text():
    for task in ("causal_lm", "masked_lm"):
        (found,) = tokenize([{"text": "w0 w1"}], models.tokenizer(), task)
        assert found["input_ids"] == [5, 6, END]
        assert "labels" not in found


def test_of_a_prompt_and_completion_the_completion_is_predicted():
    pair = {"prompt": "w0 w1", "completion": " w2 w3"}
    (found,) = tokenize([pair], models.tokenizer(), "causal_lm")
    assert found["input_ids"] == [5, 6, 7, 8, END]
    assert found["labels"] == [-100, -100, 7, 8, END]
    with pytest.raises(ValueError, match="no token of its completion within 2 tokens"):
        tokenize([pair], models.tokenizer(), "causal_lm", max_length=2)


def test_a_source_and_its_target():
    (found,) = tokenize([{"source": "w0 w1", "target": "w2"}], models.tokenizer(), "seq2seq")
    assert found["input_ids"] == [5, 6, END]
    assert found["labels"] == [7, END]


def test_classes():
    rows = [{"review": "w0", "text_pair": "w1", "stars": 2}, {"review": "w2", "stars": "good"}]
    found = tokenize(
        rows,
        models.tokenizer(),
        "text_classification",
        columns={"text": "review", "label": "stars"},
        label2id={"bad": 0, "good": 1},
    )
    assert [sample["input_ids"] for sample in found] == [[5, END, 6, END], [7, END]]
    assert [sample["labels"] for sample in found] == [2, 1]


def test_what_is_too_long_is_cut_and_counted(caplog):
    rows = [{"text": "w0 w1 w2 w3"}, {"text": "w0"}]
    with caplog.at_level(logging.WARNING, "fastproj.trak"):
        found = tokenize(rows, models.tokenizer(), "causal_lm", max_length=3)
    assert [sample["input_ids"] for sample in found] == [[5, 6, 7], [5, END]]
    assert "1 of 2 samples were cut to 3 tokens" in caplog.text


def test_what_is_cut_keeps_its_end_and_both_texts():
    pair = {"text": "w0 w1 w2 w3", "text_pair": "w4 w5 w6", "label": 1}
    (found,) = tokenize([pair], models.tokenizer(), "text_classification", max_length=6)
    assert found["input_ids"] == [5, 6, END, 9, 10, END]
    (found,) = tokenize([{"text": "w0 w1 w2 w3"}], models.tokenizer(), "masked_lm", max_length=3)
    assert found["input_ids"] == [5, 6, END]
    both = {"source": "w0 w1 w2 w3", "target": "w2 w3 w4"}
    (found,) = tokenize([both], models.tokenizer(), "seq2seq", max_length=3)
    assert (found["input_ids"], found["labels"]) == ([5, 6, END], [7, 8, END])


def test_lines_end_at_line_feeds_alone(tmp_path):
    texts = ["a\u2028b", "c\x0cd\x85e", "f"]
    (tmp_path / "texts.txt").write_bytes("\r\n".join(texts).encode())
    assert read_samples(tmp_path / "texts.txt") == [{"text": text} for text in texts]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines + "\n", encoding="utf-8")
    assert read_samples(tmp_path / "texts.jsonl") == [{"text": text} for text in texts]


def test_what_is_tokenised_stays_as_it_is():
    sample = {"input_ids": [9, 8], "labels": [-100, 8]}
    assert tokenize([sample], None, "causal_lm") == [sample]


def test_columns_and_names_of_the_labels_of_tokenised_samples():
    rows = [{"input_ids": [9, 8], "label": 0, "fine": fine} for fine in (2, "good", ["good"])]
    options = {"columns": {"label": "fine"}, "label2id": {"bad": 0, "good": 1}}
    found = tokenize(rows, None, "text_classification", **options)
    assert found == [{"input_ids": [9, 8], "labels": labels} for labels in (2, 1, [1])]
    del options["columns"]
    found = tokenize([{"input_ids": [9], "label": "good"}], None, "text_classification", **options)
    assert found == [{"input_ids": [9], "label": 1}]
    row = {"input_ids": [9, 8, 7], "tags": ["O", -100, "B"]}
    options = {"columns": {"labels": "tags"}, "label2id": {"O": 0, "B": 1}}
    found = tokenize([row], None, "token_classification", **options)
    assert found == [{"input_ids": [9, 8, 7], "labels": [0, -100, 1]}]
    row = {"input_ids": [9, 8], "own": [-100, 8]}
    found = tokenize([row], None, "causal_lm", columns={"labels": "own"})
    assert found == [{"input_ids": [9, 8], "labels": [-100, 8]}]


def test_tokenised_samples_that_are_too_long_are_refused():
    """Padding at their ends doesn't count."""
    long = {"input_ids": [9] * 5}
    padded = {**long, "attention_mask": [0, 1, 0, 1, 0]}
    target = {"input_ids": [9], "labels": [9, 9, 9, -100]}
    for task, row in (("causal_lm", padded), ("seq2seq", target)):
        assert tokenize([row], None, task, max_length=3) == [row]
        with pytest.raises(ValueError, match=r"sample 0 is tokenised .* 3 tokens; .* at most 2, "):
            tokenize([row], None, task, max_length=2)
    with pytest.raises(ValueError, match="5 tokens; expected at most 4"):
        tokenize([padded, long], None, "masked_lm", max_length=4)


def test_samples_that_are_no_dicts_are_named():
    texts = [{"text": "w0"}, "w1"]
    with pytest.raises(TypeError, match=r"sample 1 of mine is of type str; expected .*'text': "):
        tokenize(texts, models.tokenizer(), "causal_lm", name="mine")
    frame = datasets.Dataset.from_list(texts[:1]).to_pandas()
    with pytest.raises(TypeError, match=r"sample 0 is of type str; expected .*'records'"):
        tokenize(frame, models.tokenizer(), "causal_lm")


@pytest.mark.parametrize(
    ("task", "sample", "options", "said"),
    [
        ("lm", {"text": "w0"}, {}, "received task='lm'"),
        ("causal_lm", {"prompt": "w0"}, {}, "expected 'text' or 'prompt' and 'completion'"),
        ("seq2seq", {"text": "w0"}, {}, "sample 0 has 'text'; expected 'source' and 'target'"),
        ("token_classification", {"text": "w0"}, {}, "expected 'input_ids'"),
        ("causal_lm", {"text": 5}, {}, "'text' of type int"),
        ("causal_lm", {"text": "w0"}, {"columns": {"text": "body"}}, "expected 'body' or"),
        ("causal_lm", {"text": "w0"}, {"columns": {"label": "x"}}, "which causal_lm doesn't take"),
        (
            "token_classification",
            {"input_ids": [5]},
            {"columns": {"text": "x"}},
            "which token_classification doesn't take; expected 'labels'$",
        ),
        (
            "text_classification",
            {"input_ids": [5], "label": 0},
            {"columns": {"text": "x", "label": "label"}},
            "has 'input_ids', so .* takes no 'text' of it; expected 'label' alone",
        ),
        (
            "causal_lm",
            {"text": "w0"},
            {"columns": {"labels": "x"}},
            "has no 'input_ids', so .* takes no 'labels' of it; expected 'text', 'prompt'",
        ),
        (
            "text_classification",
            {"input_ids": [5], "label": 0},
            {"columns": {"label": "x"}},
            "has 'input_ids', 'label'; expected its labels as 'x'",
        ),
        (
            "causal_lm",
            {"text": None},
            {},
            r"no value \(null\) for 'text'; expected one for 'text' or",
        ),
        (
            "text_classification",
            {"text": "w0", "stars": None},
            {"columns": {"label": "stars"}},
            r"no value \(null\) for 'stars'; expected one for 'text' and 'stars'",
        ),
        (
            "causal_lm",
            {"text": "w0", "prompt": "w0", "completion": "w1"},
            {},
            "'text' as well as 'prompt' and 'completion'; expected one of them",
        ),
        ("causal_lm", {"text": "w0"}, {"max_length": 1}, "max_length=1 .*expected at least 2"),
        ("masked_lm", {"text": "w0"}, {"max_length": 0}, "max_length=0; expected 1 <="),
        ("seq2seq", {"text": "w0"}, {"name": "a.jsonl"}, "sample 0 of a.jsonl has 'text'"),
        (
            "token_classification",
            {"input_ids": [5, 6], "labels": ["x", "z"]},
            {"label2id": {"x": 0}},
            r"the label 'z'; .*config.label2id has \('x'\)",
        ),
        ("text_classification", {"text": "w0", "label": "x"}, {}, r"label 'x'.*\(none\)"),
        (
            "text_classification",
            {"text": "w0", "label": "x"},
            {"label2id": {"y": 0}},
            r"config.label2id has \('y'\)",
        ),
    ],
)
def test_samples_that_can_not_be_tokenised(task, sample, options, said):
    with pytest.raises(ValueError, match=said):
        tokenize([sample], models.tokenizer(), task, **options)
