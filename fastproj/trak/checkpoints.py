"""Checkpoints: how they are loaded into a model, and whether the model still holds what was
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

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


# ---- loading ------------------------------------------------------------------------------------

COPIES = (
    "copies, taken when the model had these weights: "
    "{name: t.clone() for name, t in model.state_dict().items()}"
)
FOR_HF = " (for HFTRAKer: {**model.state_dict(), **checkpoint})"


class Origin(NamedTuple):
    """What was loaded last.

    digest : of the model that holds it.
    own : whether it was the model's own memory, as in ``model.state_dict()``.
    """

    model_id: int
    digest: str
    own: bool

    def check(self, function: str, before: Origin | None) -> None:
        """Raise ValueError where this is another model_id in the memory that ``before`` went to."""
        if before is None or before.model_id == self.model_id or before.digest != self.digest:
            return
        if self.own and not before.own:
            raise ValueError(
                f"{function}: received for model_id {self.model_id} the model's own memory (as in "
                f"model.state_dict()), which holds the weights of model_id {before.model_id} since "
                f"these were loaded; expected {COPIES}"
            )


def load_state(
    function: str,
    model: nn.Module,
    checkpoint: Any,
    strict: bool = True,
    grad_wrt: Collection[str] = (),
) -> None:
    """``model.load_state_dict``, refused before the model is touched if it can't fit.

    Adapters as peft saves them, without their name in the keys, are recognised.

    strict : False accepts a checkpoint that lacks something, unless that is in ``grad_wrt``. What
        is lacking keeps the model's values, and a log line names it.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(
            f"{function}: received a checkpoint of type {type(checkpoint).__name__}; expected a "
            "state_dict (model.state_dict(), or torch.load of one)"
        )
    wanted = model.state_dict()
    checkpoint = with_adapter_names(model, wanted, checkpoint)
    lacking = [key for key in wanted if key not in checkpoint]
    missing = lacking if strict else [key for key in lacking if key in set(grad_wrt)]
    unknown = [key for key in checkpoint if key not in wanted]
    shapes = [
        f"{key} {list(checkpoint[key].shape)} for {list(t.shape)}"
        for key, t in wanted.items()
        if key in checkpoint
        and hasattr(t, "shape")
        and getattr(checkpoint[key], "shape", t.shape) != t.shape
    ]
    # Modules may rename keys as they load; only they can say whether it fits then.
    hooked = any(module._load_state_dict_pre_hooks for module in model.modules())
    nothing = not strict and len(lacking) == len(wanted)
    if nothing or ((missing or unknown or shapes) and not hooked):
        found = [
            f"{what}: {listed(keys, 5)}"
            for what, keys in (
                ("missing" if strict else "missing, of what gradients are taken by", missing),
                ("not in the model", unknown),
                ("other shapes", shapes),
                ("nothing of the model in it", [type(checkpoint).__name__] if nothing else []),
            )
            if keys
        ]
        inside = bool(checkpoint) and not unknown and not shapes
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        rest = ""
        if inside and strict and not set(grad_wrt) & set(lacking):
            rest = f", or strict=False{FOR_HF} where the model holds the rest already"
        elif inside and trained and not trained & set(lacking):
            rest = (
                f", or strict=False of a TRAKer(grad_wrt='trainable'){FOR_HF}, where the model "
                "holds the rest already, which wasn't trained"
            )
        raise ValueError(
            f"{function}: received a checkpoint that doesn't fit the model ({'; '.join(found)}); "
            f"expected the keys and shapes of model.state_dict()"
            f"{hint(checkpoint, missing, unknown)}{rest}"
        )
    other = [
        f"{key} of type {type(checkpoint[key]).__name__}"
        for key, t in wanted.items()
        if isinstance(t, Tensor)
        and key in checkpoint
        and (not isinstance(checkpoint[key], Tensor) or hasattr(checkpoint[key], "full_tensor"))
    ]
    if other:
        cure = " (t.full_tensor(), in all processes)" if "DTensor" in other[0] else ""
        raise TypeError(
            f"{function}: received a checkpoint with {', '.join(other[:3])}; expected tensors{cure}"
        )
    check_shared(function, wanted, checkpoint)
    result = model.load_state_dict(checkpoint, strict=strict)
    if strict:
        return
    if result.unexpected_keys or set(result.missing_keys) & set(grad_wrt):  # of modules with hooks
        raise ValueError(
            f"{function}: received a checkpoint that doesn't fit the model "
            f"({', '.join([*result.unexpected_keys, *result.missing_keys][:5])}); part of it is "
            "loaded. Expected the keys of model.state_dict()"
        )
    kept = not_loaded(wanted, result.missing_keys)
    if kept:
        logger.warning(
            "%s: the checkpoint lacks %d of %d entries, which stay as the model has them: %s",
            function,
            len(kept),
            len(wanted),
            listed(kept, 5),
        )


