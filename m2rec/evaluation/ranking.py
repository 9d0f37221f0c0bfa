"""Ranking all items for each row, with the user's history in the ranking and without it.

letter  meaning
n, V    rows, items including padding
K       length of the ranking that is kept, the longest cut of the metrics
"""

import csv
import io
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rec import distributed
from m2rec.compat import Interaction
from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import compute_rank_metric
from m2rec.storage import write_text

ALL, UNSEEN, NEW = "all", "unseen", "new"
NO_ITEM = 0  # padding, in a ranking that has no more items

# upper ends of the buckets; what lies above the last is one more
POPULARITY_BUCKETS = (0, 5, 20, 100)
HISTORY_BUCKETS = (5, 20, 50, 200)


@dataclass(frozen=True)
class Ranking:
    """What a model puts first for each row of a part.

    Attributes:
        targets: (n,) the items that were really next.
        returning: (n,), True where the user had the target before.
        items: by protocol, (n, K) the best items, best first; 0 where there are no more.
    """

    targets: Tensor
    returning: Tensor
    items: dict[str, Tensor]

    def with_new_targets(self) -> "Ranking":
        """The rows whose target is new to the user, without their history in the ranking."""
        new = ~self.returning
        return Ranking(self.targets[new], self.returning[new], {NEW: self.items[UNSEEN][new]})

    def hits(self, protocol: str) -> Tensor:
        """(n, K), True where the target stands."""
        return self.items[protocol] == self.targets[:, None]

    def target_ranks(self, protocol: str) -> np.ndarray:
        """(n,), the target's place from 1, 0 where it is not among the K."""
        hits = self.hits(protocol)
        return np.asarray(torch.where(hits.any(1), hits.int().argmax(1) + 1, 0))


@torch.no_grad()
def rank_items(
    score: Callable[[Interaction], Tensor],
    loader: Any,
    batches: Callable[[Iterable[Tensor]], Iterable[Tensor]],
    protocols: Collection[str] = (ALL, UNSEEN),
) -> Ranking:
    """Rank all items for every row of a part, in this process's share of the rows and all others'.

    Args:
        score: rows -> (b, V) scores, padding's -inf.
        loader: the part's loader, of a `HistoryDataset`.
        batches: goes through the batches of rows, for a progress bar.
        protocols: `all`, RecBole's; `unseen`, where the items that a user had before are taken out,
            the target too if it is one of them.
    """
    dataset: HistoryDataset = loader.dataset
    assert dataset.histories is not None and dataset.part is not None
    cut = max(loader.config["topk"])
    lengths = dataset.inter_feat[dataset.item_list_length_field]
    own = lengths.argsort(stable=True)[
        distributed.process_rank() :: distributed.world_size()
    ]  # alike ones together
    # `unseen` last: it takes items out of the scores for good
    names = [name for name in (ALL, UNSEEN) if name in protocols]
    found: dict[str, list[Tensor]] = {name: [torch.empty(0, cut, dtype=torch.int64)] for name in names}
    for rows in batches(own.split(loader.step) if len(own) else ()):
        interaction = loader.collate_fn(rows.numpy())[0]
        scores = score(interaction)
        for name, parts in found.items():
            if name == UNSEEN:
                mask_history_scores(scores, interaction, dataset)
            best = scores.topk(cut)
            parts.append(best.indices.masked_fill(best.values == -torch.inf, NO_ITEM).cpu())
    order = distributed.gather_rows(own).argsort()
    items = {name: distributed.gather_rows(torch.cat(parts))[order] for name, parts in found.items()}
    returning = dataset.histories.target_returns(
        dataset.inter_feat[dataset.owner_field].numpy(), dataset.part
    )
    return Ranking(dataset.inter_feat[dataset.iid_field], torch.from_numpy(returning), items)


def mask_history_scores(scores: Tensor, interaction: Interaction, dataset: HistoryDataset) -> None:
    """Set the scores of each row's earlier items to -inf: nothing of them can be recommended."""
    assert dataset.histories is not None and dataset.part is not None
    owner, items = dataset.histories.items_before_target(
        interaction[dataset.owner_field].cpu().numpy(), dataset.part
    )
    scores[torch.from_numpy(owner).to(scores.device), torch.from_numpy(items).to(scores.device)] = -torch.inf


