"""Column names of interaction tables: which ones matter, and whether a file has those that are required."""

from collections.abc import Sequence
from pathlib import Path

from m2rec.errors import UserError
from m2rec.yaml_values import suggest_spelling

LABEL_COLUMNS = frozenset({"label", "click", "clicked", "is_click", "is_clicked"})
"""Columns, in lower case, that tell a click from an impression."""
TIME_COLUMNS = frozenset({"time", "timestamp", "unix_timestamp", "datetime", "date", "ts"})
"""Columns, in lower case, that hold times."""


def require_columns(
    path: Path, names: Sequence[str], required: Sequence[str], cure: str = "name one of them"
) -> None:
    """Check that a file has the required columns, once each.

    Raises:
        ValueError: one is missing or duplicated.
    """
    for column in required:
        if column not in names:
            has = ", ".join(filter(None, names))
            hint = suggest_spelling(column, names)
            raise UserError(f"{path}: column {column!r} is missing, the file has {has}; {cure}{hint}")
        count = names.count(column)
        if count > 1:
            raise UserError(f"{path}: column {column!r} occurs {count} times; rename all but one")
