"""A saved model scored on data sets: its own, and others with some of its items."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from m2rec.commands import evaluate, recommend
from m2rec.commands.evaluate import evaluate_run
from m2rec.serving.recommender import Recommender
from m2rec.training.configuration import build_config
from m2rec.training.run import run_experiment
from tests.conftest import random_rows, small, write_inter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("scored")
    write_inter(base / "data", "toy", random_rows())
    keys = small(base / "data", epochs=1, runs_dir=str(base / "runs"), text_vectors="none")
    return run_experiment(build_config(keys)).folder


@pytest.mark.parametrize("part", ["test", "valid"])
def test_on_its_own_data_it_is_as_metrics_json_says(folder: Path, part: str):
    found, stored = evaluate_run(folder, part), json.loads((folder / "metrics.json").read_text())
    assert found["counts"]["unknown_targets"] == found["counts"]["unknown_in_histories"] == 0
    assert found["counts"]["returning"] == stored["data"][f"{part}_returning"] > 0
    for protocol in (part, f"{part}_unseen", f"{part}_new"):
        assert found["metrics"][protocol] == pytest.approx(stored[protocol], abs=1e-6)


def write_other(folder: Path) -> dict[str, list[str]]:
    """Another data set, in which some items are new; its histories."""
    own = {f"v{u}": [f"i{(u * k) % 17}" for k in range(1, 5 + u)] for u in range(6)}
    own["v1"][-1], own["v2"][0] = "fresh", "fresh"
    rows = [(user, item, time) for user, items in own.items() for time, item in enumerate(items)]
    write_inter(folder, "other", rows)
    return own


def test_on_other_data_what_recommend_reaches(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By hand; an unknown target is a miss, an unknown item of a history is left out, and both are said."""
    own = write_other(tmp_path)
    output = tmp_path / "found.json"
    arguments = [str(folder), "--dataset=other", f"--data-path={tmp_path}", f"--output={output}"]
    assert evaluate.main(arguments) == 0
    recommender = Recommender.load(folder)
    hits = {"test": [], "test_unseen": [], "test_new": []}
    for *past, target in own.values():
        past = [item for item in past if item != "fresh"]
        for protocol, seen in (("test", False), ("test_unseen", True)):
            best = recommender.recommend(past, 5, exclude_seen=seen)
            hits[protocol].append(target in [item.item for item in best])
        if target not in past:
            hits["test_new"].append(hits["test_unseen"][-1])
    found = json.loads(output.read_text())
    for protocol, expected in hits.items():
        assert found["metrics"][protocol]["hit@5"] == pytest.approx(np.mean(expected))
    assert found["counts"]["users"] == 6
    assert (found["counts"]["unknown_targets"], found["counts"]["unknown_in_histories"]) == (1, 1)
    out = capsys.readouterr().out
    assert "users 6" in out and "unknown_targets 1" in out and "hit@5" in out


def test_nobody_to_test(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_inter(tmp_path, "short", [("a", "i1", 1), ("a", "i2", 2), ("a", "i3", 3)])
    assert evaluate.main([str(folder), "--dataset=short", f"--data-path={tmp_path}", "--part=valid"]) == 2
    assert "dataset: no user has a valid target; give other data, or --part" in capsys.readouterr().err
    assert evaluate.main([str(folder), "--dataset=short", f"--data-path={tmp_path}", "--seeed=1"]) == 2
    assert "unknown key 'seeed'" in capsys.readouterr().err


def test_recommendations_for_everybody(folder: Path, tmp_path: Path):
    """Also who did so little that the run's filters leave them out, and who only had unknown items."""
    own = {"a": ["i1", "i2", "i3"], "b": ["i4"], "c": ["fresh"], "d": ["fresh", "i5"]}
    rows = [(user, item, time) for user, items in own.items() for time, item in enumerate(items)]
    write_inter(tmp_path, "all", rows)
    output = tmp_path / "all.parquet"
    arguments = [str(folder), "--all-users", "--dataset=all", f"--data-path={tmp_path}", f"--output={output}"]
    assert recommend.main([*arguments, "-k=4"]) == 0
    frame = pandas.read_parquet(output)
    assert frame["user"].tolist() == list(own)
    recommender = Recommender.load(folder)
    for row, items in zip(frame.itertuples(), own.values(), strict=True):
        best = recommender.recommend(items, 4, skip_unknown=True)
        assert list(row.items) == [item.item for item in best]


def test_a_user_whom_the_filters_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_inter(tmp_path / "data", "toy", [*random_rows(), ("rare", "i1", 978300001)])
    keys = small(tmp_path / "data", epochs=1, runs_dir=str(tmp_path / "runs"), text_vectors="none")
    filtered = run_experiment(build_config({**keys, "user_inter_num_interval": "[3,inf)"})).folder
    with (filtered / "test_ranks.csv").open() as file:
        known = next(csv.DictReader(file))["user"]
    assert recommend.main([str(filtered), f"--user={known}"]) == 0
    assert recommend.main([str(filtered), "--user=rare"]) == 2
    assert (
        "no user 'rare', or the run's filters leave that user out (user_inter_num_interval"
        in capsys.readouterr().err
    )
    assert recommend.main([str(filtered), "--user=nobody"]) == 2
    assert "--user: the data set has no user 'nobody'" in capsys.readouterr().err
