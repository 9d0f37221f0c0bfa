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

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from m2rec.cli import run_command
from m2rec.errors import UserError
from m2rec.storage import write_text
from m2rec.yaml_values import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    style = "%(asctime)s %(message)s"
    logging.basicConfig(level=logging.WARNING, format=style, datefmt="%H:%M:%S", force=True)
    logging.getLogger("m2rec.experiments.search").setLevel(logging.INFO)
    return run_command("tune.py", lambda: run_study(arguments))


def run_study(arguments: Sequence[str]) -> None:
    """Read the plan, join the study, run trials until all are done, print the table and write FILE.csv.

    Raises:
        ValueError: the plan, its fixed keys or its data are wrong, or no trial is complete.
    """
    from m2rec.commands import tune_study  # loads PyTorch and RecBole
    from m2rec.experiments import search
    from m2rec.experiments.search_plan import SearchPlan
    from m2rec.training.configuration import collect_known_keys

    search.check_optuna()
    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1 or not files[0].endswith((".yaml", ".yml")):
        raise UserError(f"expected one FILE.yaml, got {' '.join(files) or 'none'}; --help shows its format")
    path = Path(files[0])
    given = parse_arguments(argument for argument in arguments if argument.startswith("--"))
    plan = SearchPlan.read(path, given, collect_known_keys())
    config = tune_study.check_fixed_settings(plan)
    folder = Path(config["runs_dir"]) / "tune" / plan.study
    study = tune_study.open_study(plan, config, folder)
    search.run_trials(study, plan, partial(tune_study.train_trial, folder))
    write_text(path.with_suffix(".csv"), search.format_trials_csv(study.trials, plan.search))
    print(search.format_study_summary(study, plan, config["valid_metric"]))
