"""One stacked layer: branches -> gate -> residual and norm -> feed-forward."""

from typing import Any

import torch
from torch import Tensor, nn

from m2rec.nn.branch import Branch, ItemBatch, select_last_positions
from m2rec.nn.branches import BRANCHES
from m2rec.nn.dropout import Dropout
from m2rec.nn.gate import MeanGate, SoftmaxGate
from m2rec.settings import ModelSettings

# the states of a layer's branches by key; their size does not depend on the history's length
LayerState = dict[str, Any]


class Layer(nn.Module):
    """(B, L, D) -> (B, L, D): the branches of `BRANCHES`, merged by the gate.

    Args:
        settings: which branches there are, and their sizes.
        max_length: longest history, in steps.
        text_dim: T, or 0 without text.
    """

    def __init__(self, settings: ModelSettings, max_length: int, text_dim: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.branch_keys = []
        for key, build in BRANCHES.items():
            branch = build(settings, max_length, text_dim)
            self.register_module(key, branch)
            if branch is not None:
                self.branch_keys.append(key)
        n_branches = len(self.branch_keys)
        gated = settings.gate == "softmax" and n_branches > 1
        self.gate = SoftmaxGate(n_branches, width) if gated else MeanGate()
        self.feed_forward = FeedForward(width, settings.inner_size, settings.dropout_prob)
        self.dropout = Dropout(settings.dropout_prob)
        self.norm = nn.LayerNorm(width)

    @property
    def branches(self) -> dict[str, Branch]:
        """By key, in the order of the gate's weights."""
        return {key: getattr(self, key) for key in self.branch_keys}

    def forward(self, x: Tensor, batch: ItemBatch) -> tuple[Tensor, Tensor]:
        """x: (B, L, D) -> the new (B, L, D) and the gate's weights (B, L, K, D)."""
        outputs = [branch(x, batch) for branch in self.branches.values()]
        return self._merge_and_feed_forward(x, outputs, batch)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `forward` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        outputs = [branch.last(x, batch) for branch in self.branches.values()]
        ends = select_last_positions(x, batch.lengths)
        x, _ = self._merge_and_feed_forward(ends, outputs, batch.select_last_positions())
        return x

    def advance(self, x: Tensor, state: LayerState | None, batch: ItemBatch) -> tuple[Tensor, LayerState]:
        """As `forward` for the positions that follow `state`, None before the first.

        Raises:
            ValueError: a branch needs the whole history at once.
        """
        outputs, after = [], {}
        for key, branch in self.branches.items():
            before = None if state is None else state[key]
            y, after[key] = branch.advance(x, before, batch)
            outputs.append(y)
        x, _ = self._merge_and_feed_forward(x, outputs, batch)
        return x, after

    def step(self, x: Tensor, state: LayerState, batch: ItemBatch) -> tuple[Tensor, LayerState]:
        """As `advance` for one position: x (B, D) -> (B, D) and the state after it."""
        outputs, after = [], {}
        for key, branch in self.branches.items():
            y, after[key] = branch.step(x, state[key], batch)
            outputs.append(y)
        x, _ = self._merge_and_feed_forward(x, outputs, batch)
        return x, after

    def _merge_and_feed_forward(
        self, x: Tensor, outputs: list[Tensor], batch: ItemBatch
    ) -> tuple[Tensor, Tensor]:
        """The gate and what follows it; result as in `forward`."""
        mask = None if batch.available is None else batch.available[batch.items]
        merged, weights = self.gate(torch.stack(outputs, dim=-2), mask)
        x = self.norm(x + self.dropout(merged))
        return self.feed_forward(x), weights


class FeedForward(nn.Module):
    """layer_norm(x + W2 gelu(W1 x)), with dropout after each map."""

    def __init__(self, hidden_size: int, inner_size: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, inner_size)
        self.down = nn.Linear(inner_size, hidden_size)
        self.activation = nn.GELU()
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, D)."""
        h = self.dropout(self.activation(self.up(x)))
        return self.norm(x + self.dropout(self.down(h)))  # type: ignore[no-any-return]
