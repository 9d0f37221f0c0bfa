"""Places, metrics of them, and their breakdown; whole rankings are tested with the trainer."""

import csv
from pathlib import Path

import numpy as np
import torch

from m2rec.evaluation.ranking import (
    HISTORY_BUCKETS,
    POPULARITY_BUCKETS,
    Breakdown,
    Ranking,
    compute_target_ranks,
    format_bucket_names,
)


def test_places():
    items = torch.tensor([[4, 7, 2], [7, 4, 2], [5, 6, 3]])
    returning = torch.tensor([False, True, False])
    ranking = Ranking(torch.tensor([4, 2, 9]), returning, {"all": items, "unseen": items.flip(1)})
    assert ranking.target_ranks("all").tolist() == [1, 3, 0]
    assert ranking.target_ranks("unseen").tolist() == [3, 1, 0]
    assert ranking.with_new_targets().target_ranks("new").tolist() == [3, 0]


def test_a_target_that_was_taken_out_has_no_place():
    scores = torch.tensor([[-torch.inf, 3.0, -torch.inf, 2.0], [-torch.inf, 1.0, 1.0, 2.0]])
    assert compute_target_ranks(scores, torch.tensor([2, 1])).tolist() == [0, 3]


def test_bucket_names():
    assert format_bucket_names(POPULARITY_BUCKETS, 0) == ["0", "1-5", "6-20", "21-100", "101+"]
    assert format_bucket_names(HISTORY_BUCKETS, 1) == ["1-5", "6-20", "21-50", "51-200", "201+"]


def made() -> Breakdown:
    return Breakdown(
        users=np.array(["a", "b,c", "d"]),
        items=np.array(["x", "y", "x"]),
        popularity=np.array([0, 5, 101]),
        history=np.array([5, 6, 6]),
        returning=np.array([False, False, True]),
        target_ranks={"test": np.array([1, 2, 3]), "test_unseen": np.array([1, 2, 0])},
    )


def test_breakdown_by_bucket():
    table = made().metrics_by_bucket([10], 4)
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


def test_ranks_are_written_a_line_per_user(tmp_path: Path):
    made().write_csv(tmp_path / "ranks.csv")
    with (tmp_path / "ranks.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[1] == {
        "user": "b,c", "item": "y", "history": "6", "popularity": "5", "returning": "0", "test": "2",
        "test_unseen": "2",
    }  # fmt: skip
    assert lines[2]["returning"] == "1"
    assert len(lines) == 3
