"""What a search of run_mm.py --search tries, and with how many workers."""

import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from m2rec.commands.config_file import find_config_file
from m2rec.commands.profiles import PLAIN, PROFILES
from m2rec.commands.trials import check_data
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.experiments.search import SearchTask
from m2rec.experiments.search_budget import Budget
from m2rec.experiments.search_space import RULES, Choices, SpaceAround, build_space
from m2rec.settings import MACHINE_KEYS, NO_RUN, SCALE_FREE_KEYS
from m2rec.text.source import ensure_text_vectors
from m2rec.training.configuration import build_config, collect_user_values, resolve_settings
from m2rec.training.provenance import hash_training_data
from m2rec.training.settling import resolve_scale_free_keys

logger = logging.getLogger(__name__)

# targets that are trained before the profiles are compared for the first time, and the epochs for it at most
_FIRST_TARGETS = 400_000
_MAX_FIRST_EPOCHS = 8
_COVERED_SHARE = 0.98  # of the histories that fit into a length: a longer one is not worth trying
_MEMORY_FACTOR = 1.5  # a worker's memory, by that of this process when it had the data
_TRIAL_SETTINGS = {"report": False, "show_progress": False, "tensorboard": False, "log_wandb": False}
_M2REC = "M2Rec"


@dataclass(frozen=True)
class SearchSetup:
    """A search that is ready to start."""

    config: Config
    """Of the plain run."""
    base: dict[str, Any]
    """Keys that make the plain run, without asking the data."""
    task: SearchTask
    profiles: dict[str, dict[str, Any]]
    data_hash: str
    gpus: list[str | None]
    """One for each worker."""
    threads: int
    """Of each worker."""

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """What all runs of the search have in common, and must have when it is resumed."""
        varied = {key for profile in self.profiles.values() for key in profile}
        varied |= {*MACHINE_KEYS, *self.task.space.make_ranges(self.task.plain)}
        return {key: value for key, value in self.task.plain.items() if key not in varied}

    @property
    def n_workers(self) -> int:
        """How many processes train at a time."""
        return len(self.gpus)