def compute_target_ranks(scores: Tensor, targets: Tensor) -> np.ndarray:
    """Each row's place of its target from 1, the last one among equal scores; 0 where its score is -inf.

    Args:
        scores: (b, V).
        targets: (b,).
    """
    own = scores.gather(1, targets[:, None])
    places = (scores >= own).sum(1).masked_fill(own[:, 0] == -torch.inf, 0)
    return np.asarray(places.cpu())


@dataclass(frozen=True)
class Breakdown:
    """The rows of a part, for quality by popularity of the target and by length of the history.

    Attributes:
        users, items: (n,) tokens of user and target.
        popularity: (n,) how often training meets the target.
        history: (n,) how many items the user had before it.
        returning: (n,) whether the target is one of them.
        places: for `test` and `test_unseen`, (n,) the target's place in the ranking, 0 for none.
    """

    users: np.ndarray
    items: np.ndarray
    popularity: np.ndarray
    history: np.ndarray
    returning: np.ndarray
    target_ranks: dict[str, np.ndarray]

    @classmethod
    def from_ranking(cls, ranking: Ranking, dataset: HistoryDataset) -> "Breakdown":
        """Of a ranking of this part."""
        assert dataset.histories is not None and dataset.part is not None
        users = dataset.inter_feat[dataset.uid_field].numpy()
        targets = ranking.targets.numpy()
        return cls(
            dataset.field2id_token[dataset.uid_field][users],
            dataset.field2id_token[dataset.iid_field][targets],
            dataset.histories.training_counts(dataset.item_num)[targets],
            dataset.histories.lengths_before_target(
                dataset.inter_feat[dataset.owner_field].numpy(), dataset.part
            ),
            ranking.returning.numpy(),
            {"test": ranking.target_ranks(ALL), "test_unseen": ranking.target_ranks(UNSEEN)},
        )

    def metrics_by_bucket(self, topk: Iterable[int], digits: int) -> dict[str, dict[str, dict[str, Any]]]:
        """Number of users and the metrics in each bucket that has any.

        Returns:
            `popularity` and `history` -> bucket, such as `6-20` -> `users`, and `test`, `test_unseen`
            and `test_new` with Hit, NDCG and MRR; `test_new` is of those of `new_users` users, empty
            if there are none.
        """
        by = {"popularity": (self.popularity, POPULARITY_BUCKETS), "history": (self.history, HISTORY_BUCKETS)}
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for name, (values, ends) in by.items():
            low = 0 if name == "popularity" else 1
            group = np.searchsorted(ends, values)
            table[name] = {
                bucket: self._bucket_metrics(group == number, topk, digits)
                for number, bucket in enumerate(format_bucket_names(ends, low))
                if (group == number).any()
            }
        return table

    def _bucket_metrics(self, chosen: np.ndarray, topk: Iterable[int], digits: int) -> dict[str, Any]:
        new = chosen & ~self.returning
        rows = {name: places[chosen] for name, places in self.target_ranks.items()}
        rows["test_new"] = self.target_ranks["test_unseen"][new]
        metrics = {
            protocol: {
                metric: round(float(compute_rank_metric(metric, places).mean()), digits)
                for metric in (f"{name}@{k}" for name in ("hit", "ndcg", "mrr") for k in topk)
            }
            for protocol, places in rows.items()
            if len(places)
        }
        return {"users": int(chosen.sum()), "new_users": int(new.sum()), "test_new": {}, **metrics}

    def write_csv(self, path: Path) -> None:
        """One line per row: user, target, history, popularity, whether it returns, its place by protocol."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["user", "item", "history", "popularity", "returning", *self.target_ranks])
        facts = (self.users, self.items, self.history, self.popularity, self.returning.astype(int))
        columns = (*facts, *self.target_ranks.values())
        writer.writerows(zip(*columns, strict=True))
        write_text(path, text.getvalue())


def format_bucket_names(ends: tuple[int, ...], low: int) -> list[str]:
    """Names of the buckets from `low` on: a number, a range, and `101+` for the last."""
    starts = [low, *(end + 1 for end in ends)]
    names = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=False)]
    return [*names, f"{starts[-1]}+"]
