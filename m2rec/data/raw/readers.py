"""Raw files as rows, one at a time: JSON lines, Python dicts, delimited text, Parquet.

A row is what one line holds by name, and in CSV what one record holds, whose quoted cells may have
several lines. Text files may be gzipped. A line that can't be read is counted in a `Tally` and
skipped; memory holds one record, or of Parquet one batch.
"""

import ast
import codecs
import csv
import gzip
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.errors import UserError
from m2rec.yaml_values import suggest_spelling

RawRow = dict[str, Any]
NumberedRows = Iterator[tuple[int, RawRow]]
"""Line number, from 1, with its row."""

MAX_LINE_BYTES = 2**24  # bytes, and characters of an element of a JSON array
CHUNK_BYTES = 2**16  # bytes of a JSON array that are read at once
MAX_RECORD_LINES = 1000  # lines of a CSV record; a longer one is taken for a quotation mark left open
MAX_LITERAL_CHARACTERS = 2**20  # characters; a syntax tree takes some hundred times its text
PARQUET_BATCH_ROWS = 10_000  # rows of Parquet
MIN_LINES_BEFORE_STOP = 10_000  # lines before a file may be given up
MAX_MALFORMED_EXAMPLES = 3  # malformed lines
SEPARATORS = ",\t;|"
QUOTING_SEPARATORS = ",;"  # where anything else separates, quotation marks are text
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


class MalformedRowError(Exception):
    """A line that can't be used, and why."""


@dataclass
class Tally:
    """What was read of a file, and what was wrong with it."""

    path: Path
    max_bad: float = 0.0
    """Largest share of malformed lines, 0 to 1."""
    lines: int = 0
    malformed_count: int = 0
    position: int = 0
    """Bytes of the file that were read."""
    examples: list[str] = field(default_factory=list)
    records: int = 0
    """Records of several lines."""
    continuation_lines: int = 0
    """Lines of these records but the first of each."""
    longest_record: tuple[int, int] = (0, 0)
    """Lines of the longest of these records, and its first line."""
    notes: list[str] = field(default_factory=list)
    """What else is to be said about the file."""
    extra_rows: int = 0
    """Rows beyond the first of each line, where lists were taken apart."""

    @property
    def rows(self) -> int:
        """Lines, and the further rows in them: what malformed ones are a share of."""
        return self.lines + self.extra_rows

    def reject(self, first: int, reason: object, last: int | None = None) -> None:
        """Count malformed lines, from `first` to `last`, by default one.

        Raises:
            ValueError: there are too many already, as judged over 10,000 lines at least.
        """
        last = first if last is None else last
        self.malformed_count += last - first + 1
        if len(self.examples) < MAX_MALFORMED_EXAMPLES:
            where = f"line {first}" if last == first else f"lines {first} to {last}"
            self.examples.append(f"{where}: {reason}")
        self._check_malformed_share(max(self.rows, MIN_LINES_BEFORE_STOP))

    def count_record(self, first: int) -> None:
        """Count the record that began in line `first` and ends in the last line that was read."""
        lines = self.lines - first + 1
        if lines > 1:
            self.records += 1
            self.continuation_lines += lines - 1
            self.longest_record = max(self.longest_record, (lines, first), key=lambda record: record[0])

    def finish(self) -> None:
        """Judge the whole file.

        Raises:
            ValueError: it is empty, or too much of it is malformed.
        """
        if not self.lines:
            raise UserError(f"{self.path}: the file is empty; give the file as it was published")
        self._check_malformed_share(self.rows)

    def remarks(self) -> list[str]:
        """What was left out or looks odd, one line each."""
        said = []
        if self.malformed_count:
            said.append(f"{self._describe_malformed()} and left out: {'; '.join(self.examples)}")
        if self.records:
            lines, first = self.longest_record
            said.append(
                f"records of several lines: {self.records:,}, the longest has {lines:,} lines from line "
                f"{first} on; if that is no text of several lines, a quotation mark was left open there"
            )
        return said + self.notes

    def _describe_malformed(self) -> str:
        what = "rows are malformed" if self.extra_rows else "lines are malformed"
        return f"{self.malformed_count:,} of {self.rows:,} {what}"

    def _check_malformed_share(self, rows: int) -> None:
        if self.malformed_count > self.max_bad * rows:
            limit = f", more than --max-bad={self.max_bad:g}" if self.max_bad else ""
            raise UserError(
                f"{self.path}: {self._describe_malformed()}{limit}; "
                f"is it a file of this format? {'; '.join(self.examples)}"
            )


