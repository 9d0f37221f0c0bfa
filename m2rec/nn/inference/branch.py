"""The protocol of a prepared branch, and the memory for its tables.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.branch import Branch, ItemBatch


class TableBudget:
    """Memory that is left for tables by item, of `total` bytes."""

    def __init__(self, n_items: int, itemsize: int, total: int) -> None:
        self._row_bytes, self._left = n_items * itemsize, total

    def reserve(self, width: int) -> bool:
        """Take the memory of a table (V, width), if there is enough."""
        size = self._row_bytes * width
        if size > self._left:
            return False
        self._left -= size
        return True


class PreparedBranch(ABC):
    """A branch of a layer without gradients."""

    item_output: Tensor | None = None
    """(V, D) by item, if the output depends on nothing else."""

    @abstractmethod
    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D); L fills its chunks."""

    @abstractmethod
    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""

    @abstractmethod
    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """As `Branch.step`: x (B, D) -> (B, D) and the new state."""


class PlainBranch(PreparedBranch):
    """A branch without a prepared form.

    Args:
        branch: the branch.
        inputs: not used.
        budget: not used.
    """

    def __init__(self, branch: Branch, inputs: Tensor | None, budget: TableBudget) -> None:
        self.branch = branch

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        x, batch, missing = self._remove_filling(x, batch)
        return F.pad(self.branch(x, batch), (0, 0, 0, missing))

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        x, batch, _ = self._remove_filling(x, batch)
        return self.branch.last(x, batch)

    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """x (B, D) -> (B, D) and the new state."""
        return self.branch.step(x, state, batch)

    def _remove_filling(self, x: Tensor, batch: ItemBatch) -> tuple[Tensor, ItemBatch, int]:
        """Without the positions after the longest row's end, of which a branch may know no weights."""
        assert batch.lengths is not None
        longest = int(batch.lengths.max())
        return x[:, :longest], batch._replace(items=batch.items[:, :longest]), x.shape[1] - longest
