"""How well items are ranked that training has never met: python scripts/new_items.py --dataset=NAME.

A share of the items with text is taken out of the data with all that anybody did with them, and
M2Rec is trained on the rest. Then the items are added to the trained model by their text vectors
alone, and the users whose last item is one of them are tested: that item is ranked among all items,
old and new, but those that the user had before; of equal scores it gets the worst place, and one that
the user had before is a miss. Any key of run_mm.py can be given. One line per seed goes into the
output file.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import csv
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from m2rec.cli import Parser, run_command
from m2rec.compat import Config
from m2rec.data.histories import NO_TARGET, Histories
from m2rec.errors import UserError
from m2rec.evaluation.metrics import compute_rank_metric
from m2rec.git import read_commit
from m2rec.serving.recommender import Recommender
from m2rec.settings import ModelSettings
from m2rec.text import vector_file
from m2rec.text.source import ensure_text_vectors
from m2rec.training.configuration import build_config, resolve_settings
from m2rec.training.provenance import list_item_tokens
from m2rec.training.run import load_data, run_experiment
from m2rec.yaml_values import parse_arguments

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = Path(__file__).parents[2] / "config.yaml"
K = 10
BATCH_SIZE = 256
NON_SETTING_KEYS = ("dataset", "seed", "data_path", "runs_dir")  # no settings, or columns of their own
REMAINING_DATA_KEYS = {  # of the data that `write_remaining_data` writes, which are filtered already
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "TIME_FIELD": "timestamp",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "field_separator": "\t",
    "val_interval": None,
    "user_inter_num_interval": "[0,inf)",
    "item_inter_num_interval": "[0,inf)",
}
GROUPS = ("new", "new_among_new", "old")
COLUMNS = [
    *("dataset", "seed", "share", "commit", "settings", "items", "new_items"),
    *(f"{group}.{value}" for group in GROUPS for value in ("users", f"hit@{K}", f"ndcg@{K}", f"chance@{K}")),
]


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
        ValueError: nothing is taken out or left, or the model can't have new items.
    """
    config = build_config(given, DEFAULT_CONFIG)
    check_model(config)
    dataset, _ = load_data(config)
    histories = dataset.histories
    assert histories is not None
    tokens = np.array(list_item_tokens(dataset))
    file = ensure_text_vectors(config, tokens[1:].tolist())
    if file is None:
        raise UserError(f"text_vectors: {config['dataset']} has none; make them with scripts/embed_items.py")
    names, raw, _ = vector_file.read_text_vectors(file)
    row_of = {name: i for i, name in enumerate(names) if raw[i].any()}
    taken = choose_new_items(np.isin(tokens, list(row_of)), share, config["seed"])
    data = Path(config["runs_dir"]) / "new-items" / f"{config['dataset']}-{share}-{config['seed']}"
    write_remaining_data(data, config["dataset"], histories, taken, tokens)
    without = {**REMAINING_DATA_KEYS, "data_path": str(data), "text_vectors": str(file.resolve())}
    recommender = Recommender.load(
        run_experiment(build_config({**resolve_settings(config), **without})).folder
    )
    added = tokens[taken].tolist()
    recommender.add_items(added, raw[[row_of[token] for token in added]])
    others = {key: value for key, value in given.items() if key not in NON_SETTING_KEYS}
    return {
        "dataset": config["dataset"],
        "seed": config["seed"],
        "share": share,
        "commit": read_commit(),
        "settings": json.dumps(others, sort_keys=True),
        "items": len(tokens) - 1,
        "new_items": len(added),
        **evaluate_new_items(recommender, histories, tokens, set(added)),
    }


def check_model(config: Config) -> None:
    """A model can have new items if its item table has text.

    Raises:
        ValueError: it is another model, it has no text in its table, or the split is by time.
    """
    if config["model"] != "M2Rec":
        raise UserError(f"model: {config['variant']} can't rank an item by its text; set model: M2Rec")
    settings = ModelSettings.read(config)
    if settings.text_vectors == "none" or not settings.text_in_table:
        raise UserError("text_in_table: new items need text in the item table; leave it and text_vectors on")
    if config["benchmark_filename"]:
        raise UserError("benchmark_filename: not for new items; give whole histories in NAME.inter")
    if config["split"] != "leave_one_out":
        raise UserError(f"split: {config['split']!r} is not for new items; set leave_one_out")


