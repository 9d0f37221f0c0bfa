"""The best items in chunks, against sorting all scores at once."""

import pytest
import torch
from torch import Tensor

from m2rec.serving import top_k
from m2rec.serving.id_lists import IdLists
from m2rec.serving.top_k import ScoreAdjustment, select_top_k, select_top_k_in_pools

V, D = 103, 8
NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def table() -> Tensor:
    return torch.randn(V, D)


def reference(
    x: Tensor,
    table: Tensor,
    k: int,
    lists: list[list[int]],
    added: float,
    pool: list[int],
) -> tuple[Tensor, Tensor]:
    scores = x @ table.T
    for row, items in enumerate(lists):
        for item in set(items):
            scores[row, item] += added
    outside = torch.ones(V, dtype=torch.bool)
    outside[pool] = False
    scores[:, outside] = -torch.inf
    best = scores.topk(min(k, len(pool)))
    return best.values, best.indices


@pytest.mark.parametrize("budget", [1, 40, 2**22])
@pytest.mark.parametrize("pool", [None, [2, 3, 50, 60, 102]])
@pytest.mark.parametrize("added", [-torch.inf, -3.0, 0.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 200])
def test_as_sorting_everything(
    table: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    pool: list[int] | None,
    added: float,
    k: int,
):
    monkeypatch.setattr(top_k, "_MAX_SCORES", budget)
    x = torch.randn(3, D)
    lists = [[50, 2, 1, 2], [], [102]]
    adjustment = ScoreAdjustment(IdLists.build(lists), added, table.device)
    ids = None if pool is None else torch.tensor(pool)
    values, items = select_top_k(x, table, k, [adjustment], NONE, ids)
    everything = pool or list(range(1, V))
    expected, places = reference(x, table, k, lists, added, everything)
    torch.testing.assert_close(values, expected)
    found = values > -torch.inf
    assert torch.equal(items[found], places[found])


def test_nothing_to_choose_from(table: Tensor):
    nothing = ScoreAdjustment(IdLists.build([[], []]), 0.0, table.device)
    values, items = select_top_k(torch.randn(2, D), table, 3, [nothing], NONE, NONE)
    assert values.shape == items.shape == (2, 0)


@pytest.mark.parametrize("added", [-torch.inf, -3.0, 0.0, 3.0])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_pools_of_their_own_as_one_history_at_a_time(table: Tensor, added: float, k: int):
    x = torch.randn(4, D)
    lists = [[50, 2, 1, 2], [], [102, 102], [7]]
    pools = torch.tensor([[50, 2, 2, 99, 1], [102, 60, 5, 5, 0], [102, 9, 8, 3, 1], [7, 7, 0, 0, 0]])
    excluded = torch.tensor([3, 99])
    adjustment = ScoreAdjustment(IdLists.build(lists), added, table.device)
    values, items = select_top_k_in_pools(x, table, k, [adjustment], excluded, pools)
    for row in range(4):
        own = ScoreAdjustment(IdLists.build([lists[row]]), added, table.device)
        pool = pools[row][pools[row] > 0].unique()
        best, places = select_top_k(x[[row]], table, k, [own], excluded, pool)
        found, there = values[row] > -torch.inf, best[0] > -torch.inf
        torch.testing.assert_close(values[row][found], best[0][there])
        assert torch.equal(items[row][found], places[0][there])


def test_lists_in_one_array_are_lists():
    lists = [[5, 3, 5, 9], [], [7], [2, 1, 2], []]
    held = IdLists.build(lists)
    assert held.number_rows().tolist() == [0, 0, 0, 0, 2, 3, 3, 3]
    for cut, expected in [
        (held.select([3, 0, 4, 3]), [lists[3], lists[0], [], lists[3]]),
        (held.select([]), []),
        (held.truncate(2), [[5, 9], [], [7], [1, 2], []]),
        (held.remove_duplicates(), [[3, 5, 9], [], [7], [1, 2], []]),
        (IdLists.build([]).remove_duplicates(), []),
    ]:
        expected_pad = torch.zeros(len(expected), max(map(len, expected), default=0), dtype=torch.int64)
        for row, ids in enumerate(expected):
            expected_pad[row, : len(ids)] = torch.tensor(ids)
        assert cut.lengths.tolist() == list(map(len, expected))
        assert torch.equal(cut.pad(), expected_pad)
