"""Files of many histories and of recommendations; neither is ever held in memory whole."""

import csv
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2rec.data.raw.delimited import read_csv_records
from m2rec.data.raw.lines import MAX_LINE_BYTES
from m2rec.data.raw.tally import NumberedRows, Tally
from m2rec.errors import UserError
from m2rec.serving.arguments import InputWarnings, tokens_to_ids
from m2rec.serving.ranker import Ranker, Ranking
from m2rec.serving.ranking_options import RankingOptions
from m2rec.storage import write_atomically

logger = logging.getLogger(__name__)

USER_COLUMN, HISTORY_COLUMN = "user", "history"

_ROW_GROUP_SIZE = 8192  # rows that are written together


def read_history_file(path: Path, progress: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Users and their item tokens, oldest first, row by row.

    The columns are `user` and `history`: a list in Parquet; in CSV tokens with blanks between them, or a
    JSON list. An empty cell is an empty history. Rows of several lines are logged at the end, because an
    open quotation mark joins rows.

    Args:
        path: FILE.parquet, or a CSV file, plain or gzipped; or a folder of Parquet files, as Spark writes it,
            which are read in the order of their names.
        progress: show a bar on the terminal.

    Raises:
        ValueError: the file can't be read, or a row has no user or no list of tokens.
    """
    for file in list_history_files(path):
        yield from _read_one_file(file, progress)


def list_history_files(path: Path) -> list[Path]:
    """The file, or those of a folder of Parquet files in the order of their names.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        from m2rec.data.raw.parquet import list_parquet_parts  # here, since it loads pyarrow

        return list_parquet_parts(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; give a CSV or Parquet file")
    return [path]


def _read_one_file(path: Path, progress: bool) -> Iterator[tuple[str, list[str]]]:
    tally = Tally(path)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))  # a history may be long
    is_parquet = path.suffix == ".parquet"
    read_rows: Callable[..., NumberedRows] = read_csv_records
    if is_parquet:
        from m2rec.data.raw.parquet import read_parquet_rows  # here, since it loads pyarrow

        read_rows = read_parquet_rows
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=not progress) as bar:
        for line, row in read_rows(tally, (USER_COLUMN, HISTORY_COLUMN)):
            where = f"{path}, line {line}"
            yield parse_user(where, row[USER_COLUMN]), parse_history(where, row[HISTORY_COLUMN])
            bar.update(tally.position - bar.n)
    if not is_parquet:  # which may have no rows
        tally.finish()
    for remark in tally.remarks():
        logger.warning("%s: %s", path, remark)


def write_recommendations(path: Path, ranked: Iterable[tuple[str, Ranking]]) -> int:
    """Write a Parquet file with the columns `user`, `items` and `scores`, whole or not at all.

    Returns:
        The number of rows.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{path}: writing Parquet needs pyarrow; run: pip install pyarrow") from None
    columns = {
        USER_COLUMN: pyarrow.string(),
        "items": pyarrow.list_(pyarrow.string()),
        "scores": pyarrow.list_(pyarrow.float32()),
    }
    schema = pyarrow.schema(columns)
    rest, n_rows = iter(ranked), 0

    def write(temporary: Path) -> None:
        nonlocal n_rows
        with parquet.ParquetWriter(temporary, schema) as writer:
            while group := list(islice(rest, _ROW_GROUP_SIZE)):
                users, items, scores = [], [], []
                for user, ranking in group:
                    users.append(user)
                    items.append([entry.item for entry in ranking])
                    scores.append([entry.score for entry in ranking])
                writer.write_table(pyarrow.table([users, items, scores], schema=schema))
                n_rows += len(group)

    write_atomically(path, write)
    return n_rows


def parse_user(where: str, cell: Any) -> str:
    """A user's name; `where` begins the message of the ValueError for an empty cell."""
    if cell is None or cell == "":
        raise UserError(f"{where}: {USER_COLUMN} is empty")
    return str(cell)


def parse_history(where: str, cell: Any) -> list[str]:
    """Item tokens from a list or an array of them, from tokens with blanks between them, or from a JSON list.

    Raises:
        ValueError: it is none of these; `where` begins the message.
    """
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise UserError(f"{where}: {HISTORY_COLUMN} is not a valid JSON list: {cell[:60]!r}") from None
    if isinstance(cell, str):
        return cell.split()
    tokens = [] if cell is None else cell.tolist() if hasattr(cell, "tolist") else cell
    if not isinstance(tokens, list) or not all(isinstance(token, str | int) for token in tokens):
        raise UserError(f"{where}: {HISTORY_COLUMN} is {str(cell)[:60]!r}, expected a list of tokens")
    return [str(token) for token in tokens]


def rank_users(
    ranker: Ranker,
    histories: Iterable[tuple[str, Iterable[str]]],
    options: RankingOptions,
    skip_unknown: bool,
    source: str,
) -> Iterator[tuple[str, Ranking]]:
    """Users and their rankings; histories are read as they are needed.

    Args:
        ranker: the model.
        histories: a user's name and item tokens, oldest first.
        options: of all rankings.
        skip_unknown: skip unknown items.
        source: where the histories come from, for errors.

    Raises:
        ValueError: an unknown item token.
    """
    warnings = InputWarnings(skip_unknown)
    users: deque[str] = deque()  # read, and not yet ranked

    def read_ids() -> Iterator[list[int]]:
        for user, history in histories:
            try:
                ids = tokens_to_ids(ranker.model.ids, history, warnings)
            except ValueError as error:
                raise UserError(f"{source}, user {user!r}: {error}") from None
            users.append(user)
            yield ids

    ranked = ranker.rank_in_batches(read_ids(), options, warnings)
    return ((users.popleft(), items) for items in ranked)
