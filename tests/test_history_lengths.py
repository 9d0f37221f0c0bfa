"""scripts/history_lengths.py against recommendations for parts of histories."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from m2rec.commands import history_lengths
from m2rec.evaluation import history_length
from m2rec.serving.recommender import Recommender
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import random_rows, small, write_inter


def test_metrics_by_number_of_items(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_inter(tmp_path / "data", "toy", random_rows())
    keys = small(tmp_path / "data", epochs=1, runs_dir=str(tmp_path / "runs"), text_vectors="none")
    folder = run_experiment(build_config(keys)).folder
    monkeypatch.setattr(history_length, "INPUT_LENGTHS", (2, 10_000))
    assert history_lengths.main([str(folder)]) == 0
    out, err = capsys.readouterr()
    last_two, whole = csv.DictReader(io.StringIO(out))
    assert (last_two["shown"], whole["shown"]) == ("2", "all")
    ordered: dict[str, list[str]] = {}
    for user, item, _ in sorted(random_rows(), key=lambda row: row[2]):
        ordered.setdefault(str(user), []).append(str(item))
    recommender = Recommender.load(folder, whole_history=True)
    hits: dict[str, list[bool]] = {"2": [], "all": []}
    for *history, target in (items for items in ordered.values() if len(items) >= 3):
        for name, shown in (("2", history[-2:]), ("all", history)):
            best = recommender.recommend(shown, 10, exclude_seen=False, exclude=history)
            hits[name].append(target in [item.item for item in best])
    for row in (last_two, whole):
        assert float(row["all: hit@10"]) == pytest.approx(np.mean(hits[row["shown"]]), abs=1e-6)
        assert int(row["all: users"]) == len(hits["all"])
        buckets = [column for column in row if column.endswith(": users") and column != "all: users"]
        assert sum(int(row[column]) for column in buckets) == len(hits["all"])
    assert f"of {len(hits['all'])} targets are in their history: misses" in err
    assert history_lengths.main([str(folder), "--users=5"]) == 0
    assert next(csv.DictReader(io.StringIO(capsys.readouterr().out)))["all: users"] == "5"
