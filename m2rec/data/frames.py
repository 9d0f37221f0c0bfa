"""DataFrames, of pandas or polars: as the files of a data set, and as the histories of users.

letter  meaning
n       interactions
"""

import csv
import hashlib
import logging
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from m2rec.data import parquet_file
from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.data.columns import separate_close_times
from m2rec.data.inter_file import find_inter_file, read_header, read_text_columns
from m2rec.data.raw.formats import name_text_column
from m2rec.data.raw.tally import MalformedRowError
from m2rec.data.raw.values import is_missing, join_texts, parse_id
from m2rec.errors import UserError
from m2rec.yaml_values import suggest_spelling

logger = logging.getLogger(__name__)

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]+")
_NAME_PREFIX = "frame-"
_DIGITS_OF_UNIT = {"s": 0, "ms": 3, "us": 6, "ns": 9}


@dataclass(frozen=True)
class InteractionColumns:
    """The columns of a frame of interactions."""

    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    """None: the order of the rows."""


class UserHistories(Mapping[str, list[str]]):
    """The items of each user, oldest first, by user token; ties in time are in the order of the rows.

    Args:
        frame: interactions, of pandas or polars.
        columns: of the frame.
        known_items: the items that are kept; None for all.

    Raises:
        ValueError: see `read_frame`.
    """

    def __init__(
        self, frame: Any, columns: InteractionColumns, known_items: Collection[str] | None = None
    ) -> None:
        table = read_frame(frame, columns).dropna(subset=["user", "item"])
        if known_items is not None:
            table = table[table["item"].isin(known_items)]
        times = _parse_times(table["time"])
        codes, users = pd.factorize(table["user"])
        items, self._tokens = pd.factorize(table["item"])
        order = np.lexsort((times, codes))  # stable
        self._items = items[order]
        self._ends = np.bincount(codes, minlength=len(users)).cumsum()
        self._users = {str(user): number for number, user in enumerate(users)}

    def __getitem__(self, user: str) -> list[str]:
        number = self._users[user]
        start = self._ends[number - 1] if number else 0
        return [str(token) for token in self._tokens[self._items[start : self._ends[number]]]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._users)

    def __len__(self) -> int:
        return len(self._users)


def is_frame(value: object) -> bool:
    """Whether it is a DataFrame of pandas or polars; polars need not be installed."""
    return isinstance(value, pd.DataFrame) or _is_polars(value)


