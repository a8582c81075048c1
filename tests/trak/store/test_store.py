"""The store: damage is found and named, a refusing disk loses nothing, writers don't collide."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastproj import Projector
from fastproj.trak import StoreCorruptError, StoreError, StoreMismatchError, TRAKer
from fastproj.trak import files as module
from fastproj.trak.files import read_json, write_json
from fastproj.trak.store import store as store_module
from fastproj.trak.store.features import pack_half, unpack
from fastproj.trak.store.scores import load_scores, read_scores, read_top_scores
from fastproj.trak.store.store import LONGEST_NAME
from tests.trak import cases

N, M = 12, 3


@pytest.fixture
def model():
    return cases.net()


@pytest.fixture
def train():
    return cases.data(N)


@pytest.fixture
def finished(tmp_path, model, train):
    """A directory with everything in it, and its scores."""
    scores = np.array(cases.whole_run(tmp_path, [model], train, cases.data(M, seed=5)))
    cases.make(model, tmp_path, N).finalize_scores("test", top_k=2)
    return tmp_path, scores


def read_all(folder, model, pattern=""):
    """Everything that reads a store; what was there before it is made again.

    Drawn rows are read where the matrix that they are summed up in isn't there.
    """
    if "drawn" in pattern:
        (folder / "models" / "0" / "fisher.safetensors").unlink(missing_ok=True)
        cases.make(model, folder, N).finalize_features()
    read_scores(folder / "scores" / "test.mmap")
    read_top_scores(folder / "scores" / "test.top.safetensors")
    return np.array(cases.make(model, folder, N).finalize_scores("test"))


FILES = [
    "metadata.json",
    "models/0/checkpoint.json",
    "models/0/solve.json",
    "models/0/fisher.safetensors",
    "models/0/train-*.safetensors",
    "models/0/drawn/drawn-*.safetensors",
    "models/0/targets/test/target-*.safetensors",
    "experiments/test.json",
    "scores/test.mmap",
    "scores/test.top.safetensors",
]


def says_the_same(text, other):
    """Whether two texts in JSON have the same values, bit for bit."""
    try:
        return repr(json.loads(text)) == repr(json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("pattern", FILES)
def test_flipped_bits_are_found_and_named(finished, model, pattern):
    folder, scores = finished
    path = sorted(folder.glob(pattern))[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    header = range(min(len(whole), 40))
    places = {*header, len(whole) - 1, *rng.integers(len(whole), size=60).tolist()}
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        if path.suffix == ".json" and says_the_same(damaged, whole):
            continue  # the last of 17 digits
        path.write_bytes(damaged)
        with pytest.raises(StoreCorruptError) as error:
            read_all(folder, model, pattern)
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_all(folder, model, pattern), scores)


CURES = {
    "models/0/fisher.safetensors": "call finalize_features again",
    "models/0/train-*.safetensors": "featurize the same data again",
    "models/0/drawn/drawn-*.safetensors": "featurize the same data again",
    "scores/test.mmap": "call finalize_scores again",
}


@pytest.mark.parametrize("offsets", ["[]", "[0]", "3", "null", '"no"', "[0, null]"])
def test_a_header_with_other_offsets_is_found_and_named(tmp_path, offsets):
    entry = '"a": {"dtype": "F32", "shape": [1], "data_offsets": ' + offsets + "}"
    header = '{"__metadata__": {}, ' + entry + "}"
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(StoreCorruptError, match="is not a whole safetensors file"):
        module.read_safetensors(path, ["a"])


def test_a_folder_whose_name_is_not_utf8_is_not_called_damaged(finished, model):
    folder, scores = finished
    other = folder.with_name("\udce9t\udce9")  # in Latin-1
    folder.rename(other)
    with pytest.raises(StoreError, match=r"can't read .*rename the folder") as error:
        read_all(other, model)
    assert not isinstance(error.value, StoreCorruptError)
    other.rename(folder)
    np.testing.assert_array_equal(read_all(folder, model), scores)


@pytest.mark.parametrize("pattern", FILES)
def test_truncated_files_are_found_and_named(finished, model, pattern):
    folder, _ = finished
    path = sorted(folder.glob(pattern))[-1]
    whole = path.read_bytes()
    for length in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreCorruptError, match=r"is damaged.*Delete the file and") as error:
            read_all(folder, model, pattern)
        assert str(path) in str(error.value)
        assert CURES.get(pattern, "") in str(error.value)


@pytest.mark.parametrize("pattern", FILES)
def test_deleting_a_file_and_repeating_the_run_restores_it(finished, model, train, pattern):
    folder, scores = finished
    for path in folder.glob(pattern):
        path.unlink()
    again = cases.whole_run(folder, [model], train, cases.data(M, seed=5))
    cases.make(model, folder, N).finalize_scores("test", top_k=2)
    assert list(folder.glob(pattern))
    np.testing.assert_allclose(again, scores, rtol=1e-5, atol=1e-6 * np.abs(scores).max())


def test_every_shard_says_what_it_is(finished):
    folder, _ = finished
    path = next(folder.glob("models/0/train-*"))
    tensors, metadata = module.read_safetensors(path, None)
    kept = {"grads", "inds", "content", "out_to_loss"}
    assert set(tensors) == kept | {"curvature", "along", "drawn"}
    wanted = {"spec_version": "1", "seed": "0", "kind": "rademacher", "proj_dim": "8"}
    wanted |= {"stream": "0", "num_params": "341", "train_set_size": "12", "format": "4"}
    assert wanted.items() <= metadata.items()
    assert {"parameter_layout", "checkpoint", "checksum.grads", "checksum.inds"} <= set(metadata)
    tensors, metadata = module.read_safetensors(next(folder.glob("models/0/drawn/drawn-*")), None)
    assert set(tensors) == kept
    assert wanted.items() <= metadata.items()
    assert metadata["curvature"] == "fisher, 1 row(s) drawn for 12 of 12 samples"


def test_a_shard_of_another_run_is_refused(finished, model, train, tmp_path_factory):
    folder, _ = finished
    other = tmp_path_factory.mktemp("other")
    cases.whole_run(other, [model], train, train, projector_seed=4)
    shutil.copy(next(other.glob("models/0/train-*")), folder / "models" / "0")
    with pytest.raises(StoreMismatchError, match="seed '4'; this run has '0'"):
        read_all(folder, model)


def test_targets_of_another_experiment_are_refused(finished, model, train):
    folder, _ = finished
    traker = cases.make(model, folder, N)
    traker.start_scoring_checkpoint("other", model.state_dict(), 0, M)
    targets = folder / "models" / "0" / "targets"
    (targets / "other").mkdir(exist_ok=True)
    shutil.copy(next((targets / "test").glob("target-*")), targets / "other")
    with pytest.raises(StoreMismatchError, match="experiment 'test'; this run has 'other'"):
        cases.make(model, folder, N).finalize_scores("other")


# ---- a disk that refuses ------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failed_write_loses_the_batch_and_nothing_else(
    tmp_path, model, train, monkeypatch, call, code
):
    traker = cases.loaded(model, tmp_path, N)
    traker.featurize((train[0][:5], train[1][:5]), num_samples=5)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    rest = (train[0][5:], train[1][5:])
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        wanted = "no room for .* bytes free" if code == errno.ENOSPC else os.strerror(code)
        with pytest.raises(StoreError, match=wanted):
            traker.featurize(rest, num_samples=N - 5)
    assert not list(tmp_path.rglob(".*"))
    assert len(list(tmp_path.glob("models/0/train-*"))) == 1
    traker.featurize(rest, num_samples=N - 5)  # the same traker goes on where it was
    traker.finalize_features()
    assert traker.saver.index(0).done.all()


def test_no_room_for_scores_is_said_before_they_are_computed(finished, model, monkeypatch):
    folder, scores = finished

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    traker = cases.make(model, folder, N)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(StoreError, match=r"no room for .*test.mmap \(144 bytes"):
            traker.finalize_scores("test")
    assert {p.name for p in (folder / "scores").iterdir()} == {"test.mmap", "test.top.safetensors"}
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


def seeded(folder, model, seed):
    """A TRAKer of a projection of its own."""
    return cases.make(model, folder, N, projector_seed=seed)


def test_of_two_runs_that_begin_at_once_the_first_has_the_directory(
    tmp_path, model, train, monkeypatch
):
    def both(what, first, second, error):
        """``second()`` fails where ``first()`` comes between its look at a file and its writing."""
        real = store_module.write_json

        def after_another(path, *args, **kwargs):
            if path.name == what:
                monkeypatch.setattr(store_module, "write_json", real)
                first()
            real(path, *args, **kwargs)

        monkeypatch.setattr(store_module, "write_json", after_another)
        with pytest.raises(StoreMismatchError, match=error):
            second()

    made = []
    both(
        "metadata.json",
        lambda: made.append(seeded(tmp_path, model, 0)),
        lambda: seeded(tmp_path, model, 1),
        "seed 0 in the directory, 1 in this run",
    )
    traker, again = *made, seeded(tmp_path, model, 0)
    both(
        "checkpoint.json",
        lambda: cases.featurize(traker, cases.net(), 0, train),
        lambda: cases.featurize(again, cases.net(1), 0, train),
        "belongs to a checkpoint with hash",
    )
    traker.finalize_features()
    both(
        "test.json",
        lambda: cases.score(traker, cases.net(), 0, cases.data(M)),
        lambda: cases.score(seeded(tmp_path, model, 0), cases.net(), 0, cases.data(M + 1)),
        f"has {M} targets, received {M + 1}",
    )
    assert traker.finalize_scores("test").shape == (N, M)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    write_json(tmp_path / "a.json", {"a": 1}, replace=False)
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_systems_put_beside_files_is_not_read(finished, model):
    """Folders with numbers in other writings, and copies as macOS and cloud storage make them."""
    folder, scores = finished
    for name in ("²", "٣", "007"):
        shutil.copytree(folder / "models" / "0", folder / "models" / name)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
        shutil.copy(path, path.with_name(f"{path.stem} (1){path.suffix}"))
    traker = cases.make(model, folder, N)
    assert list(traker.saver.model_ids) == [0]
    assert list(traker.saver.experiments) == ["test"]
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


def test_a_save_dir_that_cannot_be(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"can't make the directory .*file.*may write to"):
        cases.make(model, tmp_path / "file" / "results", N)


def test_an_interrupted_scoring_leaves_the_old_scores(finished, model, monkeypatch):
    folder, scores = finished
    traker = cases.make(model, folder, N)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(traker.score_computer, "scores", stop)
    with pytest.raises(KeyboardInterrupt):
        traker.finalize_scores("test")
    assert {p.name for p in (folder / "scores").iterdir()} == {"test.mmap", "test.top.safetensors"}
    np.testing.assert_array_equal(np.load(folder / "scores" / "test.mmap"), scores)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB of one's own; ``remount`` changes its options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount; the tests with a limit on file sizes don't")

    def remount(options):
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, remount
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk(small_disk, model, train, tmp_path):
    folder, remount = small_disk
    targets = cases.data(M, seed=5)
    options = {"proj_dim": 500, "lambda_reg": "1*mean"}
    whole = cases.whole_run(tmp_path / "whole", [model], train, targets, **options)
    traker = cases.loaded(model, folder / "store", N, **options)
    for room in (256, 512):
        fill(folder, leave=12 << 10)
        with pytest.raises(StoreError, match=r"no room for .*train-.* bytes free.*go on"):
            one_by_one(traker, train)
        assert not list(folder.rglob(".*.tmp"))
        remount(f"size={2 * room}k")
    done = traker.saver.index(0).done
    assert 0 < done.sum() < N
    remount("size=20m")
    traker = cases.loaded(model, folder / "store", N, **options)
    features, computed = traker._featurizer.features, []

    def counted(batch, model_id, inds, **kind):
        computed.extend(inds)
        return features(batch, model_id, inds, **kind)

    traker._featurizer.features = counted
    traker.featurize(train, num_samples=N)
    assert sorted(computed) == np.flatnonzero(~done).tolist()
    fill(folder, leave=4 << 10)
    with pytest.raises(StoreError, match=r"no room for .*kernel.safetensors"):
        traker.finalize_features()
    (folder / "fill").unlink()
    traker.finalize_features()
    cases.score(traker, model, 0, targets)
    fill(folder, leave=0)
    with pytest.raises(StoreError, match=r"no room for .*test.mmap"):
        traker.finalize_scores("test")
    assert not list((folder / "store" / "scores").iterdir())
    (folder / "fill").unlink()
    found = traker.finalize_scores("test")
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4 * np.abs(whole).max())


def one_by_one(traker, train):
    """A shard for each sample."""
    for i in range(N):
        traker.featurize((train[0][i : i + 1], train[1][i : i + 1]), inds=[i])


def fill(folder, leave):
    """Use up a disk but for ``leave`` bytes."""
    (folder / "fill").unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    (folder / "fill").write_bytes(b"x" * max(0, free - leave))


def test_a_read_only_disk(small_disk, model, train):
    folder, remount = small_disk
    remount("size=20m")
    store = folder / "store"
    scores = np.array(cases.whole_run(store, [model], train, cases.data(M, seed=5)))
    left = module.temporary_path(store / "models" / "0" / "left")
    left.with_name(left.name.replace(f".{os.getpid()}.", f".{2**30}.")).touch()
    half = cases.loaded(model, folder / "half", N)
    remount("ro")
    with pytest.raises(StoreError, match=r"can't make the directory .* \(Read-only file system"):
        cases.make(model, folder / "new", N)
    with pytest.raises(StoreError, match=r"can't make the directory .*drawn \(Read-only file"):
        half.featurize(train, num_samples=N)
    done = cases.make(model, store, N)  # what is there can be read
    done.load_checkpoint(model.state_dict(), 0)
    assert done.saver.current_store["grads"].shape == (N, 8)
    np.testing.assert_array_equal(read_scores(store / "scores" / "test.mmap"), scores)
    with pytest.raises(StoreError, match=r"can't write .*test.mmap \(Read-only file system"):
        done.finalize_scores("test")
    remount("rw")
    half.featurize(train, num_samples=N)
    np.testing.assert_array_equal(done.finalize_scores("test"), scores)


def test_a_limit_on_the_size_of_files(tmp_path, model, train):
    traker = cases.loaded(model, tmp_path, N, proj_dim=500)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 10, before[1]))
    try:
        with pytest.raises(StoreError, match=r"can't write .*drawn-.* \(File too large\); nothing"):
            traker.featurize(train, num_samples=N)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob(".*.tmp"))
    traker.featurize(train, num_samples=N)
    assert traker.saver.index(0).done.all()


# ---- several writers ----------------------------------------------------------------------------


def test_two_writers_of_one_checkpoint(finished, model, train, tmp_path_factory):
    """Both compute everything, in other batches, and neither knows of the other."""
    _, scores = finished
    folder = tmp_path_factory.mktemp("two")
    trakers = [cases.make(model, folder, N) for _ in range(2)]
    for traker in trakers:
        traker.load_checkpoint(model.state_dict(), 0)
    for step in range(3):
        for traker, size in zip(trakers, (4, 3), strict=True):
            rows = slice(step * size, (step + 1) * size)
            traker.featurize((train[0][rows], train[1][rows]), inds=range(N)[rows])
    trakers[0].finalize_features()
    cases.score(trakers[1], model, 0, cases.data(M, seed=5))
    assert sum(1 for _ in folder.glob("models/0/train-*")) == 6
    found = trakers[0].finalize_scores("test")
    np.testing.assert_allclose(found, scores, rtol=1e-5, atol=1e-6 * np.abs(scores).max())


def test_left_over_temporary_files_go_when_their_process_is_gone(tmp_path, model):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    traker = cases.loaded(model, tmp_path, N)
    folder = tmp_path / "models" / "0"
    dead, live = module.temporary_path(folder / "a"), module.temporary_path(folder / "b")
    dead = dead.with_name(dead.name.replace(f".{os.getpid()}.", f".{int(gone.stdout)}."))
    foreign = folder / f".c.elsewhere.{int(gone.stdout)}.0.tmp"
    for path in (dead, live, foreign):
        path.write_bytes(b"")
    traker.load_checkpoint(model.state_dict(), 0)
    assert (dead.exists(), live.exists(), foreign.exists()) == (False, True, True)


def test_temporary_files_of_other_containers_are_left_alone(tmp_path, monkeypatch):
    """Which may have this host's name, and processes with ids that none has here."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    monkeypatch.setattr(os, "getpid", lambda: int(gone.stdout))
    here = module.temporary_path(tmp_path / "a")
    monkeypatch.setattr(os, "readlink", lambda _: "pid:[1]")
    there = module.temporary_path(tmp_path / "a")
    for path in (here, there):
        path.touch()
    monkeypatch.undo()
    module.remove_stale(tmp_path)
    assert (here.exists(), there.exists()) == (False, True)