def choose_new_items(with_text: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(V,), which items are taken out, at random among those with text.

    Raises:
        ValueError: none is, or none is left.
    """
    candidates = np.flatnonzero(with_text)
    taken = np.zeros_like(with_text)
    taken[np.random.default_rng(seed).permutation(candidates)[: round(share * len(candidates))]] = True
    if not taken.any() or taken[1:].all():
        raise UserError(f"--share: {share} takes out {taken.sum()} of {len(candidates)} items with text")
    return taken


def write_remaining_data(
    folder: Path, name: str, histories: Histories, taken: np.ndarray, tokens: np.ndarray
) -> None:
    """The interactions with the items that stay, as a data set; a time is a place in the history.

    Users with fewer than three of them are left out: of two, leave-one-out would train on both, and the
    second may be what is tested.
    """
    path = folder / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, start, end in zip(histories.users, histories.start, histories.end, strict=True):
            items = histories.items[start:end]
            kept = tokens[items[~taken[items]]]
            if len(kept) >= 3:
                file.writelines(f"{user}\t{token}\t{time}\n" for time, token in enumerate(kept))


def evaluate_new_items(
    recommender: Recommender, histories: Histories, tokens: np.ndarray, added: set[str]
) -> dict[str, Any]:
    """Metrics of users whose last item is new, among all items and among new ones, and of the others.

    Items that the model does not know, because nobody was left to train them, are left out of the pasts;
    users are, who then have no past, or whose last item is one.
    """
    targets = histories.split.targets["test"]
    known = np.isin(tokens, recommender.tokens[1:])
    is_new = torch.tensor([token in added for token in recommender.tokens])
    found: dict[str, list[tuple[int, float]]] = {group: [] for group in GROUPS}
    pasts, wanted, returning = [], [], 0
    for start, end in zip(histories.start[targets != NO_TARGET], targets[targets != NO_TARGET], strict=True):
        past, target = histories.items[start:end], histories.items[end]
        if known[target] and known[past].any():
            pasts.append(tokens[past[known[past]]].tolist())
            wanted.append(tokens[target])
            returning += int(target in past)
    if left_out := int((targets != NO_TARGET).sum()) - len(pasts):
        logger.warning("%s users are left out, whose items only left-out users have", f"{left_out:,}")
    if returning:
        logger.warning(
            "%s of %s targets are in their user's past: misses", f"{returning:,}", f"{len(pasts):,}"
        )
    for at in range(0, len(pasts), BATCH_SIZE):
        some, ids = pasts[at : at + BATCH_SIZE], recommender.to_ids(wanted[at : at + BATCH_SIZE])
        for scores, past, target in zip(recommender.scores(some), some, ids, strict=True):
            scores[recommender.to_ids(past)] = -torch.inf
            for group, among in (("new", slice(None)), ("new_among_new", is_new), ("old", slice(None))):
                if bool(is_new[target]) == (group != "old"):
                    found[group].append(_compute_rank_and_chance(scores[among], scores[target]))
    return {
        name: value
        for group, pairs in found.items()
        for name, value in _average_metrics(group, pairs).items()
    }


def _compute_rank_and_chance(scores: torch.Tensor, own: torch.Tensor) -> tuple[int, float]:
    """The place of a score, the worst of equals, and the chance of a hit at random; both 0 for -inf."""
    if own == -torch.inf:
        return 0, 0.0
    return int((scores >= own).sum()), min(1.0, K / int((scores > -torch.inf).sum()))


def _average_metrics(group: str, pairs: list[tuple[int, float]]) -> dict[str, Any]:
    """Mean metrics of (place, chance of a hit) pairs; empty where there are none."""
    row: dict[str, Any] = {f"{group}.users": len(pairs)}
    places = np.array([place if place <= K else 0 for place, _ in pairs], dtype=np.int64)
    for metric in ("hit", "ndcg"):
        name = f"{metric}@{K}"
        row[f"{group}.{name}"] = round(float(compute_rank_metric(name, places).mean()), 6) if pairs else ""
    row[f"{group}.chance@{K}"] = round(float(np.mean([chance for _, chance in pairs])), 6) if pairs else ""
    return row


def check_output(path: Path) -> None:
    """Make the output's folder.

    Raises:
        ValueError: the file is there and holds something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8").partition("\n")[0] != ",".join(COLUMNS):
        raise UserError(f"--output: {path} has other columns; give another file")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a CSV file, which gets its header with the first."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
