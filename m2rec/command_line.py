"""What the scripts' command lines share."""

import argparse
from typing import NoReturn, TextIO


class Parser(argparse.ArgumentParser):
    """Mistakes are reported like all others, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def say(text: str, stream: TextIO) -> None:
    """Write text; what the stream's encoding does not have is escaped."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()
