"""Several processes (gloo over loopback): the work is shared out, the scores are the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj.trak import distributed, estimator
from fastproj.trak.distributed import DistributedError, Ranks
from fastproj.trak.files import read_json
from fastproj.trak.solving.solve import System
from fastproj.trak.store.scores import read_scores, read_top_scores
from fastproj.trak.store.store import NotReadyError
from tests.essential import slow
from tests.trak import cases
from tests.trak.distributed_run import N
from tests.trak.lives import Server


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The results of one process."""
    folder = tmp_path_factory.mktemp("whole")
    run(server, folder, 1)
    return results(folder)


def run(server, folder, size, codes=None, **how):
    """Run distributed_run in ``size`` processes; what they printed, and the batches computed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log, printed = folder / "log", folder / "printed"
    log.touch()
    arguments = [[folder / "store", log, rank, size, port, how] for rank in range(size)]
    found = server.run("tests.trak.distributed_run:main", arguments, printed)
    assert found == (codes or [0] * size), printed.read_text()
    return printed.read_text(), log.read_text().splitlines()


def results(folder):
    top = read_top_scores(folder / "store" / "scores" / "test.top.safetensors")
    scores = np.array(read_scores(folder / "store" / "scores" / "test.mmap"))
    return [scores, *vars(top).values()]


def assert_same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", [2, slow(3)])
@pytest.mark.parametrize("feed", ["plain", "inds", "remaining"])
def test_the_same_script_in_several_processes(tmp_path, server, whole, size, feed):
    _, batches = run(server, tmp_path, size, feed=feed)
    assert_same(results(tmp_path), whole)  # bit for bit
    assert len(batches) == len({b.split(" ", 1)[1] for b in batches}) == 2 * (9 + 4)
    share = Counter(b.split()[0] for b in batches)
    assert len(share) == size
    assert max(share.values()) - min(share.values()) <= 4  # one batch for each pass over data


@pytest.mark.parametrize(
    ("feed", "size", "candidates"),
    [
        ("plain", 2, 9),
        slow(("inds", 3, 2)),
        slow(("remaining", 2, 2)),
        slow(("remaining", 3, 9)),
        ("sampler", 2, 9),
    ],
)
def test_a_stream_in_several_processes(tmp_path, server, feed, size, candidates):
    """Each has candidates of its own, unequally many batches of them or none."""
    found = []
    for processes in (1, size):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run(server, folder, processes, feed=feed, stream=candidates, batch_size=[2] * processes)
        files = sorted(folder.glob("stream-*.npy"))
        assert len(files) == 2 * ((candidates + 1) // 2)
        found.append([np.load(file) for file in files])
    for ours, alone in zip(*found, strict=True):
        if feed == "sampler":  # targets in other batches, and the sums over training samples
            np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())
        else:
            np.testing.assert_array_equal(ours, alone)


class Beside(Ranks):
    """Rank 1 of two, of which rank 0 does what ``others`` says when both are to meet."""

    def __init__(self, others):
        super().__init__(1, 2)
        self.others = others

    def all_gather_steps(self, step, value):
        return [self.others.pop(0)(step, value), (step, value)]


def test_a_stream_waits_for_the_targets_of_other_processes(tmp_path):
    model, train, targets = cases.net(), cases.data(10), cases.data(4, seed=5)
    slow, fast = (cases.make(model, tmp_path, 10) for _ in range(2))
    cases.featurize(slow, model, 0, train)
    slow.finalize_features()

    def compare(step, value):
        return step, value

    def dealing_out(step, value):  # before it has scored its own
        assert step == "score(stream=True)"
        return "remaining_batches", (*value, "which")

    def scoring(step, value):
        slow.score([part[:2] for part in targets], inds=[0, 1])
        return step, value

    fast.ranks = Beside([compare, dealing_out, scoring])
    for traker in (slow, fast):
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 4)
    for low in (0, 2):
        fast.score([part[low : low + 2] for part in targets], num_samples=2)
    found = fast.score(train, stream=True)
    assert not fast.ranks.others
    np.testing.assert_array_equal(found, fast.score(train, stream=True))  # without another wait
    np.testing.assert_allclose(found, slow.finalize_scores("test"), rtol=1e-3, atol=1e-5)


def test_a_stream_beside_processes_that_have_gone_on(tmp_path):
    """A process without candidates makes no such call: what it does next shows that."""
    model, train, targets = cases.net(), cases.data(10), cases.data(4, seed=5)
    traker = cases.make(model, tmp_path, 10)
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    for step, facts in (
        ("finalize_scores", ("test", None, False, None)),
        ("load_checkpoint", 1),
        ("score", (("score", 1, "test"), True)),
    ):
        traker.ranks = Beside([lambda *_, past=(step, facts): past] * 2)
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 4)
        traker.score(targets, inds=range(4))
        assert traker.score(train, stream=True).shape == (10, 4)
        assert not traker.ranks.others


def test_a_stream_sees_targets_of_processes_that_work_alone(tmp_path):
    model, train, targets = cases.net(), cases.data(10), cases.data(4, seed=5)
    trakers = [cases.make(model, tmp_path, 10, distributed=False) for _ in range(2)]
    cases.featurize(trakers[0], model, 0, train)
    trakers[0].finalize_features()
    for traker in trakers:
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, 4)
    with pytest.raises(NotReadyError, match="lacks 4 of 4 targets"):
        trakers[0].score(train, stream=True)
    for traker, inds in zip(trakers, ([0, 1], [2, 3]), strict=True):
        traker.score([part[inds] for part in targets], inds=inds)
    found = [traker.score(train, stream=True) for traker in trakers]
    np.testing.assert_array_equal(*found)


def test_groups_of_targets_in_several_processes(tmp_path, server, whole):
    groups = [1, 0, 1, 2, 0, 1, 1]
    run(server, tmp_path, 2, groups=groups)
    wanted = np.stack([whole[0][:, np.array(groups) == g].sum(1) for g in range(3)], 1)
    np.testing.assert_allclose(results(tmp_path)[0], wanted, atol=1e-5 * np.abs(whole[0]).max())


def test_fewer_samples_than_dimensions_in_several_processes(tmp_path, server):
    """The n x n matrix is put together from columns of several processes."""
    found = []
    for size in (1, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        run(server, folder, size, options={"proj_dim": 80})
        found.append(results(folder))
        solved = read_json(folder / "store" / "models" / "1" / "solve.json")
        assert (solved["form"], solved["n"]) == ("dual", 2 * N)
    assert_same(*found)


@pytest.mark.parametrize("how", [slow({}), {"size_power": 0.5}], ids=["as they are", "by sizes"])
def test_factored_gradients_in_several_processes(tmp_path, server, how):
    """Bit for bit, also where a process was killed and the run begun again."""
    how = {**how, "options": {"factored": 3, "proj_dim": 32}}
    found = []
    for place, size, die in (("one", 1, None), ("two", 2, None), ("killed", 2, [1, "featurize"])):
        folder = tmp_path / place
        folder.mkdir()
        if die is not None:
            codes = [1, -signal.SIGKILL]
            run(server, folder, size, codes=codes, die=die, **how)
        run(server, folder, size, **how)
        found.append(results(folder))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    assert np.abs(found[0][0]).max() > 0


def test_beside_a_process_group_that_carries_nothing(tmp_path, server, whole):
    """As beside nccl: what goes between TRAKer's processes has a group of its own."""
    _, batches = run(server, tmp_path, 2, backend="fake")
    assert_same(results(tmp_path), whole)
    assert {b.split()[0] for b in batches} == {"0", "1"}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs a GPU for each process")
