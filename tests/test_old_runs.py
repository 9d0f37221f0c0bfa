"""Run folders that version 0.1.0 made, kept in tests/old_runs, still load, go on and become pages."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from torch import nn

import run_mm
from m2rec import Recommender
from m2rec.commands import report
from m2rec.nn.dropout import Dropout

OLD_RUNS = Path(__file__).parent / "old_runs"
EXPECTED = json.loads((OLD_RUNS / "expected.json").read_text())  # made with that version, too


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, in a working directory where their data set lies."""
    shutil.copytree(OLD_RUNS, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return Path("runs")


def test_a_finished_run_recommends_as_before(runs: Path):
    recommender = Recommender.load(runs / "finished")
    session = recommender.session(["i3"])
    session.add("i6")
    for found, expected in (
        (recommender.recommend(["i3", "i6", "i9"], k=5), EXPECTED["recommendations"]),
        (session.recommend(k=3), EXPECTED["session"]),
    ):
        assert [item.item for item in found] == [item for item, _ in expected]
        assert [item.score for item in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_a_stopped_run_is_resumed_to_the_same_end(runs: Path, monkeypatch: pytest.MonkeyPatch):
    """With the dropout masks that the version drew; all else has kept its digits."""
    monkeypatch.setattr(Dropout, "forward", nn.Dropout.forward)
    assert run_mm.main([f"--resume={runs / 'stopped'}"]) == 0
    with (runs / "stopped" / "history.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == pytest.approx([float(loss) for loss in EXPECTED["stopped_losses"]], rel=1e-5)
    metrics = json.loads((runs / "stopped" / "metrics.json").read_text())
    assert metrics["test_unseen"] == pytest.approx(EXPECTED["stopped_test_unseen"], abs=1e-5)


def test_old_runs_become_pages(runs: Path):
    assert report.main([str(runs / "finished")]) == 0
    assert report.main([str(runs / "finished"), str(runs / "baseline"), "--output=both.html"]) == 0
    assert "lamp" in (runs / "finished" / "report.html").read_text()
    assert "SASRec" in Path("both.html").read_text()
