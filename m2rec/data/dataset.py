"""Interaction data on top of RecBole's SequentialDataset: reading, time order, training rows.

Validation and test rows are RecBole's own; what changes is how the file is read (errors that
name file and line), in which order equal-looking times stand, and how many rows carry the
training targets.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from m2rec.compat import (
    Config,
    FeatureSource,
    FeatureType,
    Interaction,
    SeqSampler,
    SequentialDataset,
)
from m2rec.data import inter_file, shipped
from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.histories import NO_TARGET, Histories, split_by_time
from m2rec.errors import UserError
from m2rec.settings import RunSettings

logger = logging.getLogger(__name__)

PARTS = ("train", "valid", "test")

# full ranking of all items, by time: the only evaluation that is offered
EVAL_ARGS = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"}


class HistoryDataset(SequentialDataset):
    """A SequentialDataset with `rows`, `time_order` and `split`.

    Attributes:
        rows: `dense`: one training row per window of at most MAX_ITEM_LIST_LENGTH items,
            trained at all its positions; `prefix`: one row per target, as stock RecBole.
        time_order: `exact`: by full-precision time, ties in file order; `recbole`: by time
            as float32, as stock RecBole.
        split: `leave_one_out`: each user's last item is the test, the one before validation;
            `global_time`: one moment ends everybody's training, another one validation.
        part: `train`, `valid` or `test` after `build`.
        counts: users, items and interactions after filtering.
        n_tied: interactions that share their time with another one of the same user.
        gaps: quartiles of the time between neighbouring interactions of a user, in the file's unit;
            None where nobody has two.
        histories: each user's items in order.
        item_vectors: text vectors by item id, `text.vector_file.TextVectors`, or None; set by training.
    """

    item_vectors: Any
    inter_feat: Any  # a DataFrame while it is filtered, an Interaction once there are rows

    def __init__(self, config: Config) -> None:
        settings = RunSettings.read(config)
        self.rows, self.time_order, self.split = settings.rows, settings.time_order, settings.split
        _check_eval_args(config)
        if config["benchmark_filename"] and type(self) is HistoryDataset:
            raise UserError(
                "benchmark_filename: HistoryDataset reads NAME.inter; take presplit.PresplitDataset"
            )
        self._split_shares = settings.valid_from, settings.test_from
        self.part: str | None = None
        self.counts: dict[str, int] = {}
        self.n_tied = 0
        self.gap_quartiles: tuple[float, float, float] | None = None
        self.histories: Histories | None = None
        super().__init__(config)

    def _download(self) -> None:
        inter_file.download_dataset(
            self.dataset_name, Path(self.dataset_path), self._get_download_url("url", allow_none=True)
        )

        name, columns = self.dataset_name, shipped.InterColumns.from_config(self.config)
        path = Path(self.dataset_path) / f"{name}.inter"
        if difference := shipped.describe_difference(name, path, columns):
            raise UserError(
                f"dataset: {path}, as downloaded, is not what the shipped settings of this name are for "
                f"({difference}); run the same command again: with the file there, it leaves them out"
            )

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        path = Path(dataset_path) / f"{token}.inter"
        if not path.is_file():
            raise UserError(
                f"dataset: {token!r} has no file {path}; put it there, or set data_path to the "
                f"folder that holds {token}/{token}.inter"
            )
        super()._load_inter_feat(token, dataset_path)

    @property
    def history_field(self) -> str:
        """The column of the histories, (n, L); RecBole names it after that of the items."""
        return str(getattr(self, f"{self.iid_field}_list_field"))

    @property
    def owner_field(self) -> str:
        """The column that says whose history in `histories` a row has."""
        return str(self.uid_field)

    def _load_feat(self, filepath: str, source: FeatureSource) -> pd.DataFrame:
        """Read interactions with our reader; the rest, and sequence columns, with RecBole's."""
        if source != FeatureSource.INTERACTION:
            return super()._load_feat(filepath, source)
        path, separator = Path(filepath), self.config["field_separator"]
        header = inter_file.read_header(path, separator)
        load, unload = self._get_load_and_unload_col(source)
        wanted = [c for c in header if (load is None or c in load) and c not in (unload or ())]
        required = {"USER_ID_FIELD": "token", "ITEM_ID_FIELD": "token", "TIME_FIELD": "float"}
        for key, kind in required.items():
            inter_file.require_column(path, header, key, self.config[key], kind)
            if self.config[key] not in wanted:
                raise UserError(f"load_col: {self.config[key]!r} ({key}) is left out; add it to inter")
        if load is not None and (unknown := sorted(set(load) - set(header))):
            raise UserError(f"load_col: {path} has no column {unknown[0]!r}, only {', '.join(header)}")
        self._warn_zero_labels(path, header, wanted)
        if any(header[c].endswith("_seq") for c in wanted):
            frame = super()._load_feat(filepath, source)
            frame[self.time_field] = self._read_times(path, header)
        else:
            frame = self._read_inter(path, header, wanted)
        for column in (self.uid_field, self.iid_field):
            _warn_blank_ids(path, frame[column])
        return frame

    def _read_times(self, path: Path, header: dict[str, str]) -> np.ndarray:
        """The times of all lines, as our own reader has them."""
        separator, exact = self.config["field_separator"], self.time_order == "exact"
        times = inter_file.read_interactions(
            path, separator, header, [self.time_field], self.time_field, exact
        )
        return np.asarray(times[self.time_field])

    def _read_inter(self, path: Path, header: dict[str, str], wanted: list[str]) -> pd.DataFrame:
        """Read with our own reader, and tell RecBole of the columns."""
        source = FeatureSource.INTERACTION
        for column in wanted:
            kind = FeatureType(header[column])
            self.field2source[column], self.field2type[column] = source, kind
            self.field2seqlen[column] = 1
            if kind == FeatureType.FLOAT:
                self.field2bucketnum[column] = 2
        separator, exact = self.config["field_separator"], self.time_order == "exact"
        return inter_file.read_interactions(path, separator, header, wanted, self.time_field, exact)

    def _warn_zero_labels(self, path: Path, header: dict[str, str], wanted: Sequence[str]) -> None:
        """Warn of a label column whose zeros are trained as if they were clicks."""
        intervals = self.config["val_interval"] or {}
        for column, zeros in inter_file.count_zero_labels(
            path, self.config["field_separator"], header
        ).items():
            if zeros and column not in intervals:
                loaded = ", ".join([*wanted, *(() if column in wanted else (column,))])
                kept = "'[1,1]'" if header[column] == "float" else "['1']"
                logger.warning(
                    "%s: %s interactions have %s 0 and are trained as all others; to leave them out give "
                    '--val_interval="{%s: %s}" --load_col="{inter: [%s]}"',
                    path, f"{zeros:,}", column, column, kept, loaded,
                )  # fmt: skip

    def _data_filtering(self) -> None:
        before = self._count_sizes()
        if not before["interactions"]:
            raise UserError(f"dataset: {self.dataset_name!r} holds no interactions, only a header")
        try:
            super()._data_filtering()
        except ValueError:
            if len(self.inter_feat):
                raise
        self.counts = self._count_sizes()
        for kind, column in (("user", self.uid_field), ("item", self.iid_field)):
            counts = self.inter_feat[column].value_counts()
            if said := describe_dominant_entity(kind, counts.index, counts.to_numpy()):
                logger.warning("%s", said)
        self.gap_quartiles = _measure_gap_quartiles(
            self.inter_feat[self.uid_field], self.inter_feat[self.time_field]
        )
        if not self.counts["interactions"]:
            raise UserError(
                f"dataset: nothing of {self.dataset_name!r} is left after filtering "
                f"({_format_counts(before)} before, {_format_counts(self.counts)} after); "
                f"loosen user_inter_num_interval, item_inter_num_interval or val_interval"
            )
        longest = int(self.inter_feat[self.uid_field].value_counts().max())
        if longest < 3 and self.split == "leave_one_out":
            raise UserError(
                f"dataset: nobody in {self.dataset_name!r} has three interactions (the most is {longest}; "
                f"{_format_counts(self.counts)}); one is needed to start from, one to train and one to test"
            )

    def _filter_nan_user_or_item(self) -> None:
        """Leave out rows without user or item; where both are missing RecBole 1.2.1 leaves out other rows."""
        whole = self.inter_feat[[self.uid_field, self.iid_field]].notna().all(axis=1)
        if not whole.all():
            logger.warning(
                "%s of %s interactions have no user or no item and are left out; the first is number %s",
                f"{int((~whole).sum()):,}", f"{len(whole):,}", f"{int(whole.to_numpy().argmin()) + 1:,}",
            )  # fmt: skip
            self.inter_feat = self.inter_feat[whole].reset_index(drop=True)
        super()._filter_nan_user_or_item()

    def _remove_duplication(self) -> None:
        """Keep one of a user's interactions with an item; of equal times in the order of the file."""
        keep = self.config["rm_dup_inter"]
        if self.time_order != "exact" or keep is None:  # RecBole's sort is not stable
            super()._remove_duplication()
            return
        ordered = self.inter_feat.sort_values(self.time_field, kind="stable")
        self.inter_feat = ordered.drop_duplicates([self.uid_field, self.iid_field], keep=keep)

    def _count_sizes(self) -> dict[str, int]:
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
        times = self.inter_feat[self.time_field].to_numpy()
        times = times if self.time_order == "exact" else times.astype(np.float32)
        users = self.inter_feat[self.uid_field].to_numpy()
        self.n_tied = _count_tied_times(users, times)
        if self.split == "global_time":
            self._period_counts = _count_per_period(users, times, self._split_shares)
        super()._change_feat_format()

    def data_augmentation(self) -> None:
        """Make the rows: one per target as stock RecBole for `prefix`, windows for `dense`.

        A row with target position t holds the history [max(start, t - L), t), exactly the slice
        that stock RecBole gives that target. Windows end at the last training target and go back
        in steps of L, so that each training target is at one position of one row.
        """
        self._aug_presets()
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        histories = Histories(
            self.inter_feat[self.uid_field].numpy().copy(), self.inter_feat[self.iid_field].numpy().copy()
        )
        if self.split == "global_time":
            n_train, n_valid = (counts[histories.users] for counts in self._period_counts)
            histories.split = split_by_time(histories.start, histories.end, n_train, n_valid)
        self.histories = histories
        targets, owners = zip(*self._locate_targets(histories), strict=True)
        self._part_ends = np.cumsum([len(part) for part in targets])
        self.inter_feat = self._build_rows(np.concatenate(targets), np.concatenate(owners))

    def _locate_targets(self, histories: Histories) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions of the targets and of their users' first item, for training, validation and test."""
        start, split = histories.start, histories.split
        second = np.minimum(start + 1, len(histories.items) - 1)
        # stock order of users: time of their second interaction
        order = np.argsort(self.inter_feat[self.time_field].numpy()[second], kind="stable")
        step = self.max_item_list_len if self.rows == "dense" else 1
        bounds = zip(start[order], split.train_stop[order], strict=True)
        trained = [np.arange(stop - 1, first, -step)[::-1] for first, stop in bounds]
        yield np.concatenate(trained), np.repeat(start[order], [len(part) for part in trained])
        for part in ("valid", "test"):
            target = split.targets[part][order]
            yield target[target != NO_TARGET], start[order][target != NO_TARGET]

    def _build_rows(self, target: np.ndarray, start: np.ndarray) -> Interaction:
        """One row per target, with the history before it from `start` on, at most L items."""
        length = self.max_item_list_len
        begin = np.maximum(start, target - length)
        position = np.arange(length)
        index = torch.from_numpy(np.minimum(begin[:, None] + position, len(self.inter_feat) - 1))
        valid = torch.from_numpy(position < (target - begin)[:, None])
        columns = {self.item_list_length_field: torch.from_numpy(target - begin)}
        for column in self.inter_feat:
            if column != self.uid_field:
                value = self.inter_feat[column]
                there = valid.view(*valid.shape, *[1] * (value.dim() - 1))
                zero = torch.zeros((), dtype=value.dtype)
                columns[getattr(self, f"{column}_list_field")] = torch.where(there, value[index], zero)
        if self.config["model"] == "DIEN":
            name, negatives = self._sample_negative_lists()
            columns[name] = torch.where(valid, negatives[index], 0)
        rows = self.inter_feat[target]
        rows.update(Interaction(columns))
        return rows

    def _sample_negative_lists(self) -> tuple[str, Tensor]:
        """For each interaction another item, (n,), and the column of such histories: what DIEN needs."""
        name = f"{self.config['NEG_PREFIX']}{self.history_field}"
        self.copy_field_property(name, self.history_field)
        items = self.inter_feat[self.iid_field].numpy()
        return name, SeqSampler(self).sample_neg_sequence(items)

    @property
    def n_targets(self) -> int:
        """Training targets in these rows: one per prefix row, one per position of a dense row."""
        if self.rows == "prefix":
            return len(self)
        return int(self.inter_feat[self.item_list_length_field].sum())

    @property
    def tie_order(self) -> str:
        """What decides the order of a user's interactions at one time."""
        if self.time_order == "recbole" and self.config["rm_dup_inter"]:
            return "their order is left to RecBole, which drops repeats by a sort that is not stable"
        return "their order is that of the file"

    @property
    def n_returning(self) -> int:
        """Targets of this part, validation or test, that their user had before."""
        assert self.histories is not None and self.part is not None
        return int(self.histories.target_returns(self.inter_feat[self.owner_field].numpy(), self.part).sum())

    def build(self) -> list["HistoryDataset"]:
        """Split into training, validation and test rows."""
        self._change_feat_format()
        self._drop_unused_col()
        parts = []
        for part, start, stop in zip(PARTS, [0, *self._part_ends[:-1]], self._part_ends, strict=True):
            parts.append(self.copy(self.inter_feat[start:stop]))
            parts[-1].part = part
        if not len(parts[0]):
            raise UserError(
                f"split: {self.split!r} leaves no training target in {self.dataset_name!r}; "
                f"raise valid_from, or set split: leave_one_out"
            )
        if not len(parts[2]):
            raise UserError(
                f"split: {self.split!r} leaves no test target in {self.dataset_name!r}: nobody has a history "
                f"and an item after test_from; lower it, or set split: leave_one_out"
            )
        return parts

    def counter(self, column: str) -> Counter[int]:
        """How often each value occurs as a target; dense training rows count all their targets."""
        if self.part == "train" and self.rows == "dense" and column == self.iid_field:
            lists, lengths = (
                self.inter_feat[self.history_field],
                self.inter_feat[self.item_list_length_field],
            )
            targets = shift_targets(lists, lengths, self.inter_feat[column])
            return Counter(targets[targets > 0].tolist())
        counts: Counter[int] = super().counter(column)
        return counts