def test_the_longest_names_of_experiments_and_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "m" * 64)
    name = "e" * LONGEST_NAME
    traker = cases.featurized(cases.net(), tmp_path, cases.data(N))
    traker.finalize_features()
    cases.score(traker, cases.net(), 0, cases.data(M), name)
    traker.finalize_scores(name)
    assert traker.finalize_scores(name, top_k=2).shape == (N, M)
    monkeypatch.setattr(os, "getpid", lambda: (1 << 22) - 1)
    longest = module.temporary_path(traker.saver.top_path(name)).name
    assert len(longest) <= os.pathconf(tmp_path, "PC_NAME_MAX")


# ---- formats ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-310, 1e-42, 1e-40, 1e-20, 1e-4, 1.0, 1e6, 1e37])
def test_half_precision_keeps_eleven_bits(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(5, 64, generator=generator, dtype=torch.float64) * scale).to(dtype)
    rows[2] = 0
    packed = pack_half(rows)
    assert packed["grads"].dtype == torch.float16
    back = unpack(packed)
    assert back.dtype == torch.float32
    largest = rows.double().abs().amax(1, keepdim=True)
    # Half a unit in the last of 11 bits, or of what is left 2^-29 below the row's largest entry;
    # the last term is float32's own smallest step.
    bound = rows.double().abs() * 2.0**-11 + largest * 2.0**-39 + 2.0**-149
    assert bool(((back.double() - rows.double()).abs() <= bound).all())