def check_shared(function: str, wanted: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint has several values for what the model has once.

    PyTorch would load the last of them.

    wanted : the state_dict of the model.
    """
    first: dict[Any, str] = {}
    for key, t in wanted.items():
        if key not in checkpoint or not isinstance(t, Tensor) or not t.numel():
            continue
        place = (*storage(t), t.storage_offset(), t.shape, t.stride())
        other = first.setdefault(place, key)
        a, b = checkpoint[other], checkpoint[key]
        if a.shape == b.shape and not alike(a, b):  # other shapes are refused as they are loaded
            raise ValueError(
                f"{function}: received a checkpoint with {key!r} that differs from {other!r}, "
                "which the model shares with it; expected a model whose parameters are apart as "
                "those that were trained (tie_word_embeddings=False in transformers), or one value"
            )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have the same values; NaN is like NaN."""
    if a is b or (storage(a) == storage(b) and a.storage_offset() == b.storage_offset()):
        return True
    b = b.to(a.device)
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def is_own(model: nn.Module, checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's parameters lie in the model's memory: what is loaded into the model
    changes them.
    """
    live = {storage(p) for p in model.parameters() if p.numel()}
    names = {name for name, _ in model.named_parameters()} & set(checkpoint)
    given = [t for name in names if isinstance(t := checkpoint[name], Tensor) and t.numel()]
    return bool(given) and all(storage(t) in live for t in given)


def storage(t: Tensor) -> tuple[Any, ...]:
    """The memory that a tensor lies in."""
    try:
        return t.device, t.untyped_storage().data_ptr()
    except RuntimeError:  # sparse tensors and some subclasses have none that can be told
        return t.device, -id(t)


def not_loaded(wanted: Mapping[str, Any], missing: Collection[str]) -> list[str]:
    """Which of the missing keys don't share their tensor with one that was loaded."""

    def memory(t: Any) -> Any:
        return (t.data_ptr(), t.shape) if isinstance(t, Tensor) and t.numel() else None

    loaded = {memory(t) for key, t in wanted.items() if key not in missing} - {None}
    return [key for key in missing if memory(wanted.get(key)) not in loaded]


def with_adapter_names(
    model: nn.Module, wanted: Mapping[str, Any], checkpoint: Mapping[str, Any]
) -> Mapping[str, Any]:
    """A checkpoint with the keys of the model where peft saved adapters under shorter ones.

    peft leaves an adapter's name out of ``lora_A.<name>.weight``, and ``modules_to_save.<name>``.
    """
    if all(key in wanted for key in checkpoint):
        return checkpoint
    names = adapter_names(model)
    short: dict[str, list[str]] = {}
    for key in wanted:
        parts = key.split(".")
        if names & set(parts):
            left = ".".join(part for part in parts if part not in names | {"modules_to_save"})
            # Magnitudes of DoRA became modules after they were first saved as parameters.
            for name in {left, left.removesuffix(".weight") if "magnitude" in left else left}:
                short.setdefault(name, []).append(key)
    return {
        short[key][0] if key not in wanted and len(short.get(key, ())) == 1 else key: value
        for key, value in checkpoint.items()
    }


def adapter_names(model: nn.Module) -> set[str]:
    """The names of the adapters of a model that are active."""
    names: set[str] = set()
    there: set[str] = set()
    for module in model.modules():
        configs: Any = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping):
            there.update(map(str, configs))
            try:
                active: Any = getattr(module, "active_adapters", ())
                every: Iterable[Any] = active() if callable(active) else active
                names.update(map(str, every))
            except ValueError:  # a model of transformers whose adapters peft has put in
                continue
    return names or there or {"default"}


def hint(checkpoint: Mapping[str, Any], missing: list[str], unknown: list[str]) -> str:
    """How to get the state_dict out of what was given instead, for messages."""
    for key in ("state_dict", "model_state_dict", "model"):
        if key in unknown and isinstance(checkpoint[key], Mapping):
            return f" (checkpoint[{key!r}]?)"
    for longer, shorter, cure in (
        (unknown, missing, "its keys begin with {!r}: remove that"),
        (missing, unknown, "the model's keys begin with {!r}: give the model that is inside of it"),
    ):
        for key in longer if shorter else ():
            prefix = key.removesuffix(shorter[0])
            if prefix != key and {prefix + name for name in shorter} <= set(longer):
                return f" ({cure.format(prefix)})"
    return ""


# ---- what was loaded ----------------------------------------------------------------------------

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
            changed = self._changed(every)
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
