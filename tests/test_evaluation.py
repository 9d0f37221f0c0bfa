"""Ranks, and metrics by bucket; whole rankings are tested with the trainer."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from m2rec.evaluation.breakdown import HISTORY_BUCKETS, POPULARITY_BUCKETS, break_down_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking, compute_full_ranks, mask_seen, select_top_items
from m2rec.training.configuration import build_config
from m2rec.training.run import load_data
from tests.conftest import small


def test_ranks():
    items = np.array([[4, 7, 2], [7, 4, 2], [5, 6, 3]])
    everything = {Protocol.ALL: items, Protocol.UNSEEN: items[:, ::-1]}
    ranking = Ranking(np.array([4, 2, 9]), np.array([False, True, False]), everything)
    assert ranking.select_rows(Protocol.ALL)[0].tolist() == [1, 3, 0]
    assert ranking.select_rows(Protocol.UNSEEN)[0].tolist() == [3, 1, 0]
    ranks, new_items = ranking.select_rows(Protocol.NEW)
    assert ranks.tolist() == [3, 0] and new_items.tolist() == [[2, 7, 4], [3, 6, 5]]


def test_ranks_below_the_list_continue_those_in_it():
    """Where scores are equal, the list decides; below it ties count against the target."""
    scores = torch.randint(0, 4, (200, 9), generator=torch.Generator().manual_seed(0)).float()
    scores[:, 0] = -torch.inf
    items = select_top_items(scores, 4)
    for target in range(1, 9):
        ranks = compute_full_ranks(scores, items, torch.full((200,), target))
        for row, rank in enumerate(ranks):
            if target in items[row]:
                assert items[row, rank - 1] == target
            else:
                assert rank == (scores[row] >= scores[row, target]).sum() > 4


def test_masked_items_are_in_no_list():
    scores = torch.tensor([[-torch.inf, 3.0, 4.0, 2.0], [-torch.inf, 1.0, 1.0, 2.0]])
    mask_seen(scores, np.array([0, 0]), np.array([2, 2]))
    items = select_top_items(scores, 3)
    assert items[0].tolist() == [1, 3, 0] and items[1, 0] == 3
    assert compute_full_ranks(scores, items, torch.tensor([2, 3])).tolist() == [0, 1]


def test_bucket_names():
    assert POPULARITY_BUCKETS.names == ["0", "1-5", "6-20", "21-100", "101+"]
    assert HISTORY_BUCKETS.names == ["1-5", "6-20", "21-50", "51-200", "201+"]


def test_metrics_by_bucket():
    rows = pd.DataFrame(
        {
            "history": [5, 6, 6], "popularity": [0, 5, 101], "returning": [0, 0, 1], "test": [1, 2, 3],
            "test_unseen": [1, 2, 0],
        }
    )  # fmt: skip
    table = break_down_metrics(rows, [10], 4)
    assert list(table["popularity"]) == ["0", "1-5", "101+"]
    assert list(table["history"]) == ["1-5", "6-20"]
    assert table["popularity"]["101+"] == {
        "users": 1,
        "new_users": 0,
        "test": {"hit@10": 1.0, "ndcg@10": 0.5, "mrr@10": 0.3333},
        "test_unseen": {"hit@10": 0.0, "ndcg@10": 0.0, "mrr@10": 0.0},
        "test_new": {},
    }
    assert (table["history"]["6-20"]["users"], table["history"]["6-20"]["new_users"]) == (2, 1)
    assert [table["history"]["6-20"][part]["hit@10"] for part in ("test", "test_unseen", "test_new")] == [
        1,
        0.5,
        1,
    ]


@pytest.mark.parametrize("keys", [{}, {"rows": "prefix"}, {"split": "global_time"}])
def test_training_targets_are_counted_as_recbole_counts_them(toy: Path, keys: dict[str, str]):
    dataset, (train, _, _) = load_data(build_config(small(toy, text_vectors="none", **keys)))
    counts = dataset.histories.count_training_targets(dataset.item_num)
    expected = train.dataset.item_counter
    assert counts.tolist() == [expected[item] for item in range(dataset.item_num)]
