"""Columns of interactions, filled batch by batch: tokens become codes at once, numbers become doubles.

Numbers are what pandas makes of the texts of a whole column, to the last bit: a column of integers is
rounded correctly to doubles; in any other column texts of more than 15 digits may be off by one.

letter  meaning
n       interactions
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from m2rec.data.id_arrays import choose_id_type, count_ids, take

DOUBLE_DIGITS = 15  # decimal digits that a double always keeps
EXACT_INTEGERS = 2**53  # whole numbers below it are doubles

# Decimals whose digits, read as one integer, are below 2^53: every parser makes the same double of them
_PLAIN_DECIMAL = r"^([0-9]{1,15}|[0-9]{1,7}\.[0-9]{1,8}|[0-8][0-9]*\.[0-9]+)$"
_PLAIN_LENGTH = 17

TOKEN_TYPE = pa.dictionary(pa.int32(), pa.string())


class InvalidNumberError(ValueError):
    """A column has texts that are not valid numbers.

    Args:
        column: its name.
        is_invalid: (n,) booleans.
        text: the first invalid text; None for a missing one.
    """

    def __init__(self, column: str, is_invalid: np.ndarray, text: str | None) -> None:
        super().__init__(column)
        self.column, self.text = column, text
        self.first, self.count = int(is_invalid.argmax()), int(is_invalid.sum())


class TokenColumn:
    """Tokens as codes; a code's token is in the order of first appearance."""

    def __init__(self) -> None:
        self._chunks: list[pa.DictionaryArray] = []

    def append(self, tokens: pa.Array) -> None:
        """Add tokens, as texts or dictionary-encoded; null is a missing one."""
        self._chunks.append(tokens.cast(TOKEN_TYPE) if tokens.type != TOKEN_TYPE else tokens)

    def build(self) -> pd.Categorical:
        """All tokens, (n,)."""
        unified = pa.chunked_array(self._chunks, type=TOKEN_TYPE).unify_dictionaries()
        self._chunks.clear()
        if not unified.num_chunks:
            return pd.Categorical.from_codes([], [])
        codes = [chunk.indices.fill_null(-1).to_numpy() for chunk in unified.chunks]
        tokens = unified.chunk(unified.num_chunks - 1).dictionary
        return pd.Categorical.from_codes(np.concatenate(codes), pd.Index(tokens.to_pandas()), validate=False)


class NumberColumn:
    """Numbers, given as texts or as an array.

    A chunk is an array of int64 where all its texts are nothing but digits, else the texts.
    """

    def __init__(self) -> None:
        self._chunks: list[np.ndarray | pa.StringArray] = []

    def append(self, values: pa.StringArray | np.ndarray) -> None:
        """Add texts, null for a missing one, or int64, or doubles, NaN for a missing one."""
        if not isinstance(values, np.ndarray):
            integers = _parse_digits(values)
            values = values if integers is None else integers
        self._chunks.append(values)

    def build(self) -> np.ndarray:
        """All numbers, (n,) doubles; NaN where a text is missing or invalid.

        Whole numbers that are doubles are let go, chunk by chunk: neither ties nor errors ask for them again.
        """
        if all(_are_exact(chunk) for chunk in self._chunks):
            return _move_to_doubles(self._chunks)
        parsed = [_parse_chunk(chunk) for chunk in self._chunks]
        if not all(values.dtype.kind in "iu" for values in parsed):
            for index, chunk in enumerate(self._chunks):
                parsed[index] = _round_as_decimals(chunk, parsed[index])
        return _move_to_doubles(parsed)

    def separate_ties(self, times: np.ndarray) -> np.ndarray:
        """What `build` returned, but numbers that differ only beyond double precision stay different.

        Raises:
            decimal.InvalidOperation: a text is not a valid number.
        """
        if all(isinstance(chunk, np.ndarray) for chunk in self._chunks):
            numbers = np.concatenate([np.empty(0, dtype=np.int64), *self._chunks])
            return _separate_integers(numbers, times) if numbers.dtype.kind == "i" else times
        if not any(_may_exceed_doubles(chunk) for chunk in self._chunks):
            return times
        texts = pd.concat([_format_texts(chunk) for chunk in self._chunks], ignore_index=True)
        return separate_close_times(texts, times)

    def find_text(self, position: int) -> str | None:
        """The text at a position; None for a missing one."""
        for chunk in self._chunks:
            if position < len(chunk):
                value = chunk[position]
                if isinstance(chunk, np.ndarray):
                    return None if np.isnan(value) else str(value)
                text: str | None = value.as_py()
                return text
            position -= len(chunk)
        raise IndexError(position)

    def find_missing(self) -> np.ndarray:
        """Where a text is missing, (n,) booleans."""
        missing = [np.empty(0, dtype=bool)]
        for chunk in self._chunks:
            is_array = isinstance(chunk, np.ndarray)
            missing.append(np.isnan(chunk) if is_array else pc.is_null(chunk).to_numpy(False))
        return np.concatenate(missing)


