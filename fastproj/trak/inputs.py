"""What a TRAKer is given: checked, and made where it is only named, before anything is computed."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastproj.checks import (
    MAX_SEED,
    check_block,
    check_device,
    check_integer,
    check_kind,
    check_proj_dim,
    check_scale,
    listed,
)
from fastproj.factored import MAX_FACTORED, FactoredProjector
from fastproj.projector import Projector
from fastproj.spec import MIN_BLOCK
from fastproj.trak.files import Indices

MAX_SAMPLES = 1 << 48
MAX_BATCH = 1 << 20  # samples at once are below
PROJ_DIM, MOST_DIMS = 1 << 12, 1 << 14  # k where none is named
FEW_SAMPLES = PROJ_DIM // 2  # at most, for more than PROJ_DIM; each has a row drawn


class RandomNumbersError(ValueError):
    """Outputs differ from one call to the next; no gradient computer can help."""


def resolve_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    """The device that was asked for, checked; None is the model's."""
    if device is None:
        return next(model.parameters()).device
    return check_device("TRAKer", device)


def check_model(model: Any) -> None:
    """Raise TypeError or ValueError for a model that can't be differentiated."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"TRAKer: received model of type {type(model).__name__}; expected a torch.nn.Module"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError("TRAKer: received model in nn.DataParallel; expected model.module")
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"TRAKer: received {f'a model with {name!r}' if name else 'model'} in "
                "DistributedDataParallel, whose forward waits for processes that have other "
                f"batches; expected {'its module in its place' if name else 'model.module'} "
                "(TRAKer shares the work among the processes by itself)"
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "TRAKer: received a model of torch.jit, which can't be called with other weights; "
            "expected the module that it was made from"
        )
    shards = sharded_by(model)
    if shards:
        raise ValueError(
            f"TRAKer: received a model with {shards[0]}, which no process holds whole; expected "
            "one that wasn't sharded, and checkpoints with full tensors (get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, for FSDP and tensor parallelism)"
        )
    for module in model.modules():
        device_map = getattr(module, "hf_device_map", None) or {}
        places = sorted(set(map(str, device_map.values())))
        if len(places) > 1:
            raise ValueError(
                f"TRAKer: received a model with device_map, on {', '.join(places)}; expected one "
                'on a single device, such as of from_pretrained(..., device_map={"": 0}): moved '
                "there, its forward would still send its inputs from device to device"
            )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, t in tensors if nn.parameter.is_lazy(t)]
    if lazy:
        raise ValueError(
            f"TRAKer: received a model with {listed(lazy)} that have no shape yet; expected one "
            "that has seen a batch: call it once"
        )
    meta = [name for name, t in tensors if t.is_meta]
    if meta:
        fillable = set(meta) <= set(model.state_dict())
        raise ValueError(
            f"TRAKer: received a model with {listed(meta)} on the meta device, without values; "
            "expected a model in memory ("
            + (
                'model.to_empty(device="cpu") before load_checkpoint fills it'
                if fillable
                else "made outside of torch.device('meta'): no checkpoint fills "
                f"{', '.join(name for name in meta if name not in model.state_dict())}"
            )
            + ")"
        )


def sharded_by(model: nn.Module) -> list[str]:
    """What says that no process holds the whole of a model; empty for one that is whole."""
    found = []
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        found.append("fsdp")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        found.append("parameters that are DTensors")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        found.append("deepspeed")
    return found


def check_projector(
    projector: Any,
    shapes: dict[str, torch.Size],
    kind: str | None,
    block: SupportsIndex | None,
    factored: SupportsIndex | None,
) -> Any:
    """``projector``; raises TypeError unless it projects, and knows to how many dimensions.

    Raises ValueError for arguments that name another matrix beside it, and for a FactoredProjector
    of other parameters than ``shapes``.
    """
    if factored is not None:
        raise ValueError(
            f"TRAKer: received factored={factored!r} and a projector; expected one of them "
            "(fastproj.FactoredProjector is such a projector)"
        )
    for name, value in (("kind", kind), ("block", block)):
        if value is not None:
            raise ValueError(
                f"TRAKer: received {name}={value!r} and a projector; expected one of them "
                "(a projector has a matrix of its own)"
            )
    known = isinstance(getattr(projector, "proj_dim", None), int | np.integer)
    if isinstance(projector, type) or not hasattr(projector, "project") or not known:
        raise TypeError(
            f"TRAKer: received projector={projector!r:.80}; expected None, or an object (not a "
            "class) with proj_dim and project(grads, model_id=)"
        )
    if isinstance(projector, FactoredProjector):
        wanted = [(name, tuple(shape)) for name, shape in shapes.items()]
        given = [(name, tuple(shape)) for name, shape in projector.shapes.items()]
        for one, other in zip_longest(given, wanted):
            if one != other:
                raise ValueError(
                    f"TRAKer: received a FactoredProjector with {one} in the place of {other}; "
                    "expected the names and shapes of the parameters that gradients are taken of, "
                    "in the model's order (factored=r makes one of these)"
                )
    return projector


def make_projector(
    shapes: dict[str, torch.Size],
    proj_dim: SupportsIndex,
    seed: SupportsIndex,
    kind: str | None,
    block: SupportsIndex | None,
    factored: SupportsIndex | None,
) -> Projector | FactoredProjector:
    """The projector that TRAKer's arguments ask for, unscaled, of parameters with these shapes.

    Raises TypeError or ValueError that name TRAKer's arguments, not the projector's.
    """
    function = "TRAKer"
    proj_dim = check_proj_dim(function, proj_dim)
    seed = check_integer(function, "projector_seed", seed, 0, MAX_SEED)
    kind = default_kind(proj_dim, block) if kind is None else kind
    check_kind(function, kind)
    check_block(function, kind, block, proj_dim)
    made: Projector | FactoredProjector
    if factored is None:
        total = sum(map(math.prod, shapes.values()))
        made = outer = Projector(total, proj_dim, seed, kind, block=block, scale=None)
    else:
        factored = check_integer(function, "factored", factored, 1, MAX_FACTORED)
        made = FactoredProjector(shapes, factored, proj_dim, seed, kind, block=block, scale=None)
        outer = made.outer
    outer.scale = own_scale(outer.block)
    return made


def own_scale(block: int | None) -> float:
    """The scale of TRAKer's own projector. lambda_reg means the same for all kinds:
    E |g R|^2 = k |g|^2.
    """
    return math.sqrt(block) if block else 1.0


def as_model_ids(function: str, model_ids: Any) -> list[int] | None:
    """Numbers of checkpoints from any iterable, each once; None stays.

    Raises TypeError, and ValueError where a number comes twice: a mean over checkpoints and its
    lambda go by how many there are.
    """
    if model_ids is None:
        return None
    try:
        found = [operator.index(model_id) for model_id in model_ids]
    except TypeError:
        raise TypeError(
            f"{function}: received model_ids={model_ids!r:.80}; expected None or a list of "
            "integers, such as [0]"
        ) from None
    twice = [model_id for model_id, count in Counter(found).items() if count > 1]
    if twice:
        once = f"{list(dict.fromkeys(found))}"
        raise ValueError(
            f"{function}: received model_ids with {listed(twice)} more than once; expected each "
            f"checkpoint once, model_ids={once:.80}"
        )
    return found


def subclass_of(name: str, received: Any, base: type) -> Any:
    """``received``, or ``base`` for None; raises TypeError for anything but a subclass of it."""
    if received is None:
        return base
    if not (isinstance(received, type) and issubclass(received, base)):
        raise TypeError(
            f"TRAKer: received {name}={received!r:.80}; expected None or a subclass of "
            f"{base.__module__}.{base.__qualname__}"
        )
    return received


def default_proj_dim(
    n: int, parameters: int, kind: str | None, draws: int = 1, dual: bool = True
) -> int:
    """k where none is named: PROJ_DIM, and more for few samples of many parameters.

    More dimensions give better scores (docs/research/lambda.md, "How many dimensions"), cost sjlt
    next to nothing, and leave the N x N system of the ``dual`` as it is. It is no larger than
    k x k with PROJ_DIM where F has no more rows than that: n, and n for each of ``draws``.
    """
    if n * (1 + draws) > PROJ_DIM or kind not in (None, "sjlt") or not dual:
        return PROJ_DIM
    return min(max(1 << (parameters - 1).bit_length(), PROJ_DIM), MOST_DIMS)


def default_kind(proj_dim: SupportsIndex, block: SupportsIndex | None) -> str:
    """The kind of TRAKer's matrix where none is named: sjlt, where each row of it has an entry."""
    whole = block is not None or check_proj_dim("TRAKer", proj_dim) >= MIN_BLOCK
    return "sjlt" if whole else "rademacher"


