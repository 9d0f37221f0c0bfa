"""Times of a block as texts in seconds, the same as `times.TimestampReader` makes of them one by one.

What has a simple form is converted as a column: whole numbers, decimals in seconds, dates as ISO 8601 writes
them. Of anything else each distinct value goes through `TimestampReader`.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2rec.data.raw.tally import MalformedRowError
from m2rec.data.raw.times import DATES, TIME_UNIT_LIMITS, TIME_UNITS, TimestampReader
from m2rec.data.raw.values import format_decimal
from m2rec.errors import UserError

_MAX_INTEGER_DIGITS = 18  # of int64
_DECIMALS = r"^(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,10})?$"
_ISO_DATES = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}(?:[ T][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{1,6})?(?: UTC|Z)?)?$"
_FIRST_SECOND, _END_SECOND = -62_135_596_800, 253_402_300_800  # of the years 1 to 9999
EXACT_INTEGERS = 2**53  # whole numbers below it are doubles


def convert_times(
    reader: TimestampReader, values: pa.Array, first_line: int
) -> tuple[pa.StringArray, TimestampReader] | None:
    """Times as texts in seconds, and the reader that has read them; None if one of them is odd.

    Args:
        reader: has read the times before them; it does not change.
        values: (n,) at least one.
        first_line: of the first one.
    """
    reader = copy(reader)
    try:
        reader.read(values[0].as_py(), first_line)
    except (MalformedRowError, UserError):
        return None
    if values.null_count:
        return None
    for convert in (_convert_numbers, _convert_dates, _convert_distinct):
        texts = convert(reader, values)
        if texts is not None:
            return texts, reader
    return None


def format_scaled(integers: np.ndarray, places: int) -> pa.StringArray:
    """Whole numbers of at least 0 divided by 10**`places`, as the shortest texts that are exactly these."""
    if not places:
        return pa.array(integers).cast(pa.string())
    whole, rest = np.divmod(integers, 10**places)
    texts = pa.array(whole).cast(pa.string())
    if not rest.any():
        return texts
    if places <= 3:
        fractions = pa.array([f".{n:0{places}}".rstrip("0").rstrip(".") for n in range(10**places)])
        return pc.binary_join_element_wise(texts, fractions.take(pa.array(rest)), "")
    padded = pa.array(rest + 10**places).cast(pa.string())
    fractions = pc.utf8_rtrim(pc.utf8_replace_slice(padded, 0, 1, "."), "0")
    return pc.utf8_rtrim(pc.binary_join_element_wise(texts, fractions, ""), ".")


def _convert_numbers(reader: TimestampReader, values: pa.Array) -> pa.StringArray | None:
    if reader.time_format is not None:
        return None
    if pa.types.is_floating(values.type):
        return _convert_floats(reader, values)
    if pa.types.is_integer(values.type) and not pa.types.is_uint64(values.type):
        return _convert_integers(reader, values.cast(pa.int64()), None)
    if not pa.types.is_string(values.type):
        return None
    if pc.all(pc.ascii_is_decimal(values)).as_py():
        if pc.max(pc.binary_length(values)).as_py() > _MAX_INTEGER_DIGITS:
            return None
        return _convert_integers(reader, values.cast(pa.int64()), values)
    return _convert_decimals(reader, values)


def _convert_floats(reader: TimestampReader, values: pa.Array) -> pa.StringArray | None:
    """Whole numbers that are doubles."""
    floats = values.cast(pa.float64()).to_numpy()
    if not (np.abs(floats) < EXACT_INTEGERS).all() or (floats % 1).any():  # NaN is not below it
        return None
    return _convert_integers(reader, pa.array(floats.astype(np.int64)), None)


def _convert_integers(
    reader: TimestampReader, values: pa.Int64Array, texts: pa.StringArray | None
) -> pa.StringArray | None:
    """Whole numbers, and their texts if they come from texts."""
    integers = values.to_numpy()
    low, high = int(integers.min()), int(integers.max())
    unit = _find_unit(reader, low, high)
    if unit is None:
        return None
    if TIME_UNITS[unit] == 0 and texts is not None and _are_shortest(integers, texts):
        return texts
    return format_scaled(integers, TIME_UNITS[unit])


def _are_shortest(integers: np.ndarray, texts: pa.StringArray) -> bool:
    """Whether no text has a leading zero."""
    lengths = pc.binary_length(texts).to_numpy()
    if lengths.min() == lengths.max():  # as times of this century have
        return bool(lengths[0] == 1 or integers.min() >= 10 ** (int(lengths[0]) - 1))
    powers = 10 ** np.arange(_MAX_INTEGER_DIGITS, dtype=np.int64)
    return bool(((lengths == 1) | (integers >= powers[lengths - 1])).all())


def _find_unit(reader: TimestampReader, low: float, high: float) -> str | None:
    """The unit of all numbers from `low` to `high`; None if there are several, or if one is negative."""
    assert reader.first is not None
    if low < 0:
        return None
    if reader.unit is not None:
        return reader.unit
    unit = reader.first[0]
    units = list(TIME_UNITS)
    if unit not in units:
        return None
    place = units.index(unit)
    start = float(TIME_UNIT_LIMITS[units[place - 1]]) if place else 0
    end = float(TIME_UNIT_LIMITS[unit]) if unit in TIME_UNIT_LIMITS else np.inf
    return unit if start <= low and high < end else None


def _convert_decimals(reader: TimestampReader, texts: pa.StringArray) -> pa.StringArray | None:
    """Decimals in seconds without leading zeros."""
    if not pc.all(pc.match_substring_regex(texts, _DECIMALS)).as_py():
        return None
    numbers = texts.cast(pa.float64())  # a number below a limit may round to it, and is odd then
    unit = _find_unit(reader, pc.min(numbers).as_py(), pc.max(numbers).as_py())
    if unit is None or TIME_UNITS[unit]:
        return None
    trimmed = pc.utf8_rtrim(pc.utf8_rtrim(texts, "0"), ".")
    return pc.if_else(pc.match_substring(texts, "."), trimmed, texts)


def _convert_dates(reader: TimestampReader, values: pa.Array) -> pa.StringArray | None:
    assert reader.first is not None
    if reader.unit is None and reader.first[0] != DATES:
        return None
    if pa.types.is_timestamp(values.type):
        return _convert_timestamps(values)
    if reader.time_format is not None or not pa.types.is_string(values.type):
        return None
    if not pc.all(pc.match_substring_regex(values, _ISO_DATES)).as_py():
        return None
    try:
        moments = pc.utf8_rtrim(values, " UTCZ").cast(pa.timestamp("us"))
    except pa.ArrowInvalid:  # the 31st of February
        return None
    return _format_moments(moments.cast(pa.int64()).to_numpy(), 6)


def _convert_timestamps(values: pa.Array) -> pa.StringArray | None:
    """Timestamps of Parquet, to the microsecond as Python has them."""
    ticks, unit = values.cast(pa.int64()).to_numpy(), values.type.unit
    return _format_moments(ticks // 1000, 6) if unit == "ns" else _format_moments(ticks, TIME_UNITS[unit])


def _format_moments(ticks: np.ndarray, places: int) -> pa.StringArray | None:
    """Moments of the years that Python knows."""
    scale = 10**places
    if ticks.min() < _FIRST_SECOND * scale or ticks.max() >= _END_SECOND * scale:
        return None
    seconds, rest = np.divmod(ticks, scale)
    if not rest.any():
        return pa.array(seconds).cast(pa.string())
    return format_scaled(ticks, places) if ticks.min() >= 0 else None


def _convert_distinct(reader: TimestampReader, values: pa.Array) -> pa.StringArray | None:
    """Any times, each distinct value by the reader."""
    encoded = values.dictionary_encode()
    try:
        texts = _read_all(reader, encoded.dictionary.to_pylist())
    except (MalformedRowError, UserError):
        return None
    return pa.array(texts, pa.string()).take(encoded.indices)


def _read_all(reader: TimestampReader, values: Sequence[object]) -> list[str]:
    return [format_decimal(reader.read(value, 0)) for value in values]
