"""Times of interactions: gaps, and how many of a user's interactions lie in each period."""

import numpy as np
import pandas as pd


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
    n = len(times)
    counts = []
    for share in (valid_share, test_share):
        position = min(int(share * n), n - 1)
        earlier = times < ordered[position]
        counts.append(np.bincount(users[earlier], minlength=users.max() + 1))
    before_valid, before_test = counts
    return before_valid, before_test - before_valid


def measure_gap_quartiles(users: pd.Series, times: pd.Series) -> tuple[float, float, float] | None:
    """Quartiles of the time between neighbouring interactions of a user; None where no user has two."""
    frame = pd.DataFrame({"user": pd.factorize(users)[0], "time": times.to_numpy()})
    frame = frame.sort_values(["user", "time"])
    same_user = frame["user"].diff() == 0
    gaps = frame["time"].diff()[same_user]
    if gaps.empty:
        return None
    low, middle, high = gaps.quantile([0.25, 0.5, 0.75]).tolist()
    return low, middle, high
