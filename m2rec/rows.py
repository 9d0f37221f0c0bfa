"""Raw files as rows, one at a time: JSON lines, Python dicts, delimited text, Parquet.

A row is what one line holds by name. Text files may be gzipped. A line that can't be read is
counted in a `Tally` and skipped; memory holds one line, or of Parquet one batch.
"""

import ast
import csv
import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]
"""Line number, from 1, with its row."""

LINE_LIMIT = 2**24  # bytes
LITERAL_LIMIT = 2**20  # characters; a syntax tree takes some hundred times its text
BATCH = 10_000  # rows of Parquet
JUDGED_FROM = 10_000  # lines before a file may be given up
SHOWN = 3  # malformed lines
SEPARATORS = ",\t;|"


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

    def reject(self, number: int, reason: object, lines: int = 1) -> None:
        """Count malformed lines, of which line `number` is the first.

        Raises:
            ValueError: there are too many already, as judged over 10,000 lines at least.
        """
        self.bad += lines
        if len(self.examples) < SHOWN:
            self.examples.append(f"line {number}: {reason}")
        self._judge(max(self.lines, JUDGED_FROM))

    def finish(self) -> None:
        """Judge the whole file.

        Raises:
            ValueError: it is empty, or too much of it is malformed.
        """
        if not self.lines:
            raise ValueError(f"{self.path}: the file is empty; give the file as it was published")
        self._judge(self.lines)

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
    """Rows of a CSV file with a header, whatever separates its columns; cells may be quoted.

    Args:
        tally: names the file.
        columns: must be in the header.

    Raises:
        ValueError: a column is missing.
    """
    with Lines(tally) as lines:
        header, separator = _header(lines, columns)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            first = tally.lines + 1
            try:
                cells = next(reader)
                if cells and len(cells) != len(header):
                    raise Malformed(f"{len(cells)} columns, the header has {len(header)}")
            except StopIteration:
                return
            except (csv.Error, Malformed) as error:
                # an open quote swallows lines up to the csv module's limit of a cell
                tally.reject(first, error, max(1, tally.lines - first + 1))
                continue
            if cells:
                yield first, dict(zip(header, cells, strict=True))


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
            names = [name.strip() for name in next(csv.reader([line], delimiter=separator))]
        except csv.Error as error:
            raise ValueError(f"{path}: line 1 names no columns ({error}); repair it") from None
        if set(columns) <= set(names):
            return names, separator
        found.append(names)
    require_columns(path, max(found, key=len), columns)
    raise AssertionError("one is missing")


def require_columns(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    """Check that the file has the columns.

    Raises:
        ValueError: one is missing.
    """
    for column in columns:
        if column not in names:
            raise ValueError(
                f"{path}: column {column!r} is missing, the file has {', '.join(names)}; name one of them"
            )


def parquet_rows(tally: Tally, columns: Sequence[str]) -> Rows:
    """Rows of a Parquet file, with these columns only, batch by batch.

    Raises:
        ValueError: pyarrow is not installed, the file can't be read, or a column is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{tally.path}: reading Parquet needs pyarrow; run: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(tally.path) as file:
            require_columns(tally.path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(BATCH, columns=list(columns)):
                names = batch.schema.names
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    tally.lines += 1
                    yield tally.lines, dict(zip(names, values, strict=True))
                share = tally.lines / file.metadata.num_rows
                tally.position = int(share * tally.path.stat().st_size)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{tally.path}: not a whole Parquet file ({error}); make it again") from None
