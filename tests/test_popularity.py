"""The popularity baseline: counts of training alone, the same ranking for everybody."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from m2rec.compat import data_preparation
from m2rec.data.dataset import HistoryDataset
from m2rec.models.popularity import Popularity
from m2rec.training.configuration import build_config
from tests.conftest import as_arguments, random_rows, small


@pytest.mark.parametrize("rows", ["dense", "prefix"])
def test_items_are_ranked_by_training_counts(toy: Path, rows: str):
    config = build_config(small(toy, model="Popularity", rows=rows))
    train, _, test = data_preparation(config, HistoryDataset(config))
    scores = Popularity(config, train.dataset).full_sort_predict(test.dataset.inter_feat)
    assert scores.shape == (len(test.dataset), train.dataset.item_num)
    ordered: dict[str, list[str]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        ordered.setdefault(user, []).append(item)
    held = {1: 1, 2: 0, 3: 1}  # of a history of that length, what is not trained on; else 2
    counts = Counter(item for own in ordered.values() for item in own[: len(own) - held.get(len(own), 2)])
    tokens = train.dataset.field2id_token["item_id"]
    for row in (scores[0], scores[-1]):
        best = row[1:].argsort(descending=True) + 1
        found = [counts[tokens[i]] for i in best]
        assert found == sorted(counts.values(), reverse=True) and len(set(found)) < len(found)
        for a, b in itertools.pairwise(best.tolist()):
            assert counts[tokens[a]] > counts[tokens[b]] or a < b


def test_a_run_takes_one_epoch(command: Callable[..., tuple[int, str, str]], toy: Path):
    status, out, err = command(*as_arguments(small(toy, model="Popularity", epochs=50)))
    assert status == 0, err
    metrics = json.loads((Path(out.splitlines()[-1]) / "metrics.json").read_text())
    assert metrics["model"] == "Popularity" and metrics["epochs"] == 1
    assert metrics["test_new"]["hit@10"] > metrics["test_unseen"]["hit@10"] > 0
