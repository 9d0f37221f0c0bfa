"""How recommendations spread over the items, by the textbook.

letter  meaning
n, K    users, length of the ranking
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ItemIds = NDArray[np.int64]


def item_coverage(items: ItemIds, n_items: int) -> float:
    """The share of all items that anybody is shown (Ge et al., 2010), 0 to 1."""
    return float(np.count_nonzero(_count_exposures(items, n_items)) / n_items)


def shannon_entropy(items: ItemIds, n_items: int) -> float:
    """-sum p log p over the items, p being an item's share of all that is shown, in nats."""
    counts = _count_exposures(items, n_items)
    p = counts[counts > 0] / max(1, counts.sum())
    return float(-(p * np.log(p)).sum()) + 0.0  # not -0.0


def gini_index(items: ItemIds, n_items: int) -> float:
    """Gini coefficient of how often each item is shown: 0 if all alike, towards 1 if always the same ones.

    sum_i (2 i - n - 1) x_i / (n sum_i x_i) over the n items in ascending order of x, those that nobody
    is shown among them (Fleder and Hosanagar, 2009).
    """
    counts = np.sort(_count_exposures(items, n_items))
    rank = np.arange(1, n_items + 1)
    return float(((2 * rank - n_items - 1) * counts).sum() / (n_items * max(1, counts.sum())))


def _count_exposures(items: ItemIds, n_items: int) -> ItemIds:
    """How often each of the items 1 to n_items is shown, (n_items,)."""
    return np.bincount(items.ravel(), minlength=n_items + 1)[1:]


TEXTBOOK_METRICS: dict[str, Callable[[ItemIds, int], float]] = {
    "itemcoverage": item_coverage,
    "shannonentropy": shannon_entropy,
    "giniindex": gini_index,
}
"""By RecBole's name in lower case: rankings (n, K) of ids from 1, 0 for no item, and the number of items."""
