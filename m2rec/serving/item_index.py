"""An index of the item table, which finds most of the best items and looks at few of all.

It is faiss's inverted file: items in lists around centres, of which those nearest to a history's
vector are searched. Optional; only for catalogues so large that to score all items takes too long.

letter  meaning
B, D    histories, model width
V       items including padding
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from m2rec.errors import UserError

# centres per square root of the items, and items per centre at least, after faiss's guidelines
_CENTROIDS_PER_ROOT, _MIN_ITEMS_PER_CENTROID = 4, 39

_LISTS_PER_PROBE = 16  # of the lists one in so many is searched

# items from which a centre is learned, so that a million items are indexed in seconds
_TRAIN_ITEMS_PER_CENTROID = 64

# so many items are asked for at most, and one in so many of all; beyond that, scoring all is better
_MAX_RETRIEVED, _MIN_CATALOGUE_RATIO = 4096, 8

_MAX_RETRIEVED_PER_SEARCH = 2**18  # items that are found in one go


class ItemIndex:
    """Finds items of high scores.

    Args:
        table: (V, D), the item table; row 0 is padding's.

    Raises:
        ValueError: faiss is not installed, or there is nothing to be found.
    """

    def __init__(self, table: Tensor) -> None:
        faiss = _import_faiss()
        n_items, width = len(table) - 1, table.shape[1]
        if n_items < 1:
            raise UserError("index: there are no items")
        lists = max(
            1, min(round(_CENTROIDS_PER_ROOT * math.sqrt(n_items)), n_items // _MIN_ITEMS_PER_CENTROID)
        )
        self._index = faiss.index_factory(width, f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
        self._index.cp.min_points_per_centroid, self._index.cp.max_points_per_centroid = (
            1,
            _TRAIN_ITEMS_PER_CENTROID,
        )
        self.n_lists = lists
        self.set_probes(0)
        self._index.train(_table_to_numpy(table))
        self._index.add(_table_to_numpy(table))

    def set_probes(self, probes: int) -> None:
        """How many lists are searched, the more the better and the slower; 0 for one in 16."""
        self._index.nprobe = min(probes or -(-self.n_lists // _LISTS_PER_PROBE), self.n_lists)

    def extended(self, table: Tensor) -> "ItemIndex":
        """The index of a table whose first rows are those of this one's; the centres stay."""
        longer = copy.copy(self)
        longer._index = _import_faiss().clone_index(self._index)
        if len(table) > (known := 1 + longer._index.ntotal):
            longer._index.add(_table_to_numpy(table, known))
        return longer

    def search_nearest(self, x: Tensor, n: int) -> Tensor:
        """x: (B, D) -> ids (B, n) of items with high scores, best first; 0 where the lists hold no more."""
        _, found = self._index.search(x.detach().float().cpu().contiguous().numpy(), n)
        return torch.from_numpy(found) + 1

    def search_by_need(self, x: Tensor, needs: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """As `find` for histories (B, D) that need different numbers of items, where it is worth it.

        Yields:
            Places of histories and their ids (b, n), n at least what each needs. Histories that need
            too many, or whose lists hold too few, don't come.
        """
        groups: dict[int, list[int]] = {}
        for row, need in enumerate(needs):
            size = 1 << (need - 1).bit_length()  # few different ones
            if size <= min(_MAX_RETRIEVED, (1 + self._index.ntotal) // _MIN_CATALOGUE_RATIO):
                groups.setdefault(size, []).append(row)
        for size, rows in groups.items():
            step = max(1, _MAX_RETRIEVED_PER_SEARCH // size)
            for part in (rows[start : start + step] for start in range(0, len(rows), step)):
                ids = self.search_nearest(x[part], size)
                whole = (ids > 0).all(1)
                if whole.any():
                    yield [row for row, full in zip(part, whole.tolist(), strict=True) if full], ids[whole]


def _table_to_numpy(table: Tensor, start: int = 1) -> Any:
    return table[start:].detach().float().cpu().contiguous().numpy()


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("index: faiss is not installed; pip install faiss-cpu") from None
    return faiss
