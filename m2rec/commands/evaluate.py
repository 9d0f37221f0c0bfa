"""Score a trained run on other data: python scripts/evaluate.py RUN --dataset=NAME [--data-path=DIR].

The data set is read and split by the run's keys, and by those that are given as --key=value. Each user's
target is ranked among all items of the run. What is unknown to the run is counted: such items are left out of
the histories, and a target that is one is a miss. On the run's own data the numbers are those of its
metrics.json.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2rec.cli import Parser, add_device_option, run_command
from m2rec.errors import UserError
from m2rec.storage import write_text
from m2rec.yaml_values import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command("evaluate", lambda: print_metrics(arguments))


def print_metrics(arguments: Sequence[str] | None) -> None:
    """Score the run, print the metrics and write them to --output."""
    options, keys = parse_options(arguments)
    result = evaluate_run(options.run, options.part, options.device, **keys)
    print(format_metrics(result))
    if options.output:
        content = json.dumps(result, indent=2)
        write_text(options.output, f"{content}\n")


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the keys of run_mm.py in it."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("run", type=Path, help="run folder, runs/NAME")
    parser.add_argument("--dataset", metavar="NAME", help="default: the run's own")
    parser.add_argument("--data-path", "--data_path", metavar="DIR", help="folder of the data set's folder")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="default: test")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    add_device_option(parser)
    options, others = parser.parse_known_args(arguments)
    keys = parse_arguments(others)
    keys["dataset"] = options.dataset
    keys["data_path"] = options.data_path
    return options, keys


def evaluate_run(run: Path, part: str = "test", device: str = "cpu", **keys: Any) -> dict[str, Any]:
    """A run's metrics on a data set, under every protocol.

    Args:
        run: the run folder.
        part: `test` or `valid`.
        device: where to compute.
        keys: of the data set; they override the run's, and None leaves a key to the run.

    Returns:
        `run`, `dataset`, `part`; `counts` of users, of targets that return, of targets and of items in
        histories that are unknown to the run; `metrics` by protocol, such as `test_unseen`.

    Raises:
        ValueError: the run or the data can't be loaded, or no user has a target.
    """
    from m2rec.data.dataset import PARTS
    from m2rec.evaluation.metrics import RANK_METRICS, RankedLists, compute_metrics
    from m2rec.evaluation.protocols import Protocol
    from m2rec.evaluation.saved_model import collect_cases, count_cases, rank_cases
    from m2rec.serving.recommender import Recommender
    from m2rec.training.run import load_run_data

    recommender = Recommender.load(run, device)
    _, _, loaders = load_run_data(run, **keys)
    rows = loaders[PARTS.index(part)].dataset
    if not len(rows):
        raise UserError(f"dataset: no user has a {part} target; give other data, or --part")
    owners = rows.inter_feat[rows.owner_field].numpy()
    cases = collect_cases(rows, owners.argsort())
    topk = recommender.config["topk"]
    ranking = rank_cases(recommender, cases, max(topk))
    n_items = len(recommender.tokens)
    measures = (*RANK_METRICS, "itemcoverage")
    metrics = {}
    for protocol in Protocol:
        lists = RankedLists(*ranking.select_rows(protocol), n_items)
        name = protocol.get_name(part)
        metrics[name] = compute_metrics(lists, measures, topk)
    return {
        "run": str(run),
        "dataset": keys.get("dataset") or recommender.config["dataset"],
        "part": part,
        "counts": count_cases(cases, recommender.tokens[1:]),
        "metrics": metrics,
    }


def format_metrics(result: dict[str, Any]) -> str:
    """The counts, and the metrics with a column per protocol."""
    counts = [f"{name} {count:,}" for name, count in result["counts"].items()]
    columns = {}
    for protocol, metrics in result["metrics"].items():
        if metrics:
            columns[protocol] = metrics
    titles = "".join(map("{:>13}".format, columns))
    lines = [
        f"{result['run']} on {result['dataset']}: {', '.join(counts)}",
        f"{'metric':<18}{titles}",
    ]
    for name in next(iter(columns.values())):
        cells = [f"{metrics[name]:>13.4f}" for metrics in columns.values()]
        lines.append(f"{name:<18}{''.join(cells)}")
    return "\n".join(lines)
