"""The repeat bias: one scalar, added to the score of every item that the history holds.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
V       items including padding
S, R    positions, pairs of a position and an item before it
G, n    groups of positions, items that a group shares
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# positions are processed in blocks to bound memory: at most this many boolean flags
_MAX_BLOCK_FLAGS = 2**21

# adaptive optimisers move a weight by about learning_rate per step; this one must move by several in an epoch
BIAS_MARKS = {"_no_weight_decay": True, "_lr_multiplier": 100.0}


def create_repeat_bias(enabled: bool) -> nn.Parameter | None:
    """The parameter, a scalar that starts at zero; None without a repeat bias."""
    return nn.Parameter(torch.zeros(())) if enabled else None


def add_to_all_scores(scores: Tensor, items: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias in place to the score of each item of a history, once.

    Args:
        scores: (B, V).
        items: (B, L), the histories.
        bias: scalar; None leaves the scores unchanged.
    """
    if bias is None:
        return scores
    raised = mark_first_occurrences(items) * bias.to(scores.dtype)
    return scores.scatter_add_(1, items, raised)


def add_to_item_scores(scores: Tensor, wanted: Tensor, items: Tensor, bias: Tensor | None) -> Tensor:
    """As `add_to_all_scores` for one item per history: scores, wanted (B,), items (B, L) -> (B,)."""
    if bias is None:
        return scores
    return scores + bias * (items == wanted[:, None]).any(1)


def mark_first_occurrences(items: Tensor) -> Tensor:
    """items: (B, L) -> (B, L), True where an item occurs for the first time in its row; padding never."""
    ordered, order = items.sort(dim=1, stable=True)
    previous = F.pad(ordered, (1, 0))[:, :-1]  # padding is 0, and sorts first
    new = previous < ordered
    return torch.zeros_like(new).scatter(1, order, new)


class RepeatBias:
    """What S positions of a batch have seen, the item at the position included.

    Args:
        items: (B, L).
        rows: (S,), the row of each position.
        times: (S,), its position in that row, from 0.
        bias: scalar, added to the score of each item that a position has seen.
    """

    def __init__(self, items: Tensor, rows: Tensor, times: Tensor, bias: Tensor) -> None:
        self.items, self.rows, self.times, self.bias = items, rows, times, bias
        first = mark_first_occurrences(items)
        n_seen = first.cumsum(1)  # (B, L), how many different items up to each position
        self._distinct = items[first]  # the items of all rows, each once per row, in order of time
        ends = n_seen[:, -1].cumsum(0)
        self._starts = (ends - n_seen[:, -1])[rows]  # (S,), where the row's items begin
        self._counts = n_seen[rows, times]  # (S,)

    @property
    def block_size(self) -> int:
        """How many positions to process together."""
        return max(1, _MAX_BLOCK_FLAGS // self.items.shape[1])

    def find_seen_pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Each item that positions `start` to `stop` have seen, once: position less start, item (R,)."""
        counts = self._counts[start:stop]
        position = torch.repeat_interleave(counts)
        offsets = self._starts[start:stop] - (counts.cumsum(0) - counts)
        slots = offsets[position].add_(torch.arange(len(position), device=counts.device))
        return position, self._distinct[slots]

    def iterate_seen_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs, a block of positions at a time: position, item (R,)."""
        for start in range(0, len(self.rows), self.block_size):
            position, item = self.find_seen_pairs(start, start + self.block_size)
            yield position + start, item

    def bias_for_items(self, items: Tensor) -> Tensor:
        """items: (S,), one for each position -> (S,), `bias` where it was seen, else 0."""
        seen = torch.zeros_like(items, dtype=torch.bool)
        for position, item in self.iterate_seen_pairs():
            seen[position[item == items[position]]] = True
        return seen * self.bias

    def bias_for_shared_items(self, items: Tensor, size: int) -> Tensor:
        """As `bias_for_items` for n items that each group of `size` neighbouring positions shares.

        Args:
            items: (G, n), in any order, duplicates allowed.
            size: positions per group; the last may have fewer.

        Returns:
            (G, size, n).
        """
        groups, n = items.shape
        ordered, order = items.sort(dim=1)
        base = int(max(items.max(), self.items.max())) + 1
        offsets = base * torch.arange(groups, device=items.device)
        keys = (ordered + offsets[:, None]).flatten()  # ascending; one key per group and item
        # of a duplicate item only the first slot is marked, and its duplicates read that slot below
        seen = torch.zeros(groups * size, n, dtype=torch.bool, device=items.device)
        for position, item in self.iterate_seen_pairs():
            group = position // size
            key = item + base * group
            slot = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            is_shared = keys[slot] == key
            column = slot - n * group
            seen[position[is_shared], column[is_shared]] = True
        first_slot = torch.searchsorted(keys, keys).view(groups, n) % n
        column = torch.empty_like(first_slot).scatter(1, order, first_slot)
        columns = column[:, None].expand(-1, size, -1)
        return seen.view(groups, size, n).gather(2, columns) * self.bias
