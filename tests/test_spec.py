"""The matrix: known answers for every backend through one body, and the figures of its pages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

import fastproj
from fastproj import spec
from fastproj.spec import MatrixKey, gauss_map, gauss_table, matrix_block, philox4x32_10
from tests.dense import KINDS
from tests.known import blocks, check_block, check_entry, entries, fields


def scalar_entry(kind: str, seed: int, stream: int, p: int, k: int) -> float:
    """One entry in plain integers, written from the spec's table and not from spec.py."""
    bits = 9 if kind == "rademacher" else 5
    number = 0 if kind == "rademacher" else 1
    block, lane, half = p >> bits, (p >> 1) & 3, p & 1
    c = [block % 2**32, k, (block >> 32) * 256 + number * 4 + lane, stream]
    key = [seed % 2**32, seed // 2**32]
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    if kind == "rademacher":
        return -1.0 if (c[(p >> 7) & 3] >> (((p >> 3) & 15) + 16 * half)) & 1 else 1.0
    u16 = (c[(p >> 3) & 3] >> (16 * half)) & 0xFFFF
    magnitude = float(gauss_table()[((u16 >> 7) & 255) << 1 | (u16 >> 1) & 1])
    return -magnitude if u16 >> 15 else magnitude


# ---- known answers -----------------------------------------------------------------------------


def test_philox_reproduces_the_known_answers() -> None:
    known = fields("philox4x32_10.txt")
    assert len(known) == 16
    words = np.array([[int(word, 16) for word in line] for line in known], dtype=np.uint64)
    assert words.any(axis=1).all()
    for line in words:
        key = int(line[4]), int(line[5])
        assert philox4x32_10(tuple(line[:4]), key).tolist() == line[6:].tolist()


def test_the_gaussian_table_is_the_published_one() -> None:
    known = fields("gauss_table_v1.txt")
    assert len(known) == 512
    bits = gauss_table().view(np.uint32)
    assert (bits & 0xFFFF == 0).all()
    assert [f"{b >> 16:04x}" for b in bits] == [line[0] for line in known]
    assert gauss_table().tolist() == [float(line[1]) for line in known]


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_known_entries(backend: str, device: str, kind: str) -> None:
    assert len(entries(kind)) == 960
    for known in entries(kind):
        check_entry(known, device=device, backend=backend)


def test_known_blocks(backend: str, device: str) -> None:
    assert len(blocks(sparse=False)) == 6
    for known in blocks(sparse=False):
        check_block(known, device=device, backend=backend)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    p=st.integers(0, spec.MAX_ROWS - 1),
    k=st.integers(0, spec.MAX_COLS - 1),
)
def test_any_entry_of_the_page_follows_the_table(
    kind: str, seed: int, stream: int, p: int, k: int
) -> None:
    block = matrix_block(MatrixKey(kind, seed, stream), p, p + 1, k, k + 1)
    assert block.item() == scalar_entry(kind, seed, stream, p, k)


# ---- every backend against the page ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("row", "rows", "col", "cols"),
    [
        (0, 1, 0, 1),
        (0, 512, 0, 16),
        (511, 2, 3, 5),
        (31, 34, 0, 33),
        (1, 1100, 7, 65),
        (2**32 - 3, 700, 2**31 - 2, 5),
        (2**40 - 5, 11, 2**32 - 4, 4),
        (2**56 - 40, 40, 0, 3),
    ],
)
def test_any_block_equals_the_page(
    backend: str, device: str, kind: str, row: int, rows: int, col: int, cols: int
) -> None:
    seed, stream = 2**64 - 3, 2**32 - 1
    block = fastproj.matrix(
        slice(row, row + rows),
        slice(col, col + cols),
        seed,
        kind,
        stream=stream,
        device=device,
        backend=backend,
    )
    page = matrix_block(MatrixKey(kind, seed, stream), row, row + rows, col, col + cols)
    assert np.array_equal(block.cpu().numpy(), page.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *[(kind, dt) for kind in KINDS for dt in (torch.float64, torch.bfloat16, torch.half)],
        ("rademacher", torch.int8),
    ],
)
def test_each_dtype_holds_the_entries_exactly(
    backend: str, device: str, kind: str, dtype: torch.dtype
) -> None:
    block = fastproj.matrix(777, 33, 5, kind, dtype=dtype, device=device, backend=backend)
    assert block.dtype == dtype
    page = torch.from_numpy(matrix_block(MatrixKey(kind, 5, 0), 0, 777, 0, 33))
    assert torch.equal(block.cpu().double(), page.double())


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_a_prefix_and_blocks_are_slices(backend: str, device: str, kind: str) -> None:
    how = {"seed": 11, "kind": kind, "stream": 4, "device": device, "backend": backend}
    whole = fastproj.matrix(1300, 70, **how)
    assert torch.equal(fastproj.matrix(1300, 33, **how), whole[:, :33])
    for rows in (slice(0, 1), slice(511, 513), slice(700, 1300), slice(31, 97)):
        for cols in (slice(0, 70), slice(15, 17), slice(69, 70)):
            assert torch.equal(fastproj.matrix(rows, cols, **how), whole[rows, cols])


@pytest.mark.parametrize("rows", [slice(5, 5), 0, slice(3, 9)])
def test_an_empty_block(backend: str, device: str, rows: int | slice) -> None:
    block = fastproj.matrix(rows, slice(2, 2), backend=backend, device=device)
    assert block.shape == (rows.stop - rows.start if isinstance(rows, slice) else rows, 0)


# ---- what the page claims ----------------------------------------------------------------------


