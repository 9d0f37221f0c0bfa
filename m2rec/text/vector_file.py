"""Text-vector files: one vector per item token, with where it came from.

A file is safetensors with `vectors` (n, T) in units of `scale`, a number in its metadata (1 where
there is none), the item tokens as UTF-8 bytes end to end in `tokens` with the end of each in
`token_ends`, and more metadata: `model`, `date` and what else made it (`make_vectors`). Vectors are
joined to a data set by token, never by position.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rec.errors import UserError
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.text import lsa

VECTOR_FILE_SUFFIX = ".text.safetensors"


@dataclass(frozen=True)
class TextVectors:
    """Vectors by internal item id, ready for the model.

    Attributes:
        vectors: (V, T), zero for padding and for items without text; the others have unit
            length on average.
        missing: tokens of the items without text.
        cosines: mean cosine between the vectors of two items, as they are in the file and whitened;
            language models put theirs into a narrow cone, where it is far above 0.
        mean, basis: what was subtracted (T0,) and multiplied with (T0, T), so that a later
            item can get the same treatment.
        provenance: what the file says of itself, with its sha256.
    """

    vectors: Tensor
    missing: tuple[str, ...]
    mean_cosines: tuple[float, float]
    mean: Tensor
    basis: Tensor
    provenance: dict[str, str]


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
                f"text_vectors: no file {name!r}; make it with scripts/embed_items.py, "
                "or set text_vectors: none"
            )
        return Path(name)
    places = (folder / f"{dataset}{VECTOR_FILE_SUFFIX}" for folder in folders)
    return next((p for p in places if p.is_file()), None)


def write_text_vectors(
    path: Path, tokens: Sequence[str], vectors: np.ndarray, provenance: dict[str, str]
) -> None:
    """Write a text-vector file with vectors (n, T) in half precision, which a power of two keeps in range."""
    length = np.linalg.norm(np.asarray(vectors, dtype=np.float64), axis=1).mean() if len(vectors) else 1.0
    scale = 2.0 ** round(np.log2(length)) if 0 < length < np.inf else 1.0
    encoded = [token.encode() for token in tokens]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    tensors = {
        "vectors": torch.from_numpy(np.asarray(vectors / scale, dtype=np.float16)),
        "tokens": torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
        "token_ends": torch.from_numpy(ends),
    }
    write_tensors(path, tensors, {**provenance, "scale": repr(scale)})


def read_text_vectors(path: Path) -> tuple[list[str], Tensor, dict[str, str]]:
    """Read a text-vector file: its tokens, vectors (n, T) in float32, and provenance.

    Raises:
        ValueError: the file is not one, or is inconsistent; tokens repeat; a value is not finite.
    """
    try:
        tensors, provenance = read_tensors(
            path, require_checksum=False
        )  # files before the checksum have none
        missing = {"vectors", "tokens", "token_ends"} - set(tensors)
        if missing:
            raise UserError(f"{path} has no {', '.join(sorted(missing))}")
    except ValueError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise UserError(
            f"text_vectors: {path} is not a text-vector file ({reason}); make it with scripts/embed_items.py"
        ) from None
    vectors, tokens = tensors["vectors"], _decode_tokens(path, tensors["tokens"], tensors["token_ends"])
    if vectors.dim() != 2 or len(vectors) != len(tokens) or vectors.shape[1] == 0:
        raise UserError(
            f"text_vectors: {path} has vectors of the wrong width, shape {tuple(vectors.shape)} "
            f"for {len(tokens)} tokens; expected ({len(tokens)}, T)"
        )
    twice, times = Counter(tokens).most_common(1)[0] if tokens else ("", 1)
    if times > 1:
        raise UserError(f"text_vectors: {path} has token {twice!r} more than once; keep one of them")
    vectors = vectors.float() * _parse_scale(path, provenance.pop("scale", "1"))
    if not torch.isfinite(vectors).all():
        raise UserError(f"text_vectors: {path} holds NaN or infinite values; make it again")
    return tokens, vectors, provenance


def _parse_scale(path: Path, text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise UserError(f"text_vectors: {path} has a damaged scale, {text!r}; make it again")
    return scale


def check_same_text_encoder(path: Path, made_by: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    """Vectors of another model, or otherwise made by the same, mean something else.

    Args:
        path: the file of the vectors.
        made_by: what it says of itself.
        wanted: what the file said of itself whose vectors they should go with.

    Raises:
        ValueError: they don't.
    """
    if not made_by.get("model") or not wanted.get("model"):
        lacks = path if not made_by.get("model") else "the run"
        raise UserError(f"add_items: {lacks} does not say which model made its vectors; use add_items")
    if wanted["model"] == lsa.LSA_NAME:
        raise UserError(
            "add_items: vectors of lsa mean something only beside those that were made with them; train "
            "with those of a language model"
        )
    if wanted.get("revision") and made_by.get("revision"):  # a commit says more than a hash of the settings
        same_weights = ["model", "revision"]
    else:
        same_weights = ["model_sha256" if "model_sha256" in wanted and "model_sha256" in made_by else "model"]
    for key in [*same_weights, "pooling", "instruction"]:
        ours, theirs = wanted.get(key) or "", made_by.get(key) or ""
        if ours != theirs:
            models = f"{made_by['model']}, the run of {wanted['model']}"
            raise UserError(
                f"add_items: {path} has vectors of {models}, and {key} is {theirs!r}, not {ours!r}; "
                f"encode the items as those of the run"
            )


def _decode_tokens(path: Path, data: Tensor, ends: Tensor) -> list[str]:
    """Tokens from their bytes end to end and the end of each."""
    whole = data.dtype == torch.uint8 and ends.dtype == torch.int64 and data.dim() == ends.dim() == 1
    bounds = [0, *ends.tolist()] if whole else []
    if not whole or bounds != sorted(bounds) or bounds[-1] != len(data):
        raise UserError(f"text_vectors: {path} has damaged tokens; make it again with scripts/embed_items.py")
    text = data.numpy().tobytes()
    try:
        return [text[start:end].decode() for start, end in pairwise(bounds)]
    except UnicodeDecodeError:
        raise UserError(f"text_vectors: {path} has a token that is not UTF-8; make it again") from None


def load_item_vectors(
    path: Path, id_tokens: Sequence[str], whitening: str = "pca", width: int = 0
) -> TextVectors:
    """Read a file and bring it into a data set's internal ids.

    Args:
        path: the file.
        id_tokens: the data set's item tokens by internal id; id 0 is padding.
        whitening: `none` (centre only), `pca` or `zca`.
        width: keep that many principal components, 0 for all; not with `none`.

    Raises:
        ValueError: the file is unusable (see `read_text_vectors`), no token matches, or `width` does not fit.
    """
    tokens, raw, provenance = read_text_vectors(path)
    says_something = raw.any(dim=1).tolist()
    row = {token: i for i, token in enumerate(tokens) if says_something[i]}
    found = [(i, row[str(t)]) for i, t in enumerate(id_tokens) if i > 0 and str(t) in row]
    if not found:
        raise UserError(
            f"text_vectors: {path} has no token of this data set (its first: {tokens[:3]}, the data "
            f"set's: {[str(t) for t in id_tokens[1:4]]}); make it from this data set's items"
        )
    ids, rows = (torch.tensor(part) for part in zip(*found, strict=True))
    mean, basis = fit_whitening(raw[rows], whitening, width)
    treated = (raw[rows] - mean) @ basis
    vectors = torch.zeros(len(id_tokens), basis.shape[1])
    vectors[ids] = treated
    provenance["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    cosines = (compute_mean_cosine(raw[rows]), compute_mean_cosine(treated))
    missing = tuple(str(token) for token in id_tokens[1:] if str(token) not in row)
    return TextVectors(vectors, missing, cosines, mean, basis, provenance)


def format_missing_items(tokens: Sequence[str]) -> str:
    """What a line of the log adds about items without text."""
    return f"; the first without: {', '.join(tokens[:5])}" if tokens else ""


def compute_mean_cosine(vectors: Tensor) -> float:
    """Mean cosine over all pairs of (n, T) vectors, 0 where there is no pair: how anisotropic they are."""
    n = len(vectors)
    if n < 2:
        return 0.0
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)))


def fit_whitening(raw: Tensor, whitening: str, width: int) -> tuple[Tensor, Tensor]:
    """Mean (T0,) and basis (T0, T) such that (raw - mean) @ basis is whitened, mean length 1.

    At most n / 4 components are kept: whitening n vectors in n dimensions would put all of
    them at the same distance from each other, and nothing would be left of the text.

    Args:
        raw: (n, T0).
        whitening: `none`, `pca` or `zca`.
        width: number of components to keep, 0 for as many as there can be.

    Raises:
        ValueError: `width` is larger than the vectors allow.
    """
    mean = raw.mean(0)
    centred = (raw - mean).double()
    if centred.norm() <= 1e-6 * raw.norm():  # one item, or all alike: nothing to decorrelate
        return torch.zeros_like(mean), torch.eye(len(mean)) / mean.norm().clamp(min=1e-12)
    if whitening == "none":
        basis = torch.eye(raw.shape[1], dtype=torch.float64)
    else:
        _, singular, components = torch.linalg.svd(centred, full_matrices=False)
        rank = max(min(int((singular > 1e-6 * singular[0]).sum()), len(raw) // 4), 1)
        if width > rank:
            raise UserError(
                f"text_width: {width} is more than the {rank} components that {len(raw)} vectors of "
                f"width {raw.shape[1]} allow; lower it, or set 0"
            )
        kept = width or rank
        components, singular = components[:kept], singular[:kept]
        basis = components.T / singular
        if whitening == "zca":
            basis = basis @ components
    length = (centred @ basis).norm(dim=1).mean()
    return mean, (basis / length.clamp(min=1e-12)).float()
