"""The semantic branch for inference.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.branch import ItemBatch
from m2rec.nn.inference.branch import PreparedBranch, TableBudget
from m2rec.nn.text_projection import TextBranch


class PreparedText(PreparedBranch):
    """The semantic branch, a table.

    Args:
        branch: with every item's text projected.
        inputs: not used.
        budget: not used; the table exists already.
    """

    def __init__(self, branch: TextBranch, inputs: Tensor | None, budget: TableBudget) -> None:
        assert branch.projected is not None
        self.item_output = branch.projected

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """batch.items (...) -> (..., D), whatever x is."""
        assert self.item_output is not None
        return F.embedding(batch.items, self.item_output)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        return self.encode(x, batch.select_last_positions())

    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """x (B, D) -> (B, D); the state is empty."""
        return self.encode(x, batch), state