def test_on_gpus_beside_nccl(tmp_path, server, whole):
    _, batches = run(server, tmp_path, 2, backend="nccl", options={"device": "cuda"})
    found, wanted = results(tmp_path)[0], whole[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-2 * np.abs(wanted).max())  # TF32
    assert {b.split()[0] for b in batches} == {"0", "1"}


def test_samples_that_a_sampler_shared_out(tmp_path, server, whole):
    """Other batches than in one process: features, XtX and scores agree to rounding."""
    _, batches = run(server, tmp_path, 2, feed="sampler")
    per_rank = Counter(b.split()[0] for b in batches)
    assert per_rank["0"] == per_rank["1"]
    largest = np.abs(whole[0]).max()
    np.testing.assert_allclose(results(tmp_path)[0], whole[0], rtol=1e-5, atol=1e-6 * largest)


def test_a_sampler_without_inds_is_refused(tmp_path, server):
    printed, batches = run(server, tmp_path, 2, codes=[1, 1], feed="sampler by number")
    assert "ValueError: featurize: rank 1 was given other data than rank 0" in printed
    assert "ValueError: featurize: rank 0 was given other data than rank 1" in printed
    assert not batches


def test_each_rank_its_own_checkpoints(tmp_path, server, whole):
    """TRAK's SLURM pattern inside one launch; the calls need not even be equally many."""
    _, batches = run(server, tmp_path, 2, feed="own checkpoints")
    assert_same(results(tmp_path), whole)
    assert {tuple(b.split()[::2]) for b in batches if "featurize" in b} == {("0", "0"), ("1", "1")}


