"""Causal self-attention, a baseline for the Mamba mixer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.nn.branch import Branch, ItemBatch
from m2rec.settings import ModelSettings


class Attention(Branch):
    """Multi-head causal attention with learned positions: (B, L, D) -> (B, L, D).

    SASRec's (arXiv 1808.09781) on PyTorch's `scaled_dot_product_attention`, with the positions
    added here instead of to the item vectors, so that no other branch sees them.

    Args:
        hidden_size: D.
        n_heads: heads, a divisor of D.
        max_length: the longest history, in steps.
        dropout: share of attention weights dropped in training.
    """

    name = "temporal"
    setting = "mixer: 'attention'"

    def __init__(self, hidden_size: int, n_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.position = nn.Parameter(torch.randn(max_length, hidden_size) * 0.02)
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    @classmethod
    def build(cls, settings: ModelSettings, max_length: int) -> "Attention":
        """The mixer of these settings."""
        return cls(settings.hidden_size, settings.n_heads, max_length, settings.dropout_prob)

    def forward(self, x: Tensor, batch: ItemBatch | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L, D), L at most `max_length`."""
        positioned = x + self.position[: x.shape[1]]
        heads = self.in_proj(positioned).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
