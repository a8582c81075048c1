"""How models are run where their gradients are taken: what PyTorch would do otherwise, and why."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NORM_ENTRIES = 1 << 19  # whose squares are added up at once
TF32_EPS = 2.0**-10
HALVES = (torch.bfloat16, torch.float16)

# Backwards that on a CPU add up the numbers of all positions in 16 bits. Such a sum no longer grows
# when it is 256 times as large as what is added: of 2048 tokens most are lost.
aten: Any = torch.ops.aten
IN_PLACE = {
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten.index_add_.default,
    aten.scatter_add_.default,
}
SUMS = IN_PLACE | {
    aten.embedding_dense_backward.default,
    aten._embedding_bag_backward.default,
    aten._embedding_bag_dense_backward.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm_backward.default,
    aten.index_put.default,
    aten.index_add.default,
    aten.scatter_add.default,
}


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block, models run as they are written, and every parameter is in the graph.

    What ``torch.compile`` made runs without its compiled code: compiling again for hooks, for
    ``torch.func`` and for each batch size would take minutes. Checkpoints keep their activations:
    the graph of reentrant ones lacks the parameters inside, whose gradients ``torch.autograd.grad``
    takes for zero, and the others run modules again without hooks, and not at all under
    ``torch.func``. Batch norm gets its tensors as its backward takes them (``in_order``).
    """
    checkpoints: Any = torch.utils.checkpoint
    instead = {
        (checkpoints, "CheckpointFunction"): KeptActivations,
        (checkpoints, "_checkpoint_without_reentrant_generator"): around_nothing,
        (F, "batch_norm"): partial(in_order, F.batch_norm),
        (F, "instance_norm"): partial(in_order, F.instance_norm),
    }
    usual = {key: getattr(*key) for key in instead if hasattr(*key)}
    for key in usual:
        setattr(*key, instead[key])
    try:
        with eager_stance():
            yield
    finally:
        for key, value in usual.items():
            setattr(*key, value)


