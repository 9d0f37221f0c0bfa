"""Text-vector files: one vector per item token, with where it came from.

A file is safetensors with `vectors` (n, T) in units of `scale`, a number in its metadata (1 where
there is none), the item tokens as UTF-8 bytes end to end in `tokens` with the end of each in
`token_ends`, and more metadata: `model`, `date` and the rest of what made it (`build`). Vectors are
joined to a data set by token, never by position.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2rec.cli import name_command
from m2rec.errors import UserError
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.text.whitening import compute_mean_cosine, fit_whitening

VECTOR_FILE_SUFFIX = ".text.safetensors"
LSA_NAME = "lsa"  # the `model` of vectors made by `lsa`
ANY_VECTORS, NO_VECTORS = "any", "none"  # values of `text_fingerprint` that are no fingerprint
ITEM_FILE_KEY = "item_file"  # size and time of NAME.item (`item_file.format_file_stamp`)


class RawVectors(NamedTuple):
    """A text-vector file's content: tokens (n,), vectors (n, T) in float32, and metadata."""

    tokens: list[str]
    vectors: Tensor
    metadata: dict[str, str]


@dataclass(frozen=True)
class TextVectors:
    """Vectors by internal item id, ready for the model.

    Attributes:
        vectors: (V, T), zero for padding and for items without text; the mean length of the
            other vectors is 1.
        missing: tokens of the items without text.
        mean, basis: what was subtracted (T0,) and multiplied with (T0, T), for items added later.
        provenance: the file, its metadata and sha256, how many items it matches, and the mean
            cosine between two items' vectors before and after whitening. Language models put their
            vectors into a narrow cone, where it is far above 0.
    """

    vectors: Tensor
    missing: tuple[str, ...]
    mean: Tensor
    basis: Tensor
    provenance: dict[str, str | int | float]


class MatchedVectors(NamedTuple):
    """A file's vectors for the items of a data set, as they are in the file."""

    ids: list[int]
    """(n,), internal ids of the items that have one."""
    raw: Tensor
    """(n, T0)."""
    missing: tuple[str, ...]
    """Tokens of the items without text."""
    provenance: dict[str, str | int | float]
    """As in `TextVectors`, before whitening."""


def resolve_vector_file(name: str, dataset: str, *folders: Path) -> Path | None:
    """The file that the setting `text_vectors` means, None if there is none.

    `auto` looks for <dataset>.text.safetensors in the folders.

    Raises:
        ValueError: a file was named and does not exist.
    """
    if name == "none":
        return None
    if name != "auto":
        if not Path(name).is_file():
            raise UserError(
                f"text_vectors: no file {name!r}; make it with {name_command('embed')}, "
                "or set text_vectors: none"
            )
        return Path(name)
    for folder in folders:
        path = folder / f"{dataset}{VECTOR_FILE_SUFFIX}"
        if path.is_file():
            return path
    return None


def write_text_vectors(
    path: Path, tokens: Sequence[str], vectors: np.ndarray, provenance: dict[str, str]
) -> None:
    """Write a text-vector file with vectors (n, T) in half precision, which a power of two keeps in range."""
    lengths = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=1)
    mean_length = lengths.mean() if len(lengths) else 1.0
    scale = 1.0
    if 0 < mean_length < np.inf:
        scale = 2.0 ** round(np.log2(mean_length))
    encoded = [token.encode() for token in tokens]
    ends = np.cumsum(list(map(len, encoded)), dtype=np.int64)
    tensors = {
        "vectors": torch.from_numpy(np.asarray(vectors / scale, dtype=np.float16)),
        "tokens": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "token_ends": torch.from_numpy(ends),
    }
    write_tensors(path, tensors, {**provenance, "scale": repr(scale)})


def read_text_vectors(path: Path) -> RawVectors:
    """Read a text-vector file.

    Raises:
        ValueError: the file is not one, or is inconsistent; tokens repeat; a value is not finite.
    """
    try:
        tensors, metadata = read_tensors(path, require_checksum=False)  # files before the checksum have none
        missing = {"vectors", "tokens", "token_ends"} - set(tensors)
        if missing:
            raise UserError(f"{path} has no {', '.join(sorted(missing))}")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise UserError(
            f"text_vectors: {path} is not a text-vector file ({reason}); make it with {name_command('embed')}"
        ) from None
    tokens = _decode_tokens(path, tensors["tokens"], tensors["token_ends"])
    vectors = tensors["vectors"]
    if vectors.dim() != 2 or len(vectors) != len(tokens) or vectors.shape[1] == 0:
        raise UserError(
            f"text_vectors: {path} has vectors of the wrong width, shape {tuple(vectors.shape)} "
            f"for {len(tokens)} tokens; expected ({len(tokens)}, T)"
        )
    for token, count in Counter(tokens).most_common(1):
        if count > 1:
            raise UserError(f"text_vectors: {path} has token {token!r} more than once; keep one of them")
    vectors = vectors.float() * _parse_scale(path, metadata.pop("scale", "1"))
    if not torch.isfinite(vectors).all():
        raise UserError(f"text_vectors: {path} holds NaN or infinite values; make it again")
    metadata.pop(ITEM_FILE_KEY, None)
    return RawVectors(tokens, vectors, metadata)


def _parse_scale(path: Path, text: str) -> float:
    """A positive, finite number."""
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise UserError(f"text_vectors: {path} has a damaged scale, {text!r}; make it again")
    return scale


