"""Batches of a sample or few: their files are merged, whoever else writes, reads or is killed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.trak import StoreCorruptError, StoreError
from fastproj.trak.files import GoneError, read_safetensors, write_safetensors
from fastproj.trak.store import shards
from fastproj.trak.store import store as module
from fastproj.trak.store.features import sample_blocks
from fastproj.trak.store.shards import ShardFile, ShardIndex, joined, scan
from tests.essential import slow
from tests.trak import cases, shards_run
from tests.trak.lives import Server

N = 40


def opened(folder, n=N, half=False):
    """A store with a registered checkpoint."""
    store = cases.make(cases.net(), folder, n, proj_dim=4, use_half_precision=half).saver
    store.register(0, "checkpoint")
    return store


def write(store, samples, exp_name=None):
    """Each sample as a batch of its own."""
    for i in samples:
        inds = np.array([i])
        q = torch.ones(1) if exp_name is None else None
        store.write_shard(0, inds, inds, shards_run.features(inds), q, exp_name)


def files(folder, role="train"):
    return sorted(folder.rglob(f"{role}-*.safetensors"))


def assert_whole(store, n=N):
    found, _ = store.reader(0).read(np.arange(n))
    assert torch.equal(found, shards_run.features(np.arange(n)))
    assert torch.equal(store.out_to_loss(0), torch.ones(n))


def test_a_thousand_batches_of_one_sample_leave_few_files(tmp_path):
    n = 1000
    store = opened(tmp_path, n)
    write(store, np.random.default_rng(0).permutation(n))
    levels = 3  # files of 1, of 16 and of 256 batches: below 16 of each
    assert len(files(tmp_path)) <= levels * (shards.FAN - 1)
    assert_whole(store, n)
    again = opened(tmp_path, n)
    assert_whole(again, n)
    assert sorted(again.index(0).keys) == sorted(store.index(0).keys)
    np.testing.assert_array_equal(again.index(0).order(), store.index(0).order())


def test_targets_are_merged_and_the_last_one_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 3)
    store = opened(tmp_path)
    store.start_experiment("test", 0, 20)
    for factor in (3, 2, 1):
        for i in range(20):
            inds = np.array([i])
            store.write_shard(0, inds, inds, factor * shards_run.features(inds), exp_name="test")
    for made in (store, opened(tmp_path)):
        found, q = made.reader(0, "test").read(np.arange(20))
        assert q is None
        assert torch.equal(found, shards_run.features(np.arange(20)))
    assert len(files(tmp_path, "target")) <= 2 * 4


@pytest.mark.parametrize("half", [False, True])
def test_scores_are_the_same_bit_for_bit(tmp_path, monkeypatch, half):
    """Whether files were merged, and whoever merged them: blocks are made of batches."""
    train, targets = cases.data(30), cases.data(5, seed=5)
    model = cases.trained(0, train)
    found = []
    for fan in (10**6, 2, 3):
        cases.small_blocks(monkeypatch.setattr)
        monkeypatch.setattr(shards, "FAN", fan)
        traker = cases.make(model, tmp_path / str(fan), 30, use_half_precision=half)
        cases.featurize(traker, model, 0, train, batch=1)
        traker.finalize_features()
        cases.score(traker, model, 0, targets)
        found.append(np.array(traker.finalize_scores("test")))
    assert max(len(files(tmp_path / fan)) for fan in "23") < 10
    assert len(files(tmp_path / str(10**6))) == 30
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_small_files_that_are_there_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 10**6)
    write(opened(tmp_path), range(N))
    store = opened(tmp_path)
    order = store.index(0).order()
    assert len(files(tmp_path)) == N
    monkeypatch.setattr(shards, "FAN", 4)
    again = opened(tmp_path)
    assert len(files(tmp_path)) <= 3 * 3
    np.testing.assert_array_equal(again.index(0).order(), order)
    assert_whole(again)


# ---- killed, full, damaged ----------------------------------------------------------------------


def test_files_that_a_killed_process_did_not_remove_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 4)
    store = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "remove_quietly", lambda path: None)
        write(store, range(N))
    many = files(tmp_path)
    assert len(many) > N  # all are there, and what they were merged into
    layout = sorted(store.index(0).keys)
    for made in (store, opened(tmp_path)):
        assert_whole(made)
        assert sorted(made.index(0).keys) == layout
    assert len(files(tmp_path)) < len(many) / 4


def test_of_two_files_with_the_same_batches_one_stays():
    """Whatever two processes know of each other's files, they remove the same one."""
    keys = ("000000000000-aaaaaaaaaaaa", "000000000001-bbbbbbbbbbbb")
    one = [np.arange(2), np.arange(2)]
    made = [
        (ShardFile(Path(name), keys, (1, 1), 10), *one)
        for name in ("train-000000000000-a", "train-000000000000-b")
    ]
    for found in (made, made[::-1]):
        index = ShardIndex.of(2, found, replace=False)
        assert index.redundant == [made[0][0].path]
        assert index.done.all()


