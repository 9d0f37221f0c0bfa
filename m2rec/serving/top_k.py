"""The best items for vectors of histories, exactly, in a memory that does not grow with the catalogue.

letter  meaning
B, D    histories, model width
V, P    items including padding, items that may be recommended
R       pairs of a history and an item
"""

from collections.abc import Collection, Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

# scores that are held at a time; so many times more on a GPU, where few big calls cost less than many
_MAX_SCORES, _GPU_FACTOR = 2**22, 32


class ScoreAdjustments:
    """What is added to the scores of some items, by history; minus infinity takes an item out.

    Args:
        raised: by history, ids of the items whose score is raised, each once.
        hidden: by history, ids of the items that are taken out, each once; padding is anyway.
        raise_by: what is added to the former, 0 for nothing.
        device: where the scores are.
    """

    def __init__(
        self,
        raised: Sequence[Collection[int]],
        hidden: Sequence[Collection[int]],
        raise_by: float,
        device: torch.device,
    ) -> None:
        parts = [(hidden, -torch.inf)] + ([(raised, raise_by)] if raise_by else [])
        sizes = torch.tensor([[len(group) for group in groups] for groups, _ in parts])
        every = chain.from_iterable(group for groups, _ in parts for group in groups)
        rows = torch.arange(sizes.shape[1]).repeat(len(parts)).repeat_interleave(sizes.flatten())
        values = torch.tensor([value for _, value in parts]).repeat_interleave(sizes.sum(1))
        self.rows, self.values = rows.to(device), values.to(device)  # (R,)
        self.items = torch.tensor(list(every), dtype=torch.int64, device=device)

    def apply(self, scores: Tensor, places: Tensor, low: int) -> None:
        """Change scores (B, n) of the items at `low` to `low + n`; places (R,) of `items`, -1 for none."""
        inside = (places >= low) & (places < low + scores.shape[1])
        at = (self.rows[inside], places[inside] - low)
        scores.index_put_(at, self.values[inside].to(scores.dtype), accumulate=True)


def select_top_k(
    x: Tensor,
    table: Tensor,
    k: int,
    adjustments: ScoreAdjustments,
    pool: Tensor | None = None,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k items of the highest scores for each history, best first.

    Args:
        x: (B, D), the vectors of the histories.
        table: (V, D), the item table; row 0 is padding's, which is never found.
        k: how many; fewer come where there are fewer.
        adjustments: added to the scores.
        pool: (P,), ascending ids of the items to choose from; None for all.
        excluded: ids of the items that no history gets.

    Returns:
        Scores and ids (B, min(k, P)); minus infinity where nothing is left.
    """
    if pool is None:
        pool = torch.arange(1, len(table), device=table.device)
    if not len(pool):
        return x.new_empty(len(x), 0), pool.new_empty(len(x), 0)
    whole = len(pool) == len(table) - 1
    places = _locate_items(pool, adjustments.items)
    nobody = _locate_items(pool, excluded) if excluded is not None else None
    width = max(_MAX_SCORES * (_GPU_FACTOR if x.is_cuda else 1) // max(1, len(x)), 1)
    best = [(x.new_empty(len(x), 0), pool.new_empty(len(x), 0))]
    for low in range(0, len(pool), width):
        rows = table[1 + low : 1 + low + width] if whole else table[pool[low : low + width]]
        scores = F.linear(x, rows)
        adjustments.apply(scores, places, low)
        if nobody is not None:
            scores[:, nobody[(nobody >= low) & (nobody < low + len(rows))] - low] = -torch.inf
        top = scores.topk(min(k, scores.shape[1]))
        best.append((top.values, pool[low + top.indices]))
    values, items = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    top = values.topk(min(k, values.shape[1]))
    return top.values, items.gather(1, top.indices)


def select_top_k_in_pools(
    x: Tensor,
    table: Tensor,
    k: int,
    adjustments: ScoreAdjustments,
    pools: Tensor,
    excluded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `select_top_k`, where each history has a pool of its own, small beside the catalogue.

    Args:
        x, table, k, adjustments, excluded: as there.
        pools: (B, P), ids in any order, also twice; 0 for none.

    Returns:
        Scores and ids (B, min(k, P)); minus infinity where nothing is left.
    """
    items = pools.sort(dim=1).values
    scores = torch.bmm(table[items], x[:, :, None])[..., 0]
    first = torch.arange(len(x), device=x.device)[:, None] * len(table)
    keys = (first + items).flatten()  # ascending over all rows
    wanted = adjustments.rows * len(table) + adjustments.items
    places = _locate_items(keys, wanted)
    there = places >= 0
    values = adjustments.values[there].to(scores.dtype)
    scores.view(-1).index_put_((places[there],), values, accumulate=True)
    again = torch.zeros_like(items, dtype=torch.bool)
    again[:, 1:] = items[:, 1:] == items[:, :-1]
    nobody = again | (items == 0)
    if excluded is not None:
        nobody |= torch.isin(items, excluded)
    top = scores.masked_fill_(nobody, -torch.inf).topk(min(k, items.shape[1]))
    return top.values, items.gather(1, top.indices)


def _locate_items(pool: Tensor, items: Tensor) -> Tensor:
    """Where items first stand in the ascending pool, -1 where they don't."""
    places = torch.searchsorted(pool, items).clamp(max=len(pool) - 1)
    return torch.where(pool[places] == items, places, -1)
