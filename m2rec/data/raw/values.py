"""Values of raw files: ids, numbers, ratings and texts, with counts of what was changed or looks odd."""

import html
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal, InvalidOperation
from reprlib import repr as short

from m2rec.data.column_names import LABEL_COLUMNS, TIME_COLUMNS
from m2rec.data.raw.tally import MalformedRowError, RawRow

MAX_NUMBER_DIGITS = 28  # Decimal's precision
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def is_missing(value: object) -> bool:
    """Whether a value is None, blank text or NaN."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float | Decimal) and not isinstance(value, bool)


def parse_id(value: object) -> str:
    """The text of an id; a whole number without its .0.

    Raises:
        MalformedRowError: it is not text or a number, or has characters that a table can't hold.
    """
    if not _is_scalar(value):
        raise MalformedRowError(f"{short(value)} is not a valid id")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        text = _join_surrogates(str(value), "strict")
    except UnicodeDecodeError:
        raise MalformedRowError(f"id {short(value)} has half a character") from None
    if _CONTROL_CHARACTER.search(text):
        raise MalformedRowError(f"id {short(value)} has a tab, a newline or another control character")
    return text


def _join_surrogates(text: str, errors: str) -> str:
    """Combine halves of characters (surrogates), which Python literals have."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)


def parse_number(value: object) -> Decimal:
    """A number in full precision.

    Raises:
        MalformedRowError: it is not a number, not finite, or has more than 28 digits.
    """
    if not _is_scalar(value):
        raise MalformedRowError(f"{short(value)} is not a number")
    try:
        number = Decimal(str(value))
    except (InvalidOperation, ValueError):
        raise MalformedRowError(f"{short(value)} is not a number") from None
    _, digits, exponent = number.as_tuple()
    if isinstance(exponent, str):  # infinite or NaN
        raise MalformedRowError(f"{short(value)} is not a finite number")
    if max(len(digits), abs(exponent)) > MAX_NUMBER_DIGITS:
        raise MalformedRowError(f"{short(value)} is not a number of up to {MAX_NUMBER_DIGITS} digits")
    return number


def parse_rating(value: object) -> Decimal | None:
    """A rating, which may be a truth value; None for a missing one."""
    if is_missing(value):
        return None
    return parse_number(int(value) if isinstance(value, bool) else value)


def format_decimal(number: Decimal) -> str:
    """The shortest text that is exactly this number, without exponent."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def join_unique_texts(value: object) -> str:
    """Text of a value; the distinct parts of a list, nested or not, joined by commas."""
    return ", ".join(dict.fromkeys(_flatten_texts(value)))


def join_texts(value: object) -> str:
    """Text of a value; the parts of a list, joined by spaces."""
    return " ".join(_flatten_texts(value))


def _flatten_texts(value: object) -> Iterator[str]:
    """The texts in a value, lists of any depth taken apart; JSON objects are skipped."""
    remaining = [value]
    while remaining:
        part = remaining.pop()
        if isinstance(part, list | tuple):
            remaining.extend(reversed(part))
        elif not is_missing(part) and not isinstance(part, dict):
            yield str(part).strip()


def clean_text(text: str) -> str:
    """Text without HTML entities, on one line, with single spaces."""
    plain = html.unescape(_join_surrogates(text, "replace"))
    return " ".join(_CONTROL_CHARACTER.sub(" ", plain).split())


class IdReader:
    """Read the ids of one file without blanks around them, and count those that had some.

    Args:
        name_line: what to call a line in remarks.
    """

    def __init__(self, name_line: Callable[[int], str] = "line {}".format) -> None:
        self.n_stripped, self.example, self.name_line = 0, "", name_line

    def read(self, value: object, line: int) -> str:
        """The id in a value of this line.

        Raises:
            MalformedRowError: see `parse_id`.
        """
        text = parse_id(value)
        stripped = text.strip()
        if len(stripped) < len(text):
            self.n_stripped += 1
            self.example = self.example or f"{text!r} in {self.name_line(line)}"
        return stripped

    def remarks(self) -> list[str]:
        """How many ids were changed."""
        if not self.n_stripped:
            return []
        return [f"blanks around ids were removed: {self.n_stripped:,}, the first from {self.example}"]


class UnusedColumnCheck:
    """Find unused columns that seem to matter: zeros in columns of clicks, and a column of times.

    Args:
        used: columns that are used.
    """

    def __init__(self, used: Collection[str]) -> None:
        self.other_columns = set(used)
        """Columns that are used or don't matter, as seen so far."""
        self.zeros = Counter[str]()
        """Zeros by column of clicks."""
        self.time_column: str | None = None

    def check(self, row: RawRow) -> None:
        """Look at one row."""
        for name in row.keys() - self.other_columns:
            if name.lower() in LABEL_COLUMNS:
                self.zeros[name] += is_zero(row[name])
            else:
                self.note_names([name])

    def note_names(self, names: Collection[str]) -> None:
        """Note the columns of rows, those of clicks aside."""
        for name in set(names) - self.other_columns:
            if name.lower() not in LABEL_COLUMNS:
                self.other_columns.add(name)
                if name.lower() in TIME_COLUMNS:
                    self.time_column = name

    def remarks(self) -> list[str]:
        """How many interactions seem to be impressions without a click."""
        remarks = []
        for name, zeros in self.zeros.items():
            if zeros:
                remarks.append(
                    f"column {name!r} is 0 in {zeros:,} lines, which count as interactions; "
                    f"to drop them set rating={name} min_rating=1"
                )
        return remarks


def is_zero(value: object) -> bool:
    """Whether a value is a number that is 0, or false."""
    try:
        return parse_rating(value) == 0
    except MalformedRowError:
        return False
