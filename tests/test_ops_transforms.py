"""What torch does to an operation: autograd, torch.func, torch.compile, fake tensors, modes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastproj
from fastproj import torch_ops
from tests.dense import KINDS, integers, normals, stored

SEED = 2**64 - 5  # as an op argument it is the int64 -5


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


# ---- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_project(backend: str, device: str, kind: str) -> None:
    a = normals((3, 4), dtype=torch.float64).to(device).requires_grad_()
    b = normals((3, 2, 3), seed=1, dtype=torch.float64).to(device).requires_grad_()
    c = normals((3, 5), seed=2, dtype=torch.float64).to(device)

    def run(a: Tensor, b: Tensor) -> Tensor:
        pieces = {"a": a, "c": c, "b": b.transpose(1, 2)}
        return fastproj.project(
            pieces, 6, SEED, kind, stream=3, row_offset=509, scale=0.5, backend=backend
        )

    assert torch.autograd.gradcheck(run, (a, b))
    assert torch.autograd.gradgradcheck(run, (a, b))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_project_transpose(backend: str, device: str, kind: str) -> None:
    y = normals((3, 6), dtype=torch.float64).to(device).requires_grad_()

    def run(y: Tensor) -> Tensor:
        return fastproj.project_transpose(y, slice(509, 520), SEED, kind, backend=backend)

    assert torch.autograd.gradcheck(run, (y,))
    assert torch.autograd.gradgradcheck(run, (y,))


def test_the_backward_is_the_adjoint_at_each_pieces_rows(backend: str, device: str) -> None:
    a = integers((2, 5)).to(device).requires_grad_()
    frozen = integers((2, 600), seed=1).to(device)
    b = integers((2, 4, 2), seed=2).to(device).requires_grad_()
    fastproj.project(
        [a, frozen, b], 9, row_offset=2**40, scale=None, backend=backend
    ).sum().backward()
    matrix = stored(613, 9, row_offset=2**40).sum(dim=1)
    assert frozen.grad is None
    assert torch.equal(a.grad.cpu().double(), matrix[:5].expand(2, 5))
    assert torch.equal(b.grad.cpu().double(), matrix[605:].expand(2, 8).reshape(2, 4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_have_the_dtype_of_the_grads(
    backend: str, device: str, dtype: torch.dtype
) -> None:
    grads = integers((2, 10), dtype=dtype).to(device).requires_grad_()
    fastproj.project(grads, 8, scale=None, backend=backend).sum().backward()
    assert grads.grad.dtype == dtype
    assert torch.equal(grads.grad.cpu().double(), stored(10, 8).sum(1).expand(2, 10))
    y = integers((2, 8), dtype=dtype).to(device).requires_grad_()
    fastproj.project_transpose(y, 10, scale=None, backend=backend).sum().backward()
    assert y.grad.dtype == dtype
    assert torch.equal(y.grad.cpu().double(), stored(10, 8).sum(0).expand(2, 8))


def test_no_samples_have_gradients_too(backend: str, device: str) -> None:
    grads = torch.empty(0, 5, device=device, requires_grad=True)
    fastproj.project(grads, 3, backend=backend).sum().backward()
    assert grads.grad.shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(backend: str, device: str, kind: str) -> None:
    grads, tangent, other = (
        normals((2, 10), seed=i, dtype=torch.float64).to(device) for i in range(3)
    )
    how = {"kind": kind, "row_offset": 3, "backend": backend}
    matrix = stored(20, 7, kind=kind, row_offset=3, device=device) / math.sqrt(7)

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grads, tangent)
        y, dy = forward_ad.unpack_dual(fastproj.project([other, dual], 7, **how))
    torch.testing.assert_close(y, torch.cat([other, grads], 1) @ matrix)
    torch.testing.assert_close(dy, tangent @ matrix[10:])

    y, dy = torch.func.jvp(lambda g: fastproj.project(g, 7, **how), (grads,), (tangent,))
    torch.testing.assert_close(dy, tangent @ matrix[:10])
    _, dg = torch.func.jvp(
        lambda y: fastproj.project_transpose(y, slice(3, 13), kind=kind, backend=backend),
        (y,),
        (dy,),
    )
    torch.testing.assert_close(dg, dy @ matrix[:10].T)


def test_forward_mode_in_forward_mode(backend: str, device: str) -> None:
    """The tangent of one piece depends on the outer level, and the other piece has none."""
    a, b, t = (normals((2, 5), seed=i, dtype=torch.float64).to(device) for i in range(3))
    matrix = stored(10, 7, device=device) / math.sqrt(7)

    def inner(a: Tensor) -> Tensor:
        return torch.func.jvp(lambda a: fastproj.project([a, b], 7, backend=backend), (a,), (a,))[1]

    y, dy = torch.func.jvp(inner, (a,), (t,))
    torch.testing.assert_close(y, a @ matrix[:5])
    torch.testing.assert_close(dy, t @ matrix[:5])


# ---- torch.func --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(backend: str, device: str, in_dim: int) -> None:
    x = integers((4, 5, 6)).to(device)
    shared = integers((5, 3)).to(device) if in_dim == 0 else None
    rows = [t.shape for t in x.unbind(in_dim)]
    assert len(set(rows)) == 1

    def run(t: Tensor) -> Tensor:
        pieces = [t] if shared is None else [t, shared]
        return fastproj.project(pieces, 8, scale=None, backend=backend)

    expected = torch.stack([run(t) for t in x.unbind(in_dim)])
    assert torch.equal(torch.vmap(run, in_dims=in_dim)(x), expected)

    def back(t: Tensor) -> Tensor:
        return fastproj.project_transpose(t, slice(3, 20), scale=None, backend=backend)

    expected = torch.stack([back(t) for t in x.unbind(in_dim)])
    assert torch.equal(torch.vmap(back, in_dims=in_dim)(x), expected)


def test_vmap_of_vmap_and_of_no_samples(backend: str, device: str) -> None:
    x = integers((2, 3, 4, 5)).to(device)

    def run(t: Tensor) -> Tensor:
        return fastproj.project(t, 6, scale=None, backend=backend)

    nested = torch.vmap(torch.vmap(run))(x)
    assert torch.equal(nested.reshape(24, 6), run(x.reshape(24, 5)))
    assert torch.vmap(run)(x[:, 0, :0]).shape == (2, 0, 6)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_of_no_members(backend: str, device: str, in_dim: int) -> None:
    shape = [4, 5]
    shape.insert(in_dim, 0)
    none, shared = torch.zeros(shape, device=device), torch.ones(4, 3, device=device)

    def run(t: Tensor) -> Tensor:
        return fastproj.project([shared, t], 6, backend=backend)

    def back(t: Tensor) -> Tensor:
        return fastproj.project_transpose(t, 7, backend=backend)

    assert torch.vmap(run, in_dims=in_dim)(none).shape == (0, 4, 6)
    assert torch.vmap(back, in_dims=in_dim)(none).shape == (0, 4, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_func_grad_jacobian_and_hessian(backend: str, device: str, kind: str) -> None:
    x = normals((4, 6), dtype=torch.float64).to(device)
    matrix = stored(6, 5, kind=kind, device=device) / math.sqrt(5)

    def cubed(g: Tensor) -> Tensor:
        return fastproj.project(g[None], 5, kind=kind, backend=backend).pow(3).sum()

    def dense(g: Tensor) -> Tensor:
        return (g @ matrix).pow(3).sum()

    func = torch.func

    def check(transform: Any) -> None:
        torch.testing.assert_close(torch.vmap(transform(cubed))(x), torch.vmap(transform(dense))(x))

    check(func.grad)
    check(func.jacrev)
    check(func.jacfwd)
    check(func.hessian)
    check(lambda f: func.jacrev(func.jacrev(f)))


def test_out_is_refused_under_a_transform(backend: str, device: str) -> None:
    out = torch.full((2, 3), math.nan, device=device)

    def run(g: Tensor) -> Tensor:
        return fastproj.project(g, 3, out=out, backend=backend).sum()

    ones = torch.ones(2, 4, device=device)
    with pytest.raises(ValueError, match="out= and a grads that requires grad"):
        torch.func.grad(run)(ones)
    with pytest.raises(ValueError, match=r"out= under a torch\.func transform"):
        torch.vmap(run)(ones.expand(5, 2, 4))
    with pytest.raises(ValueError, match=r"out= under a torch\.func transform"):
        torch.func.jvp(run, (ones,), (ones,))
    assert out.isnan().all()


def test_functionalize_alone_and_around_and_within_vmap(backend: str, device: str) -> None:
    g = integers((5, 2, 40)).to(device)
    functionalize = torch.func.functionalize

    def run(g: Tensor) -> Tensor:
        y = fastproj.project([g[:, :9], g[:, 9:]], 3, scale=None, backend=backend)
        return fastproj.project_transpose(y, 7, scale=None, backend=backend)

    assert torch.equal(functionalize(run)(g[0]), run(g[0]))
    expected = torch.vmap(run)(g)
    assert torch.equal(functionalize(torch.vmap(run))(g), expected)
    assert torch.equal(torch.vmap(functionalize(run))(g), expected)
    with pytest.raises(ValueError, match=r"out= under a torch\.func transform"):
        functionalize(lambda g: fastproj.project(g, 3, out=g.new_empty(2, 3)))(g[0])


# ---- the dispatcher ----------------------------------------------------------------------------


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(("kind", "block"), [*((kind, 0) for kind in KINDS), ("sjlt", 16)])
def test_opcheck(backend: str, device: str, kind: str, block: int, needs_grad: bool) -> None:
    call = (7, 0.5, f"highest,{backend}", f"{kind},{block}", -5, 3)
    a = normals((4, 10)).to(device)
    b = normals((4, 6)).to(device).T.contiguous().T
    out = torch.zeros(4, 6, device=device)
    pieces = [a.clone().requires_grad_(needs_grad), b.clone().requires_grad_(needs_grad)]
    opcheck(torch_ops._project_op, (pieces, 6, *call))
    opcheck(torch_ops._project_transpose_op, (pieces[0], 6, *call))
    opcheck(torch_ops._project_into_op, ([a, b], out, True, *call))
    opcheck(torch_ops._project_transpose_into_op, (a, out, *call))
    opcheck(torch_ops._matrix_op, (5, 6, 8, torch.float32, torch.device(device), *call))


@pytest.mark.parametrize("kind", [*KINDS, "sjlt"])
def test_the_op_of_the_matrix_takes_the_default_precision(
    backend: str, device: str, kind: str
) -> None:
    block = 16 if kind == "sjlt" else None
    call = (7, 1.0, f",{backend}", f"{kind},{block or 0}", 5, 3)
    found = torch.ops.fastproj.matrix(20, 6, 8, torch.float32, torch.device(device), *call)
    how = {"kind": kind, "block": block, "stream": 3, "device": device, "backend": backend}
    assert torch.equal(found, fastproj.matrix(slice(7, 27), slice(8, 14), 5, **how))


class _Names(TorchDispatchMode):
    """Notes the names of the fastproj ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastproj":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_ops(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device)
    how = {"backend": backend, "scale": None}
    with _Names() as names:
        y = fastproj.project(grads, 3, **how)
        fastproj.project(grads, 3, out=y, **how)
        g = fastproj.project_transpose(y, 10, **how)
        fastproj.project_transpose(y, 10, out=g, **how)
        fastproj.matrix(3, 4, device=device, backend=backend)
    assert names.seen == [
        "project",
        "project_into",
        "project_transpose",
        "project_transpose_into",
        "matrix",
    ]
    assert torch.equal(y, fastproj.project(grads, 3, **how))


