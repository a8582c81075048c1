"""Texts, data sets, models and tokenizers, damaged in many ways: read, or refused by name."""

from __future__ import annotations

import json
import shutil
import warnings

import datasets
import pyarrow.parquet
import pytest

from fastproj.trak.hf import load_model, load_tokenizer, read_samples
from fastproj.trak.hf.folders import load_weights, model_class_of
from tests.trak.damage import refusals
from tests.trak.hf import models

TEXTS = [{"text": "one"}, {"text": "two, and more"}]


@pytest.fixture
def texts(tmp_path):
    """The same texts in a file of each sort."""
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    (tmp_path / "list.json").write_text(json.dumps(TEXTS))
    (tmp_path / "lines.txt").write_text("one\ntwo, and more\n")
    rows = datasets.Dataset.from_list(TEXTS)
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.save_to_disk(tmp_path / "rows")
    return tmp_path


@pytest.mark.parametrize("name", ["lines.jsonl", "list.json", "lines.txt", "rows.parquet"])
def test_a_damaged_file_of_texts_is_read_or_refused_by_name(name, texts):
    path = texts / name
    assert list(read_samples(path)) == TEXTS
    assert refusals(lambda: list(read_samples(path)), path) > 5


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_data_set_is_read_or_refused_by_name(name, texts):
    folder = texts / "rows"
    assert list(read_samples(folder)) == TEXTS
    assert refusals(lambda: list(read_samples(folder)), folder / name, named=folder) > 5


def test_a_parquet_file_with_checksums_is_read_right_or_refused(tmp_path):
    """A bit of each byte of its pages, which hold the texts."""
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"text {i}"} for i in range(3)])
    pyarrow.parquet.write_table(
        table, path, write_page_checksum=True, write_statistics=False, compression="none"
    )
    whole = path.read_bytes()
    wanted = list(read_samples(path))
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for place in range(4, footer):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found, said = None, str(path)
        try:
            found = list(read_samples(path))
        except ValueError as error:
            said = str(error)
        assert str(path) in said
        assert found in (None, wanted), place
        refused += found is None
    assert refused > footer / 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with its tokenizer, and adapters for it."""
    folder = tmp_path_factory.mktemp("made")
    models.model_for("causal_lm").save_pretrained(folder / "model")
    models.tokenizer().save_pretrained(folder / "model")
    models.save_adapters(models.with_adapters(load_model(folder / "model")), 1, folder / "lora")
    return folder


def test_a_damaged_configuration_is_read_or_refused_by_name(made, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    assert refusals(lambda: model_class_of(path.parent, None), path) > 5


def weights_of(folder):
    """The adapters in a folder, put into a model that has others."""
    return load_weights(models.with_adapters(load_model(folder.parent / "model")), folder)


READERS = {
    "model/config.json": load_model,
    "model/model.safetensors": load_model,
    "model/tokenizer.json": load_tokenizer,
    "model/tokenizer_config.json": load_tokenizer,
    "lora/adapter_config.json": lambda folder: load_model(folder, base=folder.parent / "model"),
    "lora/adapter_model.safetensors": weights_of,
}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_model_is_read_or_refused_by_name(name, made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name
    READERS[name](path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and peft, about what is odd in a file
        assert refusals(lambda: READERS[name](path.parent), path, named=path.parent) > 5


@pytest.mark.parametrize(
    ("name", "read"),
    [("model.safetensors", load_model), ("tokenizer.json", load_tokenizer)],
)
def test_a_model_that_is_cut_off_is_refused_by_name(name, read, made, tmp_path):
    """As a copy that was not finished leaves it."""
    shutil.copytree(made / "model", tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{tmp_path}/model: no (model|tokenizer) that can be"):
        read(path.parent)
