"""The feature store: what TRAK has computed so far, on disk, also if it is killed.

    save_dir/
        metadata.json                 what all features share: spec, seed, kind, proj_dim, model
        models/<model_id>/
            checkpoint.json           hash of the checkpoint's parameters and buffers
            distrusted.json           gradients failed a check: shards on trust don't count
            train-*.safetensors       features, Q and indices of one featurized batch or several;
                                      with curvature "fisher" also what its rows count
            weighted.safetensors      Phi^T W Phi, W = Q (1 - Q), once finalised with lambda "auto"
            xtx.safetensors           Phi^T Phi, once finalised with another
            part-*.safetensors        one of these, of some of the samples, while finalising
            solve.json                lambda, its matrix, rank, condition estimate
            fisher.safetensors            the Fisher matrix, once finalised with that curvature
            drawn/drawn-*.safetensors     rows of the Fisher matrix
            targets/<exp_name>/*.safetensors
            simulated_pairs.json, targets/<exp_name>/simulated_pairs.json
                                      of CLIP: hash of the pairs that the features were made with
        experiments/<exp_name>.json
        scores/<exp_name>.mmap        [n_train, n_targets] float32; np.load reads it
        scores/<exp_name>.top.safetensors   the best and worst training samples of each target

Every file is written under a temporary name, flushed to disk and renamed, so that it is there in
full or not at all. It is never written to again. Each carries a checksum. Small shards are merged
into larger ones (``fastproj.trak.store.shards``).
"""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.trak.callers import stack_to_caller
from fastproj.trak.files import (
    GoneError,
    Indices,
    StoreError,
    StoreMismatchError,
    Tensors,
    digest,
    make_dir,
    read_json,
    read_safetensors,
    remove_quietly,
    remove_stale,
    write_json,
    write_safetensors,
)
from fastproj.trak.store.features import FeatureReader, block_rows, pack_half, sample_blocks
from fastproj.trak.store.identity import GIVEN, check_identity
from fastproj.trak.store.shards import ON_TRUST, ShardFile, ShardIndex, alone, joined, scan

FORMAT = 4
ROWS = "drawn"  # of a training shard: how many rows were drawn for each sample
LONGEST_NAME = 200  # bytes: file systems take 255, and suffixes are added
EXP_NAME = re.compile(r"[\w+=,@-][\w .+=,@-]*")
DRAWN = ".drawn"  # stands for an experiment: the rows of the Fisher matrix that are drawn
Found = list[tuple[ShardFile, Indices, Indices]]  # with the numbers and content ids of its rows


class NotReadyError(RuntimeError):
    """A step was called before the step that it builds on."""


