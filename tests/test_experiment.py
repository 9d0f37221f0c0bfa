"""A run in parts: training without the test, watched and stopped from outside."""

import csv
from pathlib import Path

import pytest

from m2rec.training.configuration import build_config
from m2rec.training.run import PreparedRun, TrainingStopped, prepare_run
from tests.conftest import small


def prepared(toy: Path, tmp_path: Path, **others: object) -> PreparedRun:
    return prepare_run(build_config(small(toy, runs_dir=str(tmp_path / "runs"), **others)))


def test_a_watch_gets_each_validation(toy: Path, tmp_path: Path):
    run, seen = prepared(toy, tmp_path, epochs=4, eval_step=2), []
    run.train(lambda epoch, score: seen.append((epoch, score)))
    with (run.trainer.folder / "history.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert seen == [(k, pytest.approx(float(lines[k]["valid.ndcg@10"]))) for k in (1, 3)]
    assert max(score for _, score in seen) == pytest.approx(run.trainer.best_valid_score)
    assert not (run.trainer.folder / "metrics.json").exists()


def test_a_watch_ends_the_training(toy: Path, tmp_path: Path):
    def watch(epoch: int, score: float) -> None:
        if epoch == 1:
            raise TrainingStopped("enough")

    run = prepared(toy, tmp_path, epochs=9)
    with pytest.raises(TrainingStopped, match=r"^enough$"):
        run.train(watch)
    assert len((run.trainer.folder / "history.csv").read_text().splitlines()) == 3
