"""Gradients times a number for each parameter: the same by all computers and projectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastproj import FactoredProjector, Projector
from fastproj.trak import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    TRAKer,
)
from fastproj.trak.draws import Fisher
from fastproj.trak.gradients import project_modules
from fastproj.trak.gradients.scales import ScaledProjector, size_factors
from fastproj.trak.store.store import StoreMismatchError
from tests.trak import cases
from tests.trak.model_zoo import make

COMPUTERS = [HookGradientComputer, FunctionalGradientComputer, IterativeGradientComputer]
N = 3


def projector_of(model, kind):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if kind == "factored":
        return FactoredProjector(shapes, 3, 32, 0, block=16)
    size = sum(p.numel() for p in model.parameters())
    return Projector(size, 32, 0, kind, block=16 if kind == "sjlt" else None)


def factors_of(model):
    """No two alike."""
    names = [name for name, _ in model.named_parameters()]
    return {name: 0.7**place for place, name in enumerate(names)}


def test_factors_are_powers_of_sizes():
    found = size_factors({"bias": 4, "weight": 64, "gain": 1}, 0.5)
    assert found == {"bias": 0.25, "weight": 1.0, "gain": 0.125}
    assert set(size_factors({"bias": 4, "weight": 64}, 0.0).values()) == {1.0}
    for power in (-0.125, 0.5):  # a placeholder has no entries
        assert size_factors({"none": 0, "weight": 64}, power)["none"] == 64**-power


def test_a_scaled_projector_keeps_the_rest():
    g = torch.randn(2, 50)
    for scale in ("jl", None, 3.0):
        plain = Projector(50, 32, 5, "sjlt", block=16, scale=scale)
        torch.testing.assert_close(plain.scaled(-0.5).project(g, 7), -0.5 * plain.project(g, 7))
        assert plain.scale == scale
    with pytest.raises(ValueError, match=r"Projector.scaled: received scale=nan"):
        plain.scaled(float("nan"))
    with pytest.raises(ValueError, match="expected a finite number"):
        plain.scaled(1e308 * 1.5).scaled(1e308)


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "factored"])
@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_all_computers_project_gradients_times_the_factors(name, kind):
    model, task, data = make(name, torch.float64)
    batch = data(N) if isinstance(data(N), tuple) else (data(N),)
    plain, factors = projector_of(model, kind), factors_of(model)
    grads = IterativeGradientComputer(model, task).compute_per_sample_grad(batch)
    exact = plain.project({name: g * factors[name] for name, g in grads.items()}, model_id=3)
    assert not torch.allclose(exact, plain.project(grads, model_id=3), rtol=0.1)
    scaled = ScaledProjector(plain, factors)
    assert scaled.proj_dim == 32
    for computer in COMPUTERS:
        made = computer(model, task)
        for size in (N, 1):
            some = batch if size == N else one_of(batch)
            found = made.project(some, scaled, 3)
            torch.testing.assert_close(found, exact[:size], rtol=1e-9, atol=1e-9)
            parts = project_modules(made, some, scaled, 3)
            torch.testing.assert_close(sum(parts), exact[:size], rtol=1e-9, atol=1e-9)


def one_of(batch):
    if isinstance(batch[0], dict):
        return ({name: part[:1] for name, part in batch[0].items()},)
    return tuple(part[:1] for part in batch)


@pytest.mark.parametrize("computer", COMPUTERS)
def test_16_bits_are_not_rounded_again(computer):
    model, task, data = make("resnet", torch.bfloat16)
    plain = projector_of(model, "sjlt")
    batch = data(N)
    made = computer(model, task)
    grads = {name: g.float() for name, g in made.compute_per_sample_grad(batch).items()}
    factors = factors_of(model)
    exact = plain.project({name: g * factors[name] for name, g in grads.items()}, model_id=0)
    found = made.project(batch, ScaledProjector(plain, factors), 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


class Own:
    """A projector that isn't fastproj's."""

    proj_dim = 8

    def project(self, grads, model_id):
        flat = torch.cat([g.reshape(len(g), -1) for g in grads.values()], 1)
        return cases.projected(flat.double(), 8, model_id)


def test_projectors_of_others_are_given_scaled_gradients(tmp_path):
    train, model = cases.data(16), cases.net()
    features = []
    for place, own in enumerate((None, Own())):
        folder = tmp_path / str(place)
        options = {"curvature": Fisher(size_power=0.5), "projector": own}
        traker = cases.make(model, folder, 16, **options)
        cases.featurize(traker, model, 0, train)
        features.append(traker.saver.matrix(0))
    size = sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(features[0], (features[1] * size**0.5).float())  # to float32


def test_gradients_without_names_are_refused():
    scaled = ScaledProjector(Own(), {"weight": 1.0, "bias": 0.5})
    with pytest.raises(TypeError, match="gave gradients 'Tensor'; expected a dict by the names"):
        scaled.project(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"gave gradients \['weight'\]"):
        scaled.project({"weight": torch.ones(2, 3)})


def test_another_power_is_refused_with_both_named(tmp_path):
    cases.make(cases.net(), tmp_path, 20, curvature=Fisher(size_power=0.25))
    cases.make(cases.net(), tmp_path, 20, curvature=Fisher(size_power=np.float32(0.25)))
    with pytest.raises(StoreMismatchError) as error:
        cases.make(cases.net(), tmp_path, 20, curvature=Fisher(size_power=0))
    assert "size power 0.25 in the directory, 0.0 in this run" in str(error.value)
    assert "use curvature=fastproj.trak.Fisher(size_power=0.25)" in str(error.value)


def test_no_power_is_what_stores_had_before(tmp_path):
    cases.make(cases.net(), tmp_path, 20, curvature=Fisher(size_power=0))
    assert "size_power" not in (tmp_path / "metadata.json").read_text()


@pytest.mark.parametrize("settings", [{"curvature": "trak"}, {"lambda_reg": 0.1}])
def test_traks_formula_has_no_metric(settings, tmp_path):
    """Whatever the task says."""
    model, task, data = make("gpt2")
    found = []
    for power in (0.0, 0.5):
        type(task).size_power, before = power, type(task).size_power
        try:
            traker = TRAKer(model, task, 4, tmp_path / str(power), device="cpu", **settings)
            traker.load_checkpoint(model.state_dict(), 0)
            traker.featurize(data(4), num_samples=4)
        finally:
            type(task).size_power = before
        found.append(traker.saver.matrix(0))
    assert torch.equal(*found)
