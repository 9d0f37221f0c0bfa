"""The arguments of a preparation, and the raw format and files that they choose."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from m2rec.data.raw.delimited import CsvLayout
from m2rec.data.raw.filters import RowCondition
from m2rec.data.raw.formats import (
    FORMATS,
    TABLE_KINDS,
    RawFormat,
    build_table_format,
    find_movielens_files,
    name_text_column,
)
from m2rec.data.raw.times import check_time_format
from m2rec.errors import UserError
from m2rec.yaml_values import suggest_spelling

MOVIELENS = "movielens"
FORMAT_NAMES = (MOVIELENS, *FORMATS, *TABLE_KINDS)
_TABLE_OPTIONS = (
    "user", "item", "time", "rating", "item_id", "time_format", "columns", "separator",
    "item_columns", "item_separator",
)  # fmt: skip
_KIND_BY_SUFFIX = {
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "jsonl", ".jsonl": "jsonl",
}  # fmt: skip


@dataclass(frozen=True)
class PreparationOptions:
    """The arguments of `prepare.prepare_dataset`.

    Attributes:
        format: one of `FORMAT_NAMES`.
        interactions: the file of interactions; for movielens the folder, for parquet a file or a folder.
        dataset: the name to give the data set.
        items: the file of items' texts.
        data_path: the folder in which the folder of the data set is made.
        min_rating: keep interactions with at least this rating.
        time_unit: of times that are numbers, one of `times.TIME_UNITS`; inferred by default.
        keep: conditions on rows of interactions, see `filters.RowCondition`.
        drop_repeats: keep one of exact duplicates.
        core: keep the part in which every user and item has at least so many interactions; 0 for all.
        by_user: write user by user in chronological order, ties in file order; by default in file order.
        relative_times: write times as the distance from the user's first interaction.
        no_rating: write no ratings, though the format has them.
        max_bad: largest share of malformed lines.
        text_limit: characters of a text column.
        user, item, time, rating: columns of a table, or paths into them; without a time file order is used.
        time_format: of a table's dates, in strptime's codes.
        item_id: column of a table of items.
        text: columns of a table of items; of a published format, those of its text columns to write.
        columns, item_columns: names by position of CSV files without a header, `-` for an unused column.
        separator, item_separator: of CSV files, one or two characters.
    """

    format: str
    interactions: Path
    dataset: str
    items: Path | None = None
    data_path: Path = Path("dataset")
    min_rating: float | None = None
    time_unit: str | None = None
    keep: Sequence[str] = ()
    drop_repeats: bool = False
    core: int = 0
    by_user: bool = False
    relative_times: bool = False
    no_rating: bool = False
    max_bad: float = 0.01
    text_limit: int = 2000
    user: str | None = None
    item: str | None = None
    time: str | None = None
    time_format: str | None = None
    rating: str | None = None
    item_id: str | None = None
    text: Sequence[str] = ()
    columns: Sequence[str] = ()
    separator: str | None = None
    item_columns: Sequence[str] = ()
    item_separator: str | None = None


class RawSource(NamedTuple):
    """A raw format with its files."""

    format: RawFormat
    interactions: Path
    items: Path | None


def select_source(options: PreparationOptions) -> RawSource:
    """The format and the files that the options choose.

    Raises:
        ValueError: options contradict each other or the format, or a file does not exist.
    """
    _check_numbers(options)
    if options.format == MOVIELENS:
        source = _select_movielens(options)
    else:
        source = _select_files(options)
    if options.min_rating is not None and not source.format.rating:
        cure = "name its column with rating=COLUMN" if options.format in TABLE_KINDS else "leave it out"
        raise UserError(f"min_rating: {options.format} has no rating; {cure}")
    _check_times(options, source.format)
    return source


def _check_numbers(options: PreparationOptions) -> None:
    if not 0 <= options.max_bad <= 1:
        raise UserError(f"max_bad: expected a share from 0 to 1, got {options.max_bad:g}")
    if options.core < 0:
        raise UserError(f"core: expected a whole number from 0, got {options.core}")
    if options.text_limit < 1:
        raise UserError(f"text_limit: expected a whole number from 1, got {options.text_limit}")
    if options.min_rating is not None and not math.isfinite(options.min_rating):
        raise UserError(f"min_rating: expected a number, got {options.min_rating}")


def _select_movielens(options: PreparationOptions) -> RawSource:
    _check_no_table_options(options)
    if options.items is not None:
        raise UserError("items: movielens takes the films from the folder; leave it out")
    movielens_format, ratings, films = find_movielens_files(options.interactions)
    return RawSource(_adapt_format(movielens_format, options), ratings, films)


def _select_files(options: PreparationOptions) -> RawSource:
    for name in ("interactions", "items"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            kind = options.format if name == "interactions" else _infer_table_kind(path, options.format)
            if not (kind == "parquet" and path.is_dir()):
                raise UserError(f"{name}: no file {path}")
    if options.format in TABLE_KINDS:
        return RawSource(_build_table(options), options.interactions, options.items)
    if options.format not in FORMATS:
        hint = suggest_spelling(options.format, FORMAT_NAMES)
        raise UserError(f"format: expected one of {', '.join(FORMAT_NAMES)}, got {options.format!r}{hint}")
    _check_no_table_options(options)
    raw_format = _adapt_format(FORMATS[options.format], options)
    if options.items is not None and not raw_format.token:
        raise UserError(f"items: {options.format} has no file of items; leave it out")
    return RawSource(raw_format, options.interactions, options.items)


def _adapt_format(raw_format: RawFormat, options: PreparationOptions) -> RawFormat:
    """A published format with the options' conditions and text columns."""
    texts = {column.column: column for column in raw_format.texts}
    for name in options.text:
        if name not in texts:
            known = f"expected some of {', '.join(texts)}" if texts else "leave it out"
            raise UserError(f"text: {options.format} has no text column {name!r}; {known}")
    chosen = tuple(texts[name] for name in dict.fromkeys(options.text)) or raw_format.texts
    return replace(raw_format, keep=_parse_conditions(options), texts=chosen)


