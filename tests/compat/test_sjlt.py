"""compat.sjlt: sjlt's class on kind "sjlt"."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import pickle
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastproj
from fastproj.compat import sjlt as ours
from fastproj.compat.sjlt import SJLTProjection
from tests.dense import DTYPES, integers, normals, relative_error, stored

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def test_the_constructor_is_sjlts() -> None:
    parameters = list(inspect.signature(SJLTProjection).parameters.values())
    expected = {"c": 1, "threads": 1024, "fixed_blocks": 84, "device": "cuda"}
    assert [p.name for p in parameters[:-1]] == ["original_dim", "proj_dim", *expected]
    assert [p.default for p in parameters[2:-1]] == list(expected.values())
    assert parameters[-1].kind == inspect.Parameter.KEYWORD_ONLY  # ours alone: seed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("proj_dim", "c", "block"),
    [(64, 1, 64), (64, 4, 16), (256, 4, 64), (50, 1, 32), (100, 3, 32), (50, 4, 16), (7, 7, 16)],
)
def test_project_and_transpose_are_the_documented_matrix(
    device: str, proj_dim: int, c: int, block: int
) -> None:
    p = SJLTProjection(333, proj_dim, c, device=device, seed=5)
    assert p.block == block
    r = stored(333, proj_dim, 5, "sjlt", block=block)
    assert torch.equal(r, fastproj.matrix(333, proj_dim, 5, "sjlt", block=block).cpu().double())
    scale = (block / proj_dim) ** 0.5
    assert p.normalization_factor == pytest.approx(scale)
    x, y = integers((4, 333)).to(device), integers((4, proj_dim), 1).to(device)
    exact = x.cpu().double() @ r * scale
    assert relative_error(p.project(x).cpu(), exact) < 1e-6
    assert torch.equal(p(x), p.project(x))
    assert relative_error(p.transpose(y).cpu(), y.cpu().double() @ r.T * scale) < 1e-6
    nonzeros = (r != 0).sum(1)
    assert nonzeros.min() >= proj_dim // block
    assert nonzeros.max() <= -(-proj_dim // block)


@pytest.mark.parametrize(("proj_dim", "c"), [(64, 1), (64, 4), (4096, 16), (1 << 18, 4)])
def test_powers_of_two_have_c_entries_and_sjlts_scale(proj_dim: int, c: int) -> None:
    p = SJLTProjection(40, proj_dim, c, device="cpu", seed=1)
    assert p.normalization_factor == c**-0.5
    y = p.project(torch.eye(40))
    assert torch.equal((y != 0).sum(1), torch.full((40,), c))
    assert set(y.unique().tolist()) == {-(c**-0.5), 0.0, c**-0.5}


def test_blocks_are_clamped() -> None:
    assert SJLTProjection(9, 1 << 20, device="cpu").block == 1 << 16
    assert SJLTProjection(9, 1, device="cpu").block == 16


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    p = SJLTProjection(80, 64, 4, device="cpu", seed=2)
    r = stored(80, 64, 2, "sjlt", block=16) / 2  # a scale that rounds nothing
    x, y = integers((3, 80), dtype=dtype), integers((3, 64), 1, dtype)
    assert torch.equal(p.project(x), (x.double() @ r).to(dtype))
    assert torch.equal(p.transpose(y), (y.double() @ r.T).to(dtype))


def test_any_batch_and_strides_without_gradients() -> None:
    p = SJLTProjection(80, 64, 4, device="cpu", seed=2)
    x = integers((80, 5)).T.requires_grad_()
    assert not p.project(x).requires_grad
    assert not p.transpose(p.project(x).requires_grad_()).requires_grad
    assert torch.equal(p.project(x), p.project(x.detach().contiguous()))
    assert p.project(x[:0]).shape == (0, 64)
    assert not list(p.parameters())


def test_the_seed_names_the_matrix() -> None:
    x = normals((2, 80))

    def drawn(manual: int) -> Tensor:
        torch.manual_seed(manual)
        return SJLTProjection(80, 32, device="cpu").project(x)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    p, other = (SJLTProjection(80, 32, device="cpu", threads=t, fixed_blocks=t) for t in (1, 64))
    assert not torch.equal(p.project(x), other.project(x))  # the second draw is another
    for same in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(same.project(x), p.project(x))
    other.load_state_dict(p.state_dict())
    assert torch.equal(other.project(x), p.project(x))
    narrow = SJLTProjection(80, 32, 2, device="cpu")
    with pytest.raises(ValueError, match=r"received the state .*'block': 32.*expected .*: 16"):
        narrow.load_state_dict(p.state_dict())
    with pytest.raises(ValueError, match=r"received the state {}; expected .*'block': 16"):
        narrow.set_extra_state({})


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, "SJLTProjection: received seed=-1; expected 0 <= seed < 2\\^64"),
        (1 << 64, ValueError, "expected 0 <= seed < 2\\^64"),
        (None, TypeError, r"received seed=None \(NoneType\); expected an integer"),
        (1.0, TypeError, r"received seed=1.0 \(float\); expected an integer"),
        (True, TypeError, "received seed=True; expected an integer"),
        (torch.arange(2), TypeError, r"received seed=tensor\(\[0, 1\]\) \(Tensor\); expected"),
    ],
)
def test_a_bad_seed_in_a_state_is_named(seed: object, error: type, message: str) -> None:
    p = SJLTProjection(80, 32, device="cpu", seed=5)
    with pytest.raises(error, match=message):
        p.load_state_dict({"_extra_state": p.get_extra_state() | {"seed": seed}})
    assert p.seed == 5
    p.load_state_dict({"_extra_state": p.get_extra_state() | {"seed": np.uint64(7)}})
    assert (p.seed, type(p.seed)) == (7, int)


@pytest.mark.parametrize("state", [None, 5, ["seed"], torch.ones(2)], ids=repr)
def test_what_is_no_state_is_named(state: object) -> None:
    p = SJLTProjection(80, 32, device="cpu", seed=5)
    said = f"received the state {re.escape(repr(state))} .*expected a dict such as .*'seed': 5"
    with pytest.raises(TypeError, match=said):
        p.load_state_dict({"_extra_state": state})


def test_sjlts_other_methods() -> None:
    p = SJLTProjection(128, 64, 4, device="cpu", seed=3)
    assert p.get_compression_ratio() == 2
    assert p.get_sparsity_ratio() == 1 - 4 / 64
    assert repr(p) == (
        "SJLTProjection(original_dim=128, proj_dim=64, c=4, block=16, seed=3, device=cpu)"
    )
    with pytest.raises(AttributeError, match=r"not stored; expected seed=.*compat\.dattri\.inst"):
        _ = p.rand_indices
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = p.nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"original_dim": 0}, "SJLTProjection: received original_dim=0"),
        ({"proj_dim": 0}, "SJLTProjection: received proj_dim=0"),
        ({"c": 0}, "received c=0; expected 1 <= c < 33"),
        ({"c": 33}, "received c=33; expected 1 <= c < 33"),
        ({"seed": -1}, "received seed=-1"),
        ({"device": "nowhere"}, "received device='nowhere'"),
    ],
)
def test_a_bad_configuration_is_named(arguments: dict[str, object], message: str) -> None:
    good = {"original_dim": 80, "proj_dim": 32, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        SJLTProjection(**(good | arguments))


def test_bad_input_is_named() -> None:
    p = SJLTProjection(80, 32, device="cpu")
    for bad in (torch.ones(80), torch.ones(2, 81), torch.ones(2, 8, 10)):
        with pytest.raises(ValueError, match=r"SJLTProjection.project: .* expected \[B, 80\]"):
            p.project(bad)
    for bad in (torch.ones(32), torch.ones(2, 80)):
        with pytest.raises(ValueError, match=r"SJLTProjection.transpose: .* expected \[B, 32\]"):
            p.transpose(bad)
    with pytest.raises(TypeError, match=r"received x list; expected a Tensor \[B, 80\]"):
        p.project([1.0])
    for function, name, width in ((p.project, "x", 80), (p.transpose, "y", 32)):
        said = rf"SJLTProjection\.{function.__name__}: received {name} .* int64.*{name}\.float\(\)"
        with pytest.raises(TypeError, match=said):
            function(torch.ones(2, width, dtype=torch.int64))


# ---- install() -----------------------------------------------------------------------------------


def test_without_sjlt_the_import_gives_ours() -> None:
    if importlib.util.find_spec("sjlt") is not None:
        pytest.skip("sjlt is installed here")
    ours.install()
    ours.install()
    assert importlib.util.find_spec("sjlt") is not None
    found = importlib.import_module("sjlt")
    assert found.SJLTProjection is SJLTProjection
    assert found.EXTENSION_AVAILABLE
    ours.uninstall()
    assert importlib.util.find_spec("sjlt") is None
    ours.uninstall()


def test_the_stand_in_has_sjlts_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of sjlt 0.1.5 to 0.1.7, which have the same."""
    monkeypatch.setitem(sys.modules, "sjlt", None)  # as where it isn't installed
    ours.install()
    shown: dict[str, object] = {}
    exec("from sjlt import *", shown)
    names = ["SJLTProjection", "CUDA_AVAILABLE", "EXTENSION_AVAILABLE", "__version__"]
    assert [shown[name] for name in names] == [
        SJLTProjection,
        torch.cuda.is_available(),
        True,
        "0.1.7",
    ]
    assert set(shown) - {"__builtins__"} == set(names)
    found = importlib.import_module("sjlt")
    assert found.__all__ == names
    assert importlib.util.find_spec("sjlt.core").name == "sjlt.core"
    from sjlt.core import SJLTProjection as FromCore

    assert FromCore is SJLTProjection
    assert found.core.SJLTProjection is SJLTProjection
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'sjlt\._C'"):
        importlib.import_module("sjlt._C")
    ours.uninstall()
    assert not {"sjlt", "sjlt.core"} & sys.modules.keys()


