"""Search settings with Optuna: a study in a journal file, its trials, and their table."""

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import pandas as pd

from m2rec.errors import UserError, format_one_line
from m2rec.experiments.search_plan import SearchPlan
from m2rec.git import read_commit
from m2rec.yaml_values import format_argument, format_value

try:
    import optuna
except ModuleNotFoundError:  # check_optuna says how to get it
    optuna = None

logger = logging.getLogger("tune")

TRIAL_COLUMNS = ("trial", "state", "value", "trained_epochs", "best_epoch", "seconds", "commit")
TRIAL_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}  # those that have ended
MAX_SHOWN_TRIALS = 5
MAX_CONFIG_DRAWS = 20  # draws that are tried before the fixed settings are reported as invalid

Watch = Callable[[int, float], bool]
"""Called after each epoch with its number and score; returns whether to stop the training."""
Settings = dict[str, Any]
Train = Callable[[Settings, Watch, dict[str, Any]], float | None]
"""Train with settings and a watch; notes about the training go into the dict, also if it fails.

Returns the best score, None if it was stopped.
"""


def check_optuna() -> None:
    """Check that Optuna is installed, and silence it.

    Raises:
        ValueError: Optuna is missing.
    """
    if optuna is None:
        raise UserError('Optuna is missing: pip install -c constraints.txt -e ".[tune]"')
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def list_example_settings(plan: SearchPlan) -> list[dict[str, Any]]:
    """Settings with the first value of each searched key, then with random values."""
    random = Random(0)
    examples = []
    for number in range(1 + MAX_CONFIG_DRAWS):
        example = dict(plan.fixed)
        for key, search_range in plan.search.items():
            values = search_range
            if isinstance(search_range, dict):
                values = [search_range["low"], search_range["high"]]
            example[key] = random.choice(values) if number else values[0]
        examples.append(example)
    return examples


def open_study(plan: SearchPlan, folder: Path, settings: Mapping[str, Any], maximize: bool) -> "optuna.Study":
    """Create the study or join it.

    Args:
        plan: the study's.
        folder: of the study's runs; the study itself is beside it.
        settings: what all trials have in common; a study keeps the settings that it was started with.
        maximize: whether a higher value is better.

    Raises:
        ValueError: the file is not a study, or the study has other settings.
    """
    # absolute, because the link that locks it would lead nowhere from another folder, and never go stale
    path = folder.with_name(f"{plan.study}.log").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.NopPruner()
    if plan.pruner:
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=plan.pruner.startup_trials,
            n_warmup_steps=plan.pruner.warmup_epochs,
        )
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        study = optuna.create_study(
            study_name=plan.study,
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize" if maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an Optuna study ({format_one_line(error)}); move it away") from error
    _check_same_settings(study, plan, {**settings, "search": plan.search})
    return study


def _check_same_settings(study: "optuna.Study", plan: SearchPlan, settings: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(settings, default=str))  # as they come back from the file
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", now)
        return
    for key, old in before.items():  # a key that is newer than the study is not compared
        new = now.get(key)
        if old != new:
            reason = f"was started with {key}: {old}, not {new}"
            raise UserError(f"study: {plan.study!r} {reason}; name another study")


def run_trials(study: "optuna.Study", plan: SearchPlan, train: Train) -> None:
    """Run trials until all of the plan have ended."""
    ended = tuple(optuna.trial.TrialState[name] for name in TRIAL_STATES)
    trials = study.get_trials(deepcopy=False, states=ended)
    if len(trials) >= plan.trials:
        return
    enough = optuna.study.MaxTrialsCallback(plan.trials, states=ended)
    commit = read_commit()  # as it was imported, whatever is committed meanwhile

    def run_trial(trial: "optuna.Trial") -> float:
        return _run_trial(trial, plan, train, commit)

    study.optimize(run_trial, catch=ValueError, callbacks=[_log_trial, enough], gc_after_trial=True)


