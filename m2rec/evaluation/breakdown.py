"""Metrics by popularity of the target and by length of the history."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import RANK_METRICS, IntArray, RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking
from m2rec.storage import write_text


@dataclass(frozen=True)
class Buckets:
    """Ranges of whole numbers.

    Attributes:
        low: the smallest number.
        ends: the last number of each bucket but the last one, which is open.
    """

    low: int
    ends: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """A number, a range such as `6-20`, and `101+` for the last bucket."""
        names = []
        low = self.low
        for end in self.ends:
            names.append(f"{low}-{end}" if low < end else str(end))
            low = end + 1
        return [*names, f"{low}+"]

    def assign_numbers(self, numbers: IntArray) -> IntArray:
        """Index of each number's bucket."""
        return np.searchsorted(self.ends, numbers)

    def group_numbers(self, numbers: IntArray) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        """Name of each bucket that has a number, and which numbers are in it."""
        assigned = self.assign_numbers(numbers)
        for index in np.unique(assigned):
            yield self.names[index], assigned == index


POPULARITY_BUCKETS = Buckets(0, (0, 5, 20, 100))
HISTORY_BUCKETS = Buckets(1, (5, 20, 50, 200))


@dataclass(frozen=True)
class Breakdown:
    """The rows of a part.

    Attributes:
        part: `test` or `valid`.
        users, items: (n,), tokens of user and target.
        popularity: (n,), how often the target is in the training data.
        history: (n,), how many items the user had before the target.
        returning: (n,), whether the target is one of them.
        target_ranks: for ALL and UNSEEN, (n,) rank of the target, 0 if it is not in the top K.
    """

    part: str
    users: np.ndarray
    items: np.ndarray
    popularity: IntArray
    history: IntArray
    returning: NDArray[np.bool_]
    target_ranks: dict[Protocol, IntArray]

    @classmethod
    def from_ranking(cls, ranking: Ranking, dataset: HistoryDataset) -> "Breakdown":
        """Describe the rows of a ranking of this part."""
        histories, part = dataset.histories, dataset.part
        assert histories is not None and part is not None
        users = dataset.inter_feat[dataset.uid_field].numpy()
        owners = dataset.inter_feat[dataset.owner_field].numpy()
        return cls(
            part,
            dataset.field2id_token[dataset.uid_field][users],
            dataset.field2id_token[dataset.iid_field][ranking.targets],
            histories.training_counts(dataset.item_num)[ranking.targets],
            histories.lengths_before_target(owners, part),
            ranking.returning,
            {protocol: ranking.select_rows(protocol)[0] for protocol in ranking.items},
        )

    def metrics_by_bucket(self, topk: Iterable[int], digits: int) -> dict[str, dict[str, dict[str, Any]]]:
        """Number of users and metrics of each bucket that has any.

        Returns:
            `popularity` and `history` -> bucket, such as `6-20` -> `users`, and `test`, `test_unseen`
            and `test_new` with Hit, NDCG and MRR; `test_new` is of `new_users` users, empty without any.
        """
        table: dict[str, dict[str, dict[str, Any]]] = {"popularity": {}, "history": {}}
        for bucket, rows in POPULARITY_BUCKETS.group_numbers(self.popularity):
            table["popularity"][bucket] = self._bucket_metrics(rows, topk, digits)
        for bucket, rows in HISTORY_BUCKETS.group_numbers(self.history):
            table["history"][bucket] = self._bucket_metrics(rows, topk, digits)
        return table

    def _bucket_metrics(self, rows: NDArray[np.bool_], topk: Iterable[int], digits: int) -> dict[str, Any]:
        new = rows & ~self.returning
        ranks = {protocol: ranks[rows] for protocol, ranks in self.target_ranks.items()}
        ranks[Protocol.NEW] = self.target_ranks[Protocol.UNSEEN][new]
        metrics: dict[str, Any] = {"users": int(rows.sum()), "new_users": int(new.sum())}
        for protocol, values in ranks.items():
            name = protocol.get_name(self.part)
            metrics[name] = compute_metrics(RankedLists(values), RANK_METRICS, topk, digits=digits)
        return metrics

    def write_csv(self, path: Path) -> None:
        """Write a line per row: user, target, history, popularity, returning, and the rank by protocol."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        protocols = [protocol.get_name(self.part) for protocol in self.target_ranks]
        writer.writerow(["user", "item", "history", "popularity", "returning", *protocols])
        facts = (self.users, self.items, self.history, self.popularity, self.returning.astype(int))
        writer.writerows(zip(*facts, *self.target_ranks.values(), strict=True))
        write_text(path, text.getvalue())
