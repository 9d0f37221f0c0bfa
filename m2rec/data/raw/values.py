"""Values of raw files: ids, numbers, ratings and texts, with what was odd about them counted."""

import html
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator
from decimal import Decimal, InvalidOperation
from reprlib import repr as short

from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.data.raw.readers import MalformedRowError, RawRow

MAX_NUMBER_DIGITS = 28  # of a number, what Decimal computes with
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def is_missing(value: object) -> bool:
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and math.isnan(value))
    )


def parse_id(value: object) -> str:
    """An id as it stands; a whole number without its .0.

    Raises:
        Malformed: it is no text or number, or can't stand in a tab-separated file.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise MalformedRowError(f"{short(value)} is no id")
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
    """Surrogates put together to the characters that they are halves of."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)


def parse_number(value: object) -> Decimal:
    """A number in full precision.

    Raises:
        Malformed: it is none, not finite, or has more than 28 places before or after the point.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise MalformedRowError(f"{short(value)} is no number")
    try:
        exact = Decimal(str(value))
    except (InvalidOperation, ValueError):
        raise MalformedRowError(f"{short(value)} is no number") from None
    _, digits, exponent = exact.as_tuple()
    if not isinstance(exponent, int) or len(digits) > MAX_NUMBER_DIGITS or abs(exponent) > MAX_NUMBER_DIGITS:
        raise MalformedRowError(f"{short(value)} is no number of up to {MAX_NUMBER_DIGITS} digits")
    return exact


def parse_rating(value: object) -> Decimal | None:
    """A rating, which may be a truth value; None where there is none."""
    if is_missing(value):
        return None
    return parse_number(int(value) if isinstance(value, bool) else value)


def format_decimal(exact: Decimal) -> str:
    """The shortest decimal that is exactly this number, without exponent."""
    text = format(exact, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def join_unique_texts(value: object) -> str:
    """Text of a value; the parts of a list, nested or not, once each and with commas between."""
    return ", ".join(dict.fromkeys(_flatten_texts(value)))


def join_texts(value: object) -> str:
    """Text of a value; the parts of a list with spaces between."""
    return " ".join(_flatten_texts(value))


def _flatten_texts(value: object) -> Iterator[str]:
    """The texts in a value; objects with names have none."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, list | tuple):
            left.extend(reversed(part))
        elif not is_missing(part) and not isinstance(part, dict):
            yield str(part).strip()


def clean_text(text: str) -> str:
    """Text without HTML entities, on one line, with single spaces."""
    plain = html.unescape(_join_surrogates(text, "replace"))
    return " ".join(_CONTROL_CHARACTER.sub(" ", plain).split())


class IdReader:
    """The ids of one file, without blanks around them; says how many had some."""

    def __init__(self) -> None:
        self.stripped, self.example = 0, ""

    def read(self, value: object, line: int) -> str:
        """The id in a value of this line.

        Raises:
            Malformed: see `parse_id`.
        """
        text = parse_id(value)
        bare = text.strip()
        if len(bare) < len(text):
            self.stripped += 1
            self.example = self.example or f"{text!r} in line {line}"
        return bare

    def remarks(self) -> list[str]:
        """How many ids were changed."""
        if not self.stripped:
            return []
        return [f"blanks around ids were removed: {self.stripped:,}, the first from {self.example}"]


class ZeroLabelCounter:
    """Zeros in columns that say whether somebody clicked, where such a column is not used.

    Args:
        used: columns that are.
    """

    def __init__(self, used: Collection[str]) -> None:
        self.others, self.zeros = set(used), Counter[str]()
        """Columns that are no such labels, and the zeros of those that are."""

    def count(self, row: RawRow) -> None:
        """Look at one line."""
        for name in row.keys() - self.others:
            if name.lower() not in LABEL_COLUMNS:
                self.others.add(name)
            elif _is_zero(row[name]):
                self.zeros[name] += 1

    def remarks(self) -> list[str]:
        """How many interactions seem to be none."""
        return [
            f"column {name!r} is 0 in {zeros:,} lines, which count as interactions like all others; "
            f"to leave them out give --rating={name} --min-rating=1"
            for name, zeros in self.zeros.items()
        ]


def _is_zero(value: object) -> bool:
    try:
        return parse_rating(value) == 0
    except MalformedRowError:
        return False
