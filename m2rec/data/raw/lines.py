"""Lines of raw text files, plain or gzipped, one at a time."""

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Protocol, Self

from m2rec.data.raw.tally import MalformedRowError, NumberedRows, Tally
from m2rec.errors import UserError

MAX_LINE_BYTES = 2**24
GZIP_MAGIC = b"\x1f\x8b"
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF8 = ("utf-8",)


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[BufferedReader, BufferedReader | gzip.GzipFile]]:
    """The file on the disk, and its content: unpacked if it is gzipped.

    Raises:
        ValueError: it is an archive, a spreadsheet or UTF-16.
    """
    with path.open("rb") as raw:
        start = raw.peek(4)[:4]
        for magic, description in _BINARY_SIGNATURES.items():
            if start.startswith(magic):
                raise UserError(f"{path}: the file is {description}")
        yield raw, gzip.GzipFile(fileobj=raw) if start.startswith(GZIP_MAGIC) else raw


# first bytes of files that are not text: what the file is, and what to do first
_BINARY_SIGNATURES = {
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it or save it as CSV first",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save it as CSV first",  # .xls
    b"\xff\xfe": "UTF-16; save it as UTF-8 first",
    b"\xfe\xff": "UTF-16; save it as UTF-8 first",
}


def build_gzip_error(tally: Tally, error: Exception) -> UserError:
    """The error for a damaged gzip file."""
    return UserError(
        f"{tally.path}: the gzip file is cut off or damaged after line {tally.lines:,} ({error}); "
        f"download it again"
    )


class Readable(Protocol):
    """Bytes of a file, read line by line."""

    def readline(self, size: int, /) -> bytes:
        """The next line, or the first `size` bytes of it."""
        ...


class LineReader:
    """Iterator over the lines of an open text file, ends included.

    A line that is too long or can't be decoded raises `MalformedRowError`; the next one can be read.

    Args:
        tally: counts each line.
        raw, content: see `open_bytes`.
        encodings: tried in turn.

    Raises:
        ValueError: a gzip file is cut off or damaged.
    """

    def __init__(
        self,
        tally: Tally,
        raw: BufferedReader,
        content: Readable,
        encodings: Sequence[str] = UTF8,
    ) -> None:
        self.tally, self.raw, self.content, self.encodings = tally, raw, content, encodings

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._read_part()
        if not line:
            raise StopIteration
        self.tally.lines += 1
        self.note_position()
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = self._read_part()
            raise MalformedRowError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
        if self.tally.lines == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        for encoding in self.encodings:
            try:
                return line.decode(encoding)
            except UnicodeDecodeError:
                pass
        raise MalformedRowError(f"not {' or '.join(self.encodings).upper()}")

    def note_position(self) -> None:
        """Tell the tally how much of the file on the disk was read."""
        self.tally.position = self.raw.tell()

    def _read_part(self) -> bytes:
        try:
            return self.content.readline(MAX_LINE_BYTES + 1)
        except GZIP_ERRORS as error:
            raise build_gzip_error(self.tally, error) from None


@contextmanager
def open_lines(tally: Tally, encodings: Sequence[str] = UTF8) -> Iterator[LineReader]:
    """The lines of the file that `tally` names.

    Raises:
        ValueError: see `open_bytes`.
    """
    with open_bytes(tally.path) as (raw, content):
        yield LineReader(tally, raw, content, encodings)


def is_never_done() -> bool:
    """Read to the end of the file."""
    return False


def parse_lines(
    lines: LineReader, parse: Callable[[str], object], is_done: Callable[[], bool] = is_never_done
) -> NumberedRows:
    """One row per line; blank lines are skipped, malformed ones counted.

    Args:
        parse: line -> row; raises `MalformedRowError` for a line that cannot be used.
        is_done: asked before each line whether to stop.
    """
    while not is_done():
        try:
            line = next(lines)
            if not line.strip():
                continue
            row = parse(line)
            if not isinstance(row, dict):
                raise MalformedRowError("expected a JSON object")
        except StopIteration:
            return
        except MalformedRowError as error:
            lines.tally.reject(lines.tally.lines, error)
        else:
            yield lines.tally.lines, row


def read_parsed_lines(
    tally: Tally, parse: Callable[[str], object], encodings: Sequence[str] = UTF8
) -> NumberedRows:
    """One row per line of a file, see `parse_lines`."""
    with open_lines(tally, encodings) as lines:
        yield from parse_lines(lines, parse)
