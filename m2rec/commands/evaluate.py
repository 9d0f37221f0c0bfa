"""Score a trained run on other data: python scripts/evaluate.py RUN --dataset=NAME [--data-path=DIR].

The data set is read and split by the run's keys, and by those that are given as --key=value. Each user's
target is ranked among all items of the run. What the run does not know is said: such items are left out of
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

from m2rec.cli import Parser, run_command
from m2rec.commands.evaluate_run import evaluate_run
from m2rec.storage import write_text
from m2rec.yaml_values import parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_command("evaluate.py", lambda: print_metrics(arguments))


def print_metrics(arguments: Sequence[str] | None) -> None:
    """Score the run, print the metrics and write them where asked to."""
    options, keys = parse_options(arguments)
    found = evaluate_run(options.run, options.part, options.device, **keys)
    print(format_metrics(found))
    if options.output:
        write_text(options.output, json.dumps(found, indent=2) + "\n")


def parse_options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The command line, and the keys of run_mm.py in it."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder, runs/NAME")
    parser.add_argument("--dataset", metavar="NAME", help="default: the run's own")
    parser.add_argument("--data-path", "--data_path", metavar="DIR", help="folder of the data set's folder")
    parser.add_argument("--part", choices=("test", "valid"), default="test", help="default: test")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON, too")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    options, keys = parser.parse_known_args(arguments)
    return options, {**parse_arguments(keys), "dataset": options.dataset, "data_path": options.data_path}


def format_metrics(found: dict[str, Any]) -> str:
    """What was tested, and the metrics, a column per protocol."""
    counts = ", ".join(f"{name} {count:,}" for name, count in found["counts"].items())
    parts = {name: metrics for name, metrics in found["metrics"].items() if metrics}
    names = list(next(iter(parts.values()), {}))
    lines = [f"{found['run']} on {found['dataset']}: {counts}"]
    lines.append(f"{'metric':<18}" + "".join(f"{part:>13}" for part in parts))
    lines += [f"{name:<18}" + "".join(f"{parts[part][name]:>13.4f}" for part in parts) for name in names]
    return "\n".join(lines)
