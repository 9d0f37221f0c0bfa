"""Read NAME.inter and NAME.item, RecBole's tables with typed columns.

pyarrow reads interactions if every line is as it should be. pandas reads everything else: it knows the line
of every row, so that every error names the file, the line and the cure.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from m2rec.data import parquet_file
from m2rec.data.column_names import LABEL_COLUMNS
from m2rec.data.columns import ColumnTable, InvalidNumberError, count_codes, encode_tokens
from m2rec.data.plain_file import OddFileError, iterate_plain_batches
from m2rec.errors import UserError, format_one_line

COLUMN_TYPES = ("token", "float", "token_seq", "float_seq")
CHUNK_ROWS = 1 << 20  # read at once by pandas
SEPARATORS = (",", "||", "::", "|", ";", "\t", " ")


def find_inter_file(folder: Path, name: str) -> Path:
    """folder/NAME.inter, or NAME.inter.parquet if only that exists.

    Raises:
        ValueError: both exist.
    """
    text = folder / f"{name}.inter"
    table = text.with_name(text.name + parquet_file.SUFFIX)
    if not table.is_file():
        return text
    if text.is_file():
        raise UserError(f"dataset: {name!r} has two files of interactions, {text} and {table}; remove one")
    return table


def read_header(path: Path, separator: str) -> dict[str, str]:
    """Column names with their types, from a first line such as `user_id:token`.

    Args:
        path: a file with such a line, or a Parquet file with such columns.

    Raises:
        ValueError: the file is empty, not UTF-8, or its first line is not such a header.
    """
    if path.suffix == parquet_file.SUFFIX:
        return _parse_header(path, parquet_file.read_column_cells(path), separator)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = file.readline().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    if not line:
        raise UserError(f"{path}: the file is empty; its first line must name the columns")
    return _parse_header(path, line.split(separator), separator)


def _parse_header(path: Path, cells: Sequence[str], separator: str) -> dict[str, str]:
    columns = {}
    for cell in cells:
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
    return pd.concat(iterate_text_columns(path, separator, header, columns))


def iterate_text_columns(
    path: Path, separator: str, header: dict[str, str], columns: Sequence[str] | None = None
) -> Iterator[pd.DataFrame]:
    """`read_text_columns` in parts, at least one."""
    positions = None if columns is None else [list(header).index(column) for column in columns]
    names = [column for column in header if columns is None or column in columns]
    is_surplus = False
    try:
        with pd.read_csv(
            path,
            **build_separator_options(separator),
            dtype=str,
            keep_default_na=False,
            na_values=[""],
            quoting=3,
            encoding="utf-8-sig",
            skip_blank_lines=False,
            usecols=positions,
            chunksize=CHUNK_ROWS,
        ) as frames:
            for frame in frames:
                is_surplus = not isinstance(frame.index, pd.RangeIndex)  # a first column taken for an index
                if not is_surplus:
                    frame.columns = names
                    yield frame.dropna(how="all")  # blank lines
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
    if is_surplus:
        raise UserError(f"{path}: line 2 has more than the {len(header)} columns of the first line")


def read_interactions(
    path: Path,
    separator: str,
    header: dict[str, str],
    columns: list[str],
    time_column: str,
    exact_order: bool = True,
) -> pd.DataFrame:
    """Read columns: tokens as categories in the order of first appearance, floats in double precision.

    A missing token has no category. With `exact_order` times that differ only beyond double precision stay
    different.

    Raises:
        ValueError: see `read_text_columns`; a number is invalid, or a time is missing, NaN or infinite.
    """
    types = {column: header[column] for column in columns}
    if path.suffix == parquet_file.SUFFIX:
        return _read_parquet_interactions(path, types, time_column, exact_order)
    table = ColumnTable(types, time_column)
    try:
        for batch in iterate_plain_batches(path, separator, list(header), types):
            table.append(batch)
        return table.build(exact_order)
    except (OddFileError, InvalidNumberError):
        return _read_odd_interactions(path, separator, header, types, time_column, exact_order)


def _read_odd_interactions(
    path: Path, separator: str, header: dict[str, str], types: dict[str, str], time_column: str, exact: bool
) -> pd.DataFrame:
    """`read_interactions` with pandas, which knows the line of every row and reads what pyarrow refuses."""
    table = ColumnTable(types, time_column)
    lines = []
    for frame in iterate_text_columns(path, separator, header):
        table.append({column: pa.array(frame[column], pa.string(), from_pandas=True) for column in types})
        lines.append(frame.index.to_numpy() + 2)
    try:
        return table.build(exact)
    except InvalidNumberError as error:
        line = np.concatenate(lines)[error.first]
        raise _describe_invalid_number(path, error, "line", line) from None


def _read_parquet_interactions(
    path: Path, types: dict[str, str], time_column: str, exact_order: bool
) -> pd.DataFrame:
    for column, kind in types.items():
        if kind.endswith("_seq"):
            raise UserError(
                f"{path}: column {column!r} has sequences, which only a NAME.inter may have; "
                f"leave it out with load_col"
            )
    table = ColumnTable(types, time_column)
    for batch in parquet_file.iterate_parquet_batches(path, types):
        table.append(batch)
    try:
        return table.build(exact_order)
    except InvalidNumberError as error:
        raise _describe_invalid_number(path, error, "row", error.first + 1) from None


def _describe_invalid_number(path: Path, error: InvalidNumberError, kind: str, number: int) -> UserError:
    shown = "nothing" if error.text is None else repr(error.text)
    return UserError(
        f"{path}: column {error.column!r} has {shown} in {kind} {number}, not a number "
        f"({error.count:,} such {kind}s); repair or remove them"
    )


def read_token_columns(
    path: Path, separator: str, header: dict[str, str], columns: Sequence[str]
) -> pd.DataFrame:
    """Columns as categories in the order of first appearance, whatever their type; blank lines are left out.

    Raises:
        ValueError: see `read_text_columns`.
    """
    types = dict.fromkeys(columns, "token")
    table = ColumnTable(types)
    if path.suffix == parquet_file.SUFFIX:
        batches = parquet_file.iterate_parquet_batches(path, types)
    else:
        batches = iterate_plain_batches(path, separator, list(header), types)
    try:
        for batch in batches:
            table.append(batch)
        return table.build().dropna(how="all")
    except OddFileError:
        frame = read_text_columns(path, separator, header, columns)
        return pd.DataFrame({column: encode_tokens(frame[column]) for column in columns})


def count_zero_labels(path: Path, separator: str, header: dict[str, str]) -> dict[str, int]:
    """Count the lines that have 0 in each column of `LABEL_COLUMNS`.

    Raises:
        ValueError: see `read_text_columns`.
    """
    columns = [column for column in header if column.lower() in LABEL_COLUMNS]
    if not columns:
        return {}
    counts = {}
    frame = read_token_columns(path, separator, header, columns)
    for column in columns:
        numbers = pd.to_numeric(pd.Series(frame[column].cat.categories, dtype=object), errors="coerce")
        counts[column] = int(count_codes(frame[column])[numbers == 0].sum())
    return counts
