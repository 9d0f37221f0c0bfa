"""Times of raw files: Unix time in one unit, or dates."""

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from reprlib import repr as short

from m2rec.data.raw.tally import MalformedRowError
from m2rec.data.raw.values import parse_number
from m2rec.errors import UserError

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME_UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}
"""Units of Unix time, with the decimal places that they have more than seconds."""
TIME_UNIT_LIMITS = {"s": Decimal(10**11), "ms": Decimal(10**14), "us": Decimal(10**17)}  # the year 5138
DATES = "dates"
TIME_UNIT_NAMES = {
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", DATES: DATES,
}  # fmt: skip


class TimestampReader:
    """Seconds since 1970 from the times of one file, whose numbers all have one unit.

    Without a given unit the first time decides: numbers from 10**11 on are milliseconds, from 10**14
    microseconds, from 10**17 nanoseconds; smaller ones are seconds. A date without zone is UTC, and
    read to the microsecond.

    Args:
        path: the file, for errors.
        unit: one of `TIME_UNITS`, for numbers of any size; dates may stand between them.
        time_format: of all times, in strptime's codes; nothing else is read then.
        name_line: what to call a line in errors.
    """

    def __init__(
        self,
        path: Path,
        unit: str | None = None,
        time_format: str | None = None,
        name_line: Callable[[int], str] = "line {}".format,
    ) -> None:
        self.path, self.unit, self.time_format, self.name_line = path, unit, time_format, name_line
        self.first: tuple[str, int, object] | None = None
        """The first time: its unit or `DATES`, its line, its value."""

    def read(self, value: object, line: int) -> Decimal:
        """The time of one line.

        Raises:
            MalformedRowError: it is not a number or date.
            ValueError: it has another unit than the times before it, or it is the first one and a date
                whose day and month can't be told apart.
        """
        if self.first is None:
            self._refuse_ambiguous_date(str(value), line)
        time, unit = self._parse(value)
        if self.first is None:
            self.first = (unit, line, value)
        if self.unit is None and unit != self.first[0]:
            raise UserError(
                f"{self.path}: {self._describe(*self.first)}, and {self._describe(unit, line, value)}; set "
                f"the unit of all numbers with time_unit={'|'.join(TIME_UNITS)}, or repair the line"
            )
        return time.scaleb(-TIME_UNITS[unit]) if unit in TIME_UNITS else time

    def _refuse_ambiguous_date(self, text: str, line: int) -> None:
        formats = suggest_time_formats(text)
        if formats and self.time_format is None:
            options = " or ".join(f"time_format={suggestion!r}" for suggestion in formats)
            raise UserError(
                f"{self.path}: {self.name_line(line)} has the time {short(text)}, which may begin with the "
                f"day or the month; set {options}"
            )

    def _parse(self, value: object) -> tuple[Decimal, str]:
        """A number with its unit, or the seconds of a date."""
        if isinstance(value, date):
            return _convert_to_unix_time(value), DATES
        if self.time_format is not None:
            return _convert_to_unix_time(_parse_formatted_date(str(value), self.time_format)), DATES
        try:
            time = parse_number(value)
        except MalformedRowError:
            return _convert_to_unix_time(parse_date(value)), DATES
        return time, self.unit or infer_time_unit(time)

    def _describe(self, unit: str, line: int, value: object) -> str:
        time = short(str(value))
        return f"{self.name_line(line)} has the time {time}, which reads as {TIME_UNIT_NAMES[unit]}"

    def remarks(self) -> list[str]:
        """How the times were read."""
        if self.first is None:
            return []
        if self.time_format is not None:
            return [f"timestamps read as dates like {self.time_format}"]
        if self.unit is not None:
            return [f"timestamps read as {TIME_UNIT_NAMES[self.unit]}"]
        unit = self.first[0]
        unchanged = " (numbers below 10^11 are unchanged)" if unit == "s" else ""
        return [f"timestamps read as {TIME_UNIT_NAMES[unit]}{unchanged}"]


