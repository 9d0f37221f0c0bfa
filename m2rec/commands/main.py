"""The command `m2rec`: m2rec COMMAND ..., which does what the scripts of a checkout do."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from m2rec import __version__
from m2rec.cli import run_command, speak_as_m2rec
from m2rec.errors import UserError
from m2rec.yaml_values import describe_unknown


class Command(NamedTuple):
    """A command: the module of this folder whose `main` runs it, and what it does."""

    module: str
    about: str


COMMANDS = {
    "train": Command("run", "train and evaluate M2Rec or a baseline"),
    "search": Command("search", "look for better settings first, for a time or a number of trials"),
    "tune": Command("tune", "search the settings that a file names"),
    "recommend": Command("recommend", "recommend items by a trained run"),
    "serve": Command("serve", "answer requests over HTTP by a trained run"),
    "push": Command("push", "push a trained run to the Hugging Face hub"),
    "evaluate": Command("evaluate", "score a trained run on other data"),
    "prepare": Command("prepare_data", "make a data set from raw files"),
    "embed": Command("embed_items", "make text vectors of a data set's items"),
    "report": Command("report", "write the page of one run, or one page that compares several"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status, 2 for an unknown one."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(describe_commands())
        return 0
    if arguments[0] == "--version":
        print(f"m2rec {__version__}")
        return 0
    with speak_as_m2rec():
        return run_command("m2rec", lambda: _find_command(arguments[0])(arguments[1:]))


def describe_commands() -> str:
    """The help: a line for each command."""
    lines = [f"  {name:10} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: m2rec COMMAND ...", "", *lines, "", "m2rec COMMAND --help says more of each."])


def _find_command(name: str) -> Callable[[Sequence[str]], int]:
    """The function that runs a command; only its own module is imported.

    Raises:
        ValueError: there is no such command.
    """
    if name not in COMMANDS:
        raise UserError(f"{describe_unknown(name, COMMANDS, 'command')}; m2rec --help lists all")
    run: Callable[[Sequence[str]], int] = import_module(f"m2rec.commands.{COMMANDS[name].module}").main
    return run
