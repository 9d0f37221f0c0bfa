"""Ranking all items for each row, with the user's history in the ranking and without it.

letter  meaning
b, n    rows of a batch, of a part
V       items including padding
K       length of the ranking that is kept, the largest cut-off of the metrics
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from m2rec import distributed
from m2rec.compat import Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import BoolArray, IntArray
from m2rec.evaluation.protocols import Protocol

NO_ITEM = 0  # padding, in a ranking that has no more items
_MAX_SCORES = 2**28  # of a batch: 1 GiB, with a million items 268 rows
RANKED_PROTOCOLS = (Protocol.ALL, Protocol.UNSEEN)

SeenItems = tuple[IntArray, IntArray]
"""(m,) and (m,), row of a batch and id of an item in its history."""
ScoredBatch = tuple[Tensor, SeenItems]
"""Scores (b, V) and what the rows have seen."""


@dataclass(frozen=True)
class Ranking:
    """Top-K items of n rows.

    Attributes:
        targets: (n,), ids of the target items.
        returning: (n,), whether the target is in the user's history.
        items: for ALL and UNSEEN, (n, K) ids of the best items, best first; 0 where there are no more.
    """

    targets: IntArray
    returning: BoolArray
    items: dict[Protocol, IntArray]

    def select_rows(self, protocol: Protocol) -> tuple[IntArray, IntArray]:
        """Rank of the target and top-K items of each row that a protocol includes."""
        if protocol is not Protocol.NEW:
            items = self.items[protocol]
            return find_target_ranks(items, self.targets), items
        is_new = ~self.returning
        items = self.items[Protocol.UNSEEN][is_new]
        return find_target_ranks(items, self.targets[is_new]), items


def find_target_ranks(items: IntArray, targets: IntArray) -> IntArray:
    """Rank of each target, its position in the top-K list from 1; 0 where it is not in the list.

    This is the only rule for ranks: items of equal score are in the order in which `torch.topk` lists them.

    Args:
        items: (n, K), as `select_top_items` returns them.
        targets: (n,).
    """
    is_target = items == targets[:, None]
    rank = is_target.argmax(axis=1) + 1
    return np.where(is_target.any(axis=1), rank, 0)


def select_top_items(scores: Tensor, k: int) -> IntArray:
    """Ids of the best items of scores (b, V), (b, k); 0 where only masked items are left."""
    width = min(k, scores.shape[1])
    values, items = scores.topk(width)
    items = items.masked_fill(values == -torch.inf, NO_ITEM)
    return np.asarray(F.pad(items, (0, k - width), value=NO_ITEM).cpu())


def compute_full_ranks(scores: Tensor, items: IntArray, targets: Tensor) -> IntArray:
    """Rank of each target among all items; 0 where its score is -inf.

    Within the top-K list a rank is that of `find_target_ranks`; below, ties count against the target.

    Args:
        scores: (b, V).
        items: (b, K), their top-K items.
        targets: (b,).
    """
    target_scores = scores.gather(1, targets.to(scores.device)[:, None])
    below = (scores >= target_scores).sum(1)
    below[target_scores[:, 0] == -torch.inf] = 0
    ranks = find_target_ranks(items, targets.cpu().numpy())
    return np.where(ranks > 0, ranks, below.cpu().numpy())


def mask_seen(scores: Tensor, rows: IntArray, items: IntArray) -> None:
    """Set the scores of items in the history to -inf, so that they are not recommended.

    Args:
        scores: (b, V), changed in place.
        rows, items: (m,), row of `scores` and id of the item.
    """
    scores[torch.as_tensor(rows), torch.as_tensor(items)] = -torch.inf


def mask_history_scores(scores: Tensor, interaction: Interaction, part: HistoryDataset) -> None:
    """`mask_seen` for the whole history before each row's target."""
    mask_seen(scores, *_find_seen_items(interaction, part))


def _find_seen_items(interaction: Interaction, part: HistoryDataset) -> SeenItems:
    assert part.histories is not None and part.part is not None
    owners = interaction[part.owner_field].cpu().numpy()
    return part.histories.items_before_target(owners, part.part)


@torch.no_grad()
def rank_batches(
    batches: Iterable[ScoredBatch], k: int, protocols: Sequence[Protocol] = RANKED_PROTOCOLS
) -> dict[Protocol, IntArray]:
    """Top-K items by protocol, (n, K) each, for all rows in the order of the batches.

    Args:
        batches: scored rows.
        k: K.
        protocols: ALL alone or ALL and UNSEEN, in this order, since masking changes the scores.
    """
    parts = {protocol: [np.empty((0, k), dtype=np.int64)] for protocol in protocols}
    for scores, seen in batches:
        for protocol in protocols:
            if protocol is Protocol.UNSEEN:
                mask_seen(scores, *seen)
            parts[protocol].append(select_top_items(scores, k))
    return {protocol: np.concatenate(batches) for protocol, batches in parts.items()}


def sample_rows(n: int, most: int) -> IntArray:
    """Numbers of a fixed random sample of n rows, ascending; of all rows if `most` is 0, or n and more."""
    if not 0 < most < n:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, most, replace=False))


def rank_rows(
    score: Callable[[Interaction], Tensor],
    loader: Any,
    show_progress: Callable[[Iterable[Tensor]], Iterable[Tensor]],
    protocols: Sequence[Protocol] = RANKED_PROTOCOLS,
    rows: IntArray | None = None,
    take_part: Callable[[], None] | None = None,
) -> Ranking:
    """Rank all items for rows of a part, which are shared out over the processes.

    Args:
        score: rows -> (b, V) scores, padding's -inf.
        loader: the part's loader, of a `HistoryDataset`.
        show_progress: wraps the batches of row numbers.
        protocols: as in `rank_batches`.
        rows: (n,) numbers of the rows, ascending; None for all.
        take_part: where processes score together, what one does that has no batch left; None where each
            scores alone.
    """
    part: HistoryDataset = loader.dataset
    assert part.histories is not None and part.part is not None
    feat = part.inter_feat
    numbers = torch.arange(len(part)) if rows is None else torch.from_numpy(rows)
    by_length = feat[part.item_list_length_field][numbers].argsort(stable=True)  # little padding
    step = min(loader.step, max(1, _MAX_SCORES // part.item_num))
    shard = by_length[distributed.process_rank() :: distributed.world_size()]

    def score_batches() -> Iterator[ScoredBatch]:
        for batch in show_progress(shard.split(step) if len(shard) else ()):
            interaction = loader.collate_fn(numbers[batch].numpy())[0]
            yield score(interaction), _find_seen_items(interaction, part)
        if take_part is not None:
            for _ in range(_count_missing_batches(len(numbers), step)):
                take_part()

    items = rank_batches(score_batches(), max(loader.config["topk"]), protocols)
    order = distributed.gather_rows(shard).argsort()
    for protocol, top in items.items():
        items[protocol] = distributed.gather_rows(torch.from_numpy(top))[order].numpy()
    owners = feat[part.owner_field][numbers].numpy()
    returning = part.histories.target_returns(owners, part.part)
    return Ranking(feat[part.iid_field][numbers].numpy(), returning, items)


def _count_missing_batches(n_rows: int, step: int) -> int:
    """How many batches of `step` rows the main process has more than this one."""
    n, rank = distributed.world_size(), distributed.process_rank()
    most, own = (len(range(first, n_rows, n)) for first in (0, rank))
    return -(-most // step) - -(-own // step)