def infer_time_unit(time: Decimal) -> str:
    """Infer the unit from the magnitude; `s` for numbers that stay unchanged."""
    for unit, limit in TIME_UNIT_LIMITS.items():
        if -limit < time < limit:
            return unit
    return "ns"


def _convert_to_unix_time(value: date) -> Decimal:
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    since = value - UNIX_EPOCH
    return since.days * 86400 + since.seconds + Decimal(since.microseconds).scaleb(-6)


def check_time_format(time_format: str) -> None:
    """Check a date's format in strptime's codes.

    Raises:
        ValueError: it has an unknown code, no year, or a zone's name.
    """
    try:
        datetime.strptime("", time_format)
    except ValueError as error:
        if "does not match" not in str(error):
            raise UserError(f"time_format: {time_format!r}: {error}; see Python's strptime") from None
    codes = set(re.findall("%.", time_format.replace("%%", "")))
    if not codes & {"%Y", "%y", "%G"}:
        raise UserError(f"time_format: {time_format!r} has no year; write %Y, or %y for two digits")
    if "%Z" in codes:  # strptime parses the zone's name and ignores it
        raise UserError(
            f"time_format: {time_format!r}: zone names are not supported; write UTC itself, or %z for +0100"
        )


def _parse_formatted_date(text: str, time_format: str) -> datetime:
    try:
        return datetime.strptime(text.strip(), time_format)
    except ValueError:
        raise MalformedRowError(f"time {short(text)} is not like time_format={time_format!r}") from None


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
    """A date with one meaning: the year first, or the month by its English name.

    Raises:
        MalformedRowError: it is not such a date.
    """
    text = str(value).strip()
    try:
        return datetime.fromisoformat(text.removesuffix(" UTC"))  # fast, for the format of large files
    except ValueError:
        pass
    for pattern in _DATE_PATTERNS:
        match = pattern.fullmatch(text)
        if match:
            try:
                return _build_datetime(match.groupdict())
            except (ValueError, OverflowError):  # the 31st of February
                break
    raise MalformedRowError(
        f"time {short(value)} is neither a Unix time nor a recognized date; give its format with time_format"
    )


def _build_datetime(parts: dict[str, str | None]) -> datetime:
    """The date of the parts that a pattern found.

    Raises:
        ValueError: it does not exist.
    """
    name = (parts.get("name") or "").lower()
    month = _MONTHS[name] if name else _to_int(parts["month"])
    hour = _to_int(parts["hour"])
    if parts["half"]:
        if not 1 <= hour <= 12:
            raise ValueError("invalid hour of a half day")
        hour = hour % 12 + 12 * (parts["half"].upper() == "PM")
    microsecond = int((parts["fraction"] or "")[:6].ljust(6, "0"))
    date_parts = (_to_int(parts["year"]), month, _to_int(parts["day"]))
    clock = (hour, _to_int(parts["minute"]), _to_int(parts["second"]), microsecond)
    return datetime(*date_parts, *clock, UTC) - _parse_utc_offset(parts["zone"])


def _to_int(text: str | None) -> int:
    return int(text or 0)


def _parse_utc_offset(zone: str | None) -> timedelta:
    """How far a zone is ahead of UTC."""
    if not zone or zone[0] not in "+-":
        return timedelta()
    ahead = timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
    if ahead >= timedelta(days=1):
        raise ValueError("invalid zone")
    return ahead if zone[0] == "+" else -ahead


def suggest_time_formats(text: str) -> list[str]:
    """Formats for a date that begins with two short numbers: with the month first, and with the day."""
    match = _AMBIGUOUS_DATE.fullmatch(text.strip())
    if not match:
        return []
    clock = ""
    if match["between"]:
        clock = match["between"] + ("%I" if match["half"] else "%H") + ":%M"
        clock += ":%S" if match["second"] else ""
        clock += ".%f" if match["fraction"] else ""
        clock += " %p" if match["half"] else ""
    year = "%Y" if len(match["year"]) == 4 else "%y"
    rest = match["other_mark"] + year + clock
    return [f"%m{match['mark']}%d{rest}", f"%d{match['mark']}%m{rest}"]
