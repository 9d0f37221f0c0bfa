"""The best items in chunks, against sorting all scores at once."""

import pytest
import torch
from torch import Tensor

from m2rec.serving import top_k
from m2rec.serving.top_k import ScoreAdjustments, select_top_k, select_top_k_in_pools

V, D = 103, 8
NONE = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def table() -> Tensor:
    return torch.randn(V, D)


def reference(
    x: Tensor,
    table: Tensor,
    k: int,
    raised: list[set[int]],
    hidden: list[set[int]],
    raise_by: float,
    pool: list[int],
) -> tuple[Tensor, Tensor]:
    scores = x @ table.T
    for row, (up, out) in enumerate(zip(raised, hidden, strict=True)):
        scores[row, list(up)] += raise_by
        scores[row, list(out)] = -torch.inf
    outside = torch.ones(V, dtype=torch.bool)
    outside[pool] = False
    scores[:, outside] = -torch.inf
    best = scores.topk(min(k, len(pool)))
    return best.values, best.indices


@pytest.mark.parametrize("budget", [1, 40, 2**22])
@pytest.mark.parametrize("pool", [None, [2, 3, 50, 60, 102]])
@pytest.mark.parametrize("raise_by", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("k", [1, 4, 200])
def test_as_sorting_everything(
    table: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    pool: list[int] | None,
    raise_by: float,
    k: int,
):
    monkeypatch.setattr(top_k, "_MAX_SCORES", budget)
    x = torch.randn(3, D)
    raised, hidden = [{1, 2, 50}, set(), {102}], [{2, 7}, {60, 102}, set()]
    adjustments = ScoreAdjustments(raised, hidden, raise_by, table.device)
    ids = None if pool is None else torch.tensor(pool)
    values, items = select_top_k(x, table, k, adjustments, NONE, ids)
    everything = pool or list(range(1, V))
    expected, places = reference(x, table, k, raised, hidden, raise_by, everything)
    torch.testing.assert_close(values, expected)
    found = values > -torch.inf
    assert torch.equal(items[found], places[found])


def test_nothing_to_choose_from(table: Tensor):
    values, items = select_top_k(
        torch.randn(2, D), table, 3, ScoreAdjustments([()], [()], 0.0, table.device), NONE, NONE
    )
    assert values.shape == items.shape == (2, 0)


@pytest.mark.parametrize("raise_by", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_pools_of_their_own_as_one_history_at_a_time(table: Tensor, raise_by: float, k: int):
    x = torch.randn(4, D)
    raised, hidden = [{1, 2, 50}, set(), {102}, {7}], [{2, 7}, {60, 102}, set(), {7}]
    pools = torch.tensor([[50, 2, 2, 99, 1], [102, 60, 5, 5, 0], [102, 9, 8, 3, 1], [7, 7, 0, 0, 0]])
    excluded = torch.tensor([3, 99])
    adjustments = ScoreAdjustments(raised, hidden, raise_by, table.device)
    values, items = select_top_k_in_pools(x, table, k, adjustments, excluded, pools)
    for row in range(4):
        own = ScoreAdjustments([raised[row]], [hidden[row]], raise_by, table.device)
        pool = pools[row][pools[row] > 0].unique()
        best, places = select_top_k(x[[row]], table, k, own, excluded, pool)
        found, there = values[row] > -torch.inf, best[0] > -torch.inf
        torch.testing.assert_close(values[row][found], best[0][there])
        assert torch.equal(items[row][found], places[0][there])
