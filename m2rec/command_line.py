"""What the scripts' command lines share."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Mistakes are reported like all others, in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
