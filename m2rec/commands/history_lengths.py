"""Does a longer history help than those in training? python scripts/history_lengths.py RUN [--data-path=DIR]

Ranks each test user's next item after the last 10, 20, 50, ... items of the history and after all
of it, with the weights of a run. Of test_unseen: what the user had is left out of every ranking, and a
target that is among it is a miss.
Users are shown together and by the length of their history; a row of CSV per number of items.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from m2rec.cli import Parser, run_command
from m2rec.evaluation.metrics import compute_rank_metric
from m2rec.evaluation.ranking import HISTORY_BUCKETS, compute_target_ranks, format_bucket_names
from m2rec.serving.recommender import Recommender
from m2rec.training.run import load_run_data

INPUT_LENGTHS = (10, 20, 50, 100, 200, 500, 1000)
BATCH_SIZE = 32
METRICS = ("hit@10", "ndcg@10")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("history_lengths.py", lambda: print_measurements(parse_options(arguments)))


def print_measurements(options: argparse.Namespace) -> None:
    """Print a CSV line for each length of the input."""
    recommender = Recommender.load(options.run, whole_history=True)
    histories, targets = load_test_histories(options)
    returning = sum(target in history for history, target in zip(histories, targets, strict=True))
    if returning:
        sys.stderr.write(f"{returning:,} of {len(targets):,} targets are in their history: misses\n")
    print_csv(measure_input_lengths(recommender, histories, targets))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data-path", "--data_path", help="folder that holds the data set's folder")
    parser.add_argument("--users", type=int, help="so many, evenly spread; all by default")
    return parser.parse_args(arguments)


def load_test_histories(options: argparse.Namespace) -> tuple[list[list[str]], list[str]]:
    """All that each test user did before the test item, and that item."""
    _, dataset, (_, _, test) = load_run_data(options.run, data_path=options.data_path)
    rows, past, tokens = test.dataset.inter_feat, test.dataset.histories, dataset.item_tokens
    users = rows[dataset.owner_field].numpy()
    chosen = np.unique(np.linspace(0, len(users) - 1, options.users or len(users)).round().astype(int))
    owner, items = past.before(users[chosen], "test")
    ends = np.searchsorted(owner, np.arange(len(chosen)), side="right")
    parts = np.split(items, ends[:-1])
    targets = rows[dataset.iid_field].numpy()[chosen]
    return [[tokens[item] for item in part] for part in parts], [tokens[item] for item in targets]


def measure_input_lengths(
    recommender: Recommender, histories: Sequence[list[str]], targets: Sequence[str]
) -> list[dict[str, object]]:
    """A row per number of items: users and metrics, of all and by length of the history."""
    lengths = np.array([len(history) for history in histories])
    bucket = np.searchsorted(HISTORY_BUCKETS, lengths)
    groups = {"all": np.ones(len(lengths), dtype=bool)}
    groups |= {name: bucket == number for number, name in enumerate(format_bucket_names(HISTORY_BUCKETS, 1))}
    table = []
    for shown in (*(n for n in INPUT_LENGTHS if n < lengths.max()), None):
        places = rank_test_targets(recommender, histories, targets, shown)
        row: dict[str, object] = {"shown": "all" if shown is None else shown}
        for name, inside in groups.items():
            if inside.any():
                row[f"{name}: users"] = int(inside.sum())
                for metric in METRICS:
                    row[f"{name}: {metric}"] = round(
                        float(compute_rank_metric(metric, places[inside]).mean()), 6
                    )
        table.append(row)
    return table


def rank_test_targets(
    recommender: Recommender, histories: Sequence[list[str]], targets: Sequence[str], shown: int | None
) -> np.ndarray:
    """Each target's place after the last `shown` items, without what the user had; 0 for a target it had."""
    places = np.empty(len(histories), dtype=np.int32)
    order = np.argsort([len(history) for history in histories], kind="stable")  # little padding
    for start in range(0, len(order), BATCH_SIZE):
        users = order[start : start + BATCH_SIZE]
        scores = recommender.scores([histories[user][-shown if shown else 0 :] for user in users])
        own = torch.tensor(recommender.to_ids(targets[user] for user in users))
        for row, user in enumerate(users):
            scores[row, recommender.to_ids(histories[user])] = -torch.inf
        places[users] = compute_target_ranks(scores, own)
    return places


def print_csv(table: Sequence[dict[str, object]]) -> None:
    """The rows as CSV on standard output."""
    writer = csv.DictWriter(sys.stdout, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
