"""Interactions of raw rows, parsed one by one: what the columns of blocks must agree with."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal
from reprlib import repr as short
from typing import NamedTuple

from m2rec.data.raw.filters import RowCondition, RowFilter, explode_lists, is_value_path, suggest_value_path
from m2rec.data.raw.tally import MalformedRowError, NumberedRows, RawRow, Record, Tally
from m2rec.data.raw.times import TimestampReader
from m2rec.data.raw.values import IdReader, UnusedColumnCheck, is_missing, parse_rating

ColumnNames = tuple[str, ...]
"""Names of a value in a row; the first one with a value counts."""


class RawInteraction(NamedTuple):
    """One event."""

    user: str
    item: str
    time: Decimal
    """Seconds since 1970 where the raw data has dates or Unix time, else the number of the interaction."""
    rating: Decimal | None


@dataclass(frozen=True)
class InteractionColumns:
    """Where a row has user, item, time and rating, and which rows are kept."""

    user: ColumnNames
    item: ColumnNames
    time: ColumnNames
    """Empty: file order is used as time."""
    rating: ColumnNames = ()
    time_format: str | None = None
    """Of all times, in strptime's codes."""
    keep: tuple[RowCondition, ...] = ()

    @property
    def used(self) -> set[str]:
        """All names."""
        conditions = {condition.column for condition in self.keep}
        return {*self.user, *self.item, *self.time, *self.rating} | conditions


class InteractionParser:
    """Parses the rows of one file, and remembers what it must say of them.

    Args:
        tally: names the file; counts malformed rows, gets notes on how times and ids were read.
        columns: of the rows.
        time_unit: one of `TIME_UNITS`; by default inferred, see `TimestampReader`.
    """

    def __init__(self, tally: Tally, columns: InteractionColumns, time_unit: str | None = None) -> None:
        self.tally, self.columns = tally, columns
        self.times = TimestampReader(tally.path, time_unit, columns.time_format, tally.name_line)
        self.ids = IdReader(tally.name_line)
        self.unused = UnusedColumnCheck(columns.used)
        self.n_ordered = 0
        """Interactions so far, where file order is the time."""
        self.filter = RowFilter(columns.keep, tally)

    def read_rows(self, rows: NumberedRows) -> Iterator[RawInteraction]:
        """The interactions of rows, which may be a part of the file.

        Raises:
            ValueError: the file can't be read, too much of it is malformed, or its times have several
                units.
        """
        rows = expand_used_paths(rows, self.columns.used, self.tally)
        if self.columns.keep:
            rows = self.filter.select(rows)
        yield from self.parse_rows(rows)

    def parse_rows(self, rows: NumberedRows) -> Iterator[RawInteraction]:
        """The interactions of rows that are kept; malformed rows are counted."""
        yield from parse_records(rows, self._parse, self.tally)

    def _parse(self, line: int, row: RawRow) -> RawInteraction:
        user = self.ids.read(require_value(row, self.columns.user), line)
        item = self.ids.read(require_value(row, self.columns.item), line)
        rating = parse_rating(get_first_value(row, self.columns.rating))
        # last, so that a line that is malformed elsewhere does not settle the unit
        if self.columns.time:
            time = self.times.read(require_value(row, self.columns.time), line)
        else:
            self.n_ordered += 1
            time = Decimal(self.n_ordered)
        self.unused.check(row)
        return RawInteraction(user, item, time, rating)

    def finish(self) -> None:
        """Judge the whole file and note what was changed or looks odd.

        Raises:
            ValueError: the file is empty, too much of it is malformed, or no row has a condition's column.
        """
        self.filter.finish()
        self.tally.finish()
        if not self.columns.time:
            unused = self.unused.time_column
            hint = f"; column {unused!r} is not used" if unused else ""
            self.tally.notes.append(f"no time column: file order is used as time, 1, 2, 3, ...{hint}")
        self.tally.notes += [*self.times.remarks(), *self.ids.remarks(), *self.unused.remarks()]


def expand_used_paths(rows: NumberedRows, used: Collection[str], tally: Tally) -> NumberedRows:
    """The rows with a value for each used path."""
    return explode_lists(rows, sorted(used), tally) if any(map(is_value_path, used)) else rows


def parse_records(
    rows: NumberedRows, parse: Callable[[int, RawRow], Record], tally: Tally
) -> Iterator[Record]:
    """Parse row by row; malformed rows are counted."""
    for line, row in rows:
        try:
            record = parse(line, row)
        except MalformedRowError as error:
            tally.reject(line, error)
        else:
            yield record


def get_first_value(row: RawRow, keys: ColumnNames) -> object:
    """The first value that is not missing, or None."""
    for key in keys:
        value = row.get(key)
        if not is_missing(value):
            return value
    return None


def require_value(row: RawRow, keys: ColumnNames) -> object:
    """The first value that is not missing.

    Raises:
        MalformedRowError: there is none.
    """
    value = get_first_value(row, keys)
    if value is not None:
        return value
    if any(key in row for key in keys):
        raise MalformedRowError(f"{keys[0]!r} is empty")
    path = suggest_value_path(row, keys[0])
    hint = f"; did you mean {path!r}?" if path else ""
    raise MalformedRowError(f"{keys[0]!r} is missing, the row has {short(', '.join(row))}{hint}")