def matrix_of(projector: Any) -> dict[str, Any]:
    """What is stored of a projector: its class, its matrix, and what it does before that."""
    kind = getattr(projector, "kind", getattr(projector, "proj_type", "unknown"))
    block = getattr(projector, "block", None)
    # That of a factored one is its outer matrix's, with r beside it; a subclass is another map.
    made = type(projector.outer if type(projector) is FactoredProjector else projector)
    found: dict[str, Any] = {
        "projector": f"{made.__module__}.{made.__qualname__}",
        "kind": str(getattr(kind, "value", kind)),
    }
    extra = {"block": block, "factored": getattr(projector, "factored", None)}
    found.update({name: int(n) for name, n in extra.items() if n is not None})
    outer = getattr(projector, "outer", projector)
    if isinstance(outer, Projector):
        scale = check_scale("TRAKer", outer.scale, outer.proj_dim, outer.block or 0)
        if scale != own_scale(outer.block):
            found["scale"] = scale
    return found


def check_mode(function: str, model: nn.Module) -> None:
    """Raise ValueError where dropout or batch statistics are on, because outputs would vary.

    Other modules may be in training mode: cuDNN differentiates recurrent ones in no other mode.
    Whether those of a user do something else then shows in outputs alone: ``Featurizer``.
    """
    active = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if module.training and acts_in_training(module)
    ]
    if active:
        raise ValueError(
            f"{function}: received a model with {listed(active)} in training mode (dropout, batch "
            "statistics); expected model.eval(), which load_checkpoint calls"
        )


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block these modules are in eval mode, which they leave for training mode."""
    modules = list(modules)
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def acts_in_training(module: nn.Module) -> bool:
    """Whether a module does something else in training mode: drop out, or use the batch."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def as_array(function: str, name: str, values: Any) -> npt.NDArray[Any]:
    """An array, tensor, list or range as an array. Raises ValueError."""
    try:
        return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"{function}: received {name} that make no array ({error})") from error


