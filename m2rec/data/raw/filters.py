"""Transform raw rows before they are read: take lists apart, keep the rows that fulfil conditions.

A path such as `events[].aid` names the value `aid` in each element of the list `events`; `items[]`
names the elements themselves, and `user.id` the value `id` in the object `user`.
"""

import operator
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from reprlib import repr as short
from typing import Any

from m2rec.data.raw.json_rows import parse_json_or_literal
from m2rec.data.raw.tally import MalformedRowError, NumberedRows, RawRow, Tally
from m2rec.data.raw.values import is_missing, parse_number
from m2rec.errors import UserError
from m2rec.yaml_values import suggest_spelling

LIST_MARK = "[]"


def is_value_path(name: str) -> bool:
    """Whether a name may lead into a value."""
    return LIST_MARK in name or "." in name


def suggest_value_path(row: RawRow, name: str) -> str | None:
    """A path to a value of this name in one of the row's objects or lists of objects."""
    for column, value in row.items():
        if isinstance(value, dict) and name in value:
            return f"{column}.{name}"
        if isinstance(value, list) and value and isinstance(value[0], dict) and name in value[0]:
            return f"{column}{LIST_MARK}.{name}"
    return None


def get_path_column(path: str) -> str:
    """The part of a path before its first list."""
    return path.split(LIST_MARK)[0]


def explode_lists(rows: NumberedRows, paths: Iterable[str], tally: Tally) -> NumberedRows:
    """One row per element of the lists in the paths; all other values of a row are repeated.

    Several lists of a row are taken apart together and must have one length. A path is a name in
    the new rows. Text that is a JSON or Python list counts as one, as in a cell of CSV.

    Args:
        rows: the rows of the file.
        paths: the paths to take apart; plain names are skipped.
        tally: counts malformed rows, further rows and empty lists.
    """
    nested = [path for path in paths if is_value_path(path)]
    levels = _group_lists_by_depth(nested)
    n_empty = 0
    for line, row in rows:
        try:
            parts, n_empty_here = _explode_levels(row, levels)
        except MalformedRowError as error:
            tally.reject(line, error)
            continue
        tally.extra_rows += len(parts) + n_empty_here - 1
        n_empty += n_empty_here
        for part in parts:
            yield line, _add_path_values(part, nested)
    if n_empty:
        tally.notes.append(f"empty lists, skipped: {n_empty:,}")


def _group_lists_by_depth(paths: Sequence[str]) -> list[list[str]]:
    """Lists by their depth, the outermost first: [["a"], ["a[].b", "a[].c"]]."""
    levels: list[dict[str, None]] = []  # dicts as ordered sets
    for path in paths:
        parts = path.split(LIST_MARK)
        for depth in range(1, len(parts)):
            if depth > len(levels):
                levels.append({})
            levels[depth - 1][LIST_MARK.join(parts[:depth])] = None
    return [list(level) for level in levels]


def _explode_levels(row: RawRow, levels: Sequence[Sequence[str]]) -> tuple[list[RawRow], int]:
    """One row per element of the innermost lists, and the number of empty lists."""
    parts, n_empty = [row], 0
    for lists in levels:
        elements: list[RawRow] = []
        for part in parts:
            exploded = _explode_row(part, lists)
            n_empty += not exploded
            elements += exploded
        parts = elements
    return parts, n_empty


def _explode_row(row: RawRow, lists: Sequence[str]) -> list[RawRow]:
    """One row per element of lists that are taken apart together."""
    elements = {path: _read_list(row, path) for path in lists}
    lengths = {path: len(values) for path, values in elements.items()}
    if len(set(lengths.values())) > 1:
        described = ", ".join(f"{path!r} has {length}" for path, length in lengths.items())
        raise MalformedRowError(f"lists of several lengths: {described}")
    parts = []
    for index in range(lengths[lists[0]]):
        part = dict(row)
        for path, values in elements.items():
            part[path + LIST_MARK] = values[index]
        parts.append(part)
    return parts


def _read_list(row: RawRow, path: str) -> list[Any]:
    value = get_path_value(row, path)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json_or_literal(value)
    if isinstance(value, list | tuple):
        return list(value)
    if is_missing(value):
        raise MalformedRowError(f"{path!r} is empty")
    raise MalformedRowError(f"{path!r} is not a list: {short(value)}")


def get_path_value(row: RawRow, path: str) -> Any:
    """The value at a path whose lists are taken apart; None if it does not exist."""
    if path in row:
        return row[path]
    holder, dot, name = path.rpartition(".")
    if not dot:
        return None
    value = get_path_value(row, holder)
    return value.get(name) if isinstance(value, dict) else None


