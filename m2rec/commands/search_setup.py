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
from m2rec.commands.profiles import DEFAULTS, PLAIN, VARIATIONS
from m2rec.commands.trials import check_data
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.experiments.search import SearchTask, round_setting
from m2rec.experiments.search_budget import Budget
from m2rec.experiments.search_space import RULES, Choices, SpaceAround, build_space
from m2rec.settings import (
    MACHINE_KEYS,
    NO_RUN,
    SCALE_FREE_KEYS,
    Role,
    RunSettings,
    collect_keys,
    override_settings,
)
from m2rec.text.source import ensure_text_vectors, has_item_text
from m2rec.training import automatic_settings
from m2rec.training.automatic_settings import (
    N_NEGATIVES,
    RULE_KEYS,
    DataStatistics,
    is_loss_open,
)
from m2rec.training.configuration import (
    RunConfig,
    build_config,
    collect_user_values,
    list_decided_keys,
    resolve_settings,
)
from m2rec.training.provenance import hash_training_data
from m2rec.training.settling import (
    collect_decided_keys,
    collect_statistics,
    find_scale_free_keys,
    resolve_scale_free_keys,
)

logger = logging.getLogger(__name__)

# targets that are trained before the profiles are compared for the first time, and the epochs for it at most
_FIRST_TARGETS = 400_000
_MAX_FIRST_EPOCHS = 8
_COVERED_SHARE = 0.98  # of the histories that fit into a length: a longer one is not worth trying
_MEMORY_FACTOR = 1.5  # a worker's memory, by that of this process when it had the data
_TRIAL_SETTINGS = {"report": False, "show_progress": False, "tensorboard": False, "log_wandb": False}
_M2REC = "M2Rec"
# what the profile of the fixed defaults leaves as it is: the loss, the rows, and what is not trained
_KEPT_KEYS = {"MAX_ITEM_LIST_LENGTH", "auto", "exclude_seen", "loss_type", "n_negatives", "neighbors"}


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
        varied |= {plain for scale_free, plain in SCALE_FREE_KEYS.items() if scale_free in varied}
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
    scale_free = {key: user_values[key] for key in SCALE_FREE_KEYS if user_values.get(key)}
    base = override_settings({**plain, **own, "auto": False}, scale_free)
    profiles, carried, fixed = {PLAIN: dict[str, Any]()}, dict[str, Any](), list_decided_keys(user_values)
    train = loaders.train.dataset
    if plain["model"] == _M2REC:
        statistics = collect_statistics(dataset, has_item_text(config))
        if not is_loss_open(statistics):
            fixed |= {"loss_type"}
        elif not {"loss_type", "n_negatives"} & fixed:
            base["n_negatives"] = plain["n_negatives"] = N_NEGATIVES  # of trials that sample, CE has none
        run = PlainRun(config, base, user_values, dataset, train)
        carried = run.find_scale_free_keys()
        plain |= carried
        profiles = choose_profiles(run, statistics)
    space = build_space(plain["model"] == _M2REC, plain, profiles.values(), fixed)
    if not space.make_ranges(plain):
        if len(profiles) == 1:
            raise UserError(f"search: {plain['model']} has no key to search that you have not set yourself")
        budget = Budget(min(budget.trials or len(profiles), len(profiles)), budget.seconds)
    _log_choices(profiles, space, plain, user_values)
    gpus, threads = _share_machine(config, user_values, budget)
    first_epochs = min(math.ceil(_FIRST_TARGETS / train.n_targets), _MAX_FIRST_EPOCHS)
    first_epochs = max(min(first_epochs, plain["epochs"] // 4), plain["eval_step"])
    task = SearchTask(
        folder=Path(config["runs_dir"]) / "search" / _name_search(config, user_values),
        fixed={**base, **_TRIAL_SETTINGS},
        space=space,
        plain=plain,
        carried=carried,
        n_targets=train.n_targets,
        trials=budget.trials,
        seed=plain["seed"],
        first_epochs=first_epochs,
        n_workers=len(gpus),
        startup_trials=len(profiles),
        is_maximized=bool(config["valid_metric_bigger"]),
    )
    data_hash = hash_training_data(dataset, loaders)
    return SearchSetup(config, base, task, profiles, data_hash, gpus, threads)


def choose_profiles(run: "PlainRun", statistics: DataStatistics) -> dict[str, dict[str, Any]]:
    """What each profile changes in the plain run; one that changes nothing new is left out.

    Args:
        run: the plain run.
        statistics: what the rule knows of its data.
    """
    set_values = collect_decided_keys(run.config, RULE_KEYS & run.decided_keys, run.train)
    profiles = {PLAIN: dict[str, Any](), DEFAULTS: _list_defaults(run.user_values)}
    for name in automatic_settings.PROFILES:
        choices = automatic_settings.scale_profile(name, statistics, set_values)
        profiles[name] = {key: choice.value for key, choice in choices.items()}
    chosen: dict[str, dict[str, Any]] = {}
    for name, profile in {**profiles, **VARIATIONS}.items():
        try:
            settings = run.find_changes(profile)
        except ValueError as error:
            logger.info("search: profile %s is left out: %s", name, error)
            continue
        if settings not in chosen.values() and run.has_histories_for(settings):
            chosen[name] = settings
    return chosen


def _list_defaults(user_values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command has with `auto: false`, but for its loss, its rows and its ranking."""
    keys = collect_keys(Role.MODEL, Role.TRAINING, Role.LENGTH) - _KEPT_KEYS - set(SCALE_FREE_KEYS)
    settings = resolve_settings(build_config({**user_values, "auto": False}))
    return {key: value for key, value in settings.items() if key in keys}


@dataclass(frozen=True)
class PlainRun:
    """The run as the user asked for it, which profiles change."""

    config: RunConfig
    base: dict[str, Any]
    """Keys that make the run."""
    user_values: dict[str, Any]
    dataset: HistoryDataset
    """With rows."""
    train: HistoryDataset
    """Its training part."""

    @property
    def decided_keys(self) -> frozenset[str]:
        """Keys that the user has set, and those that they decide; no profile changes them."""
        return list_decided_keys(self.user_values)

    def find_scale_free_keys(self) -> dict[str, Any]:
        """What the run has in targets and in shares of an epoch, of the keys that are not decided."""
        found = find_scale_free_keys(self.config.run_settings, len(self.train), self.train.n_targets)
        return {key: round_setting(found[key]) for key in found if key not in self.decided_keys}

    def find_changes(self, profile: Mapping[str, Any]) -> dict[str, Any]:
        """The settings in which a profile differs from the run, in scale-free keys where there are any.

        Raises:
            ValueError: it does not go together with what the user has set.
        """
        own = {key: value for key, value in profile.items() if key not in self.decided_keys}
        values = override_settings(self.base, own)
        if values.get("decay_per_epoch") and "learner" not in self.decided_keys:
            values["learner"] = "adamw"
        config = build_config(values, find_config_file())
        resolved = resolve_settings(config)
        n_rows, n_targets = len(self.train), self.train.n_targets
        resolved |= resolve_scale_free_keys(config.run_settings, n_rows, n_targets)
        settings = {}
        for key, value in resolved.items():
            if key not in SCALE_FREE_KEYS and value != self.base.get(key):
                settings[key] = value
        scaled = find_scale_free_keys(RunSettings.read(resolved), n_rows, n_targets)
        for key, plain_key in SCALE_FREE_KEYS.items():
            if plain_key in settings and self.user_values.get(key):
                del settings[plain_key]  # what the user's key comes to with these settings
            elif plain_key in settings and key not in self.decided_keys:
                del settings[plain_key]
                settings[key] = round_setting(own.get(key, scaled.get(key, RunSettings.defaults()[key])))
        if "MAX_ITEM_LIST_LENGTH" in settings:  # there are other rows, whose steps keep their targets
            settings = {**self.find_scale_free_keys(), **settings}
        return settings

    def has_histories_for(self, settings: Mapping[str, Any]) -> bool:
        """Whether more than a few histories are longer than those of the run, if the settings' are."""
        plain_length = self.base["MAX_ITEM_LIST_LENGTH"]
        if settings.get("MAX_ITEM_LIST_LENGTH", 0) <= plain_length:
            return True
        histories = self.dataset.histories
        assert histories is not None
        return bool(np.quantile(histories.end - histories.start, _COVERED_SHARE) > plain_length)


def _name_search(config: Config, user_values: Mapping[str, Any]) -> str:
    """The same for the same command, another one where other keys are set or searched."""
    fixed = {key: user_values[key] for key in sorted(user_values) if key not in MACHINE_KEYS}
    tried = [automatic_settings.PROFILES, VARIATIONS, repr(RULES)]
    digest = sha256(json.dumps([fixed, *tried], default=str).encode()).hexdigest()[:6]
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
    could_vary = {*RULES, *RULE_KEYS, *SCALE_FREE_KEYS.values()}
    could_vary |= {key for profile in VARIATIONS.values() for key in profile}
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
