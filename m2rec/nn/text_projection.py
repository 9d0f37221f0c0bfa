"""Frozen text vectors inside the model: the semantic branch and the text part of the item table."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextProjection(nn.Module):
    """A linear map from text vectors to the model's width.

    It has no bias: an item without text, whose vector is zero, stays zero.

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

    def forward(self, items: Tensor, vectors: Tensor) -> Tensor:
        """items: ids of any shape (...), vectors: (V, T) -> (..., D)."""
        if items.numel() < len(vectors):
            return self.linear(F.embedding(items, vectors))  # type: ignore[no-any-return]
        return F.embedding(items, self.table(vectors))

    def table(self, vectors: Tensor) -> Tensor:
        """vectors: (V, T) -> (V, D), every item's projection."""
        return self.linear(vectors)  # type: ignore[no-any-return]


class ProjectedText(nn.Module):
    """What a `TextProjection` says of each item, looked up.

    Args:
        rows: (V, D), what its `table` made.
    """

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, items: Tensor, vectors: Tensor) -> Tensor:
        """As in `TextProjection`; the vectors are not needed."""
        return F.embedding(items, self.rows)


def has_text(vectors: Tensor) -> Tensor:
    """vectors: (V, T) -> (V,), True for items whose vector is not zero."""
    return torch.any(vectors != 0, dim=1)
