"""Push a trained run to the Hugging Face hub: python scripts/push.py runs/NAME owner/name --private

The weights, the item tokens and titles, the metrics and a model card are pushed, and nothing about users. The
variable HF_TOKEN holds a token that may write, or `hf auth login` has stored one. The line that is printed is
what Recommender.load takes.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import Parser, run_command, write_escaped
from m2rec.serving.hub_name import HubName


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    return run_command("push", lambda: push(parse_options(arguments)))


def push(options: argparse.Namespace) -> None:
    """Load the run, push it, and print its name with the commit."""
    HubName.parse(options.name)  # before the run is loaded
    from m2rec.serving.recommender import Recommender

    name = Recommender.load(options.run).push_to_hub(options.name, options.private)
    write_escaped(f"{name}\n", sys.stdout)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("push", __doc__)
    add = parser.add_argument
    add("run", type=Path, help="run folder, runs/NAME, or a folder that Recommender.save wrote")
    add("name", help="owner/name of the repository on the hub, which is created if need be")
    add("--private", action="store_true", help="others may not read the repository")
    return parser.parse_args(arguments)
