"""Times as they stand in raw files: one unit or dates, in full precision."""

import re
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2rec.data.raw.tally import MalformedRowError
from m2rec.data.raw.times import TIME_UNIT_NAMES, TIME_UNITS, TimestampReader, check_time_format, parse_date
from m2rec.data.raw.values import format_decimal


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1391040000, "1391040000"),
        ("0978300760", "978300760"),
        (1.5e9, "1500000000"),
        ("1588687728.9230", "1588687728.923"),
        ("1588687728.123456789", "1588687728.123456789"),
        (1588687728923, "1588687728.923"),
        (1588687728000.0, "1588687728"),
        ("1588687728923001", "1588687728.923001"),
        (1588687728923001007, "1588687728.923001007"),
        (Decimal("1e3"), "1000"),
        (-86400, "-86400"),
        ("-0", "0"),
        (17, "17"),
        ("2018-07-07 22:09:11", "1531001351"),
        ("2018-07-07T22:09:11.5Z", "1531001351.5"),
        ("2018-07-08T00:09:11+02:00", "1531001351"),
        ("2017-12-17", "1513468800"),
        ("1969-12-31 23:59:59.25", "-0.75"),
        (date(2017, 12, 17), "1513468800"),
        (datetime(2018, 7, 7, 22, 9, 11, 7), "1531001351.000007"),
        (datetime(2018, 7, 7, 22, 9, 11, tzinfo=UTC), "1531001351"),
    ],
)
def test_times(value: object, expected: str):
    assert format_decimal(TimestampReader(Path("x")).read(value, 1)) == expected


MOMENT = datetime(2017, 7, 30, 14, 44, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    "text",
    [
        "2017-07-30 14:44:10 UTC", "2017-07-30 14:44:10 +0000", "2017-07-30 14:44:10 GMT",
        "2017-07-30 14:44:10 +0000 UTC", "2017-07-30 07:44:10 -0700", "2017-07-30T20:14:10 +05:30",
        "2017-7-30 2:44:10 PM",
        "2017/07/30 14:44:10", "2017.07.30 14:44:10.0", "2017/7/30, 2:44:10 pm UTC",
        "Sun Jul 30 07:44:10 -0700 2017", "Sun Jul 30 14:44:10 2017", "Sun Jul 30 14:44:10 UTC 2017",
        "Sun, 30 Jul 2017 07:44:10 -0700", "Sunday, 30 July 2017 14:44:10 GMT", "30-JUL-2017 14:44:10",
        "July 30, 2017 2:44:10 PM", "Jul 30 2017, 14:44:10", "Jul. 30, 2017 14:44:10,000",
        "30/Jul/2017 14:44:10",
    ],
)  # fmt: skip
def test_dates_that_have_one_meaning(text: str):
    assert TimestampReader(Path("x")).read(f" {text} ", 1) == int(MOMENT.timestamp())


def test_every_month_and_both_halves_of_the_day():
    for month in range(1, 13):
        for hour in range(24):
            moment = datetime(2020, month, 2, hour, 5)
            for form in ("%b %d %Y %I:%M %p", "%d %B %Y %I:%M%p", "%Y/%m/%d %I:%M %p"):
                assert parse_date(moment.strftime(form)) == moment.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        "nan", "1e400", "1e999999999", "9" * 5000, 1e-300, "", [1], "soon", "Jul 2017", "2017-02-30 1:00",
        "30 Jul 17", "Jul 32, 2017", "2017-07-30 13:00 PM", "2017-07-30 0:30 AM", "2017-07-30 7:44 CEST",
        "Sun Jul 30 07:44:10 PDT 2017", "2017-07/30 1:00", "Mayor 3, 2017", "0001-1-01 00:00 +0100",
        "2017-07-30 00:00 +9900", "2017-07-30 1:60",
    ],
)  # fmt: skip
def test_no_times(value: object):
    with pytest.raises(MalformedRowError, match="neither a Unix time nor a recognized date; give its format"):
        TimestampReader(Path("x")).read(value, 1)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(
    moment=st.datetimes(datetime(1980, 1, 1), datetime(2030, 1, 1)).map(lambda d: d.replace(microsecond=0)),
    date_form=st.sampled_from(["%m/%d/%Y", "%d.%m.%Y", "%d-%m-%y", "%m %d, %Y", "%d %m %Y"]),
    clock=st.sampled_from(["", " %H:%M:%S", ", %I:%M:%S %p", "T%H:%M:%S"]),
)
def test_the_day_or_the_month_first_is_never_guessed(moment: datetime, date_form: str, clock: str):
    """It is an error that shows how to say it, and one of what it shows reads the date."""
    if not clock:
        moment = moment.replace(hour=0, minute=0, second=0)
    text = moment.strftime(date_form + clock)
    with pytest.raises(
        ValueError, match=r"^x.csv: line 2 .* may begin with the day or the month; set"
    ) as said:
        TimestampReader(Path("x.csv")).read(text, 2)
    forms = re.findall(r"time_format='(.*?)'", str(said.value))
    assert date_form + clock in forms and len(forms) == 2
    for form in forms:
        check_time_format(form)
    times = TimestampReader(Path("x.csv"), time_format=date_form + clock)
    assert times.read(text, 2) == int(moment.replace(tzinfo=UTC).timestamp())
    assert times.remarks() == [f"timestamps read as dates like {date_form}{clock}"]


