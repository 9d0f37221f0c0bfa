"""Raw files as rows, one at a time: JSON lines, Python dicts, delimited text, Parquet.

A row is what one line holds by name, and in CSV what one record holds, whose quoted cells may have
several lines. Text files may be gzipped. A line that can't be read is counted in a `Tally` and
skipped; memory holds one record, or of Parquet one batch.
"""

import ast
import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]
"""Line number, from 1, with its row."""

LINE_LIMIT = 2**24  # bytes
RECORD_LIMIT = 1000  # lines of a CSV record; a longer one is taken for a quotation mark left open
LITERAL_LIMIT = 2**20  # characters; a syntax tree takes some hundred times its text
BATCH = 10_000  # rows of Parquet
JUDGED_FROM = 10_000  # lines before a file may be given up
SHOWN = 3  # malformed lines
SEPARATORS = ",\t;|"
UNQUOTED = "\t|"  # where these separate, quotation marks are text


class Malformed(Exception):
    """A line that can't be used, and why."""


@dataclass
class Tally:
    """What was read of a file, and what was wrong with it."""

    path: Path
    max_bad: float = 0.0
    """Largest share of malformed lines, 0 to 1."""
    lines: int = 0
    bad: int = 0
    position: int = 0
    """Bytes of the file that were read."""
    examples: list[str] = field(default_factory=list)
    records: int = 0
    """Records of several lines."""
    continued: int = 0
    """Lines of these records but the first of each."""
    longest: tuple[int, int] = (0, 0)
    """Lines of the longest of these records, and its first line."""
    notes: list[str] = field(default_factory=list)
    """What else is to be said about the file."""

    def reject(self, first: int, reason: object, last: int | None = None) -> None:
        """Count malformed lines, from `first` to `last`, by default one.

        Raises:
            ValueError: there are too many already, as judged over 10,000 lines at least.
        """
        last = first if last is None else last
        self.bad += last - first + 1
        if len(self.examples) < SHOWN:
            where = f"line {first}" if last == first else f"lines {first} to {last}"
            self.examples.append(f"{where}: {reason}")
        self._judge(max(self.lines, JUDGED_FROM))

    def count_record(self, first: int) -> None:
        """Count the record that began in line `first` and ends in the last line that was read."""
        lines = self.lines - first + 1
        if lines > 1:
            self.records += 1
            self.continued += lines - 1
            self.longest = max(self.longest, (lines, first), key=lambda record: record[0])

    def finish(self) -> None:
        """Judge the whole file.

        Raises:
            ValueError: it is empty, or too much of it is malformed.
        """
        if not self.lines:
            raise ValueError(f"{self.path}: the file is empty; give the file as it was published")
        self._judge(self.lines)

    def remarks(self) -> list[str]:
        """What was left out or looks odd, one line each."""
        said = []
        if self.bad:
            said.append(
                f"{self.bad:,} of {self.lines:,} lines are malformed and left out: {'; '.join(self.examples)}"
            )
        if self.records:
            lines, first = self.longest
            said.append(
                f"records of several lines: {self.records:,}, the longest has {lines:,} lines from line "
                f"{first} on; if that is no text of several lines, a quotation mark was left open there"
            )
        return said + self.notes

    def _judge(self, lines: int) -> None:
        if self.bad > self.max_bad * lines:
            limit = f", more than --max-bad={self.max_bad:g}" if self.max_bad else ""
            raise ValueError(
                f"{self.path}: {self.bad:,} of {self.lines:,} lines are malformed{limit}; "
                f"is it a file of this format? {'; '.join(self.examples)}"
            )


