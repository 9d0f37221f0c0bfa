"""Losses over item scores; plain torch, for any set of positions.

    S   positions that have a target          D   width
    V   items including padding (item 0)

Padding is never a class: row 0 of the item table takes no part. With `repeats`, the score of an item
that the position has seen is raised by the repeat bias.

To add a loss, write a function `LossInput -> Tensor`, name it in `LOSSES`, and add the name to
`ModelSettings.loss_type`. A loss over some items also names the function that draws its negatives.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from m2rec.errors import UserError
from m2rec.nn.encoder import Encoder
from m2rec.nn.repeat_bias import RepeatBias
from m2rec.nn.step_items import StepItems
from m2rec.ops.contracts import first_derivative_only, without_autocast
from m2rec.settings import ModelSettings

ItemLookup = Callable[[Tensor], Tensor]

MIN_CHUNK_POSITIONS = 32  # positions for which the item table is read at once


class Negatives(NamedTuple):
    """The items that targets are compared with."""

    ids: Tensor
    """(G, n), a set for each group of positions; or one item for each target, in the shape of the targets."""
    log_probability: Tensor | None = None
    """(G, n), log of the probability with which each was drawn; None for one item for each target."""

    def select_positions(self, rows: Tensor, times: Tensor) -> "Negatives":
        """Those of the positions (S,) among (B, L); sets of groups stay."""
        return self if self.log_probability is not None else Negatives(self.ids[rows, times])


class LossInput(NamedTuple):
    """The positions of a training step and what their loss needs."""

    encoder: Encoder
    step: StepItems | None
    """With every item for a loss over all items, else with the targets and the negatives; None to compute."""
    x: Tensor
    """(S, D), in float32 at least; 0 at a position without target."""
    targets: Tensor
    """(S,), ids from 1; 0 for a position of padding, which is left out of the mean."""
    repeats: RepeatBias | None
    negatives: Negatives | None
    """None for a loss over all items."""

    def embed_items(self, ids: Tensor) -> Tensor:
        """ids (...) of targets or negatives -> their rows of the item table (..., D)."""
        return self.encoder.embed_items(ids, self.step)

    @property
    def n_items(self) -> int:
        """V."""
        return self.encoder.n_items


def compute_loss(given: LossInput) -> Tensor:
    """The loss that `loss_type` names, outside autocast and in the type of the weights."""
    encoder = given.encoder
    loss = LOSSES[encoder.settings.loss_type]
    with without_autocast(encoder.device):
        return loss.compute(given._replace(x=given.x.to(encoder.dtype)))


def draw_negatives(
    settings: ModelSettings, targets: Tensor, sampler: "NegativeSampler", n_positions: int | None = None
) -> Negatives | None:
    """The negatives of a training step, which don't depend on the network; None for a loss over all items.

    Args:
        settings: of the model.
        targets: ids of any shape, 0 where there is none.
        sampler: draws items.
        n_positions: S; None to count the targets, for which a GPU has to be waited for.
    """
    draw = LOSSES[settings.loss_type].draw_negatives
    return None if draw is None else draw(settings, targets, sampler, n_positions)


def _compute_cross_entropy(given: LossInput) -> Tensor:
    memory = given.encoder.settings.loss_memory
    return cross_entropy(given.x, given.targets, given.encoder.item_table(given.step), given.repeats, memory)


def _compute_sampled(given: LossInput) -> Tensor:
    assert given.negatives is not None
    ids, log_probability = given.negatives
    assert log_probability is not None
    return sampled_cross_entropy(
        given.x, given.targets, given.embed_items, ids, log_probability, given.repeats
    )


def _compute_gbce(given: LossInput) -> Tensor:
    assert given.negatives is not None
    ids, t = given.negatives.ids, given.encoder.settings.gbce_t
    return gbce(given.x, given.targets, given.embed_items, ids, given.n_items, t, given.repeats)


def _compute_bpr(given: LossInput) -> Tensor:
    assert given.negatives is not None
    return bpr(given.x, given.targets, given.embed_items, given.negatives.ids, given.repeats)


def _draw_shared_negatives(
    settings: ModelSettings, targets: Tensor, sampler: "NegativeSampler", n_positions: int | None
) -> Negatives:
    """A set for each group of positions."""
    if n_positions is None:
        n_positions = int((targets > 0).sum())
    groups = -(-n_positions // settings.negatives_shared)
    return Negatives(*sampler(groups, settings.n_negatives))


def _draw_own_negatives(
    settings: ModelSettings, targets: Tensor, sampler: "NegativeSampler", n_positions: int | None
) -> Negatives:
    """One item for each target."""
    return Negatives(draw_other_items(targets, sampler.n_items).masked_fill(targets == 0, 0))


class Loss(NamedTuple):
    """A loss, and how its negatives are drawn; None for a loss over all items."""

    compute: Callable[[LossInput], Tensor]
    draw_negatives: Callable[[ModelSettings, Tensor, "NegativeSampler", int | None], Negatives] | None = None


LOSSES: dict[str, Loss] = {
    "CE": Loss(_compute_cross_entropy),
    "sampled": Loss(_compute_sampled, _draw_shared_negatives),
    "gBCE": Loss(_compute_gbce, _draw_shared_negatives),
    "BPR": Loss(_compute_bpr, _draw_own_negatives),
}


def cross_entropy_ref(
    x: Tensor, targets: Tensor, item_table: Tensor, repeats: RepeatBias | None = None
) -> Tensor:
    """Mean softmax cross-entropy over all items, with all scores (S, V) at once.

    Args:
        x: (S, D), 0 at a position without target.
        targets: (S,), ids from 1; 0 where there is none.
        item_table: (V, D).
        repeats: what each position has seen.
    """
    scores = x @ item_table.T
    if repeats is not None:
        seen = repeats.find_seen_pairs(0, len(x))
        scores = scores.index_put(seen, repeats.bias, accumulate=True)
    return F.cross_entropy(scores[:, 1:], targets - 1, ignore_index=-1)


def cross_entropy(
    x: Tensor, targets: Tensor, item_table: Tensor, repeats: RepeatBias | None = None, memory: int = 0
) -> Tensor:
    """As `cross_entropy_ref`, holding at most `memory` MiB of scores (one position's at least).

    With 0 MiB the device decides: a CPU's cache, or enough that a GPU's calls are few; but at least
    MIN_CHUNK_POSITIONS positions, to amortise reading the item table.
    """
    min_rows = 1
    if not memory:
        min_rows, memory = MIN_CHUNK_POSITIONS, 512 if x.is_cuda else 8
    dtype = torch.promote_types(item_table.dtype, torch.float32)
    bytes_per_position = dtype.itemsize * len(item_table)
    rows = max(min_rows, memory * 2**20 // bytes_per_position)
    bias = None
    if repeats is not None:
        bias = repeats.bias.to(dtype)
        rows = min(rows, repeats.block_size)
    given = (x.to(dtype), item_table[1:].to(dtype), bias, targets - 1, rows, repeats)
    loss: Tensor = _CrossEntropy.apply(*given)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy over chunks of positions; forward computes the gradients too.

    The loss is a scalar, so backward only has to scale them.
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
        """x (S, D), table (V - 1, D), bias (), classes (S,) or -1, rows per chunk -> the mean loss."""
        is_target = classes >= 0
        count = is_target.sum()
        classes = classes.clamp(min=0)
        dx, dtable = torch.empty_like(x), torch.zeros_like(table)
        dbias, total = x.new_zeros(()), x.new_zeros(())
        buffer = x.new_empty(min(rows, len(x)), len(table))
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            part = x[chunk]
            scores = torch.mm(part, table.T, out=buffer[: len(part)])
            seen = counts = None
            if repeats is not None and bias is not None:
                seen, counts = repeats.find_seen_scores(start, start + len(part), len(table))
                raised = bias.expand_as(seen) if counts is None else bias * counts
                scores.view(-1).scatter_add_(0, seen, raised)
            losses, error = _compute_losses_and_error(scores, classes[chunk, None])
            total += (losses[:, 0] * is_target[chunk]).sum()
            if seen is not None:
                errors = error.view(-1).index_select(0, seen)
                dbias += (errors if counts is None else errors * counts).sum()
            torch.mm(error, table, out=dx[chunk])
            dtable.addmm_(error.T, part)
        ctx.save_for_backward(*(gradient.div_(count) for gradient in (dx, dtable, dbias)))
        return total / count

    @staticmethod
    @first_derivative_only("cross_entropy", "cross_entropy_ref")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, table and bias."""
        dx, dtable, dbias = (saved * grads[0] for saved in ctx.saved_tensors)
        return dx, dtable, dbias if ctx.needs_input_grad[2] else None, None, None, None


def _compute_losses_and_error(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """scores (s, C), targets (s, 1) -> the losses (s, 1), and their gradient in place of the scores."""
    largest, at_target = scores.amax(1, keepdim=True), scores.gather(1, targets)
    error = torch.softmax(scores, 1, out=scores)
    log_sum = largest - error.amax(1, keepdim=True).log_()  # the largest probability is exp(largest) / sum
    error.scatter_add_(1, targets, -torch.ones_like(largest))
    return log_sum - at_target, error


class NegativeSampler(nn.Module):
    """Draws items from 1 to V - 1, with replacement.

    Args:
        n_items: V.
        counts: (V,) how often each item occurs; items are then drawn in proportion to count + 1.
            None draws them uniformly.
    """

    cumulative: Tensor | None
    log_probability: Tensor

    def __init__(self, n_items: int, counts: Tensor | None = None) -> None:
        super().__init__()
        self.n_items = n_items
        log_probability = torch.full((n_items,), -math.log(max(n_items - 1, 1)))
        cumulative = None
        self.total = 0
        if counts is not None:
            # whole numbers, which stay exact in a model of any type and on a device without float64
            weights = counts[1:].long() + 1
            cumulative = weights.cumsum(0)
            self.total = int(weights.sum())
            log_probability[1:] = (weights.double() / self.total).log().float()
        self.register_buffer("cumulative", cumulative, persistent=False)
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
    embed: ItemLookup,
    negatives: Tensor,
    log_probability: Tensor,
    repeats: RepeatBias | None = None,
) -> Tensor:
    """Mean cross-entropy against n negatives, each set of n shared by a group of positions.

    A negative that was drawn with probability q stands for 1 / (n q) items, so its score is
    raised by the logarithm of that: the sum over the negatives then estimates the sum over
    all items (Bengio and Senecal, 2008). A negative that is the position's target is masked.

    Args:
        x: (S, D).
        targets: (S,), ids from 1; 0 for a position of padding.
        embed: ids (...) -> their rows of the item table (..., D).
        negatives: (G, n), ids from 1, drawn with replacement: one set for each of G groups, into
            which the positions are cut in their order.
        log_probability: (G, n), log q of each.
        repeats: what each position has seen.
    """
    positive, scores = _score_sampled_items(x, targets, embed, negatives, repeats, log_probability)
    first = torch.zeros_like(targets).masked_fill_(targets == 0, -1)
    return F.cross_entropy(torch.cat([positive, scores], dim=1), first, ignore_index=-1)


def gbce(
    x: Tensor,
    targets: Tensor,
    embed: ItemLookup,
    negatives: Tensor,
    n_items: int,
    t: float,
    repeats: RepeatBias | None = None,
) -> Tensor:
    """Mean generalised binary cross-entropy (gSASRec, arXiv 2308.07192, equations 11 and 13).

        -(beta log sigmoid(positive) + sum log sigmoid(-negative)) / (n + 1),   beta = 1 - t (1 - alpha)

    alpha = n / (V - 1) is the share of items that are drawn, so t = 0 is plain binary
    cross-entropy and t = 1 undoes the overconfidence of few negatives. Unlike in gSASRec a set of
    negatives is shared by a group of positions; one that is the target is masked.

    Args:
        x: (S, D).
        targets: (S,), ids from 1; 0 for a position of padding.
        embed: ids (...) -> their rows of the item table (..., D).
        negatives: (G, n), ids from 1, uniform over all items, as in `sampled_cross_entropy`.
        n_items: V.
        t: calibration, from 0 to 1.
        repeats: what each position has seen.
    """
    positive, scores = _score_sampled_items(x, targets, embed, negatives, repeats)
    n = negatives.shape[1]
    alpha = min(1.0, n / (n_items - 1))
    beta = 1 - t * (1 - alpha)
    is_padding = (targets == 0)[:, None]
    positive = positive.masked_fill(is_padding, torch.inf)
    scores = scores.masked_fill(is_padding, -torch.inf)
    total = beta * F.softplus(-positive).sum() + F.softplus(scores).sum()
    return total / (_count_targets(targets) * (n + 1))


def _score_sampled_items(
    x: Tensor,
    targets: Tensor,
    embed: ItemLookup,
    negatives: Tensor,
    repeats: RepeatBias | None,
    log_probability: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores of the targets (S, 1) and of the negatives (S, n), -inf where one is the target.

    With `log_probability`, a negative's score is raised by the logarithm of what it stands for.
    """
    groups, n = negatives.shape
    size = -(-len(x) // groups)
    missing = groups * size - len(x)
    grouped = F.pad(x, (0, 0, 0, missing)).view(groups, size, -1)
    grouped_targets = F.pad(targets, (0, missing)).view(groups, size, 1)
    positive = (x * embed(targets)).sum(-1)
    scores = grouped @ embed(negatives).mT  # (G, S / G, n)
    if repeats is not None:
        positive = positive + repeats.bias_for_items(targets)
        scores = scores + repeats.bias_for_shared_items(negatives, size)
    if log_probability is not None:
        scores = scores - (log_probability + math.log(n))[:, None]
    is_target = negatives[:, None] == grouped_targets
    scores = scores.masked_fill(is_target, -torch.inf).flatten(0, 1)
    return positive[:, None], scores[: len(x)]


def bpr(
    x: Tensor, targets: Tensor, embed: ItemLookup, negatives: Tensor, repeats: RepeatBias | None = None
) -> Tensor:
    """Mean Bayesian personalised ranking loss, -log sigmoid(positive - negative).

    Args:
        x: (S, D).
        targets, negatives: (S,), ids from 1; a target of 0 is padding.
        embed: ids (...) -> their rows of the item table (..., D).
        repeats: what each position has seen.
    """
    difference = (x * (embed(targets) - embed(negatives))).sum(-1)
    if repeats is not None:
        difference = difference + repeats.bias_for_items(targets) - repeats.bias_for_items(negatives)
    return -(F.logsigmoid(difference) * (targets > 0)).sum() / _count_targets(targets)


def _count_targets(targets: Tensor) -> Tensor:
    """How many positions are not padding, ()."""
    return (targets > 0).sum()


def draw_other_items(targets: Tensor, n_items: int) -> Tensor:
    """One item for each target, uniform over all items but padding and the target itself."""
    if n_items < 3:
        raise UserError("loss_type: BPR needs at least two items; use loss_type: CE")
    draw = torch.randint_like(targets, 1, n_items - 1)
    return draw + (draw >= targets)
