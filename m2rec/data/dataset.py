"""Training, validation and test rows of sorted interactions.

Validation and test rows are RecBole's own. What differs is how many rows carry the training targets.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rec.compat import Config, SeqSampler
from m2rec.data.histories import (
    NO_TARGET,
    Histories,
    shift_targets,
    split_by_time,
)
from m2rec.data.interactions import InteractionDataset
from m2rec.data.lazy_rows import LazyRows, RowColumn, RowColumns
from m2rec.data.max_length import choose_max_length
from m2rec.data.ties import Ties
from m2rec.data.time_statistics import (
    RecentCounts,
    count_per_period,
    count_recent_items,
)
from m2rec.errors import UserError
from m2rec.settings import get_run_settings

logger = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")
_ROWS_AT_ONCE = 1 << 14  # whose histories are in memory

# full ranking of all items, by time: the only supported evaluation
EVAL_ARGS = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"}


class HistoryDataset(InteractionDataset):
    """Sorted interactions with training, validation and test rows.

    Attributes:
        rows: `dense`: one training row per window of at most MAX_ITEM_LIST_LENGTH items,
            trained at all its positions; `prefix`: one row per target, as stock RecBole.
        split: `leave_one_out`: each user's last item is the test, the one before validation;
            `global_time`: one moment ends all users' training, another one validation.
        part: `train`, `valid` or `test` after `build`.
        ties: in the order of `histories`; None before `build`, and for files that are split already.
        histories: each user's items in order.
        row_targets: (training rows,), where in `histories` the last target of each lies; None before `build`,
            and for files that are split already.
        recent_counts: what was popular in the last days of training; None but for `split: global_time`.
        item_vectors: text vectors by item id, `text.vector_file.TextVectors`, or None; set by training.
        on_rows: called by `build` with the data set and its training part, before there are any loaders; set
            by training, which settles the keys that depend on the number of rows.
    """

    item_vectors: Any
    max_item_list_len: Any  # "auto" until the histories are known, then a number

    def __init__(self, config: Config) -> None:
        settings = get_run_settings(config)
        self.rows = settings.rows
        _check_eval_args(config)
        if config["benchmark_filename"] and type(self) is HistoryDataset:
            raise UserError(
                "benchmark_filename: HistoryDataset reads NAME.inter; use presplit.PresplitDataset"
            )
        self._split_shares = settings.valid_from, settings.test_from
        self.part: str | None = None
        self.ties: Ties | None = None
        self.histories: Histories | None = None
        self.on_rows: Callable[[HistoryDataset, HistoryDataset], None] | None = None
        self.row_targets: np.ndarray | None = None
        self.recent_counts: RecentCounts | None = None
        # set by RecBole's hooks: each user's interactions before validation and within it (`global_time`),
        # and the row after the last one of each part
        self._period_counts: tuple[np.ndarray, np.ndarray] | None = None
        self._part_ends = np.zeros(len(PARTS), dtype=np.int64)
        self._built_parts: list[HistoryDataset] = []
        super().__init__(config)

    @property
    def is_dense(self) -> bool:
        """Whether a training row is trained at all its positions."""
        return self.rows == "dense"

    @property
    def history_field(self) -> str:
        """The column of the histories, (n, L); RecBole names it after that of the items."""
        return str(getattr(self, f"{self.iid_field}_list_field"))

    @property
    def owner_field(self) -> str:
        """The column that says whose history in `histories` a row has."""
        return str(self.uid_field)

    def _change_feat_format(self) -> None:
        """Sort by user and exact time, before RecBole rounds times, then make the rows."""
        times = self._sort_interactions()
        users = self.inter_feat[self.uid_field].to_numpy()
        self.ties = Ties.find(users, times)
        if self.tie_order == "shuffled" and not self.ties.n_tied:
            logger.warning("ties: shuffled changes nothing: no user has two interactions at the same time")
        if self.split == "global_time":
            items = self.inter_feat[self.iid_field].to_numpy()
            self._period_counts = count_per_period(users, times, *self._split_shares)
            valid_from = self._split_shares[0]
            self.recent_counts = count_recent_items(users, items, times, valid_from, self.item_num)
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """Make the rows: one per target as stock RecBole for `prefix`, windows for `dense`.

        A row with target position t holds the history [max(start, t - L), t), exactly the slice
        that stock RecBole gives that target. Windows end at the last training target and go back
        in steps of L, so that each training target is at one position of one row.
        """
        users = self.inter_feat[self.uid_field].numpy()
        items = self.inter_feat[self.iid_field].numpy()
        histories = Histories(users, items)
        if self._period_counts is not None:
            own = (counts[histories.users] for counts in self._period_counts)
            n_train, n_valid = (counts.astype(histories.start.dtype) for counts in own)
            histories.split = split_by_time(histories.start, histories.end, n_train, n_valid)
        self.histories = histories
        self._settle_max_length(histories)
        self._aug_presets()  # which reads the length
        targets, starts = self._locate_targets(histories)
        self._part_ends = np.cumsum([len(part) for part in targets])
        all_targets = np.concatenate(targets)
        self.row_targets = all_targets[: len(targets[0])]
        self.inter_feat = self._list_rows(all_targets, np.concatenate(starts))

    def _settle_max_length(self, histories: Histories) -> None:
        """Replace `MAX_ITEM_LIST_LENGTH: auto` by a number, before there are rows of this length."""
        if self.max_item_list_len != "auto":
            return
        lengths = histories.training_lengths
        if not len(lengths):  # which `build` reports
            lengths = np.ones(1)
        n_prefix_rows = 0 if self.is_dense else histories.n_training_targets
        self.max_item_list_len = choose_max_length(lengths, n_prefix_rows)
        self.config["MAX_ITEM_LIST_LENGTH"] = self.max_item_list_len

    def _locate_targets(self, histories: Histories) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Positions of the targets and of their users' first items, for training, validation and test."""
        times = self.inter_feat[self.time_field].numpy()
        second = np.minimum(histories.start + 1, len(times) - 1)
        # stock order of users: time of their second interaction
        order = times[second].argsort(kind="stable")
        start = histories.start[order]
        train_stop = histories.split.train_stop[order]
        step = min(self.max_item_list_len, len(times)) if self.is_dense else 1
        n_rows = np.maximum((train_stop - start - 2) // step + 1, 0)
        rows_after = (n_rows.cumsum(dtype=n_rows.dtype) - 1).repeat(n_rows)
        rows_after -= np.arange(len(rows_after), dtype=n_rows.dtype)  # of the same user
        rows_after *= step
        targets = [(train_stop - 1).repeat(n_rows) - rows_after]
        starts = [start.repeat(n_rows)]
        for positions in histories.split.targets.values():
            target = positions[order]
            exists = target != NO_TARGET
            targets.append(target[exists])
            starts.append(start[exists])
        return targets, starts

    def _list_rows(self, target: np.ndarray, start: np.ndarray) -> LazyRows:
        """One row per target, with the history before it from `start` on, at most L items.

        Args:
            target, start: (N,), positions in the sorted interactions.
        """
        interactions = dict(self.inter_feat.interaction)
        columns = {name: RowColumn(name, is_history=False) for name in interactions}
        for name in interactions:
            if name != self.uid_field:
                columns[getattr(self, f"{name}_list_field")] = RowColumn(name, is_history=True)
        if self.config["model"] == "DIEN":
            name, negatives = self._sample_negative_lists()
            interactions[name] = negatives
            columns[name] = RowColumn(name, is_history=True)
        begin = np.maximum(start, target - min(self.max_item_list_len, len(self.inter_feat)))
        length_column = self.item_list_length_field
        return LazyRows(
            RowColumns(interactions, columns, length_column, begin, target, self.max_item_list_len)
        )

    def _sample_negative_lists(self) -> tuple[str, Tensor]:
        """A random other item for each interaction, (n,), and the column of these histories; for DIEN."""
        name = f"{self.config['NEG_PREFIX']}{self.history_field}"
        self.copy_field_property(name, self.history_field)
        items = self.inter_feat[self.iid_field].numpy()
        return name, SeqSampler(self).sample_neg_sequence(items)

    @property
    def n_targets(self) -> int:
        """Training targets in these rows: one per prefix row, one per position of a dense row."""
        if self.is_dense:
            return int(self.inter_feat[self.item_list_length_field].sum())
        return len(self)

    @property
    def n_tied(self) -> int:
        """Interactions that share their time with another one of the same user."""
        return self.ties.n_tied if self.ties else 0

    @property
    def n_tied_targets(self) -> int:
        """Targets of this part, validation or test, that share their time with the user's item before."""
        if self.ties is None:
            return 0
        assert self.histories is not None and self.part is not None
        targets = self.histories.split.targets[self.part]
        return int(self.ties.with_previous[targets[targets != NO_TARGET]].sum())

    @property
    def ascending_ties(self) -> float | None:
        """The share of tied neighbours in a history that ascend by item id; None without any."""
        if self.ties is None or self.histories is None:
            return None
        return self.ties.measure_ascending_share(self.histories.items, self.item_tokens)

    @property
    def n_returning(self) -> int:
        """Targets of this part, validation or test, that their user had before."""
        assert self.histories is not None and self.part is not None
        owners = self.inter_feat[self.owner_field].numpy()
        return int(self.histories.target_returns(owners, self.part).sum())

    def build(self) -> list["HistoryDataset"]:
        """Split into training, validation and test rows; a second call returns the same."""
        if self._built_parts:
            return self._built_parts
        self._change_feat_format()
        self._drop_unused_col()
        on_rows, self.on_rows = self.on_rows, None  # the parts, which are copies, may go to other processes
        parts: list[HistoryDataset] = []
        start = 0
        for name, stop in zip(PARTS, self._part_ends.tolist(), strict=True):
            part = self.copy(self.inter_feat[start:stop])
            part.part = name
            parts.append(part)
            start = stop
        if not len(parts[0]):
            raise UserError(
                f"split: {self.split!r} leaves no training target in {self.dataset_name!r}; "
                f"raise valid_from, or set split: leave_one_out"
            )
        if not len(parts[2]):
            raise UserError(
                f"split: {self.split!r} leaves no test target in {self.dataset_name!r}: no user has a "
                f"history and an item after test_from; lower it, or set split: leave_one_out"
            )
        self._built_parts = parts
        if on_rows is not None:
            on_rows(self, parts[0])
        return parts

    def counter(self, column: str) -> Counter[int]:
        """Count each value as a target; dense training rows count all their targets."""
        if self.part != "train" or not self.is_dense or column != self.iid_field:
            return Counter(super().counter(column))
        counts: Counter[int] = Counter()
        for rows in torch.arange(len(self)).split(_ROWS_AT_ONCE):
            feat = self.inter_feat[rows]
            lengths = feat[self.item_list_length_field]
            targets = shift_targets(feat[self.history_field], lengths, feat[self.iid_field])
            counts.update(targets[targets > 0].tolist())
        return counts


def _check_eval_args(config: Config) -> None:
    """Refuse eval_args of a plain Config: the setting `split` decides which rows are tested."""
    given = {key: config["eval_args"][key] for key in ("split", "order", "group_by")}
    if EVAL_ARGS | given != EVAL_ARGS:
        raise UserError(
            f"eval_args: HistoryDataset does not support {given}; remove eval_args and set split, or use "
            f"RecBole's create_dataset(config)"
        )
