"""Vectors made elsewhere: .npy with a list of ids, Parquet, CSV. Nothing is unpickled, ever."""

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from m2rec.errors import UserError

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt")
MIN_MEAN_NORM, MAX_MEAN_NORM = 1e-9, 1e15  # mean length, with which single precision can still work
SUPPORTED_FORMATS = ".npy with --ids, .parquet or .csv"


class ImportedVectors:
    """A file of vectors, and for .npy one of tokens.

    Attributes:
        decisive: what decides the vectors, to compare with another time.

    Raises:
        ValueError: a file is missing, or of a kind that is not read.
    """

    def __init__(self, path: Path, ids: Path | None, id_column: str, name: str) -> None:
        self.path, self.ids, self.id_column = path, ids, id_column
        self.suffix = path.suffix.lower()
        if self.suffix in PICKLE_SUFFIXES:
            raise UserError(
                f"--vectors: {path} can hold a pickle, which is never read; give {SUPPORTED_FORMATS}"
            )
        if self.suffix not in (".npy", ".parquet", ".csv"):
            raise UserError(f"--vectors: {path} is of a kind that is not read; give {SUPPORTED_FORMATS}")
        for option, file in (("--vectors", path), ("--ids", ids)):
            if file is not None and not file.is_file():
                raise UserError(f"{option}: no file {file}; give one that exists")
        if self.suffix == ".npy" and ids is None:
            raise UserError(f"--ids: {path} has no tokens; give a file with one per line, in its order")
        if self.suffix != ".npy" and ids is not None:
            raise UserError(f"--ids: {ids} is only for .npy, {path} has tokens of its own; leave it out")
        self.fingerprint_fields = {
            "model": name or path.name,
            "vectors_sha256": _hash_vector_file(path),
            "ids_sha256": _hash_vector_file(ids) if ids else "",
        }

    def read(self) -> tuple[list[str], np.ndarray]:
        """Tokens (n,), and their vectors (n, T).

        Raises:
            ValueError: the file can't be read, rows don't match, a token is empty or comes twice,
                a value is no finite number, or their mean length is not between 1e-9 and 1e15.
        """
        if self.suffix == ".npy":
            tokens, vectors = _read_ids(self.ids), _read_npy(self.path)
        elif self.suffix == ".csv":
            tokens, vectors = _read_csv(self.path, self.id_column)
        else:
            tokens, vectors = _read_parquet(self.path, self.id_column)
        _check_imported_vectors(self.path, self.ids or self.path, tokens, vectors)
        length = float(np.linalg.norm(vectors, axis=1).mean())
        if not MIN_MEAN_NORM < length < MAX_MEAN_NORM:
            raise UserError(f"{self.path}: its vectors have a mean length of {length}; scale them")
        return tokens, vectors.astype(np.float32)


def _check_imported_vectors(path: Path, ids: Path, tokens: Sequence[str], vectors: np.ndarray) -> None:
    """Everything that must hold whatever the kind of file."""
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise UserError(f"{path}: has shape {vectors.shape}; it must be (items, width)")
    if len(tokens) != len(vectors):
        raise UserError(
            f"{ids}: {len(tokens):,} tokens for the {len(vectors):,} vectors of {path}; give one per vector"
        )
    if not tokens:
        raise UserError(f"{path}: has no vector; it needs one per item")
    if "" in tokens:
        raise UserError(f"{ids}: the token of vector {list(tokens).index('') + 1} is empty; name the item")
    twice, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise UserError(f"{ids}: token {twice!r} comes {times} times; keep one")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"{path}: the vector of {tokens[bad[0]]!r} holds NaN or infinite values "
            f"({len(bad):,} such vectors); repair or remove them"
        )