class ColumnTable:
    """The loaded columns of a file.

    Args:
        types: `token` or `float` of each column, in the order of the result.
        time_column: its numbers must be finite; those of other columns may be missing or infinite.
    """

    def __init__(self, types: Mapping[str, str], time_column: str = "") -> None:
        self._time_column = time_column
        self._tokens = {name: TokenColumn() for name, kind in types.items() if kind == "token"}
        self._numbers = {name: NumberColumn() for name, kind in types.items() if kind == "float"}
        self._order = list(types)

    def append(self, batch: Mapping[str, pa.Array | np.ndarray]) -> None:
        """Add rows: what `TokenColumn.append` and `NumberColumn.append` take, by column."""
        for columns in (self._tokens, self._numbers):
            for name, column in columns.items():
                column.append(batch[name])

    def build(self, exact_order: bool = False) -> pd.DataFrame:
        """All rows, tokens as categories in the order of first appearance.

        Args:
            exact_order: times that differ only beyond double precision stay different.

        Raises:
            InvalidNumberError: a number is invalid, or a time is missing, NaN or infinite.
        """
        built: dict[str, pd.Categorical | np.ndarray] = {}
        for name in list(self._numbers):  # each lets its texts go before the next needs memory
            built[name] = self._build_numbers(name, self._numbers.pop(name), exact_order)
        for name, tokens in self._tokens.items():
            built[name] = tokens.build()
        pa.default_memory_pool().release_unused()  # else the process keeps the memory of all batches
        return pd.DataFrame({name: built[name] for name in self._order}, copy=False)

    def _build_numbers(self, name: str, column: NumberColumn, exact_order: bool) -> np.ndarray:
        values = column.build()
        self._check_numbers(name, column, values)
        return column.separate_ties(values) if exact_order and name == self._time_column else values

    def _check_numbers(self, name: str, column: NumberColumn, values: np.ndarray) -> None:
        is_invalid = ~np.isfinite(values) if name == self._time_column else np.isnan(values)
        if is_invalid.any() and name != self._time_column:
            is_invalid &= ~column.find_missing()
        if is_invalid.any():
            raise InvalidNumberError(name, is_invalid, column.find_text(int(is_invalid.argmax())))


def _move_to_doubles(chunks: list[np.ndarray]) -> np.ndarray:
    """All numbers as doubles, (n,); the chunks are let go one by one."""
    numbers, start = np.empty(sum(map(len, chunks))), 0
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        numbers[start : start + len(chunk)] = chunk
        start += len(chunk)
    return numbers


def _are_exact(chunk: np.ndarray | pa.StringArray) -> bool:
    """Whether a chunk has whole numbers only, of which each is a double."""
    is_array = isinstance(chunk, np.ndarray) and chunk.dtype.kind == "i"
    return is_array and int(chunk.max(initial=0)) < EXACT_INTEGERS


