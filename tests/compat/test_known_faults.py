"""A named test for each known fault of the packages that fastproj stands in for.

Those of a projector are shown here. Those of TRAK's estimator can't be put right by a projector:
``fastproj.TRAKer`` doesn't have them, which the tests named in ``ELSEWHERE`` show.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fastproj
from fastproj.compat import dattri, fast_jl, trak
from tests.compat.bounds import rows_differ
from tests.compat.packages import load
from tests.dense import integers, normals, relative_error, stored

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

ELSEWHERE = {
    "resuming in mid-batch raises a shape error": (
        "trak/test_estimator.py",
        "test_resuming_in_the_middle_of_a_batch",
    ),
    "score() after finalize_features() fails at proj_dim <= 100": (
        "trak/test_estimator.py",
        "test_score_after_finalize_features_at_small_proj_dim",
    ),
    "load_from_save_dir=False in a fresh directory fails": (
        "trak/test_estimator.py",
        "test_load_from_save_dir_false_in_a_fresh_directory",
    ),
    "allow_skip=True fails": (
        "trak/test_estimator.py",
        "test_allow_skip_averages_over_what_is_complete",
    ),
    "n < proj_dim with lambda 0 gives arbitrary features without a word": (
        "trak/test_estimator.py",
        "test_fewer_samples_than_dimensions_warns_and_is_repeatable",
    ),
    "half-precision XtX": ("trak/test_solve.py", "test_gram_of_blocks"),
    "half-precision features overflow": (
        "trak/test_estimator.py",
        "test_half_precision_storage_keeps_three_digits_at_any_scale",
    ),
    "published LDS not reproduced (dattri 192)": (
        "commands/test_demo.py",
        "test_scores_predict_retraining",
    ),
}


@pytest.mark.parametrize("fault", ELSEWHERE)
def test_faults_of_the_estimator_have_their_tests(fault: str) -> None:
    file, name = ELSEWHERE[fault]
    tree = ast.parse((Path(__file__).parents[1] / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# ---- fast_jl -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_float32_beyond_65504_stays_finite_and_exact(device: str) -> None:
    """fast_jl casts to fp16 inside its kernel: 65504 is its largest number."""
    x = (integers((4, 300)) * 2.0**17).to(device)
    assert x.abs().max() > 65504
    y = fast_jl.project_rademacher_8(x, 64, 0, 108)
    assert torch.equal(y.double().cpu(), x.double().cpu() @ stored(300, 64))
    grads = trak.CudaProjector(300, 64, 0, "rademacher", device, 8).project(x, 0)
    assert torch.equal(grads, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("magnitude", [1e-8, 1e-30])
def test_small_float32_is_not_flushed_to_zero(device: str, magnitude: float) -> None:
    """trak issues 24, 41, 81, 82: zeros. In fp16, 1e-8 is one."""
    x = (normals((4, 300)) * magnitude).to(device)
    y = fast_jl.project_normal_16(x, 64, 0, 108)
    exact = x.double().cpu() @ stored(300, 64, kind="gaussian")
    assert (y != 0).all()
    assert relative_error(y.cpu(), exact) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_one_huge_entry_spoils_no_other_row(device: str) -> None:
    """And inf passes through as in a matmul, into its own row alone."""
    x = normals((3, 50)).to(device)
    x[1, 7] = torch.inf
    y = fast_jl.project_rademacher_8(x, 16, 0, 1)
    assert torch.isfinite(y[[0, 2]]).all()
    assert torch.isinf(y[1]).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiles", [1, 8, 80, 108, 132, 10**6])
def test_matrix_does_not_depend_on_the_number_of_tiles(tiles: int, device: str) -> None:
    """Callers pass the GPU's multiprocessor count: features of an A100, scored on an H100."""
    x = normals((5, 4000)).to(device)
    assert torch.equal(
        fast_jl.project_rademacher_8(x, 100, 7, tiles), fast_jl.project_rademacher_8(x, 100, 7, 3)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 7, 8, 9, 31, 33])
