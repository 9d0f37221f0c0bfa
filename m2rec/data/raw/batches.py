"""Interactions of a whole file, batch by batch: from columns where that is possible, and else from rows.

A batch has the texts that are written. Both ways give the same texts, counts and remarks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.data.raw.blocks import Block, TableBlocks
from m2rec.data.raw.filters import RowCondition
from m2rec.data.raw.interactions import ColumnNames, InteractionParser, RawInteraction
from m2rec.data.raw.tally import MalformedRowError, RawRow
from m2rec.data.raw.time_columns import convert_times
from m2rec.data.raw.times import TimestampReader
from m2rec.data.raw.values import format_decimal, is_missing, is_zero, parse_id, parse_rating

BATCH_ROWS = 10_000  # of interactions that come from rows

# \pZ is what Python's str.strip removes and is no control character
_BLANK_AT_EDGE = r"^\pZ|\pZ$"
_ODD_ID = r"^\pZ*$|[\x00-\x1f\x7f-\x{9f}]"
_NOT_PLAIN_ID = rf"{_BLANK_AT_EDGE}|{_ODD_ID}"


class InteractionBatch(NamedTuple):
    """Some interactions, in file order; (n,) each."""

    users: pa.DictionaryArray
    items: pa.DictionaryArray
    """Ids; a dictionary has no others, in the order of first appearance."""
    times: pa.StringArray
    """Seconds since 1970, or the number of the interaction."""
    ratings: pa.DictionaryArray
    """Empty where there is none."""

    def select(self, is_kept: np.ndarray) -> "InteractionBatch":
        """The interactions that are kept, (n,) booleans."""
        mask = pa.array(is_kept)
        users, items, times, ratings = (column.filter(mask) for column in self)
        return InteractionBatch(_encode_again(users), _encode_again(items), times, ratings)


def _encode_again(tokens: pa.DictionaryArray) -> pa.DictionaryArray:
    return tokens.dictionary_decode().dictionary_encode()


def build_batch(interactions: Sequence[RawInteraction]) -> InteractionBatch:
    """A batch of interactions."""
    ratings = ["" if x.rating is None else format_decimal(x.rating) for x in interactions]
    return InteractionBatch(
        pa.array([x.user for x in interactions], pa.string()).dictionary_encode(),
        pa.array([x.item for x in interactions], pa.string()).dictionary_encode(),
        pa.array([format_decimal(x.time) for x in interactions], pa.string()),
        pa.array(ratings, pa.string()).dictionary_encode(),
    )


def build_batches(interactions: Iterable[RawInteraction]) -> Iterator[InteractionBatch]:
    """Batches of interactions that come one by one."""
    remaining = iter(interactions)
    while part := list(islice(remaining, BATCH_ROWS)):
        yield build_batch(part)


def read_block_batches(parser: InteractionParser, blocks: TableBlocks) -> Iterator[InteractionBatch]:
    """The interactions of a table; a large block that is odd is read again in small ones.

    Raises:
        ValueError: see `InteractionParser.read_rows`.
    """
    odd_until = 0
    with ThreadPoolExecutor(2) as pool:
        while (block := blocks.peek(is_large=blocks.position >= odd_until)) is not None:
            batch = _convert_block(parser, block, pool)
            if batch is not None:
                blocks.take(block)
                yield batch
            elif block.is_large:
                odd_until = blocks.position + max(block.size, 1)
            else:
                yield from build_batches(parser.read_rows(blocks.read_rows(block)))


class _OddColumnError(Exception):
    """A block that is to be read row by row."""


def _convert_block(parser: InteractionParser, block: Block, pool: Executor) -> InteractionBatch | None:
    """The interactions of a block; None if it is odd, and the parser has not changed then."""
    if block.columns is None:
        return None
    try:
        return _BlockConverter(parser, block.columns, block, pool).convert()
    except (_OddColumnError, MalformedRowError):
        return None


class _BlockConverter:
    """Converts the columns of one block.

    Args:
        parser: of the file.
        columns: of the block, (n,) each.
        block: it.
        pool: converts users and items beside the times.
    """

    def __init__(
        self, parser: InteractionParser, columns: Mapping[str, pa.Array], block: Block, pool: Executor
    ) -> None:
        self.parser, self.columns, self.names, self.submit = parser, columns, block.names, pool.submit
        self.is_complete = block.is_complete
        self.rows = np.arange(block.n_rows)
        """Those that are kept, of the block."""

    def convert(self) -> InteractionBatch:
        """The interactions; the parser changes only if nothing is odd.

        Raises:
            _OddColumnError, MalformedRowError: something is.
        """
        removed = self._apply_conditions()
        rejected = self._leave_out_empty() if self.is_complete else []
        parser, columns, submit = self.parser, self.parser.columns, self.submit
        if not len(self.rows):
            self._note_removed(removed)
            self._reject(rejected)
            return build_batch([])
        converted = submit(self._convert_ids, columns.user), submit(self._convert_ids, columns.item)
        times, reader = self._convert_times(columns.time)
        ratings, zeros = self._convert_ratings(columns.rating), self._count_zeros()
        users, items = (column.result() for column in converted)
        if rejected and (users.n_stripped or items.n_stripped) and not parser.ids.n_stripped:
            raise _OddColumnError  # the first id with blanks may be in a row that is rejected
        # nothing else is odd: from here on the parser changes
        self._note_removed(removed)
        self._reject(rejected)
        if reader is None:
            parser.n_ordered += len(self.rows)
        else:
            parser.times = reader
        self._note_stripped(users, items)
        for name, count in zeros.items():
            parser.unused.zeros[name] += count
        parser.unused.note_names(self.names)
        return InteractionBatch(users.tokens, items.tokens, times, ratings)

    def _apply_conditions(self) -> dict[RowCondition, int]:
        """Keep the rows that fulfil all conditions; returns how many each one removes after those before."""
        removed = dict.fromkeys(self.parser.columns.keep, 0)
        for condition in self.parser.columns.keep:
            codes, values = _encode_values(self._get_column((condition.column,)))
            holds = np.array([condition.holds(value) for value in values], dtype=bool)[codes]
            if not holds.all():
                removed[condition] += int(len(holds) - holds.sum())
                self.rows = self.rows[holds]
                mask = pa.array(holds)
                self.columns = {name: column.filter(mask) for name, column in self.columns.items()}
        return removed

    def _leave_out_empty(self) -> list[tuple[int, RawRow]]:
        """Leave out the rows without a user, item or time, which the parser rejects; returns them by line."""
        columns = self.parser.columns
        is_empty = np.zeros(len(self.rows), dtype=bool)
        for names in filter(None, (columns.user, columns.item, columns.time)):
            values = self._get_column(names)
            missing = pc.is_null(values)
            if pa.types.is_string(values.type):
                missing = pc.or_(missing, pc.fill_null(pc.equal(pc.binary_length(values), 0), False))
            is_empty |= missing.to_numpy(zero_copy_only=False)
        if not is_empty.any():
            return []
        places = np.flatnonzero(is_empty)
        parts = {name: column.take(pa.array(places)).to_pylist() for name, column in self.columns.items()}
        rows = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
        lines = [self._find_line(place) for place in places.tolist()]
        mask = pa.array(~is_empty)
        self.rows = self.rows[~is_empty]
        self.columns = {name: column.filter(mask) for name, column in self.columns.items()}
        return list(zip(lines, rows, strict=True))

    def _reject(self, rejected: Sequence[tuple[int, RawRow]]) -> None:
        """Let the parser reject rows."""
        tally, n_before = self.parser.tally, self.parser.tally.lines
        for tally.lines, row in rejected:
            accepted = list(self.parser.parse_rows(iter([(tally.lines, row)])))
            assert not accepted
        tally.lines = n_before

    def _note_removed(self, removed: Mapping[RowCondition, int]) -> None:
        self.parser.filter.note_names(self.names)
        for condition, count in removed.items():
            self.parser.filter.removed[condition] += count

    def _get_column(self, names: ColumnNames) -> pa.Array:
        """The first of these columns that exists; missing values are odd where another one may have some."""
        existing = [self.columns[name] for name in names if name in self.columns]
        if not existing:
            return pa.nulls(len(self.rows))
        if len(existing) > 1 and existing[0].null_count:
            raise _OddColumnError
        return _simplify(existing[0])

    def _convert_ids(self, names: ColumnNames) -> "_Ids":
        values = self._get_column(names)
        codes, dictionary = _encode_column(values)
        if dictionary.null_count:
            raise _OddColumnError
        if pa.types.is_integer(dictionary.type):
            return _Ids(pa.DictionaryArray.from_arrays(codes, dictionary.cast(pa.string())))
        if not pa.types.is_string(dictionary.type):
            texts = [_read_present_id(value) for value in dictionary.to_pylist()]
            tokens = pa.array(texts, pa.string()).take(codes).dictionary_encode()
            codes, dictionary = tokens.indices, tokens.dictionary
        if not pc.any(pc.match_substring_regex(dictionary, _NOT_PLAIN_ID)).as_py():
            return _Ids(pa.DictionaryArray.from_arrays(codes, dictionary))
        if pc.any(pc.match_substring_regex(dictionary, _ODD_ID)).as_py():
            raise _OddColumnError
        has_blanks = pc.match_substring_regex(dictionary, _BLANK_AT_EDGE)
        stripped = pa.array([text.strip() for text in dictionary.to_pylist()], pa.string())
        is_stripped = np.flatnonzero(has_blanks.take(codes).to_numpy(zero_copy_only=False))
        first = int(is_stripped[0])
        example = dictionary[codes[first].as_py()].as_py()
        return _Ids(stripped.take(codes).dictionary_encode(), len(is_stripped), first, example)

    def _note_stripped(self, users: "_Ids", items: "_Ids") -> None:
        ids = self.parser.ids
        found = [column for column in (users, items) if column.n_stripped]
        if found and not ids.n_stripped:
            first = min(found, key=lambda column: column.first)  # of equal ones that of the user
            ids.example = f"{first.example!r} in {ids.name_line(self._find_line(first.first))}"
        ids.n_stripped += users.n_stripped + items.n_stripped

    def _find_line(self, place: int) -> int:
        """The line of a row that is kept."""
        return self.parser.tally.lines + 1 + int(self.rows[place])

    def _convert_ratings(self, names: ColumnNames) -> pa.DictionaryArray:
        if not names:
            zeros = np.zeros(len(self.rows), dtype=np.int32)
            return pa.DictionaryArray.from_arrays(pa.array(zeros), pa.array([""], pa.string()))
        codes, values = _encode_values(self._get_column(names))
        texts = []
        for value in values:
            rating = parse_rating(value)
            texts.append("" if rating is None else format_decimal(rating))
        return pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(texts, pa.string()))

    def _convert_times(self, names: ColumnNames) -> tuple[pa.StringArray, TimestampReader | None]:
        if not names:
            start = self.parser.n_ordered + 1
            return pa.array(np.arange(start, start + len(self.rows))).cast(pa.string()), None
        converted = convert_times(self.parser.times, self._get_column(names), self._find_line(0))
        if converted is None:
            raise _OddColumnError
        return converted

    def _count_zeros(self) -> dict[str, int]:
        """Zeros in unused columns of clicks."""
        zeros = {}
        for name in self.columns.keys() - self.parser.columns.used:
            if name.lower() in LABEL_COLUMNS:
                codes, values = _encode_values(_simplify(self.columns[name]))
                zeros[name] = int(np.array([is_zero(value) for value in values], dtype=bool)[codes].sum())
        return zeros


class _Ids(NamedTuple):
    """The ids of a block."""

    tokens: pa.DictionaryArray
    n_stripped: int = 0
    """Ids that had blanks around them."""
    first: int = -1
    """The place of the first of them."""
    example: str = ""
    """Its text."""


def _read_present_id(value: object) -> str:
    if is_missing(value):
        raise _OddColumnError
    return parse_id(value)


def _simplify(values: pa.Array) -> pa.Array:
    """Texts as plain ones, whatever Parquet has them as."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    is_text = pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    return values.cast(pa.string()) if is_text else values


def _encode_column(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Codes and the distinct values, in the order of first appearance; null is a value."""
    try:
        encoded = values.dictionary_encode("encode")
    except pa.ArrowNotImplementedError:  # lists and objects
        raise _OddColumnError from None
    return encoded.indices, encoded.dictionary


def _encode_values(values: pa.Array) -> tuple[np.ndarray, list[object]]:
    """Codes (n,) and the distinct values of Python."""
    codes, dictionary = _encode_column(values)
    return codes.to_numpy(), dictionary.to_pylist()
