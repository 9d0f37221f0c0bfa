"""A layer for inference.

letter  meaning
B, L    batch, sequence length (right-padded with item 0)
D       model width
V       items including padding
K       branches of a layer
n       positions
"""

from typing import cast

import torch
from torch import Tensor, nn

from m2rec.nn.branch import ItemBatch, select_last_positions
from m2rec.nn.gate import MeanGate, SoftmaxGate
from m2rec.nn.inference.branch import PlainBranch, PreparedBranch, TableBudget
from m2rec.nn.inference.branches import PREPARED
from m2rec.nn.inference.gate import PreparedGate, PreparedMean
from m2rec.nn.layer import Layer, LayerState


class PreparedLayer:
    """A layer without gradients, whose activations are changed in place.

    Args:
        layer: the layer.
        inputs: (V, D), its input by item; None if it depends on more than the item.
        available: (V, K), as in `Encoder`.
        budget: for tables by item.
    """

    def __init__(
        self, layer: Layer, inputs: Tensor | None, available: Tensor | None, budget: TableBudget
    ) -> None:
        self.layer = layer
        self.branches: list[PreparedBranch] = []
        for branch in layer.branches.values():
            build = PREPARED.get(type(branch), PlainBranch)
            self.branches.append(build(branch, inputs, budget))
        self.available = available
        self.gate: PreparedGate | PreparedMean | nn.Module = layer.gate
        if isinstance(layer.gate, SoftmaxGate):
            self.gate = PreparedGate(layer.gate, self.branches, available, budget)
        elif isinstance(layer.gate, MeanGate):
            self.gate = PreparedMean(len(self.branches), available)

    def encode(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """x: (B, L, D), changed in place -> (B, L, D); L fills its chunks."""
        outputs = [branch.encode(x, batch) for branch in self.branches]
        return self._merge_and_feed_forward(x, outputs, batch)

    def last(self, x: Tensor, batch: ItemBatch) -> Tensor:
        """As `encode` for each row's last position only, (B, D)."""
        assert batch.lengths is not None
        outputs = [branch.last(x, batch) for branch in self.branches]
        ends = select_last_positions(x, batch.lengths)
        return self._merge_and_feed_forward(ends, outputs, batch.select_last_positions())

    def step(self, x: Tensor, state: LayerState, batch: ItemBatch) -> tuple[Tensor, LayerState]:
        """x: (B, D), changed in place -> (B, D) and the new state, as `Layer.step`."""
        outputs, after = [], {}
        for key, branch in zip(self.layer.branch_keys, self.branches, strict=True):
            y, after[key] = branch.step(x, state[key], batch)
            outputs.append(y)
        return self._merge_and_feed_forward(x, outputs, batch), after

    def _merge_and_feed_forward(self, x: Tensor, outputs: list[Tensor], batch: ItemBatch) -> Tensor:
        """The gate and what follows it; x is changed in place."""
        flat = [output.reshape(-1, output.shape[-1]) for output in outputs]
        merged = self._merge(flat, batch.items.flatten()).view_as(x)
        normed: Tensor = self.layer.norm(x.add_(merged))
        return self._feed_forward(normed.flatten(0, -2)).view_as(x)

    def _merge(self, outputs: list[Tensor], items: Tensor) -> Tensor:
        """The branches' outputs (n, D), at items (n,), merged -> (n, D)."""
        if isinstance(self.gate, PreparedGate | PreparedMean):
            return self.gate.merge(outputs, items)
        mask = None if self.available is None else self.available[items]
        return cast(Tensor, self.gate(torch.stack(outputs, dim=-2), mask)[0])

    def _feed_forward(self, x: Tensor) -> Tensor:
        """x: (n, D), changed in place -> (n, D)."""
        part = self.layer.feed_forward
        hidden = torch.ops.aten.gelu_(torch.mm(x, part.up.weight.T).add_(part.up.bias))
        x.addmm_(hidden, part.down.weight.T).add_(part.down.bias)
        return cast(Tensor, part.norm(x))
