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

study, trials and search must be there. What the file leaves open is as for run_mm.py --auto=false:
config.yaml, then the defaults. The first ten trials are random, the others Optuna's TPE; with one worker the
same file and seed give the same trials.

A trial is a run without its test, so no test row is scored. Its value is valid_metric at the best epoch,
of a pruned one at its best so far. Settings that are refused, or that diverge, are a failed trial, and the
study continues; fixed keys or data that can't be used end it before the first. At the end the best five are
printed, with the command that trains and tests the best, and all trials are in FILE.csv.

The study is a file, runs/tune/NAME.log (Optuna's JournalStorage), and its runs are in runs/tune/NAME/;
`runs` is runs_dir. Every process with the same command joins the study. A trial that was stopped, by Ctrl-C
or by a kill, is resumed from its last checkpoint. Of a trial that has ended, config.yaml and history.csv
stay.

`python run_mm.py --search=30m` needs no file: it races the shipped profiles and searches around the best.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2rec.cli import name_commands_in, run_command
from m2rec.errors import UserError
from m2rec.settings import MACHINE_KEYS
from m2rec.storage import write_text
from m2rec.yaml_values import parse_arguments

if TYPE_CHECKING:
    from m2rec.compat import Config
    from m2rec.experiments.search_plan import SearchPlan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(name_commands_in(__doc__))
        return 0
    style = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=style, datefmt="%H:%M:%S", force=True)
    logging.getLogger("m2rec.experiments").setLevel(logging.INFO)
    return run_command("tune", lambda: run_study(arguments))


def run_study(arguments: Sequence[str]) -> None:
    """Read the plan, join the study, run trials until all are done, print the table and write FILE.csv.

    Raises:
        ValueError: the plan, its fixed keys or its data are wrong, or no trial is complete.
    """
    from m2rec.experiments import search, study, trial_tables
    from m2rec.experiments.search_plan import SearchPlan
    from m2rec.experiments.search_space import FixedSpace

    study.check_optuna()

    from m2rec.commands import trials  # loads PyTorch and RecBole
    from m2rec.training.configuration import collect_known_keys, resolve_settings

    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
        raise UserError(f"expected one FILE.yaml, got {' '.join(files) or 'none'}; --help shows its format")
    path = Path(files[0])
    given = parse_arguments(argument for argument in arguments if argument.startswith("--"))
    plan = SearchPlan.read(path, given, collect_known_keys())
    config = find_valid_config(plan)
    if "state" in plan.fixed:
        logging.getLogger("m2rec").setLevel(config["state"])
    trials.check_data(config)
    folder = Path(config["runs_dir"]) / "tune" / plan.study
    opened = study.open_study(folder, config["valid_metric_bigger"], study.make_median_pruner(plan.pruner))
    varied = {*plan.search, *MACHINE_KEYS} - {"data_path"}  # another folder may hold other data
    settings = {key: value for key, value in resolve_settings(config).items() if key not in varied}
    study.check_same_settings(opened, {**settings, "search": plan.search}, "name another study")
    task = search.SearchTask(folder, plan.fixed, FixedSpace(plan.search), trials=plan.trials, seed=plan.seed)
    search.run_trials(opened, task, trials.TrialTrainer())
    write_text(path.with_suffix(".csv"), trial_tables.format_trials_csv(opened.trials, plan.search))
    print(trial_tables.format_study_summary(opened, plan, config["valid_metric"]))


def find_valid_config(plan: "SearchPlan") -> "Config":
    """The settings with the first value of each searched key, or if they are invalid, with others.

    Raises:
        ValueError: the fixed keys are refused with all values that were tried.
    """
    from m2rec.commands.config_file import find_config_file
    from m2rec.experiments.search import list_example_settings
    from m2rec.training.configuration import build_config

    errors = []
    for settings in list_example_settings(plan):
        try:
            return build_config(settings, find_config_file())
        except ValueError as error:
            errors.append(error)
    raise errors[0]