class _Wrapped(torch.Tensor):
    """A subclass with torch's own behaviour."""


class _Boxed(torch.Tensor):
    """A tensor that holds its values elsewhere and handles every op itself."""

    names: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Boxed:
        shape, strides = inner.shape, inner.stride()
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides, dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastproj":
            cls.names.append(func._opname)
        args, kwargs = tree_map_only(_Boxed, lambda t: t.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


def test_a_subclass_handles_the_op(backend: str, device: str) -> None:
    plain = integers((2, 10)).to(device)
    _Boxed.names.clear()
    y = fastproj.project([plain, _Boxed(plain)], 3, scale=None, backend=backend)
    assert _Boxed.names == ["project"]
    assert torch.equal(y, fastproj.project([plain, plain], 3, scale=None, backend=backend))


def test_subclasses_and_lazy_bits_give_the_same_values(backend: str, device: str) -> None:
    plain = integers((2, 10)).to(device)
    expected = fastproj.project(plain, 3, scale=None, backend=backend)
    assert torch.equal(
        fastproj.project(torch.nn.Parameter(plain), 3, scale=None, backend=backend), expected
    )
    wrapped = plain.as_subclass(_Wrapped)
    got = fastproj.project(wrapped, 3, scale=None, backend=backend)
    assert torch.equal(got.as_subclass(Tensor), expected)
    negative = torch.complex(plain, -plain).conj().imag
    assert negative.is_neg()
    assert torch.equal(fastproj.project(negative, 3, scale=None, backend=backend), expected)
    assert torch.equal(
        fastproj.project_transpose(negative, 3, scale=None, backend=backend),
        fastproj.project_transpose(plain, 3, scale=None, backend=backend),
    )
    zero = torch._efficientzerotensor((2, 10), device=device)  # a tangent; it has no memory
    assert zero._is_zerotensor()
    assert torch.equal(fastproj.project(zero, 3, backend=backend), torch.zeros_like(expected))
    assert not fastproj.project_transpose(zero, 3, backend=backend).any()


def test_meta_and_fake_tensors_have_the_shapes() -> None:
    grads = torch.empty(4, 10, device="meta", dtype=torch.bfloat16)
    y = fastproj.project(grads, 7)
    assert (y.shape, y.dtype, y.device.type) == ((4, 7), torch.float32, "meta")
    assert fastproj.project([grads], 7, out=y) is y
    g = fastproj.project_transpose(y.double(), slice(3, 8))
    assert (g.shape, g.dtype, g.device.type) == ((4, 5), torch.float64, "meta")
    assert fastproj.matrix(10**12, 4, device="meta").shape == (10**12, 4)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        y = fastproj.project(torch.ones(2, 10**9), 7)
        assert y.shape == (2, 7)
        assert fastproj.matrix(10**9, 10**6).shape == (10**9, 10**6)


def test_the_default_device_is_followed(device: str, backend: str) -> None:
    with torch.device(device):
        assert fastproj.matrix(3, 4, backend=backend).device.type == device
    with torch.device("meta"):
        assert fastproj.matrix(3, 4).is_meta
        # The input says where the result goes, whatever the default device.
        y = fastproj.project(integers((2, 5)).to(device), 3, backend=backend)
        assert y.device.type == device


def test_autocast_casts_nothing(backend: str, device: str) -> None:
    grads = normals((2, 100)).to(device)
    expected = fastproj.project(grads, 8, precision="highest", backend=backend)
    with torch.autocast(device, torch.bfloat16):
        y = fastproj.project(grads, 8, precision="highest", backend=backend)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_records_the_op(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device)
    traced = torch.jit.trace(
        lambda g: fastproj.project(g, 3, scale=None, backend=backend), (grads,)
    )
    assert torch.equal(
        traced(grads + 1), fastproj.project(grads + 1, 3, scale=None, backend=backend)
    )


# ---- torch.compile -----------------------------------------------------------------------------


def network(backend: str) -> Callable[[Tensor], Tensor]:
    def run(g: Tensor) -> Tensor:
        pieces = {"a": g[:, :5], "b": g[:, 5:].reshape(g.shape[0], -1, 1)}
        y = fastproj.project(pieces, 7, SEED, stream=2, row_offset=3, backend=backend) * 2
        back = fastproj.project_transpose(y, slice(4, 9), SEED, backend=backend)
        return y.sum() + back.square().sum()

    return run


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_with_gradients(backend: str, device: str, compiler: str) -> None:
    run = network(backend)
    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    x = normals((3, 20), dtype=torch.float64).to(device)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(compiled(a), run(b))
    compiled(a).backward()
    run(b).backward()
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_changing_shapes(backend: str, device: str, dynamic: bool | None) -> None:
    run = network(backend)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, fullgraph=True, backend=count, dynamic=dynamic)
    for batch, rows in ((3, 20), (4, 21), (1, 700), (9, 20)):
        x = normals((batch, rows), dtype=torch.float64).to(device)
        torch.testing.assert_close(compiled(x), run(x))
    assert len(graphs) <= 3, "the shapes are dynamic, but for a batch of one"


