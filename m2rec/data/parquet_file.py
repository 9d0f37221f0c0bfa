"""Read NAME.inter.parquet, a table with the columns of NAME.inter, batch by batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from m2rec.errors import UserError, format_one_line

SUFFIX = ".parquet"
BATCH_ROWS = 1 << 20


def read_column_cells(path: Path) -> list[str]:
    """The names of the columns, such as `user_id:token`.

    Raises:
        ValueError: the file is not a Parquet file.
    """
    with _open_file(path) as file:
        return list(file.schema_arrow.names)


def iterate_parquet_batches(
    path: Path, types: Mapping[str, str]
) -> Iterator[dict[str, pa.Array | np.ndarray]]:
    """Columns of a Parquet file: a `token` as text, null where it is empty, everything else as numbers.

    Args:
        types: `token` or `float` of the columns to read, by their names without the type.

    Raises:
        ValueError: the file can't be read, or a column has values of another type.
    """
    with _open_file(path) as file:
        cells = {cell.rpartition(":")[0]: cell for cell in file.schema_arrow.names}
        for batch in file.iter_batches(BATCH_ROWS, columns=[cells[name] for name in types]):
            columns: dict[str, pa.Array | np.ndarray] = {}
            for name, kind in types.items():
                values = batch.column(cells[name])
                if kind == "token":
                    columns[name] = _convert_tokens(path, cells[name], values)
                else:
                    columns[name] = _convert_numbers(path, cells[name], values)
            yield columns


@contextmanager
def _open_file(path: Path) -> Iterator[parquet.ParquetFile]:
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a complete Parquet file ({format_one_line(error)}); write it again"
        ) from None


def _convert_tokens(path: Path, cell: str, values: pa.Array) -> pa.StringArray:
    """Texts, or whole numbers as texts; any numbers where the column is not one of tokens."""
    value_type = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    is_text = pa.types.is_string(value_type) or pa.types.is_large_string(value_type)
    is_number = pa.types.is_floating(value_type) and not cell.endswith(":token")
    if not is_text and not is_number and not pa.types.is_integer(value_type):
        raise UserError(
            f"{path}: column {cell!r} has values of type {value_type}; write tokens as text or integers"
        )
    texts = values.cast(value_type).cast(pa.string())
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _convert_numbers(path: Path, cell: str, values: pa.Array) -> np.ndarray:
    """int64 if all are whole numbers, else doubles, NaN where one is missing."""
    is_integer = pa.types.is_integer(values.type)
    if not is_integer and not pa.types.is_floating(values.type):
        raise UserError(
            f"{path}: column {cell!r} has values of type {values.type}; write numbers, times in any unit"
        )
    if is_integer and not values.null_count and not pa.types.is_uint64(values.type):
        return np.asarray(values.cast(pa.int64()).to_numpy())
    return np.asarray(values.cast(pa.float64(), safe=False).to_numpy(False))
