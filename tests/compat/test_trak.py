"""compat.trak: TRAK's classes on our kernels, and TRAK 0.3.2 itself on them."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import logging
import pickle
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproj import compat
from fastproj.compat import trak as ours
from fastproj.compat.pieces import project_pieces
from tests.compat.bounds import assert_keeps_inner_products, assert_scores_agree, exact_scores
from tests.compat.packages import load
from tests.dense import integers, normals, stored

CLASSES = [
    "AbstractProjector",
    "NoOpProjector",
    "BasicSingleBlockProjector",
    "BasicProjector",
    "CudaProjector",
    "ChunkedCudaProjector",
]
PROJECTING = [ours.BasicSingleBlockProjector, ours.BasicProjector, ours.CudaProjector]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return load("trak.projectors")


# ---- the classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_traks(theirs: ModuleType, name: str) -> None:
    for method in ("__init__", "project", "free_memory"):
        expected = inspect.signature(getattr(getattr(theirs, name), method)).parameters
        got = inspect.signature(getattr(getattr(ours, name), method)).parameters
        assert list(got) == list(expected)
        for a, b in zip(got.values(), expected.values(), strict=True):
            assert (a.kind, a.default) == (b.kind, b.default)


def test_they_are_traks_own_kind(theirs: ModuleType) -> None:
    assert ours.AbstractProjector is theirs.AbstractProjector
    assert ours.ProjectionType is theirs.ProjectionType
    for cls in (*PROJECTING, ours.NoOpProjector):
        assert issubclass(cls, theirs.AbstractProjector)


def test_without_trak_they_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there where traker isn't installed: the module, executed anew."""
    monkeypatch.setitem(sys.modules, "trak", None)
    monkeypatch.setitem(sys.modules, "trak.projectors", None)
    source = Path(ours.__file__)
    alone: dict[str, object] = {"__name__": "alone", "__file__": str(source)}
    monkeypatch.setitem(sys.modules, "alone", ModuleType("alone"))
    exec(compile(source.read_text(), str(source), "exec"), alone)
    projector = alone["BasicProjector"](5, 3, 0, alone["ProjectionType"].rademacher, "cpu")
    assert isinstance(projector, alone["AbstractProjector"])
    assert projector.project(torch.ones(2, 5), 0).shape == (2, 3)
    with pytest.raises(ImportError):
        alone["install"]()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cls", PROJECTING)
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_projection_is_that_of_the_spec(cls: type, proj_type: str, device: str) -> None:
    kind = {"rademacher": "rademacher", "normal": "gaussian"}[proj_type]
    grads = integers((3, 41)).to(device)
    tree = {"a": grads[:, :30].reshape(3, 5, 6), "scalar": grads[:, 30], "b": grads[:, 31:]}
    for given in (proj_type, ours.ProjectionType(proj_type)):
        projector = cls(
            grad_dim=41,
            proj_dim=10,
            seed=np.int64(4),
            proj_type=given,
            device=device,
            max_batch_size=7,
        )
        assert (projector.proj_dim, projector.grad_dim, projector.seed) == (10, 41, 4)
        assert json.loads(json.dumps(projector.proj_type)) == proj_type
        for model_id in (0, 3):
            y = projector.project(grads, model_id=model_id)
            expected = grads.double().cpu() @ stored(41, 10, 4, kind, stream=model_id)
            torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(projector.project(tree, model_id), y)
            assert y.dtype == torch.float32
        projector.free_memory()
        assert torch.equal(projector.project(grads, 3), y)
    assert torch.equal(pickle.loads(pickle.dumps(projector)).project(grads, 3), y)


def test_results_have_the_dtype_asked_for() -> None:
    grads = normals((4, 30))
    exact = grads.double() @ stored(30, 6)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for cls in (ours.BasicProjector, ours.BasicSingleBlockProjector):
            y = cls(30, 6, 0, "rademacher", "cpu", dtype=dtype).project(grads, 0)
            assert y.dtype == dtype
            # The gradients were not rounded to dtype first: one rounding, of the result.
            unit = max(torch.finfo(dtype).eps / 2, 2e-6 if dtype == torch.float32 else 0)
            assert (
                (y.double() - exact).abs() <= unit * exact.abs() + 1e-6 * (dtype != torch.float64)
            ).all()
    assert ours.CudaProjector(30, 6, 0, "normal", "cpu", 8, dtype=torch.float16).project(
        grads.half(), 0
    ).dtype == torch.float32  # fmt: skip


