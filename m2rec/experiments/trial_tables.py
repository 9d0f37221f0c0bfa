"""The trials of a search as a table and as CSV."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from m2rec.cli import name_command
from m2rec.errors import UserError
from m2rec.experiments.search_plan import SearchPlan
from m2rec.experiments.study import (
    TRIAL_STATES,
    count_states,
    format_arguments,
    get_best_score,
    get_progress,
    is_maximized,
    rank_trials,
)
from m2rec.yaml_values import format_value

if TYPE_CHECKING:
    import optuna

TRIAL_COLUMNS = ("trial", "state", "value", "trained_epochs", "best_epoch", "seconds", "commit")
MAX_SHOWN_TRIALS = 5


def format_trials_csv(
    trials: Iterable["optuna.trial.FrozenTrial"],
    searched: Iterable[str],
    plain: Mapping[str, Any] | None = None,
) -> str:
    """All trials as CSV, in order: `TRIAL_COLUMNS`, the searched keys, then others in which trials differ.

    Args:
        trials: of a study.
        searched: keys that have a range.
        plain: the values of the keys that a trial leaves as they are.
    """
    begun = [trial for trial in trials if trial.state.name != "WAITING"]
    changed = [key for trial in begun for key in trial.user_attrs.get("settings", {})]
    keys = list(dict.fromkeys([*searched, *changed]))
    rows = []
    for trial in begun:
        row = {
            "trial": trial.number,
            "state": TRIAL_STATES.get(trial.state.name, "running"),
            "value": trial.value,
            **get_progress(trial),
        }
        settings = {**(plain or {}), **trial.user_attrs.get("settings", {})}
        row |= {key: format_value(settings[key]) for key in keys if key in settings}
        rows.append(row)
    frame = pd.DataFrame(rows, columns=[*TRIAL_COLUMNS, *keys], dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def format_study_summary(study: "optuna.Study", plan: SearchPlan, metric: str) -> str:
    """How many trials ended how, the best of them, and the command of the best.

    Raises:
        ValueError: no trial is complete.
    """
    counts = count_states(study)
    complete = [trial for trial in rank_trials(study) if trial.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"study: no trial of {plan.study!r} is complete ({counts})")
    table = format_trial_table(complete[:MAX_SHOWN_TRIALS], metric, list(plan.search), is_maximized(study))
    settings = {**plan.fixed, **complete[0].user_attrs["settings"]}
    command = f"{name_command('train')} {format_arguments(settings)}"
    return f"\n{plan.study}: {counts}; on validation:\n{table}\n{command}"


def format_search_summary(study: "optuna.Study", metric: str) -> str:
    """How many trials ended how, and the best of them, with the keys in which they differ."""
    best = rank_trials(study)[:MAX_SHOWN_TRIALS]
    keys = list(dict.fromkeys(key for trial in best for key in trial.user_attrs["settings"]))
    table = format_trial_table(best, metric, keys, is_maximized(study))
    return f"\n{count_states(study)}; on validation:\n{table}"


def format_trial_table(
    trials: Sequence["optuna.trial.FrozenTrial"], metric: str, keys: Sequence[str], maximize: bool
) -> str:
    """A line per trial: its score, its length, and its value of each key, blank where it has none."""
    rows = []
    for trial in trials:
        row = {
            "trial": trial.number,
            **_describe_origin(trial),
            metric: f"{get_best_score(trial, maximize):.4f}",
            "trained_epochs": get_progress(trial).get("trained_epochs", ""),
            "best_epoch": get_progress(trial).get("best_epoch", ""),
        }
        settings = trial.user_attrs["settings"]
        for key in keys:
            row[key] = format_setting(settings[key]) if key in settings else ""
        rows.append(row)
    return str(pd.DataFrame(rows).to_string(index=False))


def _describe_origin(trial: "optuna.trial.FrozenTrial") -> dict[str, str]:
    """What a trial of a search around profiles started from, and how it ended."""
    if "origin" not in trial.user_attrs:
        return {}
    return {"from": trial.user_attrs["origin"], "state": describe_state(trial)}


def describe_state(trial: "optuna.trial.FrozenTrial") -> str:
    """`complete`, `pruned`, `failed`, `running`, or `paused` for one that no worker is training."""
    if trial.state.name == "RUNNING":
        return "paused" if get_progress(trial).get("paused") else "running"
    return TRIAL_STATES[trial.state.name]


def format_setting(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)