def _decode_tokens(path: Path, data: Tensor, ends: Tensor) -> list[str]:
    """Tokens from their bytes end to end and the end of each."""
    is_valid = data.dtype == torch.uint8 and ends.dtype == torch.int64 and data.dim() == ends.dim() == 1
    bounds = [0, *ends.tolist()] if is_valid else []
    if not is_valid or bounds != sorted(bounds) or bounds[-1] != len(data):
        raise UserError(
            f"text_vectors: {path} has damaged tokens; make it again with {name_command('embed')}"
        )
    text = data.numpy().tobytes()
    try:
        return [text[start:end].decode() for start, end in pairwise(bounds)]
    except UnicodeDecodeError:
        raise UserError(f"text_vectors: {path} has a token that is not UTF-8; make it again") from None


def load_item_vectors(
    path: Path, id_tokens: Sequence[str], whitening: str = "pca", width: int = 0
) -> TextVectors:
    """Read a file and bring its vectors into a data set's internal ids.

    Args:
        path: the file.
        id_tokens: the data set's item tokens by internal id; id 0 is padding.
        whitening: `none` (centre only), `pca` or `zca`.
        width: keep that many principal components, 0 for all; not with `none`.

    Raises:
        ValueError: see `match_item_vectors`; or `width` does not fit.
    """
    file = match_item_vectors(path, id_tokens)
    mean, basis = fit_whitening(file.raw, whitening, width)
    whitened = (file.raw - mean) @ basis
    vectors = torch.zeros(len(id_tokens), basis.shape[1])
    vectors[file.ids] = whitened
    provenance = {**file.provenance, "mean_cosine_whitened": round(compute_mean_cosine(whitened), 4)}
    return TextVectors(vectors, file.missing, mean, basis, provenance)


def match_item_vectors(path: Path, id_tokens: Sequence[str]) -> MatchedVectors:
    """Read a file and find a data set's items in it.

    Args:
        path: the file.
        id_tokens: as for `load_item_vectors`.

    Raises:
        ValueError: the file is unusable (see `read_text_vectors`), or no token matches.
    """
    file = read_text_vectors(path)
    ids, rows, missing = _match_tokens(file, id_tokens)
    if not ids:
        raise UserError(
            f"text_vectors: {path} has no token of this data set (its first: {file.tokens[:3]}, the data "
            f"set's: {list(map(str, id_tokens[1:4]))}); make it from this data set's items"
        )
    raw = file.vectors[rows]
    provenance: dict[str, str | int | float] = {
        "file": str(path),
        **file.metadata,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "matched": len(ids),
        "items": len(id_tokens) - 1,
        "mean_cosine": round(compute_mean_cosine(raw), 4),
    }
    return MatchedVectors(ids, raw, tuple(missing), provenance)


def _match_tokens(file: RawVectors, id_tokens: Sequence[str]) -> tuple[list[int], list[int], list[str]]:
    """Ids of the items that have a vector, its row for each, and the tokens of the items that have none."""
    row_of_token = {}
    for row in file.vectors.any(dim=1).nonzero().flatten().tolist():  # a zero vector counts as no text
        row_of_token[file.tokens[row]] = row
    ids, rows, missing = [], [], []
    for item_id, token in enumerate(map(str, id_tokens[1:]), start=1):
        if token in row_of_token:
            ids.append(item_id)
            rows.append(row_of_token[token])
        else:
            missing.append(token)
    return ids, rows, missing


def get_fingerprint(provenance: Mapping[str, Any]) -> str:
    """What identifies vectors: the fingerprint of what made them, else the hash of their file."""
    return str(provenance.get("fingerprint") or provenance["sha256"])


def format_missing_items(tokens: Sequence[str]) -> str:
    """What a line of the log adds about items without text."""
    return f"; the first without: {', '.join(tokens[:5])}" if tokens else ""


def check_same_text_encoder(path: Path, file_metadata: Mapping[str, str], run: Mapping[str, Any]) -> None:
    """Check that new vectors can be used beside those that a model was trained with.

    Args:
        path: the file of the new vectors.
        file_metadata: its metadata.
        run: the metadata of the vectors that the model was trained with.

    Raises:
        ValueError: another model made them, or the same model with other options.
    """
    for name, metadata in ((path, file_metadata), ("the run", run)):
        if not metadata.get("model"):
            raise UserError(f"{name} does not say which model made its vectors; use add_items")
    if run["model"] == LSA_NAME:
        raise UserError(
            f"{path} can't be added: lsa is fitted to its own texts; train with vectors of a language model"
        )
    for key in (*_list_weight_keys(file_metadata, run), "pooling", "instruction"):
        ours, theirs = run.get(key) or "", file_metadata.get(key) or ""
        if ours != theirs:
            models = f"{file_metadata['model']}, the run of {run['model']}"
            raise UserError(
                f"{path} has vectors of {models}, and {key} is {theirs!r}, not {ours!r}; "
                f"encode the items as those of the run"
            )


def _list_weight_keys(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The metadata that tell whether both have the same weights; a commit is safer than a hash of files."""
    if first.get("revision") and second.get("revision"):
        return ["model", "revision"]
    if "model_sha256" in first and "model_sha256" in second:
        return ["model_sha256"]
    return ["model"]
