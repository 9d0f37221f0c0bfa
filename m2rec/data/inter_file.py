"""Read NAME.inter and NAME.item, RecBole's tables with typed columns.

Plain pandas: every error names the file, the line and the cure.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.errors import UserError, format_one_line

COLUMN_TYPES = ("token", "float", "token_seq", "float_seq")
DOUBLE_DIGITS = 15  # decimal digits that a double always keeps
SEPARATORS = (",", "||", "::", "|", ";", "\t", " ")


def read_header(path: Path, separator: str) -> dict[str, str]:
    """Column names with their types, from a first line such as `user_id:token`.

    Raises:
        ValueError: the file is empty, not UTF-8, or its first line is not such a header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    if not line:
        raise UserError(f"{path}: the file is empty; its first line must name the columns")
    columns = {}
    for cell in line.split(separator):
        name, colon, kind = cell.rpartition(":")
        if not colon or kind not in COLUMN_TYPES:
            raise UserError(
                f"{path}: {cell!r} in the first line is not a column header; expected NAME:TYPE with a type "
                f"of {', '.join(COLUMN_TYPES)}, columns separated by {separator!r}"
            )
        if name != name.strip():
            raise UserError(f"{path}: column {name!r} in the first line has blanks around it; remove them")
        if name in columns:
            raise UserError(f"{path}: column {name!r} is duplicated in the first line; rename one")
        columns[name] = kind
    return columns


def require_column(path: Path, header: dict[str, str], key: str, name: str, kind: str) -> None:
    """Check that the column that the setting `key` names exists and has the right type."""
    if name not in header:
        raise UserError(
            f"{path}: column {name!r} ({key}) is missing, the file has {', '.join(header)}"
            f"{suggest_separator(header)}; add it or set {key}"
        )
    if header[name] != kind:
        raise UserError(f"{path}: column {name!r} ({key}) is {header[name]!r}; it must be {kind!r}")


def suggest_separator(header: dict[str, str]) -> str:
    """A hint to append to an error if the file seems to have another separator; else empty."""
    if len(header) > 1:
        return ""
    (column,) = header
    for separator in SEPARATORS:
        if separator in column:
            return f" (field_separator: {separator!r} seems to stand between its columns)"
    return ""


def build_separator_options(separator: str) -> dict[str, str]:
    """pandas' arguments for a separator; pandas reads several characters as a pattern."""
    return {"sep": separator} if len(separator) == 1 else {"sep": re.escape(separator), "engine": "python"}


def read_text_columns(
    path: Path, separator: str, header: dict[str, str], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read columns, all by default, as text, empty cells missing; the index is the line number minus 2.

    Raises:
        ValueError: a line has too many columns, or the file is not UTF-8.
    """
    try:
        frame = pd.read_csv(
            path,
            **build_separator_options(separator),
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            quoting=3,
            encoding="utf-8-sig",
            skip_blank_lines=False,
            usecols=None if columns is None else [list(header).index(column) for column in columns],
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    except pd.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        match = re.fullmatch(r"Expected \d+ fields in line (\d+), saw (\d+)", reason)
        if match:
            reason = f"line {match[1]} has {match[2]} columns, the first line names {len(header)}"
        raise UserError(f"{path}: {reason}; repair or remove that line, or name the columns") from None
    except ValueError as error:  # pandas' own about a surplus first column, where columns are chosen
        surplus = f"does line 2 have more than the {len(header)} columns of the first line?"
        raise UserError(f"{path}: can't be read ({format_one_line(error)}); {surplus}") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes a surplus first column for an index
        raise UserError(f"{path}: line 2 has more than the {len(header)} columns of the first line")
    frame.columns = [column for column in header if columns is None or column in columns]
    return frame.dropna(how="all")  # blank lines


def read_interactions(
    path: Path,
    separator: str,
    header: dict[str, str],
    columns: list[str],
    time_column: str,
    exact_order: bool = True,
) -> pd.DataFrame:
    """Read columns: tokens as text (empty ones missing), floats in double precision.

    With `exact_order` times that differ only beyond double precision stay different
    (`_separate_close_times`).

    Raises:
        ValueError: see `read_text_columns`; a number is invalid, or a time is missing, NaN or infinite.
    """
    frame = read_text_columns(path, separator, header)[columns]
    texts = frame[time_column]
    for column in columns:
        if header[column] == "float":
            frame[column] = _parse_float_column(path, frame[column], must_be_finite=column == time_column)
    if exact_order and (texts.str.len() > DOUBLE_DIGITS).any():
        frame[time_column] = _separate_close_times(texts, frame[time_column].to_numpy())
    return frame.reset_index(drop=True)


def _separate_close_times(texts: pd.Series, times: np.ndarray) -> np.ndarray:
    """Times (n,) that differ where their texts do, in the same order.

    Nanoseconds since 1970 have 19 digits, of which a double keeps 15: times that would become equal
    take the next doubles.
    """
    tied = pd.Series(times).duplicated(keep=False).to_numpy()
    if texts[tied].nunique() == len(np.unique(times[tied])):
        return times
    code, exact = pd.factorize(texts.map(Decimal), sort=True)
    integers = _flip_negative(np.array([float(time) for time in exact]).view(np.int64))
    rank = np.arange(len(integers))
    integers = np.maximum.accumulate(integers - rank) + rank  # strictly increasing
    return np.asarray(_flip_negative(integers).view(np.float64)[code])


def _flip_negative(bits: np.ndarray) -> np.ndarray:
    """Bits of doubles as integers in the same order, where neighbours differ by one; its own inverse."""
    magnitude = np.iinfo(np.int64).max
    return np.asarray(bits ^ ((bits >> 63) & magnitude))


def count_zero_labels(path: Path, separator: str, header: dict[str, str]) -> dict[str, int]:
    """Count the lines that have 0 in each column of `LABEL_COLUMNS`.

    Raises:
        ValueError: see `read_text_columns`.
    """
    columns = [column for column in header if column.lower() in LABEL_COLUMNS]
    if not columns:
        return {}
    counts = {}
    frame = read_text_columns(path, separator, header, columns)
    for column in columns:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        counts[column] = int((numbers == 0).sum())
    return counts


def _parse_float_column(path: Path, texts: pd.Series, must_be_finite: bool) -> pd.Series:
    """A column of numbers; with `must_be_finite` none may be missing, NaN or infinite."""
    values = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    is_bad = ~np.isfinite(values) if must_be_finite else values.isna() & texts.notna()
    if is_bad.any():
        first = int(is_bad.to_numpy().argmax())
        text = texts.iloc[first]
        shown = repr(text) if isinstance(text, str) else "nothing"
        raise UserError(
            f"{path}: column {texts.name!r} has {shown} in line {texts.index[first] + 2}, not a number "
            f"({int(is_bad.sum()):,} such lines); repair or remove them"
        )
    return values
