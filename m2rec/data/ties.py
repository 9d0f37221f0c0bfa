"""Ties: interactions of one user at the same time. Their order, and what it gives away.

letter  meaning
n       interactions
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from m2rec.data.columns import hash_tokens


def hash_interactions(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray,
    user_tokens: Sequence[str],
    item_tokens: Sequence[str],
) -> np.ndarray:
    """A hash of each interaction's user, item and time, (n,): the random order of ties.

    The hash depends on neither a seed nor the order of the file, so every run on the same interactions
    orders ties alike. The user is part of it, so no two items have an order that holds for all users.

    Args:
        users, items: (n,) internal ids.
        times: (n,).
        user_tokens, item_tokens: the tokens of the file by internal id.
    """
    columns = {
        "user": hash_tokens(user_tokens)[users],
        "item": hash_tokens(item_tokens)[items],
        "time": times,
    }
    hashes = pd.util.hash_pandas_object(pd.DataFrame(columns), index=False)
    return np.asarray(hashes)


@dataclass(frozen=True)
class Ties:
    """Which interactions share their time with the one before, in the order of the histories.

    Attributes:
        with_previous: (n,) booleans; the same user and the same time.
    """

    with_previous: np.ndarray

    @classmethod
    def find(cls, users: np.ndarray, times: np.ndarray) -> "Ties":
        """The ties of interactions that are sorted by user and time.

        Args:
            users, times: (n,) each.
        """
        with_previous = np.zeros(len(users), dtype=bool)
        with_previous[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
        return cls(with_previous)

    @property
    def n_tied(self) -> int:
        """Interactions that share their time with another one of the same user."""
        with_next = np.append(self.with_previous[1:], False)
        return int((self.with_previous | with_next).sum())

    def measure_ascending_share(self, items: np.ndarray, item_tokens: Sequence[str]) -> float | None:
        """The share of tied neighbours of which the second has the larger item id in the file.

        About a half where the order of ties says nothing. None without two different tied neighbours.

        Args:
            items: (n,) internal ids, in the order of the histories.
            item_tokens: the tokens of the file by internal id, padding's first.
        """
        rank = _rank_tokens(item_tokens)
        second = np.flatnonzero(self.with_previous)
        step = rank[items[second]] - rank[items[second - 1]]
        n_different = np.count_nonzero(step)
        return np.count_nonzero(step > 0) / n_different if n_different else None


def _rank_tokens(tokens: Sequence[str]) -> np.ndarray:
    """The position of each token in their order: as numbers if all are, else as texts; padding's is 0."""
    ids = range(1, len(tokens))
    if all(tokens[i].isdecimal() for i in ids):
        ordered = sorted(ids, key=lambda i: int(tokens[i]))
    else:
        ordered = sorted(ids, key=tokens.__getitem__)
    rank = np.zeros(len(tokens), dtype=np.int64)
    rank[ordered] = np.arange(1, len(tokens))
    return rank
