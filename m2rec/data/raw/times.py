"""Times of raw files: unix time of one unit, or dates."""

import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from reprlib import repr as short

from m2rec.data.raw.readers import MalformedRowError, RawRow
from m2rec.data.raw.values import parse_number
from m2rec.errors import UserError

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME_UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of unix time, with the places by which its point moves
TIME_UNIT_LIMITS = {
    "s": Decimal(10**11),
    "ms": Decimal(10**14),
    "us": Decimal(10**17),
}  # of a unit: the year 5138
DATES = "dates"
TIME_UNIT_NAMES = {
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", DATES: DATES,
}  # fmt: skip
TIME_COLUMN_NAMES = frozenset({"time", "timestamp", "unix_timestamp", "datetime", "date", "ts"})
"""Names, in lower case, of columns that are times."""


class TimestampReader:
    """Seconds since 1970 from the times of one file; the numbers among them are all of one unit.

    Without a given unit the first time decides. Numbers from 10**11 on are taken for milliseconds,
    from 10**14 for microseconds, from 10**17 for nanoseconds; smaller ones stay as they are. A date
    without zone is UTC, and read to the microsecond.

    Args:
        path: the file, for errors.
        unit: one of `TIME_UNITS`, for numbers of any size; dates may stand between them.
        form: what all times look like, in strptime's codes; nothing else is read then.
    """

    def __init__(self, path: Path, unit: str | None = None, form: str | None = None) -> None:
        self.path, self.given, self.form = path, unit, form
        self.first: tuple[str, int, object] | None = None
        """The first time: its unit or `DATES`, its line, its value."""

    def read(self, value: object, line: int) -> Decimal:
        """The time of one line.

        Raises:
            Malformed: it is neither a number nor a date.
            ValueError: it is of another unit than the times before it, or the first of them and a date
                whose day and month can't be told apart.
        """
        if self.first is None and self.form is None and (forms := suggest_time_formats(str(value))):
            raise UserError(
                f"{self.path}: line {line} has the time {short(str(value))}, which may begin with the day or "
                f"the month; say it with {' or '.join(f'--time-format={form!r}' for form in forms)}"
            )
        time, unit = self._parse(value)
        self.first = self.first or (unit, line, value)
        if self.given is None and unit != self.first[0]:
            raise UserError(
                f"{self.path}: {_describe_time(*self.first)}, and {_describe_time(unit, line, value)}; say "
                f"which unit all numbers have with --time-unit ({', '.join(TIME_UNITS)}), or repair the line"
            )
        places = TIME_UNITS.get(unit, 0)
        return time.scaleb(-places) if places else time

    def _parse(self, value: object) -> tuple[Decimal, str]:
        """A number with its unit, or the seconds of a date."""
        if isinstance(value, date):
            return _convert_to_unix_time(value), DATES
        if self.form is not None:
            return _convert_to_unix_time(_parse_formatted_date(str(value), self.form)), DATES
        try:
            time = parse_number(value)
        except MalformedRowError:
            return _convert_to_unix_time(parse_date(value)), DATES
        return time, self.given or infer_time_unit(time)

    def remarks(self) -> list[str]:
        """How the times were read."""
        if self.first is None:
            return []
        if self.form is not None:
            return [f"timestamps read as dates like {self.form}"]
        unit = self.given or self.first[0]
        small = " (numbers below 10^11 stay as they are)" if unit == "s" and not self.given else ""
        return [f"timestamps read as {TIME_UNIT_NAMES[unit]}{small}"]


def _describe_time(unit: str, line: int, value: object) -> str:
    return f"line {line} has the time {short(str(value))}, which reads as {TIME_UNIT_NAMES[unit]}"


def infer_time_unit(time: Decimal) -> str:
    """The unit that a number's size says, `s` for what stays as it is."""
    for unit, limit in TIME_UNIT_LIMITS.items():
        if -limit < time < limit:
            return unit
    return "ns"


def _convert_to_unix_time(value: date) -> Decimal:
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - UNIX_EPOCH
    return since.days * 86400 + since.seconds + Decimal(since.microseconds).scaleb(-6)


class FileOrderTimestamps:
    """Times of a file that has none: 1, 2, 3, ... in its order."""

    def __init__(self) -> None:
        self.count, self.unused = 0, tuple[str, ...]()
        """Interactions, and columns of the first that seem to be times."""

    def next(self, row: RawRow) -> Decimal:
        """The time of the next interaction."""
        if not self.count:
            self.unused = tuple(name for name in row if name.lower() in TIME_COLUMN_NAMES)
        self.count += 1
        return Decimal(self.count)

    def remarks(self) -> list[str]:
        """That this was done."""
        if not self.count:
            return []
        unused = f"; column {self.unused[0]!r} is not used" if self.unused else ""
        return [f"no time column: the order of the file is the time, 1, 2, 3, ...{unused}"]