def test_an_odd_date_among_good_ones_is_malformed():
    times = TimestampReader(Path("x"))
    times.read("2017-07-30", 1)
    with pytest.raises(MalformedRowError, match="time '12/31/2014' is neither"):
        times.read("12/31/2014", 2)
    times = TimestampReader(Path("x"), time_format="%Y%m%d")
    assert [times.read(value, 1) for value in (20170730, "20170730", date(2017, 7, 30))] == [1501372800] * 3
    for value in ("2017-07-30", "1501372800", "20170732"):
        with pytest.raises(MalformedRowError, match=f"time '{value}' is not like time_format='%Y%m%d'"):
            times.read(value, 1)
    assert (
        TimestampReader(Path("x"), time_format="%d.%m.%Y %H:%M %z").read("30.07.2017 07:44 -0700", 1)
        == 1501425840
    )


@pytest.mark.parametrize(
    ("form", "said"),
    [("%Q", "'Q' is a bad directive"), ("%Y %", "stray %"), ("%H:%M", "has no year"), ("%%Y", "has no year"),
     ("%Y-%m-%d %Z", "zone names are not supported; write UTC itself")],
)  # fmt: skip
def test_forms_that_are_none(form: str, said: str):
    with pytest.raises(ValueError, match=f"time_format: .*{re.escape(said)}"):
        check_time_format(form)


def test_a_file_has_one_unit():
    """What the first time says holds for all; a straddled limit or a placeholder is an error with both."""
    ms, dates = 1588687728923, ["2020-01-01", "1999-12-31 05:00", date(2020, 1, 1)]
    for values in ([1, 99_999_999_999, -5, "0"], [ms, 10**11, -ms], [10**14, 10**17 - 1], [10**17], dates):
        times = TimestampReader(Path("x.csv"))
        for line, value in enumerate(values, 2):
            times.read(value, line)
    cure = r"set the unit of all numbers with time_unit=s\|ms\|us\|ns, or repair the line"
    for first, second, said in (
        (0, ms, "line 2 has the time '0', which reads as seconds, and line 7 has the time '1588687728923'"),
        (ms, 0, "line 2 has .*'1588687728923', which reads as milliseconds, and line 7 has the time '0'"),
        (99_999_999_999, 10**11, "reads as seconds, and .* as milliseconds; "),
        (10**14 - 1, 10**14, "reads as milliseconds, and .* as microseconds; "),
        ("1e17", 10**17 - 1, "reads as nanoseconds, and .* as microseconds; "),
        ("2020-01-01", 20200101, "line 2 has the time '2020-01-01', which reads as dates, and .* as seconds"),
        (ms, "2020-01-01", "reads as milliseconds, and .* as dates; "),
    ):
        times = TimestampReader(Path("x.csv"))
        times.read(first, 2)
        with pytest.raises(ValueError, match=f"^x.csv: .*{said}.*{cure}$"):
            times.read(second, 7)


def test_a_given_unit_holds_for_any_size():
    for unit, places in TIME_UNITS.items():
        times = TimestampReader(Path("x"), unit)
        for number in ("0", "-7", "17.5", "99999999999", "1e11", "1588687728923", "1588687728923001007"):
            assert times.read(number, 1) == Decimal(number) / 10**places
        assert times.read("1970-01-02", 1) == 86400
        assert times.remarks() == [f"timestamps read as {TIME_UNIT_NAMES[unit]}"]


def test_how_times_were_read_is_said():
    for value, said in (
        (1391040000, ["timestamps read as seconds (numbers below 10^11 are unchanged)"]),
        (1588687728923, ["timestamps read as milliseconds"]),
        ("2020-01-01", ["timestamps read as dates"]),
        (None, []),
    ):
        times = TimestampReader(Path("x"))
        if value is not None:
            times.read(value, 1)
        assert times.remarks() == said


numbers = st.decimals(-(10**20), 10**20, places=3) | st.integers(-(10**12), 10**12) | st.integers(-9, 9)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(values=st.lists(numbers, min_size=2, max_size=6), unit=st.sampled_from([None, *TIME_UNITS]))
def test_reading_times_keeps_their_order(values: list[Decimal | int], unit: str | None):
    """Forced or found, in exact decimals, as written; or the file is refused as one of two units."""
    times, written = TimestampReader(Path("x"), unit), []
    limits = (10**11, 10**14, 10**17)
    one_size = len({sum(abs(value) >= limit for limit in limits) for value in values}) == 1
    try:
        for line, value in enumerate(values, 1):
            written.append(Decimal(format_decimal(times.read(str(value), line))))
    except ValueError as error:
        assert unit is None and not one_size and "time_unit" in str(error)
        return
    assert unit is not None or one_size
    order = sorted(range(len(values)), key=values.__getitem__)
    assert order == sorted(range(len(values)), key=written.__getitem__)
    for (a, b), (x, y) in zip(pairwise(values), pairwise(written), strict=True):
        assert (a == b) == (x == y)
