"""Which batches of equal shapes need a check of their own: those whose samples are moved."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastproj import TRAKer
from fastproj.trak import FunctionModelOutput, HookGradientComputer, HooksError
from fastproj.trak.gradients import recorder
from fastproj.trak.gradients.structure import structure_of

B, T, C = 4, 6, 3
HELD = torch.tensor([0, 1, 2, 3])
SWAPPED = torch.tensor([0, 2, 1, 3])
PLACES = torch.tensor([5, 1, 0, 3]), torch.tensor([2, 2, 4, 0])  # along T, of each sample


def structure(function, *words):
    x = torch.randn(B, T, C, requires_grad=True)
    return structure_of((x.detach(),), function(x, *words).sum().reshape(1).expand(B))[0]


def wide(index):
    return index.view(B, 1, 1).expand(B, T, C)


def flat(order):
    """Rows of [B * T, C] in this order of samples."""
    return (order.unsqueeze(1) * T + torch.arange(T)).flatten()


def mask(counts):
    return torch.arange(T) < torch.tensor(counts).unsqueeze(1)


ZEROS = torch.zeros(B, T, C)

MOVING = {
    "index": lambda x, order: x[order],
    "negative index": lambda x, order: x[order - B],
    "index of two": lambda x, order: x[order, torch.zeros(B, dtype=torch.long)],
    "index_select": lambda x, order: x.index_select(0, order),
    "along another dimension": lambda x, order: x.transpose(0, 1).index_select(1, order),
    "gather": lambda x, order: x.gather(0, wide(order)),
    "take_along_dim": lambda x, order: x.take_along_dim(wide(order), 0),
    "scatter": lambda x, order: ZEROS.scatter(0, wide(order), x),
    "scatter_add": lambda x, order: ZEROS.scatter_add(0, wide(order), x),
    "index_add": lambda x, order: ZEROS.index_add(0, order, x),
    "index_copy": lambda x, order: ZEROS.index_copy(0, order, x),
    "index_put": lambda x, order: ZEROS.index_put((order,), x),
    "folded": lambda x, order: x.flatten(0, 1)[flat(order)],
    "folded, index_select": lambda x, order: x.flatten(0, 1).index_select(0, flat(order)),
    "folded, the last": lambda x, order: x[..., 0].flatten().index_select(-1, flat(order)),
    "folded, a multiple of B wide": lambda x, order: x.repeat(1, 1, B).flatten(0, 1)[flat(order)],
    "folded, two indices": lambda x, order: x.repeat(1, 1, 2).flatten(0, 1)[order * T, HELD],
    "folded behind positions": lambda x, order: (
        x[..., 0].repeat(1, 2).T.flatten().view(T, -1)[:, (order * 2).repeat(2)]
    ),
    "as many positions as samples": lambda x, order: x[:, :B][order],
    "behind a mask": lambda x, order: x.permute(1, 2, 0)[torch.arange(T * C).view(T, C) < B, order],
    "take": lambda x, order: x.repeat(1, 1, 2)[..., :B].flatten(0, 1).take(order * T * B),
}
LEAVING = {
    "a position of each": lambda x, place: x[torch.arange(B), place],
    "a position of each, folded": lambda x, place: x.flatten(0, 1)[torch.arange(B) * T + place],
    "gather along positions": lambda x, place: x.gather(1, place.view(B, 1, 1)),
    "gather along the last": lambda x, place: x.gather(-1, (place % C).view(B, 1, 1)),
    "gather of folded": lambda x, place: x.flatten(0, 1).gather(1, (place % C).repeat(T)[:, None]),
    "positions of all": lambda x, place: x[:, place],
    "positions first": lambda x, place: x.transpose(0, 1)[place],
    "positions first, a multiple of B": lambda x, place: x.repeat(1, B, 1).transpose(0, 1)[
        place * B
    ],
    "a position of each of B": lambda x, place: x[:, :B][HELD[:, None], place[:, None] % B],
    "a position of each, swapped": lambda x, place: x.repeat(1, 2, 1)[SWAPPED, place * 2],
    "a multiple of B behind folded": lambda x, place: (
        x.repeat(1, 1, B).flatten(0, 1).gather(1, (place * 2).repeat(T)[:, None])
    ),
    "rows that are no multiple of B": lambda x, place: x.sum(0)[place],
    "take": lambda x, place: x.take(HELD * T * C + place),
    "a number": lambda x, place: x.sum().gather(0, torch.tensor(0)),
    "mask of one each": lambda x, place: x[torch.arange(T) == place.unsqueeze(1)],
}


@pytest.mark.parametrize("name", MOVING)
def test_samples_in_another_order_are_another_structure(name):
    assert structure(MOVING[name], SWAPPED) != structure(MOVING[name], HELD)
    assert structure(MOVING[name], SWAPPED) == structure(MOVING[name], SWAPPED.clone())


@pytest.mark.parametrize("name", LEAVING)
def test_samples_that_stay_are_the_same_structure(name):
    one, other = (structure(LEAVING[name], place) for place in PLACES)
    assert one == other


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize(
    "select",
    [
        lambda x, mask: x[mask],
        lambda x, mask: x.transpose(0, 1)[mask.T],
        lambda x, mask: x.flatten(0, 1)[mask.flatten()],
        lambda x, mask: x.flatten(0, 1)[mask.flatten().nonzero()[:, 0]],
        lambda x, mask: x.flatten(0, 1)[mask.flatten().byte()],
        lambda x, mask: x.masked_select(mask.unsqueeze(2)),
        lambda x, mask: x[:, :, 0].T.masked_select(mask[:, 1]),
        lambda x, mask: ZEROS.masked_scatter(mask.unsqueeze(2), x),
        lambda x, mask: torch.stack(x[:, 0].repeat(2, 1).split(mask.sum(1).tolist())[::2]),
        lambda x, mask: torch.segment_reduce(x[:, :2].flatten(0, 1), "sum", lengths=mask.sum(1)),
    ],
)
def test_other_numbers_of_rows_are_another_structure(select):
    even, odd = mask([2, 2, 2, 2]), mask([1, 3, 1, 3])
    assert structure(select, even) != structure(select, odd)
    assert structure(select, even) == structure(select, even.clone())


def test_indices_of_another_shape_or_dimension_are_another_structure():
    square = {
        "rows": lambda x: x[:, :B][SWAPPED],
        "columns": lambda x: x[:, :B][:, SWAPPED],
        "rows in pairs": lambda x: x[:, :B][SWAPPED.view(2, 2)],
    }
    assert len({structure(function) for function in square.values()}) == len(square)


def test_steps_are_of_the_structure():
    assert structure(lambda x: x.roll(1, 0)) != structure(lambda x: x.roll(2, 0))


def test_sizes_alone_are_the_same_structure():
    assert structure(lambda x: x.sum().expand(5)) == structure(lambda x: x.sum().expand(7))


@pytest.mark.parametrize(("size", "moves"), [(1, False), (2, True)])
def test_samples_move_among_two_at_least(size, moves):
    h = torch.randn(size * T, C, requires_grad=True)
    batch = (torch.zeros(size),)
    one, _ = structure_of(batch, h[torch.arange(size * T)].sum().expand(size))
    other, _ = structure_of(batch, h[torch.arange(size * T).flip(0)[1:]].sum().expand(size))
    assert (one != other) == moves


class Chosen(nn.Module):
    """Outputs at labelled positions alone, added up by sample."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 5)

    def forward(self, ids, labels):
        keep = labels >= 0
        found = self.head(self.words(ids)[keep].tanh()).log_softmax(-1)
        found = found.gather(1, labels[keep][:, None])[:, 0]
        return torch.zeros(len(ids)).index_add(0, keep.nonzero()[:, 0], found)