@pytest.mark.parametrize("proj_dim", [1, 10, 511, 513])
def test_odd_batches_and_dimensions(batch: int, proj_dim: int, device: str) -> None:
    """fast_jl wants proj_dim in 512s and batches in 8s."""
    x = integers((batch, 123))
    for name in ("project_rademacher_8", "project_rademacher_32"):
        y = getattr(fast_jl, name)(x.to(device), proj_dim, 1, 108)
        assert torch.equal(y.double().cpu(), x.double() @ stored(123, proj_dim, 1))


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_is_taken(device: str) -> None:
    x = integers((8, 64), dtype=torch.bfloat16)
    y = fast_jl.project_rademacher_8(x.to(device), 8, 0, 1)
    assert torch.equal(y.double().cpu(), x.double() @ stored(64, 8))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_more_than_2_to_the_31_elements(device: str) -> None:
    """32-bit offsets: an input of 2^31 + 600 entries whose tail alone isn't zero."""
    size = 2**31 + 600
    x = torch.zeros(1, size, dtype=torch.float16, device=device)
    tail = integers((1, 700), dtype=torch.float16).to(device)
    x[:, -700:] = tail
    y = fast_jl.project_rademacher_8(x, 5, 0, 108)
    r = fastproj.matrix(slice(size - 700, size), 5, dtype=torch.float64)
    assert torch.equal(y.double().cpu(), tail.double().cpu() @ r)


def test_rows_beyond_2_to_the_32_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above shows at full size, at the places where 32 bits would wrap."""
    project, offsets = trak.project_pieces, []

    def only_the_last(function: str, pieces: list[torch.Tensor], *key: object, **options: object):
        offsets.append(options["row_offset"])
        pieces = pieces if pieces[0].shape[1] == 64 else [torch.zeros(2, 1)]
        return project(function, pieces, *key, **options)

    monkeypatch.setattr(trak, "project_pieces", only_the_last)
    parts = [trak.CudaProjector(64, 64, 0, "rademacher", "cpu", 8) for _ in range(3)]
    sizes = [2**31, 2**32 - 2**31, 64]  # the third chunk starts at row 2^32
    chunked = trak.ChunkedCudaProjector(parts, 2**32, sizes, 8, "cpu", torch.float32)
    x, zeros = integers((2, 64)), torch.zeros(2, 1)
    tree = {"a": zeros.expand(2, sizes[0]), "b": zeros.expand(2, sizes[1]), "c": x}
    y = chunked.project(tree, 0)
    assert offsets == [0, 2**31, 2**32]
    assert torch.equal(y.double(), x.double() @ stored(64, 64, row_offset=2**32))
    assert not torch.equal(y, parts[0].project(x, 0))


@pytest.mark.gpu
def test_work_is_ordered_on_the_current_stream() -> None:
    """fast_jl launches on the legacy default stream: here a graph of another stream captures it."""
    x = integers((8, 2000)).cuda()
    expected = fast_jl.project_rademacher_8(x, 512, 0, 108)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        y = fast_jl.project_rademacher_8(x, 512, 0, 108)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * expected)


# ---- TRAK ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_with_one_seed_share_no_rows(device: str) -> None:
    """TRAK draws chunk seeds from 0 .. 499: of 27 chunks, two are more likely than not to agree."""
    parts = [trak.CudaProjector(512, 512, 7, "rademacher", device, 8) for _ in range(2)]
    chunked = trak.ChunkedCudaProjector(parts, 512, [512, 512], 8, device, torch.float32)
    eye = torch.eye(512, device=device)
    zero = torch.zeros_like(eye)
    first = chunked.project({"a": eye, "b": zero}, 0)
    second = chunked.project({"a": zero, "b": eye}, 0)
    assert first.abs().min() == 1
    assert second.abs().min() == 1
    assert rows_differ(first, second)
    # With one matrix for both chunks, this gradient would be projected to nothing.
    assert chunked.project({"a": eye, "b": -eye}, 0).abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoints_share_no_blocks_at_large_proj_dim(device: str) -> None:
    """TRAK's BasicProjector: columns 10,000 of model 0 are columns 0 of model 1."""
    columns = 10_400
    projector = trak.BasicProjector(50, columns, 0, "rademacher", device)
    eye = torch.eye(50, device=device)
    zero, one = projector.project(eye, 0), projector.project(eye, 1)
    for start in range(0, columns - 400, 100):
        assert rows_differ(zero[:, start : start + 400], one[:, :400], failure=1e-12)
        assert start == 0 or rows_differ(zero[:, start : start + 100], zero[:, :100], 1e-12)