def test_json_round_trip(tmp_path):
    path = tmp_path / "a.json"
    content = {"a": 1, "seed": 2**64 - 1, "list": [0.1, 1e-300], "name": "ü"}
    write_json(path, content)
    assert read_json(path) == content
    path.write_text("[]")
    with pytest.raises(StoreCorruptError, match=r"a\.json"):
        read_json(path)


def test_temporary_files_of_others_are_left_alone(tmp_path):
    for name in (".notes.tmp", ".a.b.tmp", ".tmp"):
        (tmp_path / name).write_text("not ours")
        cases.make(cases.net(), tmp_path, 10)
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("damage", ["its end", "behind its end", "its middle"])
def test_damaged_scores_are_not_taken_for_another_programs(tmp_path, damage):
    traker_scores = cases.whole_run(tmp_path, [cases.net()], cases.data(10), cases.data(3))
    path = tmp_path / "scores" / "test.mmap"
    np.testing.assert_array_equal(load_scores(path), traker_scores)
    content = bytearray(path.read_bytes())
    if damage == "its end":
        content[-1] ^= 1
    elif damage == "behind its end":
        content += b"x"
    else:
        content[-200] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorruptError, match=re.escape(path.name)):
        load_scores(path)


def test_files_are_what_safetensors_reads(tmp_path):
    tensors = {
        "half": torch.arange(3, dtype=torch.float16),  # others must not lie behind odd bytes
        "matrix": torch.randn(2, 3, dtype=torch.float64).mT,
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(5),
    }
    path = tmp_path / "x.safetensors"
    module.write_safetensors(path, tensors, {"word": "ü"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["word"] == "ü"
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            name: t.tolist() for name, t in tensors.items()
        }
    for names in (None, ["matrix"], ["number", "nothing", "half"]):
        found, _ = module.read_safetensors(path, names)
        for name, t in found.items():
            assert torch.equal(t, tensors[name])
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % module.ALIGNMENT == 0


def test_a_file_that_goes_while_it_is_opened_is_named(tmp_path, monkeypatch):
    """safe_open opens it twice; torch, which does the second, raises a RuntimeError."""
    path = tmp_path / "part.safetensors"
    module.write_safetensors(path, {"x": torch.ones(3)}, {})

    def vanishing(path, **_):
        path.unlink()
        raise RuntimeError(f"unable to open file <{path}> in read-only mode")

    monkeypatch.setattr(module, "safe_open", vanishing)
    with pytest.raises(StoreError, match="is gone"):
        module.read_safetensors(path, None)


def test_a_store_of_the_sparse_kind(tmp_path):
    """Another block, or kind, is refused with both values named; the same goes on."""
    model, x, y = torch.nn.Linear(6, 3), torch.randn(20, 6), torch.randint(0, 3, (20,))

    def traker(**options):
        return TRAKer(
            model,
            "image_classification",
            20,
            save_dir=tmp_path,
            proj_dim=64,
            logging_level="ERROR",
            **options,
        )

    first = traker(kind="sjlt")
    first.load_checkpoint(model.state_dict(), 0)
    first.featurize((x, y), num_samples=20)
    assert first.saver.matrix(0).shape == (20, 64)
    with pytest.raises(StoreMismatchError, match="block 16 in the directory, 32 in this run"):
        traker(kind="sjlt", block=32)
    with pytest.raises(StoreMismatchError, match="'sjlt' in the directory, 'rademacher'"):
        traker(kind="rademacher")
    again = traker(kind="sjlt", block=16)
    again.load_checkpoint(model.state_dict(), 0)
    assert again.saver.index(0).done.all()
    with pytest.raises(ValueError, match="only kind='sjlt' has a block"):
        traker(kind="gaussian", block=16)


class Doubling:
    """A projector that is not fastproj's."""

    proj_dim = 64

    def project(self, grads, model_id):
        return 2 * grads[:, :64]


def sparse(**options):
    """A projector for the gradients of ``Linear(6, 3)``. TRAKer's own has scale 4."""
    return Projector(21, 64, kind="sjlt", **{"block": 16, **options})


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (
            {"kind": "rademacher", "proj_dim": 48},
            {},
            "kind 'rademacher' in the directory, 'sjlt' in this run; block None in the directory",
        ),
        ({"kind": "gaussian"}, {"block": 32}, "kind 'gaussian' in the directory, 'sjlt' in"),
        ({"kind": "sjlt", "block": 16}, {"block": 32}, "block 16 in the directory, 32 in this"),
        ({"block": 32}, {"kind": "rademacher"}, "kind 'sjlt' in the directory, 'rademacher' in"),
        ({"projector_seed": 5}, {}, "seed 5 in the directory, 0 in this run"),
        ({"factored": 2}, {"projector": Doubling()}, "'fastproj.projector.Projector' in the"),
        ({}, {"projector": sparse(block=32, scale=None)}, "block 16 in the directory, 32 in this"),
        (
            {},
            {"projector": sparse(scale=4.0, seed=5)},
            ": seed 0 in the directory, 5 in this",
        ),
        ({}, {"projector": sparse()}, r"scale \"TRAKer's own\" in the directory, 0.5 in this run"),
    ],
)
def test_a_store_of_another_matrix_says_which_arguments_go_on_with_it(tmp_path, before, now, said):
    def traker(**options):
        return TRAKer(
            torch.nn.Linear(6, 3),
            "image_classification",
            20,
            save_dir=tmp_path,
            logging_level="ERROR",
            **{"proj_dim": 64, **options},
        )

    traker(**before)
    with pytest.raises(StoreMismatchError, match=said) as refused:
        traker(**now)
    words = re.search(r"use the same settings \((.*)\), or another save_dir", str(refused.value))
    assert words is not None
    named = dict(word.split("=") for word in words[1].split(", "))
    traker(**{**now, **{name: ast.literal_eval(value) for name, value in named.items()}})


