"""Metrics by hand, and against RecBole's own for every name and cut-off."""

from collections import Counter

import numpy as np
import pytest
import torch

from m2rec import compat  # noqa: F401 - before RecBole is loaded

# isort: split
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct

from m2rec.evaluation.metrics import METRICS, RankedLists, compute_metrics, compute_rank_metric
from m2rec.evaluation.ranking import find_target_ranks

RANKS = np.array([[1, 3], [10, 11], [0, 20]])
N, V, K = 300, 40, 12


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("hit@10", [[1, 1], [1, 0], [0, 0]]),
        ("ndcg@10", [[1, 0.5], [1 / np.log2(11), 0], [0, 0]]),
        ("mrr@10", [[1, 1 / 3], [0.1, 0], [0, 0]]),
        ("precision@10", [[0.1, 0.1], [0.1, 0], [0, 0]]),
        ("hit@2", [[1, 0], [0, 0], [0, 0]]),
    ],
)
def test_metrics_of_ranks(metric: str, expected: list[list[float]]):
    assert compute_rank_metric(metric, RANKS) == pytest.approx(np.array(expected))


def make_lists() -> tuple[RankedLists, np.ndarray, dict[int, int]]:
    """Random rankings, which end early for some users; some items are no training target."""
    generator = np.random.default_rng(0)
    items = np.array([generator.permutation(np.arange(1, V - 5))[:K] for _ in range(N)])
    items[:20, 7:] = 0
    targets = generator.integers(1, V, size=N)
    counts = Counter(generator.integers(3, V, size=200).tolist())
    by_item = np.array([counts[item] for item in range(V)])
    return RankedLists(find_target_ranks(items, targets), items, V, lambda: by_item), targets, counts


@pytest.mark.parametrize("tail_ratio", [0.1, 0.5, 4.0])
def test_metrics_are_those_of_recbole(tail_ratio: float):
    lists, targets, counts = make_lists()
    lists = lists._replace(tail_ratio=tail_ratio)
    topk = list(range(1, K + 1))
    config = {
        "metrics": list(METRICS), "topk": topk, "metric_decimal_place": 9, "tail_ratio": tail_ratio,
    }  # fmt: skip
    data = DataStruct()
    data.set("rec.items", torch.from_numpy(lists.items))
    hits = torch.from_numpy(lists.items == targets[:, None]).int()
    data.set("rec.topk", torch.cat([hits, torch.ones(N, 1, dtype=torch.int32)], dim=1))
    data.set("data.num_items", V)
    data.set("data.count_items", counts)
    expected = Evaluator(config).evaluate(data)
    found = compute_metrics(lists, METRICS, topk, "recbole")
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, abs=1e-9)


def test_textbook_definitions():
    """Three items that there are, one of which nobody is shown; padding is not an item."""
    lists = RankedLists(np.array([1, 0]), np.array([[1, 2], [1, 0]]), 4)
    found = compute_metrics(lists, ["ItemCoverage", "ShannonEntropy", "GiniIndex"], [1, 2])
    assert found["itemcoverage@1"] == pytest.approx(1 / 3) and found["itemcoverage@2"] == pytest.approx(2 / 3)
    assert found["shannonentropy@1"] == 0
    assert found["shannonentropy@2"] == pytest.approx(-(np.log(2 / 3) * 2 + np.log(1 / 3)) / 3)
    assert found["giniindex@1"] == pytest.approx(2 / 3)
    assert found["giniindex@2"] == pytest.approx((0 * -2 + 1 * 0 + 2 * 2) / (3 * 3))


def test_rounding_and_no_users():
    lists = RankedLists(np.array([1, 0, 0]))
    assert compute_metrics(lists, ["Hit"], [1, 2], digits=2) == {"hit@1": 0.33, "hit@2": 0.33}
    assert compute_metrics(RankedLists(np.array([], dtype=int)), ["hit"], [1]) == {}
