"""Does a longer history help than those in training? python scripts/history_lengths.py RUN [--data-path=DIR]

Ranks each test user's next item after the last 10, 20, 50, ... items of the history and after all
of it, with the weights of a run. The protocol is test_unseen: the whole history is left out of every ranking,
and a target that is in it is a miss.
Users are shown together and by the length of their history; a row of CSV per number of items.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import Parser, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("history_lengths.py", lambda: print_measurements(parse_options(arguments)))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("history_lengths.py", __doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data-path", "--data_path", help="folder that holds the data set's folder")
    parser.add_argument("--users", type=int, help="so many, evenly spread; all by default")
    return parser.parse_args(arguments)


def print_measurements(options: argparse.Namespace) -> None:
    """Print a CSV line for each length of the input."""
    import pandas as pd

    from m2rec.evaluation.history_length import measure_input_lengths
    from m2rec.evaluation.saved_model import collect_cases, sample_evenly
    from m2rec.serving.recommender import Recommender
    from m2rec.training.run import load_run_data

    recommender = Recommender.load(options.run, whole_history=True)
    _, _, (_, _, test) = load_run_data(options.run, data_path=options.data_path)
    rows = test.dataset
    chosen = sample_evenly(len(rows), options.users)
    cases = collect_cases(rows, chosen)
    if returning := cases.returning.sum():
        sys.stderr.write(f"{returning:,} of {len(cases.users):,} targets are in their history: misses\n")
    table = pd.DataFrame(measure_input_lengths(recommender, cases))
    table.to_csv(sys.stdout, index=False, lineterminator="\n")
