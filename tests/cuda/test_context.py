"""A thread that has not used CUDA yet: its first call binds a context before the driver needs one.

On a stand-in for the runtime and the driver (fake_runtime.cpp). test_gpu.py has the same on a
GPU.
"""

from __future__ import annotations

import ctypes
import re
import threading
from pathlib import Path

import pytest

from tests.cuda import emulation

DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    headers = emulation.cuda_headers()
    if headers is None:
        pytest.skip("no CUDA headers (install the CUDA toolkit or triton)")
    return compiled(emulation.ROOT, headers, tmp_path_factory.mktemp("fake") / "fake.so")


def compiled(root: Path, headers: Path, output: Path) -> ctypes.CDLL:
    sources = [root / "csrc" / "cuda" / "launch.cu", root / "tests" / "cuda" / "fake_runtime.cpp"]
    emulation.compile_shared(root, sources, output, ["-isystem", str(headers)])
    return ctypes.CDLL(str(output))


def call(library: ctypes.CDLL, what: str, dtype: str = "float32", device: int = 0) -> list[str]:
    """The trace of one call of this thread."""
    text = ctypes.create_string_buffer(4096)
    code = library.fake_call(what.encode(), DTYPES[dtype], device, text, len(text))
    lines = text.value.decode().splitlines()
    assert code == 0, lines
    return lines


def in_new_thread(library: ctypes.CDLL, *arguments: object) -> list[str]:
    found: list[list[str] | BaseException] = []

    def run() -> None:
        try:
            found.append(call(library, *arguments))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_projection_of_a_thread(library, dtype, device):
    call(library, "project", "bfloat16", device)  # the main thread is warm
    trace = in_new_thread(library, "project", dtype, device)
    encodes = [line for line in trace if "encode" in line]
    assert encodes == [f"encode on {device}"] * (dtype != "float64")
    assert trace[-2:] == [f"launch on {device}", "left on 0"]


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("what", ["project_transpose", "matrix"])
def test_first_other_call_of_a_thread(library, what, device):
    call(library, what, "bfloat16", device)
    trace = in_new_thread(library, what, "bfloat16", device)
    assert trace == [f"launch on {device}", "left on 0"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_of_kind_sjlt_do_not_lower_what_others_may_have(library, dtype):
    """How much shared memory launches may have belongs to the kernel, not to the call: another
    thread, or an earlier call in the same capture, may be about to have more.
    """
    had, allowed = set(), set()
    for what in ("sjlt small", "sjlt large"):
        trace = call(library, what, dtype)
        of_kernel, launch = trace[:2]
        assert launch == "launch on 0"
        found = re.fullmatch(r"shared memory (\d+) of (\d+)", of_kernel)
        had.add(int(found[1]))
        allowed.add(int(found[2]))
    assert len(had) == 2
    assert allowed == {227 * 1024}  # all that a block of the stand-in can have


@pytest.mark.parametrize("first", [0, 2])  # whether the first kernel that is looked at has room
def test_a_gpu_whose_memory_was_full_is_looked_at_again(library, first):
    """Nothing is concluded from it: not that code for this GPU is missing, nor code for sm_90a."""
    works, full = 0, 2  # cudaErrorMemoryAllocation
    device = 2 + first
    library.fake_loading(first, full)
    with pytest.raises(AssertionError, match="loading a kernel failed"):
        call(library, "project", "bfloat16", device)
    library.fake_loading(works, works)
    assert call(library, "project", "bfloat16", device)[0] == f"encode on {device}"  # of sm_90a


def test_a_gpu_without_code_for_it(library):
    no_image = 209  # cudaErrorNoKernelImageForDevice
    library.fake_loading(no_image, 0)
    for _ in range(2):
        with pytest.raises(AssertionError, match="reinstall with FASTPROJ_CUDA_ARCHS=90"):
            call(library, "matrix", device=5)


def test_a_gpu_that_no_code_can_be_built_for(library):
    """The build refuses its number: so it isn't what to reinstall with."""
    with pytest.raises(AssertionError, match="from sm_80 on, stand-in is sm_75; use backend="):
        call(library, "matrix", device=7)


def test_the_stand_in_sees_a_context_that_is_not_bound(library, tmp_path):
    """Without the binding it fails as a GPU would."""
    emulation.change_source(
        tmp_path,
        "launch.cu",
        'check(cudaSetDevice(device), "cudaSetDevice("',
        'if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice("',
    )
    headers = emulation.cuda_headers()
    assert headers is not None
    broken = compiled(tmp_path, headers, tmp_path / "broken.so")
    call(broken, "project", "bfloat16")
    with pytest.raises(AssertionError, match="cuTensorMapEncodeTiled failed with code 201"):
        in_new_thread(broken, "project", "bfloat16")
