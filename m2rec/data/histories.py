"""Every user's interactions in order, and which of them are trained, validated and tested.

letter  meaning
n, m    interactions, users
B, L    batch, sequence length
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from m2rec.data.id_arrays import choose_id_type, count_ids

NO_TARGET = -1
_USERS_AT_ONCE = 1 << 13  # whose histories are in memory


@dataclass(frozen=True)
class Split:
    """Where each user's targets lie, as positions in the sorted interactions.

    Attributes:
        train_start: (m,), interactions before it are excluded from `Histories.training_counts`.
        train_stop: (m,), a user's interactions before it are for training; the first one has no target.
        targets: `valid` and `test`, (m,) each: the position of the target, -1 for none.
    """

    train_start: np.ndarray
    train_stop: np.ndarray
    targets: dict[str, np.ndarray]


def split_leave_one_out(start: np.ndarray, end: np.ndarray) -> Split:
    """A user's last item is tested, the one before it validated, as RecBole cuts them.

    With three interactions there is one to train and one to test, with two one to train.

    Args:
        start, end: (m,), each user's interactions are [start, end).
    """
    length = end - start
    test = np.where(length >= 3, end - 1, NO_TARGET)
    valid = np.where(length >= 4, end - 2, NO_TARGET)
    n_held_out = np.clip(length - 2, 0, 2)
    return Split(start, end - n_held_out, {"valid": valid, "test": test})


def split_by_time(start: np.ndarray, end: np.ndarray, n_train: np.ndarray, n_valid: np.ndarray) -> Split:
    """One moment ends all users' training and another one validation.

    The target of validation and of test is a user's last item in that period, for users with
    anything before it; the user's items in the period before that item are history.

    Args:
        start, end: (m,), each user's interactions are [start, end).
        n_train: (m,), how many of them lie before the first moment.
        n_valid: (m,), how many of them lie between the two.
    """
    train_stop = start + n_train
    valid_stop = train_stop + n_valid
    has_valid = (n_valid > 0) & (valid_stop - start >= 2)
    has_test = (end > valid_stop) & (end - start >= 2)
    valid = np.where(has_valid, valid_stop - 1, NO_TARGET)
    test = np.where(has_test, end - 1, NO_TARGET)
    return Split(start, train_stop, {"valid": valid, "test": test})


def concatenate_ranges(start: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[start[0], ..., start[0] + lengths[0] - 1, start[1], ...], (sum of lengths,)."""
    first = np.cumsum(lengths) - lengths  # where each range begins in the result
    return np.asarray(np.arange(lengths.sum()) + np.repeat(start - first, lengths))