class Lines:
    """Iterator over the lines of a text file, ends included, plain or gzipped.

    A line that is too long or can't be decoded raises `Malformed`; the next one can be read.

    Args:
        tally: names the file; told of each line.
        encodings: tried in turn.

    Raises:
        ValueError: it is no text, or a gzip file that is cut off or damaged.
    """

    def __init__(self, tally: Tally, encodings: Sequence[str] = ("utf-8",)) -> None:
        self.tally, self.encodings = tally, encodings
        self.raw = tally.path.open("rb")
        start = self.raw.peek(4)[:4]
        if start.startswith((b"PK\x03\x04", b"\xff\xfe", b"\xfe\xff")):
            self.raw.close()
            found, cure = (
                ("a zip archive", "unpack it") if start[:1] == b"P" else ("UTF-16", "save it as UTF-8")
            )
            raise ValueError(f"{tally.path}: the file is {found}; {cure} first")
        self.file = gzip.GzipFile(fileobj=self.raw) if start.startswith(b"\x1f\x8b") else self.raw

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.raw.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._read()
        if not line:
            raise StopIteration
        self.tally.lines += 1
        self.tally.position = self.raw.tell()
        if len(line) > LINE_LIMIT:
            while line and not line.endswith(b"\n"):
                line = self._read()
            raise Malformed(f"longer than {LINE_LIMIT >> 20} MiB")
        if self.tally.lines == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        for encoding in self.encodings:
            try:
                return line.decode(encoding)
            except UnicodeDecodeError:
                pass
        raise Malformed(f"not {' or '.join(self.encodings).upper()}")

    def _read(self) -> bytes:
        try:
            return self.file.readline(LINE_LIMIT + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.tally.path}: the gzip file is cut off or damaged after line {self.tally.lines:,} "
                f"({error}); download it again"
            ) from None


def parsed_rows(tally: Tally, parse: Callable[[str], object], encodings: Sequence[str] = ("utf-8",)) -> Rows:
    """Rows of a file with one of them per line. Blank lines are passed over."""
    with Lines(tally, encodings) as lines:
        while True:
            try:
                line = next(lines)
                if not line.strip():
                    continue
                row = parse(line)
                if not isinstance(row, dict):
                    raise Malformed("not an object with names and values")
            except StopIteration:
                return
            except Malformed as error:
                tally.reject(tally.lines, error)
            else:
                yield tally.lines, row


def parse_json(line: str) -> object:
    """A line of JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON ({error})") from None


def parse_loose(line: str) -> object:
    """A line of JSON, or a Python literal such as {'asin': u'B1'}; nothing is executed."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    if len(line) > LITERAL_LIMIT:
        raise Malformed(f"longer than {LITERAL_LIMIT:,} characters and not JSON")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as \d, which Python keeps as they are
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise Malformed("neither JSON nor a Python dict") from None


def json_rows(tally: Tally) -> Rows:
    """Rows of JSON lines."""
    return parsed_rows(tally, parse_json)


def loose_rows(tally: Tally) -> Rows:
    """Rows of lines that are JSON or Python dicts."""
    return parsed_rows(tally, parse_loose)


def delimited_rows(tally: Tally, separator: str, columns: Sequence[str]) -> Rows:
    """Rows of a file without header and quotes, UTF-8 or else Latin-1, as MovieLens has them."""

    def parse(line: str) -> Row:
        cells = line.rstrip("\r\n").split(separator)
        if len(cells) != len(columns):
            raise Malformed(f"{len(cells)} columns instead of {len(columns)}")
        return dict(zip(columns, cells, strict=True))

    return parsed_rows(tally, parse, ("utf-8", "latin-1"))


def csv_rows(tally: Tally, columns: Sequence[str]) -> Rows:
    """Rows of a CSV file with a header, whatever separates its columns.

    Between commas and semicolons cells may be quoted, and have several lines then (RFC 4180);
    between tabs and | quotation marks are text.

    Args:
        tally: names the file; told of records of several lines.
        columns: must be in the header, once each.

    Raises:
        ValueError: a column is missing or comes twice, or a record has more than 1,000 lines.
    """
    with Lines(tally) as lines:
        header, separator = _header(lines, columns)
        record = _RecordLines(lines, separator)
        reader = csv.reader(record, delimiter=separator, strict=True, quoting=_quoting(separator))
        while True:
            first = record.begin()
            try:
                cells = next(reader)
                if cells and len(cells) != len(header):
                    raise Malformed(f"{len(cells)} columns, the header has {len(header)}")
            except StopIteration:
                return
            except (csv.Error, Malformed) as error:
                # the record's lines that were read are gone, in the worst case up to the open quote's limit
                never = f"the quotation mark of line {record.opened} never closes"
                reason = never if str(error) == "unexpected end of data" else error
                tally.reject(first, reason, max(first, tally.lines))
                continue
            if cells:
                tally.count_record(first)
                yield first, dict(zip(header, cells, strict=True))