def in_order(norm: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm of channels [N, C, ...], whose input and gradient lie in memory in that order.

    Of one sample they may lie as [..., C] and still pass for [C, ...]: as after ``flatten(2)`` and
    ``transpose(1, 2)``, which make tokens of an image. The backward on a CPU then mixes channels.
    """
    alone = len(input) == 1 and input.is_cpu
    out: Tensor = norm(input.contiguous() if alone else input, *args, **kwargs)
    # The backward of the first reshape copies the gradient in order.
    return out.reshape(-1).reshape(out.shape) if alone else out


@contextmanager
def restored(modules: list[nn.Module]) -> Iterator[None]:
    """After the block, ``modules`` have the parameters and buffers that they had before.

    ``torch.func.functional_call`` leaves a module that has several names with those it was given.
    """
    before = [(m, dict(m._parameters), dict(m._buffers)) for m in modules]
    try:
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


OF_MODULES = frozenset(vars(nn.Module()))


def kept_by(module: nn.Module) -> list[tuple[Any, Any]]:
    """Where a module keeps what it likes: its attributes and the dicts, lists and queues among
    them, and a copy of each. What all modules have is left out.
    """
    own = {name: value for name, value in vars(module).items() if name not in OF_MODULES}
    inside = [value for value in own.values() if isinstance(value, dict | list | deque)]
    copies = ((value, dict(value) if isinstance(value, dict) else list(value)) for value in inside)
    return [(vars(module), own), *copies]


def tensors_in(kept: list[tuple[Any, Any]]) -> list[tuple[Any, int]]:
    """The tensors among them, which are no parameters or buffers."""
    named = ((own.items() if isinstance(own, dict) else enumerate(own)) for _, own in kept)
    return [(key, id(t)) for pairs in named for key, t in pairs if isinstance(t, Tensor)]


@contextmanager
def forgetful(modules: Iterable[nn.Module]) -> Iterator[None]:
    """After the block, modules that have kept a tensor have the attributes that they had before.

    Some keep in eval mode what they have made of their parameters (LeViT the biases of attention).
    Later calls would depend on what was kept, and no longer on the parameters. Others keep a state
    from call to call (spiking neurons). A sample would depend on those before it.
    """
    before = [(module, kept_by(module)) for module in modules]
    try:
        yield
    finally:
        for module, kept in before:
            now = kept_by(module)
            if tensors_in(now) != tensors_in(kept):
                for name in now[0][1].keys() - kept[0][1].keys():
                    del vars(module)[name]
                vars(module).update(kept[0][1])
                for own, items in kept[1:]:
                    own.clear()
                    if isinstance(own, dict):
                        own.update(items)
                    else:
                        own.extend(items)


@contextmanager
def in_graphs(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, the graph of what is made of these parameters has them among its leaves."""
    off = [p for p in parameters if not p.requires_grad and not p.is_inference()]
    off = [p for p in off if p.is_floating_point() or p.is_complex()]
    try:
        for p in off:
            p.requires_grad_(True)
        yield
    finally:
        for p in off:
            p.requires_grad_(False)


def modules_named_twice(model: nn.Module) -> list[nn.Module]:
    """The modules that have several names in a model, each once."""
    counts = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    return [module for module, count in counts.items() if count > 1]


def norm(t: Tensor) -> float:
    """The norm of a tensor of any magnitude: squares of 1e-25 or 1e25 are not float32's."""
    return float(norms(t.reshape(1, -1)))


def norms(t: Tensor) -> Tensor:
    """Those of the rows of [b, n], float64 [b]."""
    dtype = torch.promote_types(t.dtype, torch.float64)  # of which PyTorch makes a copy
    parts = t.split(max(1, NORM_ENTRIES // max(1, len(t))), 1)
    found = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in parts]
    return torch.linalg.vector_norm(torch.stack(found), dim=0)


def rounding_share(eps: float, *dtypes: torch.dtype) -> float:
    """How much of a gradient's norm rounding may be, in the coarsest of these dtypes or ``eps``.

    The share is 1e-3 in float32. In 16 bits, errors of 0.04 have been seen.
    """
    # At least float32's: float64 models may compute in it, as T5's softmax does.
    own = max(torch.finfo(dtype).eps for dtype in (torch.float32, *dtypes))
    return float(min(3 * max(eps, own) ** 0.5, 0.1))


def tf32_eps(params: Sequence[Tensor]) -> float:
    """TF32's where a GPU may multiply float32 in it, else 0. It may in convolutions by default:
    those have weights of three dimensions or more.
    """
    if not any(p.is_cuda and p.dtype == torch.float32 for p in params):
        return 0.0
    backends: Any = torch.backends
    try:
        matmul, conv = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    except RuntimeError:  # torch >= 2.9, set for each operation
        places = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
        matmul, *others = (place.fp32_precision == "tf32" for place in places)
        conv = any(others)
    return TF32_EPS if matmul or (conv and any(p.ndim > 2 for p in params)) else 0.0


def wide_sums(params: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Within the block, gradients of a model in 16 bits are added up in float32 on a CPU, too."""
    halves = any(p.dtype in HALVES and p.device.type == "cpu" for p in params)
    return WideSums() if halves else nullcontext()


class WideSums(TorchDispatchMode):
    """Runs SUMS of 16 bits in float32, and rounds what comes of it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``func``, or the same in float32."""
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves(args) if func in SUMS else []
        dtypes = {t.dtype for t in leaves if isinstance(t, Tensor) and t.is_floating_point()}
        if len(dtypes) != 1 or not dtypes <= set(HALVES):  # else the sums are in float32 anyway
            return func(*args, **kwargs)
        (dtype,) = dtypes
        found = func(*pytree.tree_map(partial(converted, dtype, torch.float32), args), **kwargs)
        found = pytree.tree_map(partial(converted, torch.float32, dtype), found)
        return args[0].copy_(found) if func in IN_PLACE else found


def converted(old: torch.dtype, new: torch.dtype, leaf: Any) -> Any:
    """A tensor of one dtype in another; anything else as it is."""
    return leaf.to(new) if isinstance(leaf, Tensor) and leaf.dtype == old else leaf


class KeptActivations:
    """Stands for ``torch.utils.checkpoint.CheckpointFunction``."""

    @staticmethod
    def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        """The function itself."""
        return function(*args)


def around_nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for ``torch.utils.checkpoint._checkpoint_without_reentrant_generator``."""
    yield


def eager_stance() -> AbstractContextManager[Any]:
    """``torch.compiler.set_stance("force_eager")`` where anything may have been compiled."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def for_each_sample(
    module: nn.Module, params: dict[str, Tensor], size: int
) -> tuple[dict[str, Tensor], int | None]:
    """The parameters of a module as ``torch.func.vmap`` takes them, and their dimension of samples.

    All samples of a recurrent layer begin with one state, which vmap can't overwrite with one for
    each sample. It can where the weights that multiply the state are a sample's own.
    """
    if not any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in module.modules()):
        return params, None
    return {name: p.expand(size, *p.shape) for name, p in params.items()}, 0


@contextmanager
def vectorised(module: nn.Module) -> Iterator[None]:
    """Within the block, ``torch.func.vmap`` can follow ``module`` where there is a way.

    Fused attention has no rule for it. oneDNN's recurrent layers have no gradient in eval mode.
    PyTorch's warning that it runs other operations sample by sample is off.
    """
    recurrent = any(isinstance(m, nn.RNNBase) for m in module.modules())
    set_warning = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda _: None)
    with plainly(), sdpa_kernel(SDPBackend.MATH):
        onednn: Any = torch.backends.mkldnn
        enabled = onednn.enabled
        onednn.enabled = enabled and not recurrent
        set_warning(False)
        try:
            yield
        finally:
            set_warning(True)
            onednn.enabled = enabled
