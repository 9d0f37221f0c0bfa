"""Checksummed tensors and nested states in safetensors files; never a pickle."""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from m2rec.errors import UserError, format_one_line
from m2rec.storage import write_atomically

_CHECKSUM_KEY = "checksum_sha256"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_BLOCK_BYTES = 2**24  # that are read at a time


class RowBlocks(NamedTuple):
    """A tensor that is written block by block, so that nobody holds all of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Iterable[Tensor]
    """Its rows, in their order; iterated once."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | RowBlocks], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; shared or strided tensors are copied first.

    Its metadata gets a checksum of tensors and metadata, which `read_tensors` compares.
    """
    metadata = metadata or {}
    whole = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    if len(whole) < len(tensors):
        write_atomically(path, lambda temporary: _write_blocks(temporary, tensors, metadata))
    else:
        _write_whole(path, whole, metadata)


def _write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    plain = _separate_tensors(tensors)
    metadata_with_checksum = {**metadata, _CHECKSUM_KEY: _hash_tensors(plain, metadata)}
    try:
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata_with_checksum))
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path} can't be written: {error}") from error


def _write_blocks(path: Path, tensors: Mapping[str, Tensor | RowBlocks], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file without the library, which needs whole tensors: header, then tensors."""
    parts = [_split_tensor(name, tensor) for name, tensor in sorted(tensors.items())]
    blank = "0" * hashlib.sha256().digest_size * 2
    header: dict[str, Any] = {"__metadata__": {_CHECKSUM_KEY: blank, **metadata}}
    end = 0
    for part in sorted(parts, key=lambda part: (-part.dtype.itemsize, part.name)):  # so that all are aligned
        begin, end = end, end + part.n_bytes
        entry = {"dtype": _TYPE_NAMES[part.dtype], "shape": part.shape, "data_offsets": [begin, end]}
        header[part.name] = entry
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    with path.open("wb") as file:
        file.write(head)

        def write_parts() -> Iterator[_TensorParts]:
            for part in parts:
                file.seek(len(head) + header[part.name]["data_offsets"][0])
                yield part._replace(blocks=_write_through(part, file))

        checksum = _hash_parts(write_parts(), metadata)
        file.seek(head.index(blank.encode()))
        file.write(checksum.encode())


class _TensorParts(NamedTuple):
    """A tensor of a file, in blocks of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Iterable[Tensor]

    @property
    def n_bytes(self) -> int:
        n_values = 1
        for size in self.shape:
            n_values *= size
        return n_values * self.dtype.itemsize


def _split_tensor(name: str, tensor: Tensor | RowBlocks) -> _TensorParts:
    if isinstance(tensor, RowBlocks):
        return _TensorParts(name, *tensor)
    return _TensorParts(name, tuple(tensor.shape), tensor.dtype, [tensor.detach()])


def _write_through(part: _TensorParts, file: Any) -> Iterator[Tensor]:
    """The blocks, each of which is written before."""
    n_bytes = 0
    for block in part.blocks:
        n_bytes += file.write(_view_bytes(block))
        yield block
    assert n_bytes == part.n_bytes, f"{part.name}: {n_bytes} bytes of {part.n_bytes}"


def _view_bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


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
def open_tensors(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file that holds its checksum, of which parts can be read, and its metadata.

    Yields:
        what `safetensors.safe_open` returns, and the metadata; nothing is in memory yet.

    Raises:
        ValueError: as `read_tensors`.
    """
    with _open_tensors(path, "cpu") as file:
        metadata = dict(file.metadata() or {})
        checksum = metadata.pop(_CHECKSUM_KEY, None)
        if checksum != _hash_parts((_read_parts(file, name) for name in sorted(file.keys())), metadata):
            raise UserError(f"{path} is corrupt: the checksum does not match")
        yield file, metadata


def _read_parts(file: Any, name: str) -> _TensorParts:
    """A tensor of an open file, which is read as its blocks are iterated."""
    rows = file.get_slice(name)
    parts = _TensorParts(name, tuple(rows.get_shape()), _TYPES[rows.get_dtype()], ())
    if not parts.shape or not parts.n_bytes:
        return parts._replace(blocks=(file.get_tensor(name) for _ in range(1)))
    n_rows = parts.shape[0]
    step = max(1, _BLOCK_BYTES * n_rows // parts.n_bytes)
    return parts._replace(blocks=(rows[start : start + step] for start in range(0, n_rows, step)))


@contextmanager
def _open_tensors(path: Path, device: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError, struct.error, json.JSONDecodeError) as error:
        raise UserError(f"{path} can't be read: {format_one_line(error)}") from None


def _hash_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return _hash_parts((_split_tensor(name, tensor) for name, tensor in sorted(tensors.items())), metadata)


def _hash_parts(parts: Iterable[_TensorParts], metadata: Mapping[str, str]) -> str:
    """The checksum of tensors that are sorted by name."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for part in parts:
        digest.update(f"{part.name} {part.dtype} {part.shape}".encode())
        for block in part.blocks:
            digest.update(_view_bytes(block))
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
