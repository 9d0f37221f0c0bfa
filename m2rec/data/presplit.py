"""Rows that come split into files, each with its history: RecBole's `benchmark_filename`.

NAME.train.inter, NAME.valid.inter and NAME.test.inter, as UniSRec and RecBole's session examples have
them, with a column such as `item_id_list:token_seq`.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from m2rec.compat import Config, FeatureSource, FeatureType, SequentialDataset
from m2rec.data import inter_file
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import NO_TARGET, Histories, Split
from m2rec.data.interactions import drop_incomplete_rows
from m2rec.errors import UserError

SPLIT_BY_FILES = "files"
_ROW_FIELD = "row_id"
_NO_FILTER = "[0,inf)"


class PresplitDataset(HistoryDataset):
    """Training, validation (absent where two files are named) and test rows, as the files have them.

    `histories` has a history for each row, under the row's number from 1: a user may have several rows.

    Args:
        config: with `benchmark_filename`.

    Raises:
        ValueError: another key contradicts it, or a file is invalid.
    """

    def __init__(self, config: Config) -> None:
        _check_presplit_keys(config)
        super().__init__(config)
        self.split = SPLIT_BY_FILES

    @property
    def owner_field(self) -> str:
        """The column that identifies a row's history: the row's number."""
        return _ROW_FIELD

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        for name in self.benchmark_filename_list:
            path = Path(dataset_path) / f"{token}.{name}.inter"
            if not path.is_file():
                raise UserError(f"benchmark_filename: no file {path}; put it there, or leave {name} out")
        SequentialDataset._load_inter_feat(self, token, dataset_path)

    def _load_feat(self, filepath: str, source: FeatureSource) -> pd.DataFrame:
        """RecBole's reader; interactions without user, item or history are dropped and counted."""
        frame = SequentialDataset._load_feat(self, filepath, source)
        if source != FeatureSource.INTERACTION:
            return frame
        path, history = Path(filepath), _name_history_column(self.config)
        self._check_columns(path, history, list(frame))
        complete = frame[[self.uid_field, self.iid_field]].notna().all(axis=1)
        complete &= frame[history].map(len) > 0
        if not complete.any():
            raise UserError(
                f"benchmark_filename: {path} has no row with user, item and history; leave it out"
            )
        return drop_incomplete_rows(frame, complete, path, "user, item or history")

    def _check_columns(self, path: Path, history: str, loaded: list[str]) -> None:
        header = inter_file.read_header(path, self.config["field_separator"])
        if header.get(history) != "token_seq":
            raise UserError(
                f"benchmark_filename: {path} has no column {history}:token_seq, each row's history; add it, "
                f"or join the files to {self.dataset_name}.inter and leave benchmark_filename out"
            )
        for key in ("USER_ID_FIELD", "ITEM_ID_FIELD"):
            inter_file.require_column(path, header, key, self.config[key], "token")
        for column in (self.uid_field, self.iid_field, history):
            if column not in loaded:
                raise UserError(f"load_col: {column!r} is left out; add it to inter")

    def _change_feat_format(self) -> None:
        """Keep whole histories for `histories`, the newest MAX_ITEM_LIST_LENGTH items for the model."""
        frame = self.inter_feat
        histories = list(frame[self.history_field])
        lengths = np.array([len(history) for history in histories])
        items = []
        for history, target in zip(histories, frame[self.iid_field], strict=True):
            items.append(np.append(history, target))
        all_items = np.concatenate(items)
        sizes = list(self.file_size_list)
        if len(sizes) == 2:
            sizes.insert(1, 0)
        self._part_ends = np.cumsum(sizes)
        rows = np.arange(1, len(frame) + 1)
        self.histories = _build_row_histories(rows, lengths, all_items, self._part_ends)
        self.counts = {
            "users": int(frame[self.uid_field].nunique()),
            "items": len(np.unique(all_items)),
            "interactions": len(frame),
        }
        self._settle_max_length(self.histories)
        for column in list(frame):
            if column.endswith(self.config["LIST_SUFFIX"]):
                frame[column] = [values[-self.max_item_list_len :] for values in frame[column]]
        frame[self.item_list_length_field] = np.minimum(lengths, self.max_item_list_len)
        frame[_ROW_FIELD] = rows
        self.set_field_property(_ROW_FIELD, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        SequentialDataset._change_feat_format(self)


def _build_row_histories(
    rows: np.ndarray, lengths: np.ndarray, items: np.ndarray, part_ends: np.ndarray
) -> Histories:
    """Each row's history and target, under the row's number.

    Training counts are RecBole's: each target, and the item of a history of one item, which begins a
    sequence.

    Args:
        rows: (n,).
        lengths: (n,), of the histories.
        items: each row's history and its target, concatenated.
        part_ends: where the rows of training, validation and test end.
    """
    histories = Histories(np.repeat(rows, lengths + 1), items)
    part = np.searchsorted(part_ends, rows)
    target = histories.end - 1
    targets = {
        "valid": np.where(part == 1, target, NO_TARGET),
        "test": np.where(part == 2, target, NO_TARGET),
    }
    train_stop = np.where(part == 0, histories.end, histories.start)
    train_start = np.where(lengths == 1, histories.start, target)
    histories.split = Split(train_start, train_stop, targets)
    return histories


def _name_history_column(config: Config) -> str:
    return f"{config['ITEM_ID_FIELD']}{config['LIST_SUFFIX']}"


def _check_presplit_keys(config: Config) -> None:
    """Refuse keys that have no effect on rows that are split already."""
    names = config["benchmark_filename"]
    if not isinstance(names, list) or len(names) not in (2, 3):
        raise UserError(f"benchmark_filename: expected [train, valid, test] or [train, test], got {names!r}")
    if "rows" not in config or config["rows"] == "dense":
        raise UserError(
            "rows: dense needs complete user histories, but benchmark_filename has one row per target; "
            "set rows: prefix"
        )
    if config["split"] not in (None, "leave_one_out"):
        raise UserError(f"split: {config['split']!r} contradicts benchmark_filename, which is the split")
    if config["ties"] == "shuffled":
        raise UserError(
            "ties: 'shuffled' has no effect on the files of benchmark_filename, whose histories are in order "
            "already; leave ties out"
        )
    for key in ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter"):
        if config[key] not in (None, _NO_FILTER):
            raise UserError(
                f"{key}: {config[key]!r} has no effect on the files of benchmark_filename; filter them "
                f"beforehand and leave {key} out"
            )
    history = _name_history_column(config)
    if history not in (config["alias_of_item_id"] or ()):
        raise UserError(f"alias_of_item_id: add {history}, or its items get other ids than the targets")
