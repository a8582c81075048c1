"""Checkpoints: how a state_dict is loaded into a model, and what is refused before that."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastproj.checks import listed

logger = logging.getLogger("fastproj.trak")

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
    check_keys(function, model, wanted, checkpoint, strict, grad_wrt)
    check_tensors(function, wanted, checkpoint)
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


def check_keys(
    function: str,
    model: nn.Module,
    wanted: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    strict: bool,
    grad_wrt: Collection[str],
) -> None:
    """Raise ValueError where a checkpoint has other keys or shapes than the model can take.

    wanted : the state_dict of the model. strict, grad_wrt : as in ``load_state``.
    """
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


def check_tensors(function: str, wanted: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Raise TypeError where a checkpoint has no plain tensor for a tensor of the model."""
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