def _is_polars(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "polars" and type(value).__name__ == "DataFrame"


def read_frame(frame: Any, columns: InteractionColumns) -> pd.DataFrame:
    """Interactions as texts, such that a file of them is read as the same data.

    Args:
        frame: of pandas or polars.
        columns: of the frame.

    Returns:
        The columns `user`, `item` and `time`, (n,) each; a user or item that is missing is None.

    Raises:
        ValueError: it is not a frame, lacks a column, or has an id or a time that can't be read.
    """
    _check_frame("interactions", frame)
    if columns.time is None:
        times = pd.Series(np.arange(1, len(frame) + 1))
    else:
        cure = "name it with time=COLUMN, or give time=None for the order of the rows"
        times = _get_column("interactions", frame, columns.time, cure)
    users = _get_column("interactions", frame, columns.user, "name it with user=COLUMN")
    items = _get_column("interactions", frame, columns.item, "name it with item=COLUMN")
    parts = {
        "user": _format_ids("user", users),
        "item": _format_ids("item", items),
        "time": _format_times(times),
    }
    return pd.DataFrame(parts)


def read_dataset(
    dataset: str = "ml-100k", data_path: str | Path = "dataset"
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """The files of a data set in RecBole's format, as DataFrames that `m2rec.fit` takes.

    Args:
        dataset: its name; ml-100k comes with RecBole.
        data_path: the folder with the folder of the data set.

    Returns:
        The interactions; and the items, None without a file of them. Ids and texts are text.

    Raises:
        ValueError: there is no such data set, or a file can't be read.
    """
    from m2rec.compat import find_data_folder  # loads RecBole

    folder = find_data_folder(Path(data_path), dataset)
    path = find_inter_file(folder, dataset)
    if not path.is_file():
        raise UserError(f"dataset: {dataset!r} has no file {path}; set data_path, or read your own tables")
    items = folder / f"{dataset}.item"
    return _read_table(path), _read_table(items) if items.is_file() else None


def _read_table(path: Path) -> pd.DataFrame:
    """A file with typed columns."""
    header = read_header(path, "\t")
    if path.suffix == parquet_file.SUFFIX:
        return pd.read_parquet(path).set_axis(list(header), axis="columns")
    frame = read_text_columns(path, "\t", header)
    for name, kind in header.items():
        if kind == "float":
            frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame


def write_dataset(
    data_path: Path,
    name: str | None,
    interactions: Any,
    columns: InteractionColumns,
    items: Any = None,
    item_id: str = "item_id",
    texts: Sequence[str] | None = None,
) -> str:
    """Write the files of a data set, NAME.inter and with items NAME.item, unless they are there already.

    Args:
        data_path: the folder in which the folder of the data set is made.
        name: of the data set; None for one that follows from the content, so that other frames have another.
        interactions: of pandas or polars.
        columns: of the interactions.
        items: frame of the items' texts.
        item_id: its column of the item.
        texts: its columns of text; None for all others.

    Returns:
        The name.

    Raises:
        ValueError: a frame can't be read, or the data set is there with other content.
    """
    table = read_frame(interactions, columns)
    labels = {}
    for column in interactions.columns:
        if str(column).lower() in LABEL_COLUMNS and column not in vars(columns).values():
            label = pd.to_numeric(_to_series(interactions[column]), errors="coerce")
            labels[f"{column}:float"] = label.astype(float)
    table.columns = ["user_id:token", "item_id:token", "timestamp:float"]
    tables = {".inter": table.assign(**labels)}
    if items is not None:
        tables[".item"] = _read_items(items, item_id, texts)
    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"dataset: {name!r} is not a valid folder name; its folder is made in data_path")
    data_path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_path) as temporary:
        written = {suffix: Path(temporary) / f"new{suffix}" for suffix in tables}
        for suffix, path in written.items():
            tables[suffix].to_csv(
                path, sep="\t", index=False, quoting=csv.QUOTE_NONE, lineterminator="\n", encoding="utf-8"
            )
        name = name or _NAME_PREFIX + _hash_files(written.values())
        _move_files(written, data_path / name, name)
    return name


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def _move_files(written: Mapping[str, Path], folder: Path, name: str) -> None:
    """Move files into a data set's folder, NAME.inter last; what is there already must be the same."""
    targets = {suffix: folder / f"{name}{suffix}" for suffix in written}
    for suffix, target in targets.items():
        if target.exists() and not cmp(written[suffix], target, shallow=False):
            raise UserError(f"dataset: {target} has other content; choose another name, or remove that file")
    items = folder / f"{name}.item"
    if items.exists() and ".item" not in written:
        raise UserError(f"dataset: {items} has texts of an earlier call; give items, or remove that file")
    folder.mkdir(exist_ok=True)
    for suffix in reversed(list(written)):
        if not targets[suffix].exists():  # an equal one keeps its time, and so its text vectors
            written[suffix].replace(targets[suffix])


def _check_frame(argument: str, frame: object) -> None:
    if not is_frame(frame):
        cure = "; call its collect()" if type(frame).__name__ == "LazyFrame" else ""
        kind = type(frame).__name__
        raise UserError(f"{argument}: expected a DataFrame of pandas or polars, got {kind}{cure}")


def _get_column(argument: str, frame: Any, name: str, cure: str) -> pd.Series:
    """A column, with rows numbered from 0.

    Raises:
        ValueError: the frame has no such column, or several.
    """
    names = [str(column) for column in frame.columns]
    if name not in frame.columns:
        has, hint = ", ".join(names), suggest_spelling(name, names)
        raise UserError(f"{argument}: column {name!r} is missing, the frame has {has}; {cure}{hint}")
    if names.count(name) > 1:
        raise UserError(f"{argument}: column {name!r} occurs {names.count(name)} times; rename all but one")
    return _to_series(frame[name])


def _to_series(column: Any) -> pd.Series:
    """A column of pandas or polars, with rows numbered from 0."""
    if isinstance(column, pd.Series):
        return column.reset_index(drop=True)
    if column.null_count() or not (column.dtype.is_numeric() or column.dtype.is_temporal()):
        return pd.Series(column.to_list(), dtype=object)  # a number beside a null would become a float
    return pd.Series(column.to_numpy())


