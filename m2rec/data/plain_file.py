"""Read a well-formed NAME.inter with pyarrow, batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from m2rec.data.columns import TOKEN_TYPE

BLOCK_BYTES = 1 << 26  # larger ones repeat fewer tokens


class OddFileError(Exception):
    """The file is one that pyarrow does not read: pandas reads or explains it."""


def iterate_plain_batches(
    path: Path, separator: str, names: Sequence[str], types: Mapping[str, str]
) -> Iterator[dict[str, pa.Array]]:
    """Columns of a file without quotation marks or escapes, an empty cell missing; blank lines are skipped.

    Args:
        separator: between columns; of one ASCII character.
        names: of all columns.
        types: of the columns to read: a `token` is dictionary-encoded, everything else is text.

    Raises:
        OddFileError: the separator is another one, a line has too many or too few columns, or the file is
            not UTF-8.
    """
    if len(separator) != 1 or not separator.isascii():
        raise OddFileError
    is_token = {name: types.get(name) == "token" for name in names}
    kinds = {name: TOKEN_TYPE if is_token[name] else pa.string() for name in names}
    # all columns are converted, since text that is not UTF-8 is an error in each
    convert = csv.ConvertOptions(
        column_types=kinds,
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    parse = csv.ParseOptions(delimiter=separator, quote_char=False, escape_char=False)
    read = csv.ReadOptions(skip_rows=1, column_names=list(names), block_size=BLOCK_BYTES)
    try:
        with csv.open_csv(path, read, parse, convert) as reader:
            for batch in reader:
                yield {name: batch.column(name) for name in types}
    except pa.ArrowInvalid:
        raise OddFileError from None
