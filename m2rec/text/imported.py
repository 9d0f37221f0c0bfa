"""Vectors made elsewhere: .npy with a list of ids, Parquet, CSV. Nothing is ever unpickled."""

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from m2rec.errors import UserError

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".ckpt")
MIN_MEAN_NORM, MAX_MEAN_NORM = 1e-9, 1e15  # mean length, with which single precision can still work
SUPPORTED_FORMATS = ".npy with ids, .parquet or .csv"


class ImportedVectors:
    """A file of vectors, and for .npy one of tokens.

    Attributes:
        fingerprint_fields: what decides the vectors; equal fields mean equal vectors.

    Raises:
        ValueError: a file is missing, or its format is not supported.
    """

    def __init__(self, path: Path, ids: Path | None, id_column: str, name: str) -> None:
        self.path, self.ids, self.id_column = path, ids, id_column
        self.suffix = path.suffix.lower()
        if self.suffix in PICKLE_SUFFIXES:
            raise UserError(
                f"vectors: {path} can hold a pickle, which is never read; give {SUPPORTED_FORMATS}"
            )
        if self.suffix not in (".npy", ".parquet", ".csv"):
            raise UserError(f"vectors: the format of {path} is not supported; give {SUPPORTED_FORMATS}")
        for argument, file in (("vectors", path), ("ids", ids)):
            if file is not None and not file.is_file():
                raise UserError(f"{argument}: no file {file}; give one that exists")
        if self.suffix == ".npy" and ids is None:
            raise UserError(f"ids: {path} has no tokens; give a file with one per line, in its order")
        if self.suffix != ".npy" and ids is not None:
            raise UserError(f"ids: {ids} is only for .npy, {path} has its own tokens; leave it out")
        self.fingerprint_fields = {
            "model": name or path.name,
            "vectors_sha256": _hash_vector_file(path),
            "ids_sha256": _hash_vector_file(ids) if ids else "",
        }

    def read(self) -> tuple[list[str], np.ndarray]:
        """Tokens (n,), and their vectors (n, T).

        Raises:
            ValueError: the file can't be read, rows don't match, a token is empty or duplicated,
                a value is not a finite number, or their mean length is not between 1e-9 and 1e15.
        """
        if self.ids is not None:
            tokens, vectors = _read_ids(self.ids), _read_npy(self.path)
        else:
            read_frame = _read_csv if self.suffix == ".csv" else _read_parquet
            frame = read_frame(self.path, self.id_column)
            tokens, vectors = _split_frame(self.path, frame, self.id_column)
        token_file = self.ids or self.path
        if len(tokens) != len(vectors):
            raise UserError(
                f"{token_file}: {len(tokens):,} tokens for the {len(vectors):,} vectors of {self.path}; "
                "give one per vector"
            )
        _check_tokens(token_file, tokens)
        _check_vectors(self.path, tokens, vectors)
        return tokens, vectors.astype(np.float32)


def _check_tokens(path: Path, tokens: list[str]) -> None:
    """Check that each token is one line and is there once."""
    seen: set[str] = set()
    for number, token in enumerate(tokens, start=1):
        if not token:
            raise UserError(f"{path}: the token of vector {number} is empty; name the item")
        if "\n" in token:
            raise UserError(
                f"{path}: the token of vector {number} has a line break, {token[:40]!r}; if a quotation mark "
                "joins the lines, remove it, or quote the whole cell and double it there"
            )
        if token in seen:
            raise UserError(f"{path}: duplicate token {token!r}; keep one")
        seen.add(token)


def _check_vectors(path: Path, tokens: list[str], vectors: np.ndarray) -> None:
    """Check that the vectors (n, T) are finite and of a length that single precision can work with."""
    if vectors.ndim != 2 or not vectors.size:
        raise UserError(f"{path}: has shape {vectors.shape}; it must be (items, width)")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"{path}: the vector of {tokens[bad[0]]!r} has missing, NaN or infinite values "
            f"({len(bad):,} such vectors); repair or remove them"
        )
    length = float(np.linalg.norm(vectors, axis=1).mean())
    if not MIN_MEAN_NORM < length < MAX_MEAN_NORM:
        raise UserError(f"{path}: its vectors have a mean length of {length}; scale them")


