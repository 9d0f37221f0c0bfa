"""Metrics of rankings that have one target per user, in NumPy.

A metric is a function of `RankedLists` and a cut-off k and a line of `METRICS`. It returns a value per user,
(n,), or a single one for all users.

letter  meaning
n, K    users, length of the ranking
V       items including padding
k       cut-off of a metric, at most K
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

DEFAULT_TAIL_RATIO = 0.1
RANK_METRICS = ("hit", "ndcg", "mrr")
"""Metrics that breakdowns show."""


class RankedLists(NamedTuple):
    """Ranking of each user, and what metrics of it need."""

    ranks: NDArray[np.integer]
    """(n,), rank of the target from 1; 0 where it is not in the ranking."""
    items: IntArray = np.zeros((0, 0), dtype=np.int64)
    """(n, K), ids of the recommended items, best first; 0 where there are no more."""
    n_items: int = 0
    """V."""
    count_targets: Callable[[], IntArray] = lambda: np.zeros(0, dtype=np.int64)
    """Returns (V,), how often each item is a training target."""
    tail_ratio: float = DEFAULT_TAIL_RATIO
    """Long-tail items: this share of the trained items, or those with at most so many targets if above 1."""


Metric = Callable[[RankedLists, int], FloatArray | float]


def measure_hit(lists: RankedLists, k: int) -> FloatArray:
    """Whether the target is among the first k; also the recall, with one target."""
    return ((lists.ranks >= 1) & (lists.ranks <= k)).astype(np.float64)


def measure_precision(lists: RankedLists, k: int) -> FloatArray:
    """Share of targets among the first k."""
    return measure_hit(lists, k) / k


def measure_ndcg(lists: RankedLists, k: int) -> FloatArray:
    """1 / log2(rank + 1), since the best possible gain of one target is 1 (Järvelin and Kekäläinen, 2002)."""
    return np.asarray(measure_hit(lists, k) / np.log2(np.maximum(lists.ranks, 1) + 1.0))


def measure_reciprocal_rank(lists: RankedLists, k: int) -> FloatArray:
    """1 / rank; also the average precision, with one target."""
    return np.asarray(measure_hit(lists, k) / np.maximum(lists.ranks, 1))


def measure_popularity(lists: RankedLists, k: int) -> FloatArray:
    """Mean number of times that the recommended items are training targets."""
    return np.asarray(lists.count_targets()[lists.items[:, :k]].mean(axis=1))


def measure_tail_share(lists: RankedLists, k: int) -> FloatArray:
    """Share of long-tail items, of those that are a training target at all, among the recommended ones."""
    counts = lists.count_targets()
    trained = np.flatnonzero(counts)
    if lists.tail_ratio > 1:
        tail = trained[counts[trained] <= lists.tail_ratio]
    else:
        n_tail = max(int(len(trained) * lists.tail_ratio), 1)
        tail = trained[np.argsort(counts[trained], kind="stable")][:n_tail]
    return np.asarray(np.isin(lists.items[:, :k], tail).mean(axis=1))


def measure_coverage(lists: RankedLists, k: int, first_item: int = 1) -> float:
    """Share of all items, from id `first_item` on, that are recommended to anybody (Ge et al., 2010)."""
    counts = _count_exposures(lists, k)[first_item:]
    return np.count_nonzero(counts) / len(counts)


def measure_gini(lists: RankedLists, k: int, first_item: int = 1) -> float:
    """Gini coefficient of how often each item is recommended: 0 if all alike, towards 1 if always the same.

    sum_i (2 i - m - 1) x_i / (m sum_i x_i) over the m items from id `first_item` on, in ascending order of x
    (Fleder and Hosanagar, 2009).
    """
    counts = np.sort(_count_exposures(lists, k)[first_item:])
    m = len(counts)
    weights = 2 * np.arange(1, m + 1) - m - 1
    weighted = (weights * counts).sum()
    total = max(1, counts.sum())
    return float(weighted / (m * total))


def measure_entropy(lists: RankedLists, k: int, first_item: int = 1) -> float:
    """-sum p log p in nats; p is an item's share of the recommendations, from id `first_item` on."""
    counts = _count_exposures(lists, k)[first_item:]
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0  # not -0.0


def measure_mean_entropy(lists: RankedLists, k: int) -> float:
    """RecBole's entropy: a mean over the recommended items, and padding is one of them."""
    return measure_entropy(lists, k, first_item=0) / np.count_nonzero(_count_exposures(lists, k))


def _count_exposures(lists: RankedLists, k: int) -> IntArray:
    """How often each item is recommended, (V,)."""
    return np.bincount(lists.items[:, :k].ravel(), minlength=lists.n_items)


METRICS: dict[str, Metric] = {
    "Hit": measure_hit,
    "NDCG": measure_ndcg,
    "MRR": measure_reciprocal_rank,
    "Recall": measure_hit,
    "Precision": measure_precision,
    "MAP": measure_reciprocal_rank,
    "ItemCoverage": measure_coverage,
    "AveragePopularity": measure_popularity,
    "ShannonEntropy": measure_entropy,
    "GiniIndex": measure_gini,
    "TailPercentage": measure_tail_share,
}
"""By the name in config.yaml."""

_TEXTBOOK = {name.lower(): metric for name, metric in METRICS.items()}
_RECBOLE = _TEXTBOOK | {  # padding counts as an item
    "itemcoverage": partial(measure_coverage, first_item=0),
    "shannonentropy": measure_mean_entropy,
    "giniindex": partial(measure_gini, first_item=0),
}
_DEFINITIONS = {"textbook": _TEXTBOOK, "recbole": _RECBOLE}


def compute_metrics(
    lists: RankedLists,
    names: Iterable[str],
    topk: Iterable[int],
    definitions: str = "textbook",
    digits: int | None = None,
) -> dict[str, float]:
    """Means of metrics over users, such as `ndcg@10`; empty without users.

    Args:
        names: in upper or lower case.
        topk: cut-offs.
        definitions: `textbook` or `recbole`, the setting `metric_definitions`.
        digits: decimal places; None does not round.
    """
    metrics: dict[str, float] = {}
    if not len(lists.ranks):
        return metrics
    for name in map(str.lower, names):
        for k in topk:
            mean = float(np.mean(_DEFINITIONS[definitions][name](lists, k)))
            metrics[f"{name}@{k}"] = mean if digits is None else round(mean, digits)
    return metrics


def compute_rank_metric(metric: str, ranks: NDArray[np.integer]) -> FloatArray:
    """A metric of each user, such as `ndcg@10`, from the rank of the target.

    Args:
        metric: one that ranks alone decide.
        ranks: any shape; 1 is first, 0 is not in the ranking.
    """
    name, _, k = metric.partition("@")
    values = _TEXTBOOK[name](RankedLists(ranks), int(k))
    return np.asarray(values)
