"""The study of scripts/tune.py: its settings are checked, and a trial is a run without its test."""

import logging
import math
from pathlib import Path
from typing import Any

from m2rec.compat import Config
from m2rec.errors import UserError
from m2rec.experiments import search
from m2rec.experiments.search_plan import SearchPlan
from m2rec.settings import MACHINE_KEYS
from m2rec.training import run
from m2rec.training.configuration import build_config, resolve_settings

CONFIG_PATH = Path(__file__).parents[2] / "config.yaml"


def check_fixed_settings(plan: SearchPlan) -> Config:
    """Check what no trial could change: the fixed keys and the data.

    Returns:
        the settings of the study, with some value for each searched key.

    Raises:
        ValueError: the fixed keys are refused with all values that were tried, or the data can't be used.
    """
    config = find_valid_config(plan)
    if "state" in plan.fixed:
        logging.getLogger("m2rec").setLevel(config["state"])
    _, (_, valid, _) = run.load_data(config)
    if not len(valid.dataset):
        raise UserError(f"dataset: {config['dataset']!r} has no validation rows, so nothing can be searched")
    return config


def find_valid_config(plan: SearchPlan) -> Config:
    """The settings with the first value of each searched key, or if they are invalid, with others."""
    errors = []
    for settings in search.list_example_settings(plan):
        try:
            return build_config(settings, CONFIG_PATH)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def open_study(plan: SearchPlan, config: Config, folder: Path) -> Any:
    """Create the study or join it."""
    varied = {*plan.search, *MACHINE_KEYS} - {"data_path"}  # another folder may hold other data
    settings = {key: value for key, value in resolve_settings(config).items() if key not in varied}
    return search.open_study(plan, folder, settings, maximize=config["valid_metric_bigger"])


def train_trial(
    folder: Path, settings: dict[str, Any], watch: search.Watch, notes: dict[str, Any]
) -> float | None:
    """Train with these settings; returns valid_metric at the best epoch, None if `watch` stopped it.

    Raises:
        ValueError: the settings are refused, or training diverged.
    """

    def stop(epoch: int, score: float) -> None:
        if watch(epoch, score):
            raise run.TrainingStopped

    config = build_config({**settings, "runs_dir": str(folder)}, CONFIG_PATH)
    prepared = run.prepare_run(config)
    trainer = prepared.trainer
    try:
        prepared.train(stop)
    except run.TrainingStopped:
        return None
    finally:
        trainer.remove_checkpoint()
        notes["trained_epochs"] = len(trainer.train_loss_dict)
        notes["best_epoch"] = trainer.best_epoch
        notes["parameters"] = prepared.n_parameters
    score = float(trainer.best_valid_score)
    if not math.isfinite(score):
        raise UserError(f"valid_metric: {config['valid_metric']} was {score} all along; choose another")
    return score