def _add_path_values(row: RawRow, paths: Sequence[str]) -> RawRow:
    row = dict(row)
    for path in paths:
        value = get_path_value(row, path)
        if value is not None:
            row[path] = value
    return row


@dataclass(frozen=True)
class RowCondition:
    """A condition on a column, such as `event=purchase`, `rating>=4`, `type in a,b`.

    Texts are compared unchanged, numbers as numbers, true and false as such. A missing value equals only
    the empty text, and is not a number.
    """

    text: str
    column: str
    comparison: str
    values: tuple[str, ...]
    numbers: tuple[Decimal, ...]
    """The values that are numbers."""

    @classmethod
    def parse(cls, text: str) -> "RowCondition":
        """Parse the text of a condition.

        Raises:
            ValueError: it is not a valid condition.
        """
        match = _COMPARISON_PATTERN.fullmatch(text.strip()) or _MEMBERSHIP_PATTERN.fullmatch(text.strip())
        if not match:
            raise UserError(
                f"keep: {text!r} is not a valid condition; "
                "write COLUMN=VALUE, != for unequal, >, >=, < or <= for numbers, or 'COLUMN in A,B'"
            )
        column, comparison, expected = match.groups()
        values = tuple(map(str.strip, expected.split(","))) if comparison == "in" else (expected,)
        parsed = map(_parse_optional_number, values)
        numbers = tuple(number for number in parsed if number is not None)
        if comparison in _ORDER and not numbers:
            raise UserError(f"keep: {text!r}: {comparison} needs a number, got {expected!r}")
        return cls(text, column, comparison, values, numbers)

    def holds(self, value: object) -> bool:
        """Whether the column's value fulfils the condition.

        Raises:
            MalformedRowError: it can't be compared.
        """
        text = _convert_to_text(value)
        if self.comparison in _ORDER:
            return text != "" and _ORDER[self.comparison](parse_number(text), self.numbers[0])
        is_equal = text in self.values
        if not is_equal and self.numbers:
            is_equal = _parse_optional_number(text) in self.numbers
        return is_equal != (self.comparison == "!=")


_COMPARISON_PATTERN = re.compile(r"(.+?)\s*(==?|!=|>=?|<=?)\s*(.*)", re.DOTALL)
_MEMBERSHIP_PATTERN = re.compile(r"(.+?)\s+(in)\s+(.+)", re.DOTALL)
_ORDER: dict[str, Callable[[Decimal, Decimal], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


def _convert_to_text(value: object) -> str:
    if is_missing(value):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple | dict):
        raise MalformedRowError(f"{short(value)} can't be compared")
    return str(value).strip()


def _parse_optional_number(text: str) -> Decimal | None:
    try:
        return parse_number(text)
    except MalformedRowError:
        return None


class RowFilter:
    """Keeps the rows of one file that fulfil all conditions, and counts the others.

    Args:
        conditions: on the rows.
        tally: counts malformed rows; gets a note on what each condition removes after those before it.
    """

    def __init__(self, conditions: Sequence[RowCondition], tally: Tally) -> None:
        self.conditions, self.tally = conditions, tally
        self.removed = dict.fromkeys(conditions, 0)
        """Rows by the first condition that they do not fulfil."""
        self.missing = {condition.column for condition in conditions}
        """Columns that no row has had."""
        self.first_names: list[str] = []
        """Columns of the first row."""

    def select(self, rows: NumberedRows) -> NumberedRows:
        """The rows that fulfil all conditions."""
        for line, row in rows:
            self.note_names(row)
            try:
                failed = _find_failed(row, self.conditions)
            except MalformedRowError as error:
                self.tally.reject(line, f"keep: {error}")
                continue
            if failed is None:
                yield line, row
            else:
                self.removed[failed] += 1

    def note_names(self, names: Collection[str]) -> None:
        """Note the columns of a row."""
        self.first_names = self.first_names or list(names)
        if self.missing:
            self.missing.difference_update(names)

    def finish(self) -> None:
        """Note what was removed, once all rows were read.

        Raises:
            ValueError: no row has the column of a condition.
        """
        if self.first_names and self.missing:
            column = min(self.missing)
            raise UserError(
                f"{self.tally.path}: keep: no row has the column {column!r}, the first has "
                f"{short(', '.join(self.first_names))}{suggest_spelling(column, self.first_names)}"
            )
        for condition, count in self.removed.items():
            self.tally.notes.append(f"removed by keep='{condition.text}': {count:,} rows")


def _find_failed(row: RawRow, conditions: Sequence[RowCondition]) -> RowCondition | None:
    """The first condition that a row does not fulfil."""
    for condition in conditions:
        if not condition.holds(row.get(condition.column)):
            return condition
    return None
