"""Gradients that are sharded over processes: the projection of the whole, from the parts."""

from __future__ import annotations

import socket

import pytest

from tests.trak.lives import Server


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def run(server, folder, name, size, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = [[rank, size, port, *arguments] for rank in range(size)]
    codes = server.run(f"tests.trak.sharded_run:{name}", every, folder / "printed")
    printed = (folder / "printed").read_text()
    assert codes == [0] * size, printed
    return printed


@pytest.mark.parametrize(("mesh", "count"), [([2], 10), ([3], 10), ([2, 2], 30)])
def test_every_placement_is_the_projection_of_the_whole(tmp_path, server, mesh, count):
    size = mesh[0] * (mesh[1] if len(mesh) > 1 else 1)
    printed = run(server, tmp_path, "placements", size, mesh)
    assert printed.count(f"placements {count}") == size


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_under_fsdp2(tmp_path, server, size):
    assert "Shard(dim=0)" in run(server, tmp_path, "fsdp", size, False)


def test_gradients_under_fsdp2_over_tensor_parallelism(tmp_path, server):
    assert "Strided" in run(server, tmp_path, "fsdp", 4, True)
