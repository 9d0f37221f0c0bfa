"""Rows that come split into files, each with its history: RecBole's `benchmark_filename`.

NAME.train.inter, NAME.valid.inter and NAME.test.inter, as UniSRec and RecBole's examples of sessions have
them, with a column such as `item_id_list:token_seq`.
"""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from m2rec.compat import Config, FeatureSource, FeatureType, SequentialDataset
from m2rec.data import inter_file
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import NO_TARGET, Histories, Split
from m2rec.errors import UserError

logger = logging.getLogger(__name__)

SPLIT_BY_FILES = "files"
_ROW_FIELD = "row_id"
_NO_FILTER = "[0,inf)"


class PresplitDataset(HistoryDataset):
    """Rows of training, validation (left out where two files are named) and test, as the files have them.

    `histories` has a history for each row, under the row's number from 1: the same user may have several.

    Args:
        config: with `benchmark_filename`.

    Raises:
        ValueError: another key does not go with it, or a file is not as it must be.
    """

    def __init__(self, config: Config) -> None:
        _check_presplit_keys(config)
        super().__init__(config)
        self.split = SPLIT_BY_FILES

    @property
    def owner_field(self) -> str:
        """The column that says whose history a row has: its own."""
        return _ROW_FIELD

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        for name in self.benchmark_filename_list:
            path = Path(dataset_path) / f"{token}.{name}.inter"
            if not path.is_file():
                raise UserError(
                    f"benchmark_filename: there is no file {path}; put it there, or leave {name} out"
                )
        SequentialDataset._load_inter_feat(self, token, dataset_path)

    def _load_feat(self, filepath: str, source: FeatureSource) -> pd.DataFrame:
        """RecBole's reader; of interactions, rows without user, item or history are left out and counted."""
        frame = SequentialDataset._load_feat(self, filepath, source)
        if source != FeatureSource.INTERACTION:
            return frame
        path, lists = Path(filepath), _name_history_column(self.config)
        header = inter_file.read_header(path, self.config["field_separator"])
        if header.get(lists) != "token_seq":
            raise UserError(
                f"benchmark_filename: {path} has no column {lists}:token_seq, each row's history; add it, or "
                f"join the files to {self.dataset_name}.inter and leave benchmark_filename out"
            )
        for key in ("USER_ID_FIELD", "ITEM_ID_FIELD"):
            inter_file.require_column(path, header, key, self.config[key], "token")
        if missing := [c for c in (self.uid_field, self.iid_field, lists) if c not in frame]:
            raise UserError(f"load_col: {missing[0]!r} is left out; add it to inter")
        whole = frame[[self.uid_field, self.iid_field]].notna().all(axis=1) & (frame[lists].map(len) > 0)
        if not whole.any():
            raise UserError(
                f"benchmark_filename: {path} has no row with user, item and history; leave it out"
            )
        if not whole.all():
            left, rows = int((~whole).sum()), len(whole)
            logger.warning(
                "%s: %s of %s rows have no user, item or history and are left out",
                path,
                f"{left:,}",
                f"{rows:,}",
            )
        return frame[whole].reset_index(drop=True)

    def _change_feat_format(self) -> None:
        """Keep whole histories for `histories`, the newest MAX_ITEM_LIST_LENGTH items for the model."""
        frame, sizes = self.inter_feat, self.file_size_list
        lists, targets = list(frame[self.history_field]), frame[self.iid_field].to_numpy()
        lengths = np.array([len(own) for own in lists])
        self._part_ends = np.cumsum(sizes if len(sizes) == 3 else [sizes[0], 0, sizes[1]])
        items = np.concatenate([np.append(own, target) for own, target in zip(lists, targets, strict=True)])
        rows = np.arange(1, len(frame) + 1)
        self.histories = _build_row_histories(rows, lengths, items, self._part_ends)
        users = int(frame[self.uid_field].nunique())
        self.counts = {"users": users, "items": len(np.unique(items)), "interactions": len(frame)}
        cut = {
            column: [own[-self.max_item_list_len :] for own in frame[column]]
            for column in frame
            if column.endswith(self.config["LIST_SUFFIX"])
        }
        own = {self.item_list_length_field: np.minimum(lengths, self.max_item_list_len), _ROW_FIELD: rows}
        self.inter_feat = frame.assign(**cut, **own)
        self.set_field_property(_ROW_FIELD, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        SequentialDataset._change_feat_format(self)


def _build_row_histories(
    rows: np.ndarray, lengths: np.ndarray, items: np.ndarray, stops: np.ndarray
) -> Histories:
    """Each row's history and target, under the row's number.

    What training meets is counted as RecBole counts it: each target, and the item of a history of one, with
    which a sequence begins.

    Args:
        rows: (n,).
        lengths: (n,), of the histories.
        items: each row's history and its target, one after the other.
        stops: where the rows of training, validation and test end.
    """
    histories = Histories(np.repeat(rows, lengths + 1), items)
    start, end, part = histories.start, histories.end, np.searchsorted(stops, rows)
    targets = {
        name: np.where(part == number, end - 1, NO_TARGET) for number, name in ((1, "valid"), (2, "test"))
    }
    begins = np.where(lengths == 1, start, end - 1)
    histories.split = Split(np.where(part == 0, end, start), targets, begins)
    return histories


def _name_history_column(config: Config) -> str:
    return f"{config['ITEM_ID_FIELD']}{config['LIST_SUFFIX']}"


def _check_presplit_keys(config: Config) -> None:
    """Refuse the keys that have no effect on rows that are there already."""
    names = config["benchmark_filename"]
    if not isinstance(names, list) or len(names) not in (2, 3):
        raise UserError(f"benchmark_filename: expected [train, valid, test] or [train, test], got {names!r}")
    if "rows" not in config or config["rows"] == "dense":
        raise UserError("rows: 'dense' needs whole histories, benchmark_filename has rows; set rows: prefix")
    if config["split"] not in (None, "leave_one_out"):
        raise UserError(
            f"split: {config['split']!r} does not go with benchmark_filename, which is split already"
        )
    for key in ("user_inter_num_interval", "item_inter_num_interval", "val_interval", "rm_dup_inter"):
        if config[key] not in (None, _NO_FILTER):
            raise UserError(
                f"{key}: {config[key]!r} has no effect on the files of benchmark_filename; filter them "
                f"beforehand and leave it out"
            )
    if _name_history_column(config) not in (config["alias_of_item_id"] or ()):
        raise UserError(
            f"alias_of_item_id: add {_name_history_column(config)}, or its items "
            f"would be others than the targets"
        )
