"""Rows of Parquet files."""

from collections.abc import Collection, Sequence

from m2rec.data.column_names import require_columns
from m2rec.data.raw.filters import get_path_column
from m2rec.data.raw.tally import NumberedRows, Tally
from m2rec.errors import UserError

PARQUET_BATCH_ROWS = 10_000


def read_parquet_rows(tally: Tally, paths: Sequence[str], optional: Collection[str] = ()) -> NumberedRows:
    """Rows of a Parquet file, with these columns only, batch by batch.

    Args:
        tally: names the file.
        paths: columns, which must exist once each, or paths into them, see `filters`.
        optional: lower-case names of columns that are read too where they exist, in any case.

    Raises:
        ValueError: pyarrow is not installed, the file can't be read, or a column is missing or duplicated.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError(f"{tally.path}: reading Parquet needs pyarrow; run: pip install pyarrow") from None
    size = tally.path.stat().st_size
    try:
        with parquet.ParquetFile(tally.path) as file:
            schema_names = file.schema_arrow.names
            columns = [_find_column(path, schema_names) for path in paths]
            require_columns(tally.path, schema_names, columns)
            columns += [name for name in schema_names if name.lower() in optional]
            columns = list(dict.fromkeys(columns))
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    tally.lines += 1
                    yield tally.lines, row
                tally.position = size * tally.lines // file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{tally.path}: not a complete Parquet file ({error}); write it again") from None


def _find_column(path: str, names: Sequence[str]) -> str:
    """The column that holds what a path names: a column may have dots in its own name."""
    column = get_path_column(path)
    return column if column in names else column.split(".")[0]