@pytest.mark.parametrize("stage", ["featurize", "score"])
@pytest.mark.parametrize("size", [slow(2), 3])
def test_a_rank_that_dies_ends_the_run_and_a_restart_goes_on(tmp_path, server, whole, stage, size):
    codes = [1, -signal.SIGKILL, 1][:size]
    printed, _ = run(server, tmp_path, size, codes=codes, die=[1, stage])
    assert printed.count("DistributedError: ") == size - 1
    assert f"another of the {size} processes is gone" in printed
    assert "run the same command again to go on" in printed
    _, batches = run(server, tmp_path, 5 - size)  # any number of processes goes on
    assert_same(results(tmp_path), whole)
    batches = [b.split(" ", 1)[1] for b in batches]  # of both runs; the one that died isn't logged
    assert len(batches) == len(set(batches)) == 2 * (9 + 4)


@pytest.mark.parametrize(
    ("method", "step"), [("gram", "finalize_features"), ("scores", "finalize_scores")]
)
def test_a_rank_that_fails_makes_all_fail(tmp_path, server, whole, method, step):
    printed, _ = run(server, tmp_path, 3, codes=[1, 1, 1], fail=[1, method])
    assert printed.count(f"DistributedError: {step}: rank 1 failed: OSError: no such luck") == 2
    assert not list((tmp_path / "store").rglob(".*.tmp"))
    run(server, tmp_path, 3)
    assert_same(results(tmp_path), whole)


def test_starting_afresh_sets_old_features_aside_once(tmp_path, server, whole):
    run(server, tmp_path, 2, options={"projector_seed": 0})
    printed, batches = run(server, tmp_path, 3, options={"load_from_save_dir": False})
    assert len(batches) == 2 * 2 * (9 + 4)
    assert len(list((tmp_path / "store" / "models").glob("*.replaced-*"))) == 2
    assert printed.count("was moved to") == 2
    assert_same(results(tmp_path), whole)


def test_starting_afresh_where_a_rank_has_no_batch(tmp_path, server, whole):
    """It is ahead of the others: what it has begun anew is not theirs to set aside."""
    run(server, tmp_path, 1)
    printed, _ = run(
        server, tmp_path, 2, feed="inds", idle=[1, 0], options={"load_from_save_dir": False}
    )
    assert len(list((tmp_path / "store" / "models").glob("*.replaced-*"))) == 2
    assert printed.count("was moved to") == 2
    assert_same(results(tmp_path), whole)


def test_processes_that_are_to_work_alone(tmp_path, server, whole):
    """Each does everything, at once and in one save_dir, and neither harms the other."""
    _, batches = run(server, tmp_path, 2, options=ALONE)
    assert {b.split()[0] for b in batches} == {"0", "1"}
    assert_same(results(tmp_path), whole)


ALONE = {"distributed": False}  # the processes know nothing of each other


def test_processes_apart_with_the_same_samples_in_other_batches(tmp_path, server, whole):
    """Two writers of each checkpoint at once, of shards that overlap."""
    _, batches = run(server, tmp_path, 2, options=ALONE, feed="inds", batch_size=[4, 3])
    assert {b.split()[0] for b in batches if b.split()[1] == "featurize"} == {"0", "1"}
    largest = np.abs(whole[0]).max()
    np.testing.assert_allclose(results(tmp_path)[0], whole[0], rtol=1e-5, atol=1e-6 * largest)
    assert not list((tmp_path / "store").rglob(".*.tmp"))


