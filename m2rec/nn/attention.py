"""Causal self-attention in the temporal branch's place: the rival that Mamba is compared with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head causal attention with learned positions: (B, L, D) -> (B, L, D).

    SASRec's (arXiv 1808.09781) on PyTorch's `scaled_dot_product_attention`, with the positions
    added here instead of to the item vectors, so that the other branches do not see them.

    Args:
        hidden_size: D.
        n_heads: heads, a divisor of D.
        max_length: the longest history, in steps.
        dropout: share of attention weights dropped in training.
    """

    def __init__(self, hidden_size: int, n_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.position = nn.Parameter(torch.randn(max_length, hidden_size) * 0.02)
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, D), L at most `max_length`."""
        heads = self.in_proj(x + self.position[: x.shape[1]]).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