def check_time_format(form: str) -> None:
    """Check a date's form in strptime's codes.

    Raises:
        ValueError: it has a code that strptime does not know, has no year, or a zone's name.
    """
    try:
        datetime.strptime("", form)
    except ValueError as error:
        if "does not match" not in str(error):
            raise UserError(f"--time-format: {form!r}: {error}; see Python's strptime") from None
    codes = set(re.findall("%.", form.replace("%%", "")))
    if not codes & {"%Y", "%y", "%G"}:
        raise UserError(f"--time-format: {form!r} has no year; write %Y, or %y for two digits")
    if "%Z" in codes:  # which strptime reads and forgets
        raise UserError(
            f"--time-format: {form!r}: names of zones are not read; write UTC as it stands, or %z for +0100"
        )


def _parse_formatted_date(text: str, form: str) -> datetime:
    try:
        return datetime.strptime(text.strip(), form)
    except ValueError:
        raise MalformedRowError(f"time {short(text)} is not like --time-format={form!r}") from None


_MONTHS = {name.lower(): n for n, name in enumerate(
    "January February March April May June July August September October November December".split(), 1
)}  # fmt: skip
_MONTHS |= {"sept": 9, **{name[:3]: n for name, n in _MONTHS.items()}}
_WEEKDAY = r"(?:(?:Mon|Tues?|Wed(?:nes)?|Thu(?:rs?)?|Fri|Sat(?:ur)?|Sun)(?:day)?\.?,?\s+)?"
_MONTH = rf"(?P<name>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\.?"
_DAY, _YEAR = r"(?P<day>\d{1,2})", r"(?P<year>\d{4})"
_CLOCK = (
    r"(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,](?P<fraction>\d{1,9}))?)?"
    r"(?:\s*(?P<half>AM|PM))?"
)
_ZONE = r"(?P<zone>Z|UTC|GMT|[+-]\d\d:?\d\d)"
_TIME_OF_DAY = rf"(?:(?:T|,?\s+){_CLOCK}(?:\s*{_ZONE})?)?"
_DATE_PATTERNS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"{_YEAR}(?P<mark>[-/.])(?P<month>\d{{1,2}})(?P=mark){_DAY}{_TIME_OF_DAY}",
        rf"{_WEEKDAY}{_DAY}[-/\s]+{_MONTH}[-/,\s]+{_YEAR}{_TIME_OF_DAY}",
        rf"{_WEEKDAY}{_MONTH}\s+{_DAY},?\s+{_YEAR}{_TIME_OF_DAY}",
        rf"{_WEEKDAY}{_MONTH}\s+{_DAY}\s+{_CLOCK}(?:\s+{_ZONE})?\s+{_YEAR}",
    )
]
_AMBIGUOUS_DATE = re.compile(
    rf"\d{{1,2}}(?P<mark>[-/. ])\d{{1,2}}(?P<other_mark>[-/.]|,?\s)(?P<year>\d{{4}}|\d\d)"
    rf"(?:(?P<between>T|,?\s+){_CLOCK})?",
    re.IGNORECASE,
)


def parse_date(value: object) -> datetime:
    """A date that has one meaning: the year first, or the month by its English name.

    Raises:
        Malformed: it is none.
    """
    text = str(value).strip()
    try:
        return datetime.fromisoformat(text.removesuffix(" UTC"))  # the form of large files, read fast
    except ValueError:
        pass
    match = next(filter(None, (pattern.fullmatch(text) for pattern in _DATE_PATTERNS)), None)
    try:
        if match:
            return _build_datetime(match.groupdict())
    except (ValueError, OverflowError):  # the 31st of February
        pass
    raise MalformedRowError(
        f"time {short(value)} is neither a unix number nor a date; other dates: --time-format"
    )


def _build_datetime(parts: dict[str, str | None]) -> datetime:
    """A date of the parts that a pattern found."""
    named = (parts.get("name") or "").lower()
    month = _MONTHS[named] if named else int(parts["month"] or 0)
    hour = int(parts["hour"] or 0)
    if parts["half"]:
        if not 1 <= hour <= 12:
            raise UserError("no hour of a half day")
        hour = hour % 12 + 12 * (parts["half"].upper() == "PM")
    fraction = (parts["fraction"] or "").ljust(6, "0")[:6]
    moment = datetime(
        int(parts["year"] or 0), month, int(parts["day"] or 0), hour,
        int(parts["minute"] or 0), int(parts["second"] or 0), int(fraction), UTC,
    )  # fmt: skip
    return moment - _parse_utc_offset(parts["zone"])


def _parse_utc_offset(zone: str | None) -> timedelta:
    """What a zone is ahead of UTC."""
    if not zone or zone[0] not in "+-":
        return timedelta()
    ahead = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
    if ahead >= timedelta(days=1):
        raise UserError("no zone")
    return ahead if zone[0] == "+" else -ahead


def suggest_time_formats(text: str) -> list[str]:
    """For a date that begins with two short numbers: its form with the month first, and the day."""
    match = _AMBIGUOUS_DATE.fullmatch(text.strip())
    if not match:
        return []
    mark, other, year, between = match.group("mark", "other_mark", "year", "between")
    clock = ""
    if between:
        clock = between + ("%I" if match["half"] else "%H") + ":%M" + (":%S" if match["second"] else "")
        clock += (".%f" if match["fraction"] else "") + (" %p" if match["half"] else "")
    date_forms = (f"%{a}{mark}%{b}{other}%{'Y' if len(year) == 4 else 'y'}" for a, b in ("md", "dm"))
    return [form + clock for form in date_forms]
