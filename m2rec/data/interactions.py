"""Interactions for RecBole's SequentialDataset: read, filtered, numbered and sorted, or from a cache.

What differs from RecBole: how the file is read (errors name file and line), how ties in time are ordered, and
that all of it works on arrays of codes.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from m2rec import distributed
from m2rec.compat import Config, FeatureSource, FeatureType, Interaction, SequentialDataset
from m2rec.data import download, inter_file, interaction_cache, shipped
from m2rec.data.columns import (
    TokenIds,
    count_codes,
    encode_tokens,
    filter_by_counts,
    list_tokens,
    order_by_appearance,
    reorder_rows,
)
from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.id_arrays import choose_id_type, count_ids, is_ordered, order_by_time, order_by_user
from m2rec.data.interaction_cache import PreparedInteractions
from m2rec.data.ties import hash_interactions
from m2rec.data.time_statistics import measure_gap_quartiles
from m2rec.errors import UserError
from m2rec.settings import get_run_settings

logger = logging.getLogger(__name__)


class InteractionDataset(SequentialDataset):
    """Interactions of users that are sorted by user and time, as a DataFrame.

    Attributes:
        time_order: `exact`: by full-precision time; `recbole`: by time as float32, as stock RecBole.
        tie_order: of a user's interactions at the same time, after rounding for `recbole`. `file`: as in
            the file; `shuffled`: random, the same in every run.
        split: `leave_one_out` or `global_time`.
        counts: users, items and interactions after filtering.
        gap_quartiles: of the time between neighbouring interactions of a user, in the file's unit;
            None before they are sorted, and where no user has two.
    """

    inter_feat: Any  # a DataFrame until it is sorted, an Interaction once there are rows

    def __init__(self, config: Config) -> None:
        settings = get_run_settings(config)
        self.time_order, self.tie_order = settings.time_order, settings.ties
        self.split: str = settings.split
        self.counts: dict[str, int] = {}
        self.gap_quartiles: tuple[float, float, float] | None = None
        self._cache_file: Path | None = None  # to be written
        self._is_sorted = False
        self._messages: list[interaction_cache.Message] = []
        super().__init__(config)

    @property
    def item_tokens(self) -> list[str]:
        """Tokens by internal id, padding's first."""
        tokens: list[str] = np.asarray(self.field2id_token[self.iid_field]).astype(str).tolist()
        return tokens

    @property
    def user_tokens(self) -> list[str]:
        """Tokens by internal id, padding's first."""
        tokens: list[str] = self.field2id_token[self.uid_field].astype(str).tolist()
        return tokens

    def _from_scratch(self) -> None:
        """Take the interactions from the cache, or else read, filter and number them."""
        file = interaction_cache.find_cache_file(self.config)
        prepared = None if file is None else interaction_cache.read_cache(file)
        if prepared is not None:
            self._restore(prepared)
            logger.info("data_cache: the interactions are those of %s", file)
            return
        self._cache_file = file
        with interaction_cache.record_messages() as self._messages:
            super()._from_scratch()

    def _restore(self, prepared: PreparedInteractions) -> None:
        """Set what `_from_scratch` and `_sort_interactions` set."""
        interaction_cache.repeat_messages(prepared.messages)
        self._get_preset()
        self._get_field_from_config()
        self.user_feat = self.item_feat = None
        self.counts, self.gap_quartiles = prepared.counts, prepared.gap_quartiles
        self._register_columns(prepared.types, list(prepared.types))
        self.field2source[self.uid_field] = FeatureSource.USER_ID
        self.field2source[self.iid_field] = FeatureSource.ITEM_ID
        self.inter_feat = pd.DataFrame(prepared.columns, copy=False)
        for column, tokens in prepared.tokens.items():
            self._set_tokens(column, tokens)
        self._init_alias()
        self.feat_name_list = self._build_feat_name_list()
        self._is_sorted = True
        users = prepared.columns[self.uid_field]
        self._check_longest(int(count_ids(users, len(prepared.tokens[self.uid_field])).max()))

    def _keep(self) -> None:
        """Write the sorted interactions to the cache."""
        file, self._cache_file = self._cache_file, None
        if (
            file is None
            or distributed.local_rank() not in (None, 0)
            or not logger.isEnabledFor(logging.WARNING)
        ):
            return
        columns = {name: self.inter_feat[name].to_numpy() for name in self.inter_feat}
        if any(values.dtype not in interaction_cache.COLUMN_TYPES for values in columns.values()):
            return
        types = {name: str(self.field2type[name].value) for name in columns}
        tokens = {name: self.field2id_token[name] for name in columns if name in self.field2id_token}
        interaction_cache.write_cache(
            file,
            PreparedInteractions(columns, tokens, types, self.counts, self.gap_quartiles, self._messages),
        )

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
        rows = self._count_rows()
        before = self._count_sizes(rows)
        if not before["interactions"]:
            raise UserError(f"dataset: {self.dataset_name!r} has no interactions, only a header")
        try:
            super()._data_filtering()
        except ValueError:
            if len(self.inter_feat):
                raise
        feat = self.inter_feat
        is_whole = len(feat) == before["interactions"] and self.config["rm_dup_inter"] is None
        if not is_whole:
            for column in feat:
                if isinstance(feat[column].dtype, pd.CategoricalDtype):
                    feat[column] = order_by_appearance(feat[column])
            rows = self._count_rows()
        self.counts = self._count_sizes(rows)
        self._check_sizes(before, rows)
        for kind, column in (("user", self.uid_field), ("item", self.iid_field)):
            warning = describe_dominant_entity(kind, feat[column].cat.categories, rows[column])
            if warning:
                logger.warning("%s", warning)

    def _check_sizes(self, before: dict[str, int], rows: dict[str, np.ndarray]) -> None:
        """Check that something can be trained after filtering.

        Args:
            before: users, items and interactions before filtering.
            rows: of each user and item after it.
        """
        if not self.counts["interactions"]:
            raise UserError(
                f"dataset: nothing of {self.dataset_name!r} is left after filtering "
                f"({_format_counts(before)} before, {_format_counts(self.counts)} after); "
                f"loosen user_inter_num_interval, item_inter_num_interval or val_interval"
            )
        self._check_longest(int(rows[self.uid_field].max()))

    def _check_longest(self, longest: int) -> None:
        """Check that leave-one-out has a user with enough interactions, of whom the most have `longest`."""
        if longest < 3 and self.split == "leave_one_out":
            raise UserError(
                f"dataset: no user in {self.dataset_name!r} has three interactions (the most is {longest}; "
                f"{_format_counts(self.counts)}); leave-one-out needs three: history, training target, test "
                f"target"
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

    def _filter_inter_by_user_or_item(self) -> None:
        """RecBole's, which without features of users and items copies the interactions for nothing."""
        if self.user_feat is not None or self.item_feat is not None:
            super()._filter_inter_by_user_or_item()

    def _count_rows(self) -> dict[str, np.ndarray]:
        """The interactions of each user and of each item, by column."""
        return {column: count_codes(self.inter_feat[column]) for column in (self.uid_field, self.iid_field)}

    def _count_sizes(self, rows: dict[str, np.ndarray]) -> dict[str, int]:
        return {
            "users": int(np.count_nonzero(rows[self.uid_field])),
            "items": int(np.count_nonzero(rows[self.iid_field])),
            "interactions": len(self.inter_feat),
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
                self._set_tokens(column, tokens)
                ids = feat[column].cat.codes.to_numpy().astype(choose_id_type(len(tokens)))
                ids += 1
                feat[column] = ids
                return
        super()._remap(remap_list)

    def _normalize(self) -> None:
        """RecBole's; the gaps are those of the file, so they are measured before it changes the times."""
        normalizes = self.config["normalize_field"] or self.config["normalize_all"]
        if normalizes and self.benchmark_filename_list is None:
            self._measure_gaps()
        super()._normalize()

    def _measure_gaps(self) -> None:
        users = self.inter_feat[self.uid_field].to_numpy()
        self.gap_quartiles = measure_gap_quartiles(users, self.inter_feat[self.time_field].to_numpy())

    def _set_tokens(self, column: str, tokens: np.ndarray) -> None:
        """Tell RecBole the tokens of a column by id, padding's first."""
        self.field2id_token[column] = tokens
        self.field2token_id[column] = TokenIds(tokens)

    def _sort_interactions(self) -> np.ndarray:
        """Sort by user and time, ties by `tie_order`; returns the times that decided, (n,)."""
        if not self._is_sorted:
            order = self._find_order()
            if order is not None:
                self.inter_feat = reorder_rows(self.inter_feat, order)
                del order
            if self.gap_quartiles is None:
                self._measure_gaps()
            self._keep()
        return self._read_times()

    def _read_times(self) -> np.ndarray:
        """The times that decide the order, (n,)."""
        times: np.ndarray = self.inter_feat[self.time_field].to_numpy()
        return times if self.time_order == "exact" else times.astype(np.float32)

    def _find_order(self) -> np.ndarray | None:
        """The order by user, time and `tie_order`, (n,); None if the interactions have it already."""
        users, times = self.inter_feat[self.uid_field].to_numpy(), self._read_times()
        if self.tie_order == "shuffled":
            return order_by_user(users, np.lexsort((self._hash_interactions(), times)))
        if is_ordered(users, times):
            return None
        return order_by_user(users, order_by_time(times))

    def _hash_interactions(self) -> np.ndarray:
        feat = self.inter_feat
        users, items = feat[self.uid_field].to_numpy(), feat[self.iid_field].to_numpy()
        times = feat[self.time_field].to_numpy()
        return hash_interactions(users, items, times, self.user_tokens, self.item_tokens)

    def _dataframe_to_interaction(self, data: pd.DataFrame) -> Interaction:
        """RecBole's, but ids are not copied, so that processes share those of a cache.

        Ids keep their type, and rows have int64: `LazyRows` widens what it cuts.
        """
        others = []
        for name in data:
            if self.field2type[name] != FeatureType.TOKEN or data[name].dtype not in (np.int32, np.int64):
                others.append(name)
        converted = super()._dataframe_to_interaction(data[others])
        columns = {}
        for name in data:
            is_converted = name in converted
            columns[name] = converted[name] if is_converted else torch.from_numpy(data[name].to_numpy())
        return Interaction(columns)


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
