"""Whether a model still holds the checkpoint that was loaded into it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.checks import listed
from fastproj.trak.attributes import Attributes
from fastproj.trak.files import tensor_digest
from fastproj.trak.fingerprints import combined_digest, model_digests, quick_sums
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.tasks.base import COPYING, SMALL_BYTES

COPIED_BYTES = 1 << 26  # of buffers kept to be put back, the smallest first
SETTLING = 16  # times that rows are brought to their largest norm, until nothing changes

logger = logging.getLogger("fastproj.trak")

Versions = dict[str, tuple[int, int]]


class LoadedModel:
    """A model with a loaded checkpoint, which must not change while features are made.

    Every call of the model notices writes that PyTorch counts. A checksum of all values, before
    anything of a batch is kept, notices the others (by ``p.data`` or numpy).

    Rows of an ``nn.Embedding(max_norm=)`` are scaled down to that norm here. Its forward would do
    so with the rows that it looks up, and is kept from writing to them.

    Buffers that the model's own forward writes to in eval mode (caches, counters) are put back
    where tasks don't get copies, so that features don't depend on the order of batches.

    Attributes that are no tensors may change; a warning says so (``attributes``).

    Attributes
    ----------
    digest : hash of all parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        settle_norms(model)
        self._hashes = model_digests(model)
        self.digest = combined_digest(self._hashes)
        self._versions = versions(named_tensors(model))
        self._places = places(model)
        self._persistent = set(model.state_dict())
        self._attributes = Attributes(model)
        self._written: set[str] = set()  # buffers, by the model's own forward
        self._copies: dict[str, Tensor] = {}
        room = COPIED_BYTES
        for name, t in sorted(model.named_buffers(), key=lambda named: named[1].nbytes):
            room -= t.nbytes
            if room >= 0:
                self._copies[name] = t.detach().clone()
        self._sums = {
            False: quick_sums(self._small_buffers()),
            True: quick_sums(named_tensors(model)),
        }

    def moved(self) -> bool:
        """Whether the checkpoint is in other parameters, buffers, modules or memory than at the
        last call. What was kept of the model is then stale.
        """
        before, self._places = self._places, places(self.model)
        return before != self._places

    def check(self, function: str, run: Callable[[], Any]) -> None:
        """Raise ValueError if the model is no longer the checkpoint that was loaded.

        run : calls the model once, to see which buffers it writes to by itself.
        """

        def run_guarded() -> None:
            token = COPYING.set(False)
            try:
                with self.guarded(function, False), torch.no_grad():
                    run()
            finally:
                COPYING.reset(token)

        self._attributes.warn_of_changes(function, run_guarded)
        changed = self._changed(False)
        if set(changed) <= self._written:
            self._put_back(changed)
        elif set(changed) <= set(self._copies):
            received = {name: t.detach().clone() for name, t in self.model.named_buffers()}
            self._put_back(changed)
            run_guarded()
            if not set(changed) <= self._written:
                self._put_back(changed, received)
                raise self._changed_since(function, changed)
        else:
            raise self._changed_since(function, changed)

    @contextmanager
    def guarded(self, function: str, every: bool) -> Iterator[None]:
        """Within the block the model is called; what it writes to by itself is put back.

        Raises ValueError where its forward changes parameters.

        every : whether to look at all values at its end. Do so before anything is kept.
        """
        changed: list[str] = []
        differing: RandomNumbersError | None = None
        try:
            with no_renorm(self.model):
                yield
        except RandomNumbersError as error:  # parameters that are written to are a reason for it
            differing = error
        finally:
            self._attributes.settle()
            changed = self._changed(every or differing is not None)
            for name in [name for name in changed if name not in self._hashes]:
                made = named_tensors(self.model)[name].detach()  # by its first forward
                self._hashes[name], self._copies[name] = tensor_digest(made), made.clone()
            counted = self._counted(changed)
            caches = [name for name in counted if name in self._copies]
            self._put_back(caches)
        for name in caches:
            if name not in self._written:
                self._written.add(name)
                logger.info(
                    "%s: the model writes to its buffer %s in eval mode; features are those at the "
                    "checkpoint's value",
                    function,
                    name,
                )
        rest = [name for name in changed if name not in caches]
        if rest:
            raise self._changed_within(
                function, rest, [n for n in rest if n in counted]
            ) from differing
        if differing is not None:
            raise differing

    def _changed(self, every: bool) -> list[str]:
        """The names of parameters and buffers that are not as they were loaded.

        every : whether to look at all values that PyTorch counts no write to, or at small buffers
            alone.
        """
        tensors = named_tensors(self.model)
        now = versions(tensors)
        sums = quick_sums(tensors if every else self._small_buffers())
        suspects = {name for name, _ in now.items() ^ self._versions.items()}
        for names, _ in sums.items() ^ self._sums[every].items():
            suspects.update(names)
        if not suspects:
            return []
        changed = [
            name
            for name in {**self._versions, **now}
            if name in suspects
            and (name not in tensors or tensor_digest(tensors[name]) != self._hashes.get(name))
        ]
        if not changed:  # the same values: loaded again, by another TRAKer
            self._versions, self._sums[every] = now, sums
        return changed

    def _counted(self, changed: list[str]) -> list[str]:
        """Those of the changed names that would have been noticed before the model was called."""
        now, small = versions(named_tensors(self.model)), self._small_buffers()
        return [
            name for name in changed if name in small or now.get(name) != self._versions.get(name)
        ]

    def _small_buffers(self) -> dict[str, Tensor]:
        """The buffers that a forward may well write to, as batch norm does with no new version."""
        return {
            name: t
            for name, t in self.model.named_buffers()
            if name in self._copies and t.nbytes <= SMALL_BYTES
        }

    def _put_back(self, names: Collection[str], values: Mapping[str, Tensor] | None = None) -> None:
        """Give buffers the values that they had, or others."""
        for name in names:
            path, _, own = name.rpartition(".")
            buffers = self.model.get_submodule(path)._buffers
            here, kept = buffers.get(own), (values or self._copies).get(name)
            if kept is None:  # it was gone
                buffers[own] = None
                continue
            alike = here is not None and (here.shape, here.dtype) == (kept.shape, kept.dtype)
            if here is None or not alike or 0 in here.stride():  # entries share memory
                buffers[own] = kept.clone()
            else:
                with torch.no_grad():
                    here.copy_(kept)
        now = versions(named_tensors(self.model))
        if values is None:
            self._versions.update({name: now[name] for name in names})

    def _changed_within(self, function: str, changed: list[str], counted: list[str]) -> ValueError:
        """The message about what is no longer the checkpoint's after the model was called."""
        if counted:
            said, expected = (
                "been changed by its own forward, in eval mode: the features would be those of "
                "another model than the checkpoint",
                "a forward that leaves them as they are",
            )
        else:
            said, expected = (
                "changed since the checkpoint was loaded, by writes that PyTorch doesn't count "
                "(through .data or numpy)",
                "load_checkpoint or start_scoring_checkpoint of it after every change, and a "
                "forward that leaves them as they are",
            )
        return ValueError(
            f"{function}: {listed(counted or changed)} of the model have {said}. Nothing of the "
            f"batch was kept; expected {expected}, or a checkpoint taken after one "
            "(model.state_dict(), where a second forward changes nothing more)"
        )

    def _changed_since(self, function: str, changed: list[str]) -> ValueError:
        """The message about a model that is no longer the checkpoint that was loaded."""
        beside = [name for name in changed if name not in self._persistent]
        said = (
            f"{function}: {listed(changed)} of the model have changed since the "
            "checkpoint was loaded, and features would be kept as those of that checkpoint; "
            "expected "
        )
        if beside:
            return ValueError(
                f"{said}{listed(beside)}, which no state_dict holds, as before (copy.deepcopy(model"
                ") is a model for other uses; a new process makes this one anew)"
            )
        return ValueError(
            f"{said}load_checkpoint or start_scoring_checkpoint of it after every change (of "
            "another TRAKer on the same model, or by a forward in training mode, too)"
        )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def versions(tensors: Mapping[str, Tensor]) -> Versions:
    """Facts about each tensor that change where it is replaced or written to."""
    return {name: (id(t), 0 if t.is_inference() else t._version) for name, t in tensors.items()}


def places(model: nn.Module) -> set[tuple[str, int, int, int]]:
    """Where the parameters and buffers are: their modules, objects and memory."""
    return {
        (f"{path}.{name}", id(module), id(t), t.data_ptr())
        for path, module in model.named_modules()
        for own in (module._parameters, module._buffers)
        for name, t in own.items()
        if t is not None
    }


def bounded(model: nn.Module) -> list[Any]:
    """The embeddings that write to their weights: those with ``max_norm``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]


def settle_norms(model: nn.Module) -> None:
    """Bring all rows of embeddings to their ``max_norm``, until doing so changes nothing."""
    for module in bounded(model):
        weight = module.weight.detach()
        rows = torch.arange(len(weight), device=weight.device)
        for _ in range(SETTLING):
            before = weight.clone()
            torch.embedding_renorm_(weight, rows, module.max_norm, module.norm_type)
            if torch.equal(weight, before):
                break


@contextmanager
def no_renorm(model: nn.Module) -> Iterator[None]:
    """Within the block, embeddings don't write to their weights, whose rows are settled."""
    modules = [(module, module.max_norm) for module in bounded(model)]
    try:
        for module, _ in modules:
            module.max_norm = None
        yield
    finally:
        for module, norm in modules:
            module.max_norm = norm
