"""Ranking all items for each row, with the user's history in the ranking and without it.

letter  meaning
b, n    rows of a batch, of a part
V       items including padding
K       length of the ranking that is kept, the largest cut-off of the metrics
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
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
        if protocol is Protocol.NEW:
            rows, items = ~self.returning, self.items[Protocol.UNSEEN]
        else:
            rows, items = np.ones_like(self.returning), self.items[protocol]
        return find_target_ranks(items[rows], self.targets[rows]), items[rows]


def find_target_ranks(items: IntArray, targets: IntArray) -> IntArray:
    """Rank of each target, its position in the top-K list from 1; 0 where it is not in the list.

    This is the only rule for ranks: items of equal score are in the order in which `torch.topk` lists them.

    Args:
        items: (n, K), as `select_top_items` returns them.
        targets: (n,).
    """
    is_target = items == targets[:, None]
    return np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1, 0)


def select_top_items(scores: Tensor, k: int) -> IntArray:
    """Ids of the best items of scores (b, V), (b, k); 0 where only masked items are left."""
    top = scores.topk(min(k, scores.shape[1]))
    items = top.indices.masked_fill(top.values == -torch.inf, NO_ITEM)
    return np.asarray(F.pad(items, (0, k - items.shape[1]), value=NO_ITEM).cpu())


def compute_full_ranks(scores: Tensor, items: IntArray, targets: Tensor) -> IntArray:
    """Rank of each target among all items; 0 where its score is -inf.

    Within the top-K list a rank is that of `find_target_ranks`; below, ties count against the target.

    Args:
        scores: (b, V).
        items: (b, K), their top-K items.
        targets: (b,).
    """
    target_scores = scores.gather(1, targets.to(scores.device)[:, None])
    below = (scores >= target_scores).sum(1).masked_fill(target_scores[:, 0] == -torch.inf, 0)
    ranks = find_target_ranks(items, targets.cpu().numpy())
    return np.where(ranks > 0, ranks, below.cpu().numpy())


def mask_seen(scores: Tensor, rows: IntArray, items: IntArray) -> None:
    """Set the scores of items in the history to -inf, so that they are not recommended.

    Args:
        scores: (b, V), changed in place.
        rows, items: (m,), row of `scores` and id of the item.
    """
    device = scores.device
    scores[torch.from_numpy(rows).to(device), torch.from_numpy(items).to(device)] = -torch.inf


def mask_history_scores(scores: Tensor, interaction: Interaction, part: HistoryDataset) -> None:
    """`mask_seen` for the whole history before each row's target."""
    mask_seen(scores, *_find_seen_items(interaction, part))


def _find_seen_items(interaction: Interaction, part: HistoryDataset) -> tuple[IntArray, IntArray]:
    assert part.histories is not None and part.part is not None
    return part.histories.items_before_target(interaction[part.owner_field].cpu().numpy(), part.part)


ScoredBatch = tuple[Tensor, Callable[[], tuple[IntArray, IntArray]]]
"""Scores (b, V), and a function that finds what the rows have seen, as `mask_seen` takes it."""


@torch.no_grad()
def rank_batches(
    batches: Iterable[ScoredBatch], k: int, with_unseen: bool = True
) -> dict[Protocol, IntArray]:
    """Top-K items under ALL and UNSEEN, (n, K) each, for all rows in the order of the batches.

    Args:
        batches: scored rows.
        k: K.
        with_unseen: whether to rank under UNSEEN, too, and not only under ALL.
    """
    nothing = np.empty((0, k), dtype=np.int64)
    everything, unseen = [nothing], [nothing]
    for scores, find_seen in batches:
        everything.append(select_top_items(scores, k))
        if with_unseen:
            mask_seen(scores, *find_seen())
            unseen.append(select_top_items(scores, k))
    items = {Protocol.ALL: np.concatenate(everything)}
    if with_unseen:
        items[Protocol.UNSEEN] = np.concatenate(unseen)
    return items


def rank_rows(
    score: Callable[[Interaction], Tensor],
    loader: Any,
    show_progress: Callable[[Iterable[Tensor]], Iterable[Tensor]],
    with_unseen: bool = True,
) -> Ranking:
    """Rank all items for every row of a part; the rows are sharded across processes.

    Args:
        score: rows -> (b, V) scores, padding's -inf.
        loader: the part's loader, of a `HistoryDataset`.
        show_progress: wraps the batches of row numbers.
        with_unseen: as in `rank_batches`.
    """
    part: HistoryDataset = loader.dataset
    assert part.histories is not None and part.part is not None
    by_length = part.inter_feat[part.item_list_length_field].argsort(stable=True)  # little padding
    shard = by_length[distributed.process_rank() :: distributed.world_size()]

    def score_batches() -> Iterator[ScoredBatch]:
        for rows in show_progress(shard.split(loader.step) if len(shard) else ()):
            interaction = loader.collate_fn(rows.numpy())[0]
            yield score(interaction), partial(_find_seen_items, interaction, part)

    items = rank_batches(score_batches(), max(loader.config["topk"]), with_unseen)
    order = distributed.gather_rows(shard).argsort()
    for protocol, top in items.items():
        items[protocol] = distributed.gather_rows(torch.from_numpy(top))[order].numpy()
    owners = part.inter_feat[part.owner_field].numpy()
    returning = part.histories.target_returns(owners, part.part)
    return Ranking(part.inter_feat[part.iid_field].numpy(), returning, items)