def test_overlapping_files_both_stay():
    sizes = (1, 1)
    a, b, c = (f"00000000000{i}-{i:012x}" for i in range(3))
    left = ShardFile(Path("left"), (a, b), sizes, 10)
    right = ShardFile(Path("right"), (b, c), sizes, 10)
    found = [(left, np.array([0, 1]), np.array([0, 1])), (right, np.array([1, 2]), np.arange(1, 3))]
    index = ShardIndex.of(3, found, replace=False)
    assert index.redundant == []
    assert index.done.all()
    assert index.order().tolist() == [0, 1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_without_room_for_a_merged_file_the_batches_stay(tmp_path, monkeypatch, code):
    monkeypatch.setattr(shards, "FAN", 4)
    store = opened(tmp_path)
    write(store, [0])
    single = files(tmp_path)[0].stat().st_size
    replace, merged = os.replace, []

    def refuse_merged(source, target):
        if "train-" in str(target) and os.path.getsize(source) > single + 60:
            merged.append(target)
            raise OSError(code, os.strerror(code))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse_merged)
        write(store, range(1, N))
    assert len(merged) == N // 4
    assert len(files(tmp_path)) == N
    assert not list(tmp_path.rglob(".*.tmp"))
    assert_whole(store)
    assert_whole(opened(tmp_path))
    assert len(files(tmp_path)) <= 3 * 3