def test_compile_with_changing_integers(backend: str, device: str) -> None:
    def run(g: Tensor, proj_dim: int, seed: int, stream: int, row_offset: int) -> Tensor:
        return fastproj.project(
            g, proj_dim, seed, stream=stream, row_offset=row_offset, scale=None, backend=backend
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = integers((3, 40)).to(device)
    for args in ((7, 0, 0, 0), (8, 1, 1, 5), (9, 2**63 - 1, 2**32 - 1, 2**40), (10, 12, 3, 1)):
        assert torch.equal(compiled(x, *args), run(x, *args)), args


def test_compile_with_changing_scales(backend: str, device: str) -> None:
    def run(g: Tensor, proj_dim: int, scale: Any) -> Tensor:
        return fastproj.project(g, proj_dim, scale=scale, backend=backend)

    x = integers((3, 40)).to(device)
    for scales in (("jl", "jl", "jl", "jl"), (0.5, 1.5, 3.0, -7.25), (1, 2, 3, 4), (None,) * 4):
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for proj_dim, scale in zip((7, 8, 9, 30), scales, strict=True):
            assert torch.equal(compiled(x, proj_dim, scale), run(x, proj_dim, scale)), scale


def test_compile_with_out(backend: str, device: str) -> None:
    def run(g: Tensor, out: Tensor) -> Tensor:
        fastproj.project(g, 7, scale=None, out=out, accumulate=True, backend=backend)
        fastproj.project(g, 7, 1, scale=None, out=out, accumulate=True, backend=backend)
        return out.sum()

    x = integers((3, 40)).to(device)
    out, expected = torch.ones(3, 7, device=device), torch.ones(3, 7, device=device)
    total = torch.compile(run, fullgraph=True)(x, out)
    assert torch.equal(total, run(x, expected))
    assert torch.equal(out, expected)


def test_compile_of_a_projector_and_of_matrix(backend: str, device: str) -> None:
    projector = fastproj.Projector(40, 7, 3, "gaussian", backend=backend)

    def run(g: Tensor) -> Tensor:
        y = projector.project(g, 2)
        return y @ fastproj.matrix(5, 7, device=device, backend=backend).T

    x = normals((3, 40)).to(device)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_a_compiled_graph_refuses_what_eager_refuses(backend: str, device: str) -> None:
    @torch.compile(backend="aot_eager")
    def run(g: Tensor) -> Tensor:
        return fastproj.project(g, 0, backend=backend)

    with pytest.raises(ValueError, match="proj_dim=0"):
        run(torch.ones(2, 3, device=device))


def test_a_compiled_graph_follows_torchs_precision(backend: str, device: str) -> None:
    run = torch.compile(
        lambda g: fastproj.project(g, 32, backend=backend), fullgraph=True, backend="aot_eager"
    )
    grads = normals((4, 2000)).to(device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            named = fastproj.project(grads, 32, precision=precision, backend=backend)
            assert torch.equal(run(grads), named)
    finally:
        torch.set_float32_matmul_precision(before)


def test_compile_of_vmap(backend: str, device: str) -> None:
    x = integers((4, 5, 6)).to(device)
    run = torch.vmap(lambda g: fastproj.project(g, 8, scale=None, backend=backend))
    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_compile_of_forward_mode_never_loses_the_tangent(backend: str, device: str) -> None:
    x, tangent = integers((3, 6)).to(device), integers((3, 6), seed=1).to(device)

    def run(g: Tensor) -> Tensor:
        return fastproj.project(g, 8, scale=None, backend=backend)

    def derivative(g: Tensor, t: Tensor) -> Tensor:
        return torch.func.jvp(run, (g,), (t,))[1]

    compiled = torch.compile(derivative, backend="aot_eager")
    assert torch.equal(compiled(x, tangent), run(tangent))
    torch._dynamo.reset()
    whole = torch.compile(derivative, backend="aot_eager", fullgraph=True)
    # The words around ours are torch's, and older versions leave ours out.
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        whole(x, tangent)
    with forward_ad.dual_level():
        y = torch.compile(run, backend="aot_eager")(forward_ad.make_dual(x, tangent))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, run(tangent))


@pytest.mark.parametrize("name", ["grad", "jacrev", "vmap of grad"])
def test_compile_of_func_derivatives_runs_them_eagerly(
    backend: str, device: str, name: str
) -> None:
    def run(g: Tensor) -> Tensor:
        return fastproj.project(g[None], 8, backend=backend).pow(3).sum()

    func = torch.func
    derivative = {
        "grad": func.grad(run),
        "jacrev": func.jacrev(run),
        "vmap of grad": torch.vmap(func.grad(run)),
    }[name]
    x = normals((4, 6) if name == "vmap of grad" else (6,)).to(device)
    compiled = torch.compile(derivative, backend="aot_eager")
    torch.testing.assert_close(compiled(x), derivative(x))


def test_export(backend: str, device: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, g: Tensor) -> Tensor:
            return fastproj.project(g, 7, scale=None, backend=backend)

    x = integers((3, 40)).to(device)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(Model(), (x,), dynamic_shapes={"g": {0: batch}})
    more = integers((8, 40), seed=1).to(device)
    assert torch.equal(exported.module()(more), Model()(more))


def test_seeds_cross_the_op_schema_whole(backend: str, device: str) -> None:
    grads = integers((2, 10)).to(device)
    for seed in (0, 2**63 - 1, 2**63, 2**64 - 1):
        truth = grads.cpu().double() @ stored(10, 6, seed)
        direct = fastproj.project(grads, 6, seed, scale=None, backend=backend)
        dispatched = fastproj.project(
            grads.clone().requires_grad_(), 6, np.uint64(seed), scale=None, backend=backend
        )
        assert torch.equal(direct.cpu().double(), truth)
        assert torch.equal(dispatched.detach().cpu().double(), truth)