def test_gradients_of_several_dtypes() -> None:
    tree = {
        "a": integers((2, 5)),
        "b": integers((2, 3, 2), 1, torch.float16),
        "c": integers((2,), 2, torch.float64),
        "d": integers((2, 4), 3),
    }
    flat = torch.cat([t.reshape(2, -1).double() for t in tree.values()], 1)
    y = ours.CudaProjector(16, 9, 1, "rademacher", "cpu", 8).project(tree, 2)
    assert torch.equal(y.double(), flat @ stored(16, 9, 1, stream=2))


def test_an_empty_gradient_of_another_dtype_adds_nothing() -> None:
    grads = {"a": integers((3, 5)), "none": torch.ones(3, 0).double(), "b": integers((3, 5), 1)}
    projector = ours.CudaProjector(10, 8, 0, "rademacher", "cpu", 8)
    whole = torch.cat([grads["a"], grads["b"]], 1)
    assert torch.equal(projector.project(grads, 0), projector.project(whole, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_sizes_that_differ_are_refused(dtype: torch.dtype) -> None:
    """Each dtype and each chunk is a call of its own, and one sample would be added to all."""
    grads = {"a": torch.ones(1, 5), "b": torch.ones(4, 5, dtype=dtype)}
    one = ours.CudaProjector(10, 8, 0, "rademacher", "cpu", 8)
    chunks = ours.ChunkedCudaProjector([one, one], 5, [5, 5], 8, "cpu", torch.float32)
    for projector in (one, chunks):
        with pytest.raises(ValueError, match=r"\[1, 5\] float32.*\[4, 5\].*one batch size"):
            projector.project(grads, 0)


def test_proj_matrix_is_there_for_who_looks() -> None:
    projector = ours.BasicSingleBlockProjector(7, 4, 2, "rademacher", "cpu")
    grads = integers((2, 7))
    assert torch.equal(projector.project(grads, 5), grads @ projector.proj_matrix)


def test_no_gradients_at_all() -> None:
    with pytest.raises(ValueError, match="f: received no gradients; expected a tensor or a dict"):
        project_pieces("f", [], 4, 0, "rademacher", stream=0, scale=None)


def test_no_op() -> None:
    grads = normals((2, 6))
    projector = ours.NoOpProjector()
    assert (projector.proj_dim, projector.proj_type) == (0, "na")
    assert projector.project(grads, 0) is grads
    tree = {"a": grads[:, :4].reshape(2, 2, 2), "b": grads[:, 4], "c": grads[:, 5:]}
    assert torch.equal(projector.project(tree, 0), grads)


def chunked(sizes: list[int], seeds: list[int], dtype: torch.dtype = torch.float32):
    parts = [
        ours.CudaProjector(n, 8, s, "rademacher", "cpu", 8)
        for n, s in zip(sizes, seeds, strict=True)
    ]
    return ours.ChunkedCudaProjector(parts, max(sizes), sizes, 4, torch.device("cpu"), dtype)


def test_chunks_add_up() -> None:
    sizes, seeds = [10, 3, 7], [5, 6, 7]
    grads = integers((9, 20))  # more than feat_bs = 4: TRAK drops the rest or fails
    projector = chunked(sizes, seeds)
    projector.allocate_input()
    expected = torch.zeros(9, 8, dtype=torch.float64)
    row = 0
    for size, seed in zip(sizes, seeds, strict=True):
        r = stored(size, 8, seed, stream=1, row_offset=row)
        expected += grads[:, row : row + size].double() @ r
        row += size
    for given in (
        grads,
        {"a": grads[:, :10], "b": grads[:, 10:13], "c": grads[:, 13:]},
        {"a": grads[:, :6].reshape(9, 2, 3), "over a border": grads[:, 6:19], "s": grads[:, 19]},
    ):
        assert torch.equal(projector.project(given, 1).double(), expected)
    # Gradients may end early (TRAK's grad_wrt), in a chunk or before it.
    for width in (20, 13, 12, 10, 4):
        r = torch.eye(20)[:, :width]
        assert torch.equal(
            projector.project(grads[:, :width], 1), projector.project(grads @ r @ r.T, 1)
        )
    projector.free_memory()
    assert chunked(sizes, seeds, torch.float16).project(grads, 1).dtype == torch.float16
    assert (projector.proj_dim, projector.proj_type) == (8, "rademacher")


def test_one_projector_may_serve_several_chunks() -> None:
    """Chunks are no state of their projectors: each has its own rows, also in the next object."""
    one = ours.CudaProjector(5, 8, 3, "rademacher", "cpu", 8)
    grads = integers((4, 20))
    for sizes in ([5, 5, 10], [10, 0, 10]):
        many = ours.ChunkedCudaProjector([one] * 3, 10, sizes, 4, "cpu", torch.float32)
        assert torch.equal(many.project(grads, 0).double(), grads.double() @ stored(20, 8, 3))
    assert torch.equal(
        one.project(grads[:, :5], 0).double(), grads[:, :5].double() @ stored(5, 8, 3)
    )


@pytest.mark.parametrize("cls", PROJECTING)
def test_no_samples_and_strange_strides(cls: type) -> None:
    projector = cls(41, 10, 4, "rademacher", "cpu", max_batch_size=8)
    assert projector.project(torch.zeros(0, 41), 0).shape == (0, 10)
    assert projector.project({"a": torch.zeros(0, 40), "b": torch.zeros(0)}, 0).shape == (0, 10)
    grads = integers((41, 6)).T[::2]
    assert not grads.is_contiguous()
    y = projector.project(grads, 0)
    assert torch.equal(y.double(), grads.double() @ stored(41, 10, 4))
    assert torch.equal(copy.deepcopy(projector).project(grads, 0), y)
    wide = cls(41, 10, 2**63 + 5, "rademacher", "cpu", max_batch_size=8).project(grads, 0)
    assert torch.equal(wide.double(), grads.double() @ stored(41, 10, 2**63 + 5))


def test_wrong_use_is_named(theirs: ModuleType) -> None:
    with pytest.raises(
        ValueError, match="BasicProjector: received proj_type='sjlt'; expected 'normal'"
    ):
        ours.BasicProjector(5, 3, 0, "sjlt", "cpu")
    with pytest.raises(ValueError, match="received proj_dim=0"):
        ours.CudaProjector(5, 0, 0, "normal", "cpu", 8)
    with pytest.raises(ValueError, match=r"received gradients of 6 entries .* expected 5"):
        ours.BasicProjector(5, 3, 0, "normal", "cpu").project(torch.ones(2, 6), 0)
    with pytest.raises(ValueError, match=r"received gradients of 8 entries .* expected at most 7"):
        chunked([3, 4], [0, 1]).project(torch.ones(2, 8), 0)
    with pytest.raises(ValueError, match="received gradients of 0 entries"):
        chunked([3, 4], [0, 1]).project({}, 0)
    for projector in (ours.CudaProjector(7, 3, 0, "normal", "cpu", 8), chunked([3, 4], [0, 1])):
        for shape in ((7,), (2, 3, 4)):
            with pytest.raises(
                ValueError, match=rf"grads \[{shape[0]}.*expected a Tensor \[B, P\]"
            ):
                projector.project(torch.ones(shape), 0)
    parts = [ours.CudaProjector(5, k, 0, "normal", "cpu", 8) for k in (3, 1)]
    with pytest.raises(ValueError, match=r"received projectors of proj_dim \[3, 1\]"):
        ours.ChunkedCudaProjector(parts, 5, [5, 5], 8, "cpu", torch.float32)
    with pytest.raises(ValueError, match="received seed=-1"):
        ours.BasicProjector(5, 3, -1, "normal", "cpu")
    with pytest.raises(TypeError, match=r"received seed=0\.5"):
        ours.CudaProjector(5, 3, 0.5, "normal", "cpu", 8)
    with pytest.raises(TypeError, match="int64"):
        ours.CudaProjector(5, 3, 0, "normal", "cpu", 8).project(torch.ones(2, 5).long(), 0)
    with pytest.raises(ValueError, match="received 2 projectors for 1 chunks"):
        ours.ChunkedCudaProjector([None, None], 5, [5], 8, "cpu", torch.float32)
    basic = theirs.BasicSingleBlockProjector(5, 3, 0, "normal", "cpu")
    with pytest.raises(TypeError, match=r"received a trak.projectors.BasicSingleBlockProjector"):
        ours.ChunkedCudaProjector([basic], 5, [5], 8, "cpu", torch.float32)


@pytest.mark.parametrize("cls", PROJECTING)
@pytest.mark.parametrize("proj_type", ["rademacher", "normal"])
def test_inner_products_are_kept(cls: type, proj_type: str) -> None:
    grads = normals((10, 2000), seed=3)
    projector = cls(
        grad_dim=2000, proj_dim=4096, seed=1, proj_type=proj_type, device="cpu", max_batch_size=32
    )
    assert_keeps_inner_products(grads, projector.project(grads, 2), 4096)


# ---- install() -----------------------------------------------------------------------------------


def test_install_replaces_the_names_where_they_are(
    theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trak.traker

    before = theirs.BasicProjector
    importer = ModuleType("importer")
    importer.BasicProjector = before
    importer.registry = {"basic": before, "other": 1}

    class Lazy(ModuleType):
        def __getattribute__(self, name: str) -> object:
            raise ImportError("install() loads nothing")

    monkeypatch.setitem(sys.modules, "lazy", Lazy("lazy"))
    monkeypatch.setitem(sys.modules, "no module", object())
    monkeypatch.setitem(sys.modules, "importer", importer)
    ours.install()
    ours.install()  # twice is once
    for place in (theirs, trak.traker, importer):
        assert place.BasicProjector is ours.BasicProjector
    assert importer.registry == {"basic": ours.BasicProjector, "other": 1}
    assert (
        theirs.ChunkedCudaProjector is trak.traker.ChunkedCudaProjector is ours.ChunkedCudaProjector
    )
    assert theirs.AbstractProjector is ours.AbstractProjector
    assert importlib.util.find_spec("fast_jl") is not None  # TRAKer looks for it on GPUs
    ours.uninstall()
    for place in (theirs, trak.traker, importer):
        assert place.BasicProjector is before
    assert importer.registry["basic"] is before


def test_install_on_a_trak_without_chunks(
    theirs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As trak 0.2 is."""
    monkeypatch.delattr(theirs, "ChunkedCudaProjector")
    ours.install()
    assert theirs.CudaProjector is ours.CudaProjector
    assert not hasattr(theirs, "ChunkedCudaProjector")
    ours.uninstall()
    assert theirs.CudaProjector is not ours.CudaProjector


# ---- TRAK itself ---------------------------------------------------------------------------------

N, M, FEATURES, CLASSES_OF_DATA = 40, 12, 30, 2


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES_OF_DATA))


def samples(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with a large common part: their gradients have much in common."""
    generator = torch.Generator().manual_seed(seed)
    x = 1 + 0.3 * torch.randn(n, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES_OF_DATA, (n,), generator=generator)


def run_trak(
    save_dir: Path,
    model: nn.Module,
    models: int = 1,
    device: str | torch.device = "cpu",
    **options: object,
):
    """traker's TRAKer from checkpoints to scores [N, M], float32."""
    trak = load("trak")
    torch.manual_seed(1)
    traker = trak.TRAKer(
        model=model,
        task="image_classification",
        train_set_size=N,
        save_dir=str(save_dir),
        device=device,
        **{"use_half_precision": False, "logging_level": logging.ERROR, **options},
    )
    train, targets = (tuple(t.to(device) for t in samples(*what)) for what in ((N, 1), (M, 2)))
    states = [{k: v * (1 + i) for k, v in model.state_dict().items()} for i in range(models)]
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for rows in torch.arange(N).split(9):
            traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))
        traker.finalize_features(model_ids=[model_id])
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id=model_id, num_targets=M)
        traker.score(targets, num_samples=M)
    return traker, torch.from_numpy(np.array(traker.finalize_scores("test")))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("cls", PROJECTING)
def test_trak_end_to_end_with_ours_passed_in(theirs: ModuleType, tmp_path: Path, cls: type) -> None:
    model = linear()
    projector = cls(
        grad_dim=parameters(model),
        proj_dim=24,
        seed=0,
        proj_type="rademacher",
        device="cpu",
        max_batch_size=9,
    )
    traker, scores = run_trak(tmp_path, model, models=2, projector=projector, lambda_reg=1.0)
    assert traker.projector is projector
    assert scores.shape == (N, M)
    assert torch.isfinite(scores).all()
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["JL matrix type"] == "rademacher"
    assert metadata["JL dimension"] == 24


def test_trak_end_to_end_with_install(theirs: ModuleType, tmp_path: Path) -> None:
    """The default projector, replaced in place, is the one passed in."""
    model = linear()
    ours.install()
    traker, scores = run_trak(tmp_path / "a", model, proj_dim=50, projector_seed=3, lambda_reg=1.0)
    assert type(traker.projector) is ours.BasicProjector
    same = ours.BasicProjector(parameters(model), 50, 3, "normal", "cpu")
    _, passed = run_trak(tmp_path / "b", model, projector=same, lambda_reg=1.0)
    assert torch.equal(scores, passed)
    _, exact = run_trak(tmp_path / "c", model, projector=theirs.NoOpProjector(), lambda_reg=1.0)
    assert scores.shape == exact.shape


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with which TRAKer takes its way for GPUs: torch.device("cpu") is no "cpu" to it."""
    if request.param == "cpu":
        properties = SimpleNamespace(multi_processor_count=108)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        for name in ("cuda", "pin_memory"):
            monkeypatch.setattr(Tensor, name, lambda self, *_: self)
    compat.install(shadow=True)  # a real fast_jl takes no proj_dim of 50
    return torch.device(request.param)


@pytest.mark.parametrize("largest", [2**27, 250, 100])
def test_traks_way_for_gpus_with_install(
    theirs: ModuleType, tmp_path: Path, gpu: torch.device, largest: int
) -> None:
    """fast_jl probed, a CudaProjector for each chunk: one, two, and three with an empty first one.

    TRAKer cuts between parameters, before ``largest``; the last case fails in TRAK, whose buffer is
    smaller than the parameter.
    """
    model = linear().to(gpu)
    sizes = [p.numel() for p in model.parameters()]
    assert sizes == [240, 8, 16, 2]
    ours.install()
    options = {"proj_dim": 50, "projector_seed": 3, "lambda_reg": 1.0}
    batch = int(np.iinfo(np.uint32).max) // largest
    traker, scores = run_trak(
        tmp_path / "a", model, models=2, device=gpu, proj_max_batch_size=batch, **options
    )
    if largest == 2**27:
        assert type(traker.projector) is ours.CudaProjector
        y = ours.CudaProjector(266, 50, 3, "rademacher", gpu, 8)
    else:
        chunks = {250: [248, 18], 100: [0, 240, 26]}[largest]
        assert type(traker.projector) is ours.ChunkedCudaProjector
        assert [int(n) for n in traker.projector.params_per_chunk] == chunks
        y = traker.projector
    metadata = json.loads((tmp_path / "a" / "metadata.json").read_text())
    assert (metadata["JL matrix type"], metadata["JL dimension"]) == ("rademacher", 50)
    model = linear().to(gpu)  # the first one holds another checkpoint by now
    _, passed = run_trak(tmp_path / "b", model, models=2, device=gpu, projector=y, lambda_reg=1.0)
    assert torch.equal(scores, passed)
    assert torch.isfinite(scores).all()


def test_traks_chunks_with_a_subset_of_the_parameters(
    theirs: ModuleType, tmp_path: Path, gpu: torch.device
) -> None:
    """grad_wrt: TRAK cuts chunks for all parameters, and then fails an assertion."""
    model = linear().to(gpu)
    ours.install()
    batch = int(np.iinfo(np.uint32).max) // 250
    options = {"grad_wrt": ["2.weight", "2.bias"], "lambda_reg": 1.0, "use_half_precision": True}
    traker, scores = run_trak(
        tmp_path, model, device=gpu, proj_dim=12, proj_max_batch_size=batch, **options
    )
    assert type(traker.projector) is ours.ChunkedCudaProjector
    assert scores.shape == (N, M)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("device", DEVICES)
def test_trak_scores_agree_with_the_originals(
    theirs: ModuleType, tmp_path: Path, device: str
) -> None:
    """Correlation above 0.95 at k = 4096, and as much more as follows from the gradients.

    On a GPU the original is fast_jl where it is installed, TRAK's BasicProjector elsewhere.
    """
    k, model = 4096, linear()
    size = parameters(model)
    train = gradients(model, tmp_path / "train", samples(N, 1))
    targets = gradients(model, tmp_path / "targets", samples(M, 2))
    s, lam, angle = exact_scores(train, targets, 0.3, k)
    lambda_reg = lam * k / size  # TRAK's features are unscaled, its gradients over sqrt(P)
    options = {"device": device, "proj_dim": k, "lambda_reg": lambda_reg}
    original, a = run_trak(tmp_path / "a", linear().to(device), **options)
    fast_jl = device == "cuda" and importlib.util.find_spec("fast_jl") is not None
    assert type(original.projector) is (theirs.CudaProjector if fast_jl else theirs.BasicProjector)
    mine = ours.CudaProjector(size, k, 0, "rademacher", device, 32)
    _, b = run_trak(tmp_path / "b", linear().to(device), projector=mine, **options)
    q = torch.from_numpy(np.array(original.saver.current_store["out_to_loss"]))  # [N, 1]
    assert_scores_agree(s, angle, a / q, b / q)  # the weights 1 - p are no matter of projections


def gradients(model: nn.Module, save_dir: Path, batch: tuple[Tensor, Tensor]) -> Tensor:
    """TRAK's gradients of its model output, [n, P] float64."""
    trak = load("trak")
    traker = trak.TRAKer(
        model=model, task="image_classification", train_set_size=len(batch[1]), device="cpu",
        projector=ours.NoOpProjector(), save_dir=str(save_dir), use_half_precision=False,
        logging_level=logging.ERROR,
    )  # fmt: skip
    traker.load_checkpoint(model.state_dict(), model_id=0)
    grads = traker.gradient_computer.compute_per_sample_grad(batch=batch)
    return ours.NoOpProjector().project(grads, 0).double()
