"""The best items for vectors of histories, exactly, in memory that does not grow with the catalogue.

letter  meaning
B, D    histories, model width
V, P    items including padding, items that may be recommended
R       pairs of a history and an item
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.serving.id_lists import IdLists

# scores held at a time; on a GPU this times the factor, because few big calls cost less than many
_MAX_SCORES, _GPU_FACTOR = 2**22, 32


class ScoreAdjustment:
    """A number that is added to the scores of each history's items; minus infinity takes them out.

    Args:
        items: of each history; a duplicate counts once.
        added: the number.
        device: of the scores.
    """

    def __init__(self, items: IdLists, added: float, device: torch.device) -> None:
        self.rows = torch.from_numpy(items.number_rows()).to(device)  # (R,)
        self.items = torch.from_numpy(items.ids).to(device)
        self.added = added

    def apply(self, scores: Tensor, positions: Tensor, start: int) -> None:
        """Change scores (B, n) in place.

        Args:
            scores: of the items at positions `start` to `start + n`; contiguous.
            positions: (R,), of `items`; negative for an item without a score.
            start: position of the first score.
        """
        is_inside, columns = _find_columns(positions, start, scores.shape[1])
        where = self.rows[is_inside] * scores.shape[1] + columns
        self._change(scores.view(-1), where, is_inside)

    def _change(self, scores: Tensor, where: Tensor, is_inside: Tensor) -> None:
        """Change flat scores at places `where` (r,), those of the pairs (R,) that are inside."""
        adjusted = scores.index_select(0, where) + self.added
        scores.scatter_(0, where, adjusted)  # duplicates write the same number


class NeighborScores(ScoreAdjustment):
    """Numbers that are added to the scores of each history's neighbours.

    Args:
        items: (B, r), ids; a duplicate adds again, padding is ignored.
        added: (B, r), the numbers.
    """

    def __init__(self, items: Tensor, added: Tensor) -> None:
        is_item = items > 0
        self.rows, _ = is_item.nonzero(as_tuple=True)
        self.items, self.numbers = items[is_item], added[is_item]

    def _change(self, scores: Tensor, where: Tensor, is_inside: Tensor) -> None:
        scores.index_add_(0, where, self.numbers[is_inside].to(scores.dtype))


def select_top_k(
    x: Tensor,
    table: Tensor,
    k: int,
    adjustments: Sequence[ScoreAdjustment],
    excluded: Tensor,
    pool: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items of the highest scores for each history, best first.

    Args:
        x: (B, D), the vectors of the histories.
        table: (V, D), the item table; padding's row 0 is never found.
        k: how many; fewer are found where there are fewer.
        adjustments: are added to the scores.
        excluded: ids of items that are never found.
        pool: (P,), ascending ids of the items to choose from; None for all.

    Returns:
        Scores and ids (B, min(k, P)); minus infinity where nothing is left.
    """
    size = len(table) - 1 if pool is None else len(pool)
    if not size:
        return x.new_empty(len(x), 0), excluded.new_empty(len(x), 0)
    positions = [_locate_items(pool, adjustment.items) for adjustment in adjustments]
    excluded_positions = _locate_items(pool, excluded)
    max_scores = _MAX_SCORES
    if x.is_cuda:
        max_scores *= _GPU_FACTOR
    chunk_size = max(1, max_scores // max(1, len(x)))
    best_scores = []
    best_items = []
    for start in range(0, size, chunk_size):
        chunk = slice(start, start + chunk_size)
        scores = F.linear(x, table[1:][chunk] if pool is None else table[pool[chunk]])
        for adjustment, places in zip(adjustments, positions, strict=True):
            adjustment.apply(scores, places, start)
        if len(excluded):
            _, columns = _find_columns(excluded_positions, start, scores.shape[1])
            scores[:, columns] = -torch.inf
        top = scores.topk(min(k, scores.shape[1]))
        best_scores.append(top.values)
        best_items.append(start + 1 + top.indices if pool is None else pool[chunk][top.indices])
    if len(best_scores) == 1:
        return best_scores[0], best_items[0]
    scores = torch.cat(best_scores, dim=1)
    items = torch.cat(best_items, dim=1)
    top = scores.topk(min(k, scores.shape[1]))
    return top.values, items.gather(1, top.indices)


def _find_columns(positions: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which positions lie in `start` to `start + width`, and those less start."""
    columns = positions - start
    is_inside = (columns >= 0) & (columns < width)
    return is_inside, columns[is_inside]


def select_top_k_in_pools(
    x: Tensor,
    table: Tensor,
    k: int,
    adjustments: Sequence[ScoreAdjustment],
    excluded: Tensor,
    pools: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `select_top_k`, with a small pool for each history.

    Args:
        x, table, k, adjustments, excluded: as there.
        pools: (B, P), ids in any order, duplicates allowed; 0 is ignored.

    Returns:
        Scores and ids (B, min(k, P)); minus infinity where nothing is left.
    """
    items = pools.sort(dim=1).values
    rows = max(1, _MAX_SCORES // max(1, items.shape[1] * x.shape[1]))
    parts = zip(items.split(rows), x.split(rows), strict=True)
    scores = torch.cat([torch.bmm(table[i], v[:, :, None])[..., 0] for i, v in parts])
    # a key for each pair of row and item, ascending over all rows, so that one search finds them all
    row_keys = torch.arange(len(x), device=x.device) * len(table)
    keys = (row_keys[:, None] + items).flatten()
    for adjustment in adjustments:
        positions = _locate_items(keys, row_keys[adjustment.rows] + adjustment.items)
        adjustment.apply(scores, positions - adjustment.rows * items.shape[1], 0)
    is_hidden = torch.isin(items, excluded) | (items == 0)
    is_hidden[:, 1:] |= items.diff() == 0  # a duplicate
    scores.masked_fill_(is_hidden, -torch.inf)
    top = scores.topk(min(k, items.shape[1]))
    return top.values, items.gather(1, top.indices)


def _locate_items(pool: Tensor | None, items: Tensor) -> Tensor:
    """The first position of each item in an ascending pool, -1 where it is absent; None for all items."""
    if pool is None:
        return items - 1
    positions = torch.searchsorted(pool, items).clamp(max=len(pool) - 1)
    return torch.where(pool[positions] == items, positions, -1)
