"""The config.yaml that a command reads where --config_files names no other."""

from pathlib import Path

from m2rec.cli import CHECKOUT, SCRIPTS

_NAME = "config.yaml"


def find_config_file(checkout: Path = CHECKOUT) -> Path | None:
    """The checkout's config.yaml; for an installed package that of the working folder, None without one.

    Args:
        checkout: the folder that the package lies in.
    """
    if (checkout / SCRIPTS["train"]).is_file():
        return checkout / _NAME
    own = Path.cwd() / _NAME
    return own if own.is_file() else None