def _quoting(separator: str) -> Literal[0, 3]:
    return csv.QUOTE_NONE if separator in UNQUOTED else csv.QUOTE_MINIMAL


class _RecordLines:
    """Lines for the csv module, which asks for another one while a quotation mark is open.

    Attributes:
        opened: line in which the mark opens that is open now.

    Raises:
        ValueError: the record has more than 1,000 lines.
    """

    def __init__(self, lines: Lines, separator: str) -> None:
        self.lines, self.separator = lines, separator
        self.first = self.opened = 0

    def begin(self) -> int:
        """Say that a record begins; returns its line."""
        self.first = self.opened = self.lines.tally.lines + 1
        return self.first

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        number = self.lines.tally.lines + 1
        if number >= self.first + RECORD_LIMIT:
            raise ValueError(
                f"{self.lines.tally.path}: a quotation mark opens in line {self.opened} and its record has "
                f"more than {RECORD_LIMIT:,} lines; remove it, or quote the whole cell and double it there"
            )
        line = next(self.lines)
        if number > self.first and self._closes(line):
            self.opened = number
        return line

    def _closes(self, line: str) -> bool:
        """Whether the open mark closes in this line; if the record goes on, another one opens in it."""
        try:
            return len(next(csv.reader(['"' + line], delimiter=self.separator))) > 1
        except csv.Error:  # the reader proper will say so
            return False


def _header(lines: Lines, columns: Sequence[str]) -> tuple[list[str], str]:
    """Column names and their separator: that with which all wanted columns are there."""
    path = lines.tally.path
    try:
        line = next(lines, "")
    except Malformed as error:
        raise ValueError(f"{path}: line 1: {error}; save it as UTF-8") from None
    if not line.strip():
        raise ValueError(f"{path}: the file is empty; its first line must name the columns")
    found = []
    for separator in SEPARATORS:
        try:
            cells = next(csv.reader([line], delimiter=separator, quoting=_quoting(separator)))
        except csv.Error as error:
            raise ValueError(f"{path}: line 1 names no columns ({error}); repair it") from None
        found.append([name.strip() for name in cells])
        if set(columns) <= set(found[-1]):
            require_columns(path, found[-1], columns)
            return found[-1], separator
        if separator in UNQUOTED and {f'"{column}"' for column in columns} <= set(found[-1]):
            raise ValueError(
                f"{path}: its column names are in quotation marks, which are text between tabs and |; "
                "save it with commas, or without these marks"
            )
    require_columns(path, max(found, key=len), columns)
    raise AssertionError("one is missing")


def require_columns(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    """Check that the file has the columns, once each.

    Raises:
        ValueError: one is missing or comes twice.
    """
    for column in columns:
        if column not in names:
            raise ValueError(
                f"{path}: column {column!r} is missing, the file has {', '.join(names)}; name one of them"
            )
        if (times := names.count(column)) > 1:
            raise ValueError(f"{path}: column {column!r} comes {times} times; rename all but one")


def parquet_rows(tally: Tally, columns: Sequence[str], optional: Collection[str] = ()) -> Rows:
    """Rows of a Parquet file, with these columns only, batch by batch.

    Args:
        tally: names the file.
        columns: must be in it, once each.
        optional: lower-case names of columns that are read too where they are there, in any case.

    Raises:
        ValueError: pyarrow is not installed, the file can't be read, or a column is missing or comes twice.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{tally.path}: reading Parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(tally.path) as file:
            there = file.schema_arrow.names
            require_columns(tally.path, there, columns)
            wanted = [*columns, *(name for name in there if name.lower() in optional)]
            for batch in file.iter_batches(BATCH, columns=wanted):
                names = batch.schema.names
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    tally.lines += 1
                    yield tally.lines, dict(zip(names, values, strict=True))
                share = tally.lines / file.metadata.num_rows
                tally.position = int(share * tally.path.stat().st_size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{tally.path}: not a whole Parquet file ({error}); make it again") from None