def test_a_store_of_a_projector_of_its_own_scale_is_refused_to_others(tmp_path):
    def traker(**options):
        model = torch.nn.Linear(6, 3)
        return TRAKer(model, "image_classification", 20, tmp_path, proj_dim=64, **options)

    traker(projector=sparse(scale=2))
    traker(projector=sparse(scale=2.0))  # goes on
    said = (
        "scale 2.0 in the directory, \"TRAKer's own\" in this run.*; use a projector with kind='sj"
    )
    for other in ({}, {"projector": sparse(scale=4.0)}):
        with pytest.raises(StoreMismatchError, match=said) as refused:
            traker(**other)
        assert "block=16, proj_dim=64, factored=None, seed=0, scale=2.0," in str(refused.value)


def test_a_store_of_the_default_kind_is_sparse(tmp_path):
    for proj_dim, block, kind, chosen in (
        (256, None, "sjlt", 64),
        (16, None, "sjlt", 16),
        (15, None, "rademacher", None),  # rows of sjlt would be empty
        (8, 32, "sjlt", 32),
    ):
        model, folder = torch.nn.Linear(6, 3), tmp_path / f"{proj_dim}"
        traker = TRAKer(model, "image_classification", 20, folder, proj_dim=proj_dim, block=block)
        assert (traker.projector.kind, traker.projector.block) == (kind, chosen)


def test_features_are_as_long_with_every_kind(tmp_path):
    """So that lambda_reg, a number on the diagonal of XtX, means the same."""
    model = torch.nn.Linear(300, 4)
    x, y = torch.randn(20, 300), torch.randint(0, 4, (20,))
    lengths = {}
    for kind, block in (("rademacher", None), ("gaussian", None), ("sjlt", None), ("sjlt", 256)):
        folder = tmp_path / f"{kind}{block}"
        made = TRAKer(
            model, "image_classification", 20, folder, proj_dim=512, kind=kind, block=block
        )
        made.load_checkpoint(model.state_dict(), 0)
        made.featurize((x, y), num_samples=20)
        lengths[kind, block] = float(made.saver.matrix(0).square().sum())
    for length in lengths.values():  # 2 / K is the variance of each of 20 terms
        assert abs(length / lengths["rademacher", None] - 1) < 6 * (2 * 2 / 512) ** 0.5
