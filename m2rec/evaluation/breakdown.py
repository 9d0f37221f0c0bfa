"""The rows of a part, and metrics by popularity of the target and by length of the history."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.metrics import RANK_METRICS, BoolArray, IntArray, RankedLists, compute_metrics
from m2rec.evaluation.protocols import Protocol
from m2rec.evaluation.ranking import Ranking

MetricsByBucket = dict[str, dict[str, Any]]


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

    def group_numbers(self, numbers: IntArray) -> Iterator[tuple[str, BoolArray]]:
        """Name of each bucket that has a number, and which numbers are in it."""
        assigned = np.searchsorted(self.ends, numbers)
        for index, name in enumerate(self.names):
            inside = assigned == index
            if inside.any():
                yield name, inside


POPULARITY_BUCKETS = Buckets(0, (0, 5, 20, 100))
HISTORY_BUCKETS = Buckets(1, (5, 20, 50, 200))


def tabulate_rows(ranking: Ranking, part: HistoryDataset) -> pd.DataFrame:
    """One line per row of a part, the columns of test_ranks.csv.

    Returns:
        `user` and `item` (the target), as tokens; `history`, how many items the user had before the target;
        `popularity`, how often the target is in the training data; `returning`, 1 if the user had the target
        before; by protocol, such as `test` and `test_unseen`, the rank of the target, 0 if not in the top K.
    """
    assert part.histories is not None and part.part is not None
    users = part.inter_feat[part.uid_field].numpy()
    owners = part.inter_feat[part.owner_field].numpy()
    columns = {
        "user": part.field2id_token[part.uid_field][users],
        "item": part.field2id_token[part.iid_field][ranking.targets],
        "history": part.histories.lengths_before_target(owners, part.part),
        "popularity": part.histories.training_counts(part.item_num)[ranking.targets],
        "returning": ranking.returning.astype(int),
    }
    for protocol in ranking.items:
        columns[protocol.get_name(part.part)] = ranking.select_rows(protocol)[0]
    return pd.DataFrame(columns)


def break_down_metrics(rows: pd.DataFrame, topk: Sequence[int], digits: int) -> dict[str, MetricsByBucket]:
    """Number of users and metrics of each bucket that has any.

    Args:
        rows: of the test part, as `tabulate_rows` returns them.
        topk: cut-offs.
        digits: decimal places of the metrics.

    Returns:
        `popularity` and `history` -> bucket, such as `6-20` -> `users`, and `test`, `test_unseen` and
        `test_new` with Hit, NDCG and MRR; `test_new` is of `new_users` users, empty without any.
    """
    table: dict[str, MetricsByBucket] = {}
    for column, buckets in (("popularity", POPULARITY_BUCKETS), ("history", HISTORY_BUCKETS)):
        table[column] = {}
        for bucket, inside in buckets.group_numbers(rows[column].to_numpy()):
            table[column][bucket] = _measure_bucket(rows[inside], topk, digits)
    return table


def _measure_bucket(rows: pd.DataFrame, topk: Sequence[int], digits: int) -> dict[str, Any]:
    new = rows[rows["returning"] == 0]
    metrics: dict[str, Any] = {"users": len(rows), "new_users": len(new)}
    all_name, unseen_name, new_name = (protocol.get_name("test") for protocol in Protocol)
    ranks = {all_name: rows[all_name], unseen_name: rows[unseen_name], new_name: new[unseen_name]}
    for name, column in ranks.items():
        lists = RankedLists(column.to_numpy())
        metrics[name] = compute_metrics(lists, RANK_METRICS, topk, digits=digits)
    return metrics
