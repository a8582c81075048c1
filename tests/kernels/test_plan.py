"""Plans and configurations: no Triton, no GPU."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastproj.kernels import config, plan
from fastproj.kernels.config import Config

KINDS = ["rademacher", "gaussian"]  # the dense ones
# kind and block
SORTS = st.one_of(
    st.sampled_from([(kind, 0) for kind in KINDS]),
    st.integers(4, 16).map(lambda log2: ("sjlt", 1 << log2)),
)


def covered(launch: plan.Launch, size: int, row: int, height: int) -> list[tuple[int, int]]:
    """Rows of R (start, stop) that each panel, of ``height`` rows, takes from its piece."""
    panels = [launch.panel + i * launch.step for i in range(launch.count)]
    spans = [(panel * height, (panel + 1) * height) for panel in panels]
    if not launch.masked:
        assert all(row <= start and stop <= row + size for start, stop in spans)
    return [(max(start, row), min(stop, row + size)) for start, stop in spans]


@given(
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=5),
    row_offset=st.one_of(st.integers(0, 2000), st.integers(-3000, 0).map(lambda d: (32 << 32) + d)),
    columns=st.integers(1, 65536),
    sort=SORTS,
    multiprocessors=st.integers(1, 400),
    item=st.sampled_from([4, 8]),
)
def test_every_row_once(
    sizes: list[int],
    row_offset: int,
    columns: int,
    sort: tuple[str, int],
    multiprocessors: int,
    item: int,
) -> None:
    kind, block = sort
    columns = min(columns, plan.max_columns(kind))
    if block:  # across the counter's high half, as the dense kinds' far offsets are
        row_offset = row_offset if row_offset < 2000 else row_offset - (32 << 32) + (block << 32)
    height = plan.panel_rows(kind, block)
    groups = plan.plan(sizes, row_offset, columns, kind, multiprocessors, item, block)
    starts = [row_offset + before for before in itertools.accumulate(sizes, initial=0)]
    spans: list[tuple[int, int]] = []
    for group in groups:
        slots: list[int] = []
        for launch in group:
            row = starts[launch.piece]
            assert launch.origin == launch.panel * height - row
            spans += covered(launch, sizes[launch.piece], row, height)
            assert (launch.splits - 1) * launch.per_split < launch.count
            assert launch.count <= launch.splits * launch.per_split
            slots += range(launch.slot, launch.slot + launch.splits)
            last = (launch.panel + (launch.count - 1) * launch.step) * height
            first_counter = plan.Counter.at(kind, launch.panel * height, block)
            assert plan.Counter.at(kind, last + height - 1, block).tag == first_counter.tag
        assert slots == list(range(len(slots)))
        room = plan.room(kind, columns, multiprocessors, item, block)
        assert max(len(slots), 1) * room.batch * room.width * item <= plan.WORKSPACE_BYTES
        assert columns <= room.width
    spans = sorted(span for span in spans if span[0] < span[1])
    whole = [(a, b) for a, b in itertools.pairwise(starts) if a < b]
    # What the pieces' spans join up to is the pieces themselves, with nothing twice.
    assert sum(stop - start for start, stop in spans) == sum(sizes)
    for (_, stop), (start, _) in itertools.pairwise(spans):
        assert stop <= start
    if whole:
        assert (spans[0][0], spans[-1][1]) == (whole[0][0], whole[-1][1])


@pytest.mark.parametrize("row_offset", [5, (16 << 31) - 7])
def test_tiles_of_a_launch_are_counted_in_32_bits(row_offset: int) -> None:
    """2^35 bf16 numbers are 64 GiB, which a GPU may have: 2^31 tiles of the smallest block."""
    groups = plan.plan([2**35 + 3], row_offset, 64, "sjlt", 132, 4, 16)
    launches = [launch for group in groups for launch in group]
    last = max(((launch.count - 1) * launch.step + 1) * plan.PANEL_TILES for launch in launches)
    assert 2**30 < last <= 2**31


def test_large_problems_fill_the_chip() -> None:
    for columns in (512, 4096, 32768):
        groups = plan.plan([10**8 + 1], 5, columns, "rademacher", 132, 4)
        assert len(groups) == 1 or columns > 8192
        tiles = groups[0][0].splits * -(-columns // 256)
        rounds = -(-tiles // 132)
        assert rounds >= 2
        assert tiles / (132 * rounds) > 0.95


@pytest.mark.parametrize("columns", [1024, 4096, 16384, 65536])
@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_one_row_fills_the_chip(columns: int, multiprocessors: int) -> None:
    """Of kind sjlt: one sample's programs are at least one for each multiprocessor."""
    block = columns // 4
    ((launch,),) = plan.plan([2**28], 0, columns, "sjlt", multiprocessors, 4, block)
    assert not launch.masked
    assert launch.splits * -(-columns // plan.sjlt_columns(columns)) >= 0.9 * multiprocessors


@given(columns=st.integers(1, 65536))
def test_few_columns_are_for_nothing(columns: int) -> None:
    size = plan.sjlt_columns(columns)
    assert plan.padded(columns, size) <= max(1.125 * columns, columns + 63)


def test_counter() -> None:
    assert plan.Counter.at("sjlt", (2**32 + 5) * 1024 + 7, 1024) == plan.Counter(
        5, 1 << 8 | 6 << 4 | 2 << 2
    )
    row = 8589934595 * 512 + 17
    counter = plan.Counter.at("rademacher", row)
    assert counter.block & 0xFFFFFFFF == 8589934595 & 0xFFFFFFFF
    assert counter.tag == (8589934595 >> 32) << 8
    assert plan.Counter.at("gaussian", row).tag == (row // 32 >> 32) << 8 | 1 << 2
    assert plan.signed32(0x80008000) == 0x80008000 - (1 << 32)


DTYPES = [
    ("float32", 1),
    ("float32", 2),
    ("float32", 3),
    ("bfloat16", 1),
    ("float16", 1),
    ("float64", 1),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("kind", KINDS)
def test_configurations(arch: str, kind: str) -> None:
    """What the kernels rely on, for every shape; rows of a batch meet in one workspace."""
    for (dtype, terms), B, K in itertools.product(
        DTYPES, (1, 16, 17, 33, 64, 65, 500), (1, 64, 65, 128, 129, 4096)
    ):
        direct, indirect = (
            config.choose(arch, dtype, kind, terms, B, K, direct) for direct in (True, False)
        )
        for chosen in (direct, indirect):
            assert chosen.STEP_ROWS in ((128,) if kind == "gaussian" else (256, 512))
            assert chosen.BLOCK_K % (16 * chosen.num_warps) == 0 or kind == "rademacher"
            assert 256 % chosen.BLOCK_K == 0
            assert chosen.BLOCK_B >= 2
            assert chosen.BLOCK_B <= plan.MAX_BATCH
        assert direct.BLOCK_B == indirect.BLOCK_B


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_sparse_configurations(arch: str) -> None:
    """What the sparse kernel relies on; rows of a batch meet in one workspace."""
    lanes = 64 if arch.startswith("gfx") else 32
    for dtype, B, K in itertools.product(
        ("float32", "bfloat16", "float64"), (1, 2, 5, 128), (1, 64, 65, 1000, 4096, 5000, 65536)
    ):
        columns = plan.sjlt_columns(K)
        direct, masked = (config.choose(arch, dtype, "sjlt", 1, B, K, way) for way in (True, False))
        assert direct.BLOCK_B == masked.BLOCK_B
        assert direct.BLOCK_K == columns  # a row of G is read by as few programs as can be
        sums = direct.BLOCK_B * columns * (2 if dtype == "float64" else 1)
        assert sums <= 32 * lanes * direct.num_warps or direct.num_warps == 1
        for chosen in (direct, masked):
            assert 64 <= chosen.BLOCK_K
            assert columns % chosen.BLOCK_K == 0
            assert lanes * chosen.num_warps <= 512


def test_unknown_kinds_are_refused() -> None:
    for refused in (
        lambda: config.choose("sm_90", "float32", "cauchy", 1, 1, 64),
        lambda: config.choose_transpose("float32", "sjlt", 1),
        lambda: plan.plan([5], 0, 64, "cauchy", 132, 4),
        lambda: plan.Counter.at("cauchy", 5),
    ):
        with pytest.raises(ValueError, match=r"received kind='\w+'; expected"):
            refused()


def test_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    free = config.choose("sm_90", "bfloat16", "rademacher", 1, 64, 4096)
    assert free == Config(64, 256, 256, 8, 3)
    assert str(free) == "BLOCK_B=64,BLOCK_K=256,STEP_ROWS=256,num_warps=8,num_stages=3"
    monkeypatch.setenv(config.ENVIRONMENT, "BLOCK_K=128, num_warps=4")
    pinned = config.choose("sm_90", "bfloat16", "rademacher", 1, 64, 4096)
    assert pinned == Config(64, 128, 256, 4, 3)
    with config.pin(num_stages=4):
        assert config.choose("sm_90", "bfloat16", "rademacher", 1, 64, 4096).num_stages == 4
    with pytest.raises(ValueError, match="'BLOCK_Q=1'; expected name=integer with a name of BLOCK"):
        config.parse("BLOCK_Q=1")
    with pytest.raises(ValueError, match=r"BLOCK_K=100.*expected"), config.pin(BLOCK_K=100):
        config.choose("sm_90", "bfloat16", "rademacher", 1, 64, 4096)
