"""What the scripts' command lines share."""

import argparse
from typing import NoReturn, TextIO


class Parser(argparse.ArgumentParser):
    """Mistakes are reported like all others, in one line."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -") or message.endswith("one argument"):
            message += "; a value that begins with a dash is given after =, such as --option='-value'"
        raise ValueError(message)


def write_escaped(text: str, stream: TextIO) -> None:
    """Write text; what the stream's encoding does not have is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
