"""What command lines share: one parser, one way to report mistakes."""

import argparse
import logging
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from m2rec.errors import UserError, format_one_line

logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Mistakes are reported like all others, in one line."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -") or message.endswith("one argument"):
            message += "; a value that begins with a dash is given after =, such as --option='-value'"
        raise UserError(message)


def run_command(
    name: str,
    work: Callable[[], int | None],
    when_stopped: str = "",
    reword: Callable[[str], str] = str,
) -> int:
    """Do a command's work and turn mistakes into one line on stderr and an exit status.

    Args:
        name: of the script; each line begins with it.
        work: what to do; returns the exit status, or None for success.
        when_stopped: what to add to the line that Ctrl-C leaves.
        reword: makes the command's words of the library's message.

    Returns:
        The status of `work`; 2 for a mistake, or what the error has as its `exit_status`; 130 after Ctrl-C.
    """
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
