"""Where scores go: any order of blocks gives the array; the extremes are those of the whole."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastproj import cli
from fastproj.trak.distributed import Ranks
from fastproj.trak.files import StoreCorruptError, StoreError
from fastproj.trak.store.features import FeatureReader, block_rows, read_ahead, sample_blocks
from fastproj.trak.store.scores import (
    STRIPE_BYTES,
    ScoresWriter,
    TopWriter,
    load_array,
    load_scores,
    read_scores,
    read_top_scores,
    stripes,
)

N, M = 41, 7


def blocks(scores, seed):
    """Blocks of shuffled rows and of column ranges."""
    rows = np.random.default_rng(seed).permutation(N)
    for columns in (range(0, 3), range(3, M)):
        for some in np.split(rows, [5, 6, 23]):
            yield some, columns, scores[np.ix_(some, np.asarray(columns))]


def write(writer, scores, seed):
    with writer:
        for block in blocks(scores, seed):
            writer.add(*block)
        writer.finish()


@pytest.mark.parametrize("whole_rows", [False, True])
def test_blocks_in_any_order_make_the_array(tmp_path, whole_rows):
    scores = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
    writer = ScoresWriter(tmp_path / "test.mmap", (N, M), Ranks(), {"exp_name": "test"})
    if whole_rows:
        with writer:
            for rows in np.split(np.arange(N)[::-1], [4, 20]):
                writer.add(np.sort(rows), range(M), scores[np.sort(rows)])
            writer.finish()
    else:
        write(writer, scores, 1)
    np.testing.assert_array_equal(read_scores(tmp_path / "test.mmap"), scores)
    np.testing.assert_array_equal(np.load(tmp_path / "test.mmap"), scores)
    assert [path.name for path in tmp_path.iterdir()] == ["test.mmap"]


def test_stripes_cover_the_array():
    for shape in ((1, 1), (10, STRIPE_BYTES), (10**6, 1000), (3, 7)):
        step, count = stripes(shape)
        assert step >= 1
        assert (count - 1) * step < shape[0] <= count * step


def test_room_on_file_systems_that_cannot_reserve_it(tmp_path, monkeypatch):
    """What glibc does there: a byte is written in each block, unless it holds something."""

    def emulated(file, start, size):
        for place in range(start + (size - 1) % 4096, start + size, 4096):
            if os.pread(file, 1, place) in (b"", b"\0"):
                os.pwrite(file, b"\0", place)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    wanted = np.random.default_rng(0).random((142, 7), np.float32)  # a byte is tried in the header
    with ScoresWriter(tmp_path / "a.mmap", wanted.shape, Ranks()) as writer:
        writer.add(np.arange(142), range(7), wanted)
        writer.finish()
    np.testing.assert_array_equal(read_scores(tmp_path / "a.mmap"), wanted)


def test_scores_that_are_not_there(tmp_path):
    with pytest.raises(StoreError, match="no scores at"):
        read_scores(tmp_path / "none.mmap")


@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.5, 0.99])
def test_scores_cut_short_are_named_by_all_that_read_them(tmp_path, share, capsys):
    path = tmp_path / "test.mmap"
    write(ScoresWriter(path, (N, M), Ranks()), np.random.default_rng(0).normal(size=(N, M)), 1)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for read in (read_scores, load_scores, load_array):
        with pytest.raises(StoreCorruptError, match=r"test\.mmap is damaged.*finalize_scores"):
            read(path)
    flipped = tmp_path / "flipped.npy"
    np.save(flipped, np.arange(N) < 3)
    (tmp_path / "recipe.py").write_text("def train(i, s): pass\ndef outputs(m): pass\n")
    training = ["recipe.py", "--scores", path, "--out", tmp_path / "out"]
    for command in (
        ["report", path],
        ["mislabel", "--scores", path, "--flipped", flipped],
        *([name, *training] for name in ("lds", "loo", "brittleness")),
    ):
        assert cli.main([str(part) for part in command]) == 1
        assert re.search(r"test\.mmap is damaged.*finalize_scores", capsys.readouterr().err)


def test_arrays_of_other_programs_cut_short_are_not_called_ours(tmp_path, capsys):
    path = tmp_path / "labels.npy"
    np.save(path, np.arange(100))
    whole = path.read_bytes()
    np.save(tmp_path / "scores.npy", np.ones((100, 2)))
    for size in (0, 5, 60, 300):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"can't read .*labels\.npy .*expected a \.npy file"):
            load_array(path)
        command = ["report", tmp_path / "scores.npy", "--train-labels", path]
        assert cli.main([str(part) for part in command]) == 1
        assert "labels.npy" in capsys.readouterr().err


def test_files_of_others_are_not_called_damaged(tmp_path):
    """Whoever obeys "delete the file" would lose a model, or scores that are whole."""
    scores = np.zeros((N, M), np.float32)
    write(TopWriter(tmp_path / "a.top.safetensors", (N, M), 3, Ranks()), scores, 0)
    write(ScoresWriter(tmp_path / "a.mmap", (N, M), Ranks()), scores, 0)
    np.save(tmp_path / "scores.npy", scores)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    for name in ("a.top.safetensors", "scores.npy", "model.safetensors"):
        with pytest.raises(ValueError, match=rf"{name} .*expected <exp_name>\.mmap"):
            read_scores(tmp_path / name)
    for name in ("a.mmap", "scores.npy", "model.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}; expected <exp_name>\.top\.safetensors"):
            read_top_scores(tmp_path / name)


@pytest.mark.parametrize("top_k", [1, 5, N, 3 * N])
@pytest.mark.parametrize("ties", [False, True])
def test_extremes_are_those_of_the_whole(tmp_path, top_k, ties):
    """Ties go to the lower number, whatever order the blocks come in; -0 is 0."""
    scores = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
    if ties:
        scores = np.round(scores)
        scores[::3] = -0.0
    t = min(top_k, N)
    high = np.argsort(-scores, axis=0, kind="stable")[:t].T
    low = np.argsort(scores, axis=0, kind="stable")[:t].T
    for seed in (0, 1):
        write(TopWriter(tmp_path / "top", (N, M), top_k, Ranks()), scores, seed)
        top = read_top_scores(tmp_path / "top")
        np.testing.assert_array_equal(top.helpful_indices, high)
        np.testing.assert_array_equal(top.harmful_indices, low)
        np.testing.assert_array_equal(top.helpful_scores, np.take_along_axis(scores.T, high, 1))
        np.testing.assert_array_equal(top.harmful_scores, np.take_along_axis(scores.T, low, 1))
        assert top.train_set_size == N


# ---- reading ------------------------------------------------------------------------------------


def test_blocks_of_samples_are_whole_batches():
    shard = np.array([2, 0, 0, -1, 1, 2, 2, 0, 3], np.int32)
    found = [inds.tolist() for inds in sample_blocks(shard, 4)]
    assert found == [[1, 2, 7, 4], [0, 5, 6, 8]]
    assert sample_blocks(np.full(3, -1, np.int32), 4) == []
    assert [inds.tolist() for inds in sample_blocks(shard, 3)] == [[1, 2, 7], [4, 0, 5, 6], [8]]
    large = sample_blocks(np.zeros(11, np.int32), 4)  # a batch that is cut
    assert [inds.tolist() for inds in large] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_blocks_are_smaller_where_rows_are_long():
    assert [block_rows(k) for k in (1, 8192, 1 << 14, 1 << 30)] == [2048, 2048, 1024, 1]


class Shards:
    """What a FeatureReader asks for: shards of float32, and one of float64."""

    def __init__(self, rows):
        self.rows = rows
        self.checks = []

    def look(self):
        return SimpleNamespace(
            shard=np.repeat(np.arange(len(self.rows)), self.rows),
            row=np.concatenate([np.arange(size) for size in self.rows]),
            shards=[SimpleNamespace(path=number) for number in range(len(self.rows))],
        )

    def read_shard(self, number, check):
        self.checks.append((number, check))
        start, size = sum(self.rows[:number]), self.rows[number]
        values = torch.arange(start, start + size)
        dtype = torch.float64 if number == 2 else torch.float32
        grads = torch.stack([values, -values], 1).to(dtype) + (2.0**-40 if number == 2 else 0)
        return {"inds": values, "grads": grads, "out_to_loss": values / 2}


@pytest.mark.parametrize("inds", [range(9), [8, 0, 4, 1], [3], [], [5, 4, 3, 2, 1, 0]])
def test_rows_come_in_the_order_asked_for(inds):
    store = Shards([3, 2, 4])
    reader = FeatureReader(store.look, store.read_shard, 2)
    inds = np.asarray(inds, np.int64)
    for _ in range(2):
        features, q = reader.read(inds)
        more = (inds >= 5) * 2.0**-40
        assert features.tolist() == np.stack([inds + more, more - inds], 1).tolist()
        assert (None if q is None else q.tolist()) == ([i / 2 for i in inds] or None)
    assert len({number for number, check in store.checks if check}) == sum(
        check for _, check in store.checks
    )  # each shard is checked once


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_shards_that_are_expected_are_not_left_open(tmp_path):
    index = SimpleNamespace(shard=np.arange(9), shards=[])
    for number in range(9):
        index.shards.append(SimpleNamespace(path=tmp_path / str(number)))
        index.shards[number].path.touch()
    before = set(os.listdir("/proc/self/fd"))
    FeatureReader(lambda: index, None, 2).expect(np.arange(9))
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_fails_while_reading_ahead_reaches_the_caller():
    def items():
        yield 1
        raise OSError("gone")

    stream = read_ahead(items())
    assert next(stream) == 1
    with pytest.raises(OSError, match="gone"):
        next(stream)


def test_reading_ahead_stops_with_its_caller():
    made = []

    def items():
        for i in range(1000):
            made.append(i)
            yield i

    stream = read_ahead(items())
    assert next(stream) == 0
    stream.close()
    assert len(made) <= 4


def test_reading_ahead_stops_where_its_start_is_interrupted(monkeypatch):
    begin, threads = threading.Thread.start, []

    def interrupted(thread):
        begin(thread)
        threads.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(read_ahead(range(1000)))
    threads[0].join(5)
    assert not threads[0].is_alive()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has none")
def test_an_interrupt_while_room_is_made_leaves_no_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    with pytest.raises(KeyboardInterrupt), ScoresWriter(tmp_path / "a.mmap", (9, 5), Ranks()):
        pass
    assert not list(tmp_path.iterdir())
