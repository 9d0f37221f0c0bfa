"""Checksummed tensors in safetensors files, and nested states as RecBole keeps them; never a pickle."""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2rec.errors import UserError, format_one_line
from m2rec.storage import write_atomically

_CHECKSUM_KEY = "checksum_sha256"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; shared or strided tensors are copied first.

    Its metadata gets a checksum of everything in it, which `read_tensors` compares.
    """
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    signed = {**(metadata or {}), _CHECKSUM_KEY: _hash_tensors(plain, metadata or {})}
    try:
        write_atomically(path, lambda p: save_file(plain, p, signed))
    except SafetensorError as error:  # a full disk, which it has its own words for
        raise OSError(f"{path} can't be written: {error}") from error


def read_tensors(
    path: Path, device: str = "cpu", ours: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata, compared with the checksum that it brings.

    Args:
        path: the file.
        device: where the tensors go.
        ours: whether a file without a checksum, which `write_tensors` never writes, is refused.

    Raises:
        ValueError: it is missing, damaged, or no such file.
    """
    with _open_tensors(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = dict(file.metadata() or {})
    found = metadata.pop(_CHECKSUM_KEY, None)
    if (found is not None or ours) and found != _hash_tensors(tensors, metadata):
        raise UserError(f"{path} is damaged: its content is not what was written")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """A safetensors file's metadata alone, which nothing is compared with.

    Raises:
        ValueError: it is missing, or no such file.
    """
    with _open_tensors(path, "cpu") as file:
        return dict(file.metadata() or {})


@contextmanager
def _open_tensors(path: Path, device: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError, struct.error, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read: {format_one_line(error)}") from None


def _hash_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_STATE_KEY = "state"


def save_state(state: Any, path: Path) -> None:
    """Write dicts, lists, tensors, arrays and plain values to a safetensors file, as a whole or not at all.

    Raises:
        ValueError: something else is among them, which only a pickle could hold.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode_value(state, tensors, "")
    write_tensors(path, tensors, {_STATE_KEY: json.dumps(tree)})


def load_state(path: Path, device: str) -> Any:
    """What `save_state` wrote, with tensors on `device`; a tuple comes back as a list.

    Raises:
        ValueError: the file is no such file.
    """
    try:
        tensors, metadata = read_tensors(path, device)
        tree = json.loads(metadata[_STATE_KEY])
    except (LookupError, ValueError) as error:
        raise UserError(
            f"{path} is no checkpoint of M2Rec's kind, and pickles are never loaded; train the model again "
            f"({format_one_line(error)})"
        ) from error
    return _decode_value(tree, tensors)


def _encode_value(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """The value as JSON, its tensors put into `tensors`."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[place] = torch.as_tensor(value)
        return {"tensor" if isinstance(value, Tensor) else "array": place}
    if isinstance(value, dict):  # its keys may be numbers, which JSON's are not
        return {
            "dict": [[key, _encode_value(item, tensors, f"{place}.{key}")] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        return {
            "list": [_encode_value(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{place.lstrip('.')}: {type(value).__name__} can only be pickled, which is never done")


def _decode_value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode_value(item, tensors) for key, item in content}
    if kind == "list":
        return [_decode_value(item, tensors) for item in content]
    return tensors[content].cpu().numpy() if kind == "array" else tensors[content]