def as_indices(function: str, inds: Any) -> Indices:
    """Integers [B] from an array, tensor, list or range."""
    array = as_array(function, "inds", inds)
    if array.dtype == object:  # such as a generator
        raise TypeError(
            f"{function}: received inds of type {type(inds).__name__}; expected integers, one for "
            "each sample, in an array, tensor, list or range"
        )
    if array.dtype.kind not in "iu" and array.size:
        cure = ""
        if array.dtype == bool:
            cure = " (a mask over the whole set becomes integers by numpy.flatnonzero)"
        elif array.dtype.kind == "f" and (array == np.floor(array)).all():
            whole = "inds.long()" if isinstance(inds, Tensor) else "numpy.asarray(inds).astype(int)"
            cure = f" ({whole} of whole numbers)"
        raise TypeError(
            f"{function}: received inds of dtype {array.dtype}; expected integers, the samples' "
            f"numbers{cure}"
        )
    return array.reshape(-1).astype(np.int64)


def check_range(
    function: str, inds: Indices, total: int, declared: str = "train_set_size", cure: str = ""
) -> None:
    """Raise ValueError unless ``inds`` are numbers below ``total``."""
    bad = inds[(inds < 0) | (inds >= total)]
    if len(bad):
        raise ValueError(
            f"{function}: received sample {bad[0]}; expected 0 <= index < {declared} = {total}"
            f"{cure}"
        )


