"""Lists of ids of different lengths in one array, because a call per list costs more than its work.

letter  meaning
B, N    lists, ids in all of them
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class IdLists:
    """B lists of ids."""

    ids: Ids
    """(N,), list after list."""
    lengths: Ids
    """(B,)."""

    @classmethod
    def build(cls, lists: Iterable[Collection[int]]) -> "IdLists":
        """From collections of ids."""
        lists = list(lists)
        lengths = np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))
        ids = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(lengths.sum()))
        return cls(ids, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def number_rows(self) -> Ids:
        """The list of each id, (N,)."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def select(self, rows: Sequence[int]) -> "IdLists":
        """These lists, in this order."""
        chosen = np.asarray(rows, dtype=np.int64)
        return self._cut(self._starts()[chosen], self.lengths[chosen])

    def truncate(self, length: int) -> "IdLists":
        """The last ids of each list, at most `length`."""
        lengths = np.minimum(self.lengths, length)
        return self._cut(self._starts() + self.lengths - lengths, lengths)

    def remove_duplicates(self) -> "IdLists":
        """Each id once per list, ascending."""
        base = self.ids.max(initial=0) + 1
        rows, ids = np.divmod(np.unique(self.number_rows() * base + self.ids), base)
        return IdLists(ids, np.bincount(rows, minlength=len(self)))

    def pad(self) -> Tensor:
        """(B, n), shorter lists padded with 0 on the right."""
        padded = np.zeros((len(self), self.lengths.max(initial=0)), dtype=np.int64)
        padded[np.arange(padded.shape[1]) < self.lengths[:, None]] = self.ids
        return torch.from_numpy(padded)

    def _starts(self) -> Ids:
        """(B,), where each list begins in `ids`."""
        return self.lengths.cumsum() - self.lengths

    def _cut(self, starts: Ids, lengths: Ids) -> "IdLists":
        """Lists (b,) that begin at `starts` in `ids`."""
        cut = IdLists(self.ids, lengths)
        shifts = np.repeat(starts - cut._starts(), lengths)
        return IdLists(self.ids[shifts + np.arange(len(shifts))], lengths)