def open_bytes(path: Path) -> tuple[BufferedReader, BufferedReader | gzip.GzipFile]:
    """The file as it lies on the disk, and as it reads: unpacked, if it is gzipped.

    Raises:
        ValueError: it is an archive, a spreadsheet or UTF-16.
    """
    raw = path.open("rb")
    start = raw.peek(4)[:4]
    for magic, describe in _BINARY_SIGNATURES.items():
        if start.startswith(magic):
            raw.close()
            raise UserError(f"{path}: the file is {describe(path)} first")
    return raw, gzip.GzipFile(fileobj=raw) if start.startswith(b"\x1f\x8b") else raw


def _describe_zip(path: Path) -> str:
    """Spreadsheets are zip archives, of members with known names."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        members = []
    if any(name.startswith(("xl/", "Index/")) or name == "content.xml" for name in members):
        return "a spreadsheet; save it as CSV"
    return "a zip archive; unpack it"


# by how files begin that are no text: what they are, and what to do first
_BINARY_SIGNATURES: dict[bytes, Callable[[Path], str]] = {
    b"PK\x03\x04": _describe_zip,
    b"\xd0\xcf\x11\xe0": lambda _: "a spreadsheet; save it as CSV",  # .xls
    b"\xff\xfe": lambda _: "UTF-16; save it as UTF-8",
    b"\xfe\xff": lambda _: "UTF-16; save it as UTF-8",
}


def _build_gzip_error(tally: Tally, error: Exception, unit: str = "line") -> ValueError:
    return ValueError(
        f"{tally.path}: the gzip file is cut off or damaged after {unit} {tally.lines:,} "
        f"({error}); download it again"
    )


class LineReader:
    """Iterator over the lines of a text file, ends included, plain or gzipped.

    A line that is too long or can't be decoded raises `MalformedRowError`; the next one can be read.

    Args:
        tally: names the file; told of each line.
        encodings: tried in turn.

    Raises:
        ValueError: it is no text, or a gzip file that is cut off or damaged.
    """

    def __init__(self, tally: Tally, encodings: Sequence[str] = ("utf-8",)) -> None:
        self.tally, self.encodings = tally, encodings
        self.raw, self.file = open_bytes(tally.path)

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
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._read()
            raise MalformedRowError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
        if self.tally.lines == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        for encoding in self.encodings:
            try:
                return line.decode(encoding)
            except UnicodeDecodeError:
                pass
        raise MalformedRowError(f"not {' or '.join(self.encodings).upper()}")

    def _read(self) -> bytes:
        try:
            return self.file.readline(MAX_LINE_BYTES + 1)
        except GZIP_ERRORS as error:
            raise _build_gzip_error(self.tally, error) from None


def read_parsed_lines(
    tally: Tally, parse: Callable[[str], object], encodings: Sequence[str] = ("utf-8",)
) -> NumberedRows:
    """Rows of a file with one of them per line. Blank lines are passed over."""
    with LineReader(tally, encodings) as lines:
        while True:
            try:
                line = next(lines)
                if not line.strip():
                    continue
                row = parse(line)
                if not isinstance(row, dict):
                    raise MalformedRowError("not an object with names and values")
            except StopIteration:
                return
            except MalformedRowError as error:
                tally.reject(tally.lines, error)
            else:
                yield tally.lines, row


class _DuplicateNameError(UserError):
    """A JSON object has a name twice."""


def _build_json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose names are there once; Python would take the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _DuplicateNameError(f"the name {twice!r} comes twice in an object")
    return found


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_build_json_object)


def parse_json(line: str) -> object:
    """A line of JSON."""
    try:
        return _JSON_DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise MalformedRowError(f"not JSON ({error})") from None


def parse_json_or_literal(line: str) -> object:
    """A line of JSON, or a Python literal such as {'asin': u'B1'}; nothing is executed."""
    try:
        return _JSON_DECODER.decode(line)
    except _DuplicateNameError as error:
        raise MalformedRowError(error) from None
    except (ValueError, RecursionError):
        pass
    if len(line) > MAX_LITERAL_CHARACTERS:
        raise MalformedRowError(f"longer than {MAX_LITERAL_CHARACTERS:,} characters and not JSON")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as \d, which Python keeps as they are
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise MalformedRowError("neither JSON nor a Python dict") from None


def read_json_rows(tally: Tally) -> NumberedRows:
    """Rows of JSON lines, or of a file that is one JSON array of objects."""
    if _is_json_array(tally):
        return _read_array_rows(tally)
    return read_parsed_lines(tally, parse_json)


def _is_json_array(tally: Tally) -> bool:
    raw, file = open_bytes(tally.path)
    try:
        start: bytes = file.peek(64)[:64]
    except GZIP_ERRORS as error:
        raise _build_gzip_error(tally, error) from None
    finally:
        raw.close()
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array_rows(tally: Tally) -> NumberedRows:
    """Rows of a JSON array, element by element; the number of a row is its place in the array.

    Raises:
        ValueError: it is no JSON up to its end; where an element is broken, the next can't be found.
    """
    for element in _read_array_elements(tally):
        tally.lines += 1
        if isinstance(element, dict):
            yield tally.lines, element
        else:
            tally.reject(tally.lines, "not an object with names and values")


def _read_array_elements(tally: Tally) -> Iterator[object]:
    text, before = "", "["
    for chunk in _read_text_chunks(tally):
        text += chunk
        found, end, before = _parse_elements(text, before)
        yield from found
        text = text[end:]
        if len(text) > MAX_LINE_BYTES:
            raise _build_array_error(tally, f"no JSON in the {MAX_LINE_BYTES >> 20} MiB behind it")
        if not before and text.strip():
            raise _build_array_error(tally, "it ends there, and more follows")
    if before:
        raise _build_array_error(tally, "it is cut off, or no JSON")


def _parse_elements(text: str, before: str) -> tuple[list[object], int, str]:
    """The array's elements that are whole in a piece of its text.

    Args:
        text: the piece.
        before: what stands before its first element, [ or a comma; nothing when the array was closed.

    Returns:
        The elements, where the rest of the piece begins, and what stands before the next element.
    """
    found, at = list[object](), 0
    while before:
        start = _skip_whitespace(text, at)
        if before == "," and text[start : start + 1] == "]":
            return found, start + 1, ""
        if not text.startswith(before, start):
            break
        start = _skip_whitespace(text, start + 1)
        if before == "[" and text[start : start + 1] == "]":
            return found, start + 1, ""
        try:
            element, end = _JSON_DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            break  # it may go on in the next piece
        if _skip_whitespace(text, end) == len(text):
            break  # so may a number
        found.append(element)
        at, before = end, ","
    return found, at, before


_WHITESPACE = re.compile(r"\s*")


def _skip_whitespace(text: str, at: int) -> int:
    match = _WHITESPACE.match(text, at)
    assert match
    return match.end()


def _read_text_chunks(tally: Tally) -> Iterator[str]:
    raw, file = open_bytes(tally.path)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with raw:
        try:
            while chunk := file.read(CHUNK_BYTES):
                tally.position = raw.tell()
                yield decoder.decode(chunk)
            yield decoder.decode(b"", final=True)
        except GZIP_ERRORS as error:
            raise _build_gzip_error(tally, error, "element") from None
        except UnicodeDecodeError:
            raise _build_array_error(tally, "not UTF-8") from None


def _build_array_error(tally: Tally, reason: object) -> ValueError:
    return ValueError(
        f"{tally.path}: the file begins as a JSON array, which is broken after element {tally.lines:,} "
        f"({reason}); write it again, as one array or with an object in each line"
    )


def read_json_or_literal_rows(tally: Tally) -> NumberedRows:
    """Rows of lines that are JSON or Python dicts."""
    return read_parsed_lines(tally, parse_json_or_literal)


def read_sequence_rows(tally: Tally) -> NumberedRows:
    """Rows of `user item item ...`, with blanks or tabs between: {"user": ..., "items": [...]}."""

    def parse(line: str) -> RawRow:
        user, *items = line.replace("\t", " ").strip(" \r\n").split(" ")
        return {"user": user, "items": [item for item in items if item]}

    return read_parsed_lines(tally, parse)


def read_delimited_rows(tally: Tally, separator: str, columns: Sequence[str]) -> NumberedRows:
    """Rows of a file without header and quotes, UTF-8 or else Latin-1, as MovieLens has them."""

    def parse(line: str) -> RawRow:
        cells = line.rstrip("\r\n").split(separator)
        if len(cells) != len(columns):
            raise MalformedRowError(f"{len(cells)} columns instead of {len(columns)}")
        return dict(zip(columns, cells, strict=True))

    return read_parsed_lines(tally, parse, ("utf-8", "latin-1"))


@dataclass(frozen=True)
class CsvLayout:
    """How a text table is laid out, where its header does not say it."""

    names: tuple[str, ...] = ()
    """Columns by position, an empty one for what is not used; with names the file has no header."""
    separator: str = ""
    """One or two characters; none: the one with which the columns are there."""


HEADER_LAYOUT = CsvLayout()


def read_csv_records(
    tally: Tally, columns: Sequence[str], layout: CsvLayout = HEADER_LAYOUT, cure: str = "name one of them"
) -> NumberedRows:
    """Rows of a table in a text file, whatever separates its columns.

    Between commas and semicolons cells may be quoted, and have several lines then (RFC 4180);
    between anything else quotation marks are text.

    Args:
        tally: names the file; told of records of several lines.
        columns: must be in the header, once each.
        layout: by default the file has a header.
        cure: what to do where a column is missing.

    Raises:
        ValueError: a column is missing or comes twice, the separator can't be found, or a record has more
            than 1,000 lines.
    """
    if layout.names:
        require_columns(tally.path, layout.names, columns)
        layout = replace(layout, separator=layout.separator or _detect_separator(tally.path, layout.names))
    with LineReader(tally) as lines:
        names, separator = layout.names, layout.separator
        if not names:
            names, separator = _read_header(lines, columns, separator, cure)
        record = _CsvRecordLines(lines, separator)
        reader = _read_cells(record, separator)
        expected = f"{len(names)} are named" if layout.names else f"the header has {len(names)}"
        while True:
            first = record.begin_record()
            try:
                cells = next(reader)
                if cells and len(cells) != len(names):
                    raise MalformedRowError(f"{len(cells)} columns, {expected}")
            except StopIteration:
                return
            except (csv.Error, MalformedRowError) as error:
                # the record's lines that were read are gone, in the worst case up to the open quote's limit
                never = f"the quotation mark of line {record.opened} never closes"
                reason = never if str(error) == "unexpected end of data" else error
                tally.reject(first, reason, max(first, tally.lines))
                continue
            if cells:
                tally.count_record(first)
                yield first, dict(zip(names, cells, strict=True))


def _read_cells(lines: Iterable[str], separator: str, strict: bool = True) -> Iterator[list[str]]:
    """Cells line by line, or record by record; none for a blank line."""
    if len(separator) == 1:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if separator in QUOTING_SEPARATORS else csv.QUOTE_NONE
        return csv.reader(lines, delimiter=separator, strict=strict, quoting=quoting)
    return map(partial(_split_line, separator), lines)  # which goes on after an error


def _split_line(separator: str, line: str) -> list[str]:
    line = line.rstrip("\r\n")
    return line.split(separator) if line.strip() else []


def _detect_separator(path: Path, names: Sequence[str]) -> str:
    """The one that gives the first line as many cells as there are names.

    Raises:
        ValueError: none does, or several.
    """
    with LineReader(Tally(path)) as lines:
        line = _read_first_line(lines, "it must hold data")
    counts = {}
    for separator in SEPARATORS:
        with suppress(csv.Error):  # a cell that is too long
            counts[separator] = len(next(_read_cells([line], separator, strict=False)))
    found = [separator for separator, count in counts.items() if count == len(names)]
    if len(found) == 1:
        return found[0]
    seen = ", ".join(f"{count} with {separator!r}" for separator, count in counts.items())
    raise UserError(
        f"{path}: {len(names)} columns are named, line 1 has {seen}; "
        f"say what separates them with --separator=' ' or the like, of items with --item-separator"
    )


class _CsvRecordLines:
    """Lines for the csv module, which asks for another one while a quotation mark is open.

    Attributes:
        opened: line in which the mark opens that is open now.

    Raises:
        ValueError: the record has more than 1,000 lines.
    """

    def __init__(self, lines: LineReader, separator: str) -> None:
        self.lines, self.separator = lines, separator
        self.first = self.opened = 0

    def begin_record(self) -> int:
        """Say that a record begins; returns its line."""
        self.first = self.opened = self.lines.tally.lines + 1
        return self.first

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        number = self.lines.tally.lines + 1
        if number >= self.first + MAX_RECORD_LINES:
            raise UserError(
                f"{self.lines.tally.path}: a quotation mark opens in line {self.opened} and its "
                f"record has more than {MAX_RECORD_LINES:,} lines; remove it, or quote the "
                f"whole cell and double it there"
            )
        line = next(self.lines)
        if number > self.first and self._closes_quote(line):
            self.opened = number
        return line

    def _closes_quote(self, line: str) -> bool:
        """Whether the open mark closes in this line; if the record goes on, another one opens in it."""
        try:
            return len(next(csv.reader(['"' + line], delimiter=self.separator))) > 1
        except csv.Error:  # the reader proper will say so
            return False


def _read_first_line(lines: LineReader, must: str) -> str:
    """Line 1, or an error that says what it must do."""
    path = lines.tally.path
    try:
        line = next(lines, "")
    except MalformedRowError as error:
        raise UserError(f"{path}: line 1: {error}; save it as UTF-8") from None
    if not line.strip():
        raise UserError(f"{path}: the file is empty; {must}")
    return line


def _read_header(
    lines: LineReader, columns: Sequence[str], separator: str, cure: str
) -> tuple[tuple[str, ...], str]:
    """Column names and their separator: that with which all wanted columns are there."""
    path = lines.tally.path
    line = _read_first_line(lines, "its first line must name the columns")
    found = []
    for mark in [separator] if separator else SEPARATORS:
        try:
            cells = next(_read_cells([line], mark, strict=False))
        except csv.Error as error:
            raise UserError(f"{path}: line 1 names no columns ({error}); repair it") from None
        found.append([name.strip() for name in cells])
        if set(columns) <= set(found[-1]):
            labels = [name for name in found[-1] if name.lower() in LABEL_COLUMNS]
            require_columns(path, found[-1], [*columns, *labels])
            return tuple(found[-1]), mark
        if mark not in QUOTING_SEPARATORS and {f'"{column}"' for column in columns} <= set(found[-1]):
            raise UserError(
                f"{path}: its column names are in quotation marks, which are text between tabs and |; "
                "save it with commas, or without these marks"
            )
    require_columns(path, max(found, key=len), columns, cure)
    raise AssertionError("one is missing")


def require_columns(
    path: Path, names: Sequence[str], columns: Sequence[str], cure: str = "name one of them"
) -> None:
    """Check that the file has the columns, once each.

    Raises:
        ValueError: one is missing or comes twice.
    """
    for column in columns:
        if column not in names:
            has = ", ".join(filter(None, names))
            raise UserError(
                f"{path}: column {column!r} is missing, the file has {has}; {cure}"
                f"{suggest_spelling(column, names)}"
            )
        if (times := names.count(column)) > 1:
            raise UserError(f"{path}: column {column!r} comes {times} times; rename all but one")


def read_parquet_rows(tally: Tally, columns: Sequence[str], optional: Collection[str] = ()) -> NumberedRows:
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
        raise UserError(f"{tally.path}: reading Parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(tally.path) as file:
            there = file.schema_arrow.names
            require_columns(tally.path, there, columns)
            wanted = [*columns, *(name for name in there if name.lower() in optional)]
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=wanted):
                names = batch.schema.names
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    tally.lines += 1
                    yield tally.lines, dict(zip(names, values, strict=True))
                share = tally.lines / file.metadata.num_rows
                tally.position = int(share * tally.path.stat().st_size)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{tally.path}: not a whole Parquet file ({error}); make it again") from None