def test_the_stand_in_and_others_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sjlt", None)
    ours.install()
    sys.modules["sjlt"] = None  # by someone else
    ours.install()
    assert importlib.import_module("sjlt").SJLTProjection is SJLTProjection
    sys.modules["sjlt"] = other = ModuleType("sjlt")
    ours.uninstall()
    assert sys.modules["sjlt"] is other
    assert "sjlt.core" not in sys.modules


@pytest.mark.parametrize("gpus", [0, 2])
def test_cuda_info_has_sjlts_keys(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("is_available", gpus > 0),
        ("is_initialized", False),
        ("device_count", gpus),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    monkeypatch.setitem(sys.modules, "sjlt", None)
    ours.install()
    found = importlib.import_module("sjlt")
    assert found.CUDA_AVAILABLE == (gpus > 0)
    info = found.get_cuda_info()
    if not gpus:
        assert info == {"cuda_available": False, "extension_available": True}
        return
    assert info.pop("cudnn_version") == torch.backends.cudnn.version()
    assert info == {
        "cuda_available": True,
        "extension_available": True,
        "cuda_version": torch.version.cuda,
        "device_count": 2,
        "current_device": None,
        "devices": ["GPU 0", "GPU 1"],
    }


def test_with_sjlt_its_class_is_replaced_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(nn.Module):
        pass

    real, caller = ModuleType("sjlt"), ModuleType("caller")
    real.SJLTProjection = caller.SJLTProjection = Theirs
    real.EXTENSION_AVAILABLE = False  # it was built without CUDA, which ours doesn't need
    monkeypatch.setitem(sys.modules, "sjlt", real)
    monkeypatch.setitem(sys.modules, "caller", caller)
    ours.install()
    ours.install()
    assert real.SJLTProjection is SJLTProjection
    assert caller.SJLTProjection is SJLTProjection
    assert real.EXTENSION_AVAILABLE is True
    ours.uninstall()
    assert sys.modules["sjlt"] is real
    assert real.EXTENSION_AVAILABLE is False
    assert real.SJLTProjection is Theirs
    assert caller.SJLTProjection is Theirs


def test_grass_writes_a_matrix_of_its_own_and_is_told() -> None:
    """GraSS's and dattri's own "sjlt" and "grass": both draw indices into the class's buffer."""
    ours.install()
    from sjlt import SJLTProjection as Imported

    projector = Imported(256, 64, 1, device=torch.device("cpu"))
    with pytest.raises(AttributeError, match=r'"sjlt" of dattri and GraSS call fast.*dattri\.inst'):
        projector.rand_indices.copy_(torch.zeros(256, 1))
