"""The CUDA adapter on any machine: what it says without a GPU, and its plan."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch

from fastproj.backends import cuda
from fastproj.call import Call
from fastproj.spec import MatrixKey

BUILT = cuda.not_built() is None
needs_module = pytest.mark.skipif(not BUILT, reason=f"{cuda.not_built()}")


def test_reason_is_one_line_with_a_fix():
    reason = cuda.unavailable()
    if reason is None:
        assert torch.cuda.is_available()
    else:
        assert "\n" not in reason
        assert "install" in reason


def test_takes_cuda_tensors_only():
    assert cuda.unsupported("cuda", torch.bfloat16, "gaussian") is None
    assert "cpu" in str(cuda.unsupported("cpu", torch.float32, "rademacher"))


def test_variant_is_checked(monkeypatch):
    monkeypatch.setenv(cuda.VARIANT_VARIABLE, "sm75")
    with pytest.raises(ValueError, match="received 'sm75'; expected one of auto, simple"):
        cuda._variant()
    with cuda.force_variant("sm80"):
        assert cuda._variant() == "sm80"
    with pytest.raises(ValueError, match="received 'fast'"), cuda.force_variant("fast"):
        pass


def test_a_sum_of_nothing_is_zero():
    call = Call(MatrixKey("rademacher", 0, 0))
    nothing = [torch.empty(3, 0), torch.empty(3, 0)]
    out = torch.full((3, 5), torch.nan)
    cuda.project(nothing, out, call)
    assert torch.equal(out, torch.zeros(3, 5))
    out.fill_(7.0)
    cuda.project(nothing, out, call._replace(accumulate=True))
    assert torch.equal(out, torch.full((3, 5), 7.0))


@needs_module
def test_module_links_to_neither_torch_nor_cuda():
    """cudart is linked statically and the driver found at run time."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (binutils)")
    command = ["readelf", "-d", cuda._module().__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    assert needed
    assert not [name for name in needed if re.search("torch|c10|cuda|nv", name)]


@needs_module
def test_columns_beyond_32_bits_are_refused_and_another_backend_named():
    with pytest.raises(ValueError, match=r'proj_dim=2147483648; expected .* backend="triton"'):
        cuda.plan(1, 1000, 2**31, torch.bfloat16)


@needs_module
def test_module_reports_no_gpu_where_there_is_none():
    count, problem = cuda._module().count()
    assert bool(count) != bool(problem)
    assert "CUDA" in cuda.describe()["built with"]


@needs_module
def test_calls_without_a_gpu_name_the_failing_one():
    if cuda._module().count()[0]:
        return
    call = Call(MatrixKey("rademacher", 0, 0)).numbers()
    with pytest.raises(RuntimeError, match="cudaGetDeviceProperties"):
        cuda._module().matrix(0, 0, (0, 0, 1, 1, 1, 1), call, 0)


@pytest.mark.parametrize(
    ("problems", "in_use", "looked_at", "reason"),
    [
        (["", "", ""], [], [1], None),
        (["", "", ""], [2], [2], None),  # tensors on "cuda:2", while GPU 1 is current
        (["", "", ""], [0, 1, 2], [1], None),
        (["", "too old", ""], [], [1, 0], None),
        (["", "", "too old"], [2], [2, 1], None),
        (["a", "b", "c"], [], [1, 0, 2], "b"),
    ],
)
def test_only_the_gpus_that_must_be_are_looked_at(monkeypatch, problems, in_use, looked_at, reason):
    """Each look makes a context: hundreds of megabytes of a GPU that another process may own. One
    that this process uses has its context.
    """
    seen = []
    entered = []

    class Device:
        """torch's own goes back to a GPU only where that makes no context."""

        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *error):
            entered.pop()

    class Extension:
        count = staticmethod(lambda: (len(problems), ""))

        @staticmethod
        def gpu(index):
            seen.append(index)
            assert entered == [index]
            return {"problem": problems[index]}

    monkeypatch.setattr(cuda, "_module", lambda: Extension)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Device)
    used = in_use.__contains__
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", used, raising=False)
    assert cuda.unavailable.__wrapped__() == reason
    assert seen == looked_at


@needs_module
def test_plan_is_printable_and_depends_on_arch():
    hopper = cuda.plan(64, 10**7, 4096, torch.bfloat16)
    ampere = cuda.plan(64, 10**7, 4096, torch.bfloat16, arch=80, multiprocessors=108)
    odd = cuda.plan(64, 10**7 + 1, 4096, torch.bfloat16, aligned=False)
    assert (hopper["variant"], hopper["loader"], hopper["cluster"]) == ("sm90", "tma", "2")
    assert (ampere["variant"], ampere["loader"]) == ("sm80", "cp.async")
    assert odd["loader"] == "cp.async, one element at a time"
    assert hopper == cuda.plan(64, 10**7, 4096, torch.bfloat16)
    assert int(hopper["workspace bytes"]) <= 48 << 20
    assert cuda.plan(4, 100, 10, torch.float64)["variant"] == "simple"
    for precision, terms in (("highest", "3"), ("high", "2"), ("medium", "1")):
        assert cuda.plan(8, 10**6, 512, torch.float32, precision=precision)["terms"] == terms


@needs_module
def test_plan_of_sjlt():
    default = cuda.plan(8, 10**8, 4096, torch.bfloat16, "sjlt")
    assert default["block"] == "1024"
    assert default["BLOCK_B"] == "4"
    assert int(default["BLOCK_K"]) >= 4096  # G is read once
    assert cuda.plan(8, 10**8, 4096, torch.bfloat16, "sjlt", block=2048)["block"] == "2048"
    alone = cuda.plan(1, 10**8, 4096, torch.bfloat16, "sjlt")
    assert alone["splits of P"] == default["splits of P"]
