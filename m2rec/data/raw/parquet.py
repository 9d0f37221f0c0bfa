"""Rows of Parquet files, and of folders of parts as Spark writes them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from m2rec.data.column_names import require_columns
from m2rec.data.raw.blocks import Block, TableBlocks
from m2rec.data.raw.filters import get_path_column
from m2rec.data.raw.tally import NumberedRows, Tally
from m2rec.errors import UserError, format_one_line

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 10_000  # as Python objects
LARGE_BLOCK_ROWS = 1 << 18
SMALL_BLOCK_ROWS = 1 << 12
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # stands for a missing value in a folder's name


def read_parquet_rows(tally: Tally, paths: Sequence[str], optional: Collection[str] = ()) -> NumberedRows:
    """Rows of a Parquet file or folder, with these columns only, batch by batch.

    Args:
        tally: names the file.
        paths: columns, which must exist once each, or paths into them, see `filters`.
        optional: lower-case names of columns that are read too where they exist, in any case.

    Raises:
        ValueError: a file can't be read, or a column is missing or duplicated.
    """
    for batch in _iterate_batches(tally, paths, optional, ROWS_AT_ONCE):
        for row in batch.to_pylist():
            tally.lines += 1
            yield tally.lines, row


def list_parquet_parts(path: Path) -> list[Path]:
    """The file, or the files within a folder in the order of their names; hidden ones are left out.

    Raises:
        ValueError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    parts = []
    for part in sorted(path.rglob("*")):
        names = part.relative_to(path).parts
        if part.is_file() and not any(name.startswith((".", "_")) for name in names):
            parts.append(part)
    if not parts:
        raise UserError(f"{path}: the folder has no files; give the folder of the Parquet parts")
    return parts


def _iterate_batches(
    tally: Tally, paths: Sequence[str], optional: Collection[str], n_rows: int
) -> "Iterator[pa.RecordBatch]":
    """Batches of up to `n_rows` rows; the tally knows the part and the position of the next one."""
    done, n_lines = 0, 0
    parts = list_parquet_parts(tally.path)
    for part in parts:
        if part != tally.path:
            tally.begin_part(n_lines, str(part.relative_to(tally.path)))
        size = part.stat().st_size
        n_read = 0
        for batch, n_all in _iterate_part(part, _read_partition(tally.path, part), paths, optional, n_rows):
            yield batch
            n_read += len(batch)
            tally.position = done + size * n_read // n_all
        done, n_lines = done + size, n_lines + n_read


def _iterate_part(
    path: Path,
    partition: Mapping[str, str | None],
    paths: Sequence[str],
    optional: Collection[str],
    n_rows: int,
) -> "Iterator[tuple[pa.RecordBatch, int]]":
    """Batches of a file, and the number of its rows.

    Args:
        partition: further columns, of one value each.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            own = file.schema_arrow.names
            names = [*own, *(name for name in partition if name not in own)]
            columns = [_find_column(column, names) for column in paths]
            require_columns(path, names, columns)
            columns += [name for name in names if name.lower() in optional]
            columns = list(dict.fromkeys(columns))
            for batch in file.iter_batches(n_rows, columns=[name for name in columns if name in own]):
                for name in columns:
                    if name not in own:
                        values = pa.array([partition[name]], pa.string()).take(
                            pa.array([0] * len(batch), pa.int8())
                        )
                        batch = batch.append_column(name, values)
                yield batch, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = format_one_line(error)
        raise UserError(f"{path}: not a complete Parquet file ({reason}); write it again") from None


def _read_partition(folder: Path, part: Path) -> dict[str, str | None]:
    """The columns that the names of folders hold, such as `date=2020-01-01`."""
    if part == folder:
        return {}
    named = [name.split("=", 1) for name in part.relative_to(folder).parts[:-1] if "=" in name]
    return {unquote(key): None if value == _NO_PARTITION else unquote(value) for key, value in named}


def _find_column(path: str, names: Sequence[str]) -> str:
    """The column that holds what a path names: a column may have dots in its own name."""
    column = get_path_column(path)
    return column if column in names else column.split(".")[0]


class ParquetBlocks:
    """Blocks of a Parquet file or folder.

    Args:
        tally: counts rows.
        batches: all rows.
    """

    def __init__(self, tally: Tally, batches: "Iterator[pa.RecordBatch]") -> None:
        self.position = 0
        self._tally, self._batches = tally, batches
        self._rest: pa.RecordBatch | None = None

    def peek(self, is_large: bool) -> Block | None:
        """The next rows of a part; None at the end."""
        while self._rest is None or not len(self._rest):
            self._rest = next(self._batches, None)
            if self._rest is None:
                return None
        rows = self._rest if is_large else self._rest.slice(0, SMALL_BLOCK_ROWS)
        names = rows.schema.names
        columns = dict(zip(names, rows.columns, strict=True))
        return Block(len(rows), is_large, len(rows), names, True, columns)

    def take(self, block: Block) -> None:
        """Count the rows of a block and go on behind it."""
        self._tally.lines += block.n_rows
        self._skip(block)

    def read_rows(self, block: Block) -> NumberedRows:
        """Read the rows of a block."""
        assert self._rest is not None
        for row in self._rest.slice(0, block.n_rows).to_pylist():
            self._tally.lines += 1
            yield self._tally.lines, row
        self._skip(block)

    def _skip(self, block: Block) -> None:
        assert self._rest is not None
        self._rest = self._rest.slice(block.n_rows)
        self.position += block.size


@contextmanager
def open_parquet_blocks(
    tally: Tally, used: Collection[str], paths: Sequence[str], optional: Collection[str] = ()
) -> Iterator[TableBlocks]:
    """Blocks of the file or folder that `read_parquet_rows` reads.

    Args:
        used: names of columns; all that are read are in the blocks.
    """
    yield ParquetBlocks(tally, _iterate_batches(tally, paths, optional, LARGE_BLOCK_ROWS))
