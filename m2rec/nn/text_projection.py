"""Frozen text vectors inside the model: the semantic branch and the text part of the item table."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.branch import Branch, ItemBatch


class TextProjection(nn.Module):
    """A linear map from text vectors to the model's width.

    Without a bias, so that the zero vector of an item without text stays zero.

    Args:
        text_dim: T.
        hidden_size: D.
        std: standard deviation of the initial weights. The vectors have unit length on
            average, so this is also the standard deviation of the output.
    """

    def __init__(self, text_dim: int, hidden_size: int, std: float) -> None:
        super().__init__()
        self.linear = nn.Linear(text_dim, hidden_size, bias=False)
        nn.init.normal_(self.linear.weight, std=std)

    def project_items(self, items: Tensor, vectors: Tensor) -> Tensor:
        """items: ids of any shape (...), vectors: (V, T) -> (..., D)."""
        if items.numel() < len(vectors):
            return self.linear(F.embedding(items, vectors))  # type: ignore[no-any-return]
        return F.embedding(items, self.project_vectors(vectors))

    def project_vectors(self, vectors: Tensor) -> Tensor:
        """vectors: (n, T) -> (n, D)."""
        return self.linear(vectors)  # type: ignore[no-any-return]


class TextBranch(TextProjection, Branch):
    """The semantic branch: the projected text of the item at each position; it has no state."""

    name = "semantic"
    projected: Tensor | None
    """(V, D), every item's projection, in a copy for inference."""

    def __init__(self, text_dim: int, hidden_size: int, std: float) -> None:
        super().__init__(text_dim, hidden_size, std)
        self.register_buffer("projected", None, persistent=False)

    def forward(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """batch.items (...) -> (..., D), whatever x is."""
        if batch.text is not None:
            return batch.text
        if self.projected is not None:
            return F.embedding(batch.items, self.projected)
        assert batch.vectors is not None
        return self.project_items(batch.items, batch.vectors)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only, (B, D)."""
        return self(x, batch.select_last_positions())  # type: ignore[no-any-return]

    def advance(self, x: Tensor, state: Any, batch: ItemBatch) -> tuple[Tensor, Any]:
        """As `forward`; the state is empty."""
        return self(x, batch), ()

    step = advance

    def mask_items(self, vectors: Tensor | None) -> Tensor | None:
        """(V,) True for items with text."""
        return None if vectors is None else mask_items_with_text(vectors)

    def prepare_for_inference(self, vectors: Tensor | None) -> None:
        """Project every item's text once."""
        if self.projected is None:
            assert vectors is not None
            self.projected = self.project_vectors(vectors)
            del self.linear


def mask_items_with_text(vectors: Tensor) -> Tensor:
    """vectors: (V, T) -> (V,), True for items whose vector is not zero."""
    return torch.any(vectors != 0, dim=1)
