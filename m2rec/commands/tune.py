"""Search settings on validation: python scripts/tune.py FILE.yaml [--trials=N] [--key=value ...].

FILE.yaml:

    study: m2rec-ml-100k         # name
    trials: 30                   # in all, over all workers
    seed: 2020                   # of the search; the runs have their own, fixed: {seed: 1}
    fixed:                       # keys of every run, as in config.yaml; --key=value is stronger
      dataset: ml-100k
    search:                      # keys to search, and how each is drawn
      learning_rate: {low: 0.0003, high: 0.01, log: true}
      dropout_prob: {low: 0.1, high: 0.6, step: 0.1}
      n_layers: {low: 1, high: 4}     # whole numbers all through: a whole number
      hidden_size: [64, 128]          # a list: one of these
    pruner:                      # stops a trial below the median of the complete ones at the same epoch;
      warmup_epochs: 5           # never in its first 5 epochs,
      startup_trials: 5          # nor before 5 trials are complete. Without `pruner` none is stopped.

study, trials and search must be there. What the file leaves open is as for run_mm.py: config.yaml, then
the defaults. The first ten trials are random, the others Optuna's TPE; with one worker the same file and
seed give the same trials.

A trial is a run without its test, so no test row is scored. Its value is valid_metric at the best epoch;
of a pruned one, at its last. Settings that are refused, or that diverge, are a failed trial, and the study
goes on; fixed keys or data that can't be used end it before the first. At the end the best five are
printed, with the command that trains and tests the best, and all trials are in FILE.csv.

The study is a file, runs/tune/NAME.log (Optuna's JournalStorage), and its runs are in runs/tune/NAME/;
`runs` is runs_dir. Every process with the same command joins the study, and one that is started again goes
on. A worker starts no trial once `trials` have ended, complete, pruned or failed; those that others have
under way then still end, so that n workers can make up to n - 1 more. The trial of a worker that was killed
stays `running`: it is not counted, and nobody waits for it. Ctrl-C marks the trial as failed.
"""

from __future__ import annotations

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import csv
import io
import json
import logging
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from m2rec.cli import run_command
from m2rec.compat import Config
from m2rec.errors import UserError, format_one_line
from m2rec.experiments.search_plan import SearchPlan
from m2rec.git import read_commit
from m2rec.settings import MACHINE_KEYS
from m2rec.storage import write_text
from m2rec.training import run
from m2rec.training.configuration import build_config, collect_known_keys, resolve_settings
from m2rec.yaml_values import format_argument, format_value, parse_arguments

try:
    import optuna
except ModuleNotFoundError:  # main says how to get it
    optuna = None

logger = logging.getLogger("tune")

CONFIG_PATH = Path(__file__).parents[2] / "config.yaml"
TRIAL_COLUMNS = ("trial", "state", "value", "trained_epochs", "best_epoch", "seconds", "commit")
TRIAL_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}  # those that have ended
MAX_SHOWN_TRIALS = 5
MAX_CONFIG_DRAWS = 20  # draws that are looked at before the fixed keys are blamed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    style = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=style, datefmt="%H:%M:%S", force=True)
    logger.setLevel(logging.INFO)
    return run_command("tune.py", lambda: run_study(arguments))


def run_study(arguments: Sequence[str]) -> None:
    """Read the plan, join the study, run trials until all are done, print the table and write FILE.csv.

    Raises:
        ValueError: the plan, its fixed keys or its data are wrong, or no trial is complete.
    """
    if optuna is None:
        raise UserError('Optuna is missing: pip install -c constraints.txt -e ".[tune]"')
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    files = [a for a in arguments if not a.startswith("--")]
    if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
        raise UserError(f"expected one FILE.yaml, got {' '.join(files) or 'none'}; --help shows its format")
    path = Path(files[0])
    plan = SearchPlan.read(
        path, parse_arguments(a for a in arguments if a.startswith("--")), collect_known_keys()
    )
    config = check_fixed_settings(plan)
    study = open_study(plan, config)
    ended = tuple(optuna.trial.TrialState[name] for name in TRIAL_STATES)
    if len(study.get_trials(deepcopy=False, states=ended)) < plan.trials:
        enough = optuna.study.MaxTrialsCallback(plan.trials, states=ended)
        code = read_commit()  # as it was imported, whatever is committed meanwhile
        objective = partial(run_trial, plan, get_study_folder(plan, config), code)
        study.optimize(objective, catch=ValueError, callbacks=[_log_trial, enough], gc_after_trial=True)
    write_text(path.with_suffix(".csv"), format_trials_csv(study.trials, plan.search))
    print(format_study_summary(study, plan, config["valid_metric"]))