def _check_no_table_options(options: PreparationOptions) -> None:
    for name in _TABLE_OPTIONS:
        if getattr(options, name):
            raise UserError(f"{name}: the columns of {options.format} are fixed; leave it out")


def _parse_conditions(options: PreparationOptions) -> tuple[RowCondition, ...]:
    return tuple(map(RowCondition.parse, options.keep))


def _check_times(options: PreparationOptions, raw_format: RawFormat) -> None:
    """Check that the options for times fit the times of the format."""
    if not raw_format.time:
        for name in ("time_unit", "time_format", "drop_repeats", "relative_times"):
            if getattr(options, name):
                raise UserError(f"{name}: needs a time column, and there is none; leave it out")
    if raw_format.time_format is not None:
        if options.time_unit:
            raise UserError("time_unit: the times are dates of one format, not numbers; leave it out")
        check_time_format(raw_format.time_format)


def _build_table(options: PreparationOptions) -> RawFormat:
    """The format of csv, parquet or jsonl with the given columns."""
    item_kind = _infer_table_kind(options.items, options.format)
    layout = _build_layout(options, "", options.format)
    item_layout = _build_layout(options, "item_", item_kind if options.items else None)
    columns: dict[str, str | None] = {}
    for name in ("user", "item", "time", "rating"):
        named = name if name in layout.column_names else None
        columns[name] = getattr(options, name) or named
    for name in ("user", "item"):
        if not columns[name]:
            raise UserError(f"{name}: {options.format} needs it; name a column of the file")
    _check_item_columns(options)
    return build_table_format(
        kind=options.format,
        user=str(columns["user"]),
        item=str(columns["item"]),
        time=columns["time"],
        rating=columns["rating"],
        item_kind=item_kind,
        item_id=options.item_id or "",
        texts=options.text,
        layout=layout,
        item_layout=item_layout,
        time_format=options.time_format,
        keep=_parse_conditions(options),
    )


def _check_item_columns(options: PreparationOptions) -> None:
    for name in ("item_id", "text"):
        is_given = bool(getattr(options, name))
        if options.items and not is_given:
            raise UserError(f"{name}: {options.format} needs it; name a column of the file of items")
        if is_given and not options.items:
            raise UserError(f"{name}: there is no file of items; set items=FILE")
    names = {name_text_column(column) for column in options.text}
    if len(names) < len(options.text) or "item_id" in names:
        raise UserError(f"text: expected distinct columns other than item_id, got {' '.join(options.text)}")


def _build_layout(options: PreparationOptions, prefix: str, kind: str | None) -> CsvLayout:
    """How a CSV file is laid out: that of interactions, or with the prefix `item_` that of items.

    Args:
        kind: of the file; None if there is no such file.

    Raises:
        ValueError: the file is not CSV, or names or separator are invalid.
    """
    names: Sequence[str] = getattr(options, f"{prefix}columns")
    separator: str | None = getattr(options, f"{prefix}separator")
    for argument, value in ((f"{prefix}columns", names), (f"{prefix}separator", separator)):
        if value and kind != "csv":
            reason = f"{kind} names its columns itself" if kind else "there is no file of items"
            raise UserError(f"{argument}: {reason}; leave it out")
    column_names = tuple(name.strip().removeprefix("-") for name in names)
    used = [name for name in column_names if name]
    if names and len(set(used)) < max(len(used), 1):
        raise UserError(f"{prefix}columns: expected distinct names, got {','.join(names)!r}")
    if separator is not None and (len(separator) not in (1, 2) or set(separator) & set('"\r\n')):
        raise UserError(f"{prefix}separator: expected one or two characters, got {separator!r}")
    return CsvLayout(column_names, separator or "")


def _infer_table_kind(path: Path | None, default: str) -> str:
    """The kind of a file of items, by its suffixes."""
    suffixes = path.suffixes if path else []
    for suffix in suffixes:
        if suffix.lower() in _KIND_BY_SUFFIX:
            return _KIND_BY_SUFFIX[suffix.lower()]
    return default
