"""Recommendations for the DataFrames of a cluster, partition by partition.

Spark's mapInPandas and Dask's map_partitions take `recommend_partitions` as it is. Each worker loads the run
once.
"""

from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from m2rec.serving.batch_files import HISTORY_COLUMN, USER_COLUMN, parse_history, parse_user
from m2rec.serving.recommender import Recommender

if TYPE_CHECKING:
    import pandas as pd

SPARK_SCHEMA = "user string, items array<string>, scores array<float>"
"""Of what `recommend_partitions` returns, for mapInPandas."""

_loading = Lock()


def recommend_partitions(
    histories: Any,
    run: str,
    k: int = 10,
    exclude_seen: bool | None = None,
    skip_unknown: bool = False,
    device: str = "cpu",
) -> Any:
    """Rank all items after each history of one partition, or of each of several.

    Args:
        histories: a DataFrame of pandas as Dask gives it, or an iterator of them as Spark does. The columns
            are `user` and `history`, a list of item tokens, oldest first; others are ignored.
        run: a run folder that every worker can read.
        k, exclude_seen, skip_unknown: as for `Recommender.recommend`.
        device: of the network.

    Returns:
        One DataFrame, or an iterator of them, with the index of the histories and the columns `user`, and
        `items` and `scores`, lists with the best first.

    Raises:
        ValueError: the run can't be loaded, or a history has no user, no list of tokens or an unknown item.
    """

    def rank(frame: "pd.DataFrame") -> "pd.DataFrame":
        return _rank_frame(frame, run, k, exclude_seen, skip_unknown, device)

    return rank(histories) if hasattr(histories, "columns") else map(rank, histories)


def _rank_frame(
    frame: "pd.DataFrame", run: str, k: int, exclude_seen: bool | None, skip_unknown: bool, device: str
) -> "pd.DataFrame":
    import pandas as pd

    users, histories = [], []
    cells = frame[[USER_COLUMN, HISTORY_COLUMN]].astype(object)
    cells = cells.where(cells.notna(), None)  # pandas has several missing values
    for number, (user, history) in enumerate(zip(cells[USER_COLUMN], cells[HISTORY_COLUMN], strict=True)):
        where = f"row {number} of a partition"
        users.append(parse_user(where, user))
        histories.append(parse_history(where, history))
    items, scores = [], []
    if users:  # Dask asks with an empty frame, where there may be no run
        recommender = load_once(run, device)
        for ranking in recommender.recommend_batch(
            histories, k, exclude_seen=exclude_seen, skip_unknown=skip_unknown
        ):
            items.append([entry.item for entry in ranking])
            scores.append([entry.score for entry in ranking])
    columns = {"user": users, "items": items, "scores": scores}
    return pd.DataFrame(columns, index=frame.index, dtype=object if not users else None)


def load_once(run: str, device: str) -> Recommender:
    """The recommender of a run, loaded by the first of a process's threads that asks."""
    with _loading:
        return _load(run, device)


@lru_cache(maxsize=1)
def _load(run: str, device: str) -> Recommender:
    return Recommender.load(run, device)
