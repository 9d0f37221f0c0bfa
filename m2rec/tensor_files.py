"""Checksummed tensors and nested states in safetensors files; never a pickle."""

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

    Its metadata gets a checksum of tensors and metadata, which `read_tensors` compares.
    """
    metadata = metadata or {}
    plain = _separate_tensors(tensors)
    metadata_with_checksum = {**metadata, _CHECKSUM_KEY: _hash_tensors(plain, metadata)}
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata_with_checksum))
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path} can't be written: {error}") from error


def _separate_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own; a large one that has it is not copied."""
    plain: dict[str, Tensor] = {}
    used = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in used or storage.nbytes() != own.nbytes:
            own = own.clone()
        used.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def read_tensors(
    path: Path, device: str = "cpu", require_checksum: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file's tensors and metadata, and compare them with its checksum.

    Args:
        path: the file.
        device: where the tensors go.
        require_checksum: whether to refuse a file without a checksum.

    Raises:
        ValueError: it is missing, corrupt, or not a safetensors file.
    """
    with _open_tensors(path, device) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = dict(file.metadata() or {})
    checksum = metadata.pop(_CHECKSUM_KEY, None)
    if checksum is None and not require_checksum:
        return tensors, metadata
    if checksum != _hash_tensors(tensors, metadata):
        raise UserError(f"{path} is corrupt: the checksum does not match")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read a safetensors file's metadata only, without comparing the checksum.

    Raises:
        ValueError: it is missing, or not a safetensors file.
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
    """Write dicts, lists, tensors, arrays and plain values to a safetensors file, atomically.

    Raises:
        ValueError: another type is among them, which needs a pickle.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode_value(state, tensors, "")
    write_tensors(path, tensors, {_STATE_KEY: json.dumps(tree)})


def load_state(path: Path, device: str) -> Any:
    """Read what `save_state` wrote, with tensors on `device`; a tuple comes back as a list.

    Raises:
        ValueError: the file was not written by `save_state`.
    """
    try:
        tensors, metadata = read_tensors(path, device)
        tree = json.loads(metadata[_STATE_KEY])
    except (LookupError, ValueError) as error:
        raise UserError(
            f"{path} is not a checkpoint of M2Rec, and pickles are never loaded; train the model again "
            f"({format_one_line(error)})"
        ) from error
    return _decode_value(tree, tensors)


def _encode_value(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The value as JSON; its tensors are put into `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[name] = torch.as_tensor(value)
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, dict):  # pairs, because keys may be numbers, and JSON's are texts
        return {"dict": [[key, _encode_value(item, tensors, f"{name}.{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_encode_value(item, tensors, f"{name}.{n}") for n, item in enumerate(value)]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"{name.lstrip('.')}: {type(value).__name__} needs a pickle, which is never written")


def _decode_value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode_value(item, tensors) for key, item in content}
    if kind == "list":
        return [_decode_value(item, tensors) for item in content]
    return tensors[content].cpu().numpy() if kind == "array" else tensors[content]