@dataclass
class Histories:
    """Every user's items in order.

    Args:
        owner: (n,) user ids, sorted.
        items: (n,) item ids, each user's in order.

    Attributes:
        users: (m,) the distinct user ids.
        start, end: (m,), each user's items are items[start:end].
        split: which of them are targets of what.
    """

    owner: np.ndarray
    items: np.ndarray
    split: Split = field(init=False)
    _returns: dict[str, tuple[np.ndarray, np.ndarray]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        is_first = np.append(True, self.owner[1:] != self.owner[:-1])
        self.start = np.flatnonzero(is_first).astype(choose_id_type(len(self.owner)))
        self.end = np.append(self.start[1:], self.start.dtype.type(len(self.owner)))
        self.users = self.owner[self.start]
        self.split = split_leave_one_out(self.start, self.end)

    def lengths_before_target(self, users: np.ndarray, part: str) -> np.ndarray:
        """How many items each of these users had before the target of `part`."""
        start, target = self._find_histories(users, part)
        lengths: np.ndarray = target - start
        return lengths

    def items_before_target(self, users: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """All items before each user's target of `part`, as (index into users, item) pairs of int64."""
        start, target = self._find_histories(users, part)
        lengths = target - start
        user_index = np.repeat(np.arange(len(users)), lengths)
        return user_index, self.items[concatenate_ranges(start, lengths)].astype(np.int64, copy=False)

    def target_returns(self, users: np.ndarray, part: str) -> np.ndarray:
        """Whether each user's target of `part` is among the items before it, (len(users),)."""
        target = self.split.targets[part]
        if part not in self._returns or self._returns[part][0] is not target:  # or of another split
            self._returns[part] = target, self._find_returns(target)
        returns: np.ndarray = self._returns[part][1][self._find_users(users)]
        return returns

    def _find_returns(self, target: np.ndarray) -> np.ndarray:
        """Whether the items before each user's target have it, (m,); not without a target."""
        returns = np.zeros(len(target), dtype=bool)
        for first in range(0, len(target), _USERS_AT_ONCE):
            some = slice(first, first + _USERS_AT_ONCE)
            start, end = self.start[some], self.end[some]
            stop = np.where(target[some] == NO_TARGET, start, target[some])
            first_item = start[0]
            is_target = self.items[first_item : end[-1]] == self.items[stop].repeat(end - start)
            n_before = np.append(0, is_target.cumsum(dtype=np.int32))
            returns[some] = n_before[stop - first_item] > n_before[start - first_item]
        return returns

    def _find_histories(self, users: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Positions of each user's first item and of the target of `part`."""
        index = self._find_users(users)
        return self.start[index], self.split.targets[part][index]

    def _find_users(self, users: np.ndarray) -> np.ndarray:
        """Where these user ids are in `users`."""
        first, last = int(self.users[0]), int(self.users[-1])
        is_whole = last - first + 1 == len(self.users)  # without a number left out
        return users - first if is_whole else np.searchsorted(self.users, users)

    def training_counts(self, n_items: int) -> np.ndarray:
        """Occurrences of each item in the training data, as input or target, (n_items,).

        Users with one training interaction are excluded.
        """
        is_trained = self.split.train_stop - self.start >= 2
        first = np.where(is_trained, self.split.train_start, self.split.train_stop)
        return self._count_training_items(first, n_items)

    def count_training_targets(self, n_items: int) -> np.ndarray:
        """How often each item is a target of training, (n_items,)."""
        return self._count_training_items(self._first_training_targets, n_items)

    @property
    def n_training_targets(self) -> int:
        """How many targets training has."""
        return int(np.maximum(self.split.train_stop - self._first_training_targets, 0).sum())

    @property
    def training_lengths(self) -> np.ndarray:
        """Items in training of each history that has a training target."""
        lengths: np.ndarray = self.split.train_stop - self.start
        return lengths[lengths >= 2]

    def measure_returning_share(self, max_histories: int) -> float:
        """The share of the targets of training and validation that their user had before.

        Args:
            max_histories: of more histories as many as this are looked at, evenly spread.
        """
        chosen = slice(None, None, -(-len(self.start) // max_histories))
        start = self.start[chosen]
        stop = np.maximum(self.split.train_stop, self.split.targets["valid"] + 1)[chosen]
        first_target = self._first_training_targets[chosen]
        lengths = stop - start
        positions = concatenate_ranges(start, lengths)
        history = np.repeat(np.arange(len(start)), lengths)
        is_target = positions >= first_target[history]
        n_items = self.items.max(initial=0) + 1
        _, first = np.unique(history * n_items + self.items[positions], return_index=True)
        is_returning = np.ones(len(positions), dtype=bool)
        is_returning[first] = False
        return float(is_returning[is_target].mean()) if is_target.any() else 0.0

    @property
    def _first_training_targets(self) -> np.ndarray:
        """(m,), position of each history's first training target, if there is one."""
        first: np.ndarray = np.maximum(self.start + 1, self.split.train_start)
        return first

    def training_pairs(self, gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Items of the training data that one user had `gap` interactions apart, as (earlier, later).

        The later one is a target of training; the same pair may be there several times.
        """
        first = np.maximum(self.start + gap, self.split.train_start)
        later = concatenate_ranges(first, np.maximum(self.split.train_stop - first, 0))
        return self.items[later - gap], self.items[later]

    def training_returns(self) -> float:
        """The share of the targets of training that their user had before."""
        stop = np.maximum(self.split.train_stop, self.start)
        positions = concatenate_ranges(self.start, stop - self.start)
        index = np.repeat(np.arange(len(self.start)), stop - self.start)
        pairs = index * (int(self.items.max()) + 1) + self.items[positions]
        _, first = np.unique(pairs, return_index=True)
        is_return = np.ones(len(pairs), dtype=bool)
        is_return[first] = False  # np.unique names the first of equal pairs
        is_target = positions >= np.maximum(self.start + 1, self.split.train_start)[index]
        return float(is_return[is_target].mean()) if is_target.any() else 0.0

    def _count_training_items(self, first: np.ndarray, n_items: int) -> np.ndarray:
        """How often each item is in the intervals [first, train_stop)."""
        stop = self.split.train_stop
        first = np.minimum(first, stop)
        before_in_after = np.stack([first - self.start, stop - first, self.end - stop], axis=1).ravel()
        is_counted = np.tile([False, True, False], len(stop)).repeat(before_in_after)
        return count_ids(self.items[is_counted], n_items)


def shift_targets(items: Tensor, lengths: Tensor, last: Tensor) -> Tensor:
    """The next item at each position of (B, L) histories, 0 where there is none.

    Args:
        items: (B, L), right-padded with 0.
        lengths: (B,).
        last: (B,), the item after each history.
    """
    targets = torch.zeros_like(items)
    targets[:, :-1] = items[:, 1:]
    return targets.scatter(1, (lengths - 1).unsqueeze(1), last.unsqueeze(1))
