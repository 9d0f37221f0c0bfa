"""What scripts/tune.py and `run_mm.py --search` share: a trial is a run without its test."""

import logging
import math
import shutil
from pathlib import Path
from typing import Any

from m2rec.commands.config_file import find_config_file
from m2rec.compat import Config
from m2rec.errors import UserError
from m2rec.experiments.search import Watch
from m2rec.run_folder import list_run_folders
from m2rec.training import run
from m2rec.training.checkpoint import CannotResume
from m2rec.training.configuration import build_config
from m2rec.training.data_cache import DataCache

logger = logging.getLogger(__name__)


class TrialTrainer:
    """Trains one trial after the other; their data is loaded once, as long as they have the same rows."""

    def __init__(self) -> None:
        self.cache = DataCache()

    def __call__(
        self, settings: dict[str, Any], folder: Path, watch: Watch, notes: dict[str, Any]
    ) -> float | None:
        """Train with these settings; returns valid_metric at the best epoch, None if `watch` stopped it.

        Args:
            settings: those of the run.
            folder: for the run folder; an unfinished run in it is resumed.
            watch: called with each epoch and its score; tells whether to stop.
            notes: gets how many epochs were trained, the best one, and the number of parameters.

        Raises:
            ValueError: the settings are refused, or training diverged.
        """
        try:
            return self._train(settings, folder, watch, notes)
        except CannotResume as error:
            logger.warning("%s starts anew: %s", folder, error)
            for files in list_run_folders(folder):
                shutil.rmtree(files.path)
            return self._train(settings, folder, watch, notes)

    def _train(
        self, settings: dict[str, Any], folder: Path, watch: Watch, notes: dict[str, Any]
    ) -> float | None:
        config = build_config({**settings, "runs_dir": str(folder)}, find_config_file())
        prepared = self._prepare(config, folder)
        trainer = prepared.trainer
        notes["parameters"] = prepared.n_parameters

        def take_notes() -> None:
            notes["trained_epochs"] = len(trainer.train_loss_dict)
            notes["best_epoch"] = trainer.best_epoch

        def stop(epoch: int, score: float) -> None:
            take_notes()
            if watch(epoch, score):
                raise run.TrainingStopped

        try:
            prepared.train(stop)
        except run.TrainingStopped:
            return None
        finally:
            take_notes()
        score = float(trainer.best_valid_score)
        if not math.isfinite(score):
            raise UserError(f"valid_metric: {config['valid_metric']} was {score} all along; choose another")
        return score

    def _prepare(self, config: Config, folder: Path) -> run.PreparedRun:
        """A new run, or the one that was stopped in this folder."""
        for files in reversed(list_run_folders(folder)):
            if files.checkpoint_file.exists():
                return run.prepare_run(config, files.path, self.cache.load)
            shutil.rmtree(files.path)  # it was stopped before its first checkpoint
        return run.prepare_run(config, load=self.cache.load)


def check_data(config: Config) -> tuple[Any, run.Loaders]:
    """Load the data of a search.

    Raises:
        ValueError: it can't be used, or has no validation rows.
    """
    dataset, loaders = run.load_data(config)
    if not len(loaders.valid.dataset):
        raise UserError(f"dataset: {config['dataset']!r} has no validation rows, so nothing can be searched")
    return dataset, loaders