def check_fixed_settings(plan: SearchPlan) -> Config:
    """Look for mistakes that no trial could mend: the fixed keys and the data.

    Returns:
        the settings of the study, with some value for each searched key.

    Raises:
        ValueError: the fixed keys are refused whatever is drawn, or the data can't be used.
    """
    config = _find_valid_config(plan)
    if "state" in plan.fixed:
        logging.getLogger("m2rec").setLevel(config["state"])
    _, (_, valid, _) = run.load_data(config)
    if not len(valid.dataset):
        raise UserError(f"dataset: {config['dataset']!r} has no validation rows, so nothing can be searched")
    return config


def _find_valid_config(plan: SearchPlan) -> Config:
    """The settings with the first value of each searched key, or if they don't fit, with others."""
    values = {
        key: how if isinstance(how, list) else [how["low"], how["high"]] for key, how in plan.search.items()
    }
    picks = Random(0)
    tries = [{key: choices[0] for key, choices in values.items()}]
    tries += [
        {key: picks.choice(choices) for key, choices in values.items()} for _ in range(MAX_CONFIG_DRAWS)
    ]
    errors = []
    for drawn in tries:
        try:
            return build_config({**plan.fixed, **drawn}, CONFIG_PATH)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def get_study_folder(plan: SearchPlan, config: Config) -> Path:
    """Where the runs of the study are; the study itself is beside it."""
    return Path(config["runs_dir"]) / "tune" / plan.study


