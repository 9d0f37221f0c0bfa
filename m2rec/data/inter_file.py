"""Reading RecBole's atomic interaction files, and fetching those that RecBole knows a link for.

Plain pandas: every error names the file, the line and the cure.
"""

import logging
import re
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from m2rec.data.dominant import LABEL_COLUMNS
from m2rec.errors import UserError

logger = logging.getLogger(__name__)

COLUMN_TYPES = ("token", "float", "token_seq", "float_seq")
DOUBLE_DIGITS = 15  # of a decimal number, what a double always keeps
DOWNLOAD_TIMEOUT = 15  # seconds without an answer from the server


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
                f"{path}: {cell!r} in the first line is no column; write NAME:TYPE with a type of "
                f"{', '.join(COLUMN_TYPES)}, columns separated by {separator!r}"
            )
        if name != name.strip():
            raise UserError(f"{path}: column {name!r} in the first line has blanks around it; remove them")
        if name in columns:
            raise UserError(f"{path}: column {name!r} comes twice in the first line; rename one")
        columns[name] = kind
    return columns


def require_column(path: Path, header: dict[str, str], key: str, name: str, kind: str) -> None:
    """Check that the column which the setting `key` names is there and has the right type."""
    if name not in header:
        raise UserError(
            f"{path}: column {name!r} ({key}) is missing, the file has {', '.join(header)}"
            f"{suggest_separator(header)}; add it or set {key}"
        )
    if header[name] != kind:
        raise UserError(f"{path}: column {name!r} ({key}) is {header[name]!r}; it must be {kind!r}")


def suggest_separator(header: dict[str, str]) -> str:
    """For the end of an error, if the file seems to have another separator than was said; else empty."""
    (first, *others) = header
    found = next((mark for mark in (",", "||", "::", "|", ";", "\t", " ") if mark in first), None)
    return f" (field_separator: {found!r} seems to stand between its columns)" if found and not others else ""


def build_separator_options(separator: str) -> dict[str, str]:
    """The arguments of pandas for this separator, of which it takes several characters for a pattern."""
    return {"sep": separator} if len(separator) == 1 else {"sep": re.escape(separator), "engine": "python"}


def read_text_columns(
    path: Path, separator: str, header: dict[str, str], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Read columns, all by default, as text, empty cells missing; the index is the line number less 2.

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
        if found := re.fullmatch(r"Expected \d+ fields in line (\d+), saw (\d+)", reason):
            reason = f"line {found[1]} has {found[2]} columns, the first line names {len(header)}"
        raise UserError(f"{path}: {reason}; repair or remove that line, or name the columns") from None
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes a surplus first column for an index
        raise UserError(f"{path}: line 2 has more than the {len(header)} columns of the first line")
    frame.columns = [column for column in header if columns is None or column in columns]
    return frame.dropna(how="all")  # blank lines


def read_interactions(
    path: Path,
    separator: str,
    header: dict[str, str],
    wanted: list[str],
    time_column: str,
    exact_order: bool = True,
) -> pd.DataFrame:
    """Read the wanted columns: tokens as text (empty ones missing), floats in double precision.

    With `exact_order` times that differ only beyond double precision are told apart
    (`_separate_close_times`).

    Raises:
        ValueError: see `read_text_columns`; a number is none, or a time is missing, NaN or infinite.
    """
    frame = read_text_columns(path, separator, header)[wanted]
    texts = frame[time_column]
    for column in wanted:
        if header[column] == "float":
            frame[column] = _parse_float_column(path, frame[column], complete=column == time_column)
    if exact_order and (texts.str.len() > DOUBLE_DIGITS).any():
        frame[time_column] = _separate_close_times(texts, frame[time_column].to_numpy())
    return frame.reset_index(drop=True)


def _separate_close_times(texts: pd.Series, times: np.ndarray) -> np.ndarray:
    """Times (n,) that differ where their texts do, in the same order.

    Nanoseconds since 1970 have 19 digits, of which a double keeps 15: the next doubles stand for those
    that it can't tell from the ones before.
    """
    tied = pd.Series(times).duplicated(keep=False).to_numpy()
    if texts[tied].nunique() == len(np.unique(times[tied])):
        return times
    code, exact = pd.factorize(texts.map(Decimal), sort=True)
    steps = np.array([float(time) for time in exact]).view(np.int64)  # neighbours differ by one ...
    steps ^= (steps >> 63) & np.iinfo(np.int64).max  # ... of negative numbers too
    places = np.arange(len(steps))
    steps = np.maximum.accumulate(steps - places) + places
    steps ^= (steps >> 63) & np.iinfo(np.int64).max
    return np.asarray(steps.view(np.float64)[code])


def count_zero_labels(path: Path, separator: str, header: dict[str, str]) -> dict[str, int]:
    """How many lines have 0 in each column that is named like a label of clicks.

    Raises:
        ValueError: see `read_text_columns`.
    """
    columns = [column for column in header if column.lower() in LABEL_COLUMNS]
    if not columns:
        return {}
    frame = read_text_columns(path, separator, header, columns)
    return {column: int((pd.to_numeric(frame[column], errors="coerce") == 0).sum()) for column in columns}


def _parse_float_column(path: Path, texts: pd.Series, complete: bool) -> pd.Series:
    """A column of numbers; with `complete` none may be missing, NaN or infinite."""
    values = pd.to_numeric(texts, errors="coerce").astype(np.float64)
    bad = ~np.isfinite(values) if complete else values.isna() & texts.notna()
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        shown = texts.iloc[first] if isinstance(texts.iloc[first], str) else "nothing"
        raise UserError(
            f"{path}: column {texts.name!r} has {shown!r} in line {texts.index[first] + 2}, not a number "
            f"({int(bad.sum()):,} such lines); repair or remove them"
        )
    return values


def download_dataset(name: str, folder: Path, url: str | None) -> None:
    """Fetch a data set that RecBole knows a link for, into `folder`, whole or not at all.

    Raises:
        ValueError: there is no link, or the download failed; a dead server is given up on
            after `DOWNLOAD_TIMEOUT` seconds.
    """
    from m2rec.compat import download_url, extract_zip, rename_atomic_files

    wanted = folder / f"{name}.inter"
    if url is None:
        raise UserError(
            f"dataset: {name!r} not found: there is no {wanted}, and RecBole knows no download of that "
            f"name; put the file there or set data_path"
        )
    logger.info("%s is not there; downloading %s", wanted, url)
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        _check_link(url)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            unpacked = Path(temporary) / name
            unpacked.mkdir()
            archive = Path(download_url(url, temporary))
            extract_zip(archive, unpacked)
            rename_atomic_files(unpacked, archive.stem, name)
            (unpacked / f"{name}.inter").stat()
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                wanted.stat()
    except Exception as error:
        raise UserError(
            f"dataset: {name!r} not found: there is no {wanted}, and its download from {url} failed "
            f"({error}); put the file there or set data_path"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _check_link(url: str) -> None:
    """Open and close the link in a thread, because looking up a name can't be timed out."""
    outcome: list[Any] = []

    def open_link() -> None:
        try:
            urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT).close()
            outcome.append(None)
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=open_link, daemon=True)
    thread.start()
    thread.join(DOWNLOAD_TIMEOUT + 5)
    if not outcome:
        raise TimeoutError(f"no answer within {DOWNLOAD_TIMEOUT + 5} seconds")
    if outcome[0] is not None:
        raise outcome[0]