def test_processes_apart_with_samples_of_their_own(tmp_path, server, whole):
    _, batches = run(server, tmp_path, 3, options=ALONE, feed="inds", only="featurize")
    assert len(batches) == len({b.split(" ", 1)[1] for b in batches}) == 2 * 9
    _, batches = run(server, tmp_path, 1)
    assert sum("featurize" in b for b in batches) == 2 * 9  # none again
    assert_same(results(tmp_path), whole)


def test_distributed_without_processes(tmp_path):
    with pytest.raises(ValueError, match=r"distributed=True.*torchrun --nproc-per-node"):
        cases.make(cases.net(), tmp_path, N, distributed=True)


@pytest.mark.slow
def test_the_example_under_torchrun(tmp_path):
    """The command of the documentation, and the same script in one process."""
    script = Path(__file__).parents[2] / "examples" / "distributed.py"
    sizes = ["--train", "60", "--targets", "4", "--proj-dim", "16"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = []
    for name, launcher in (("one", []), ("two", torchrun)):
        command = [sys.executable, *launcher, script, "--out", tmp_path / name, *sizes]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("scores [60, 4]") == 1  # rank 0 speaks
        found.append(np.array(read_scores(tmp_path / name / "scores" / "held_out.mmap")))
    np.testing.assert_array_equal(*found)


class Alike(Ranks):
    """One of two ranks, of which the other does the same."""

    def all_gather_steps(self, step, value):
        return [(step, value)] * 2


def test_a_slower_rank_takes_the_same_steps(tmp_path):
    """What a faster rank has finalised meanwhile must not change what a slower one waits for."""
    train = cases.data(10)
    model = cases.net()

    class Slower(Alike):
        steps = 0

        def all_gather_steps(self, step, value):
            self.steps += 1
            return super().all_gather_steps(step, [0, 1] if value == [1] else value)

    counts = []
    for name in ("neither", "one finalised"):
        traker = cases.make(model, tmp_path / name, 10)
        for model_id in (0, 1):
            cases.featurize(traker, model, model_id, train)
        if name == "one finalised":
            traker.finalize_features(model_ids=[0], lambda_reg=1)
        traker.ranks = Slower(1, 2)
        traker.finalize_features(lambda_reg=1)
        counts.append(traker.ranks.steps)
    assert counts[0] == counts[1] > 0


class Threads(Ranks):
    """One of two ranks that are threads of this process."""

    slots = [("", None)] * 2
    meeting = threading.Barrier(2, timeout=60)

    def all_gather_steps(self, step, value):
        self.slots[self.rank] = step, value
        self.meeting.wait()
        every = list(self.slots)
        self.meeting.wait()
        return every


@pytest.mark.parametrize("what", ["checkpoint", "batches"])
def test_ranks_score_what_rank_0_has_found(what, tmp_path, monkeypatch):
    """A process apart finishes a checkpoint, or cuts the same samples into other batches, when
    rank 0 has looked and rank 1 hasn't.
    """
    cases.small_blocks(monkeypatch.setattr)
    train, targets = cases.data(21), cases.data(4, seed=5)
    nets = [cases.net(1), cases.net(2)]
    apart, *trakers = (cases.make(cases.net(), tmp_path, 21) for _ in range(3))
    for model_id, net in enumerate(nets):
        cases.featurize(apart, net, model_id, train)
    apart.finalize_features()
    for model_id, net in enumerate(nets):
        cases.score(apart, net, model_id, targets)
    ids = [0] if what == "checkpoint" else [0, 1]
    wanted = np.array(apart.finalize_scores("test", ids))
    others = [cases.make(cases.net(), tmp_path, 21) for _ in nets]
    for model_id, (other, net) in enumerate(zip(others, nets, strict=True)):
        other.load_checkpoint(net.state_dict(), model_id)
        other._pass.index(model_id).shard[:] = -1  # as long before: it featurizes all again
    looked, found = threading.Event(), estimator.scored_ids

    def scored_ids(saver, *args):
        if saver is trakers[0].saver:
            found(saver, *args)
            looked.set()
            return ids
        assert looked.wait(60)
        if what == "batches":
            for other in others:
                for rows in torch.arange(21).split([5, 8, 8]):  # after 7, 7, 7
                    other.featurize([part[rows] for part in train], inds=rows)
            saver.forget()
        return found(saver, *args)

    monkeypatch.setattr(estimator, "scored_ids", scored_ids)
    for rank, traker in enumerate(trakers):
        traker.ranks = Threads(rank, 2)
    with ThreadPoolExecutor(2) as pool:
        for scores in pool.map(lambda traker: traker.finalize_scores("test"), trakers):
            np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_a_process_group_that_was_begun_here_is_ended(monkeypatch):
    ended, at_exit = [], []
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    dist = distributed.dist
    begun = iter([False, True])
    monkeypatch.setattr(dist, "is_initialized", lambda: next(begun))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "new_group", lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)
    assert distributed.ranks_of_this_run(None).size == 2
    assert not ended
    for function in at_exit:
        function()
    assert ended == [True]


