"""Times of raw files: unix time of one unit, or dates."""

from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from reprlib import repr as short

from m2rec.raw_values import number
from m2rec.rows import Malformed

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of unix time, with the places by which its point moves
LIMITS = {"s": Decimal(10**11), "ms": Decimal(10**14), "us": Decimal(10**17)}  # of a unit: the year 5138
DATES = "dates"
UNIT_NAMES = {
    "s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds", DATES: DATES,
}  # fmt: skip


class TimeReader:
    """Seconds since 1970 from the times of one file; the numbers among them are all of one unit.

    Without a given unit the first time decides. Numbers from 10**11 on are taken for milliseconds,
    from 10**14 for microseconds, from 10**17 for nanoseconds; smaller ones stay as they are. A date
    without zone is UTC, and read to the microsecond.

    Args:
        path: the file, for errors.
        unit: one of `UNITS`, for numbers of any size; dates may stand between them.
    """

    def __init__(self, path: Path, unit: str | None = None) -> None:
        self.path, self.given = path, unit
        self.first: tuple[str, int, object] | None = None
        """The first time: its unit or `DATES`, its line, its value."""

    def read(self, value: object, line: int) -> Decimal:
        """The time of one line.

        Raises:
            Malformed: it is neither a number nor a date.
            ValueError: it is of another unit than the times before it.
        """
        time, unit = self._parse(value)
        self.first = self.first or (unit, line, value)
        if self.given is None and unit != self.first[0]:
            raise ValueError(
                f"{self.path}: {_describe_time(*self.first)}, and {_describe_time(unit, line, value)}; say "
                f"which unit all numbers have with --time-unit ({', '.join(UNITS)}), or repair the line"
            )
        places = UNITS.get(unit, 0)
        return time.scaleb(-places) if places else time

    def _parse(self, value: object) -> tuple[Decimal, str]:
        """A number with its unit, or the seconds of a date."""
        if not isinstance(value, date):
            try:
                time = number(value)
            except Malformed:
                value = _date(value)
            else:
                return time, self.given or find_unit(time)
        return _since_1970(value), DATES

    def remarks(self) -> list[str]:
        """How the times were read."""
        if self.first is None:
            return []
        unit = self.given or self.first[0]
        small = " (numbers below 10^11 stay as they are)" if unit == "s" and not self.given else ""
        return [f"timestamps read as {UNIT_NAMES[unit]}{small}"]


def _describe_time(unit: str, line: int, value: object) -> str:
    return f"line {line} has the time {short(str(value))}, which reads as {UNIT_NAMES[unit]}"


def find_unit(time: Decimal) -> str:
    """The unit that a number's size says, `s` for what stays as it is."""
    for unit, limit in LIMITS.items():
        if -limit < time < limit:
            return unit
    return "ns"


def _since_1970(value: date) -> Decimal:
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    since = (value if value.tzinfo else value.replace(tzinfo=UTC)) - EPOCH
    return since.days * 86400 + since.seconds + Decimal(since.microseconds).scaleb(-6)


def _date(value: object) -> datetime:
    try:
        return datetime.fromisoformat(str(value).strip())
    except ValueError:
        raise Malformed(f"time {short(value)} is neither a unix number nor an ISO date") from None
