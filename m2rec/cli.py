"""What command lines share: their names, one parser, one way to report mistakes."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from m2rec.errors import UserError, format_one_line

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]
"""The folder that the package lies in: the repository's, or that of an installed package's neighbours."""
SCRIPTS = {
    "train": "run_mm.py",
    "search": "run_mm.py",
    "tune": "scripts/tune.py",
    "recommend": "scripts/recommend.py",
    "serve": "scripts/serve.py",
    "push": "scripts/push.py",
    "evaluate": "scripts/evaluate.py",
    "prepare": "scripts/prepare_data.py",
    "embed": "scripts/embed_items.py",
    "report": "scripts/report.py",
}
"""The commands of `m2rec`, and the script that does the same in a checkout."""
_COMMANDS = {Path(script).name: command for command, script in SCRIPTS.items() if command != "search"}
_SCRIPT_PATTERN = re.compile(rf"(?:python )?(?:scripts/)?\b({'|'.join(map(re.escape, _COMMANDS))})")

_has_scripts = (CHECKOUT / SCRIPTS["train"]).is_file()


@contextmanager
def speak_as_m2rec() -> Iterator[None]:
    """While `m2rec` itself was started, messages name its commands, also in a checkout."""
    global _has_scripts
    before, _has_scripts = _has_scripts, False
    try:
        yield
    finally:
        _has_scripts = before


def name_command(command: str) -> str:
    """What a user types for a command of `SCRIPTS`: `python run_mm.py` in a checkout, else `m2rec train`."""
    return f"python {SCRIPTS[command]}" if _has_scripts else f"m2rec {command}"


def name_program(command: str) -> str:
    """What a command's own lines begin with: `run_mm.py` or `m2rec train`.

    Args:
        command: one of `SCRIPTS`; a script that has no command keeps its name.
    """
    if command not in SCRIPTS:
        return command
    return Path(SCRIPTS[command]).name if _has_scripts else f"m2rec {command}"


def name_commands_in(text: str | None) -> str:
    """A help text that names scripts, as the user must type them."""
    if _has_scripts:
        return text or ""
    return _SCRIPT_PATTERN.sub(lambda match: f"m2rec {_COMMANDS[match[1]]}", text or "")


class Parser(argparse.ArgumentParser):
    """Mistakes are reported like all others, in one line.

    Args:
        command: see `name_program`.
        description: the module's own, which names scripts.
        others: arguments of argparse.
    """

    def __init__(self, command: str, description: str | None, **others: Any) -> None:
        super().__init__(
            prog=name_program(command),
            description=name_commands_in(description),
            formatter_class=argparse.RawTextHelpFormatter,
            **others,
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -") or message.endswith("one argument"):
            message += "; a value that begins with a dash is given after =, such as --option='-value'"
        raise UserError(message)


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, where a saved model runs."""
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def add_recommender_options(parser: argparse.ArgumentParser) -> None:
    """Add what `Recommender.load` takes beside the folder: `--device` and `--precision`."""
    add_device_option(parser)
    parser.add_argument(
        "--precision",
        default="float32",
        choices=("float32", "int8"),
        help="int8: large catalogues are searched in int8 first, then the best items are ranked exactly",
    )


def run_command(
    name: str,
    work: Callable[[], int | None],
    when_stopped: str = "",
    reword: Callable[[str], str] = str,
) -> int:
    """Do a command's work and turn mistakes into one line on stderr and an exit status.

    Args:
        name: of the command; each line begins with it, see `name_program`.
        work: what to do; returns the exit status, or None for success.
        when_stopped: what to add to the line that Ctrl-C leaves.
        reword: makes the command's words of the library's message.

    Returns:
        The status of `work`; 2 for a mistake, or what the error has as its `exit_status`; 130 after Ctrl-C.
    """
    name = name_program(name)
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        logger.debug("traceback", exc_info=True)
        sys.stderr.write(f"{name}: error: {reword(format_one_line(error))}\n")
        return int(getattr(error, "exit_status", 2))
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped{when_stopped}\n")
        return 130


def write_escaped(text: str, stream: TextIO) -> None:
    """Write text; what the stream's encoding does not have is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