def test_each_rank_sums_its_own_parts_of_xtx(tmp_path, monkeypatch):
    cases.small_blocks(monkeypatch.setattr)
    model = cases.net()
    traker = cases.make(model, tmp_path, 21)
    cases.featurize(traker, model, 0, cases.data(21))
    summed = []
    systems = traker.saver.systems
    monkeypatch.setattr(systems, "write_gram", lambda *args: summed.append(args[-1][1]))
    traker.ranks = Alike(1, 2)
    traker.finalize_features(lambda_reg=1)
    assert summed == [1]  # of 0, 1 and 2


def test_parts_of_a_process_that_sees_more_batches_meanwhile_are_its_own(tmp_path, monkeypatch):
    """Another process writes the same samples, cut differently, while one sums up its parts."""
    cases.small_blocks(monkeypatch.setattr)
    made = []
    for _ in range(2):
        model = cases.net()
        made.append(cases.make(model, tmp_path, 21, curvature="trak"))
        made[-1].load_checkpoint(model.state_dict(), 0)
    first, second = made
    data = cases.data(21)

    def featurize(traker, size):
        for inds in torch.arange(21).split(size):
            traker.featurize([part[inds] for part in data], inds=inds)

    systems = first.saver.systems
    write = systems.write_gram

    def write_gram(*args):
        write(*args)
        if not args[-1][1]:  # its first part
            featurize(second, 3)
            first.saver.forget()
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr(systems, "write_gram", write_gram)
    featurize(first, 4)
    with pytest.raises(KeyboardInterrupt):
        first.finalize_features(lambda_reg=1)
    second.finalize_features(lambda_reg=1)
    phi = second.saver.matrix(0).double()
    xtx = second.saver.systems.read_gram(0, System())[0]["xtx"]
    torch.testing.assert_close(xtx, phi.T @ phi)


def test_ranks_that_call_other_things_are_told_so():
    class Apart(Ranks):
        def all_gather_steps(self, step, value):
            return [("score", value), (step, value)]

    with pytest.raises(DistributedError, match="rank 0 is in score while rank 1 is in finalize"):
        Apart(1, 2).all_gather("finalize_features", None)


def test_ranks_with_two_lambdas_are_told_so(tmp_path):
    trakers = [cases.make(cases.net(), tmp_path, N, lambda_reg=value) for value in (1, "0.1*mean")]
    cases.featurize(trakers[0], cases.net(), 0, cases.data(N))

    def told(rank, traker):
        traker.ranks = Threads(rank, 2)
        with pytest.raises(ValueError, match="lambda_reg=") as caught:
            traker.finalize_features()
        return str(caught.value).partition("; ")[0]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(told, (0, 1), trakers)) == [
            "finalize_features: rank 0 received lambda_reg=1.0 and rank 1 '0.1*mean'",
            "finalize_features: rank 1 received lambda_reg='0.1*mean' and rank 0 1.0",
        ]


def test_processes_with_directories_of_their_own_are_told_to_have_one(tmp_path):
    """Each has its share of the samples there, and featurizing again adds none."""

    traker = cases.loaded(cases.net(), tmp_path / "apart", N)
    traker.featurize(cases.data(4), num_samples=4)
    traker.ranks = Alike(0, 2)
    with pytest.raises(NotReadyError, match=r"one save_dir in all 2 processes.*here it is .*apart"):
        traker.finalize_features()