def _may_exceed_doubles(chunk: np.ndarray | pa.StringArray) -> bool:
    """Whether a number of a chunk may have more digits than a double keeps; makes no string of each cell."""
    if not isinstance(chunk, np.ndarray):
        longest = pc.max(pc.binary_length(chunk)).as_py()
        return longest is not None and longest > DOUBLE_DIGITS
    limit = 10**DOUBLE_DIGITS
    return chunk.dtype.kind != "i" or bool(((chunk >= limit) | (chunk <= -limit)).any())


def _parse_digits(texts: pa.StringArray) -> np.ndarray | None:
    """Texts as int64, if each is nothing but digits."""
    if texts.null_count or not pc.all(pc.ascii_is_decimal(texts)).as_py():
        return None
    try:
        return np.asarray(texts.cast(pa.int64()).to_numpy())
    except pa.ArrowInvalid:  # above the largest int64
        return None


def _parse_chunk(chunk: np.ndarray | pa.StringArray) -> np.ndarray:
    """Numbers of any type, as pandas takes these texts alone for a column."""
    if isinstance(chunk, np.ndarray):
        return chunk
    if _are_plain_decimals(chunk):
        return np.asarray(chunk.cast(pa.float64()).to_numpy(False))
    return np.asarray(pd.to_numeric(_format_texts(chunk), errors="coerce").to_numpy())


def _are_plain_decimals(texts: pa.StringArray) -> bool:
    is_plain = pc.all(pc.match_substring_regex(texts, _PLAIN_DECIMAL)).as_py()
    return bool(is_plain) and pc.max(pc.binary_length(texts)).as_py() <= _PLAIN_LENGTH


def _round_as_decimals(chunk: np.ndarray | pa.StringArray, values: np.ndarray) -> np.ndarray:
    """Doubles of a chunk in a column that is not all integers, where pandas reads integers as decimals."""
    is_array = isinstance(chunk, np.ndarray)
    if values.dtype.kind == "f" or (is_array and values.max(initial=0) < EXACT_INTEGERS):
        return values.astype(np.float64, copy=False)
    texts = pd.concat([_format_texts(chunk), pd.Series(["0.5"], dtype=object)])
    return np.asarray(pd.to_numeric(texts, errors="coerce").to_numpy()[:-1])


def _format_texts(chunk: np.ndarray | pa.StringArray) -> pd.Series:
    if isinstance(chunk, np.ndarray):
        return pd.Series([str(value) for value in chunk.tolist()], dtype=object)
    return pd.Series(chunk.to_numpy(False), dtype=object)


def separate_close_times(texts: pd.Series, times: np.ndarray) -> np.ndarray:
    """Times (n,) that differ where their texts do, in the same order.

    Nanoseconds since 1970 have 19 digits, of which a double keeps 15: times that would become equal
    take the next doubles.
    """
    tied = pd.Series(times).duplicated(keep=False).to_numpy()
    if texts[tied].nunique() == len(np.unique(times[tied])):
        return times
    code, exact = pd.factorize(texts.map(Decimal), sort=True)
    return np.asarray(_spread_ties(np.array([float(time) for time in exact]))[code])


def _separate_integers(integers: np.ndarray, times: np.ndarray) -> np.ndarray:
    """`separate_close_times` for whole numbers, (n,) int64."""
    if integers.max(initial=0) < EXACT_INTEGERS:
        return times
    exact, code = np.unique(integers, return_inverse=True)
    doubles = exact.astype(np.float64)
    if (np.diff(doubles) > 0).all():
        return times
    return np.asarray(_spread_ties(doubles)[code])


def _spread_ties(ordered: np.ndarray) -> np.ndarray:
    """Ascending doubles as strictly ascending ones: equal ones take the next doubles."""
    integers = _flip_negative(ordered.view(np.int64))
    rank = np.arange(len(integers))
    integers = np.maximum.accumulate(integers - rank) + rank
    return _flip_negative(integers).view(np.float64)


