"""Files that a user names, damaged in many ways: they are read, or refused by name."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from fastproj.commands.report import load_tables, load_texts
from fastproj.trak import StoreError, StoreMismatchError
from fastproj.trak.evaluation.retrain import GroundTruth
from fastproj.trak.hf.folders import model_class_of
from fastproj.trak.hf.texts import read_samples
from fastproj.trak.store.scores import TopScores, load_array, load_scores
from tests.trak import cases, kinds
from tests.trak.damage import damages, put

TEXTS = [{"text": "one"}, {"text": "two, and more"}]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A file of each sort, by name."""
    folder = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        cases.small_blocks(patch.setattr)
        kinds.whole(folder / "store", "rademacher")
    for name in ("test.mmap", "test.top.safetensors"):
        (folder / "store" / "scores" / name).rename(folder / name)
    np.save(folder / "scores.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    masks, outputs = np.eye(4, dtype=bool)[:3], np.arange(6, dtype=np.float64).reshape(3, 2)
    np.savez_compressed(folder / "truth.npz", masks=masks, outputs=outputs)
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, TEXTS)))
    (folder / "list.json").write_text(json.dumps(TEXTS))
    (folder / "lines.txt").write_text("one\ntwo, and more\n")
    (folder / "passages.json").write_text(json.dumps(["one", "two"]))
    (folder / "table.csv").write_text("a,b\n1,2\n3,4\n")
    (folder / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    return folder


READERS = {
    "test.mmap": load_scores,
    "test.top.safetensors": load_scores,
    "scores.npy": load_array,
    "truth.npz": GroundTruth.load,
    "lines.jsonl": read_samples,
    "list.json": read_samples,
    "lines.txt": read_samples,
    "passages.json": load_texts,
    "table.csv": load_tables,
    "config.json": lambda path: model_class_of(path.parent, None),
}
CHECKED = ("test.mmap", "test.top.safetensors")  # files with checksums


def same(found, wanted):
    if isinstance(found, TopScores):
        return all(np.array_equal(vars(found)[name], v) for name, v in vars(wanted).items())
    return np.array_equal(found, wanted)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(name, originals, tmp_path):
    rng = random.Random(name)
    read, path = READERS[name], tmp_path / name
    whole = (originals / name).read_bytes()
    put(path, whole)
    wanted = read(path)
    refused = 0
    for what, content in damages(whole, rng):
        put(path, content)
        said = None
        try:
            found = read(path)
        except (ValueError, OSError, StoreError, StoreMismatchError) as error:
            said = str(error)
        if said is None:
            assert name not in CHECKED or content == whole or same(found, wanted), what
        else:
            refused += 1
            assert str(path) in said, (what, said)
    assert refused > 5
