"""Interaction data on top of RecBole's SequentialDataset: reading, time order, training rows.

Validation and test rows are RecBole's own; what changes is how the file is read (errors that
name file and line), in which order equal-looking times stand, and how many rows carry the
training targets.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from m2rec import atomic
from m2rec.compat import (
    Config,
    FeatureSource,
    FeatureType,
    Interaction,
    SequentialDataset,
)
from m2rec.settings import RunSettings


class HistoryDataset(SequentialDataset):
    """A SequentialDataset with `rows` and `time_order`, for leave-one-out evaluation.

    Attributes:
        rows: `dense`: one training row per window of at most MAX_ITEM_LIST_LENGTH items,
            trained at all its positions; `prefix`: one row per target, as stock RecBole.
        time_order: `exact`: by full-precision time, ties in file order; `recbole`: by time
            as float32, as stock RecBole.
        counts: users, items and interactions after filtering.
        histories: each user's items in order.
    """

    inter_feat: Any  # a DataFrame while it is filtered, an Interaction once there are rows

    def __init__(self, config: Config) -> None:
        settings = RunSettings.read(config)
        self.rows, self.time_order = settings.rows, settings.time_order
        self.counts: dict[str, int] = {}
        self.histories: Histories | None = None
        self._train_items: Counter[int] | None = None
        super().__init__(config)

    def _download(self) -> None:
        atomic.download(
            self.dataset_name, Path(self.dataset_path), self._get_download_url("url", allow_none=True)
        )

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        path = Path(dataset_path) / f"{token}.inter"
        if not path.is_file():
            raise ValueError(
                f"dataset: {token!r} has no file {path}; put it there, or set data_path to the "
                f"folder that holds {token}/{token}.inter"
            )
        super()._load_inter_feat(token, dataset_path)

    def _load_feat(self, filepath: str, source: FeatureSource) -> pd.DataFrame:
        """Read interactions with our reader; the rest, and sequence columns, with RecBole's."""
        if source != FeatureSource.INTERACTION:
            return super()._load_feat(filepath, source)
        path, separator = Path(filepath), self.config["field_separator"]
        header = atomic.read_header(path, separator)
        load, unload = self._get_load_and_unload_col(source)
        wanted = [c for c in header if (load is None or c in load) and c not in (unload or ())]
        required = {"USER_ID_FIELD": "token", "ITEM_ID_FIELD": "token", "TIME_FIELD": "float"}
        for key, kind in required.items():
            atomic.require_column(path, header, key, self.config[key], kind)
            if self.config[key] not in wanted:
                raise ValueError(f"load_col: {self.config[key]!r} ({key}) is left out; add it to inter")
        if load is not None and (unknown := sorted(set(load) - set(header))):
            raise ValueError(f"load_col: {path} has no column {unknown[0]!r}, only {', '.join(header)}")
        if any(header[c].endswith("_seq") for c in wanted):
            return super()._load_feat(filepath, source)
        for column in wanted:
            kind = FeatureType(header[column])
            self.field2source[column], self.field2type[column] = source, kind
            self.field2seqlen[column] = 1
            if kind == FeatureType.FLOAT:
                self.field2bucketnum[column] = 2
        return atomic.read_interactions(path, separator, header, wanted, self.time_field)

    def _data_filtering(self) -> None:
        before = self._count()
        if not before["interactions"]:
            raise ValueError(f"dataset: {self.dataset_name!r} holds no interactions, only a header")
        try:
            super()._data_filtering()
        except ValueError:
            if len(self.inter_feat):
                raise
        self.counts = self._count()
        if not self.counts["interactions"]:
            raise ValueError(
                f"dataset: nothing of {self.dataset_name!r} is left after filtering ({_in_words(before)} "
                f"before, {_in_words(self.counts)} after); loosen user_inter_num_interval, "
                f"item_inter_num_interval or val_interval"
            )
        longest = int(self.inter_feat[self.uid_field].value_counts().max())
        if longest < 3:
            raise ValueError(
                f"dataset: nobody in {self.dataset_name!r} has three interactions (the most is {longest}; "
                f"{_in_words(self.counts)}); one is needed to start from, one to train and one to test"
            )

    def _count(self) -> dict[str, int]:
        feat = self.inter_feat
        return {
            "users": int(feat[self.uid_field].nunique()),
            "items": int(feat[self.iid_field].nunique()),
            "interactions": len(feat),
        }

    def _change_feat_format(self) -> None:
        """Sort by exact time before RecBole rounds it to float32; its own sorts are stable."""
        if self.time_order == "exact":
            self.inter_feat = self.inter_feat.sort_values(self.time_field, kind="stable", ignore_index=True)
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """Make the rows: stock RecBole's for `prefix`, windows for `dense`."""
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        self.histories = Histories(
            self.inter_feat[self.uid_field].numpy(), self.inter_feat[self.iid_field].numpy()
        )
        if self.rows == "prefix":
            super().data_augmentation()
        else:
            self._make_windows()

    def _make_windows(self) -> None:
        """One row per window for training, then RecBole's validation and test row per user.

        A row with target position t holds the history [max(start, t - L), t), exactly the
        slice that stock RecBole gives that target; windows end at the last training target
        and go back in steps of L, so that each training target is at one position of one row.
        """
        self._aug_presets()
        length = self.max_item_list_len
        uid = self.inter_feat[self.uid_field].numpy()
        items = self.inter_feat[self.iid_field].numpy()
        start, end = self.histories.bounds  # type: ignore[union-attr]
        used = end - start >= 2  # a single interaction has nothing before it
        start, end = start[used], end[used]
        last_train = end - 1 - np.minimum(2, end - start - 2)

        rows = [
            np.r_[np.arange(last, first, -length)[::-1], np.arange(last + 1, stop)]
            for first, last, stop in zip(start, last_train, end, strict=True)
        ]
        target = np.concatenate(rows)
        row_start = np.repeat(start, [len(r) for r in rows])
        begin = np.maximum(row_start, target - length)
        position = np.arange(length)
        index = torch.from_numpy(np.minimum(begin[:, None] + position, len(uid) - 1))
        valid = torch.from_numpy(position < (target - begin)[:, None])

        # stock order of users in validation and test: time of their second interaction
        second = self.inter_feat[self.time_field].numpy()[start + 1]
        self._user_order = uid[start][np.argsort(second, kind="stable")]
        trained = np.zeros(len(uid) + 1, dtype=np.int64)
        np.add.at(trained, start + 1, 1)
        np.add.at(trained, last_train + 1, -1)
        self._train_items = Counter(items[trained.cumsum()[:-1] > 0].tolist())

        data = self.inter_feat[target]
        columns = {self.item_list_length_field: torch.from_numpy(target - begin)}
        for column in self.inter_feat:
            if column != self.uid_field:
                value = self.inter_feat[column]
                if value.dim() != 1:
                    raise ValueError(
                        f"rows: 'dense' can't carry sequence column {column!r}; set rows: prefix"
                    )
                zero = torch.zeros((), dtype=value.dtype)
                columns[getattr(self, f"{column}_list_field")] = torch.where(valid, value[index], zero)
        data.update(Interaction(columns))
        self.inter_feat = data

    def _grouped_index(self, group_by_list: np.ndarray) -> object:
        if self.rows == "prefix":
            return super()._grouped_index(group_by_list)
        groups: dict[int, list[int]] = {user: [] for user in self._user_order}
        for i, user in enumerate(group_by_list):
            groups[user].append(i)
        return groups.values()

    @property
    def n_targets(self) -> int:
        """Training targets in these rows: one per prefix row, one per position of a dense row."""
        if self.rows == "prefix":
            return len(self)
        return int(self.inter_feat[self.item_list_length_field].sum())

    def build(self) -> list["HistoryDataset"]:
        """Split into training, validation and test rows."""
        train, valid, test = super().build()
        train.is_train = True
        return [train, valid, test]

    def counter(self, column: str) -> Counter[int]:
        """How often each value occurs as a target; dense training rows count all their targets."""
        if getattr(self, "is_train", False) and self.rows == "dense" and column == self.iid_field:
            assert self._train_items is not None
            return self._train_items
        counts: Counter[int] = super().counter(column)
        return counts


class Histories:
    """Every user's items in order, for removing them from a ranking.

    Args:
        users: (n,) user ids, sorted.
        items: (n,) item ids, each user's in order.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray) -> None:
        starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
        self.items = items.copy()
        self.bounds = (starts, np.r_[starts[1:], len(users)])
        self._row = {int(user): i for i, user in enumerate(users[starts])}

    def before(self, users: np.ndarray, n_last: int) -> tuple[np.ndarray, np.ndarray]:
        """All items but each user's last `n_last`, as (index into users, item) pairs."""
        rows = np.array([self._row[int(user)] for user in users], dtype=np.int64)
        start, end = self.bounds[0][rows], self.bounds[1][rows] - n_last
        lengths = np.maximum(end - start, 0)
        owner = np.repeat(np.arange(len(users)), lengths)
        offset = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        return owner, self.items[np.repeat(start, lengths) + offset]


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
