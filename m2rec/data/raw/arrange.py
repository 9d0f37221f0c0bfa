"""Arrange the interactions of a file: no duplicates, k-core, user by user, times from a user's first."""

from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2rec.data.id_arrays import order_by_user
from m2rec.data.raw.batches import InteractionBatch
from m2rec.data.raw.options import PreparationOptions
from m2rec.data.raw.tally import Tally
from m2rec.data.raw.time_columns import format_scaled
from m2rec.data.raw.token_counts import TokenCodes
from m2rec.data.raw.values import format_decimal

_BATCH_ROWS = 1 << 18
_DECIMAL_DIGITS = 38  # of Arrow's decimals of 128 bits
_INTEGER_DIGITS = 18  # of int64
_TIME_LIMIT = 2**62  # a difference of two smaller times is an int64


def arrange_batches(
    batches: Iterator[InteractionBatch], options: PreparationOptions, tally: Tally
) -> Iterator[InteractionBatch]:
    """The interactions without duplicates, of the core, in the order and with the times of the options."""
    if not (options.drop_repeats or options.core or options.by_user or options.relative_times):
        yield from batches  # one at a time, not held in memory
        return
    held = HeldInteractions(batches)
    if options.drop_repeats:
        n_duplicates = held.drop_repeats()
        if n_duplicates:
            tally.notes.append(f"exact duplicates removed: {n_duplicates:,}")
    if options.core:
        removed, rounds = held.select_core(options.core)
        tally.notes.append(
            f"removed for a {options.core}-core: {removed:,} interactions in {rounds:,} rounds"
        )
    if options.by_user:
        held.sort_by_user()
    if options.relative_times:
        held.subtract_first_times()
        tally.notes.append("times are written as the distance from each user's first interaction")
    yield from held.iterate_batches()


class HeldInteractions:
    """All interactions of a file in memory, some 20 bytes each.

    Args:
        batches: the interactions.
    """

    def __init__(self, batches: Iterator[InteractionBatch]) -> None:
        users, items, ratings, times = TokenCodes(), TokenCodes(), TokenCodes(), _TimeColumn()
        for batch in batches:
            users.add(batch.users)
            items.add(batch.items)
            ratings.add(batch.ratings)
            times.add(batch.times)
        self._tokens = (users.tokens, items.tokens, ratings.tokens)
        self._times, self._places = times.build()
        self._columns = [users.codes, items.codes, ratings.codes]

    def drop_repeats(self) -> int:
        """Keep the first of interactions of the same user, item and time; returns how many are dropped."""
        users, items, _ = self._columns
        _, times = np.unique(self._times, return_inverse=True)
        order = np.lexsort((times, items, users))
        is_repeat = np.zeros(len(order), dtype=bool)
        is_equal = [column[order[1:]] == column[order[:-1]] for column in (users, items, times)]
        is_repeat[order[1:]] = np.logical_and.reduce(is_equal)
        self._take(np.flatnonzero(~is_repeat))
        return int(is_repeat.sum())

    def select_core(self, k: int) -> tuple[int, int]:
        """Keep the largest part in which every user and every item has at least `k` interactions.

        To drop an item may leave one of its users with fewer than `k`, and so on until nothing changes.

        Returns:
            how many interactions are dropped, and in how many rounds.
        """
        from m2rec.data.columns import filter_by_counts  # here, since it loads pandas

        n_before = len(self._times)
        kept = filter_by_counts(self._columns[:2], [lambda counts: counts >= k] * 2)
        self._take(np.flatnonzero(kept.is_kept))
        return n_before - len(self._times), kept.rounds

    def sort_by_user(self) -> None:
        """User by user as they first appear, each user's interactions by time; ties stay in file order."""
        users = _number_by_appearance(self._columns[0])
        self._take(order_by_user(users, self._times.argsort(kind="stable")))

    def subtract_first_times(self) -> None:
        """Make each time the distance from its user's first."""
        users = self._columns[0]
        first = np.empty(len(self._tokens[0]), dtype=self._times.dtype)
        descending = self._times.argsort(kind="stable")[::-1]
        first[users[descending]] = self._times[descending]
        self._times = self._times - first[users]

    def iterate_batches(self) -> Iterator[InteractionBatch]:
        """The interactions in their order."""
        for start in range(0, len(self._times), _BATCH_ROWS):
            part = slice(start, start + _BATCH_ROWS)
            users, items, ratings = (
                tokens.take(pa.array(codes[part])).cast(pa.string()).dictionary_encode()
                for tokens, codes in zip(self._tokens, self._columns, strict=True)
            )
            yield InteractionBatch(users, items, _format_times(self._times[part], self._places), ratings)

    def _take(self, rows: np.ndarray) -> None:
        self._times = self._times[rows]
        for place in range(len(self._columns)):
            self._columns[place] = self._columns[place][rows]


