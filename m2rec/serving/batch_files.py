"""Files of many histories, and of what was recommended after them; neither is ever held whole."""

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from m2rec.data.raw.delimited import read_csv_records
from m2rec.data.raw.lines import MAX_LINE_BYTES
from m2rec.data.raw.parquet import read_parquet_rows
from m2rec.data.raw.tally import RawRow, Tally
from m2rec.errors import UserError
from m2rec.storage import write_atomically

logger = logging.getLogger(__name__)

USER_COLUMN, HISTORY_COLUMN = "user", "history"

_ROW_GROUP_SIZE = 8192  # rows that are written together


class UserRecommendations(NamedTuple):
    """A user's recommendations, best first."""

    user: str
    items: Sequence[str]
    scores: Sequence[float]


def read_history_file(path: Path, progress: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Users and their item tokens, oldest first, row by row.

    The columns are `user` and `history`, a list in Parquet, in CSV tokens with blanks between
    them or a JSON list. Nothing in it is an empty history. Rows of several lines are said at the end,
    because a quotation mark that is left open makes one of many.

    Args:
        path: FILE.parquet, or a CSV file, plain or gzipped.
        progress: show a bar on the terminal.

    Raises:
        ValueError: the file can't be read, or a row has no user or no list of tokens.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a CSV or Parquet file")
    tally = Tally(path)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # a history may be long
    is_parquet = path.suffix == ".parquet"
    rows = (read_parquet_rows if is_parquet else read_csv_records)(tally, (USER_COLUMN, HISTORY_COLUMN))
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=not progress) as bar:
        for line, row in rows:
            yield _parse_user(path, line, row), _parse_history(path, line, row[HISTORY_COLUMN])
            bar.update(tally.position - bar.n)
    if not is_parquet:  # which may have no rows
        tally.finish()
    for remark in tally.remarks():
        logger.warning("%s: %s", path, remark)


def write_recommendations(path: Path, ranked: Iterable[UserRecommendations]) -> int:
    """Write a Parquet file with the columns `user`, `items` and `scores`, whole or not at all.

    Returns:
        How many rows it has.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: writing Parquet needs pyarrow; run: pip install pyarrow") from None
    text, numbers = pyarrow.list_(pyarrow.string()), pyarrow.list_(pyarrow.float32())
    schema = pyarrow.schema([(USER_COLUMN, pyarrow.string()), ("items", text), ("scores", numbers)])
    rest, rows = iter(ranked), 0

    def write(temporary: Path) -> None:
        nonlocal rows
        with parquet.ParquetWriter(temporary, schema) as writer:
            while part := list(islice(rest, _ROW_GROUP_SIZE)):
                columns = [list(column) for column in zip(*part, strict=True)]
                writer.write_table(pyarrow.table(columns, schema=schema))
                rows += len(part)

    write_atomically(path, write)
    return rows


def _parse_user(path: Path, line: int, row: RawRow) -> str:
    user = row[USER_COLUMN]
    if user is None or user == "":
        raise UserError(f"{path}, line {line}: {USER_COLUMN} is empty")
    return str(user)


def _parse_history(path: Path, line: int, cell: Any) -> list[str]:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {line}: {HISTORY_COLUMN} is no JSON list: {cell[:60]!r}") from None
    if isinstance(cell, str):
        return cell.split()
    tokens = [] if cell is None else cell
    if not isinstance(tokens, list) or not all(isinstance(token, str | int) for token in tokens):
        raise UserError(
            f"{path}, line {line}: {HISTORY_COLUMN} is {str(cell)[:60]!r}, expected a list of tokens"
        )
    return [str(token) for token in tokens]
