"""How well are cold-start items ranked, unknown to training? python scripts/new_items.py --dataset=NAME.

A share of the items with text is taken out of the data with all their interactions, and M2Rec is trained on
the rest. Then the items are added to the trained model by their text vectors alone, and the users whose last
item is one of them are tested: that item is ranked among all items, old and new, but those that the user had
before; one that the user had before is a miss. Any key of run_mm.py can be given. One line per seed goes into
the output file.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from m2rec.cli import Parser, run_command
from m2rec.compat import Config
from m2rec.errors import UserError
from m2rec.evaluation.cold_start import (
    GROUPS,
    MEASURES,
    choose_new_items,
    evaluate_new_items,
    write_remaining_data,
)
from m2rec.evaluation.saved_model import collect_cases
from m2rec.git import read_commit
from m2rec.serving.recommender import Recommender
from m2rec.settings import Role, collect_keys
from m2rec.text import vector_file
from m2rec.text.source import ensure_text_vectors
from m2rec.training.configuration import build_config, resolve_settings
from m2rec.training.recbole_keys import DataSettings
from m2rec.training.run import load_data, run_experiment
from m2rec.yaml_values import parse_arguments

DEFAULT_CONFIG = Path(__file__).parents[2] / "config.yaml"
# keys with columns of their own, and where files are
NON_SETTING_KEYS = collect_keys(Role.DATASET, Role.SEED, Role.FOLDER)
COLUMNS = ["dataset", "seed", "share", "commit", "settings", "items", "new_items"]
COLUMNS += [f"{group}.{measure}" for group in GROUPS for measure in MEASURES]


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
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
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
    check_output(options.output)
    for seed in options.seeds:
        row = measure_new_items({**parse_arguments(keys), "seed": seed}, options.share)
        sys.stdout.write("".join(f"{name:<24}{row[name]}\n" for name in COLUMNS))
        append_row(options.output, row)


def measure_new_items(given: dict[str, Any], share: float) -> dict[str, Any]:
    """Train without some items, add them by text, and rank them; a row for the output.

    Args:
        given: keys of run_mm.py.
        share: of the items with text that are taken out, between 0 and 1.

    Raises:
        ValueError: no item is taken out or remains, or the model can't have new items.
    """
    config = build_config(given, DEFAULT_CONFIG)
    check_model(config)
    dataset, (_, _, test) = load_data(config)
    assert dataset.histories is not None
    tokens = np.array(dataset.item_tokens)
    vectors = ensure_text_vectors(config, tokens[1:].tolist())
    if vectors is None:
        raise UserError(f"text_vectors: {config['dataset']} has none; make them with scripts/embed_items.py")
    names, raw, _ = vector_file.read_text_vectors(vectors)
    row_of = {name: row for row, name in enumerate(names) if raw[row].any()}
    taken = choose_new_items(np.isin(tokens, list(row_of)), share, config["seed"])
    data = Path(config["runs_dir"]) / "new-items" / f"{config['dataset']}-{share}-{config['seed']}"
    write_remaining_data(data, config["dataset"], dataset.histories, taken, tokens)
    remaining = {**DataSettings.defaults(), "data_path": str(data), "text_vectors": str(vectors.resolve())}
    run = run_experiment(build_config({**resolve_settings(config), **remaining}))
    recommender = Recommender.load(run.folder)
    added = tokens[taken].tolist()
    recommender.add_items(added, raw[[row_of[token] for token in added]])
    settings = {key: value for key, value in given.items() if key not in NON_SETTING_KEYS}
    return {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "share": share,
        "commit": read_commit(),
        "settings": json.dumps(settings, sort_keys=True),
        "items": len(tokens) - 1,
        "new_items": len(added),
        **evaluate_new_items(recommender, collect_cases(test.dataset), added),
    }


def check_model(config: Config) -> None:
    """Check that the model can have new items: its item table must have text.

    Raises:
        ValueError: the model is not M2Rec, its table has no text, or the split is by time.
    """
    settings = config.model_settings
    if settings is None:
        raise UserError(f"model: {config['variant']} can't rank an item by its text; set model: M2Rec")
    if settings.text_vectors == "none" or not settings.text_in_table:
        raise UserError("text_in_table: new items need text in the item table; leave it and text_vectors on")
    if config["benchmark_filename"]:
        raise UserError("benchmark_filename: not for new items; give whole histories in NAME.inter")
    if config["split"] != "leave_one_out":
        raise UserError(f"split: {config['split']!r} is not for new items; set leave_one_out")


def check_output(path: Path) -> None:
    """Make the output's folder.

    Raises:
        ValueError: the file exists and has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(COLUMNS):
        raise UserError(f"--output: {path} has other columns; give another file")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV file, and its header to a new file."""
    frame = pd.DataFrame([row], columns=COLUMNS)
    frame.to_csv(path, mode="a", header=not path.exists(), index=False, lineterminator="\n")