class Split(Chosen):
    """The same, whose words are chosen before any gradient, and split by sample."""

    def forward(self, ids, labels):
        keep = labels >= 0
        found = self.head(self.words(ids[keep]).tanh()).split(keep.sum(1).tolist())
        return torch.stack([rows.sum() for rows in found])


class Sorted(nn.Module):
    """Sorts its samples by length, and brings their outputs back into order."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 1)

    def forward(self, ids, labels):
        order = (labels >= 0).sum(1).argsort(stable=True)
        found = self.head(self.words(ids[order]).tanh().sum(1))
        return found[order.argsort(), 0]


@pytest.mark.parametrize("kind", [Chosen, Split, Sorted])
def test_rows_that_move_by_values_are_checked(kind, tmp_path):
    """Batches 1, 2 and 4 have equal counts; in the others they differ, with the same sum."""
    torch.manual_seed(0)
    model = kind().eval()
    plan = [[2, 2, 2, 2]] * 2 + [[1, 3, 1, 3], [2, 2, 2, 2], [3, 1, 3, 1], [1, 3, 2, 2]]
    data = []
    for counts in plan:
        labels = torch.randint(5, (B, T)).masked_fill(~mask(counts), -100)
        data.append((torch.randint(1, 9, (B, T)), labels))

    def features(save_dir, **options):
        task = FunctionModelOutput(lambda model, batch: model(*batch))
        traker = TRAKer(model, task, B * len(plan), save_dir, proj_dim=32, **options)
        traker.load_checkpoint(model.state_dict(), 0)
        for at, batch in enumerate(data):
            traker.featurize(batch, inds=range(B * at, B * at + B))
        return traker.saver.matrix(0)

    with pytest.warns(UserWarning, match="were computed by module hooks, and a check has just"):
        features(tmp_path / "found")
    with pytest.warns(UserWarning, match="have failed a check before"):
        again = features(tmp_path / "found")  # in a new process
    torch.testing.assert_close(again, features(tmp_path / "loop", gradient_computer="loop"))


def owners(counts):
    return torch.arange(len(counts)).repeat_interleave(counts)


def members(counts):
    """[B, N]: 1 where a row is of a sample."""
    return (owners(counts) == torch.arange(len(counts)).unsqueeze(1)).float()


def places(counts):
    """[B, T]: which row is where in a sample; rows of zeros are to follow the others."""
    found = (counts.cumsum(0) - counts).unsqueeze(1) + torch.arange(T)
    return found.where(torch.arange(T) < counts.unsqueeze(1), counts.sum())


def differences(h, counts):
    ends, sums = counts.cumsum(0), F.pad(h.cumsum(0), (0, 0, 1, 0))
    return sums[ends] - sums[ends - counts]


POOLS = {
    "matrix": lambda h, counts: members(counts) @ h,
    "sparse": lambda h, counts: torch.sparse.mm(members(counts).to_sparse(), h),
    "vectors": lambda h, counts: torch.stack([h.T.mv(one) for one in members(counts)]),
    "added mask": lambda h, counts: (h + (members(counts).unsqueeze(2) - 1) * 1e4).amax(1),
    "embedding": lambda h, counts: F.embedding(places(counts), F.pad(h, (0, 0, 0, 1))).sum(1),
    "bags": lambda h, counts: F.embedding_bag(
        torch.arange(len(h)), h, counts.cumsum(0) - counts, mode="sum"
    ),
    "cumsum": differences,
    "a row of zeros first": lambda h, counts: F.pad(h, (0, 0, 1, 0))[
        (places(counts) + 1) % (len(h) + 1)
    ].sum(1),
}


class Pooled(nn.Module):
    """Rows without padding, pooled by sample; a second branch of as many rows is made later."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.words, self.mid, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, ids, labels):
        keep = labels >= 0
        h = self.mid(self.words(ids[keep]).tanh()).tanh()
        even = self.words(ids[:, :2].flatten()).view(len(ids), 2, 8).sum(1)
        return self.head(self.pool(h, keep.sum(1)) * even)[:, 0]


