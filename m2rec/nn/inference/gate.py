"""The gate for inference.

letter  meaning
D       model width
V       items including padding
K       branches of a layer
n       positions
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec.nn.gate import SoftmaxGate
from m2rec.nn.inference.branch import PreparedBranch, TableBudget
from m2rec.ops.contracts import LOG2_E
from m2rec.ops.ssd_inference import MIN_EXPONENT


class PreparedGate:
    """The softmax gate, with the logits of what depends on the item alone in a table.

    Args:
        gate: the gate.
        branches: of its layer.
        available: (V, K), as in `Encoder`.
        budget: for tables by item.
    """

    def __init__(
        self,
        gate: SoftmaxGate,
        branches: Sequence[PreparedBranch],
        available: Tensor | None,
        budget: TableBudget,
    ) -> None:
        width = gate.logits.out_features // len(branches)
        self.weight = gate.logits.weight * LOG2_E  # (K D, K D), outputs first
        weight = self.weight.T.contiguous()
        self.available = None if available is None or available.all() else available
        self.weights: list[Tensor | None] = list(weight.split(width))
        self.bias = gate.logits.bias * LOG2_E
        self.table: Tensor | None = None
        if available is not None and budget.reserve(len(weight)):
            self.table = self.bias.repeat(len(available), 1)
            for k, branch in enumerate(branches):
                part = self.weights[k]
                if branch.item_output is not None and part is not None:
                    self.table.addmm_(branch.item_output, part)
                    self.weights[k] = None
            if self.available is not None:
                _mask_logits(self.table.unflatten(1, (-1, width)), self.available)

    def merge(self, outputs: Sequence[Tensor], items: Tensor) -> Tensor:
        """The branches' outputs (n, D), at items (n,), merged -> (n, D)."""
        logits = self._compute_logits(outputs, items)
        parts = logits.unbind(1)
        top = torch.maximum(parts[0], parts[1])
        for part in parts[2:]:
            torch.maximum(top, part, out=top)
        logits.sub_(top[:, None])
        if self.available is not None:
            logits.clamp_(min=MIN_EXPONENT)  # minus infinity takes a slow path
        logits.exp2_()
        total = torch.add(parts[0], parts[1])
        merged = parts[0] * outputs[0]
        merged.addcmul_(parts[1], outputs[1])
        for part, output in zip(parts[2:], outputs[2:], strict=True):
            total.add_(part)
            merged.addcmul_(part, output)
        return merged.div_(total)

    def _compute_logits(self, outputs: Sequence[Tensor], items: Tensor) -> Tensor:
        """(n, K, D), base 2."""
        if self.table is not None:
            flat = F.embedding(items, self.table)
        else:
            flat = self.bias.repeat(len(items), 1)
        for output, weight in zip(outputs, self.weights, strict=True):
            if weight is not None:
                flat.addmm_(output, weight)
        logits: Tensor = flat.unflatten(1, (len(outputs), -1))
        if self.table is None and self.available is not None:
            _mask_logits(logits, self.available[items])
        return logits


class PreparedMean:
    """The mean of the branches that are available.

    Args:
        n_branches: K.
        available: (V, K), as in `Encoder`.
    """

    def __init__(self, n_branches: int, available: Tensor | None) -> None:
        self.share = 1 / n_branches
        self.weights: Tensor | None = None  # (V, K), by item
        if available is not None and not available.all():
            present = available.float()
            self.weights = present / present.sum(1, keepdim=True)

    def merge(self, outputs: Sequence[Tensor], items: Tensor) -> Tensor:
        """The branches' outputs (n, D), at items (n,), merged -> (n, D)."""
        if self.weights is None:
            merged = outputs[0] * self.share
            for output in outputs[1:]:
                merged.add_(output, alpha=self.share)
            return merged
        weights = self.weights.to(outputs[0].dtype)[items]
        merged = outputs[0] * weights[:, :1]
        for k, output in enumerate(outputs[1:], 1):
            merged.addcmul_(output, weights[:, k : k + 1])
        return merged


def _mask_logits(logits: Tensor, available: Tensor) -> None:
    """In place, minus infinity where a branch has no input: logits (n, K, D), available (n, K)."""
    logits.masked_fill_(~available[..., None], -torch.inf)
