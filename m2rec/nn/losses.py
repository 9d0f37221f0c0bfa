"""Losses over item scores; plain torch, for any set of positions.

    S   positions that have a target          D   width
    V   items including padding (item 0)

Padding is never a class: row 0 of the item table takes no part. Where `repeats` is given, the score
of an item that the position has seen is raised by its bias.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.repeat_bias import RepeatBias
from m2rec.ops.contracts import first_derivative_only

ItemLookup = Callable[[Tensor], Tensor]

MIN_CHUNK_POSITIONS = 32  # positions for which the item table is read at once


def cross_entropy_ref(
    x: Tensor, targets: Tensor, item_table: Tensor, repeats: RepeatBias | None = None
) -> Tensor:
    """Mean softmax cross-entropy over all items, with all scores (S, V) at once.

    Args:
        x: (S, D).
        targets: (S,), ids from 1.
        item_table: (V, D).
        repeats: what each position has seen.
    """
    scores = x @ item_table.T
    if repeats is not None:
        position, item = repeats.find_seen_pairs(0, len(x))
        scores = scores.index_put((position, item), repeats.bias, accumulate=True)
    return F.cross_entropy(scores[:, 1:], targets - 1)


def cross_entropy(
    x: Tensor, targets: Tensor, item_table: Tensor, repeats: RepeatBias | None = None, memory: int = 0
) -> Tensor:
    """As `cross_entropy_ref`, holding at most `memory` MiB of scores (one position's at least).

    Scores are held twice for a moment, when their logarithms are summed. 0 MiB is what suits the
    device: a CPU's cache, or so much that a GPU's calls are few; but so many positions at least
    that reading the item table for them is worth it.
    """
    least, memory = (1, memory) if memory else (MIN_CHUNK_POSITIONS, 512 if x.is_cuda else 16)
    dtype = torch.promote_types(item_table.dtype, torch.float32)
    rows = max(least, memory * 2**20 // (2 * dtype.itemsize * len(item_table)))
    bias = None
    if repeats is not None:
        bias, rows = repeats.bias.to(dtype), min(rows, repeats.block_size)
    given = (x.to(dtype), item_table[1:].to(dtype), bias, targets - 1, rows, repeats)
    loss: Tensor = _CrossEntropy.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over chunks of positions; the gradient is made on the way forward.

    The loss is a scalar, so backward only has to scale what forward has found.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        bias: Tensor | None,
        classes: Tensor,
        rows: int,
        repeats: RepeatBias | None,
    ) -> Tensor:
        """x (S, D), table (V, D), bias (), classes (S,), rows per chunk -> the mean loss."""
        dx, dtable, dbias, total = (
            torch.empty_like(x),
            torch.zeros_like(table),
            x.new_zeros(()),
            x.new_zeros(()),
        )
        for start in range(0, len(x), rows):
            part, own = x[start : start + rows], classes[start : start + rows, None]
            scores = part @ table.T
            if repeats is not None and bias is not None:
                position, item = repeats.find_seen_pairs(start, start + rows)
                seen = (position, item - 1)
                scores[seen] += bias
            normaliser = scores.logsumexp(1, keepdim=True)
            total += (normaliser - scores.gather(1, own)).sum()
            error = scores.sub_(normaliser).exp_()  # softmax less one at the target
            error.scatter_add_(1, own, -torch.ones_like(normaliser))
            if repeats is not None:
                dbias += error[seen].sum()
            dx[start : start + rows] = error @ table
            dtable.addmm_(error.T, part)
        ctx.save_for_backward(dx / len(x), dtable / len(x), None if bias is None else dbias / len(x))
        return total / len(x)

    @staticmethod
    @first_derivative_only("cross_entropy", "cross_entropy_ref")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, table and bias."""
        return *(None if saved is None else saved * grads[0] for saved in ctx.saved_tensors), None, None, None


class NegativeSampler(nn.Module):
    """Draws items from 1 to V - 1, with replacement, and knows how likely each was.

    Args:
        n_items: V.
        counts: (V,) how often each item occurs; items are then drawn by popularity, count + 1,
            so that none is left out. Without counts all are equally likely.
    """

    cumulative: Tensor | None
    log_probability: Tensor

    def __init__(self, n_items: int, counts: Tensor | None = None) -> None:
        super().__init__()
        self.n_items = n_items
        weights = None if counts is None else counts[1:].long() + 1
        # whole numbers, which stay exact in a model of any type and on a device without float64
        self.total = 0 if weights is None else int(weights.sum())
        log_probability = torch.full((n_items,), -math.log(max(n_items - 1, 1)))
        if weights is not None:
            log_probability[1:] = (weights.double() / self.total).log().float()
        self.register_buffer("cumulative", None if weights is None else weights.cumsum(0), persistent=False)
        self.register_buffer("log_probability", log_probability, persistent=False)

    def forward(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Item ids of this shape (...) and the logarithms of their probabilities (...)."""
        device = self.log_probability.device
        if self.cumulative is None:
            ids = torch.randint(1, self.n_items, shape, device=device)
        else:
            draw = _draw_integers(self.total, shape, device)
            ids = torch.searchsorted(self.cumulative, draw, right=True) + 1
        return ids, self.log_probability[ids]


def _draw_integers(end: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Whole numbers from 0 to `end` less one, uniform."""
    if device.type == "mps":  # has no float64; elsewhere it is kept, so that a seed's numbers stay the same
        return torch.randint(end, shape, device=device)
    return (torch.rand(shape, dtype=torch.float64, device=device) * end).long()


def sampled_cross_entropy(
    x: Tensor,
    targets: Tensor,
    rows: ItemLookup,
    negatives: Tensor,
    log_probability: Tensor,
    repeats: RepeatBias | None = None,
) -> Tensor:
    """Mean cross-entropy against n negatives, each set of n shared by a group of positions.

    A negative that was drawn with probability q stands for 1 / (n q) items, so its score is
    raised by the logarithm of that: the sum over the negatives then estimates the sum over
    all items (Bengio and Senecal, 2008). A negative that is the position's target is left
    out there.

    Args:
        x: (S, D).
        targets: (S,), ids from 1.
        rows: ids (...) -> their rows of the item table (..., D).
        negatives: (G, n), ids from 1, drawn with replacement: one set for each of G groups, into
            which the positions are cut in their order.
        log_probability: (G, n), log q of each.
        repeats: what each position has seen.
    """
    positive, scores = _score_sampled_items(x, targets, rows, negatives, repeats, log_probability)
    first = torch.zeros_like(targets)
    return F.cross_entropy(torch.cat([positive, scores], dim=1), first)


def gbce(
    x: Tensor,
    targets: Tensor,
    rows: ItemLookup,
    negatives: Tensor,
    n_items: int,
    t: float,
    repeats: RepeatBias | None = None,
) -> Tensor:
    """Mean generalised binary cross-entropy (gSASRec, arXiv 2308.07192, equations 11 and 13).

        -(beta log sigmoid(positive) + sum log sigmoid(-negative)) / (n + 1),   beta = 1 - t (1 - alpha)

    alpha = n / (V - 1) is the share of items that are drawn, so t = 0 is plain binary
    cross-entropy and t = 1 undoes the overconfidence of few negatives. Unlike in gSASRec a set of
    negatives is shared by a group of positions; one that is the target is left out there.

    Args:
        x: (S, D).
        targets: (S,), ids from 1.
        rows: ids (...) -> their rows of the item table (..., D).
        negatives: (G, n), ids from 1, uniform over all items, as in `sampled_cross_entropy`.
        n_items: V.
        t: calibration, from 0 to 1.
        repeats: what each position has seen.
    """
    positive, scores = _score_sampled_items(x, targets, rows, negatives, repeats)
    n = negatives.shape[1]
    alpha = min(1.0, n / (n_items - 1))
    beta = 1 - t * (1 - alpha)
    total = beta * F.softplus(-positive).sum() + F.softplus(scores).sum()
    return total / (len(x) * (n + 1))


def _score_sampled_items(
    x: Tensor,
    targets: Tensor,
    rows: ItemLookup,
    negatives: Tensor,
    repeats: RepeatBias | None,
    log_probability: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of the targets (S, 1) and of the negatives (S, n), -inf where one is the target.

    With `log_probability`, a negative's score is raised by the logarithm of what it stands for.
    """
    groups, n = negatives.shape
    size = -(-len(x) // groups)
    fill = groups * size - len(x)
    grouped = F.pad(x, (0, 0, 0, fill)).view(groups, size, -1)
    own = F.pad(targets, (0, fill)).view(groups, size, 1)
    positive = (x * rows(targets)).sum(-1)
    scores = grouped @ rows(negatives).mT  # (G, S / G, n)
    if repeats is not None:
        positive = positive + repeats.of(targets)
        scores = scores + repeats.bias_for_shared_items(negatives, size)
    if log_probability is not None:
        scores = scores - (log_probability + math.log(n))[:, None]
    scores = scores.masked_fill(negatives[:, None] == own, -torch.inf).flatten(0, 1)[: len(x)]
    return positive[:, None], scores


def bpr(
    x: Tensor, targets: Tensor, rows: ItemLookup, negatives: Tensor, repeats: RepeatBias | None = None
) -> Tensor:
    """Mean Bayesian personalised ranking loss, -log sigmoid(positive - negative).

    Args:
        x: (S, D).
        targets, negatives: (S,), ids from 1.
        rows: ids (...) -> their rows of the item table (..., D).
        repeats: what each position has seen.
    """
    difference = (x * (rows(targets) - rows(negatives))).sum(-1)
    if repeats is not None:
        difference = difference + repeats.of(targets) - repeats.of(negatives)
    return -F.logsigmoid(difference).mean()


def draw_other_items(targets: Tensor, n_items: int) -> Tensor:
    """One item for each target, uniform over all items but padding and the target itself."""
    if n_items < 3:
        raise UserError("loss_type: BPR needs two items to tell apart; set loss_type: CE")
    draw = torch.randint_like(targets, 1, n_items - 1)
    return draw + (draw >= targets)
