"""How much of each user's history a run was trained on: what a later run on longer histories has new.

Interactions are told apart by their place in the history, not by their time. So it does not matter whether
times tie, and the targets that the earlier run held out are new.

letter  meaning
m       users
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from m2rec.data.columns import hash_tokens
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import NO_TARGET, Histories

_USERS, _LENGTHS = "users", "lengths"


@dataclass(frozen=True)
class TrainingExtent:
    """The interactions that training had, which begin each user's history."""

    users: NDArray[np.uint64]
    """(m,), hashes of the user tokens, ascending."""
    lengths: NDArray[np.int64]
    """(m,), how many interactions of the user training had."""

    @classmethod
    def measure(cls, dataset: HistoryDataset) -> Self:
        """That of a run on this data, which has its `histories`."""
        assert dataset.histories is not None
        split = dataset.histories.split
        users = hash_users(dataset)
        order = users.argsort()
        lengths = np.maximum(split.train_stop - dataset.histories.start, 0)
        return cls(users[order], lengths[order].astype(np.int64))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """From what `to_tensors` returned.

        Raises:
            KeyError: one is missing.
        """
        return cls(tensors[_USERS].numpy().view(np.uint64), tensors[_LENGTHS].numpy().astype(np.int64))

    def to_tensors(self) -> dict[str, Tensor]:
        """For a file: int64 and int32, since safetensors has few unsigned numbers."""
        lengths = torch.from_numpy(self.lengths.astype(np.int32))
        return {_USERS: torch.from_numpy(self.users.view(np.int64)), _LENGTHS: lengths}

    def look_up(self, users: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The lengths for hashes of users, (n,); 0 for a user that training did not have."""
        if not len(self.users):
            return np.zeros(len(users), dtype=np.int64)
        index = np.minimum(np.searchsorted(self.users, users), len(self.users) - 1)
        return np.where(self.users[index] == users, self.lengths[index], 0)


def hash_users(dataset: HistoryDataset) -> NDArray[np.uint64]:
    """A hash of the token of each user in `histories`, (m,)."""
    assert dataset.histories is not None
    tokens = dataset.user_tokens
    return hash_tokens([tokens[user] for user in dataset.histories.users])


def find_new_rows(train: HistoryDataset, extent: TrainingExtent) -> NDArray[np.bool_]:
    """Which rows of a training part have a target that is beyond `extent`, (rows,)."""
    histories, targets = train.histories, train.row_targets
    assert histories is not None and targets is not None
    owner = np.searchsorted(histories.start, targets, side="right") - 1
    known = extent.look_up(hash_users(train))
    is_new: NDArray[np.bool_] = targets - histories.start[owner] >= known[owner]
    return is_new


def count_trained_targets(dataset: HistoryDataset, extent: TrainingExtent) -> int:
    """How many targets of validation and test `extent` has: a model that was trained on it knows them."""
    histories: Histories | None = dataset.histories
    assert histories is not None
    known = extent.look_up(hash_users(dataset))
    n_trained = 0
    for targets in histories.split.targets.values():
        n_trained += int(((targets != NO_TARGET) & (targets - histories.start < known)).sum())
    return n_trained
