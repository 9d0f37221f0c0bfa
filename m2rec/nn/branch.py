"""The protocol of a branch: one view of the history, which a layer merges with its other branches.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V, T    items including padding, width of the text vectors
K       branches of a layer
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from m2rec.errors import UserError


class ItemBatch(NamedTuple):
    """The items behind a layer's input, and what is stored for all items."""

    items: Tensor
    """(B, L) ids; (B,) in `step`."""
    lengths: Tensor | None = None
    """(B,); None in `advance` and `step`."""
    vectors: Tensor | None = None
    """(V, T), frozen text vectors; None without text."""
    available: Tensor | None = None
    """(V, K), which branches have an input for each item; None if all have one for every item."""
    text: Tensor | None = None
    """(B, L, D), the projected text of the items in this layer, if a training step has it already."""

    def select_last_positions(self) -> "ItemBatch":
        """The items of each row's last position, (B,)."""
        assert self.lengths is not None
        items = select_last_positions(self.items, self.lengths)
        text = None if self.text is None else select_last_positions(self.text, self.lengths)
        return self._replace(items=items, text=text)


class Branch(nn.Module, ABC):
    """Base class of the branches. A subclass needs `name` and `forward`, and `advance` for live users.

    The state of a history is a tensor or a tuple of tensors, batch first. Its size must not depend on
    the history's length.
    """

    name: ClassVar[str]
    """Label of the gate's weights."""
    setting: ClassVar[str] = ""
    """The setting that selects this class, such as `mixer: 'attention'`, for the error without `advance`."""

    @abstractmethod
    def forward(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D) -> (B, L, D). A position must not depend on later ones, or on padding."""

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        return select_last_positions(self(x, batch), batch.lengths)

    def advance(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """As `forward` for the positions after `state`, which is None before the first position.

        Returns:
            y (B, L, D) and the state after the last position.
        """
        raise self._make_recurrence_error()

    def step(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """As `advance` for one position: x (B, D) -> y (B, D) and the new state."""
        y, state = self.advance(x[:, None], state, batch._replace(items=batch.items[:, None]))
        return y[:, 0], state

    def mask_items(self, vectors: Tensor | None) -> Tensor | None:
        """(V,) True for items that this branch has an input for; None if that is every item."""
        return None

    def prepare_for_inference(self, vectors: Tensor | None) -> None:
        """Replace what depends on weights and items only by its value; this copy is never trained."""

    def require_recurrence(self) -> None:
        """Check that live users can be updated event by event.

        Raises:
            ValueError: the branch needs the whole history at once.
        """
        if type(self).advance is Branch.advance:
            raise self._make_recurrence_error()

    def _make_recurrence_error(self) -> UserError:
        cure = f"with another {self.setting.partition(':')[0]}" if self.setting else "without this branch"
        return UserError(
            f"{self.setting or self.name} needs the whole history at once and cannot be updated event by "
            f"event; use a model trained {cure}"
        )


def select_last_positions(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, L, ...), lengths (B,) -> each row's last position (B, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)  # len(x) would fix the size in an exported program
    return x[rows, lengths - 1]
