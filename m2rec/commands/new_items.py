"""How well are cold-start items ranked, unknown to training? python scripts/new_items.py --dataset=NAME.

A share of the items with text is taken out of the data with all their interactions, and M2Rec is trained on
the rest. Then the items are added to the trained model by their text vectors alone, and the users whose last
item is one of them are tested: that item is ranked among all items, old and new, but those that the user had
before; one that the user had before is a miss. Any key of run_mm.py can be given. One line per seed goes into
the output file.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2rec.cli import Parser, run_command
from m2rec.errors import UserError
from m2rec.yaml_values import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    return run_command(
        "new_items.py",
        lambda: measure_seeds(arguments),
        when_stopped="; finished seeds have their lines",
    )


def measure_seeds(arguments: Sequence[str] | None) -> None:
    """Train and measure once for each seed, and append a line of CSV for each."""
    parser = Parser("new_items.py", __doc__)
    parser.add_argument("--share", type=float, default=0.1, help="share of the items taken out; default: 0.1")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="of choice and training; default: 1"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/new-items.csv"),
        help="CSV file that gets a line per seed; default: runs/new-items.csv",
    )
    options, keys = parser.parse_known_args(arguments)
    if not 0 < options.share < 1:
        raise UserError(f"--share: expected a number between 0 and 1, got {options.share}")
    from m2rec.commands.new_items_trial import COLUMNS, measure_new_items  # loads PyTorch and RecBole

    check_output(options.output, COLUMNS)
    for seed in options.seeds:
        row = measure_new_items({**parse_arguments(keys), "seed": seed}, options.share)
        sys.stdout.write("".join(f"{name:<24}{row[name]}\n" for name in COLUMNS))
        append_row(options.output, row, COLUMNS)


def check_output(path: Path, columns: Sequence[str]) -> None:
    """Make the output's folder.

    Raises:
        ValueError: the file exists and has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(columns):
        raise UserError(f"--output: {path} has other columns; give another file")


def append_row(path: Path, row: dict[str, Any], columns: Sequence[str]) -> None:
    """Add a line to a CSV file, and its header to a new file."""
    import pandas as pd

    frame = pd.DataFrame([row], columns=list(columns))
    frame.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")
