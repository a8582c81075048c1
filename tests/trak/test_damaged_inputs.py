"""Files that a user names, damaged in many ways: they are read, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastproj.commands.report import load_tables, load_texts
from fastproj.trak.evaluation.retrain import GroundTruth
from fastproj.trak.store.scores import TopScores, load_array, load_scores
from tests.trak import cases, kinds
from tests.trak.damage import put, refusals


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
    (folder / "passages.json").write_text(json.dumps(["one", "two"]))
    (folder / "table.csv").write_text("a,b\n1,2\n3,4\n")
    return folder


READERS = {
    "test.mmap": load_scores,
    "test.top.safetensors": load_scores,
    "scores.npy": load_array,
    "truth.npz": GroundTruth.load,
    "passages.json": load_texts,
    "table.csv": load_tables,
}
CHECKED = ("test.mmap", "test.top.safetensors")  # files with checksums


def same(found, wanted):
    if isinstance(found, TopScores):
        return all(np.array_equal(vars(found)[name], v) for name, v in vars(wanted).items())
    return np.array_equal(found, wanted)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_by_name(name, originals, tmp_path):
    read, path = READERS[name], tmp_path / name
    put(path, (originals / name).read_bytes())
    wanted = read(path)

    def right(found):
        return name not in CHECKED or same(found, wanted)

    assert refusals(lambda: read(path), path, right=right) > 5