def _number_by_appearance(codes: np.ndarray) -> np.ndarray:
    """Codes (n,) numbered anew, in the order of first appearance."""
    n_codes = int(codes.max(initial=-1)) + 1
    first = np.full(n_codes, len(codes))
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of equal codes the first one is assigned last
    numbers = np.empty(n_codes, dtype=codes.dtype)
    numbers[first.argsort()] = np.arange(n_codes)
    return np.asarray(numbers[codes])


class _TimeColumn:
    """Times as whole numbers, moved by a power of ten, or where these are too large as Python's decimals."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, int] | pa.StringArray] = []

    def add(self, texts: pa.StringArray) -> None:
        """Add the shortest texts of numbers."""
        self._parts.append(_parse_scaled(texts) or texts)

    def build(self) -> tuple[np.ndarray, int]:
        """All times, (n,), and by how many decimal places they are moved."""
        scaled = [part for part in self._parts if isinstance(part, tuple)]
        places = max((own for _, own in scaled), default=0)
        largest = [int(np.abs(times).max(initial=0)) * 10 ** (places - own) for times, own in scaled]
        if len(scaled) < len(self._parts) or max(largest, default=0) >= _TIME_LIMIT:
            return np.array([time for part in self._parts for time in _list_times(part)], dtype=object), 0
        times = [times * 10 ** (places - own) for times, own in scaled]
        return np.concatenate([np.empty(0, dtype=np.int64), *times]), places


def _list_times(part: tuple[np.ndarray, int] | pa.StringArray) -> list[Decimal]:
    if isinstance(part, tuple):
        times, places = part
        return [Decimal(time).scaleb(-places) for time in times.tolist()]
    return [Decimal(text) for text in part.to_pylist()]


def _parse_scaled(texts: pa.StringArray) -> tuple[np.ndarray, int] | None:
    """The numbers as int64, moved by the returned number of places; None if they are too large."""
    point = pc.find_substring(texts, ".").to_numpy()
    lengths = pc.binary_length(texts).to_numpy()
    places = int(np.where(point >= 0, lengths - point - 1, 0).max(initial=0))
    if not places and lengths.max(initial=0) <= _INTEGER_DIGITS:
        return np.asarray(texts.cast(pa.int64()).to_numpy()), 0
    if places > _INTEGER_DIGITS:
        return None
    try:
        decimals = texts.cast(pa.decimal128(_DECIMAL_DIGITS, places))
    except pa.ArrowInvalid:  # too many digits
        return None
    low, high = np.frombuffer(decimals.buffers()[1], dtype=np.int64).reshape(-1, 2)[: len(texts)].T
    if (high != low >> 63).any() or (np.abs(low) >= _TIME_LIMIT).any():
        return None
    return low.copy(), places


def _format_times(times: np.ndarray, places: int) -> pa.StringArray:
    if times.dtype != object and times.min(initial=0) >= 0:
        return format_scaled(times, places)
    texts = [format_decimal(Decimal(time).scaleb(-places)) for time in times.tolist()]
    return pa.array(texts, pa.string())
