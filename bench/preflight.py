"""The first half minute on a GPU: does it work, are these the right kernels, what can the card do?

    python -m bench.preflight [--output FOLDER] [--rate build/gpu/wgmma_rate]

prints a line for each question, with what it means and what to do. `ok` is as it should be, `FAIL`
is wrong (status 1), `SLOW` works, but slower than the kernels count on, `--` does not apply here.
Results are written after every line, so that a kernel that hangs leaves what came before.

`--build FILE` compiles bench/wgmma_rate.cu, which the line `wgmma` runs, and stops.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

import numpy
import torch
from torch import Tensor

import fastproj
from fastproj.backends import cuda
from fastproj.spec import MatrixKey, default_block, matrix_block

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
OK, FAIL, SLOW, SKIPPED = "ok", "FAIL", "SLOW", "--"
# The oldest driver for programs of each CUDA release (CUDA Toolkit Release Notes, table 2), and the
# oldest toolkit that builds fastproj._cuda.
LEAST_DRIVER = {12: 525, 13: 580}
OLDEST_TOOLKIT = "12.4"
# Rates may differ from arithmetic by this much: clocks around a loop, and its ends.
SLACK = 1.15
# Issue slots of a warp for one product in the loop of wgmma_rate.cu that makes fragments: 613
# instructions for 64 products. A scheduler has one warp of each of the two warpgroups.
MADE_SLOTS = 613 / 64


@dataclass(frozen=True)
class Line:
    """One answer: a verdict, what was found, what that means, and what to do unless it is ok."""

    name: str
    verdict: str
    found: str
    means: str
    do: str = ""
    figures: dict[str, Any] | None = None

    def __str__(self) -> str:
        said = [f"{self.verdict:<5}{self.name:<16}{self.found}"]
        parts = [("means: ", self.means)]
        if self.verdict not in (OK, SKIPPED):
            parts.append(("do: ", self.do))
        for head, text in parts:
            first, later = " " * 5 + head, " " * 12
            said += wrap(text, 110, initial_indent=first, subsequent_indent=later)
        return "\n".join(said)


def judge(name: str, wrong: Sequence[str], found: str, means: str, do: str, **figures: Any) -> Line:
    """FAIL with what is wrong, else ok with what was found."""
    verdict, said = (FAIL, "; ".join(wrong)) if wrong else (OK, found)
    return Line(name, verdict, said, means, do, figures or None)


# ------------------------------------------------------------------------------------- the machine


def driver_version() -> tuple[int, ...] | None:
    """Such as (580, 65, 6); None where no NVIDIA driver answers."""
    proc = Path("/proc/driver/nvidia/version")
    said = proc.read_text() if proc.is_file() else ""
    if not re.search(r"\s(\d+(?:\.\d+)+)\s", said):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = " " + subprocess.run(query, capture_output=True, text=True).stdout.strip() + " "
        except OSError:
            return None
    match = re.search(r"\s(\d+(?:\.\d+)+)\s", said)
    return tuple(map(int, match[1].split("."))) if match else None


def toolkits(below: Path = Path("/usr/local")) -> list[Path]:
    """Folders of the CUDA toolkits that have an nvcc, the newest first."""
    found: dict[tuple[int, int], Path] = {}
    for nvcc in below.glob("cuda-*/bin/nvcc"):
        if match := re.fullmatch(r"cuda-(\d+)\.(\d+)", nvcc.parents[1].name):
            found[int(match[1]), int(match[2])] = nvcc.parents[1]
    return [found[version] for version in sorted(found, reverse=True)]


def driver() -> Line:
    """Whether the driver takes programs of the toolkit that fastproj._cuda is linked with."""
    means = "the CUDA runtime inside fastproj._cuda needs a driver that is at least as new as it"
    reason = cuda.not_built()
    if reason is not None:
        return Line("driver", FAIL, reason, means, "make gpu-build, and read why it failed")
    module = cuda._module()
    toolkit = str(module.build()["toolkit"])
    major = int(toolkit.partition(".")[0])
    least = LEAST_DRIVER.get(major, max(LEAST_DRIVER.values()))
    installed = driver_version()
    shown = "r" + ".".join(map(str, installed)) if installed else "unknown"
    found = f"driver {shown}, fastproj._cuda with CUDA {toolkit}, torch with {torch.version.cuda}"
    _, problem = module.count()
    if not problem:  # an older driver will do where CUDA's package for forward compatibility is
        return Line("driver", OK, found, means)
    found = f"{found}; {problem}"
    if installed is not None and installed[0] < least:
        do = f"install driver r{least} or newer"
        takes = max(
            (key for key, value in LEAST_DRIVER.items() if value <= installed[0]), default=0
        )
        home = next((home for home in toolkits() if home.name.startswith(f"cuda-{takes}.")), None)
        if home is not None:
            do += f", or build with the toolkit that {shown} takes: CUDA_HOME={home} make gpu-build"
        elif takes:
            do += f", or install a CUDA {takes} toolkit ({OLDEST_TOOLKIT} or newer), which {shown} "
            do += "takes, and CUDA_HOME=its-folder make gpu-build"
        return Line("driver", FAIL, found, f"CUDA {toolkit} needs r{least} or newer", do)
    return Line("driver", FAIL, found, means, f"install driver r{least} or newer")


def expected_family() -> str:
    """The kernels that `auto` must use on this GPU."""
    return "sm90" if torch.cuda.get_device_capability() == (9, 0) else "sm80"


def launched(call: Callable[[], object]) -> list[str]:
    """Names of the kernels of ours that a call launches; none where CUDA's profiler is missing."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    names = {event.key for event in profiler.key_averages()}
    return sorted(name for name in names if re.search(r"project_\w+_kernel", name))


