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

    def find_seen_scores(self, start: int, stop: int, n_classes: int) -> tuple[Tensor, Tensor | None]:
        """Where scores (stop - start, C) of items 1 to C belong to seen items.

        Returns:
            Flat indices (R,), and (R,) True for those that count; None if all do, each once.
        """
        position, item = self.find_seen_pairs(start, stop)
        return (position * n_classes).add_(item).sub_(1), None

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


class PaddedRepeatBias(RepeatBias):
    """As `RepeatBias`, in tensors whose shapes depend on no value, for code that is recorded once.

    Args:
        items: (B, L).
        rows, times: (S,), as of `RepeatBias`.
        is_target: (S,), False for positions of padding, which have seen nothing.
        bias: scalar.
    """

    def __init__(self, items: Tensor, rows: Tensor, times: Tensor, is_target: Tensor, bias: Tensor) -> None:
        self.items, self.rows, self.times, self.bias = items, rows, times, bias
        self.is_target = is_target
        self._first = mark_first_occurrences(items)

    def find_seen_scores(self, start: int, stop: int, n_classes: int) -> tuple[Tensor, Tensor | None]:
        """As of `RepeatBias`; what does not count is spread over the classes, so that few writes collide."""
        history, is_seen = self._read_histories(slice(start, stop))
        column = torch.arange(history.shape[1], device=history.device) % n_classes
        column = torch.where(is_seen, history - 1, column)
        row = torch.arange(len(history), device=history.device) * n_classes
        return (row[:, None] + column).flatten(), is_seen.flatten()

    def _read_histories(self, block: slice) -> tuple[Tensor, Tensor]:
        """The items (s, L) of a block of positions' rows, and which of them each has seen, once each."""
        rows = self.rows[block]
        in_past = torch.arange(self.items.shape[1], device=rows.device) <= self.times[block, None]
        return self.items[rows], self._first[rows] & in_past & self.is_target[block, None]

    def bias_for_items(self, items: Tensor) -> Tensor:
        """As of `RepeatBias`."""
        seen = []
        for start in range(0, len(items), self.block_size):
            block = slice(start, start + self.block_size)
            history, is_seen = self._read_histories(block)
            seen.append((is_seen & (history == items[block, None])).any(1))
        return torch.cat(seen) * self.bias

    def bias_for_shared_items(self, items: Tensor, size: int) -> Tensor:
        """As of `RepeatBias`."""
        n = items.shape[1]
        ordered, order = items.sort(dim=1)
        first_slot = torch.searchsorted(ordered, ordered)  # of duplicates: the one slot that is marked
        column = torch.empty_like(first_slot).scatter(1, order, first_slot)
        found: list[Tensor] = []
        n_groups = max(1, self.block_size // size)
        for keys, columns in zip(ordered.split(n_groups), column.split(n_groups), strict=True):
            start = len(found) * n_groups * size
            history, is_seen = self._read_histories(slice(start, start + len(keys) * size))
            missing = len(keys) * size - len(history)  # the last group may have fewer positions
            history, is_seen = (F.pad(t, (0, 0, 0, missing)).view(len(keys), -1) for t in (history, is_seen))
            slot = torch.searchsorted(keys, history).clamp_(max=n - 1)
            slot = torch.where(is_seen & (keys.gather(1, slot) == history), slot, n)
            seen = torch.zeros(len(keys), size, n + 1, dtype=torch.bool, device=items.device)
            seen.scatter_(2, slot.view(len(keys), size, -1), True)
            found.append(seen.gather(2, columns[:, None].expand(-1, size, -1)))
        return torch.cat(found) * self.bias
