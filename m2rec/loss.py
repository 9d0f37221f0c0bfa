"""Losses over item scores; plain torch, for any set of positions.

    S   positions that have a target          D   width
    V   items including padding (item 0)

Padding is never a class: row 0 of the item table takes no part.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Rows = Callable[[Tensor], Tensor]


def cross_entropy_ref(x: Tensor, targets: Tensor, item_table: Tensor) -> Tensor:
    """Mean softmax cross-entropy over all items, with all scores (S, V) at once.

    Args:
        x: (S, D).
        targets: (S,), ids from 1.
        item_table: (V, D).
    """
    return F.cross_entropy(x @ item_table[1:].T, targets - 1)


def cross_entropy(x: Tensor, targets: Tensor, item_table: Tensor, memory: int = 16) -> Tensor:
    """As `cross_entropy_ref`, holding at most `memory` MiB of scores (one position's at least).

    Scores are held twice for a moment, when their logarithms are summed.
    """
    dtype = torch.promote_types(item_table.dtype, torch.float32)
    rows = max(1, memory * 2**20 // (2 * dtype.itemsize * len(item_table)))
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = _CrossEntropy.apply(x.to(dtype), item_table[1:].to(dtype), targets - 1, rows)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over chunks of positions; the gradient is made on the way forward.

    The loss is a scalar, so backward only has to scale what forward has found.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, classes: Tensor, rows: int) -> Tensor:
        """x (S, D), table (V, D), classes (S,), rows per chunk -> the mean loss."""
        dx, dtable, total = torch.empty_like(x), torch.zeros_like(table), x.new_zeros(())
        for start in range(0, len(x), rows):
            part, own = x[start : start + rows], classes[start : start + rows, None]
            scores = part @ table.T
            normaliser = scores.logsumexp(1, keepdim=True)
            total += (normaliser - scores.gather(1, own)).sum()
            error = scores.sub_(normaliser).exp_()  # softmax less one at the target
            error.scatter_add_(1, own, -torch.ones_like(normaliser))
            dx[start : start + rows] = error @ table
            dtable.addmm_(error.T, part)
        ctx.save_for_backward(dx / len(x), dtable / len(x))
        return total / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x and table."""
        dx, dtable = ctx.saved_tensors
        return dx * grads[0], dtable * grads[0], None, None


def sampled_cross_entropy(x: Tensor, targets: Tensor, rows: Rows, n_items: int, n_negatives: int) -> Tensor:
    """Mean cross-entropy against uniform negatives shared by all positions.

    Each negative stands for (V - 1) / n_negatives items, so its score is raised by the
    logarithm of that: the sum over the negatives then estimates the sum over all items. A
    negative that is the position's target is left out there.

    Args:
        x: (S, D).
        targets: (S,), ids from 1.
        rows: ids (...) -> their rows of the item table (..., D).
        n_items: V.
        n_negatives: negatives drawn, with replacement.
    """
    negatives = torch.randint(1, n_items, (n_negatives,), device=x.device)
    positive = (x * rows(targets)).sum(-1, keepdim=True)
    scores = x @ rows(negatives).T + math.log((n_items - 1) / n_negatives)
    scores = scores.masked_fill(negatives == targets[:, None], -torch.inf)
    first = torch.zeros_like(targets)
    return F.cross_entropy(torch.cat([positive, scores], dim=1), first)


def bpr(x: Tensor, targets: Tensor, rows: Rows, negatives: Tensor) -> Tensor:
    """Mean Bayesian personalised ranking loss, -log sigmoid(positive - negative).

    Args:
        x: (S, D).
        targets, negatives: (S,), ids from 1.
        rows: ids (...) -> their rows of the item table (..., D).
    """
    return -F.logsigmoid((x * (rows(targets) - rows(negatives))).sum(-1)).mean()


def other_items(targets: Tensor, n_items: int) -> Tensor:
    """One item for each target, uniform over all items but padding and the target itself."""
    if n_items < 3:
        raise ValueError("loss_type: BPR needs two items to tell apart; set loss_type: CE")
    draw = torch.randint_like(targets, 1, n_items - 1)
    return draw + (draw >= targets)
