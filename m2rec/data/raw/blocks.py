"""Blocks of a table: looked at as columns first, and read row by row where that fails."""

import gzip
import io
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from io import BufferedReader
from typing import NamedTuple, Protocol

import pyarrow as pa

from m2rec.data.raw.lines import GZIP_ERRORS
from m2rec.data.raw.tally import NumberedRows, Tally


class Block(NamedTuple):
    """The next rows of a table."""

    size: int
    """As `TableBlocks.position` counts."""
    is_large: bool
    n_rows: int = 0
    """One for each line."""
    names: Collection[str] = ()
    """Of all columns."""
    is_complete: bool = False
    """Whether each row has all columns, though a value may be missing."""
    columns: Mapping[str, pa.Array] | None = None
    """At least those that were asked for, (n_rows,) each; None where only a reader of rows can read them."""


class TableBlocks(Protocol):
    """The rows of a table in order; each block is taken as columns or as rows."""

    @property
    def position(self) -> int:
        """How much was taken."""
        ...

    def peek(self, is_large: bool) -> Block | None:
        """The next rows; None at the end."""
        ...

    def take(self, block: Block) -> None:
        """Count the rows of a block and go on behind it."""
        ...

    def read_rows(self, block: Block) -> NumberedRows:
        """Read the rows of a block in place of its columns, and those of a record that ends behind it."""
        ...


BlockReader = Callable[[Tally, Collection[str]], AbstractContextManager[TableBlocks | None]]
"""Opens the file that the tally names, to read the columns with these names; None: read it as rows."""


class LineBlocks:
    """The content of an open text file, in blocks of whole lines or line by line.

    Args:
        content: see `lines.open_bytes`.

    Attributes:
        position: bytes of the content that were taken.
    """

    def __init__(self, content: BufferedReader | gzip.GzipFile) -> None:
        self.position = 0
        self._content = content
        self._buffer, self._offset = b"", 0
        self._is_at_end = False
        self._error: Exception | None = None

    def peek(self, size: int) -> bytes | None:
        """The whole lines in the next `size` bytes; None at the end of the file.

        It is empty where the next line is longer, or where a gzip file is damaged: `readline` says more.
        """
        self._fill(size)
        stop = min(self._offset + size, len(self._buffer))
        is_last = stop == len(self._buffer) and self._is_at_end and self._error is None
        if is_last and stop == self._offset:
            return None
        if not is_last:
            stop = self._buffer.rfind(b"\n", self._offset, stop) + 1
        return self._buffer[self._offset : stop]

    def take(self, size: int) -> None:
        """Go on behind the next `size` bytes, which were looked at."""
        self._offset += size
        self.position += size

    def readline(self, size: int, /) -> bytes:
        """Take the next line, or the first `size` bytes of it; empty at the end of the file.

        Raises:
            EOFError, zlib.error, gzip.BadGzipFile: the file is damaged before the end of the line.
        """
        stop = self._buffer.find(b"\n", self._offset, self._offset + size) + 1
        if not stop:
            self._fill(size)
            stop = self._buffer.find(b"\n", self._offset, self._offset + size) + 1
            stop = stop or min(self._offset + size, len(self._buffer))
        line = self._buffer[self._offset : stop]
        if self._error is not None and len(line) < size and not line.endswith(b"\n"):
            raise self._error
        self.take(len(line))
        return line

    def _fill(self, size: int) -> None:
        """Hold at least `size` bytes, or all that are left."""
        missing = size - (len(self._buffer) - self._offset)
        if missing <= 0 or self._is_at_end:
            return
        parts = [self._buffer[self._offset :]]
        while missing > 0 and not self._is_at_end:
            parts.append(self._read_part(missing))
            missing -= len(parts[-1])
        self._buffer, self._offset = b"".join(parts), 0

    def _read_part(self, size: int) -> bytes:
        """Up to `size` bytes; the content ends where a gzip file is damaged."""
        if not isinstance(self._content, gzip.GzipFile):
            part = self._content.read(size)
        else:
            try:
                part = self._content.read1(io.DEFAULT_BUFFER_SIZE)  # what is before the damage is not lost
            except GZIP_ERRORS as error:
                self._error, part = error, b""
        self._is_at_end = not part
        return part