def kernels() -> Line:
    """Which kernels `auto` really uses."""
    means = "on sm_90, wgmma kernels are several times as fast as the mma.sync ones (sm80)"
    module = cuda._module()
    count, _ = module.count()
    wrong: list[str] = []
    facts = []
    do = "FASTPROJ_CUDA_ARCHS=90a make gpu-build"
    for index in range(count):
        gpu = module.gpu(index)
        facts.append(f"{index}: {gpu['name']}, sm_{gpu['arch']}, {gpu['multiprocessors']} SMs")
        if gpu["problem"]:
            wrong.append(f"gpu {index}: {gpu['problem']}")
        elif gpu["arch"] == "90" and not gpu["sm90a"]:
            wrong.append(f"gpu {index} is sm_90, but no code for sm_90a runs there")
    if cuda._variant() != "auto":
        wrong.append(f"{cuda.VARIANT_VARIABLE}={cuda._variant()} is set")
        do = f"unset {cuda.VARIANT_VARIABLE}"
    seen = "the profiler saw no kernels"
    for dtype in (torch.bfloat16, torch.float32):
        grads = torch.ones(64, 4096, dtype=dtype, device=DEVICE)
        try:
            names = launched(lambda grads=grads: project(grads, 512))  # type: ignore[misc]
        except ValueError as error:  # the backend refuses this GPU
            wrong += [] if wrong else [str(error)]
            break
        except RuntimeError as error:  # no CUPTI, or it is in use
            seen = f"the profiler does not run ({' '.join(str(error).split())[:80]})"
            break
        if names:
            seen = f"auto launches {expected_family()}"
            strange = [name for name in names if expected_family() not in name]
            if strange:
                wrong.append(f"auto launched {', '.join(strange)} for {dtype}")
    return judge("kernels", wrong, f"{'; '.join(facts)}; {seen}", means, do)


# ------------------------------------------------------------------------------------ correctness


def project(grads: Tensor, cols: int, **options: Any) -> Tensor:
    """Sums without a scale, by the CUDA backend."""
    return fastproj.project(grads, cols, scale=None, backend="cuda", **options)


