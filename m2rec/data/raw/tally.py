"""What was read of one raw file, and what was wrong with it.

Every line ends as a row, as a continuation of a row, or in the counts of a `Tally`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from m2rec.errors import UserError

RawRow = dict[str, Any]
NumberedRows = Iterator[tuple[int, RawRow]]
"""Line number, from 1, with its row."""
Record = TypeVar("Record")

MIN_LINES_BEFORE_STOP = 10_000  # lines before a file may be given up
MAX_MALFORMED_EXAMPLES = 3
PROGRESS_ROWS = 1000  # rows between two updates of the progress bar


class MalformedRowError(Exception):
    """A row that cannot be used; the message is the reason."""


@dataclass
class Tally:
    """Counts of one file."""

    path: Path
    max_bad: float = 0.0
    """Largest share of malformed lines, 0 to 1."""
    lines: int = 0
    malformed_count: int = 0
    position: int = 0
    """Bytes of the file that were read."""
    examples: list[str] = field(default_factory=list)
    """Malformed lines with the reason."""
    multiline_records: int = 0
    continuation_lines: int = 0
    """Lines of multi-line records after their first."""
    longest_record: tuple[int, int] = (0, 0)
    """Lines of the longest multi-line record, and its first line."""
    notes: list[str] = field(default_factory=list)
    """Further remarks about the file."""
    parts: list[tuple[int, str]] = field(default_factory=list)
    """Of a folder: the lines before each of its files, and the file's name."""
    extra_rows: int = 0
    """Rows beyond the first of each line, where lists were taken apart."""

    @property
    def rows(self) -> int:
        """Lines and the further rows in them: malformed rows are a share of these."""
        return self.lines + self.extra_rows

    def reject(self, first: int, reason: object, last: int | None = None) -> None:
        """Count malformed lines, from `first` to `last`, by default one.

        Raises:
            ValueError: there are too many already, as judged over 10,000 lines at least.
        """
        where = self.name_line(first)
        if last is not None and last > first:
            where = f"lines {first} to {last}"
            self.malformed_count += last - first
        self.malformed_count += 1
        if len(self.examples) < MAX_MALFORMED_EXAMPLES:
            self.examples.append(f"{where}: {reason}")
        self._check_malformed_share(max(self.rows, MIN_LINES_BEFORE_STOP))

    def begin_part(self, n_lines: int, name: str) -> None:
        """Begin a file of a folder, after `n_lines` lines of those before it."""
        self.parts.append((n_lines, name))

    def name_line(self, line: int) -> str:
        """What to call a line: its number, in a folder that in its file."""
        for n_lines, name in reversed(self.parts):
            if line > n_lines:
                return f"line {line - n_lines} of {name}"
        return f"line {line}"

    @property
    def size(self) -> int:
        """Bytes of the file, or of all files in the folder."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files if file.is_file())

    def count_record(self, first: int) -> None:
        """Count the record that begins in line `first` and ends in the last line that was read."""
        length = self.lines - first + 1
        if length == 1:
            return
        self.multiline_records += 1
        self.continuation_lines += length - 1
        if length > self.longest_record[0]:
            self.longest_record = (length, first)

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
        remarks = []
        if self.malformed_count:
            remarks.append(f"{self._describe_malformed()} and left out: {'; '.join(self.examples)}")
        if self.multiline_records:
            length, first = self.longest_record
            remarks.append(
                f"{self.multiline_records:,} records span several lines (longest: {length:,} lines, "
                f"from line {first}); an unclosed quotation mark there would explain it"
            )
        return remarks + self.notes

    def log_remarks(self, log: Callable[[str], object]) -> None:
        """Pass each remark, with the file's name, to `log`."""
        for remark in self.remarks():
            log(f"{self.path}: {remark}")

    def _describe_malformed(self) -> str:
        unit = "rows" if self.extra_rows else "lines"
        return f"{self.malformed_count:,} of {self.rows:,} {unit} are malformed"

    def _check_malformed_share(self, rows: int) -> None:
        if self.malformed_count <= self.max_bad * rows:
            return
        limit = f", more than max_bad={self.max_bad:g}" if self.max_bad else ""
        raise UserError(
            f"{self.path}: {self._describe_malformed()}{limit}; "
            f"is it a file of this format? {'; '.join(self.examples)}"
        )


def iterate_with_progress(
    records: Iterator[Record], tally: Tally, rows_between_updates: int = PROGRESS_ROWS
) -> Iterator[Record]:
    """Yield the records, and on a terminal show a bar over the file's bytes."""
    with tqdm(
        total=tally.size, unit="B", unit_scale=True, desc=tally.path.name, disable=None, leave=False
    ) as bar:
        for count, record in enumerate(records):
            if count % rows_between_updates == 0:
                bar.update(tally.position - bar.n)
            yield record
