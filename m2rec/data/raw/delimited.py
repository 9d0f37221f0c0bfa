"""Rows of delimited text files: CSV and its relatives, MovieLens's tables, one user per line."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from m2rec.data.column_names import LABEL_COLUMNS, require_columns
from m2rec.data.raw.lines import LineReader, is_never_done, open_lines, read_parsed_lines
from m2rec.data.raw.tally import MalformedRowError, NumberedRows, RawRow, Tally
from m2rec.errors import UserError

MAX_RECORD_LINES = 1000  # a longer CSV record is taken for an unclosed quotation mark
SEPARATORS = (",", "\t", ";", "|")
UTF8_OR_LATIN1 = ("utf-8", "latin-1")
QUOTING_SEPARATORS = (",", ";")  # where anything else separates, quotation marks are text


def read_sequence_rows(tally: Tally) -> NumberedRows:
    """Rows of `user item item ...`, separated by blanks or tabs: {"user": ..., "items": [...]}."""

    def parse(line: str) -> RawRow:
        user, *items = line.replace("\t", " ").strip(" \r\n").split(" ")
        return {"user": user, "items": [item for item in items if item]}

    return read_parsed_lines(tally, parse)


def read_delimited_rows(tally: Tally, separator: str, columns: Sequence[str]) -> NumberedRows:
    """Rows of a file without header and quotes, UTF-8 or else Latin-1, as MovieLens has them."""

    return read_parsed_lines(tally, partial(parse_cells, separator, columns), UTF8_OR_LATIN1)


def parse_cells(separator: str, columns: Sequence[str], line: str) -> RawRow:
    """The row of a line without quotes.

    Raises:
        MalformedRowError: it has too many or too few columns.
    """
    cells = line.rstrip("\r\n").split(separator)
    if len(cells) != len(columns):
        raise MalformedRowError(f"{len(cells)} columns instead of {len(columns)}")
    return dict(zip(columns, cells, strict=True))


@dataclass(frozen=True)
class CsvLayout:
    """How a text table is laid out, where its header does not say it."""

    column_names: tuple[str, ...] = ()
    """Columns by position, an empty name for one that is not used; with names the file has no header."""
    separator: str = ""
    """One or two characters; by default the separator with which the columns exist."""


HEADER_LAYOUT = CsvLayout()


def read_csv_records(
    tally: Tally, columns: Sequence[str], layout: CsvLayout = HEADER_LAYOUT, cure: str = "name one of them"
) -> NumberedRows:
    """One row per record of a delimited text file, numbered by its first line.

    Between commas and semicolons cells may be quoted, and span several lines then (RFC 4180);
    between anything else quotation marks are text.

    Args:
        tally: names the file; counts records of several lines.
        columns: must exist, once each.
        layout: by default the file has a header.
        cure: what to do where a column is missing.

    Raises:
        ValueError: a column is missing or duplicated, the separator can't be found, or a record has more
            than 1,000 lines.
    """
    table = find_csv_table(tally.path, columns, layout, cure)
    with open_lines(tally) as lines:
        if table.has_header:
            next(lines)
        yield from table.read_records(lines)


@dataclass(frozen=True)
class CsvTable:
    """The columns of a delimited text file, as its first line or the layout says."""

    names: Sequence[str]
    separator: str
    has_header: bool

    def read_records(self, lines: LineReader, is_done: Callable[[], bool] = is_never_done) -> NumberedRows:
        """One row per record, numbered by its first line.

        Args:
            lines: from the beginning of a record on.
            is_done: asked before each record whether to stop.
        """
        tally = lines.tally
        expected = f"the header has {len(self.names)}" if self.has_header else f"{len(self.names)} are named"
        reader = _read_cells(lines, self.separator)
        while not is_done():
            first = tally.lines + 1
            try:
                cells = next(reader)
                if cells and len(cells) != len(self.names):
                    raise MalformedRowError(f"{len(cells)} columns, {expected}")
            except StopIteration:
                return
            except (csv.Error, MalformedRowError) as error:
                _check_record_length(tally, first)
                tally.reject(first, _describe_csv_error(error), tally.lines)
                continue
            _check_record_length(tally, first)
            if cells:
                tally.count_record(first)
                yield first, dict(zip(self.names, cells, strict=True))


def find_csv_table(path: Path, columns: Sequence[str], layout: CsvLayout, cure: str) -> CsvTable:
    """The columns of a file and their separator, see `read_csv_records`.

    Raises:
        ValueError: a column is missing or duplicated, or the separator can't be found.
    """
    names, separator = _find_columns(path, columns, layout, cure)
    return CsvTable(names, separator, has_header=not layout.column_names)


def _check_record_length(tally: Tally, first: int) -> None:
    """Refuse a record that begins in line `first` and has too many lines: a quotation mark is open."""
    if tally.lines - first >= MAX_RECORD_LINES:
        raise UserError(
            f"{tally.path}: the record that begins in line {first} has more than {MAX_RECORD_LINES:,} lines; "
            f"a quotation mark in it is not closed: remove it, or quote the whole cell and double it there"
        )


def _describe_csv_error(error: Exception) -> str:
    reason = str(error)
    return "a quotation mark is never closed" if reason == "unexpected end of data" else reason


def _read_cells(lines: Iterable[str], separator: str, strict: bool = True) -> Iterator[list[str]]:
    """Cells record by record; none for a blank line."""
    if len(separator) > 1:
        return map(partial(_split_line, separator), lines)  # a generator would end at an error
    if separator in QUOTING_SEPARATORS:
        return csv.reader(lines, delimiter=separator, strict=strict)
    return csv.reader(lines, delimiter=separator, strict=strict, quoting=csv.QUOTE_NONE)


def _split_line(separator: str, line: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split(separator) if line.strip() else []


def _find_columns(
    path: Path, columns: Sequence[str], layout: CsvLayout, cure: str
) -> tuple[Sequence[str], str]:
    """Names of all columns, and their separator."""
    names, separator = layout.column_names, layout.separator
    if names:
        require_columns(path, names, columns)
        return names, separator or _choose_separator(path, len(names))
    cells = _split_first_line(path, [separator] if separator else SEPARATORS)
    return _choose_header(path, cells, columns, cure)


def _split_first_line(path: Path, separators: Sequence[str]) -> dict[str, list[str]]:
    """Cells of the first line, by separator."""
    with open_lines(Tally(path)) as lines:
        try:
            line = next(lines, "")
        except MalformedRowError as error:
            raise UserError(f"{path}: line 1: {error}; save it as UTF-8") from None
    if not line.strip():
        raise UserError(f"{path}: the file is empty, or its first line is")
    cells = {}
    for separator in separators:
        try:
            cells[separator] = next(_read_cells([line], separator, strict=False))
        except csv.Error as error:
            raise UserError(f"{path}: line 1 names no columns ({error}); repair it") from None
    return cells


def _choose_separator(path: Path, n_columns: int) -> str:
    """The only separator that splits the first line into `n_columns` cells."""
    counts = {separator: len(cells) for separator, cells in _split_first_line(path, SEPARATORS).items()}
    fitting = [separator for separator, count in counts.items() if count == n_columns]
    if len(fitting) == 1:
        return fitting[0]
    seen = ", ".join(f"{count} with {separator!r}" for separator, count in counts.items())
    raise UserError(
        f"{path}: {n_columns} columns are named, line 1 has {seen}; "
        f"set separator=' ' or the like, for items item_separator=' '"
    )


def _choose_header(
    path: Path, cells: dict[str, list[str]], columns: Sequence[str], cure: str
) -> tuple[Sequence[str], str]:
    """The header that has all required columns, and its separator."""
    headers = {separator: [name.strip() for name in names] for separator, names in cells.items()}
    chosen = max(headers, key=lambda separator: len(headers[separator]))
    quoted = {f'"{column}"' for column in columns}
    for separator, names in headers.items():
        if set(columns) <= set(names):
            chosen = separator
            break
        if separator not in QUOTING_SEPARATORS and quoted <= set(names):
            raise UserError(
                f"{path}: its column names are in quotation marks, which are text between tabs and |; "
                "save it with commas, or without these marks"
            )
    names = headers[chosen]
    labels = [name for name in names if name.lower() in LABEL_COLUMNS]
    require_columns(path, names, [*columns, *labels], cure)
    return names, chosen