def integers(batch: int, rows: int, dtype: torch.dtype, device: str | None = None) -> Tensor:
    """Grads [batch, rows] of small integers: sums are exact. Rows start at multiples of 128 bytes,
    as tensor copies want them.
    """
    generator = torch.Generator().manual_seed(rows)
    numbers = torch.randint(-8, 9, (batch, rows), generator=generator).to(dtype)
    padded = torch.zeros(batch, -(-rows // 64) * 64, dtype=dtype, device=device or DEVICE)
    padded[:, :rows] = numbers.to(padded.device)
    return padded[:, :rows]


def truth(grads: Tensor, cols: int, row_offset: int = 0, kind: str = "rademacher") -> Tensor:
    """G @ R by NumPy, in float64 on the CPU."""
    key = MatrixKey(kind, 0, 0, default_block(cols) if kind == "sjlt" else 0)
    block = matrix_block(key, row_offset, row_offset + grads.shape[1], 0, cols)
    return grads.cpu().double() @ torch.from_numpy(numpy.asarray(block, dtype=numpy.float64))


def differs(got: Tensor, expected: Tensor, what: str) -> list[str]:
    """A sentence where they are not equal."""
    got = got.cpu().double()
    if torch.equal(got, expected):
        return []
    count = int((got != expected).sum())
    worst = float((got - expected).abs().nan_to_num(nan=float("inf")).max())
    return [f"{what}: {count} of {expected.numel()} sums are wrong, by up to {worst:g}"]


BROKEN = "don't time anything; run the tests of make gpu-test-cuda, then the sanitizers"


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def layouts(batch: int, rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows that start at multiples of 16 bytes, as bulk copies want them, and such as don't."""
    return {
        "": integers(batch, rows, dtype),
        ", rows that start anywhere": integers(batch, rows + 1, dtype)[:, 1:],
    }


def values() -> Line:
    """Sums of integers, each dtype, precision and way of loading, against NumPy."""
    wrong: list[str] = []
    for dtype in DTYPES:
        for where, grads in layouts(37, 1537, dtype).items():
            expected = truth(grads, 300)
            for precision in ("highest", "high", "medium")[: 3 if dtype == torch.float32 else 1]:
                got = project(grads, 300, precision=precision)
                what = f"{dtype} {precision}{where}".removeprefix("torch.")
                wrong += differs(got, expected, what)
    means = "loads, fragments of R, products and sums are right, for each way that G is loaded"
    found = "equal to NumPy for bf16, fp16, fp32 x3, x2, x1, fp64, aligned and not"
    return judge("values", wrong, found, means, BROKEN)


def kinds() -> Line:
    """The other kinds, where sums are exact: single entries of a Gaussian R and of its adjoint,
    sums of integers of kind sjlt.
    """
    wrong: list[str] = []
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        units = torch.eye(600, dtype=dtype, device=DEVICE)
        got = project(units, 300, kind="gaussian")
        wrong += differs(got, truth(units, 300, kind="gaussian"), f"gaussian {name}")
        for where, grads in layouts(5, 1537, dtype).items():
            got = project(grads, 300, kind="sjlt")
            wrong += differs(got, truth(grads, 300, kind="sjlt"), f"sjlt {name}{where}")
    for kind in ("gaussian", "sjlt"):
        leaf = torch.zeros(300, 600, device=DEVICE, requires_grad=True)
        project(leaf, 300, kind=kind).backward(torch.eye(300, device=DEVICE))
        assert leaf.grad is not None
        rows = truth(torch.eye(600, dtype=torch.float64), 300, kind=kind)
        wrong += differs(leaf.grad, rows.T, f"the adjoint of {kind}")
    means = "the Gaussian table and its fragments, and the kernels of kind sjlt, are right"
    found = "gaussian and sjlt are equal to NumPy, for each dtype, and so are their adjoints"
    return judge("kinds", wrong, found, means, BROKEN)


def edges() -> Line:
    """Tensor copies with boxes that lie wholly outside of G, in clusters of two blocks."""
    wrong: list[str] = []
    for batch, rows, row_offset in ((1, 1, 511), (1, 1, 0), (1, 700, 511), (9, 1, 511)):
        for dtype in (torch.bfloat16, torch.float32):
            grads = integers(batch, rows, dtype)
            got = project(grads, 1000, row_offset=row_offset)
            what = f"{dtype} B={batch} P={rows} row_offset={row_offset}".removeprefix("torch.")
            wrong += differs(got, truth(grads, 1000, row_offset), what)
    means = (
        "boxes of the tensor copies before row 0, past P and past B arrive as zeros in both blocks"
    )
    return judge(
        "edges", wrong, "equal for B = 1, P = 1, row_offset = 511, K = 1000", means, BROKEN
    )


def in_new_thread(call: Callable[[], Tensor]) -> Tensor | str:
    """What a call returns in a thread that has not used CUDA yet, or what it raises."""
    answer: list[Tensor | str] = []

    def run() -> None:
        try:
            answer.append(call())
        except Exception as error:
            answer.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return answer[0]


class ProjectsBackward(torch.autograd.Function):
    """A function whose backward pass projects; autograd runs it in a thread of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grads: Tensor, out: Tensor) -> Tensor:
        ctx.grads, ctx.out = grads, out
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        project(ctx.grads, ctx.out.shape[1], out=ctx.out)
        return gradient, None, None


def threads() -> Line:
    """A thread's first call, of tensor copies and of the adjoint, when the main thread is warm."""
    grads = integers(16, 1100, torch.bfloat16)
    expected = truth(grads, 512)
    project(grads, 512)
    torch.cuda.synchronize()
    wrong: list[str] = []
    out = torch.full((16, 512), torch.nan, device=DEVICE)  # made here: torch makes no context there
    got = in_new_thread(lambda: project(grads, 512, out=out))
    wrong += (
        [f"a new thread: {got}"] if isinstance(got, str) else differs(got, expected, "a new thread")
    )
    out = torch.full((16, 512), torch.nan, device=DEVICE)
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    try:
        ProjectsBackward.apply(x, grads, out).sum().backward()
        wrong += differs(out, expected, "a backward pass that projects")
        leaf = integers(4, 600, torch.float32).clone().requires_grad_()
        project(leaf, 64).sum().backward()
        assert leaf.grad is not None
        rows = truth(torch.eye(600, dtype=torch.float64), 64).sum(1).expand(4, 600)
        wrong += differs(leaf.grad, rows, "the adjoint in a backward pass")
    except RuntimeError as error:
        wrong.append(f"a backward pass: {' '.join(str(error).split())[:200]}")
    means = (
        "data loaders and autograd call from threads of their own, which have no CUDA context yet"
    )
    do = "bind the device's primary context before cuTensorMapEncodeTiled (csrc/cuda/launch.cu)"
    return judge("threads", wrong, "a new thread and a backward pass give the same sums", means, do)


def streams() -> Line:
    """A stream of one's own: the call waits for what is queued there, and for nothing else."""
    grads = integers(16, 1100, torch.bfloat16)
    late = torch.zeros_like(grads)
    project(late, 512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some milliseconds before the gradients are there
        late.copy_(grads)
        got = project(late, 512)
    stream.synchronize()
    wrong = differs(got, truth(grads, 512), "a call on a stream")
    means = "work is queued on torch's current stream; elsewhere it would read what isn't there yet"
    return judge(
        "streams", wrong, "a call on a new stream sees what was queued there", means, BROKEN
    )


def second_device() -> Line:
    """Device 1 while device 0 is current."""
    means = "a call works on its tensors' device, and the current device stays"
    count = torch.cuda.device_count()
    if count < 2:
        return Line("device 1", SKIPPED, f"{count} GPU here", means)
    wrong: list[str] = []
    for dtype in (torch.bfloat16, torch.float32):
        grads = integers(16, 1100, dtype, device="cuda:1")
        got = project(grads, 512)
        torch.cuda.synchronize(1)
        wrong += differs(got, truth(grads, 512), f"{dtype} on device 1".removeprefix("torch."))
        if got.device.index != 1:
            wrong.append(f"the result is on {got.device}")
    if torch.cuda.current_device() != 0:
        wrong.append(f"device {torch.cuda.current_device()} is current afterwards")
    return judge("device 1", wrong, f"equal on device 1 of {count}", means, BROKEN)


# ------------------------------------------------------------------------------------------ speed


def compile_rate(output: Path) -> str | None:
    """Compiles bench/wgmma_rate.cu for sm_90a; None, or why not."""
    sys.path.insert(0, str(ROOT))
    import build_cuda

    nvcc = build_cuda.find_nvcc()
    if nvcc is None:
        return "no nvcc was found (CUDA_HOME, CUDA_PATH, PATH); install the CUDA toolkit"
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-cudart", "static", "-Xptxas", "-v"]
    flags += build_cuda.Arch("90a").flags()
    source = ROOT / "bench" / "wgmma_rate.cu"
    works, said = build_cuda.run([nvcc, *flags, str(source), "-o", str(output)])
    output.with_name(output.name + ".txt").write_text(said)
    return None if works else f"{source} did not compile: {said[-500:]}"


def measured_rates(program: Path) -> dict[str, Any] | str:
    """What bench/wgmma_rate.cu measures, or why nothing."""
    if expected_family() != "sm90":
        return "for sm_90 only"
    if not program.is_file():
        return f"{program} is not there; make gpu-build compiles it"
    done = subprocess.run(
        [str(program), str(torch.cuda.current_device())], capture_output=True, text=True, timeout=20
    )
    if done.returncode:
        raise RuntimeError(f"{program} failed: {' '.join(done.stderr.split())[-200:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def clusters(figures: dict[str, Any] | str) -> Line:
    """How many clusters of two blocks the GPU holds at once."""
    means = (
        "a multiprocessor without a partner stays idle: the grid is made for all of them in pairs"
    )
    if isinstance(figures, str):
        return Line("clusters", SKIPPED, figures, means)
    count, most = figures["clusters"], figures["multiprocessors"] // 2
    found = f"{count} clusters of 2 fit at once, on {figures['multiprocessors']} multiprocessors"
    do = f"plan with {2 * count} blocks (csrc/cuda/plan.hpp), and compare with clusters of 1"
    return Line("clusters", OK if count >= most else SLOW, found, means, do, {"clusters": count})


def wgmma(figures: dict[str, Any] | str) -> Line:
    """Whether products with A from registers take N / 2 clocks."""
    means = (
        "clocks of a multiprocessor for a product of 64 x N x 16: N / 2 by published rates; `made` "
        f"writes A anew, which takes {MADE_SLOTS:.1f} issue slots"
    )
    if isinstance(figures, str):
        return Line("wgmma", SKIPPED, figures, means)
    slow, shown = [], []
    for name, least in (("bare", 0.0), ("made", MADE_SLOTS)):
        for width in (16, 32, 64):
            clocks, expected = figures[name][str(width)], max(width / 2, least)
            shown.append(f"{name} N={width} {clocks:.1f} of {expected:.1f}")
            if clocks > SLACK * expected:
                slow.append(f"{name} N={width}")
    do = (
        f"{', '.join(slow)}: the bounds in csrc/cuda/README.md are too low; prefer a larger N "
        "(plan.hpp) where `bare` is slow, fewer instructions for each entry where `made` is"
    )
    return Line("wgmma", SLOW if slow else OK, ", ".join(shown), means, do, figures)


def seconds_of(call: Callable[[], object], repeats: int = 5) -> float:
    """The median, by events, after a first call."""
    call()
    seconds = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        seconds.append(1e-3 * start.elapsed_time(stop))
    return median(seconds)


def bandwidth(size: int = 1 << 30) -> Line:
    """Bytes that a copy reads and writes in a second."""
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * size / seconds_of(lambda: target.copy_(source))
    means = (
        "what projections of few samples are measured against; an H100 SXM copies at about 2.8 TB/s"
    )
    return Line("copy", OK, f"{rate / 1e12:.2f} TB/s", means, figures={"bytes_per_second": rate})


def peak(size: int = 8192) -> Line:
    """bf16 operations in a second of torch's matmul."""
    a = torch.randn(size, size, device=DEVICE).to(torch.bfloat16)
    out = torch.empty_like(a)
    rate = 2.0 * size**3 / seconds_of(lambda: torch.matmul(a, a, out=out))
    means = "what projections of many samples are measured against; an H100 SXM has 600 to 800 here"
    found = f"{rate / 1e12:.0f} TFLOP/s in bf16, {size} x {size} x {size}"
    return Line("peak", OK, found, means, figures={"flops": rate})


def first_figures(rows: int = 1 << 20, cols: int = 4096) -> Line:
    """The rate of one call, B = 64: bf16, and fp32 at each precision."""
    shown, figures = [], {}
    for dtype, precision in (
        (torch.bfloat16, "highest"),
        (torch.float32, "medium"),
        (torch.float32, "high"),
        (torch.float32, "highest"),
    ):
        # As random as those of the peak: with equal numbers tensor cores take less power, and their
        # clock is higher.
        grads = torch.randn(64, rows, device=DEVICE).to(dtype)
        out = torch.empty(64, cols, device=DEVICE)
        name = "bf16" if dtype == torch.bfloat16 else f"fp32 {precision}"

        def call(grads: Tensor = grads, out: Tensor = out, precision: str = precision) -> Tensor:
            return project(grads, cols, out=out, precision=precision)

        figures[name] = 2.0 * 64 * rows * cols / seconds_of(call)
        shown.append(f"{name} {figures[name] / 1e12:.0f}")
    means = "first rates, to be set against the peak above; make gpu-bench measures them properly"
    found = f"TFLOP/s at B = 64, K = {cols}: {', '.join(shown)}"
    return Line("first figures", OK, found, means, figures=figures)


# ------------------------------------------------------------------------------------ all of them

CORRECTNESS: tuple[Callable[[], Line], ...] = (
    values,
    kinds,
    edges,
    threads,
    streams,
    second_device,
)


@contextmanager
def _answer(name: str, lines: list[Line]) -> Iterator[None]:
    """A question that raises is answered by FAIL, whatever it raises: the others are asked."""
    try:
        yield
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        lines.append(Line(name, FAIL, found, "the question could not be answered", BROKEN))


def usable() -> bool:
    """Whether the GPU still takes calls: after a failed kernel it takes none."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def questions(program: Path) -> Iterator[tuple[str, Callable[[], Line]]]:
    """Every question in order, the one first whose answer decides most."""
    for check in (kernels, *CORRECTNESS):
        yield check.__name__, check
    figures: list[dict[str, Any] | str] = []

    def rates() -> dict[str, Any] | str:
        if not figures:
            figures.append(measured_rates(program))
        return figures[0]

    yield "clusters", lambda: clusters(rates())
    yield "wgmma", lambda: wgmma(rates())
    yield "copy", bandwidth
    yield "peak", peak
    yield "first figures", first_figures


def run(program: Path, budget: float, tell: Callable[[Line], None]) -> list[Line]:
    """All lines; none starts after `budget` seconds, or when the GPU takes no more calls."""
    begun = time.monotonic()
    lines = [driver()]
    tell(lines[0])
    stopped = "the driver does not take this module" if lines[0].verdict == FAIL else ""
    for name, question in questions(program):
        if not stopped and time.monotonic() - begun > budget:
            stopped = f"{budget:g} seconds were used up"
        if stopped:
            lines.append(Line(name, SKIPPED, f"not asked: {stopped}", "unknown"))
        else:
            with _answer(name, lines):
                lines.append(question())
            if lines[-1].verdict == FAIL and not usable():
                stopped = f"the GPU takes no more calls after what failed in {name}"
        tell(lines[-1])
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 where a line says FAIL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for preflight.txt and preflight.json")
    parser.add_argument("--rate", type=Path, default=ROOT / "build" / "gpu" / "wgmma_rate")
    parser.add_argument("--build", type=Path, metavar="FILE", help="compile wgmma_rate.cu and stop")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds; starts no line later")
    options = parser.parse_args(argv)
    if options.build is not None:
        problem = compile_rate(options.build)
        print(problem or f"compiled {options.build}", file=sys.stderr if problem else sys.stdout)
        return 1 if problem else 0
    told: list[Line] = []

    def tell(line: Line) -> None:
        print(line, flush=True)
        told.append(line)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            content = {"device": device_name(), "lines": [asdict(each) for each in told]}
            (options.output / "preflight.json").write_text(json.dumps(content, indent=1) + "\n")
            text = "\n".join(map(str, told))
            (options.output / "preflight.txt").write_text(text + "\n")

    lines = run(options.rate, options.budget, tell)
    count = {verdict: sum(line.verdict == verdict for line in lines) for verdict in (FAIL, SLOW)}
    print(f"preflight: {len(lines)} lines, {count[FAIL]} FAIL, {count[SLOW]} SLOW")
    return 1 if count[FAIL] else 0


def device_name() -> str:
    """The GPU's name, or what torch says instead."""
    try:
        return torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        return f"none ({error})"


if __name__ == "__main__":
    sys.exit(main())