class Store:
    """The files of one ``save_dir``.

    Parameters
    ----------
    save_dir : the directory; made if missing.
    identity : what every feature in it shares. A directory with other values is refused.
    train_set_size : n, the number of training samples.
    proj_dim : k.
    load_from_save_dir : False uses nothing that an earlier run left for a model_id. It is set aside
        (renamed, not deleted) when that model_id is first loaded; see ``earlier``.
    draws : how many rows of the Fisher matrix are drawn for a sample.
    half : store features as float16 with a power-of-two scale per row, so that no magnitude is
        lost, instead of in the projector's dtype.

    Attributes
    ----------
    earlier : the model_ids whose folders are an earlier run's and don't count, and the names that
        these get when they are set aside. Processes of one run must have the same.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        identity: Mapping[str, Any],
        train_set_size: int,
        proj_dim: int,
        load_from_save_dir: bool = True,
        half: bool = True,
        draws: int = 1,
    ) -> None:
        self.draws = draws
        self.save_dir = Path(save_dir).resolve()
        self.identity = {key: value for key, value in identity.items() if key != GIVEN}
        self.train_set_size = train_set_size
        self.proj_dim = proj_dim
        self.half = half
        self.current_model_id: int | None = None
        self._indices: dict[tuple[int, str | None], ShardIndex] = {}
        self._checkpoints: dict[int, str] = {}
        for folder in ("models", "experiments", "scores", "."):
            make_dir(self.save_dir / folder)
            remove_stale(self.save_dir / folder)
        self._open_metadata(bool(identity.get(GIVEN)))
        self.earlier: dict[int, str] = {}
        if not load_from_save_dir:
            self.earlier = names_aside(i for i in self.ids() if any(self.model_dir(i).iterdir()))

    # ---- what is there --------------------------------------------------------------------------

    def _open_metadata(self, given: bool) -> None:
        """Write metadata.json, or compare it with this run's identity. ``given`` is GIVEN's."""
        path = self.save_dir / "metadata.json"
        wanted = {"format": FORMAT, **self.identity}
        if not path.exists():
            write_json(path, wanted, replace=False)
        check_identity(self.save_dir, read_json(path), wanted, given)

    def ids(self) -> list[int]:
        """The model_ids on disk, ascending, without those of an earlier run that doesn't count."""
        folders = [path.name for path in (self.save_dir / "models").iterdir()]
        for model_id, name in list(self.earlier.items()):
            if name in folders:  # set aside, here or by another process of this run
                del self.earlier[model_id]
        found = {int(name) for name in folders if re.fullmatch("0|[1-9][0-9]*", name)}
        return sorted(found - self.earlier.keys())

    @property
    def experiments(self) -> dict[str, dict[str, Any]]:
        """What is known of each experiment, by name."""
        return {
            path.stem: read_json(path)
            for path in sorted((self.save_dir / "experiments").glob("*.json"))
            if EXP_NAME.fullmatch(path.stem)  # not what the system puts beside a file: "._test"
        }

    def model_dir(self, model_id: int) -> Path:
        """Where the files of ``model_id`` are."""
        return self.save_dir / "models" / str(model_id)

    def shard_dir(self, model_id: int, exp_name: str | None) -> Path:
        """Where the shards of the training set (None), drawn rows or an experiment are."""
        model = self.model_dir(model_id)
        if exp_name == DRAWN:
            return model / "drawn"
        return model if exp_name is None else model / "targets" / exp_name

    # ---- checkpoints ----------------------------------------------------------------------------

    def register(self, model_id: int, checkpoint: str) -> None:
        """Make ``model_id`` current; ``checkpoint`` is the hash of its parameters and buffers."""
        folder = self.model_dir(model_id)
        self._set_aside(model_id)
        make_dir(folder)
        path = folder / "checkpoint.json"
        if not path.exists():
            write_json(path, {"model_id": model_id, "checkpoint": checkpoint}, replace=False)
        self._checkpoints[model_id] = self.check_checkpoint(model_id, checkpoint)
        for part in (None, DRAWN):
            remove_stale(self.shard_dir(model_id, part))
            self.forget_index(model_id, part)
            self._tidy(model_id, part)
        self.current_model_id = model_id

    def _set_aside(self, model_id: int) -> None:
        """Rename what an earlier run left for ``model_id``, unless another process has done so.

        All have one name for it. A folder isn't renamed to one that is there and not empty.
        """
        name = self.earlier.get(model_id)
        if name is None:
            return
        folder = self.model_dir(model_id)
        try:
            folder.rename(folder.with_name(name))
        except FileNotFoundError:
            pass
        except OSError as error:
            if not folder.with_name(name).exists():
                raise StoreError(
                    f"can't rename {folder} to {name} ({error.strerror or error}); expected a "
                    "directory that this user may change"
                ) from error
        else:
            warnings.warn(
                f"TRAKer: load_from_save_dir=False: what {self.save_dir} held for model_id "
                f"{model_id} was moved to {name}; delete it if you don't need it",
                stacklevel=stack_to_caller(),
            )
        self.earlier.pop(model_id, None)

    def twin(self, model_id: int, checkpoint: str) -> int | None:
        """Another model_id that this process has registered with the same hash, for a new one."""
        if self.is_registered(model_id):
            return None
        alike = (i for i, digest in self._checkpoints.items() if digest == checkpoint)
        return next((i for i in alike if i != model_id), None)

    def is_registered(self, model_id: int) -> bool:
        """Whether it is known which checkpoint ``model_id`` is."""
        return (self.model_dir(model_id) / "checkpoint.json").exists()

    def check_checkpoint(
        self,
        model_id: int,
        checkpoint: str,
        expected: str = "use another model_id or save_dir (load_from_save_dir=False starts this "
        "model_id afresh)",
    ) -> str:
        """Raise unless ``model_id`` was featurized from this checkpoint; returns its hash."""
        path = self.model_dir(model_id) / "checkpoint.json"
        if not path.exists():
            raise NotReadyError(
                f"TRAKer: model_id {model_id} has no features in {self.save_dir}; call "
                "load_checkpoint and featurize for it first"
            )
        stored = read_json(path)["checkpoint"]
        if stored != checkpoint:
            raise StoreMismatchError(
                f"TRAKer: model_id {model_id} in {self.save_dir} belongs to a checkpoint with hash "
                f"{stored}, received one with hash {checkpoint}",
                expected,
                another="save_dir",
            )
        return str(stored)

    def start_experiment(
        self,
        exp_name: str,
        model_id: int,
        num_targets: int,
        grouping: tuple[list[int], str] | None = None,
    ) -> None:
        """Make ``model_id`` current for an experiment; raises as ``check_experiment``."""
        path = self.experiment_path(exp_name)
        facts: dict[str, Any] = {"num_targets": num_targets}
        if grouping is not None:
            facts["groups"], facts["reduction"] = grouping
        if not path.exists():
            write_json(path, facts, replace=False)
        self.check_experiment(exp_name, num_targets, grouping)
        remove_stale(self.shard_dir(model_id, exp_name))
        self._tidy(model_id, exp_name)
        self.current_model_id = model_id

    def check_experiment(
        self, exp_name: str, num_targets: int, grouping: tuple[list[int], str] | None = None
    ) -> None:
        """Raise StoreMismatchError if an experiment is there with other targets or groups.

        grouping : the group of each target, and "sum" | "mean"; None scores each target.
        """
        path = self.experiment_path(exp_name)
        if not path.exists():
            return
        stored = read_json(path)["num_targets"]
        if stored != num_targets:
            raise StoreMismatchError(
                f"TRAKer: experiment {exp_name!r} in {self.save_dir} has {stored} targets, "
                f"received {num_targets}",
                "use another exp_name",
                another="exp_name",
            )
        there = self.grouping(exp_name)
        if there != grouping:
            groups, reduction = there or (None, None)
            raise StoreMismatchError(
                f"TRAKer: experiment {exp_name!r} in {self.save_dir} has "
                f"{describe_grouping(there)}, received {describe_grouping(grouping)}",
                "use the same groups= and reduction= for all checkpoints, or another exp_name",
                another="exp_name",
                same={"groups": groups, "reduction": reduction},
            )

    def num_targets(self, exp_name: str) -> int:
        """Number of targets of an experiment."""
        path = self.experiment_path(exp_name)
        if not path.exists():
            known = ", ".join(map(repr, self.experiments)) or "none"
            raise NotReadyError(
                f"TRAKer: experiment {exp_name!r} does not exist in {self.save_dir} (there: "
                f"{known}); call start_scoring_checkpoint and score first"
            )
        return int(read_json(path)["num_targets"])

    def grouping(self, exp_name: str) -> tuple[list[int], str] | None:
        """The group of each target of an experiment, and how scores of a group are reduced."""
        self.num_targets(exp_name)
        facts = read_json(self.experiment_path(exp_name))
        return (facts["groups"], facts["reduction"]) if "groups" in facts else None

    def num_columns(self, exp_name: str) -> int:
        """The number of scores for each training sample: of targets, or of groups of them."""
        grouping = self.grouping(exp_name)
        return self.num_targets(exp_name) if grouping is None else 1 + max(grouping[0])

    def experiment_path(self, exp_name: str) -> Path:
        """The experiment's JSON file; raises ValueError for a name that can't be one's."""
        check_exp_name("TRAKer", exp_name)
        return self.save_dir / "experiments" / f"{exp_name}.json"

    def same_pairs(self, model_id: int, exp_name: str | None, pairs: str) -> bool:
        """Whether features are made with the simulated pairs (a hash) that the first were made
        with: it is kept with them.
        """
        folder = self.shard_dir(model_id, exp_name)
        path = folder / "simulated_pairs.json"
        if not path.exists():
            make_dir(folder)
            write_json(path, {"pairs": pairs}, replace=False)
        return bool(read_json(path)["pairs"] == pairs)

    # ---- shards ---------------------------------------------------------------------------------

    def index(self, model_id: int, exp_name: str | None = None) -> ShardIndex:
        """Which samples (or, with exp_name, targets) of ``model_id`` are there, and where."""
        key = (model_id, exp_name)
        if key not in self._indices:
            found, with_rows = self._found(model_id, exp_name)
            if exp_name == DRAWN:
                self._leave_out_stale(model_id, found)
            for i, lost in self._without_rows(model_id, found, with_rows):
                file, inds, content = found[i]
                found[i] = file, np.where(lost, -1, inds), content
            index = ShardIndex.of(self.num_rows(exp_name), found, replace=is_target(exp_name))
            index.distrusted = self.distrusted(model_id)
            self._indices[key] = index
        return self._indices[key]

    def _found(
        self, model_id: int, exp_name: str | None
    ) -> tuple[Found, dict[int, npt.NDArray[np.bool_]]]:
        """The files that count, and by the place of a file which of its samples have drawn rows."""
        n, distrusted = self.num_rows(exp_name), self.distrusted(model_id)
        found: Found = []
        with_rows: dict[int, npt.NDArray[np.bool_]] = {}

        def read(path: Path) -> None:
            with suppress(GoneError, FileNotFoundError):  # its batches are in another file
                names = ("inds", "content")
                tensors, metadata = self.read(path, model_id, exp_name, names)
                if distrusted and ON_TRUST in metadata:
                    return
                inds = tensors["inds"].numpy()
                if len(inds) and (inds.min() < 0 or inds.max() >= n):
                    raise StoreMismatchError(
                        f"TRAKer: {path} holds sample {inds.max()}; expected samples below {n}",
                        "use another save_dir",
                        another="save_dir",
                    )
                file = ShardFile.of(path, metadata, path.stat().st_size)
                if exp_name is None and f"checksum.{ROWS}" in metadata:
                    rows = self.read(path, model_id, exp_name, (ROWS,))[0][ROWS].numpy()
                    with_rows[len(found)] = rows > 0
                found.append((file, inds, tensors["content"].numpy()))

        scan(self.shard_dir(model_id, exp_name), role_of(exp_name), read)
        return found, with_rows

    def _leave_out_stale(self, model_id: int, found: Found) -> None:
        """Let drawn rows of other data than their samples not count.

        They were left by a process that stopped before it wrote the samples, and the data have
        changed since: then there are rows of both.
        """
        rows = np.concatenate([inds for _, inds, _ in found]) if found else np.empty(0, np.int64)
        if len(np.unique(rows)) == len(rows):
            return
        samples, _ = self._found(model_id, None)
        there = ShardIndex.of(self.train_set_size, samples, replace=False)
        for i, (file, inds, content) in enumerate(found):
            of = inds // self.draws
            stale = there.done[of] & (there.content[of] != content)
            found[i] = file, np.where(stale, -1, inds), content

    def _without_rows(
        self, model_id: int, found: Found, with_rows: Mapping[int, npt.NDArray[np.bool_]]
    ) -> list[tuple[int, npt.NDArray[np.bool_]]]:
        """(place in ``found``, which of its samples lack their drawn rows): they don't count.

        with_rows : which samples of a file have rows, by its place.
        """
        lost: list[tuple[int, npt.NDArray[np.bool_]]] = []
        for again in (False, True):
            if again:  # rows are written before their samples: what is there now has to be found
                self.forget_index(model_id, DRAWN)
            if with_rows:
                done = np.all(self.index(model_id, DRAWN).done.reshape(-1, self.draws), 1)
                lost = [(i, some & ~np.take(done, found[i][1])) for i, some in with_rows.items()]
            if not any(some.any() for _, some in lost):
                return []
        return lost

    def num_rows(self, exp_name: str | None) -> int:
        """The number of training samples (None), of rows that can be drawn, or of targets."""
        if exp_name is None or exp_name == DRAWN:
            return self.train_set_size * (1 if exp_name is None else self.draws)
        return self.num_targets(exp_name)

    def forget_index(self, model_id: int, exp_name: str | None) -> None:
        """Look again, at the next call, where the samples of ``model_id`` are."""
        self._indices.pop((model_id, exp_name), None)

    def distrusted(self, model_id: int) -> bool:
        """Whether gradients of a checkpoint have failed a check: see ``distrust``."""
        return (self.model_dir(model_id) / "distrusted.json").exists()

    def distrust(self, model_id: int, reason: str) -> None:
        """Let features on trust of a checkpoint no longer count, in any process.

        Gram matrices that were made of them no longer count either: they carry the index's
        ``content_digest``.
        """
        write_json(self.model_dir(model_id) / "distrusted.json", {"reason": reason})
        self.forget()

    def forget(self) -> None:
        """Read the directory again at the next call: another process may have written to it."""
        self._indices.clear()

    def write_shard(
        self,
        model_id: int,
        inds: Indices,
        content: Indices,
        features: Tensor,
        out_to_loss: Tensor | None = None,
        exp_name: str | None = None,
        on_trust: bool = False,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the features [b, k] of the samples (or targets) ``inds`` [b], and their Q [b].

        ``columns`` are other numbers of the samples, float32 [b], by name: see ``column``.
        ``on_trust`` says that their gradients rest on checks of some batches: see ``distrust``.
        """
        tensors: Tensors = {
            "inds": torch.from_numpy(inds.astype(np.int64)),
            "content": torch.from_numpy(content.astype(np.int64)),
            **(pack_half(features.cpu()) if self.half else {"grads": features.cpu()}),
        }
        if out_to_loss is not None:
            tensors["out_to_loss"] = out_to_loss.float().cpu()
        for name, values in (columns or {}).items():
            tensors[name] = values.float().cpu()
        index = self.index(model_id, exp_name)
        folder = self.shard_dir(model_id, exp_name)
        make_dir(folder)
        # Names sort in the order that decides between two shards with the same sample: among
        # training shards (equal by construction) the first wins, among target shards the last.
        place = index.next_place() if is_target(exp_name) else int(inds.min())
        key = f"{place:012d}-{uuid.uuid4().hex[:12]}"
        file = self._write_shard(model_id, exp_name, tensors, ((key, len(inds)),), on_trust)
        index.add(file, inds, content, replace=exp_name is not None)
        self._merge(model_id, exp_name)

    def _write_shard(
        self,
        model_id: int,
        exp_name: str | None,
        tensors: Tensors,
        batches: Iterable[tuple[str, int]],
        on_trust: bool,
    ) -> ShardFile:
        """Write a file of the batches with these keys and numbers of rows, in this order."""
        keys, sizes = zip(*batches, strict=True)
        folder, role = self.shard_dir(model_id, exp_name), role_of(exp_name)
        key = keys[0]
        if len(keys) > 1:
            key = f"{key.split('-')[0]}-{uuid.uuid4().hex[:12]}"
        path = folder / f"{role}-{key}.safetensors"
        file = ShardFile(path, keys, sizes, sum(t.nbytes for t in tensors.values()), on_trust)
        self.write(path, tensors, model_id, exp_name, file.facts)
        return file

    def _tidy(self, model_id: int, exp_name: str | None) -> None:
        """Merge what a killed process left in many files."""
        index = self.index(model_id, exp_name)
        for path in index.redundant:
            remove_quietly(path)
        index.redundant.clear()
        while self._merge(model_id, exp_name):
            pass

    def _merge(self, model_id: int, exp_name: str | None) -> bool:
        """Merge small files where there are enough. Return whether any were. Results don't
        change.
        """
        index = self.index(model_id, exp_name)
        numbers = index.mergeable()
        if not numbers:
            return False
        files = [index.shards[number] for number in numbers]
        with alone(self.shard_dir(model_id, exp_name)) as free:
            if not free:
                return False
            try:
                parts = [self.read(file.path, model_id, exp_name)[0] for file in files]
                tensors = joined(parts)
                batches = [b for f in files for b in zip(f.keys, f.sizes, strict=True)]
                merged = None
                if tensors is not None:
                    trust = files[0].on_trust  # as all of them
                    merged = self._write_shard(model_id, exp_name, tensors, batches, trust)
            except (GoneError, FileNotFoundError):  # merged by another process
                self.forget_index(model_id, exp_name)
                return False
            except StoreError:  # damaged, or no room: said by whoever can't do without
                merged = None
            if merged is None:
                index.leave_alone(numbers)
                return False
            index.moved(numbers, merged)
            for file in files:
                remove_quietly(file.path)
        return True

    # ---- files of a checkpoint ------------------------------------------------------------------

    def _identity_of(self, model_id: int, exp_name: str | None) -> dict[str, str]:
        """What the metadata of a file of this run must say."""
        identity = {key: str(value) for key, value in self.identity.items()}
        return {
            **identity,
            "format": str(FORMAT),
            "stream": str(model_id),
            "checkpoint": self._checkpoint(model_id),
            "experiment": exp_name or "",
        }

    def run_digest(self, model_id: int) -> str:
        """Hash of what the features of ``model_id`` are: the run, and the checkpoint."""
        return digest(json.dumps(self._identity_of(model_id, None), sort_keys=True).encode())

    def _checkpoint(self, model_id: int) -> str:
        if model_id not in self._checkpoints:
            path = self.model_dir(model_id) / "checkpoint.json"
            if not self.is_registered(model_id):
                raise StoreError(
                    f"TRAKer: {path} is missing; expected load_checkpoint with model_id {model_id} "
                    "before what was made from it is read"
                )
            self._checkpoints[model_id] = str(read_json(path)["checkpoint"])
        return self._checkpoints[model_id]

    def write(
        self,
        path: Path,
        tensors: Tensors,
        model_id: int,
        exp_name: str | None = None,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Write a safetensors file whose metadata name its run, its checkpoint and ``facts``."""
        write_safetensors(path, tensors, self._identity_of(model_id, exp_name) | dict(facts or {}))

    def read(
        self,
        path: Path,
        model_id: int,
        exp_name: str | None = None,
        names: Iterable[str] | None = None,
        check: bool = True,
    ) -> tuple[Tensors, dict[str, str]]:
        """The tensors ``names`` (None: all) of a file, and its metadata; see ``read_safetensors``.

        Raises StoreMismatchError if the file is of another run.
        """
        tensors, metadata = read_safetensors(path, names, check)
        for key, value in self._identity_of(model_id, exp_name).items():
            if metadata.get(key) != value:
                raise StoreMismatchError(
                    f"TRAKer: {path} was made with {key} {metadata.get(key)!r}; this run has "
                    f"{value!r}",
                    "use another save_dir",
                    another="save_dir",
                )
        return tensors, metadata

    # ---- features -------------------------------------------------------------------------------

    def reader(self, model_id: int, exp_name: str | None = None) -> FeatureReader:
        """What reads features of ``model_id`` by sample number."""

        def look(again: bool = False) -> ShardIndex:
            if again:
                self.forget_index(model_id, exp_name)
            return self.index(model_id, exp_name)

        def read_shard(
            path: Path, names: Iterable[str] | None = None, check: bool = True
        ) -> Tensors:
            return self.read(path, model_id, exp_name, names, check)[0]

        return FeatureReader(look, read_shard, self.proj_dim)

    def blocks(
        self, model_id: int, exp_name: str | None = None
    ) -> Iterator[tuple[Indices, Tensor, Tensor | None]]:
        """(inds [b], features [b, k], Q [b] or None) of all samples, block by block."""
        reader = self.reader(model_id, exp_name)
        for inds in sample_blocks(reader.index.order(), block_rows(self.proj_dim)):
            yield inds, *reader.read(inds)

    def out_to_loss(self, model_id: int) -> Tensor:
        """Q of all training samples, float32 [n]; NaN where a sample is not featurized."""
        return self.column(model_id, "out_to_loss")

    def column(self, model_id: int, name: str) -> Tensor:
        """A number of each training sample, float32 [n]; NaN where a sample is not featurized."""
        reader = self.reader(model_id)
        out = torch.full((self.train_set_size,), torch.nan, dtype=torch.float32, device="cpu")
        inds = np.flatnonzero(reader.index.done)
        out[torch.from_numpy(inds)] = reader.read_column(inds, name)
        return out

    def matrix(self, model_id: int, exp_name: str | None = None) -> Tensor:
        """All features of ``model_id`` in order, [n, k] in memory; NaN where one is missing."""
        n = len(self.index(model_id, exp_name).shard)
        out: Tensor | None = None
        for inds, features, _ in self.blocks(model_id, exp_name):
            if out is None:
                out = features.new_full((n, self.proj_dim), torch.nan)
            out[torch.from_numpy(inds)] = features
        if out is None:
            out = torch.full((n, self.proj_dim), torch.nan, dtype=torch.float32, device="cpu")
        return out

    # ---- scores ---------------------------------------------------------------------------------

    def scores_path(self, exp_name: str) -> Path:
        """The file of the final scores."""
        self.experiment_path(exp_name)
        return self.save_dir / "scores" / f"{exp_name}.mmap"

    def top_path(self, exp_name: str) -> Path:
        """The file of the extreme scores."""
        self.experiment_path(exp_name)
        return self.save_dir / "scores" / f"{exp_name}.top.safetensors"


def names_aside(model_ids: Iterable[int]) -> dict[int, str]:
    """New names for the folders of these checkpoints."""
    unique = uuid.uuid4().hex[:8]
    return {model_id: f"{model_id}.replaced-{unique}" for model_id in model_ids}


def describe_grouping(grouping: tuple[list[int], str] | None) -> str:
    """A grouping in words, for messages."""
    if grouping is None:
        return "no groups"
    groups, reduction = grouping
    return f"groups {str(groups)[:60]}{'...' if len(str(groups)) > 60 else ''} by {reduction}"


def check_exp_name(function: str, exp_name: object, name: str = "exp_name") -> None:
    """Raise ValueError, about the argument ``name``, for what can't name an experiment."""
    if isinstance(exp_name, str) and len(exp_name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"{function}: received {name} of {len(exp_name)} characters, {exp_name[:20]!r}...; "
            f"expected at most {LONGEST_NAME} bytes, since it names files"
        )
    if not isinstance(exp_name, str) or not EXP_NAME.fullmatch(exp_name):
        raise ValueError(
            f"{function}: received {name}={exp_name!r}; expected letters, digits, spaces and "
            "_ . + = , @ - (it names files), not starting with a dot"
        )


def is_target(exp_name: str | None) -> bool:
    """Whether this is an experiment: of a target that is there twice, the later one counts."""
    return exp_name not in (None, DRAWN)


def role_of(exp_name: str | None) -> str:
    """What the names of shards begin with."""
    return "target" if is_target(exp_name) else "train" if exp_name is None else "drawn"
