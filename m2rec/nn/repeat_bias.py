"""Items that a history already holds, and how much their scores are raised or lowered.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
S, R    positions, pairs of a position and an item before it
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# positions are looked at in blocks, so that no more than so many flags are held at a time
_MAX_BLOCK_FLAGS = 2**21


def mark_first_occurrences(items: Tensor) -> Tensor:
    """items: (B, L) -> (B, L), True where an item stands for the first time in its row; padding never."""
    ordered, order = items.sort(dim=1, stable=True)
    new = ordered > 0
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter(1, order, new)


class RepeatBias:
    """What S positions of a batch have seen, the item at the position included.

    Args:
        items: (B, L).
        rows: (S,), the row of each position.
        times: (S,), its place in that row, from 0.
        bias: scalar, added to the score of each item that a position has seen.
    """

    def __init__(self, items: Tensor, rows: Tensor, times: Tensor, bias: Tensor) -> None:
        self.items, self.rows, self.times, self.bias = items, rows, times, bias
        self._first = mark_first_occurrences(items)

    @property
    def block_size(self) -> int:
        """How many positions to look at together."""
        return max(1, _MAX_BLOCK_FLAGS // self.items.shape[1])

    def find_seen_pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Each item that positions `start` to `stop` have seen, once: position less start, item (R,)."""
        rows, times = self.rows[start:stop], self.times[start:stop]
        past = torch.arange(self.items.shape[1], device=self.items.device) <= times[:, None]
        position, place = (past & self._first[rows]).nonzero(as_tuple=True)
        return position, self.items[rows[position], place]

    def iterate_seen_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs, a block of positions at a time: position, item (R,)."""
        for start in range(0, len(self.rows), self.block_size):
            position, item = self.find_seen_pairs(start, start + self.block_size)
            yield position + start, item

    def of(self, items: Tensor) -> Tensor:
        """items: (S,), one for each position -> (S,), `bias` where it was seen, else 0."""
        seen = torch.zeros_like(items, dtype=torch.bool)
        for position, item in self.iterate_seen_pairs():
            seen[position[item == items[position]]] = True
        return seen * self.bias

    def bias_for_shared_items(self, items: Tensor, size: int) -> Tensor:
        """As `of` for n items that each group of `size` neighbouring positions shares.

        Args:
            items: (G, n), in any order, one more than once too.
            size: positions per group; the last may have fewer.

        Returns:
            (G, size, n).
        """
        groups, n = items.shape
        ordered, order = items.sort(dim=1)
        base = int(max(items.max(), self.items.max())) + 1
        keys = (ordered + base * torch.arange(groups, device=items.device)[:, None]).flatten()
        # of items that are drawn more than once, the first place stands for all
        seen = torch.zeros(groups * size, n, dtype=torch.bool, device=items.device)
        for position, item in self.iterate_seen_pairs():
            group = position // size
            key = item + base * group
            at = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
            hit = keys[at] == key
            seen[position[hit], (at - n * group)[hit]] = True
        first = torch.searchsorted(keys, keys).view(groups, n) % n
        first = torch.empty_like(first).scatter(1, order, first)
        return seen.view(groups, size, n).gather(2, first[:, None].expand(-1, size, -1)) * self.bias
