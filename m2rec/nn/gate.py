"""Softmax gate over branches, and its ablation, the mean."""

import torch
from torch import Tensor, nn


class SoftmaxGate(nn.Module):
    """Weighs K branches per position and channel: softmax over branches of W [x_1; ...; x_K] + b.

    Starts as the plain mean (W and b are zero).

    Args:
        n_branches: K.
        hidden_size: D.
    """

    def __init__(self, n_branches: int, hidden_size: int) -> None:
        super().__init__()
        self.logits = nn.Linear(n_branches * hidden_size, n_branches * hidden_size)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, branches: Tensor, available: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Merge the branches.

        Args:
            branches: (B, L, K, D).
            available: (B, L, K), False where a branch has no input; at least one is True.
                None if all branches have inputs everywhere.

        Returns:
            The merged (B, L, D) and the weights (B, L, K, D), which sum to 1 over K.
        """
        logits = self.logits(branches.flatten(-2))
        logits = logits.unflatten(-1, branches.shape[-2:])
        return _merge_by_logits(branches, logits, available)


class MeanGate(nn.Module):
    """Equal weights for the branches that are available; the ablation of the gate."""

    def forward(self, branches: Tensor, available: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Arguments and result as in `SoftmaxGate`."""
        return _merge_by_logits(branches, torch.zeros_like(branches), available)


def _merge_by_logits(branches: Tensor, logits: Tensor, available: Tensor | None) -> tuple[Tensor, Tensor]:
    if available is not None:
        logits = logits.masked_fill(~available[..., None], -torch.inf)
    dtype = torch.promote_types(logits.dtype, torch.float32)  # autocast on a CPU would leave bfloat16
    weights = logits.softmax(dim=-2, dtype=dtype)
    merged = (weights * branches).sum(-2)
    return merged.to(branches.dtype), weights
