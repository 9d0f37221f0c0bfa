"""Times of interactions: gaps, how many lie in each period, and what is popular at the end of one."""

from dataclasses import dataclass

import numpy as np

from m2rec.data.id_arrays import BLOCK, is_ordered, order_by_time, order_by_user, take

_DAY = 86_400
_RECENT_DAYS = (7, 30, 90, 365)
_MIN_RECENT_SHARE = 0.01  # of the training interactions: fewer say little about what is popular
_FALLBACK_SHARE = 0.05
# of times that are dates, from 1990 to 2100, by the number of units in a second
_DATE_RANGES = {1: (6.3e8, 4.1e9), 1_000: (6.3e11, 4.1e12)}


@dataclass(frozen=True)
class RecentCounts:
    """What was popular at the end of the training period.

    Attributes:
        period: such as `last 7 days`.
        counts: (V,), training interactions of each item in that period.
    """

    period: str
    counts: np.ndarray


def count_per_period(
    users: np.ndarray, times: np.ndarray, valid_share: float, test_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Count each user's interactions in the training and in the validation period.

    Args:
        users, times: (n,) each, in any order.
        valid_share, test_share: the share of all interactions that lie before validation and before test.
            Interactions at a boundary belong to the period that begins there.

    Returns:
        Counts by user id, for training and for validation.
    """
    ordered = np.sort(times)
    counts = []
    for share in (valid_share, test_share):
        earlier = times < _find_boundary(ordered, share)
        counts.append(np.bincount(users[earlier], minlength=users.max() + 1))
    before_valid, before_test = counts
    return before_valid, before_test - before_valid


def count_recent_items(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, valid_share: float, n_items: int
) -> RecentCounts:
    """Count each item in the last days before validation.

    The period is the shortest of 7, 30, 90 and 365 days with 1% of the training interactions. Where none has
    as many, or times are not dates in seconds or milliseconds, it is the last 5% of the training
    interactions. Users with one training interaction are excluded, as in `Histories.training_counts`.

    Args:
        users, items, times: (n,) each, in any order.
        valid_share: the share of all interactions that lie before validation.
        n_items: V.
    """
    is_trained = times < _find_boundary(np.sort(times), valid_share)
    is_trained &= np.bincount(users[is_trained], minlength=users.max() + 1)[users] >= 2
    items, times = items[is_trained], times[is_trained]
    if not len(times):
        return RecentCounts("no days", np.zeros(n_items, dtype=np.int64))
    unit = _find_time_unit(times)
    if unit is not None:
        for days in _RECENT_DAYS:
            is_recent = times > times.max() - days * _DAY * unit
            if is_recent.mean() >= _MIN_RECENT_SHARE:
                return RecentCounts(f"last {days} days", np.bincount(items[is_recent], minlength=n_items))
    start = np.sort(times)[int((1 - _FALLBACK_SHARE) * len(times))]
    recent = items[times >= start]
    return RecentCounts(f"last {_FALLBACK_SHARE:.0%} of training", np.bincount(recent, minlength=n_items))


def _find_boundary(ordered: np.ndarray, share: float) -> float:
    """The time at which the period after this share of all interactions begins."""
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)])


def _find_time_unit(times: np.ndarray) -> int | None:
    """How many units of these times a second has; None where they are not dates."""
    for unit, (low, high) in _DATE_RANGES.items():
        if low <= times.min() and times.max() <= high:
            return unit
    return None


def measure_gap_quartiles(users: np.ndarray, times: np.ndarray) -> tuple[float, float, float] | None:
    """Quartiles of the time between neighbouring interactions of a user; None where no user has two.

    Args:
        users: (n,) non-negative integers.
        times: (n,).
    """
    if not is_ordered(users, times):
        order = order_by_user(users, order_by_time(times))
        users, times = take(users, order), take(times, order)
    gaps, n_gaps = np.empty(max(0, len(times) - 1), dtype=times.dtype), 0
    for start in range(0, len(gaps), BLOCK):
        some = slice(start, start + BLOCK + 1)
        own = np.diff(times[some])[users[some][1:] == users[some][:-1]]
        gaps[n_gaps : n_gaps + len(own)] = own
        n_gaps += len(own)
    if not n_gaps:
        return None
    low, middle, high = np.percentile(gaps[:n_gaps], [25, 50, 75], overwrite_input=True).tolist()
    return low, middle, high
