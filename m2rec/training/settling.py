"""Keys that depend on the data, settled once the training rows are counted: by `auto`, or scale-free."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import NO_TARGET
from m2rec.settings import SCALE_FREE_KEYS, RunSettings
from m2rec.text.source import has_item_text
from m2rec.training.automatic_settings import (
    RULE_KEYS,
    Choice,
    DataStatistics,
    choose_settings,
    format_choices,
)
from m2rec.training.configuration import RunConfig

logger = logging.getLogger(__name__)

_MAX_DECAY = 0.999  # of the weights in an epoch
_MAX_COUNTED_HISTORIES = 100_000  # whose returning targets are counted


def settle_settings(config: RunConfig, dataset: HistoryDataset, train: HistoryDataset) -> None:
    """Replace every key that depends on the data by a plain value, and log it.

    Afterwards the config says the same without its data: `auto` is false, and the scale-free keys are 0.

    Args:
        config: of the run.
        dataset: with rows.
        train: its training part.
    """
    config.settle({"MAX_ITEM_LIST_LENGTH": dataset.max_item_list_len})
    choices = _choose_open_keys(config, dataset, train)
    config.settle({key: choice.value for key, choice in choices.items()})
    if chosen := {**config.recipe, **choices}:
        logger.info("auto: %s", format_choices(chosen))
    values = resolve_scale_free_keys(config.run_settings, len(train), train.n_targets)
    if values:
        plain = ", ".join(f"{key} {value:g}" for key, value in values.items() if type(value) is not str)
        logger.info("for %s targets in %s rows: %s", f"{train.n_targets:,}", f"{len(train):,}", plain)
    unused = {key: RunSettings.defaults()[key] for key in SCALE_FREE_KEYS}
    config.settle({**values, **unused, "auto": False})


def _choose_open_keys(config: RunConfig, dataset: HistoryDataset, train: HistoryDataset) -> dict[str, Choice]:
    """What the rule chooses of the keys that it may choose."""
    if not config.open_keys:
        return {}
    statistics = collect_statistics(dataset, has_item_text(config))
    decided = collect_decided_keys(config, RULE_KEYS - config.open_keys, train)
    choices = choose_settings(statistics, decided)
    return {key: choice for key, choice in choices.items() if key in config.open_keys}


def collect_decided_keys(config: RunConfig, keys: Iterable[str], train: HistoryDataset) -> dict[str, Any]:
    """The values of keys that the rule may not choose; steps and averages in targets, however they were set.

    Args:
        config: of the run.
        keys: some of RULE_KEYS.
        train: the training part of the data.
    """
    n_rows, n_targets = len(train), train.n_targets
    decided = {key: config[key] for key in keys if key in config}
    if decided.get("targets_per_step") == 0:
        decided["targets_per_step"] = max(1, round(config["train_batch_size"] * n_targets / n_rows))
    if decided.get("average_targets") == 0:
        decided["average_targets"] = round(config["average_epochs"] * n_targets)
    return decided


def collect_statistics(dataset: HistoryDataset, has_text: bool) -> DataStatistics:
    """Count what the rule needs.

    Args:
        dataset: with rows.
        has_text: whether the model will have item text.
    """
    histories = dataset.histories
    assert histories is not None
    counts = histories.training_counts(dataset.item_num)
    return DataStatistics(
        targets=histories.n_training_targets,
        items=dataset.item_num - 1,
        users=dataset.counts["users"],
        median_item_count=float(np.median(counts[counts > 0])) if counts.any() else 0.0,
        returning_share=histories.measure_returning_share(_MAX_COUNTED_HISTORIES),
        has_text=has_text,
        has_validation=bool((histories.split.targets["valid"] != NO_TARGET).any()),
    )


def find_scale_free_keys(settings: RunSettings, n_rows: int, n_targets: int) -> dict[str, Any]:
    """The scale-free keys that stand for the plain keys: the reverse of `resolve_scale_free_keys`.

    A key whose plain key is 0, or is no share of the weights, is left out.

    Args:
        settings: the plain keys.
        n_rows: training rows, at least 1.
        n_targets: their targets, at least 1.
    """
    left = 1 - settings.learning_rate * settings.weight_decay  # of the weights, in a step
    values: dict[str, Any] = {
        "targets_per_step": max(1, round(settings.train_batch_size * n_targets / n_rows)),
        "average_targets": round(settings.average_epochs * n_targets),
        "patience_targets": settings.stopping_step * settings.eval_step * n_targets,
    }
    if settings.learner == "adamw" and 0 < left < 1:
        n_steps = math.ceil(n_rows / settings.train_batch_size)
        values["decay_per_epoch"] = min(1 - left**n_steps, _MAX_DECAY)
    return {key: value for key, value in values.items() if value}


def resolve_scale_free_keys(settings: RunSettings, n_rows: int, n_targets: int) -> dict[str, Any]:
    """The plain keys that the scale-free keys in use stand for, see `SCALE_FREE_KEYS`.

    Args:
        settings: the keys; a scale-free key of 0 is not used.
        n_rows: training rows, at least 1.
        n_targets: their targets, at least 1.
    """
    values: dict[str, Any] = {}
    if settings.targets_per_step:
        rows_per_step = round(settings.targets_per_step * n_rows / n_targets)
        values["train_batch_size"] = min(max(1, rows_per_step), n_rows)
    if settings.decay_per_epoch:
        n_steps = math.ceil(n_rows / values.get("train_batch_size", settings.train_batch_size))
        # AdamW's step leaves 1 - learning_rate * weight_decay of a weight
        share_per_step = -math.expm1(math.log1p(-settings.decay_per_epoch) / n_steps)
        values["learner"] = "adamw"
        values["weight_decay"] = share_per_step / settings.learning_rate
    if settings.average_targets:
        values["average_epochs"] = settings.average_targets / n_targets
    if settings.patience_targets:
        validations = settings.patience_targets / (n_targets * settings.eval_step)
        values["stopping_step"] = max(1, round(validations))
    return values