def _read_ids(path: Path) -> list[str]:
    """One token per line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from None
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def _read_npy(path: Path) -> np.ndarray:
    """(n, T), float64."""
    try:
        array = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header as Python source, which can fail in any way
        raise UserError(
            f"{path}: not a numeric array ({error}); save it with numpy.save from a float array"
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: not an array of real numbers; save it with numpy.save from a float array")
    return array.astype(np.float64)


def _read_csv(path: Path, id_column: str) -> pd.DataFrame:
    """The tokens under `id_column`, and numbered columns; a first line of names is left out."""
    try:
        first = pd.read_csv(path, header=None, nrows=1, dtype=str, na_filter=False, encoding="utf-8-sig")
        frame = pd.read_csv(
            path,
            header=None,
            skiprows=int(_is_header(first.iloc[0].tolist(), id_column)),
            converters={0: str},  # a token such as NA is not a missing value
            encoding="utf-8-sig",
            low_memory=False,
        )
    except ValueError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"{path}: not a valid CSV file in UTF-8 ({reason}); repair it") from None
    return frame.set_axis([id_column, *(f"v{number}" for number in frame.columns[1:])], axis=1)


def _is_header(cells: list[str], id_column: str) -> bool:
    """Names; or 0, 1, 2 or 1, 2, 3 and so on, behind a cell that is empty or the id column's name."""
    id_cell, *names = cells
    if id_cell in ("", id_column) and len(names) > 1:
        numbers = list(map(str, range(len(names) + 1)))
        if names in (numbers[:-1], numbers[1:]):
            return True
    return not any(_is_number_or_empty(name) for name in names)


def _is_number_or_empty(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, id_column: str) -> pd.DataFrame:
    """All columns, also those that pandas wrote as an index."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"vectors: {path} needs pyarrow; pip install pyarrow, or give .csv") from None
    try:
        return parquet.read_table(path).to_pandas(ignore_metadata=True)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a valid Parquet file ({error}); write it again") from None


def _split_frame(path: Path, frame: pd.DataFrame, id_column: str) -> tuple[list[str], np.ndarray]:
    """Tokens (n,) of the id column, and vectors (n, T) of either one column of lists or numbered columns.

    Raises:
        ValueError: a column is missing, or can't be part of a vector.
    """
    names = list(map(str, frame.columns))
    if id_column not in names:
        raise UserError(
            f"id_column: {path} has no column {id_column!r}, only {', '.join(names)}; name one of them"
        )
    names.remove(id_column)
    tokens = _convert_tokens(path, frame.pop(id_column))
    if len(names) == 1 and not names[0][-1:].isdigit():
        return tokens, _stack_lists(path, tokens, frame[names[0]])
    for name in names:
        if not name[-1:].isdigit():
            raise UserError(
                f"{path}: column {name!r} is not part of a vector; leave the id, and either one column of "
                "lists or columns of numbers whose names end in one, such as v0, v1"
            )
        _check_numbers(path, tokens, frame[name])
    return tokens, frame.to_numpy(dtype=np.float64)


def _convert_tokens(path: Path, column: pd.Series) -> list[str]:
    """Text, whole numbers, or an empty token where there is none."""
    tokens = []
    for token in column.tolist():
        if isinstance(token, str | int):
            tokens.append(str(token))
        elif pd.isna(token):
            tokens.append("")
        else:
            raise UserError(
                f"{path}: column {column.name!r} has {token!r}; tokens must be text or whole numbers"
            )
    return tokens


def _check_numbers(path: Path, tokens: list[str], column: pd.Series) -> None:
    """Check that a column is numeric, and name the first cell that is not."""
    if column.dtype.kind in "fiu":
        return
    numbers = pd.to_numeric(column, errors="coerce")
    is_bad = numbers.isna() & column.notna()
    row = int(is_bad.to_numpy().argmax())
    token, cell = tokens[row], str(column.iloc[row])
    raise UserError(f"{path}: the vector of {token!r} has {cell!r}, not a number; repair or remove it")


def _stack_lists(path: Path, tokens: list[str], column: pd.Series) -> np.ndarray:
    """(n, T) from a column of lists."""
    rows: list[np.ndarray] = []
    for token, cell in zip(tokens, column, strict=True):
        row = np.asarray([] if cell is None else cell)
        if row.ndim != 1 or row.dtype.kind not in "fiu":
            raise UserError(f"{path}: column {column.name!r} must hold lists of numbers, not {cell!r}")
        rows.append(row)
        if len(row) != len(rows[0]):
            raise UserError(
                f"{path}: the vector of {token!r} has {len(row)} numbers, the first has {len(rows[0])}; "
                "every vector needs as many"
            )
    return np.stack(rows).astype(np.float64) if rows else np.empty((0, 0))


def _hash_vector_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
