"""Rows of JSON files: one object or Python dict per line, or one array of objects."""

import ast
import json
import warnings
from gzip import GzipFile
from io import BufferedReader

from m2rec.data.raw.lines import (
    BYTE_ORDER_MARK,
    GZIP_ERRORS,
    LineReader,
    build_gzip_error,
    open_bytes,
    parse_lines,
    read_parsed_lines,
)
from m2rec.data.raw.tally import MalformedRowError, NumberedRows, Tally
from m2rec.errors import UserError

MAX_LITERAL_CHARACTERS = 2**20  # a syntax tree takes some hundred times its text
MAX_ARRAY_BYTES = 2**30  # a JSON array is held in memory, several times its text


class _DuplicateNameError(UserError):
    """A JSON object has a name twice."""


def _build_json_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object, whose names must be unique: Python would keep the last value of each."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = max(names, key=names.count)
        raise _DuplicateNameError(f"the name {duplicate!r} is duplicated in an object")
    return row


_JSON_DECODER = json.JSONDecoder(object_pairs_hook=_build_json_object)


def parse_json(line: str) -> object:
    """Parse a line of JSON."""
    try:
        return _JSON_DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise MalformedRowError(f"not JSON ({error})") from None


def parse_json_or_literal(line: str) -> object:
    """Parse a line of JSON, or a Python literal such as {'asin': u'B1'}; nothing is executed."""
    try:
        return _JSON_DECODER.decode(line)
    except _DuplicateNameError as error:
        raise MalformedRowError(error) from None
    except (ValueError, RecursionError):
        pass
    if len(line) > MAX_LITERAL_CHARACTERS:
        raise MalformedRowError(f"longer than {MAX_LITERAL_CHARACTERS:,} characters and not JSON")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes such as \d, which Python keeps unchanged
            return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise MalformedRowError("neither JSON nor a Python dict") from None


def read_json_or_literal_rows(tally: Tally) -> NumberedRows:
    """Rows of a file whose lines are JSON objects or Python dicts."""
    return read_parsed_lines(tally, parse_json_or_literal)


def read_json_rows(tally: Tally) -> NumberedRows:
    """Rows of JSON lines, or of a file that is one JSON array of objects.

    Raises:
        ValueError: the file can't be read, or it is an array that is broken or too large.
    """
    with open_bytes(tally.path) as (raw, content):
        if is_json_array(tally, content):
            yield from _read_array_rows(tally, content)
        else:
            yield from parse_lines(LineReader(tally, raw, content), parse_json)


def is_json_array(tally: Tally, content: BufferedReader | GzipFile) -> bool:
    """Whether a file begins as a JSON array.

    Raises:
        ValueError: a gzip file is damaged.
    """
    try:
        start = bytes(content.peek(64)[:64])
    except GZIP_ERRORS as error:
        raise build_gzip_error(tally, error) from None
    return start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _read_array_rows(tally: Tally, content: BufferedReader | GzipFile) -> NumberedRows:
    """Rows of a JSON array, numbered by their index from 1; elements that aren't objects are malformed."""
    cure = "write one object in each line"
    try:
        data = content.read(MAX_ARRAY_BYTES + 1)
    except GZIP_ERRORS as error:
        raise build_gzip_error(tally, error) from None
    if len(data) > MAX_ARRAY_BYTES:
        raise UserError(f"{tally.path}: a JSON array of more than {MAX_ARRAY_BYTES >> 20:,} MiB; {cure}")
    try:
        elements = _JSON_DECODER.decode(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{tally.path}: the file begins as a JSON array, which is broken ({error}); repair it, or {cure}"
        ) from None
    tally.position = tally.path.stat().st_size
    for tally.lines, element in enumerate(elements, 1):
        if isinstance(element, dict):
            yield tally.lines, element
        else:
            tally.reject(tally.lines, "expected a JSON object")
