"""The items of one training step: what depends on an item alone is computed once and then looked up.

A step reads the same items many times: in the input, in each layer, as targets and as negatives, and group
of rows by group of rows. Here each item has one row in a table of the step.

letter  meaning
B, L    batch, sequence length
D       model width
V       items including padding
n       items of a table of the step
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class DistinctItems(NamedTuple):
    """Some items, each once, padding first."""

    ids: Tensor | None
    """(n,), ascending; None for all V."""
    rows: Tensor | None
    """(V,), the place of each item among them; -1, which no lookup accepts, for all other items.

    None to search for places, at a cost that does not depend on V.
    """

    def find_places(self, ids: Tensor) -> Tensor:
        """ids (...) -> the place of each among these items (...); -1 for an item that is not among them."""
        if self.rows is not None:
            return self.rows[ids]
        assert self.ids is not None
        places = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        return places.masked_fill_(self.ids[places] != ids, -1)

    def select(self, values: Tensor) -> Tensor:
        """values (V, K) -> those of these items (n, K); padding gets no gradient."""
        return values if self.ids is None else F.embedding(self.ids, values, padding_idx=0)


def list_all_items(n_items: int, device: torch.device) -> DistinctItems:
    """All V items."""
    return DistinctItems(None, torch.arange(n_items, device=device))


def find_distinct_items(ids: Sequence[Tensor], n_items: int, by_sorting: bool = False) -> DistinctItems:
    """The items among ids of any shapes, and padding; all V items where those are more than three quarters.

    To select most of the items costs more than it saves.

    Args:
        ids: of any shapes.
        n_items: V.
        by_sorting: the cost does not depend on V, and the items are always selected.
    """
    if by_sorting:
        padding = ids[0].new_zeros(1)
        return DistinctItems(torch.cat([padding, *(part.flatten() for part in ids)]).unique(), None)
    is_present = torch.zeros(n_items, dtype=torch.bool, device=ids[0].device)
    is_present[0] = True
    for part in ids:
        is_present[part] = True
    distinct = is_present.nonzero()[:, 0]
    if 4 * len(distinct) > 3 * n_items:
        return list_all_items(n_items, distinct.device)
    rows = distinct.new_full((n_items,), -1)
    rows[distinct] = torch.arange(len(distinct), device=rows.device)
    return DistinctItems(distinct, rows)


class TableRows(NamedTuple):
    """Rows of the item table."""

    items: DistinctItems
    rows: Tensor
    """(n, D), whole rows; with `text` the ID embeddings alone."""
    text: Tensor | None = None
    """(n, D), the text parts where ID embeddings are dropped, which is drawn for each appearance."""

    def look_up(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (...) -> `rows` and `text` of each (..., D)."""
        places = self.items.find_places(ids)
        rows = F.embedding(places, self.rows, padding_idx=0)
        return rows, None if self.text is None else F.embedding(places, self.text)


class StepItems(NamedTuple):
    """What a training step computes of its items once."""

    table: TableRows
    items: DistinctItems | None = None
    """Those of the histories; None if no layer reads text."""
    layer_texts: Sequence[Tensor | None] = ()
    """(n, D) by layer: the projected texts of `items`."""

    def look_up_layer_texts(self, ids: Tensor) -> list[Tensor | None]:
        """ids (B, L) -> (B, L, D) by layer; None in a layer that reads no text."""
        if self.items is None:
            return [None] * len(self.layer_texts)
        places = self.items.find_places(ids)
        found = []
        for texts in self.layer_texts:
            found.append(None if texts is None else F.embedding(places, texts))
        return found
