"""Every user's interactions in order, and which of them are trained, validated and tested.

letter  meaning
n, m    interactions, users
"""

from dataclasses import dataclass, field

import numpy as np

NO_TARGET = -1


@dataclass(frozen=True)
class Split:
    """Where each user's targets lie, as positions in the sorted interactions.

    Attributes:
        train_stop: (m,), a user's interactions before it are for training; the first of them is
            only input.
        train_start: (m,), those before it are not counted by `Histories.training_counts`; None for none.
        targets: `valid` and `test`, (m,) each: the position of the target, -1 for none.
    """

    train_stop: np.ndarray
    targets: dict[str, np.ndarray]
    train_start: np.ndarray | None = None


def split_leave_one_out(start: np.ndarray, end: np.ndarray) -> Split:
    """A user's last item is tested, the one before it validated, as RecBole cuts them.

    With three interactions there is one to train and one to test, with two one to train.

    Args:
        start, end: (m,), each user's interactions are [start, end).
    """
    length = end - start
    test = np.where(length >= 3, end - 1, NO_TARGET)
    valid = np.where(length >= 4, end - 2, NO_TARGET)
    return Split(end - np.clip(length - 2, 0, 2), {"valid": valid, "test": test})


def split_by_time(start: np.ndarray, end: np.ndarray, n_train: np.ndarray, n_valid: np.ndarray) -> Split:
    """One moment ends everybody's training and another one validation.

    The target of validation and of test is a user's last item in that period, for users with
    anything before it; what they did in the period before that item is history.

    Args:
        start, end: (m,), each user's interactions are [start, end).
        n_train: (m,), how many of them lie before the first moment.
        n_valid: (m,), how many of them lie between the two.
    """
    train_stop, valid_stop = start + n_train, start + n_train + n_valid
    valid = np.where((n_valid > 0) & (valid_stop - start >= 2), valid_stop - 1, NO_TARGET)
    test = np.where((end > valid_stop) & (end - start >= 2), end - 1, NO_TARGET)
    return Split(train_stop, {"valid": valid, "test": test})


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

    def __post_init__(self) -> None:
        self.start = np.flatnonzero(np.r_[True, self.owner[1:] != self.owner[:-1]])
        self.end = np.r_[self.start[1:], len(self.owner)]
        self.users = self.owner[self.start]
        self.split = split_leave_one_out(self.start, self.end)

    def lengths_before_target(self, users: np.ndarray, part: str) -> np.ndarray:
        """How many items each of these users had before the target of `part`."""
        rows = np.searchsorted(self.users, users)
        return np.asarray(self.split.targets[part][rows] - self.start[rows])

    def items_before_target(self, users: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """All items before each user's target of `part`, as (index into users, item) pairs."""
        start, lengths = (
            self.start[np.searchsorted(self.users, users)],
            self.lengths_before_target(users, part),
        )
        owner = np.repeat(np.arange(len(users)), lengths)
        offset = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return owner, self.items[np.repeat(start, lengths) + offset]

    def target_returns(self, users: np.ndarray, part: str) -> np.ndarray:
        """Whether each user's target of `part` is among the items before it, (len(users),)."""
        targets = self.items[self.split.targets[part][np.searchsorted(self.users, users)]]
        owner, items = self.items_before_target(users, part)
        return np.bincount(owner[items == targets[owner]], minlength=len(users)) > 0

    def training_counts(self, n_items: int) -> np.ndarray:
        """How often training meets each item, as input or target, (n_items,).

        Who has a single interaction is not trained on.
        """
        stop = np.where(self.split.train_stop - self.start >= 2, self.split.train_stop, self.start)
        start = self.start if self.split.train_start is None else np.minimum(self.split.train_start, stop)
        return self._count_items(start, stop, n_items)

    def count_training_targets(self, n_items: int) -> np.ndarray:
        """How often each item is a target of training, (n_items,)."""
        first = self.start + 1
        if self.split.train_start is not None:
            first = np.maximum(first, self.split.train_start)
        stop = np.maximum(first, self.split.train_stop)
        return self._count_items(first, stop, n_items)

    def _count_items(self, start: np.ndarray, stop: np.ndarray, n_items: int) -> np.ndarray:
        """How often each item is in the intervals [start, stop), which don't overlap."""
        steps = np.zeros(len(self.items) + 1, dtype=np.int64)
        np.add.at(steps, start, 1)
        np.add.at(steps, stop, -1)
        return np.bincount(self.items[steps.cumsum()[:-1] > 0], minlength=n_items)
