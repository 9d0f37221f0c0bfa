"""An index of the item table, which finds most of the best items and scores few of all.

It is faiss's inverted file: items in lists around centroids. Only the lists whose centroids are nearest
to a history's vector are searched. Optional; only for catalogues so large that scoring all items takes
too long.

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

# centroids per square root of the items, and the fewest items per centroid, after faiss's guidelines
_CENTROIDS_PER_ROOT, _MIN_ITEMS_PER_CENTROID = 4, 39

_LISTS_PER_PROBE = 16  # by default one list in so many is searched

# items that a centroid is trained on, so that a million items are indexed in seconds
_TRAIN_ITEMS_PER_CENTROID = 64

# a history that needs more items, or more than one in so many of all, is better scored in full
_MAX_RETRIEVED, _MIN_CATALOGUE_RATIO = 4096, 8

_MAX_RETRIEVED_PER_SEARCH = 2**18  # items found in one search


class ItemIndex:
    """Finds items of high scores.

    Args:
        table: (V, D), the item table; row 0 is padding's.

    Raises:
        ValueError: faiss is not installed, or there are no items.
    """

    def __init__(self, table: Tensor) -> None:
        faiss = _import_faiss()
        n_items, width = len(table) - 1, table.shape[1]
        if n_items < 1:
            raise UserError("index: there are no items")
        by_root = round(_CENTROIDS_PER_ROOT * math.sqrt(n_items))
        self.n_lists = max(1, min(by_root, n_items // _MIN_ITEMS_PER_CENTROID))
        index = faiss.index_factory(width, f"IVF{self.n_lists},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1
        index.cp.max_points_per_centroid = _TRAIN_ITEMS_PER_CENTROID
        rows = _table_to_numpy(table[1:])
        index.train(rows)
        index.add(rows)
        self._index = index
        self.set_probes(0)

    def set_probes(self, probes: int) -> None:
        """Set how many lists are searched, the more the better and the slower; 0 for one in 16."""
        default = math.ceil(self.n_lists / _LISTS_PER_PROBE)
        self._index.nprobe = min(probes or default, self.n_lists)

    def extended(self, table: Tensor) -> "ItemIndex":
        """The index of a table that begins with the rows of this one's table; the centroids stay."""
        longer = copy.copy(self)
        longer._index = _import_faiss().clone_index(self._index)
        new_rows = table[1 + self._index.ntotal :]
        if len(new_rows):
            longer._index.add(_table_to_numpy(new_rows))
        return longer

    def search_nearest(self, x: Tensor, n: int) -> Tensor:
        """x: (B, D) -> ids (B, n) of items with high scores, best first; 0 where the lists hold no more."""
        _, found = self._index.search(_table_to_numpy(x), n)
        return torch.from_numpy(found) + 1

    def search_by_need(self, x: Tensor, min_results: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """As `search_nearest` for histories (B, D) that need different numbers of items.

        Yields:
            Row numbers of histories and their ids (b, n), n at least what each needs. Histories that
            need too many items, or whose lists hold too few, are left out.
        """
        limit = min(_MAX_RETRIEVED, (1 + self._index.ntotal) // _MIN_CATALOGUE_RATIO)
        groups: dict[int, list[int]] = {}
        for row, needed in enumerate(min_results):
            size = 1 << (needed - 1).bit_length()  # a power of two, so that groups are few
            if size <= limit:
                groups.setdefault(size, []).append(row)
        for size, rows in groups.items():
            batch_size = max(1, _MAX_RETRIEVED_PER_SEARCH // size)
            for part in torch.tensor(rows).split(batch_size):
                ids = self.search_nearest(x[part], size)
                is_full = (ids > 0).all(1)
                if is_full.any():
                    yield part[is_full].tolist(), ids[is_full]


def _table_to_numpy(table: Tensor) -> Any:
    return table.detach().float().cpu().contiguous().numpy()


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UserError("index: faiss is not installed; run: pip install faiss-cpu") from None
    return faiss
