"""A long training takes no more memory, files or threads than a short one."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from m2rec.training.configuration import build_config
from m2rec.training.run import prepare_run
from m2rec.training.trainer import RunTrainer
from tests.conftest import small

STEPS = int(os.environ.get("M2REC_STEPS", "120"))


def test_memory_files_and_threads_stay_flat(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    process, seen, step = psutil.Process(), [], RunTrainer._train_step

    def watched(self: RunTrainer, *batch: Any) -> Any:
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        return step(self, *batch)

    monkeypatch.setattr(RunTrainer, "_train_step", watched)
    epochs = -(-STEPS // 6)
    values = small(
        toy, epochs=epochs, stopping_step=epochs, text_vectors="none", train_batch_size=7, n_layers=1
    )
    prepare_run(build_config({**values, "average_epochs": 0.5, "runs_dir": str(tmp_path)})).train()
    assert len(seen) == 6 * epochs >= STEPS
    warm, end = seen[len(seen) // 4], seen[-1]
    assert end[0] - warm[0] < 8 * 2**20
    assert end[1:] == warm[1:]
