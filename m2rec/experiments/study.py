"""A study of Optuna's in a journal file: opening it, ending its trials, and which of them is best."""

import json
import logging
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m2rec.errors import UserError, format_one_line
from m2rec.experiments.search_plan import Pruner
from m2rec.run_folder import RunFolder, list_run_folders
from m2rec.yaml_values import format_argument

try:
    import optuna
except ModuleNotFoundError:  # check_optuna says how to get it
    optuna = None

logger = logging.getLogger(__name__)

TRIAL_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}  # those that have ended
PROGRESS_KEY = "progress"
"""A trial's note of its seconds, its epochs and who trains it; one note, as each is a write to the disk."""


def check_optuna() -> None:
    """Check that Optuna is installed, and silence it.

    Raises:
        ValueError: Optuna is missing.
    """
    if optuna is None:
        raise UserError('Optuna is missing: pip install -c constraints.txt -e ".[tune]"')
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def find_study_file(folder: Path) -> Path:
    """The journal of the study whose trials are in this folder.

    It is absolute, because the link that locks it would lead nowhere from another folder, and never go stale.
    """
    return folder.with_name(f"{folder.name}.log").resolve()


def make_median_pruner(pruner: Pruner | None) -> Any:
    """The pruner of a search file."""
    if pruner is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=pruner.startup_trials,
        n_warmup_steps=pruner.warmup_epochs + 1,  # steps are the numbers of epochs that are over
    )


def make_halving_pruner(first_epochs: int) -> Any:
    """Keeps the better half of all trials after `first_epochs`, after twice as many, and so on."""
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=first_epochs, reduction_factor=2)


def open_study(folder: Path, maximize: bool, pruner: Any) -> "optuna.Study":
    """Create the study or join it.

    Args:
        folder: of the study's trials; the study itself is beside it, and has its name.
        maximize: whether a higher value is better.
        pruner: Optuna's, which ends hopeless trials.

    Raises:
        ValueError: the file is not a study.
    """
    path = find_study_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        return optuna.create_study(
            study_name=folder.name,
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize" if maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an Optuna study ({format_one_line(error)}); move it away") from error


def check_same_settings(study: "optuna.Study", settings: Mapping[str, Any], cure: str) -> None:
    """Check that a study has these settings; a new one keeps them.

    Args:
        study: the study.
        settings: what all its trials have in common.
        cure: what to do if they differ.

    Raises:
        ValueError: the study has others.
    """
    now = json.loads(json.dumps(settings, default=str))  # as they come back from the file
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", now)
        return
    for key, old in before.items():  # a key that is newer than the study is not compared
        new = now.get(key)
        if old != new:
            raise UserError(f"study: {study.study_name!r} was started with {key}: {old}, not {new}; {cure}")


def end_trial(
    study: "optuna.Study",
    folder: Path,
    number: int,
    state: str,
    value: float | None = None,
    reason: str = "",
) -> None:
    """Store how a trial ended, and remove what its runs leave but settings and history."""
    trial = study.get_trials(deepcopy=False)[number]
    if reason:
        study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
    study.tell(number, value, state=optuna.trial.TrialState[state])
    for run in list_run_folders(find_trial_folder(folder, number)):
        _remove_run_files(run)


def _remove_run_files(run: RunFolder) -> None:
    """A trial's weights and training state are needed no more: the final run makes its own."""
    for path in run.path.iterdir():
        if path in (run.config_file, run.history_file):
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def find_trial_folder(folder: Path, number: int) -> Path:
    """The folder of a trial's runs."""
    return folder / f"trial-{number:04}"


def is_maximized(study: "optuna.Study") -> bool:
    """Whether a higher value is better."""
    return bool(study.direction.name == "MAXIMIZE")


def get_best_score(trial: "optuna.trial.FrozenTrial", maximize: bool) -> float | None:
    """The best score of a trial so far, ended or not; None without one."""
    scores = list(trial.intermediate_values.values())
    if trial.state.name == "COMPLETE":
        return float(trial.value)
    if trial.state.name == "FAIL" or not scores:
        return None
    return float(max(scores) if maximize else min(scores))


def rank_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """All trials that have a score and did not fail, the best first."""
    maximize = is_maximized(study)
    scored = []
    for trial in study.get_trials(deepcopy=False):
        score = get_best_score(trial, maximize)
        if score is not None:
            scored.append((-score if maximize else score, trial.number, trial))
    return [trial for _, _, trial in sorted(scored, key=lambda item: item[:2])]


def find_best_trial(study: "optuna.Study") -> "optuna.trial.FrozenTrial | None":
    """The trial with the best score so far, whether it was trained to its end or not."""
    return next(iter(rank_trials(study)), None)


def log_trial(trial: "optuna.trial.FrozenTrial") -> None:
    """Log a trial that has ended."""
    state, notes, progress = TRIAL_STATES[trial.state.name], trial.user_attrs, get_progress(trial)
    text = f"{trial.number} ({notes['origin']}) {state}" if "origin" in notes else f"{trial.number} {state}"
    if settings := format_arguments(notes.get("settings", {})):
        text += f", {settings}"
    if state == "failed":
        logger.warning("trial %s: %s", text, notes.get("reason", "stopped"))
        return
    logger.info(
        "trial %s: %.4f after %s epochs, %s s",
        text,
        trial.value,
        progress.get("trained_epochs", "some"),
        progress["seconds"],
    )


def get_progress(trial: Any) -> dict[str, Any]:
    """`worker`, `paused`, `commit`, `seconds`, `trained_epochs`, `best_epoch`, `parameters`, if known."""
    return dict(trial.user_attrs.get(PROGRESS_KEY, {}))


def count_states(study: "optuna.Study") -> str:
    """Such as `3 complete, 4 pruned, 0 failed`."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return ", ".join(f"{states.count(state)} {word}" for state, word in TRIAL_STATES.items())


def format_arguments(settings: Mapping[str, Any]) -> str:
    """Settings as arguments of run_mm.py in a shell."""
    arguments = []
    for key, value in settings.items():
        argument = format_argument(key, value)
        arguments.append(shlex.quote(argument))
    return " ".join(arguments)