def _run_trial(trial: "optuna.Trial", plan: SearchPlan, train: Train, commit: str | None) -> float:
    """Train with drawn settings; returns the best score.

    Raises:
        ValueError: the settings are refused, or training diverged.
        optuna.TrialPruned: the pruner ended it.
    """
    # a seed per trial: two workers draw differently, and a resumed study draws as one that never stopped
    seed = plan.seed + trial.number
    trial.study.sampler = optuna.samplers.TPESampler(seed=seed)
    drawn = {}
    for key, search_range in plan.search.items():
        drawn[key] = suggest_setting(trial, key, search_range)

    def watch(epoch: int, score: float) -> bool:
        trial.report(score, epoch)
        return bool(trial.should_prune())

    start = perf_counter()
    notes: dict[str, Any] = {"commit": commit}
    try:
        score = train({**plan.fixed, **drawn}, watch, notes)
    except ValueError as error:
        reason = format_one_line(error)
        logger.warning("trial %s failed, %s: %s", trial.number, format_arguments(drawn), reason)
        raise
    finally:
        notes["seconds"] = round(perf_counter() - start, 1)
        for key, value in notes.items():
            trial.set_user_attr(key, value)
    if score is None:
        raise optuna.TrialPruned
    return score


def suggest_setting(trial: "optuna.Trial", key: str, search_range: dict[str, Any] | list[Any]) -> Any:
    """A value of a list, or a number of a range; a whole number if all of the range are."""
    if isinstance(search_range, list):
        return trial.suggest_categorical(key, search_range)
    for name in ("low", "high", "step"):
        if type(search_range.get(name, 1)) is not int:
            return trial.suggest_float(key, **search_range)
    return trial.suggest_int(key, **search_range)


def _log_trial(study: "optuna.Study", trial: "optuna.trial.FrozenTrial") -> None:
    """Log a trial that did not fail."""
    state = TRIAL_STATES[trial.state.name]
    if state == "failed":
        return
    notes = trial.user_attrs
    logger.info(
        "trial %s %s, %s: %.4f after %s epochs, %s s",
        trial.number,
        state,
        format_arguments(trial.params),
        trial.value,
        notes["trained_epochs"],
        notes["seconds"],
    )


def format_trials_csv(trials: Iterable["optuna.trial.FrozenTrial"], searched: Iterable[str]) -> str:
    """All trials as CSV, in order: `TRIAL_COLUMNS`, then a column per searched key."""
    rows = []
    for trial in trials:
        row = {
            "trial": trial.number,
            "state": TRIAL_STATES.get(trial.state.name, "running"),
            "value": trial.value,
            **trial.user_attrs,
        }
        for key, value in trial.params.items():
            row[key] = format_value(value)
        rows.append(row)
    frame = pd.DataFrame(rows, columns=[*TRIAL_COLUMNS, *searched], dtype=object)
    return str(frame.to_csv(index=False, lineterminator="\n"))


def format_study_summary(study: "optuna.Study", plan: SearchPlan, metric: str) -> str:
    """How many trials ended how, the best of them, and the command of the best.

    Raises:
        ValueError: no trial is complete.
    """
    states = [trial.state.name for trial in study.trials]
    counts = ", ".join(f"{states.count(state)} {word}" for state, word in TRIAL_STATES.items())
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    if not complete:
        raise UserError(f"study: no trial of {plan.study!r} is complete ({counts})")
    is_maximized = study.direction.name == "MAXIMIZE"
    complete.sort(key=attrgetter("value"), reverse=is_maximized)
    rows = []
    for trial in complete[:MAX_SHOWN_TRIALS]:
        row = {
            "trial": trial.number,
            metric: f"{trial.value:.4f}",
            "trained_epochs": trial.user_attrs["trained_epochs"],
            "best_epoch": trial.user_attrs["best_epoch"],
        }
        for key in plan.search:
            value = trial.params[key]
            row[key] = f"{value:.4g}" if isinstance(value, float) else format_value(value)
        rows.append(row)
    table = pd.DataFrame(rows).to_string(index=False)
    settings = {**plan.fixed, **complete[0].params}
    command = f"python run_mm.py {format_arguments(settings)}"
    return f"\n{plan.study}: {counts}; on validation:\n{table}\n{command}"


def format_arguments(settings: Mapping[str, Any]) -> str:
    """Settings as arguments of run_mm.py in a shell."""
    arguments = []
    for key, value in settings.items():
        argument = format_argument(key, value)
        arguments.append(shlex.quote(argument))
    return " ".join(arguments)