def pooled_data(plan):
    data = []
    for counts in plan:
        labels = torch.ones(B, T, dtype=torch.long).masked_fill(~mask(counts), -100)
        data.append((torch.randint(1, 9, (B, T)), labels))
    return data


@pytest.mark.parametrize("name", POOLS)
def test_rows_that_are_divided_otherwise_are_checked(name):
    torch.manual_seed(0)
    task = FunctionModelOutput(lambda model, batch: model(*batch))
    computer = HookGradientComputer(Pooled(POOLS[name]).eval(), task)
    even, odd = pooled_data([[2, 2, 2, 2], [1, 3, 2, 2]])
    for _ in range(2):
        computer.compute_rows(even)
    with pytest.raises(HooksError, match="are samples mixed"):
        computer.compute_rows(odd)


@pytest.mark.parametrize("name", POOLS)
def test_rows_that_stay_cost_no_check(name, monkeypatch):
    torch.manual_seed(0)
    seen = []
    is_scaled = recorder.is_scaled
    monkeypatch.setattr(recorder, "is_scaled", lambda *a: seen.append(is_scaled(*a)) or seen[-1])
    task = FunctionModelOutput(lambda model, batch: model(*batch))
    computer = HookGradientComputer(Pooled(POOLS[name]).eval(), task)
    for batch in pooled_data([[2, 2, 2, 2]] * 3):
        computer.compute_rows(batch)
    assert seen == [True, True]  # both branches of the third batch; the others are checked
