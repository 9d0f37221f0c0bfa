"""Places, metrics of them, and their breakdown; whole rankings are tested with the trainer."""

import csv
from pathlib import Path

import numpy as np
import torch

from m2rec.evaluation import HISTORY, POPULARITY, Breakdown, Ranking, bucket_names


def test_places():
    items = torch.tensor([[4, 7, 2], [7, 4, 2], [5, 6, 3]])
    ranking = Ranking(torch.tensor([4, 2, 9]), {"all": items, "unseen": items.flip(1)})
    assert ranking.places("all").tolist() == [1, 3, 0]
    assert ranking.places("unseen").tolist() == [3, 1, 0]


def test_bucket_names():
    assert bucket_names(POPULARITY, 0) == ["0", "1-5", "6-20", "21-100", "101+"]
    assert bucket_names(HISTORY, 1) == ["1-5", "6-20", "21-50", "51-200", "201+"]


def made() -> Breakdown:
    return Breakdown(
        users=np.array(["a", "b,c", "d"]),
        items=np.array(["x", "y", "x"]),
        popularity=np.array([0, 5, 101]),
        history=np.array([5, 6, 6]),
        places={"test": np.array([1, 0, 3]), "test_unseen": np.array([1, 2, 1])},
    )


def test_breakdown_by_bucket():
    table = made().table([10], 4)
    assert list(table["popularity"]) == ["0", "1-5", "101+"]
    assert list(table["history"]) == ["1-5", "6-20"]
    assert table["popularity"]["101+"] == {
        "users": 1,
        "test": {"hit@10": 1.0, "ndcg@10": 0.5, "mrr@10": 0.3333},
        "test_unseen": {"hit@10": 1.0, "ndcg@10": 1.0, "mrr@10": 1.0},
    }
    assert table["history"]["6-20"]["users"] == 2
    assert table["history"]["6-20"]["test"]["hit@10"] == 0.5


def test_ranks_are_written_a_line_per_user(tmp_path: Path):
    made().write(tmp_path / "ranks.csv")
    with (tmp_path / "ranks.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[1] == {
        "user": "b,c", "item": "y", "history": "6", "popularity": "5", "test": "0", "test_unseen": "2",
    }  # fmt: skip
    assert len(lines) == 3