def test_the_gaussian_map_over_all_codes() -> None:
    entries = gauss_map()
    assert entries.shape == (65536,)
    codes = np.arange(65536)
    # Bits 0 and 2..6 of a code are not used; each of 512 magnitudes stands for 64 codes of a sign.
    index = ((codes >> 7 & 255) << 1) + (codes >> 1 & 1)
    assert np.array_equal(np.bincount(index), np.full(512, 128))
    assert np.array_equal(np.abs(entries), gauss_table()[index])
    assert np.array_equal(np.signbit(entries), codes >= 32768)
    assert (np.diff(gauss_table()) >= 0).all()  # bf16 merges a few neighbours


def test_the_gaussian_entries_are_as_normal_as_documented() -> None:
    entries = np.sort(gauss_map().astype(np.float64))
    cdf = norm.cdf(entries)
    steps = np.arange(65536) / 65536
    ks = max(np.abs(cdf - steps).max(), np.abs(cdf - steps - 1 / 65536).max())
    assert ks < 0.00145
    assert entries.mean() == 0.0
    variance = np.mean(entries**2)
    assert abs(variance - 0.9999) < 0.00005
    assert abs(np.mean(entries**4) / variance**2 - 2.994) < 0.0005
    assert entries.max() == 3.390625


@pytest.mark.parametrize("kind", KINDS)
def test_sample_moments(kind: str) -> None:
    """Each bound fails by chance once in 10^9 draws of a matrix (Bernstein, |entry| < 3.4)."""
    n, cols = 4096, 64
    block = matrix_block(MatrixKey(kind, 1, 2), 0, n, 0, cols).astype(np.float64)

    def limit(count: int, tests: int, variance: float, largest: float) -> float:
        log = math.log(2 * tests / 1e-9)
        return math.sqrt(2 * count * variance * log) + largest * log / 3

    assert abs(block.sum()) < limit(n * cols, 1, 1.0, 3.4)
    assert np.abs(block.sum(axis=0)).max() < limit(n, cols, 1.0, 3.4)
    assert np.abs(block.sum(axis=1)).max() < limit(cols, n, 1.0, 3.4)
    gram = block.T @ block
    pairs = cols * (cols - 1) // 2
    off_diagonal = np.abs(gram - np.diag(np.diag(gram))).max()
    assert off_diagonal < limit(n, pairs, 1.0, 3.4**2)
    # Rows of one call (halves, lanes, bits, words) must be as independent as any others.
    for distance in (1, 2, 4, 8, 16, 32, 128, 256, 512, 1024):
        product = (block[distance:] * block[:-distance]).sum()
        assert abs(product) < limit((n - distance) * cols, 10, 1.0, 3.4**2)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_streams_kinds_and_columns_differ(kind: str) -> None:
    """Any two of these share entries like independent ones: 8192 signs, failure 10^-9 a pair."""

    def signs(kind: str, seed: int, stream: int, row: int = 0, col: int = 0) -> np.ndarray:
        block = matrix_block(MatrixKey(kind, seed, stream), row, row + 512, col, col + 16)
        return np.where(block < 0, -1.0, 1.0).ravel()

    samples = [
        signs(kind, 0, 0),
        signs(kind, 1, 0),
        signs(kind, 1 << 32, 0),
        signs(kind, 1 << 63, 0),
        signs(kind, 0, 1),
        signs(kind, 0, 1 << 31),
        signs(kind, 0, 0, row=1 << 41),
        signs(kind, 0, 0, row=1 << 55),
        signs(kind, 0, 0, col=16),
        signs(kind, 0, 0, col=1 << 31),
        signs("gaussian" if kind == "rademacher" else "rademacher", 0, 0),
    ]
    gram = np.stack(samples) @ np.stack(samples).T
    bound = math.sqrt(2 * 8192 * math.log(2 / 1e-9))
    assert np.abs(gram - 8192 * np.eye(len(samples))).max() < bound


def test_the_version_and_the_readable_names_are_fixed() -> None:
    assert spec.SPEC_VERSION == fastproj.SPEC_VERSION == 1
    assert spec.KINDS == ("rademacher", "gaussian", "sjlt")


@pytest.mark.parametrize("base", [0, (1 << 43) + 300])
@pytest.mark.parametrize(("kind", "block"), [("rademacher", 0), ("gaussian", 0), ("sjlt", 64)])
def test_rows_by_number_are_those_of_the_block(kind: str, block: int, base: int) -> None:
    key = MatrixKey(kind, 0x123456789ABCDEF0, 7, block)
    rows = np.random.default_rng(0).integers(0, 2000, 300)
    whole = spec.matrix_block(key, base, base + 2000, 5, 70)
    found = spec.matrix_rows(key, (rows + base).astype(np.uint64), 5, 70)
    assert found.dtype == whole.dtype
    np.testing.assert_array_equal(found, whole[rows])
    public = fastproj.matrix(
        torch.from_numpy(rows + base), slice(5, 70), key.seed, kind, stream=7, block=block or None
    )
    np.testing.assert_array_equal(public.numpy(), whole[rows])


def test_rows_by_number_of_many_tiles_take_two_calls_of_philox(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def philox(*args: Any) -> Any:
        made.append(philox4x32_10(*args))
        return made[-1]

    monkeypatch.setattr(spec, "philox4x32_10", philox)
    key, rows = MatrixKey("sjlt", 5, 1, 16), np.arange(0, 16 * 700, 17, dtype=np.uint64)
    found = spec.matrix_rows(key, rows, 3, 40)
    assert len(made) == 2
    np.testing.assert_array_equal(found, spec.matrix_block(key, 0, 16 * 700, 3, 40)[rows])