def _format_ids(argument: str, column: pd.Series) -> pd.Series:
    """Ids as text; None where one is missing.

    Raises:
        ValueError: one is not text or a number, or has a control character.
    """
    codes, values = pd.factorize(column, use_na_sentinel=True)
    texts = np.empty(len(values) + 1, dtype=object)
    texts[-1] = None  # which the code -1 means
    for number, value in enumerate(values.tolist()):
        if not is_missing(value):
            texts[number] = _format_id(argument, column.name, value)
    return pd.Series(texts[codes], dtype=object)


def _format_id(argument: str, name: object, value: object) -> str:
    try:
        return parse_id(value)
    except MalformedRowError as error:
        raise UserError(f"{argument}: column {name!r}: {error}; convert or replace it") from None


def _format_times(column: pd.Series) -> pd.Series:
    """Times as numbers or as texts of numbers, dates in seconds since 1970, dates without a zone in UTC.

    Raises:
        ValueError: one is missing, or is not a number or a date of pandas.
    """
    missing = column.isna()
    if missing.any():
        row = int(missing.to_numpy().argmax())
        raise UserError(
            f"time: column {column.name!r} is empty in {int(missing.sum()):,} rows, the first is row {row}; "
            f"fill or remove them"
        )
    if pd.api.types.is_datetime64_any_dtype(column):
        return _format_dates(column)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
    is_time = np.isfinite(numbers) & (not pd.api.types.is_bool_dtype(column))
    if not is_time.all():
        row = int(is_time.argmin())
        (value,) = column[[row]].tolist()
        raise UserError(
            f"time: column {column.name!r} has {value!r} in row {row}, not a number or date; "
            f"convert the column with pandas.to_datetime"
        )
    return column


def _parse_times(column: pd.Series) -> NDArray[Any]:
    """Times of `_format_times` as numbers in the same order, also where doubles would be equal."""
    numbers = pd.to_numeric(column).to_numpy()
    if numbers.dtype.kind == "f" and not pd.api.types.is_numeric_dtype(column):
        return separate_close_times(column, numbers)
    return np.asarray(numbers)


def _format_dates(column: pd.Series) -> pd.Series:
    """Seconds since 1970; as exact texts where a date has a fraction of a second."""
    if column.dt.tz is not None:
        column = column.dt.tz_convert("UTC").dt.tz_localize(None)
    count = column.astype(np.int64)  # in units of the column
    digits = _DIGITS_OF_UNIT[column.dt.unit]
    per_second = 10**digits
    if not (count % per_second).any():
        return count // per_second
    whole = (count.abs() // per_second).astype(str)
    fraction = (count.abs() % per_second).astype(str).str.zfill(digits)
    return pd.Series(np.where(count < 0, "-", ""), dtype=object) + whole + "." + fraction


def _read_items(frame: Any, item_id: str, columns: Sequence[str] | None) -> pd.DataFrame:
    """The table of NAME.item: a text column for each column of the frame, but for those of fractions.

    Raises:
        ValueError: it is not a frame, lacks a column, or an item occurs twice.
    """
    _check_frame("items", frame)
    names = [column for column in frame.columns if column != item_id] if columns is None else list(columns)
    tokens = _format_ids("items", _get_column("items", frame, item_id, "name it with item_id=COLUMN"))
    for token in tokens[tokens.duplicated() & tokens.notna()]:
        raise UserError(f"items: item {token!r} occurs twice; keep one row, for example with drop_duplicates")
    parts = {"item_id:token": tokens}
    for name in names:
        values = _get_column("items", frame, name, "name columns of text with text=[COLUMN, ...]")
        if columns is None and _has_fractions(values):
            logger.info(
                "items: column %r has numbers, which are no text; text=[COLUMN, ...] would take it", name
            )
            continue
        header = f"{name_text_column(str(name))}:token_seq"
        if header in parts or header == "item_id:token_seq":
            raise UserError(f"items: column {name!r} has the name of another one in the file; rename it")
        parts[header] = pd.Series([_format_text(value) for value in values.tolist()], dtype=object)
    if len(parts) == 1:
        raise UserError("items: the frame has no column of text; leave items out")
    return pd.DataFrame(parts)[tokens.notna()]


def _has_fractions(values: pd.Series) -> bool:
    """Whether these are numbers such as prices; whole numbers, such as years, may be words."""
    return bool(pd.api.types.is_float_dtype(values.dtype) and (values.dropna() % 1 != 0).any())


def _format_text(value: Any) -> str:
    """A text on one line; the parts of a list are joined."""
    if isinstance(value, float) and value.is_integer():  # a whole number in a column with gaps
        value = int(value)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return _CONTROL_CHARACTERS.sub(" ", join_texts(value))