def test_traks_own_projector_shares_them() -> None:
    """The fault that the test above would find."""
    theirs = load("trak.projectors").BasicProjector(50, 10_400, 0, "rademacher", "cpu")
    eye = torch.eye(50)
    zero, one = theirs.project(eye, 0), theirs.project(eye, 1)
    assert torch.equal(zero[:, 10_000:], one[:, :400])


@pytest.mark.parametrize("device", DEVICES)
def test_seed_and_model_id_are_not_added_up(device: str) -> None:
    """TRAK's CudaProjector: seed 10,000 of model 0 is seed 0 of model 1."""
    eye = torch.eye(200, device=device)
    a = trak.CudaProjector(200, 200, 10_000, "rademacher", device, 8).project(eye, 0)
    b = trak.CudaProjector(200, 200, 0, "rademacher", device, 8).project(eye, 1)
    assert rows_differ(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("proj_dim", [8, 100, 300])
def test_projecting_after_free_memory(proj_dim: int, device: str) -> None:
    """TRAK's score() after finalize_features() fails with BasicProjector at proj_dim <= 100."""
    x = normals((3, 40)).to(device)
    for cls in (trak.BasicSingleBlockProjector, trak.BasicProjector):
        projector = cls(40, proj_dim, 0, "normal", device)
        before = projector.project(x, 0)
        projector.free_memory()
        projector.free_memory()
        assert torch.equal(projector.project(x, 0), before)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_take_batches_larger_than_announced(device: str) -> None:
    """TRAK's ChunkedCudaProjector has a buffer of feat_bs rows."""
    parts = [trak.CudaProjector(5, 4, s, "rademacher", device, 8) for s in (0, 1)]
    chunked = trak.ChunkedCudaProjector(parts, 5, [5, 5], 2, device, torch.float32)
    x = integers((9, 10)).to(device)
    assert torch.equal(chunked.project(x, 0)[:2], chunked.project(x[:2], 0))
    assert chunked.project(x, 0).shape == (9, 4)


# ---- dattri --------------------------------------------------------------------------------------


def test_making_a_projector_for_each_batch_costs_nothing() -> None:
    """dattri builds [P, K] anew each time: here 10^15 entries, which no machine holds."""
    x = integers((2, 30))
    for _ in range(20):
        projector = dattri.make_random_projector([10**12], 2, 1000, 8, "cpu", 0, "normal")
        assert projector.feature_dim == 10**12
    project = dattri.random_project(x, 2, 16, 8, proj_type="rademacher")
    again = dattri.random_project(x, 2, 16, 8, proj_type="rademacher")
    assert torch.equal(project(x), again(x))


def test_proj_seed_has_an_effect() -> None:
    """dattri issue 110."""
    eye = torch.eye(200)
    a, b = (
        dattri.random_project(eye, 200, 200, 8, proj_seed=seed, proj_type="rademacher")(eye)
        for seed in (0, 1)
    )
    assert rows_differ(a, b)
    c = dattri.random_project(eye, 200, 200, 8, proj_seed=0, proj_type="rademacher")(eye, 1)
    assert rows_differ(a, c)