def _check_eval_args(config: Config) -> None:
    """Which rows are tested is `split`'s to say, here and in `build_config`.

    Raises:
        ValueError: eval_args of a plain Config say otherwise.
    """
    asked = {key: config["eval_args"][key] for key in ("split", "order", "group_by")}
    if asked != {key: EVAL_ARGS[key] for key in asked}:
        raise UserError(
            f"eval_args: HistoryDataset does not follow {asked}; leave them out and set split, or take "
            f"RecBole's create_dataset(config)"
        )


def _warn_blank_ids(path: Path, tokens: pd.Series) -> None:
    """Warn of ids that differ from others by a blank before or after them."""
    blank = [token for token in tokens.dropna().unique() if token != token.strip()]
    if blank:
        logger.warning(
            "%s: %s ids in column %s have blanks around them, such as %r; an id without them is another one, "
            "so remove the blanks",
            path, f"{len(blank):,}", tokens.name, blank[0],
        )  # fmt: skip


def _count_tied_times(users: np.ndarray, times: np.ndarray) -> int:
    """How many interactions share their time with another one of the same user."""
    order = np.lexsort((times, users))
    users, times = users[order], times[order]
    as_before = np.r_[False, (users[1:] == users[:-1]) & (times[1:] == times[:-1])]
    return int((as_before | np.r_[as_before[1:], False]).sum())


def _count_per_period(users: np.ndarray, times: np.ndarray, shares: tuple[float, float]) -> list[np.ndarray]:
    """Per user id, interactions before the moment that ends training, and from it to the end of validation.

    The moments are where these shares of all interactions have passed; what happens at one comes after it.
    """
    ordered = np.sort(times)
    moments = [ordered[min(int(share * len(times)), len(times) - 1)] for share in shares]
    before = [np.bincount(users[times < moment], minlength=int(users.max()) + 1) for moment in moments]
    return [before[0], before[1] - before[0]]


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


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def _measure_gap_quartiles(users: pd.Series, times: pd.Series) -> tuple[float, float, float] | None:
    """The quartiles of the time between neighbouring interactions of a user."""
    ordered = pd.DataFrame({"user": pd.factorize(users)[0], "time": times.to_numpy()})
    ordered = ordered.sort_values(["user", "time"])
    between = ordered["time"].diff()[ordered["user"].diff() == 0]
    if not len(between):
        return None
    low, middle, high = (float(q) for q in between.quantile([0.25, 0.5, 0.75]))
    return low, middle, high
