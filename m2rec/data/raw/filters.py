"""What is done to raw rows before they are read: lists are taken apart, some rows are left out.

A path such as `events[].aid` names the value `aid` in each element of the list `events`; `items[]`
names the elements themselves, and `user.id` the value `id` in the object `user`.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from reprlib import repr as short
from typing import Any

from m2rec.data.raw.readers import MalformedRowError, NumberedRows, RawRow, Tally, parse_json_or_literal
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
        listed = isinstance(value, list) and bool(value)
        inner = value[0] if listed else value
        if isinstance(inner, dict) and name in inner:
            return f"{column}{LIST_MARK if listed else ''}.{name}"
    return None


def get_path_column(path: str) -> str:
    """The column of a table that holds what a path names."""
    return path.split(LIST_MARK)[0]


def explode_lists(rows: NumberedRows, paths: Iterable[str], tally: Tally) -> NumberedRows:
    """One row per element of the lists in the paths; all else in a row is repeated.

    Several lists of a row go together, first with first, and must be of one length. A path is a name in
    the new rows. Text that is a list of JSON's or Python's is one, as in a cell of CSV.

    Args:
        rows: the rows of the file.
        paths: what will be asked for; names are passed over.
        tally: told of rows that are malformed, of those that become several, and of empty lists.
    """
    nested = [path for path in paths if is_value_path(path)]
    levels = _group_lists_by_depth(nested)
    empty = 0
    for line, row in rows:
        parts, without = [row], 0
        try:
            for lists in levels:
                elements = [_explode_row(part, lists) for part in parts]
                without += elements.count([])
                parts = [element for part in elements for element in part]
        except MalformedRowError as error:
            tally.reject(line, error)
            continue
        tally.extra_rows += len(parts) + without - 1
        empty += without
        for part in parts:
            yield line, _add_path_values(part, nested)
    if empty:
        tally.notes.append(f"empty lists, of which nothing comes: {empty:,}")


def _group_lists_by_depth(paths: Sequence[str]) -> list[list[str]]:
    """Lists by their depth, the outermost first: [["a"], ["a[].b", "a[].c"]]."""
    levels = dict[int, dict[str, None]]()
    for path in paths:
        parts = path.split(LIST_MARK)
        for depth in range(1, len(parts)):
            levels.setdefault(depth, {})[LIST_MARK.join(parts[:depth])] = None
    return [list(levels[depth]) for depth in sorted(levels)]


def _explode_row(row: RawRow, lists: Sequence[str]) -> list[RawRow]:
    elements = [_read_list(row, path) for path in lists]
    if len({len(part) for part in elements}) > 1:
        lengths = ", ".join(f"{path!r} has {len(part)}" for path, part in zip(lists, elements, strict=True))
        raise MalformedRowError(f"lists of several lengths: {lengths}")
    parts = []
    for values in zip(*elements, strict=True):
        part = dict(row)
        for path, value in zip(lists, values, strict=True):
            part[path + LIST_MARK] = value
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
    raise MalformedRowError(f"{path!r} is no list: {short(value)}")


def get_path_value(row: RawRow, path: str) -> Any:
    """The value at a path without lists that are not taken apart yet; None where there is none."""
    if path in row:
        return row[path]
    holder, dot, name = path.rpartition(".")
    found = get_path_value(row, holder) if dot else None
    return found.get(name) if isinstance(found, dict) else None


def _add_path_values(row: RawRow, paths: Sequence[str]) -> RawRow:
    values = {path: get_path_value(row, path) for path in paths}
    return {**row, **{path: value for path, value in values.items() if value is not None}}


@dataclass(frozen=True)
class RowCondition:
    """What a row must fulfil, such as `event=purchase`, `rating>=4`, `type in a,b`.

    A value that is missing is equal to nothing but the empty text, and no number.
    """

    text: str
    column: str
    holds: Callable[[object], bool]
    """Of the column's value; raises `MalformedRowError` where it is not of the kind to be compared."""

    @classmethod
    def parse(cls, text: str) -> "RowCondition":
        """A condition from the command line.

        Raises:
            ValueError: it is none.
        """
        match = _COMPARISON_PATTERN.fullmatch(text.strip()) or _MEMBERSHIP_PATTERN.fullmatch(text.strip())
        if not match:
            raise UserError(
                f"--keep: {text!r} is no condition; "
                "write COLUMN=VALUE, != for unequal, >, >=, < or <= for numbers, or 'COLUMN in A,B'"
            )
        column, sign, wanted = match.groups()
        if sign == "in":
            return cls(text, column, _build_membership_test([part.strip() for part in wanted.split(",")]))
        if sign in ("=", "==", "!="):
            equals = _build_membership_test([wanted])
            return cls(text, column, equals if sign != "!=" else lambda value: not equals(value))
        try:
            return cls(
                text, column, _build_comparison_test(_COMPARISON_OPERATORS[sign], parse_number(wanted))
            )
        except MalformedRowError:
            raise UserError(f"--keep: {text!r}: {sign} compares numbers, and {wanted!r} is none") from None


_COMPARISON_PATTERN = re.compile(r"(.+?)\s*(==?|!=|>=?|<=?)\s*(.*)", re.DOTALL)
_MEMBERSHIP_PATTERN = re.compile(r"(.+?)\s+(in)\s+(.+)", re.DOTALL)
_COMPARISON_OPERATORS: dict[str, Callable[[Decimal, Decimal], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip


def _build_membership_test(wanted: Sequence[str]) -> Callable[[object], bool]:
    """Texts are compared as they stand, numbers as numbers, true and false as such."""
    texts, numbers = (
        set(wanted),
        {found for text in wanted if (found := _parse_optional_number(text)) is not None},
    )

    def holds(value: object) -> bool:
        text = _convert_to_text(value)
        return text in texts or (bool(numbers) and _parse_optional_number(text) in numbers)

    return holds


def _build_comparison_test(
    sign: Callable[[Decimal, Decimal], bool], limit: Decimal
) -> Callable[[object], bool]:
    return lambda value: not is_missing(value) and sign(parse_number(_convert_to_text(value)), limit)


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


def filter_rows(rows: NumberedRows, conditions: Sequence[RowCondition], tally: Tally) -> NumberedRows:
    """The rows that fulfil all conditions; what each leaves out of those before it is counted and said.

    Raises:
        ValueError: no row has the column of a condition.
    """
    dropped = dict.fromkeys(conditions, 0)
    missing, names = {condition.column for condition in conditions}, tuple[str, ...]()
    for line, row in rows:
        if missing:
            missing -= row.keys()
            names = names or tuple(row)
        try:
            failed = next((part for part in conditions if not part.holds(row.get(part.column))), None)
        except MalformedRowError as error:
            tally.reject(line, f"--keep: {error}")
            continue
        if failed:
            dropped[failed] += 1
        else:
            yield line, row
    if names and missing:
        column = min(missing)
        raise UserError(
            f"{tally.path}: --keep: no row has the column {column!r}, the first has "
            f"{short(', '.join(names))}{suggest_spelling(column, names)}"
        )
    tally.notes += [f"left out by --keep '{part.text}': {count:,} rows" for part, count in dropped.items()]
