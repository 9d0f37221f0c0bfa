"""A run in parts: training without the test, watched and stopped from outside."""

import csv
from pathlib import Path

import pytest

from m2rec.training import run
from m2rec.training.configuration import build_config
from tests.conftest import small


def prepared(toy: Path, tmp_path: Path, **others: object) -> run.PreparedRun:
    return run.prepare_run(build_config(small(toy, runs_dir=str(tmp_path / "runs"), **others)))


def test_a_watch_gets_each_validation(toy: Path, tmp_path: Path):
    run, seen = prepared(toy, tmp_path, epochs=4, eval_step=2), []
    run.train_model(run, lambda epoch, score: seen.append((epoch, score)))
    with (run.trainer.folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert seen == [(k, pytest.approx(float(lines[k]["valid.ndcg@10"]))) for k in (1, 3)]
    assert max(score for _, score in seen) == pytest.approx(run.trainer.best_valid_score)
    assert not (run.trainer.folder / "metrics.json").exists()


def test_a_watch_ends_the_training(toy: Path, tmp_path: Path):
    def watch(epoch: int, score: float) -> None:
        if epoch == 1:
            raise run.TrainingStopped("enough")

    run = prepared(toy, tmp_path, epochs=9)
    with pytest.raises(run.TrainingStopped, match=r"^enough$"):
        run.train_model(run, watch)
    assert len((run.trainer.folder / "history.csv").read_text().splitlines()) == 3
