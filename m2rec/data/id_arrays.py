"""Arrays of ids and positions: how many bytes they need, and counting, taking and ordering them.

NumPy makes 8-byte positions of every array that it counts or indexes with, so both are done in blocks.

letter  meaning
n       interactions
"""

from typing import Any

import numpy as np

BLOCK = 1 << 21  # ids at a time, a bound on memory
_LARGEST = np.iinfo(np.int32).max


def choose_id_type(n_ids: int) -> type[np.signedinteger[Any]]:
    """The type of ids or positions from 0 to `n_ids`: int32 where they fit, else int64."""
    return np.int32 if n_ids <= _LARGEST else np.int64


def count_ids(ids: np.ndarray, n_ids: int) -> np.ndarray:
    """How often each id occurs, (n_ids,); negative ones stand for none.

    Args:
        ids: (n,) integers below `n_ids`.
    """
    counts = np.zeros(n_ids, dtype=np.int64)
    for start in range(0, len(ids), BLOCK):
        some = ids[start : start + BLOCK]
        counts += np.bincount(some[some >= 0], minlength=n_ids)
    return counts


def take(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`values[index]` for an index of one dimension."""
    taken = np.empty((len(index), *values.shape[1:]), dtype=values.dtype)
    for start in range(0, len(index), BLOCK):
        some = slice(start, start + BLOCK)
        taken[some] = values[index[some]]
    return taken


def order_by_time(times: np.ndarray) -> np.ndarray | None:
    """The order of times, (n,), equal ones as they are; None if they are in order."""
    if (times[1:] >= times[:-1]).all():
        return None
    whole = _count_from_first(times)
    if whole is None:
        return times.argsort(kind="stable").astype(choose_id_type(len(times)))
    return _order_small(whole)


def order_by_user(users: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """An order of interactions, rearranged so that each user's are together, users ascending.

    Args:
        users: (n,) non-negative integers.
        order: (n,), such as the order by time; each user's interactions stay in it. None for that of `users`.
    """
    ordered = users if order is None else take(users, order)
    by_user = _order_small(ordered) if _are_small(users) else ordered.argsort(kind="stable")
    return by_user if order is None else take(order, by_user)


def is_ordered(users: np.ndarray, times: np.ndarray) -> bool:
    """Whether interactions are in the order of users, each user's in the order of times; (n,) both."""
    is_same_user = users[1:] == users[:-1]
    return bool(((users[1:] > users[:-1]) | (is_same_user & (times[1:] >= times[:-1]))).all())


def _are_small(keys: np.ndarray) -> bool:
    """Whether keys and their positions have 31 bits each."""
    return max(len(keys), int(keys.max(initial=0))) <= _LARGEST


def _order_small(keys: np.ndarray) -> np.ndarray:
    """The stable order of small keys, (n,) int32.

    Key and position are one integer each, sorted in place: equal keys stay in order, and NumPy sorts plain
    integers several times as fast as an index.
    """
    packed = np.arange(len(keys), dtype=np.int64)
    for start in range(0, len(keys), BLOCK):
        some = slice(start, start + BLOCK)
        packed[some] |= keys[some].astype(np.int64) << 32
    packed.sort()
    return packed.astype(np.int32)  # the position: the lower half


def _count_from_first(times: np.ndarray) -> np.ndarray | None:
    """Units of time since the first one, (n,) int32; None unless all are whole and so few."""
    first, last = float(times.min()), float(times.max())
    if not last - first <= _LARGEST or len(times) > _LARGEST:
        return None
    units = np.empty(len(times), dtype=np.int32)
    for start in range(0, len(times), BLOCK):
        some = times[start : start + BLOCK].astype(np.float64)
        if (some != np.rint(some)).any():
            return None
        units[start : start + BLOCK] = some - first
    return units
