"""What a position has seen, against Python's sets."""

import pytest
import torch

from m2rec.nn import repeat_bias as module
from m2rec.nn.repeat_bias import RepeatBias, mark_first_occurrences

ITEMS = torch.tensor([[3, 1, 3, 0, 0], [2, 2, 2, 5, 2], [4, 0, 0, 0, 0]])
ROWS, TIMES = torch.tensor([1, 0, 1, 2, 0, 1]), torch.tensor([4, 2, 0, 0, 1, 3])
SEEN = [{2, 5}, {1, 3}, {2}, {4}, {1, 3}, {2, 5}]


def made(bias: float = -1.5) -> RepeatBias:
    return RepeatBias(ITEMS, ROWS, TIMES, torch.tensor(bias))


@pytest.fixture(params=[1, 7, 2**24], autouse=True)
def flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Blocks of one position, of a few, and of all."""
    monkeypatch.setattr(module, "_MAX_BLOCK_FLAGS", request.param)


def test_first_occurrences():
    expected = [[1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert mark_first_occurrences(ITEMS).int().tolist() == expected


def test_pairs_are_the_items_seen_each_once():
    for start, stop in ((0, 6), (2, 4), (4, 100)):
        position, item = made().find_seen_pairs(start, stop)
        expected = {(i, j) for i, items in enumerate(SEEN[start:stop]) for j in items}
        assert sorted(expected) == sorted(zip(position.tolist(), item.tolist(), strict=True))


def test_bias_of_one_item_per_position():
    items = torch.tensor([5, 2, 2, 4, 9, 1])
    assert made().bias_for_items(items).tolist() == [-1.5, 0, -1.5, -1.5, 0, 0]


@pytest.mark.parametrize("size", [2, 4, 6])
def test_bias_of_shared_items(size: int):
    """Items out of order, some drawn twice, some that nobody has seen; the last group may have fewer."""
    groups = -(-len(SEEN) // size)
    items = torch.tensor([[5, 2, 5, 9, 1], [4, 3, 1, 1, 2], [2, 2, 2, 2, 2]])[:groups]
    found = made().bias_for_shared_items(items, size)
    assert found.shape == (groups, size, 5)
    for position, seen in enumerate(SEEN):
        group = position // size
        expected = [-1.5 if item in seen else 0 for item in items[group].tolist()]
        assert found[group, position % size].tolist() == expected