def check_indices(function: str, inds: Indices, size: int, total: int) -> None:
    """Raise ValueError unless ``inds`` are ``size`` distinct numbers below ``total``."""
    if len(inds) != size:
        raise ValueError(
            f"{function}: received {len(inds)} inds with a batch of {size} samples; expected one "
            "for each"
        )
    declared, start, another = (
        ("train_set_size", "load_checkpoint", "save_dir")
        if function == "featurize"
        else ("num_targets", "start_scoring_checkpoint", "exp_name")
    )
    cure = (
        f" (num_samples counts on from the last call; {start} starts at 0 again; a larger "
        f"{declared} takes another {another})"
    )
    check_range(function, inds, total, declared, cure)
    values, counts = np.unique(inds, return_counts=True)
    if len(values) != len(inds):
        raise ValueError(
            f"{function}: received index {values[counts > 1][0]} more than once in a batch; "
            "expected distinct inds"
        )


Grouping = tuple[list[int], str]  # the group of each target, and "sum" | "mean"


def as_groups(function: str, groups: Any, reduction: str, total: int) -> Grouping | None:
    """The groups of ``total`` targets. Raises TypeError or ValueError."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{function}: received reduction={reduction!r}; expected 'sum' or 'mean'")
    if groups is None:
        return None
    array = as_array(function, "groups", groups)
    if array.shape != (total,):
        cure = " (numpy.ravel(groups))" if array.size == total else ""
        raise ValueError(
            f"{function}: received groups {list(array.shape)} for num_targets={total}; expected "
            f"[{total}], the group of each target{cure}"
        )
    renumber = "numpy.unique(groups, return_inverse=True)[1] numbers them so"
    if array.dtype.kind not in "iu":
        sorts = array.dtype.kind in "bUS" or (array.dtype.kind == "f" and not np.isnan(array).any())
        raise TypeError(
            f"{function}: received groups of dtype {array.dtype}; expected integers from 0, one "
            f"for each target{f' ({renumber})' if sorts else ''}"
        )
    if array.min() < 0 or len(np.unique(array)) != array.max() + 1:
        first = f", {array.min()} as group 0" if array.min() < 0 else ""
        raise ValueError(
            f"{function}: received groups from {array.min()} to {array.max()}, of which "
            f"{len(np.unique(array))} have a target; expected 0..G-1, each with one "
            f"({renumber}{first})"
        )
    return array.tolist(), reduction


IF_COMPUTED = (
    "finite gradients (is the input NaN or inf, does the model overflow on it, or does it mask the "
    "label, or all but the label, with a logit of -inf?). Nothing of the batch was kept"
)
IF_STORED = (
    "finite features (did another program write them, or a subclass of Store?). Featurize this "
    "checkpoint again, in a new directory"
)


def check_finite(
    function: str, what: str, values: Tensor, inds: Indices, expected: str = IF_COMPUTED
) -> None:
    """Raise ValueError, naming samples, unless all of ``values`` [B, ...] are finite."""
    finite = torch.isfinite(values.reshape(len(inds), -1)).all(1).cpu().numpy()
    if not finite.all():
        bad = inds[~finite]
        raise ValueError(
            f"{function}: {what} of sample{'s' if len(bad) > 1 else ''} "
            f"{listed(bad, 10)} are not finite; expected {expected}"
        )
