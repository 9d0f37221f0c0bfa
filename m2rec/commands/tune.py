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
continues; fixed keys or data that can't be used end it before the first. At the end the best five are
printed, with the command that trains and tests the best, and all trials are in FILE.csv.

The study is a file, runs/tune/NAME.log (Optuna's JournalStorage), and its runs are in runs/tune/NAME/;
`runs` is runs_dir. Every process with the same command joins the study, and a restarted worker
resumes. A worker starts no trial once `trials` have ended, complete, pruned or failed; trials of other
workers then still end, so that n workers can make up to n - 1 more. The trial of a worker that was killed
stays `running` and is not counted. Ctrl-C marks the trial as failed.
"""

from __future__ import annotations

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import logging
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m2rec.cli import run_command
from m2rec.compat import Config
from m2rec.errors import UserError
from m2rec.experiments import search
from m2rec.experiments.search_plan import SearchPlan
from m2rec.settings import MACHINE_KEYS
from m2rec.storage import write_text
from m2rec.training import run
from m2rec.training.configuration import build_config, collect_known_keys, resolve_settings
from m2rec.yaml_values import parse_arguments

CONFIG_PATH = Path(__file__).parents[2] / "config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    style = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=style, datefmt="%H:%M:%S", force=True)
    search.logger.setLevel(logging.INFO)
    return run_command("tune.py", lambda: run_study(arguments))


def run_study(arguments: Sequence[str]) -> None:
    """Read the plan, join the study, run trials until all are done, print the table and write FILE.csv.

    Raises:
        ValueError: the plan, its fixed keys or its data are wrong, or no trial is complete.
    """
    search.check_optuna()
    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
        raise UserError(f"expected one FILE.yaml, got {' '.join(files) or 'none'}; --help shows its format")
    path = Path(files[0])
    given = parse_arguments(argument for argument in arguments if argument.startswith("--"))
    plan = SearchPlan.read(path, given, collect_known_keys())
    config = check_fixed_settings(plan)
    folder = Path(config["runs_dir"]) / "tune" / plan.study
    study = open_study(plan, config, folder)
    search.run_trials(study, plan, partial(train_trial, folder))
    write_text(path.with_suffix(".csv"), search.format_trials_csv(study.trials, plan.search))
    print(search.format_study_summary(study, plan, config["valid_metric"]))


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
