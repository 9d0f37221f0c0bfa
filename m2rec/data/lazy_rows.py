"""Rows that are cut from the interactions when they are asked for.

The interactions are one flat array per column. A row is a pair of positions in them: its target and where its
history begins. So memory does not grow with L, with the number of rows per user, or with the number of parts.
Ids and positions have 4 bytes where they fit; columns that are cut have int64, as RecBole's.

letter  meaning
n, N    interactions, rows
L       sequence length
"""

from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2rec.compat import Interaction

_ROWS_AT_ONCE = 1 << 14  # whose indices are in memory


class RowColumn(NamedTuple):
    """How a column of rows is made from one of interactions."""

    source: str
    """The column of the interactions."""
    is_history: bool
    """Whether it has the history of each row, (N, L, ...), or the value at its target, (N, ...)."""


class RowColumns(MutableMapping[str, Tensor]):
    """The columns of rows by name, each cut when it is read; columns that are set are kept as they are.

    Args:
        interactions: columns, (n, ...) each, sorted by user and time.
        columns: the columns of the rows, in order.
        length_column: name of the column with the lengths of the histories, the last one.
        begin, target: (N,) positions in the interactions; a row's history is [begin, target).
        max_length: L, to which histories are padded with 0 on the right; at least that of every row.
    """

    def __init__(
        self,
        interactions: dict[str, Tensor],
        columns: dict[str, RowColumn],
        length_column: str,
        begin: np.ndarray,
        target: np.ndarray,
        max_length: int,
    ) -> None:
        self._interactions = interactions
        self._columns = columns
        self._length_column = length_column
        self._begin, self._target = begin, target
        self._max_length = max_length
        self._kept: dict[str, Tensor] = {}
        self._names = dict.fromkeys([*columns, length_column])

    @property
    def n_rows(self) -> int:
        """N."""
        return len(self._target)

    def take(self, index: Any) -> "RowColumns":
        """The rows of a slice or of an index array, not cut yet."""
        taken = RowColumns(
            self._interactions, self._columns, self._length_column,
            self._begin[index], self._target[index], self._max_length,
        )  # fmt: skip
        taken._kept = {name: values[index] for name, values in self._kept.items()}
        taken._names = dict(self._names)
        return taken

    def cut(self) -> dict[str, Tensor]:
        """All columns."""
        return {name: self[name] for name in self}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kept:
            return self._kept[name]
        if name == self._length_column:
            return _widen(torch.from_numpy(self._target - self._begin))
        column = self._columns[name]
        values = self._interactions[column.source]
        if column.is_history:
            return self._cut_histories(values)
        return _widen(values[torch.from_numpy(self._target).long()])

    def __setitem__(self, name: str, values: Tensor) -> None:
        self._kept[name] = values
        self._names[name] = None

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._kept.pop(name, None)

    def __contains__(self, name: object) -> bool:  # else the column is cut
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _cut_histories(self, values: Tensor) -> Tensor:
        """Each row's part of (n, ...) values, (N, L, ...), right-padded with 0."""
        position = np.arange(self._max_length)
        lengths = self._target - self._begin
        shape = self.n_rows, self._max_length, *values.shape[1:]
        histories = _widen(values[:0]).new_empty(shape)
        for first in range(0, self.n_rows, _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            index = np.minimum(self._begin[some, None] + position, len(values) - 1)  # int64
            histories[some] = values[torch.from_numpy(index)]
            histories[some][torch.from_numpy(position >= lengths[some, None])] = 0
        return histories


class LazyRows(Interaction):
    """Rows as RecBole's models and loaders take them.

    A slice gives rows that are not cut yet, an index array an `Interaction` with the rows in it, the name of
    a column its values.
    """

    interaction: Any  # RowColumns, until RecBole replaces it by a dict

    def __init__(self, columns: RowColumns) -> None:
        super().__init__({})
        self.interaction = columns
        self.length = columns.n_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str) or not isinstance(self.interaction, RowColumns):
            return super().__getitem__(index)
        if isinstance(index, slice):
            return LazyRows(self.interaction.take(index))
        if isinstance(index, (int, np.integer)):
            values = self.interaction.take([index]).cut()
            return Interaction({name: column[0] for name, column in values.items()})
        return Interaction(self.interaction.take(_to_array(index)).cut())

    def _reindex(self, index: Any) -> None:
        """Put the rows into another order; RecBole's `shuffle` and `sort` do it by this."""
        if isinstance(self.interaction, RowColumns):
            self.interaction = self.interaction.take(_to_array(index))
        else:
            super()._reindex(index)


def _widen(values: Tensor) -> Tensor:
    """Ids as int64, anything else as it is."""
    return values.long() if values.dtype == torch.int32 else values


def _to_array(index: Any) -> np.ndarray:
    """Row numbers or a mask as an array; an empty list has the type of row numbers."""
    array = np.asarray(index)
    return array if array.size else array.astype(np.int64)
