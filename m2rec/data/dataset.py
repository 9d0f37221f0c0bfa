"""Interaction data on top of RecBole's SequentialDataset: reading, time order, training rows.

Validation and test rows are RecBole's own. What differs: how the file is read (errors name file
and line), how ties in time are ordered, and how many rows carry the training targets.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from m2rec.compat import Config, FeatureSource, FeatureType, Interaction, SeqSampler, SequentialDataset
from m2rec.data import download, inter_file, shipped
from m2rec.data.columns import (
    count_codes,
    encode_tokens,
    filter_by_counts,
    list_tokens,
    order_by_appearance,
    order_by_user,
)
from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.histories import NO_TARGET, Histories, shift_targets, split_by_time
from m2rec.data.max_length import choose_max_length
from m2rec.data.ties import Ties, hash_interactions
from m2rec.data.time_statistics import (
    RecentCounts,
    count_per_period,
    count_recent_items,
    measure_gap_quartiles,
)
from m2rec.errors import UserError
from m2rec.settings import get_run_settings

logger = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")
_ROWS_AT_ONCE = 1 << 14  # whose indices are in memory

# full ranking of all items, by time: the only supported evaluation
EVAL_ARGS = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"}


class HistoryDataset(SequentialDataset):
    """A SequentialDataset with `rows`, `time_order`, `tie_order` and `split`.

    Attributes:
        rows: `dense`: one training row per window of at most MAX_ITEM_LIST_LENGTH items,
            trained at all its positions; `prefix`: one row per target, as stock RecBole.
        time_order: `exact`: by full-precision time; `recbole`: by time as float32, as stock RecBole.
        tie_order: of a user's interactions at the same time, after rounding for `recbole`. `file`: as in
            the file; `shuffled`: random, the same in every run.
        split: `leave_one_out`: each user's last item is the test, the one before validation;
            `global_time`: one moment ends all users' training, another one validation.
        part: `train`, `valid` or `test` after `build`.
        counts: users, items and interactions after filtering.
        ties: in the order of `histories`; None before `build`, and for files that are split already.
        gap_quartiles: of the time between neighbouring interactions of a user, in the file's unit;
            None where no user has two.
        histories: each user's items in order.
        recent_counts: what was popular in the last days of training; None but for `split: global_time`.
        item_vectors: text vectors by item id, `text.vector_file.TextVectors`, or None; set by training.
        on_rows: called by `build` with the data set and its training part, before there are any loaders; set
            by training, which settles the keys that depend on the number of rows.
    """

    item_vectors: Any
    max_item_list_len: Any  # "auto" until the histories are known, then a number
    inter_feat: Any  # a DataFrame while it is filtered, an Interaction once there are rows

    def __init__(self, config: Config) -> None:
        settings = get_run_settings(config)
        self.rows, self.time_order, self.tie_order = settings.rows, settings.time_order, settings.ties
        self.split: str = settings.split
        _check_eval_args(config)
        if config["benchmark_filename"] and type(self) is HistoryDataset:
            raise UserError(
                "benchmark_filename: HistoryDataset reads NAME.inter; use presplit.PresplitDataset"
            )
        self._split_shares = settings.valid_from, settings.test_from
        self.part: str | None = None
        self.counts: dict[str, int] = {}
        self.ties: Ties | None = None
        self.gap_quartiles: tuple[float, float, float] | None = None
        self.histories: Histories | None = None
        self.on_rows: Callable[[HistoryDataset, HistoryDataset], None] | None = None
        self.recent_counts: RecentCounts | None = None
        # set by RecBole's hooks: each user's interactions before validation and within it (`global_time`),
        # and the row after the last one of each part
        self._period_counts: tuple[np.ndarray, np.ndarray] | None = None
        self._part_ends = np.zeros(len(PARTS), dtype=np.int64)
        self._built_parts: list[HistoryDataset] = []
        super().__init__(config)

    def _download(self) -> None:
        download.download_dataset(
            self.dataset_name, Path(self.dataset_path), self._get_download_url("url", allow_none=True)
        )
        columns = shipped.InterColumns.from_config(self.config)
        path = Path(self.dataset_path) / f"{self.dataset_name}.inter"
        difference = shipped.describe_difference(self.dataset_name, path, columns)
        if difference:
            raise UserError(
                f"dataset: the downloaded {path} is not the data set that the shipped settings are for "
                f"({difference}); run the same command again, it will not use them"
            )

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        path = inter_file.find_inter_file(Path(dataset_path), token)
        if not path.is_file():
            raise UserError(
                f"dataset: {token!r} has no file {path}; put it there, or set data_path to the "
                f"folder that contains {token}/{token}.inter"
            )
        self.inter_feat = self._load_feat(str(path), FeatureSource.INTERACTION)

    @property
    def is_dense(self) -> bool:
        """Whether a training row is trained at all its positions."""
        return self.rows == "dense"

    @property
    def item_tokens(self) -> list[str]:
        """Tokens by internal id, padding's first."""
        return [str(token) for token in self.field2id_token[self.iid_field]]

    @property
    def history_field(self) -> str:
        """The column of the histories, (n, L); RecBole names it after that of the items."""
        return str(getattr(self, f"{self.iid_field}_list_field"))

    @property
    def owner_field(self) -> str:
        """The column that says whose history in `histories` a row has."""
        return str(self.uid_field)

    def _load_feat(self, filepath: str, source: FeatureSource) -> pd.DataFrame:
        """Read interactions with our reader; sequence columns and other files with RecBole's."""
        if source != FeatureSource.INTERACTION:
            return super()._load_feat(filepath, source)
        path = Path(filepath)
        header = inter_file.read_header(path, self.config["field_separator"])
        columns = self._select_columns(path, header)
        self._warn_about_zero_labels(path, header, columns)
        has_sequences = any(header[column].endswith("_seq") for column in columns)
        if has_sequences and path.suffix == ".inter":
            frame = super()._load_feat(filepath, source)
            times = self._read_columns(path, header, [self.time_field])
            frame[self.time_field] = times[self.time_field].to_numpy()
            for column in columns:
                if header[column] == "token":
                    frame[column] = encode_tokens(frame[column])
        else:
            self._register_columns(header, columns)
            frame = self._read_columns(path, header, columns)
        for column in (self.uid_field, self.iid_field):
            _warn_about_blank_ids(path, frame[column])
        return frame

    def _select_columns(self, path: Path, header: dict[str, str]) -> list[str]:
        """The columns of the file that `load_col` and `unload_col` leave.

        Raises:
            ValueError: one that is required is missing or not loaded.
        """
        load, unload = self._get_load_and_unload_col(FeatureSource.INTERACTION)
        columns = []
        for name in header:
            if (load is None or name in load) and name not in (unload or ()):
                columns.append(name)
        for key, kind in (("USER_ID_FIELD", "token"), ("ITEM_ID_FIELD", "token"), ("TIME_FIELD", "float")):
            name = self.config[key]
            inter_file.require_column(path, header, key, name, kind)
            if name not in columns:
                raise UserError(f"load_col: {name!r} ({key}) is left out; add it to inter")
        for name in sorted(load or ()):
            if name not in header:
                raise UserError(f"load_col: {path} has no column {name!r}, only {', '.join(header)}")
        return columns

    def _read_columns(self, path: Path, header: dict[str, str], columns: list[str]) -> pd.DataFrame:
        separator, exact = self.config["field_separator"], self.time_order == "exact"
        return inter_file.read_interactions(path, separator, header, columns, self.time_field, exact)

    def _register_columns(self, header: dict[str, str], columns: Sequence[str]) -> None:
        """Tell RecBole about columns that it doesn't read itself."""
        for column in columns:
            feature_type = FeatureType(header[column])
            self.field2source[column] = FeatureSource.INTERACTION
            self.field2type[column] = feature_type
            self.field2seqlen[column] = 1
            if feature_type == FeatureType.FLOAT:
                self.field2bucketnum[column] = 2

    def _warn_about_zero_labels(self, path: Path, header: dict[str, str], columns: list[str]) -> None:
        """Warn of a label column whose zeros are treated as positive interactions."""
        intervals = self.config["val_interval"] or {}
        zero_counts = inter_file.count_zero_labels(path, self.config["field_separator"], header)
        for column, count in zero_counts.items():
            if not count or column in intervals:
                continue
            loaded = columns if column in columns else [*columns, column]
            interval = "'[1,1]'" if header[column] == "float" else "['1']"
            logger.warning(
                "%s: %s interactions have %s 0 and are treated as positive interactions; to drop them set "
                '--val_interval="{%s: %s}" --load_col="{inter: [%s]}"',
                path, f"{count:,}", column, column, interval, ", ".join(loaded),
            )  # fmt: skip

    def _data_filtering(self) -> None:
        before = self._count_sizes()
        if not before["interactions"]:
            raise UserError(f"dataset: {self.dataset_name!r} has no interactions, only a header")
        try:
            super()._data_filtering()
        except ValueError:
            if len(self.inter_feat):
                raise
        self.counts = self._count_sizes()
        self._check_sizes(before)
        feat = self.inter_feat
        for column in feat:
            if isinstance(feat[column].dtype, pd.CategoricalDtype):
                feat[column] = order_by_appearance(feat[column])
        for kind, column in (("user", self.uid_field), ("item", self.iid_field)):
            warning = describe_dominant_entity(kind, feat[column].cat.categories, count_codes(feat[column]))
            if warning:
                logger.warning("%s", warning)
        users = feat[self.uid_field].cat.codes.to_numpy()
        self.gap_quartiles = measure_gap_quartiles(users, feat[self.time_field].to_numpy())

    def _check_sizes(self, before: dict[str, int]) -> None:
        """Check that something can be trained after filtering.

        Args:
            before: users, items and interactions before filtering.
        """
        name, after = self.dataset_name, _format_counts(self.counts)
        if not self.counts["interactions"]:
            raise UserError(
                f"dataset: nothing of {name!r} is left after filtering "
                f"({_format_counts(before)} before, {after} after); "
                f"loosen user_inter_num_interval, item_inter_num_interval or val_interval"
            )
        longest = int(count_codes(self.inter_feat[self.uid_field]).max())
        if longest < 3 and self.split == "leave_one_out":
            raise UserError(
                f"dataset: no user in {name!r} has three interactions (the most is {longest}; {after}); "
                f"leave-one-out needs three: history, training target, test target"
            )

    def _filter_nan_user_or_item(self) -> None:
        """Drop rows without user or item; where both are missing RecBole 1.2.1 drops other rows."""
        complete = self.inter_feat[[self.uid_field, self.iid_field]].notna().all(axis=1)
        self.inter_feat = drop_incomplete_rows(self.inter_feat, complete, self.dataset_name, "user or item")
        super()._filter_nan_user_or_item()

    def _remove_duplication(self) -> None:
        """Keep one of a user's interactions with an item; ties in time are in file order."""
        keep = self.config["rm_dup_inter"]
        if self.time_order != "exact" or keep is None:  # RecBole's sort is not stable
            super()._remove_duplication()
            return
        ordered = self.inter_feat.sort_values(self.time_field, kind="stable")
        self.inter_feat = ordered.drop_duplicates([self.uid_field, self.iid_field], keep=keep)

    def _count_sizes(self) -> dict[str, int]:
        feat = self.inter_feat
        return {
            "users": int(np.count_nonzero(count_codes(feat[self.uid_field]))),
            "items": int(np.count_nonzero(count_codes(feat[self.iid_field]))),
            "interactions": len(feat),
        }

    def _filter_by_inter_num(self) -> None:
        """RecBole's filter by the number of interactions, on codes unless users or items have a file."""
        if self.user_feat is not None or self.item_feat is not None:
            super()._filter_by_inter_num()
            return
        codes, intervals = [], []
        for kind, column in (("user", self.uid_field), ("item", self.iid_field)):
            intervals.append(self._parse_intervals_str(self.config[f"{kind}_inter_num_interval"]))
            codes.append(self.inter_feat[column].cat.codes.to_numpy())
        is_kept = filter_by_counts(codes, [self._build_count_check(x) for x in intervals]).is_kept
        if not is_kept.all():
            self.inter_feat = self.inter_feat[is_kept]

    def _build_count_check(self, intervals: Any) -> Callable[[np.ndarray], np.ndarray]:
        """Whether counts are within RecBole's parsed intervals; None and no valid interval allow all."""

        def check(counts: np.ndarray) -> np.ndarray:
            if not intervals:
                return np.ones(len(counts), dtype=bool)
            if len(intervals) > 1:
                self.logger.warning("More than one interval of interaction number are given!")
            return np.asarray(self._within_intervals(counts, intervals))

        return check

    def _remap(self, remap_list: list[tuple[pd.DataFrame, str, FeatureType]]) -> None:
        """RecBole's ids, in the order of first appearance, which codes have unless columns share ids."""
        if len(remap_list) == 1:
            ((feat, column, _),) = remap_list
            if isinstance(feat[column].dtype, pd.CategoricalDtype):
                tokens = np.array(["[PAD]", *list_tokens(feat[column])])
                self.field2id_token[column] = tokens
                self.field2token_id[column] = {token: i for i, token in enumerate(tokens)}
                feat[column] = feat[column].cat.codes.to_numpy().astype(np.int64) + 1
                return
        super()._remap(remap_list)

    def _change_feat_format(self) -> None:
        """Sort by user and exact time, and order ties, before RecBole rounds times."""
        times = self.inter_feat[self.time_field].to_numpy()
        if self.time_order != "exact":
            times = times.astype(np.float32)
        if self.tie_order == "shuffled":
            order = np.lexsort((self._hash_interactions(), times))
        else:
            order = times.argsort(kind="stable")
        order = order_by_user(self.inter_feat[self.uid_field].to_numpy(), order)
        self.inter_feat = self.inter_feat.iloc[order].reset_index(drop=True)
        users, times = self.inter_feat[self.uid_field].to_numpy(), times[order]
        self.ties = Ties.find(users, times)
        if self.tie_order == "shuffled" and not self.ties.n_tied:
            logger.warning("ties: shuffled changes nothing: no user has two interactions at the same time")
        if self.split == "global_time":
            items = self.inter_feat[self.iid_field].to_numpy()
            self._period_counts = count_per_period(users, times, *self._split_shares)
            valid_from = self._split_shares[0]
            self.recent_counts = count_recent_items(users, items, times, valid_from, self.item_num)
        super()._change_feat_format()

    def _hash_interactions(self) -> np.ndarray:
        feat = self.inter_feat
        users, items = feat[self.uid_field].to_numpy(), feat[self.iid_field].to_numpy()
        user_tokens = [str(token) for token in self.field2id_token[self.uid_field]]
        times = feat[self.time_field].to_numpy()
        return hash_interactions(users, items, times, user_tokens, self.item_tokens)

    def data_augmentation(self) -> None:
        """Make the rows: one per target as stock RecBole for `prefix`, windows for `dense`.

        A row with target position t holds the history [max(start, t - L), t), exactly the slice
        that stock RecBole gives that target. Windows end at the last training target and go back
        in steps of L, so that each training target is at one position of one row.
        """
        users = self.inter_feat[self.uid_field].numpy()
        items = self.inter_feat[self.iid_field].numpy()
        histories = Histories(users.copy(), items.copy())
        if self._period_counts is not None:
            n_train, n_valid = (counts[histories.users] for counts in self._period_counts)
            histories.split = split_by_time(histories.start, histories.end, n_train, n_valid)
        self.histories = histories
        self._settle_max_length(histories)
        self._aug_presets()  # which reads the length
        targets, starts = self._locate_targets(histories)
        self._part_ends = np.cumsum([len(part) for part in targets])
        self.inter_feat = self._build_rows(np.concatenate(targets), np.concatenate(starts))

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
        step = self.max_item_list_len if self.is_dense else 1
        n_rows = np.maximum((train_stop - start - 2) // step + 1, 0)
        rows_after = n_rows.cumsum().repeat(n_rows) - np.arange(n_rows.sum()) - 1  # of the same user
        targets = [train_stop.repeat(n_rows) - 1 - step * rows_after]
        starts = [start.repeat(n_rows)]
        for positions in histories.split.targets.values():
            target = positions[order]
            exists = target != NO_TARGET
            targets.append(target[exists])
            starts.append(start[exists])
        return targets, starts

    def _build_rows(self, target: np.ndarray, start: np.ndarray) -> Interaction:
        """One row per target, with the history before it from `start` on, at most L items.

        Args:
            target, start: (rows,), positions in the sorted interactions.
        """
        begin = np.maximum(start, target - self.max_item_list_len)
        lengths = target - begin
        columns = {self.item_list_length_field: torch.from_numpy(lengths)}
        for column in self.inter_feat:
            if column != self.uid_field:
                name = getattr(self, f"{column}_list_field")
                columns[name] = self._cut_histories(self.inter_feat[column], begin, lengths)
        if self.config["model"] == "DIEN":
            name, negatives = self._sample_negative_lists()
            columns[name] = self._cut_histories(negatives, begin, lengths)
        rows = self.inter_feat[target]
        rows.update(Interaction(columns))
        return rows

    def _cut_histories(self, values: Tensor, begin: np.ndarray, lengths: np.ndarray) -> Tensor:
        """Parts of a column as rows, (rows, L, ...), right-padded with 0.

        Args:
            values: (n, ...), the column.
            begin, lengths: (rows,), where each row's part begins and how long it is.
        """
        position = np.arange(self.max_item_list_len)
        histories = values.new_empty((len(begin), len(position), *values.shape[1:]))
        for first in range(0, len(begin), _ROWS_AT_ONCE):
            some = slice(first, first + _ROWS_AT_ONCE)
            index = np.minimum(begin[some, None] + position, len(values) - 1)
            histories[some] = values[torch.from_numpy(index)]
            histories[some][torch.from_numpy(position >= lengths[some, None])] = 0
        return histories

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
            counts: Counter[int] = super().counter(column)
            return counts
        histories = self.inter_feat[self.history_field]
        lengths = self.inter_feat[self.item_list_length_field]
        targets = shift_targets(histories, lengths, self.inter_feat[column])
        return Counter(targets[targets > 0].tolist())


def drop_incomplete_rows(frame: pd.DataFrame, complete: pd.Series, name: object, needed: str) -> pd.DataFrame:
    """Drop the rows that are not `complete`, (n,) booleans, and warn how many.

    Args:
        name: of the file or data set, for the warning.
        needed: the values that every row must have, for the warning.
    """
    if complete.all():
        return frame
    n_dropped = len(frame) - int(complete.sum())
    first = complete.to_numpy().argmin() + 1
    logger.warning(
        "%s: %s of %s rows have no %s and are dropped; the first is row %s",
        name, f"{n_dropped:,}", f"{len(frame):,}", needed, f"{first:,}",
    )  # fmt: skip
    return frame[complete].reset_index(drop=True)


def _check_eval_args(config: Config) -> None:
    """Refuse eval_args of a plain Config: the setting `split` decides which rows are tested."""
    given = {key: config["eval_args"][key] for key in ("split", "order", "group_by")}
    if EVAL_ARGS | given != EVAL_ARGS:
        raise UserError(
            f"eval_args: HistoryDataset does not support {given}; remove eval_args and set split, or use "
            f"RecBole's create_dataset(config)"
        )


def _warn_about_blank_ids(path: Path, column: pd.Series) -> None:
    """Warn of ids with blanks around them."""
    blank = [token for token in list_tokens(column) if token != token.strip()]
    if blank:
        logger.warning(
            "%s: %s ids in column %s have blanks around them, such as %r; remove them, "
            "since the id without blanks is a different id",
            path, f"{len(blank):,}", column.name, blank[0],
        )  # fmt: skip


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())
