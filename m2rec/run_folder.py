"""The files of a run folder: their names, and what is read from them."""

import json
from pathlib import Path
from typing import Any

import yaml

from m2rec.errors import UserError, format_one_line

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"  # with it a run is finished; only pictures of it come after
HISTORY_FILE = "history.csv"
RANKS_FILE = "test_ranks.csv"
ITEMS_FILE = "items.json"
COUNTS_FILE = "counts.json"  # how often training meets each item
TITLES_FILE = "titles.json"  # where the item file has titles
TEXT_FILE = "text.json"  # what made the text vectors, where there are any
INSIGHTS_FILE = "insights.json"  # what the gate and the filter do, and examples
REPORT_FILE = "report.html"
WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"  # until the run is finished


def read_stored_titles(folder: Path) -> dict[str, str]:
    """The titles in a run folder by item token, none if it has no file of them.

    Raises:
        ValueError: the file can't be read, or a title is no text.
    """
    path = folder / TITLES_FILE
    titles: dict[str, str] = _parse_file(path, json.loads, dict) if path.exists() else {}
    if not all(isinstance(title, str) for title in titles.values()):
        raise UserError(f"{path} holds titles that are no text")
    return titles


def _parse_file(path: Path, parse: Any, kind: type) -> Any:
    """A file's content.

    Raises:
        ValueError: it is missing, or holds something else.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} can't be read ({format_one_line(error)})") from None
    if not isinstance(content, kind):
        raise UserError(f"{path} holds no {kind.__name__}")
    return content
