"""Which items users had near each other in training: the counted edges of a graph of items.

letter  meaning
V       items including padding
E       edges
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from m2rec.data.histories import Histories

# chosen once, on the validation targets of Beauty, Toys, Sports, ml-100k and ml-1m together
WINDOW = 10  # two items are joined when a user had them at most so many interactions apart
_GAP_POWER = 0.5  # a pair counts 1 / gap ** _GAP_POWER
_BACKWARD = 0.1  # how much a pair counts from the later item to the earlier one

_BLOCK_PAIRS = 50_000_000  # pairs that are counted at a time, a bound on memory


class Transitions(NamedTuple):
    """Weighted edges, sorted by their source, then by their target."""

    offsets: NDArray[np.int64]
    """(V + 1,), the edges of item i are offsets[i] to offsets[i + 1]."""
    targets: NDArray[np.int64]
    """(E,), items."""
    strengths: NDArray[np.float64]
    """(E,), log(1 + weighted count of the pair)."""


def count_transitions(histories: Histories, n_items: int, max_edges: int | None = None) -> Transitions:
    """Edges from each item to the items that users had after it or before it, of the training data.

    Args:
        histories: of all users.
        n_items: V.
        max_edges: of each item the strongest so many, at equal strength those of lower ids; None for all.
    """
    blocks = []
    for low, high in _cut_sources(histories, n_items):
        blocks.append(_count_block(histories, n_items, low, high, max_edges))
    sources, targets, strengths = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    offsets = np.searchsorted(sources, np.arange(n_items + 1))
    return Transitions(offsets, targets, strengths)


def _cut_sources(histories: Histories, n_items: int) -> list[tuple[int, int]]:
    """Ranges of items, each the source of about `_BLOCK_PAIRS` pairs at most."""
    n_pairs = 2 * WINDOW * np.bincount(histories.items, minlength=n_items).cumsum()
    n_blocks = 1 + int(n_pairs[-1]) // _BLOCK_PAIRS
    inner = np.searchsorted(n_pairs, n_pairs[-1] * np.arange(1, n_blocks) / n_blocks)
    bounds = np.unique([0, *inner, n_items])
    return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))


def _count_block(
    histories: Histories, n_items: int, low: int, high: int, max_edges: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Sources, targets and strengths of the edges whose source is in [low, high)."""
    n_kinds = 2 * WINDOW
    weights = np.array([1 / (1 + kind % WINDOW) ** _GAP_POWER for kind in range(n_kinds)])
    weights[WINDOW:] *= _BACKWARD
    codes = []
    for kind in range(WINDOW):
        earlier, later = histories.training_pairs(kind + 1)
        for pair_kind, source, target in ((kind, earlier, later), (kind + WINDOW, later, earlier)):
            inside = (source >= low) & (source < high)
            pairs = source[inside].astype(np.int64) * n_items + target[inside]  # beyond the range of ids
            codes.append(pairs * n_kinds + pair_kind)
    ordered = np.concatenate(codes)
    del codes  # of millions of interactions, each array here takes gigabytes
    ordered.sort()  # numbers that hold pair and kind: several times as fast as sorting an index
    pairs, kinds = np.divmod(ordered, n_kinds)
    del ordered
    first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[: len(pairs)])
    counts = np.add.reduceat(weights[kinds], first) if len(first) else np.empty(0)
    sources, targets = np.divmod(pairs[first], n_items)
    strengths = np.log1p(counts)
    if max_edges is not None:
        kept = _select_strongest(sources, strengths, max_edges)
        sources, targets, strengths = sources[kept], targets[kept], strengths[kept]
    return sources, targets, strengths


def _select_strongest(
    sources: NDArray[np.int64], strengths: NDArray[np.float64], n: int
) -> NDArray[np.int64]:
    """Ascending positions of the n strongest edges of each source."""
    order = np.lexsort((-strengths, sources))  # stable: at equal strength in the order of targets
    first = np.searchsorted(sources, sources)  # where the edges of each edge's source begin
    rank = np.arange(len(sources)) - first
    return np.sort(order[rank < n])