def test_damage_is_not_merged_away(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 10**6)
    write(opened(tmp_path), range(8))
    path = files(tmp_path)[3]
    whole = bytearray(path.read_bytes())
    whole[whole.index(shards_run.features(np.array([3])).numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    monkeypatch.setattr(shards, "FAN", 4)
    store = opened(tmp_path)
    write(store, range(8, N))
    assert path.exists()
    with pytest.raises(StoreCorruptError, match="checksum of 'grads'"):
        store.reader(0).read(np.arange(N))
    path.unlink()
    again = opened(tmp_path)
    assert np.flatnonzero(~again.index(0).done).tolist() == [3]


def test_files_that_hold_other_things_are_not_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 4)
    write(opened(tmp_path, half=True), range(2))
    store = opened(tmp_path, half=False)
    write(store, range(2, 4))
    assert len(files(tmp_path)) == 4
    found, _ = store.reader(0).read(np.arange(4))
    assert torch.equal(found, shards_run.features(np.arange(4)))
    write(store, range(4, N))
    assert len(files(tmp_path)) <= 4 + 3 * 3
    assert_whole(store)
    assert joined([{"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}]) is None


# ---- several processes --------------------------------------------------------------------------


def test_a_reader_finds_what_moves_while_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 10**6)
    writer = opened(tmp_path)
    write(writer, range(N))
    store = opened(tmp_path)
    reader = store.reader(0)
    blocks = sample_blocks(reader.index.order(), 7)
    gone = reader.index.shards[0].path
    monkeypatch.setattr(shards, "FAN", 3)
    opened(tmp_path)  # merges
    assert not gone.exists()
    for inds in blocks:
        assert torch.equal(reader.read(inds)[0], shards_run.features(inds))
    assert torch.equal(store.out_to_loss(0), torch.ones(N))
    for path in files(tmp_path):
        path.unlink()
    with pytest.raises(GoneError, match="is gone"):
        store.reader(0).read(np.arange(3))


def test_a_file_that_comes_back_while_it_is_read_was_gone(tmp_path, monkeypatch):
    path = tmp_path / "part.safetensors"
    whole = {"a": torch.zeros(2)}

    def opened(*_):
        write_safetensors(path, whole, {})  # by another, before anyone looks whether it's there
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("fastproj.trak.files.read_chosen", opened)
        with pytest.raises(GoneError, match="is gone"):
            read_safetensors(path, ())
    assert read_safetensors(path, None)[0].keys() == whole.keys()


def test_files_that_move_behind_the_one_who_looks_are_found(tmp_path):
    """A listing may miss a file that came, and those that went because of it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in "ab":
        (folder / f"train-{name}.safetensors").touch()
    seen = []

    def read(path):
        seen.append(path.stem)
        if path.stem == "train-a":
            (folder / "train-c.safetensors").touch()
            (folder / "train-b.safetensors").unlink()

    scan(folder, "train", read)
    assert seen == ["train-a", "train-b", "train-c"]


@pytest.mark.parametrize("part", ["models/0", "models/0/drawn"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path, monkeypatch, part, code
):
    traker = cases.featurized(cases.net(), tmp_path, cases.data(12))
    refused = tmp_path / part

    def unlisted(real):
        def call(path="."):
            if Path(path) == refused:
                raise OSError(code, os.strerror(code), str(path))
            return real(path)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, unlisted(getattr(os, name)))
    with pytest.raises(StoreError, match=rf"can't read .*{part} \({os.strerror(code)}\)"):
        traker.finalize_features()


def test_a_writer_whose_files_others_merge_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 6)
    store = opened(tmp_path)
    write(store, range(5))
    monkeypatch.setattr(shards, "FAN", 2)
    opened(tmp_path)
    monkeypatch.setattr(shards, "FAN", 6)
    write(store, range(5, N))
    assert_whole(store)
    assert_whole(opened(tmp_path))


def test_only_one_process_merges_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 4)
    store = opened(tmp_path)
    with shards.alone(store.model_dir(0)) as free:
        assert free
        with shards.alone(store.model_dir(0)) as again:
            assert not again
        write(store, range(8))
        assert len(files(tmp_path)) == 8
    write(store, range(8, N))
    assert_whole(store)
    assert len(files(tmp_path)) <= 3 * 3 + 4


@pytest.mark.parametrize("locks", [True, slow(False)])
def test_writers_and_a_reader_at_once(tmp_path, monkeypatch, locks):
    """Three processes write and merge in one folder, one of them what another writes as well."""
    monkeypatch.setenv("FASTPROJ_TEST_LOCKS", str(int(locks)))
    log = tmp_path / "printed"
    folder = tmp_path / "store"
    opened(folder, shards_run.SAMPLES)
    with Server() as server:
        jobs = [["write", folder, 0, 2], ["write", folder, 1, 2], ["write", folder, 0, 3]]
        codes = server.run("tests.trak.shards_run:main", [*jobs, ["read", folder]], log)
    assert codes == [0] * 4, log.read_text()
    store = opened(folder, shards_run.SAMPLES)
    assert_whole(store, shards_run.SAMPLES)
    assert not list(folder.rglob(".*.tmp"))


def test_a_copied_store_is_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FAN", 4)
    write(opened(tmp_path / "one"), range(N))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert_whole(opened(tmp_path / "two"))