def open_study(plan: SearchPlan, config: Config) -> optuna.Study:
    """Make the study or join it.

    Raises:
        ValueError: its file is no study, or one with other settings.
    """
    runs = get_study_folder(plan, config)
    # whole, because the link that locks it would lead nowhere from another folder, and never go stale
    path = runs.with_name(f"{plan.study}.log").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.NopPruner()
    if plan.pruner:
        startup, warmup = plan.pruner.startup_trials, plan.pruner.warmup_epochs
        pruner = optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup)
    try:
        backend = optuna.storages.journal.JournalFileBackend(str(path))
        study = optuna.create_study(
            study_name=plan.study,
            storage=optuna.storages.JournalStorage(backend),
            direction="maximize" if config["valid_metric_bigger"] else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no study of Optuna ({format_one_line(error)}); move it away") from error
    _check_same_settings(study, plan, config)
    return study


def _check_same_settings(study: optuna.Study, plan: SearchPlan, config: Config) -> None:
    """Values of other settings can't be compared: a study keeps those that it was started with."""
    varied = {*plan.search, *MACHINE_KEYS} - {"data_path"}  # elsewhere may be other data
    settings = {
        **{k: v for k, v in resolve_settings(config).items() if k not in varied},
        "search": plan.search,
    }
    now = json.loads(json.dumps(settings, default=str))  # as they come back from the file
    before = study.user_attrs.get("settings")
    if before is None:
        study.set_user_attr("settings", now)
        return
    for key in {**before, **now}:
        if key not in varied and before.get(key) != now.get(key):
            raise UserError(
                f"study: {plan.study!r} was started with {key}: {before.get(key)}, not {now.get(key)}; "
                f"name another study"
            )


def run_trial(plan: SearchPlan, runs_dir: Path, code: str | None, trial: optuna.Trial) -> float:
    """Train with drawn settings; returns valid_metric at the best epoch.

    Args:
        plan: the study's.
        runs_dir: where run folders go.
        code: the commit that is noted.
        trial: draws the settings.

    Raises:
        ValueError: the settings are refused, or training diverged.
        optuna.TrialPruned: the pruner ended it.
    """
    # a seed per trial: two workers never draw alike, and a study that goes on draws as one that never ended
    trial.study.sampler = optuna.samplers.TPESampler(seed=plan.seed + trial.number)
    drawn = {key: _suggest_setting(trial, key, how) for key, how in plan.search.items()}
    start, prepared = perf_counter(), None
    try:
        config = build_config({**plan.fixed, **drawn, "runs_dir": str(runs_dir)}, CONFIG_PATH)
        prepared = run.prepare_run(config)
        prepared.train(partial(_report_epoch, trial))
        score = float(prepared.trainer.best_valid_score)
        if not math.isfinite(score):
            raise UserError(f"valid_metric: {config['valid_metric']} was {score} all along; choose another")
        return score
    except run.TrainingStopped:
        raise optuna.TrialPruned from None
    except ValueError as error:
        logger.warning(
            "trial %s failed, %s: %s", trial.number, _format_arguments(drawn), format_one_line(error)
        )
        raise
    finally:
        trial.set_user_attr("seconds", round(perf_counter() - start, 1))
        trial.set_user_attr("commit", code)
        if prepared:
            prepared.trainer.remove_checkpoint()
            trial.set_user_attr("trained_epochs", len(prepared.trainer.train_loss_dict))
            trial.set_user_attr("best_epoch", prepared.trainer.best_epoch)
            trial.set_user_attr("parameters", prepared.n_parameters)


def _suggest_setting(trial: optuna.Trial, key: str, how: dict[str, Any] | list[Any]) -> Any:
    if isinstance(how, list):
        return trial.suggest_categorical(key, how)
    whole = all(type(how.get(name, 1)) is int for name in ("low", "high", "step"))
    return trial.suggest_int(key, **how) if whole else trial.suggest_float(key, **how)


def _report_epoch(trial: optuna.Trial, epoch: int, score: float) -> None:
    trial.report(score, epoch)
    if trial.should_prune():
        raise run.TrainingStopped


def _log_trial(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """One line for a trial that did not fail."""
    if trial.state.name != "FAIL":
        done, found = TRIAL_STATES[trial.state.name], trial.user_attrs
        words = f"{trial.value:.4f} after {found['trained_epochs']} epochs, {found['seconds']} s"
        logger.info("trial %s %s, %s: %s", trial.number, done, _format_arguments(trial.params), words)


def format_trials_csv(trials: Iterable[optuna.trial.FrozenTrial], searched: Iterable[str]) -> str:
    """All trials as CSV, in order: `TRIAL_COLUMNS`, then a column per searched key."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*TRIAL_COLUMNS, *searched], lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        attributes = {key: trial.user_attrs.get(key) for key in TRIAL_COLUMNS[3:]}
        state = TRIAL_STATES.get(trial.state.name, "running")
        drawn = {key: format_value(value) for key, value in trial.params.items()}
        writer.writerow({"trial": trial.number, "state": state, "value": trial.value, **attributes, **drawn})
    return file.getvalue()


def format_study_summary(study: optuna.Study, plan: SearchPlan, metric: str) -> str:
    """How many trials ended how, the best of them, and the command of the best.

    Raises:
        ValueError: no trial is complete.
    """
    trials = study.trials
    ends = [TRIAL_STATES.get(trial.state.name) for trial in trials]
    counts = ", ".join(f"{ends.count(state)} {state}" for state in TRIAL_STATES.values())
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"study: no trial of {plan.study!r} is complete ({counts})")
    bigger = study.direction.name == "MAXIMIZE"
    complete.sort(key=lambda trial: trial.value, reverse=bigger)
    head = ["trial", metric, "trained_epochs", "best_epoch", *plan.search]
    rows = [head]
    for trial in complete[:MAX_SHOWN_TRIALS]:
        found = [str(trial.user_attrs[key]) for key in head[2:4]]
        drawn = [_format_trial_value(trial.params[key]) for key in plan.search]
        rows.append([str(trial.number), f"{trial.value:.4f}", *found, *drawn])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    command = f"python run_mm.py {_format_arguments({**plan.fixed, **complete[0].params})}"
    return "\n".join(["", f"{plan.study}: {counts}; on validation:", *lines, command])


def _format_trial_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _format_arguments(values: Mapping[str, Any]) -> str:
    return " ".join(shlex.quote(format_argument(key, value)) for key, value in values.items())