def plan_search(given: Mapping[str, Any], budget: Budget) -> SearchSetup:
    """Check keys and data, and choose profiles, ranges and workers.

    Args:
        given: the keys of the command line but `search`.
        budget: of the search.

    Raises:
        ValueError: keys or data can't be used, or nothing is left to search.
    """
    user_values = collect_user_values(given, find_config_file())
    if user_values.get("continue_from", NO_RUN) != NO_RUN:
        raise UserError(
            "search: a run that continues another keeps its settings; leave out search or continue_from"
        )
    config = build_config(given, find_config_file())
    if epochs := getattr(config.model_class, "fixed_settings", {}).get("epochs"):
        raise UserError(f"search: {config['variant']} always has epochs: {epochs}, nothing can be searched")
    dataset, loaders = check_data(config)
    if config.model_settings:
        ensure_text_vectors(config, dataset.item_tokens[1:])  # once, not in each worker
    plain = resolve_settings(config)  # `load_data` has settled what depends on the data
    own = {key: value for key, value in user_values.items() if key in MACHINE_KEYS}
    base = {**plain, **own, "auto": False}
    profiles = {PLAIN: dict[str, Any]()}
    if plain["model"] == _M2REC:
        profiles = choose_profiles(base, set(user_values), dataset, loaders.train.dataset)
    space = build_space(plain["model"] == _M2REC, plain, profiles.values(), user_values)
    if not space.make_ranges(plain):
        if len(profiles) == 1:
            raise UserError(f"search: {plain['model']} has no key to search that you have not set yourself")
        budget = Budget(min(budget.trials or len(profiles), len(profiles)), budget.seconds)
    _log_choices(profiles, space, plain, user_values)
    gpus, threads = _share_machine(config, user_values, budget)
    first_epochs = min(math.ceil(_FIRST_TARGETS / loaders.train.dataset.n_targets), _MAX_FIRST_EPOCHS)
    first_epochs = max(min(first_epochs, plain["epochs"] // 4), plain["eval_step"])
    task = SearchTask(
        folder=Path(config["runs_dir"]) / "search" / _name_search(config, user_values),
        fixed={**base, **_TRIAL_SETTINGS},
        space=space,
        plain=plain,
        trials=budget.trials,
        seed=plain["seed"],
        first_epochs=first_epochs,
        startup_trials=len(profiles),
        is_maximized=bool(config["valid_metric_bigger"]),
    )
    data_hash = hash_training_data(dataset, loaders)
    return SearchSetup(config, base, task, profiles, data_hash, gpus, threads)


def choose_profiles(
    base: Mapping[str, Any], user_keys: Collection[str], dataset: HistoryDataset, train: HistoryDataset
) -> dict[str, dict[str, Any]]:
    """What each profile changes in the plain run, in plain keys; one that changes nothing new is left out.

    Args:
        base: keys that make the plain run.
        user_keys: what the user has set, which no profile changes.
        dataset: with rows.
        train: its training part.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for name, profile in PROFILES.items():
        try:
            settings = _resolve_profile(profile, base, user_keys, train)
        except ValueError as error:
            logger.info("search: profile %s is left out: %s", name, error)
            continue
        if _adapt_length(settings, base, user_keys, dataset) and settings not in chosen.values():
            chosen[name] = settings
    return chosen


def _resolve_profile(
    profile: Mapping[str, Any], base: Mapping[str, Any], user_keys: Collection[str], train: HistoryDataset
) -> dict[str, Any]:
    """The plain keys in which a profile differs from the plain run.

    Raises:
        ValueError: it does not go together with what the user has set.
    """
    values = dict(base)
    for key, value in profile.items():
        plain_key = SCALE_FREE_KEYS.get(key, key)
        if key not in user_keys and plain_key not in user_keys:
            values.pop(plain_key, None)
            values[key] = value
    if values["decay_per_epoch"] and "learner" not in user_keys:
        values["learner"] = "adamw"
    config = build_config(values, find_config_file())
    resolved = resolve_settings(config)
    resolved |= resolve_scale_free_keys(config.run_settings, len(train), train.n_targets)
    settings = {}
    for key, value in resolved.items():
        if key not in SCALE_FREE_KEYS and value != base.get(key):
            settings[key] = float(f"{value:.4g}") if type(value) is float else value
    return settings


def _adapt_length(
    settings: dict[str, Any], base: Mapping[str, Any], user_keys: Collection[str], dataset: HistoryDataset
) -> bool:
    """Whether histories are long enough for a profile's length; its steps then keep their targets."""
    length, plain_length = settings.get("MAX_ITEM_LIST_LENGTH", 0), base["MAX_ITEM_LIST_LENGTH"]
    if length <= plain_length:
        return True
    histories = dataset.histories
    assert histories is not None
    if np.quantile(histories.end - histories.start, _COVERED_SHARE) <= plain_length:
        return False
    if "train_batch_size" not in user_keys:
        batch_size = settings.get("train_batch_size", base["train_batch_size"])
        settings["train_batch_size"] = max(1, round(batch_size * plain_length / length))
    return True


def _name_search(config: Config, user_values: Mapping[str, Any]) -> str:
    """The same for the same command, another one where other keys are set or searched."""
    fixed = {key: user_values[key] for key in sorted(user_values) if key not in MACHINE_KEYS}
    digest = sha256(json.dumps([fixed, PROFILES, repr(RULES)], default=str).encode()).hexdigest()[:6]
    return f"{config['variant']}-{config['dataset']}-{digest}"


def _log_choices(
    profiles: Mapping[str, dict[str, Any]],
    space: SpaceAround,
    plain: Mapping[str, Any],
    user_keys: Collection[str],
) -> None:
    if len(profiles) > 1:
        logger.info("search: %s profiles race: %s", len(profiles), ", ".join(profiles))
    ranges = [space.make_ranges({**plain, **profile}) for profile in profiles.values()]
    drawn = dict.fromkeys(key for found in ranges for key in found)
    logger.info("search: around the best, these keys are drawn: %s", ", ".join(drawn) or "none")
    lengths = space.rules.get("MAX_ITEM_LIST_LENGTH")
    if isinstance(lengths, Choices) and len(lengths.choices) > 1:
        logger.info("search: a worker loads the data anew when MAX_ITEM_LIST_LENGTH changes")
    could_vary = {key for profile in PROFILES.values() for key in profile} | {*RULES}
    if kept := sorted(could_vary & set(user_keys)):
        logger.info("search: these keys stay as you set them: %s", ", ".join(kept))


def _share_machine(
    config: Config, user_keys: Collection[str], budget: Budget
) -> tuple[list[str | None], int]:
    """A GPU for each worker, None on a CPU; and the threads of each."""
    threads = torch.get_num_threads()
    if config["device"].type == "cuda":
        gpus: list[str | None] = [str(gpu) for gpu in range(torch.cuda.device_count())]
        if "gpu_id" in user_keys:
            gpus = [str(config["gpu_id"])]
        gpus = gpus[: budget.trials]
        return gpus, max(1, threads // len(gpus))
    memory = psutil.Process(os.getpid()).memory_info().rss * _MEMORY_FACTOR
    fitting = max(1, int(psutil.virtual_memory().available // memory))
    n_workers = min(threads, fitting, budget.trials or threads)
    logger.info(
        "search: %s worker%s on %s thread%s; the memory is enough for %s",
        n_workers,
        "s" if n_workers != 1 else "",
        threads,
        "s" if threads != 1 else "",
        fitting,
    )
    return [None] * n_workers, max(1, threads // n_workers)
