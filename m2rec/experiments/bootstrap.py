"""Paired bootstrap over users."""

from typing import NamedTuple

import numpy as np

from m2rec.errors import UserError
from m2rec.evaluation.metrics import FloatArray

N_RESAMPLES = 10_000
CONFIDENCE_LEVEL = 0.95
# counts of drawn users that are held at a time
_MAX_COUNTS_IN_MEMORY = 2**20


class BootstrapResult(NamedTuple):
    """Result of the paired bootstrap, each of shape (columns,)."""

    difference: FloatArray
    """Mean over users."""
    low: FloatArray
    high: FloatArray
    """Ends of the 95% percentile interval of the mean."""
    p: FloatArray
    """Two-sided, in [1 / (resamples + 1), 1]."""


def paired_bootstrap(differences: FloatArray, resamples: int = N_RESAMPLES, seed: int = 0) -> BootstrapResult:
    """Test whether the mean of each column is zero, by drawing users with replacement.

    The same draws serve all columns. p is the share of draws whose mean lies as far from the
    mean of all users as that lies from zero (Efron and Tibshirani, 1993, section 16.4, without
    the division by the standard error).

    Args:
        differences: (users, columns), one variant's value minus the other's for each user.
        resamples: how many times as many users are drawn as there are.
        seed: of the draws.

    Raises:
        ValueError: there are fewer than two users, or a value is not finite.
    """
    users = len(differences)
    if users < 2:
        raise UserError(f"the paired test needs at least two users, got {users}")
    if not np.isfinite(differences).all():
        raise UserError("the paired test needs a finite number for each user")
    mean = differences.mean(axis=0)
    centered = differences - mean
    means = mean + _resample_means(centered, resamples, seed)
    ends = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    low, high = np.quantile(means, ends, axis=0)
    # metrics take few values, so many draws are as far away as the mean: rounding must not decide
    slack = 1e-12 * np.abs(differences).max(axis=0)
    distance = np.abs(means - mean)
    is_extreme = distance >= np.abs(mean) - slack
    extreme = is_extreme.sum(axis=0)
    p = (extreme + 1) / (resamples + 1)
    return BootstrapResult(mean, low, high, p)


def _resample_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    """values: (users, columns) -> (resamples, columns), means over as many drawn users."""
    users = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _MAX_COUNTS_IN_MEMORY // users)
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        drawn = generator.integers(users, size=(n, users))
        drawn += users * np.arange(n)[:, None]  # each draw counts in its own row
        counts = np.bincount(drawn.ravel(), minlength=n * users)
        means[start : start + n] = counts.reshape(n, users) @ values / users
    return means
