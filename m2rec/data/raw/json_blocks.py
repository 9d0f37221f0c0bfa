"""Blocks of JSON lines as columns, where pyarrow reads them as Python's json does."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json

from m2rec.data.raw.blocks import LineBlocks, TableBlocks
from m2rec.data.raw.json_rows import is_json_array, parse_json
from m2rec.data.raw.lines import UTF8, LineReader, open_bytes, parse_lines
from m2rec.data.raw.tally import MalformedRowError, NumberedRows, Tally
from m2rec.data.raw.text_blocks import CHUNK_BYTES, SMALL_BLOCK_BYTES, TextBlocks
from m2rec.data.raw.time_columns import EXACT_INTEGERS

_SAMPLE_LINES = 16  # that tell which columns are texts
_MAX_BRACKETS = 300  # in a line; Python's json refuses nesting near 1,000 levels
_ODD_NUMBER = re.compile(rb"[:\[,]\s*(?:-NaN|-?Inf(?!inity))")  # which pyarrow reads and Python does not
_BRACKET_CASE = b"["[0] ^ b"{"[0]  # the bit in which they differ


@contextmanager
def open_json_blocks(tally: Tally, used: Collection[str]) -> Iterator[TableBlocks | None]:
    """Blocks of the file that `json_rows.read_json_rows` reads; None if it is one JSON array."""

    def read_records(lines: LineReader, is_done: Callable[[], bool]) -> NumberedRows:
        return parse_lines(lines, parse_json, is_done)

    with open_bytes(tally.path) as (raw, content):
        if is_json_array(tally, content):
            yield None
            return
        lines = LineBlocks(content)
        yield TextBlocks(lines, LineReader(tally, raw, lines, UTF8), read_records, partial(_read, used))


def _read(used: Collection[str], data: bytes, ends: np.ndarray) -> Mapping[str, pa.Array] | None:
    """All columns of JSON lines; None where lines are odd, see `text_blocks.ColumnReader`."""
    if not _are_plain_objects(data, ends):
        return None
    try:
        table = json.read_json(
            pa.BufferReader(data),
            json.ReadOptions(block_size=CHUNK_BYTES),
            # a name that is duplicated in any object is an error, so that all columns are read
            json.ParseOptions(explicit_schema=_find_texts(used, data), unexpected_field_behavior="infer"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, MalformedRowError):
        return None
    if len(table) != len(ends):  # several objects in a line, or blank lines
        return None
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    if any(_has_lost_text(columns[name]) for name in used if name in columns):
        return None
    return columns


def _are_plain_objects(data: bytes, ends: np.ndarray) -> bool:
    """Whether each line begins and ends as an object, and holds nothing on which the parsers differ."""
    characters = np.frombuffer(data, dtype=np.uint8)
    last = ends - 1
    last = np.where(characters[last] == b"\r"[0], last - 1, last)
    starts = np.append(0, ends[:-1] + 1)
    if not (characters[starts] == b"{"[0]).all() or not (characters[last] == b"}"[0]).all():
        return False
    if (b"Inf" in data or b"NaN" in data) and _ODD_NUMBER.search(data):
        return False
    brackets = np.flatnonzero(characters | _BRACKET_CASE == b"{"[0])
    return bool(np.diff(np.searchsorted(brackets, ends), prepend=0).max() < _MAX_BRACKETS)


def _find_texts(used: Collection[str], data: bytes) -> pa.Schema:
    """The used columns that are texts in the first lines: a text that looks like a date stays one.

    Raises:
        MalformedRowError: one of these lines is malformed.
    """
    texts = set()
    for line in data[:SMALL_BLOCK_BYTES].split(b"\n", _SAMPLE_LINES)[:_SAMPLE_LINES]:
        if line.endswith((b"}", b"}\r")):  # not one that is cut off
            row = parse_json(line.decode())
            assert isinstance(row, dict)
            texts |= {name for name in used if isinstance(row.get(name), str)}
    return pa.schema([(name, pa.string()) for name in sorted(texts)])


def _has_lost_text(values: pa.Array) -> bool:
    """Whether texts became dates, or whole numbers doubles that may not be the same."""
    if pa.types.is_temporal(values.type):
        return True
    if not pa.types.is_floating(values.type):
        return False
    largest = pc.max(pc.abs(values)).as_py()
    return largest is not None and not largest < EXACT_INTEGERS
