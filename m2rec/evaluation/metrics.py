"""Metrics from places in a ranking, and the paired bootstrap over users."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2rec.errors import UserError

FloatArray = NDArray[np.float64]

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


def compute_rank_metric(metric: str, ranks: NDArray[np.integer]) -> FloatArray:
    """A metric of one target per user from its place in the ranking.

    Args:
        metric: hit@k, ndcg@k or mrr@k.
        ranks: any shape; 1 is first, 0 is below the measured part of the ranking.

    Raises:
        ValueError: the metric is another one.
    """
    name, _, cut = metric.partition("@")
    if name not in ("hit", "ndcg", "mrr") or not cut.isdecimal():
        raise UserError(f"metric {metric!r}: expected hit@k, ndcg@k or mrr@k")
    places = np.maximum(ranks, 1).astype(np.float64)
    gains = {"hit": np.ones_like(places), "ndcg": 1 / np.log2(places + 1), "mrr": 1 / places}
    return np.where((ranks >= 1) & (ranks <= int(cut)), gains[name], 0.0)


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
    means = _resample_means(differences - mean, resamples, seed) + mean
    low, high = np.quantile(means, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], axis=0)
    # metrics take few values, so many draws are as far away as the mean: rounding must not decide
    slack = 1e-12 * np.abs(differences).max(axis=0)
    extreme = (np.abs(means - mean) >= np.abs(mean) - slack).sum(axis=0)
    return BootstrapResult(mean, low, high, (extreme + 1) / (resamples + 1))


def _resample_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    """values: (users, columns) -> (resamples, columns), means over as many drawn users."""
    users = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _MAX_COUNTS_IN_MEMORY // users)
    for start in range(0, resamples, step):
        n = min(step, resamples - start)
        drawn = generator.integers(users, size=(n, users)) + users * np.arange(n)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * users).reshape(n, users)
        means[start : start + n] = counts @ values / users
    return means
