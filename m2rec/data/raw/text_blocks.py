"""Blocks of text files as columns, where pyarrow reads them as the readers of rows do."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import csv

from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.data.raw.blocks import Block, LineBlocks, TableBlocks
from m2rec.data.raw.delimited import (
    HEADER_LAYOUT,
    QUOTING_SEPARATORS,
    UTF8_OR_LATIN1,
    CsvLayout,
    find_csv_table,
    parse_cells,
)
from m2rec.data.raw.lines import BYTE_ORDER_MARK, UTF8, LineReader, open_bytes, parse_lines
from m2rec.data.raw.tally import NumberedRows, Tally

LARGE_BLOCK_BYTES = 1 << 24
SMALL_BLOCK_BYTES = 1 << 16
CHUNK_BYTES = 1 << 20  # parsed at once by one thread
MAX_LINE_BYTES = 1 << 17  # Python's csv refuses longer cells
_REPLACED_SEPARATOR = b"\x01"  # stands for a separator of two characters
_NEWLINE, _QUOTE = b"\n"[0], b'"'[0]

RecordReader = Callable[[LineReader, Callable[[], bool]], NumberedRows]
"""Reads rows until the function says that it is enough."""
ColumnReader = Callable[[bytes, np.ndarray], Mapping[str, pa.Array] | None]
"""Reads columns of lines, which end at the given places; one row for each line, None where they are odd."""


class TextBlocks:
    """Blocks of a text file.

    Args:
        lines: behind the header.
        reader: of these lines, for what is not read as columns.
        read_records: reads rows with it.
        read_columns: reads columns.
        names: of all columns; by default those that `read_columns` returns. Then the first lines are always
            read as rows.
    """

    def __init__(
        self,
        lines: LineBlocks,
        reader: LineReader,
        read_records: RecordReader,
        read_columns: ColumnReader,
        names: Sequence[str] = (),
    ) -> None:
        self._lines, self._reader = lines, reader
        self._read_records, self._read_columns = read_records, read_columns
        self._names = names

    @property
    def position(self) -> int:
        """Bytes of the content that were taken."""
        return self._lines.position

    def peek(self, is_large: bool) -> Block | None:
        """The next lines; None at the end."""
        is_first = not self._reader.tally.lines
        is_unknown = is_first and not self._names
        is_large = is_large and not is_unknown
        data = self._lines.peek(LARGE_BLOCK_BYTES if is_large else SMALL_BLOCK_BYTES)
        if data is None:
            return None
        size = len(data)
        if is_first:
            data = data.removeprefix(BYTE_ORDER_MARK)
        ends = None if is_unknown else _find_plain_lines(data)
        columns = None if ends is None else self._read_columns(data, ends)
        n_rows = len(next(iter(columns.values()))) if columns else 0
        is_complete = bool(self._names)
        return Block(size, is_large, n_rows, self._names or list(columns or ()), is_complete, columns)

    def take(self, block: Block) -> None:
        """Count the lines of a block and go on behind it."""
        self._lines.take(block.size)
        self._reader.tally.lines += block.n_rows
        self._reader.note_position()

    def read_rows(self, block: Block) -> NumberedRows:
        """Read the lines of a block, and the rest of a record that ends behind it."""
        stop = self.position + max(block.size, 1)
        return self._read_records(self._reader, lambda: self.position >= stop)


def _find_plain_lines(data: bytes) -> np.ndarray | None:
    r"""Where each line ends, (number of lines,), the last one perhaps without a newline.

    None where text is not UTF-8, has NUL, a long line, or a \r that is not before a \n.
    """
    if not data or data.startswith(BYTE_ORDER_MARK):  # in the middle of a file it is text, not for pyarrow
        return None
    if b"\0" in data or (b"\r" in data and data.count(b"\r") != data.count(b"\r\n")):
        return None
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError:
            return None
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == _NEWLINE)
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    return ends if np.diff(ends, prepend=-1).max() < MAX_LINE_BYTES else None


class _DelimitedColumns(NamedTuple):
    """Reads columns of delimited text."""

    names: Sequence[str]
    used: Collection[str]
    separator: str

    def read(self, data: bytes, ends: np.ndarray) -> Mapping[str, pa.Array] | None:
        """The used columns as texts; None where lines are odd, see `ColumnReader`."""
        separator = self.separator.encode()
        is_quoted = self.separator in QUOTING_SEPARATORS and b'"' in data
        if is_quoted and not are_plain_quotes(data, separator, ends):
            return None
        if len(separator) > 1:
            if _REPLACED_SEPARATOR in data:
                return None
            data, separator = data.replace(separator, _REPLACED_SEPARATOR), _REPLACED_SEPARATOR
        positions = {name: str(position) for position, name in enumerate(self.names) if name in self.used}
        convert = csv.ConvertOptions(
            check_utf8=False,
            column_types=dict.fromkeys(positions.values(), pa.string()),
            strings_can_be_null=False,
            include_columns=list(positions.values()),
        )
        parse = csv.ParseOptions(delimiter=separator.decode(), quote_char='"' if is_quoted else False)
        names = list(map(str, range(len(self.names))))
        read = csv.ReadOptions(column_names=names, block_size=CHUNK_BYTES)
        try:
            table = csv.read_csv(pa.BufferReader(data), read, parse, convert)
        except pa.ArrowInvalid:  # too many or too few columns
            return None
        if len(table) != len(ends):  # blank lines
            return None
        return {name: table[position].combine_chunks() for name, position in positions.items()}


def are_plain_quotes(data: bytes, separator: bytes, ends: np.ndarray) -> bool:
    """Whether quotation marks enclose whole cells, each within one line, and are doubled within them.

    Args:
        data: whole lines of CSV.
        separator: one byte.
        ends: of the lines.
    """
    characters = np.frombuffer(b"\n" + data + b"\n", dtype=np.uint8)
    quotes = np.flatnonzero(characters == _QUOTE)
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    is_doubled = closing[:-1] + 1 == opening[1:]  # within a cell it closes and opens again
    starts = opening[np.append(True, ~is_doubled)]
    stops = closing[np.append(~is_doubled, True)]
    before, after = characters[starts - 1], characters[stops + 1]
    is_start = (before == separator[0]) | (before == _NEWLINE)
    is_stop = (after == separator[0]) | (after == _NEWLINE) | (after == b"\r"[0])
    if not (is_start.all() and is_stop.all()):
        return False
    return bool((np.searchsorted(quotes, ends + 1) % 2 == 0).all())


@contextmanager
def open_csv_blocks(
    tally: Tally,
    used: Collection[str],
    columns: Sequence[str],
    layout: CsvLayout = HEADER_LAYOUT,
    cure: str = "name one of them",
) -> Iterator[TableBlocks]:
    """Blocks of the file that `delimited.read_csv_records` reads.

    Raises:
        ValueError: see `read_csv_records`.
    """
    table = find_csv_table(tally.path, columns, layout, cure)
    used = {*used, *(name for name in table.names if name.lower() in LABEL_COLUMNS)}
    reads = _DelimitedColumns(table.names, used, table.separator).read
    with open_bytes(tally.path) as (raw, content):
        lines = LineBlocks(content)
        reader = LineReader(tally, raw, lines, UTF8)
        if table.has_header:
            next(reader)
        yield TextBlocks(lines, reader, table.read_records, reads, table.names)


@contextmanager
def open_delimited_blocks(
    tally: Tally, used: Collection[str], separator: str, columns: Sequence[str]
) -> Iterator[TableBlocks]:
    """Blocks of the file that `delimited.read_delimited_rows` reads."""

    def read_records(lines: LineReader, is_done: Callable[[], bool]) -> NumberedRows:
        return parse_lines(lines, partial(parse_cells, separator, columns), is_done)

    reads = _DelimitedColumns(columns, used, separator).read
    with open_bytes(tally.path) as (raw, content):
        lines = LineBlocks(content)
        reader = LineReader(tally, raw, lines, UTF8_OR_LATIN1)
        yield TextBlocks(lines, reader, read_records, reads, columns)