def _flip_negative(bits: np.ndarray) -> np.ndarray:
    """Bits of doubles as integers in the same order, where neighbours differ by one; its own inverse."""
    magnitude = np.iinfo(np.int64).max
    return np.asarray(bits ^ ((bits >> 63) & magnitude))


def encode_tokens(tokens: pd.Series) -> pd.Categorical:
    """Tokens as categories in the order of first appearance; a missing one has none."""
    codes, categories = pd.factorize(tokens)
    return pd.Categorical.from_codes(codes, categories, validate=False)


def list_tokens(column: pd.Series) -> list[str]:
    """The categories of a column of tokens; iterating over them takes several times as long."""
    tokens: list[str] = column.cat.categories.to_numpy(dtype=object).tolist()
    return tokens


def hash_tokens(tokens: Sequence[str]) -> np.ndarray:
    """A hash of each token, (n,) uint64, the same on every machine."""
    return np.asarray(pd.util.hash_array(np.array(tokens, dtype=object), categorize=False))


def count_codes(column: pd.Series) -> np.ndarray:
    """How often each category of a column of tokens occurs, (number of categories,)."""
    return count_ids(column.cat.codes.to_numpy(), len(column.cat.categories))


def order_by_appearance(column: pd.Series) -> pd.Categorical:
    """The same tokens, with only those categories that occur, in the order of first appearance."""
    codes, used = pd.factorize(column.array)
    return pd.Categorical.from_codes(codes, used.categories.take(used.codes), validate=False)


class FilteredRows(NamedTuple):
    """What `filter_by_counts` keeps."""

    is_kept: np.ndarray
    """(n,) booleans."""
    rounds: int
    """Passes over the rows that removed some."""


def filter_by_counts(
    codes: Sequence[np.ndarray], checks: Sequence[Callable[[np.ndarray], np.ndarray]]
) -> FilteredRows:
    """Which rows are left once those whose user or item has a wrong number of rows are gone.

    Dropping rows lowers other counts, so this goes on until every user and item that is left has a right
    one: a k-core, if the checks are lower bounds.

    Args:
        codes: of users and of items, (n,) each.
        checks: for users and for items, which numbers of rows are right.
    """
    rows, rounds = np.arange(len(codes[0]), dtype=choose_id_type(len(codes[0]))), 0
    counts = [count_ids(column, int(column.max(initial=-1)) + 1) for column in codes]
    while True:
        is_dropped = np.zeros(len(rows), dtype=bool)
        for column, count, check in zip(codes, counts, checks, strict=True):
            is_wrong = ~check(count) & (count > 0)
            if is_wrong.any():
                is_dropped |= take(is_wrong, take(column, rows))
        if not is_dropped.any():
            break
        rounds += 1
        dropped, rows = rows[is_dropped], rows[~is_dropped]
        for column, count in zip(codes, counts, strict=True):
            count -= count_ids(take(column, dropped), len(count))
    is_kept = np.zeros(len(codes[0]), dtype=bool)
    is_kept[rows] = True
    return FilteredRows(is_kept, rounds)


class TokenIds(Mapping[str, int]):
    """Ids by token, looked up in a dict that is made when it is needed: with millions it takes seconds.

    Args:
        tokens: by id, all different.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}

    def __getitem__(self, token: str) -> int:
        return self._ids[token]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return self._ids == (other._ids if isinstance(other, TokenIds) else other)


def reorder_rows(frame: pd.DataFrame, order: np.ndarray) -> pd.DataFrame:
    """The rows in this order, numbered anew; the frame loses its columns one by one, which saves memory."""
    columns = {}
    for name in list(frame):
        values = frame.pop(name)
        is_numpy = isinstance(values.dtype, np.dtype)
        columns[name] = take(values.to_numpy(), order) if is_numpy else values.array.take(order)
    return pd.DataFrame(columns, copy=False)