def _read_ids(path: Path | None) -> list[str]:
    """One token per line."""
    assert path is not None
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    return [line.removesuffix("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]


def _read_npy(path: Path) -> np.ndarray:
    """(n, T), float64."""
    try:
        found = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python source, with all that can go wrong there
        raise UserError(
            f"{path}: is no array of numbers ({error}); save it with numpy.save from a float array"
        ) from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu":
        raise UserError(f"{path}: is no array of real numbers; save it with numpy.save from a float array")
    return found.astype(np.float64)


def _read_csv(path: Path, id_column: str) -> tuple[list[str], np.ndarray]:
    """First column the token, the others numbers; a first line of names is left out."""
    tokens: list[str] = []
    rows: list[np.ndarray] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, cells in _iterate_csv_lines(path, file):
                if not cells or (line == 1 and _is_header(cells, id_column)):
                    continue
                tokens.append(cells[0])
                rows.append(_parse_numbers(path, line, cells[1:]))
                if len(rows[-1]) != len(rows[0]):
                    raise UserError(
                        f"{path}: line {line} has {len(rows[-1])} numbers, the first has {len(rows[0])}; "
                        "every line needs as many"
                    )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no CSV in UTF-8 ({error}); save it as such") from None
    return tokens, np.array(rows, dtype=np.float64).reshape(len(rows), -1 if rows else 0)


def _iterate_csv_lines(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Line numbers with their cells; no token has a line break, so that each line is one record.

    Raises:
        ValueError: a quotation mark joins lines, or stands where none can.
    """
    reader = csv.reader(file, strict=True)
    line = 1
    try:
        for cells in reader:
            if reader.line_num > line:
                raise UserError(
                    f"{path}: a quotation mark in line {line} joins the lines up to {reader.line_num}; "
                    "remove it, or quote the whole cell and double it there"
                )
            yield line, cells
            line += 1
    except csv.Error as error:
        raise UserError(
            f"{path}: is no CSV in UTF-8 from line {line} on ({error}); repair that line"
        ) from None


def _is_header(cells: list[str], id_column: str) -> bool:
    """Names; or 0, 1, 2 or 1, 2, 3 and so on, behind a cell that is empty or names the id column."""
    names = cells[1:]
    counts = [[str(number + first) for number in range(len(names))] for first in (0, 1)]
    if len(names) > 1 and cells[0] in ("", id_column) and names in counts:
        return True
    return all(name and not _is_number(name) for name in names)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parse_numbers(path: Path, line: int, cells: Sequence[str]) -> np.ndarray:
    """(T,) numbers of one line."""
    wrong = next((cell for cell in cells if not _is_number(cell)), None)
    if wrong is not None:
        raise UserError(f"{path}: line {line} has {wrong!r}, not a number; repair or remove the line")
    return np.array([float(cell) for cell in cells], dtype=np.float64)


def _read_parquet(path: Path, id_column: str) -> tuple[list[str], np.ndarray]:
    """An id column and either one column of lists or columns that end in a number."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"--vectors: {path} needs pyarrow; pip install pyarrow, or give .csv") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: is no Parquet file ({error}); write it again") from None
    if id_column not in table.column_names:
        raise UserError(
            f"{path}: column {id_column!r} is missing, the file has {', '.join(table.column_names)}; "
            "set --id-column"
        )
    tokens = _convert_token_column(path, id_column, table.column(id_column))
    others = [name for name in table.column_names if name != id_column]
    if len(others) == 1 and not re.search(r"\d$", others[0]):
        return tokens, _convert_list_column(path, tokens, table.column(others[0]))
    wrong = next((name for name in others if not _is_vector_column(table, name)), None)
    if wrong is not None or not others:
        raise UserError(
            f"{path}: column {wrong!r} is no part of a vector; leave the id, and either one column of "
            "lists or columns of numbers whose names end in one, such as v0, v1"
        )
    columns = [table.column(name).to_numpy() for name in others]
    return tokens, np.stack(columns, axis=1).astype(np.float64)


def _is_vector_column(table: Any, name: str) -> bool:
    from pyarrow import types

    kind = table.schema.field(name).type
    return bool(re.search(r"\d$", name)) and (types.is_floating(kind) or types.is_integer(kind))


def _convert_token_column(path: Path, name: str, column: Any) -> list[str]:
    from pyarrow import types

    text = (types.is_string, types.is_large_string, types.is_integer)
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not any(is_kind(kind) for is_kind in text):
        raise UserError(f"{path}: column {name!r} is {column.type}; tokens must be text or whole numbers")
    return ["" if token is None else str(token) for token in column.to_pylist()]


def _convert_list_column(path: Path, tokens: Sequence[str], column: Any) -> np.ndarray:
    """(n, T) from a column of lists."""
    from pyarrow import compute, types

    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    kind = column.type
    numbers = any(is_kind(kind) for is_kind in lists) and (
        types.is_floating(kind.value_type) or types.is_integer(kind.value_type)
    )
    if not numbers:
        raise UserError(f"{path}: its only other column is {kind}; it must hold lists of numbers")
    lengths = [length or 0 for length in compute.list_value_length(column).to_pylist()]
    odd = next((place for place, length in enumerate(lengths) if length != lengths[0]), None)
    if odd is not None:
        raise UserError(
            f"{path}: the vector of {tokens[odd]!r} has {lengths[odd]} numbers, the first has {lengths[0]}; "
            "every vector needs as many"
        )
    flat = compute.list_flatten(column).to_numpy()
    return np.asarray(flat, dtype=np.float64).reshape(len(lengths), lengths[0] if lengths else 0)


def _hash_vector_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
