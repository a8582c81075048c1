"""Contrasts of logits against the same in plain operations, by any block and any vectorisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastproj.trak.tasks import contrasts as module
from fastproj.trak.tasks import margins
from fastproj.trak.tasks.contrasts import contrasts

B, T, C, D = 3, 5, 11, 2


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels_of(*shape: int) -> Tensor:
    return torch.randint(0, C, shape, generator=torch.Generator().manual_seed(1))


def uniform_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def written_out(z: Tensor, labels: Tensor, uniform: Tensor, t: float = 1.0) -> tuple[Tensor, ...]:
    """All of them, one row at a time."""
    own, rest, mean, soft, soft_mean, drawn = [], [], [], [], [], []
    for row, y, places in zip(
        z.reshape(-1, z.shape[-1]), labels.reshape(-1), uniform.reshape(labels.numel(), -1),
        strict=True,
    ):  # fmt: skip
        others = torch.arange(len(row)) != y
        pi = row.detach()[others].softmax(0)
        own.append(row[y])
        rest.append(row[others].logsumexp(0))
        possible = pi > 0
        mean.append((pi[possible] * row[others][possible]).sum())
        soft.append(t * (row[others] / t).logsumexp(0))
        softer = (row.detach()[others] / t).softmax(0)
        soft_mean.append((softer[possible] * row.detach()[others][possible]).sum())
        classes = [int((pi.cumsum(0) <= place).sum()) for place in places]
        drawn.append(row[others][classes])
    shape = labels.shape
    parts = (torch.stack(part).reshape(shape) for part in (own, rest, mean, soft, soft_mean))
    return (*parts, torch.stack(drawn).reshape(*shape, -1))


def weighted(found: tuple[Tensor, ...]) -> Tensor:
    """A sum of all numbers in which each counts otherwise."""
    flat = torch.cat([part.reshape(-1) for part in found])
    return (flat * torch.linspace(1, 2, len(flat), dtype=flat.dtype)).sum()


@pytest.mark.parametrize("shape", [(B,), (1, T), (B, T), (B, 2, T), (B, 0)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 1000])  # of a block; 0 is less than one
@pytest.mark.parametrize("temperature", [1.0, 1.5, 0.4])
def test_values_and_gradients(shape, rows, temperature, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", rows * C * 8)
    z = numbers(*shape, C).requires_grad_()
    labels, uniform = labels_of(*shape), uniform_of(*shape, D)
    found = contrasts(z, labels, uniform, temperature)
    assert [part.shape for part in found] == [labels.shape] * 5 + [uniform.shape]
    if not labels.numel():
        return
    exact = written_out(z, labels, uniform, temperature)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs)
    (slope,) = torch.autograd.grad(weighted(found), z)
    (right,) = torch.autograd.grad(weighted(exact), z)
    torch.testing.assert_close(slope, right)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_that_lie_elsewhere_and_classes_that_cannot_be(temperature):
    """Logits as a language model's are cut, and some of minus infinity."""
    whole = numbers(B, T + 1, C)
    whole[:, :, 3:6] = -torch.inf
    whole = whole.requires_grad_()
    labels, uniform = torch.full((B, T), 7), uniform_of(B, T, D)
    found = contrasts(whole[:, :-1], labels, uniform, temperature)
    exact = written_out(whole[:, :-1], labels, uniform, temperature)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs)
    (slope,) = torch.autograd.grad(weighted(found), whole)
    (right,) = torch.autograd.grad(weighted(exact), whole)
    torch.testing.assert_close(slope, right.nan_to_num(0.0))


@pytest.mark.parametrize("last", [0, C - 1])
def test_the_label_and_what_cannot_be_are_never_drawn(last):
    """At 0 and at the largest numbers below 1, too."""
    z = torch.zeros(1, C)
    z[0, C - 3 :] = -torch.inf
    uniform = 1 - 2.0**-24 * torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    labels = torch.tensor([last])
    z[0, 0] = 5.0
    found = contrasts(z + torch.arange(C), labels, uniform.float())
    assert torch.isfinite(found.drawn).all()
    if last == 0:
        assert (found.drawn == C - 4).all()
        first = contrasts(z + torch.arange(C), labels, torch.zeros(1, 1))
        assert float(first.drawn) == 1


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, None), (2, None, 1)])
def test_by_vmap(in_dims):
    shapes = (T, C), (T,), (T, D)
    made = (numbers, labels_of, uniform_of)
    given = []
    for make, shape, where in zip(made, shapes, in_dims, strict=True):
        size = list(shape)
        if where is not None:
            size.insert(where, B)
        given.append(make(*size))

    def slope(z: Tensor, labels: Tensor, uniform: Tensor) -> Tensor:
        return torch.func.grad(lambda z: weighted(contrasts(z, labels, uniform, 1.5)))(z)

    found = torch.func.vmap(slope, in_dims)(*given)
    for b in range(B):
        one = [
            t if where is None else t.select(where, b)
            for t, where in zip(given, in_dims, strict=True)
        ]
        torch.testing.assert_close(found[b], slope(*one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(dtype):
    z = numbers(B, T, C, dtype=dtype).requires_grad_()
    labels, uniform = labels_of(B, T), uniform_of(B, T, D).float()
    found = contrasts(z, labels, uniform, 1.5)
    exact = contrasts(z.double(), labels, uniform.double(), 1.5)
    assert all(part.dtype == torch.float32 for part in found)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(weighted(found), z)
    (right,) = torch.autograd.grad(weighted(exact), z)
    assert slope.dtype == dtype
    torch.testing.assert_close(slope, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert margins(z, labels).dtype == dtype


def test_of_the_logits_only_they_themselves_are_kept():
    z = numbers(B, T, C).requires_grad_()
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        contrasts(z, labels_of(B, T), uniform_of(B, T, D), 1.5)
        margins(z, labels_of(B, T))
    large = [t for t in kept if t.numel() >= z.numel()]
    assert large
    assert all(t.data_ptr() == z.data_ptr() for t in large)
