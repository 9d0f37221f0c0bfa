"""Settings and text vectors that are shipped with the project for some data sets.

A name is not enough: a user's own data called `ml-100k` must not get the text vectors of its films. The
key `belongs_to` of `properties/dataset/NAME.yaml` describes the data set. Its key `recipe` has the best
known settings of M2Rec there; its other keys hold for every model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml

from m2rec.data import inter_file, item_file
from m2rec.settings import PROPERTIES_FOLDER

SHIPPED_FOLDER = PROPERTIES_FOLDER / "dataset"
ORIGIN_KEY = "belongs_to"
RECIPE_KEY = "recipe"


class InterColumns(NamedTuple):
    """The separator and columns of a data set's files."""

    separator: str
    user: str
    item: str

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Take the columns from a mapping with RecBole's keys."""
        return cls(config["field_separator"], config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])


def read_origin(name: str) -> dict[str, Any]:
    """Describe the data set that the shipped files of this name belong to; empty if there are none.

    Returns:
        `users`, `items` and `interactions` of NAME.inter, unfiltered, and where vectors are shipped
        `titles_sha256` (see `hash_titles`).
    """
    path = SHIPPED_FOLDER / f"{name}.yaml"
    if not path.is_file():
        return {}
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))[ORIGIN_KEY])


def describe_difference(name: str, path: Path, columns: InterColumns) -> str:
    """Describe how a file differs from the data set that the shipped properties belong to.

    Args:
        name: the data set's.
        path: its NAME.inter.
        columns: its separator and columns.

    Returns:
        Such as `610 users, not 943`; empty if nothing differs, nothing is shipped, or a column is missing.

    Raises:
        ValueError: the file can't be read.
    """
    origin = read_origin(name)
    if not origin:
        return ""
    header = inter_file.read_header(path, columns.separator)
    if columns.user not in header or columns.item not in header:
        return ""  # which is an error when it is loaded
    frame = inter_file.read_token_columns(path, columns.separator, header, [columns.user, columns.item])
    counts = {
        "users": len(frame[columns.user].cat.categories),
        "items": len(frame[columns.item].cat.categories),
        "interactions": len(frame),
    }
    differences = []
    for name, count in counts.items():
        if count != origin[name]:
            differences.append(f"{count:,} {name}, not {origin[name]:,}")
    return ", ".join(differences)


def hash_titles(titles: Mapping[str, str]) -> str:
    """Hash every item token with its title, independent of their order."""
    tokens = sorted(titles)
    return item_file.ItemTexts(tokens, [titles[token] for token in tokens], columns=[]).sha256()


def find_shipped_vectors(name: str) -> Path | None:
    """The text-vector file that is shipped under this name; it may belong to other data."""
    path = SHIPPED_FOLDER / f"{name}.text.safetensors"
    return path if path.is_file() else None


def has_same_titles(name: str, items: Path, columns: InterColumns) -> bool:
    """Whether a file of items has the tokens and titles that the shipped vectors belong to."""
    titles = item_file.read_item_titles(items, columns.item, columns.separator)
    return hash_titles(titles) == read_origin(name).get("titles_sha256")
