"""The files of a run folder, and writing files so that a reader never meets half of one."""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"  # with it a run is finished; only pictures of it come after
HISTORY_FILE = "history.csv"
RANKS_FILE = "test_ranks.csv"
ITEMS_FILE = "items.json"
COUNTS_FILE = "counts.json"  # how often training meets each item
TITLES_FILE = "titles.json"  # where the item file has titles
TEXT_FILE = "text.json"  # what made the text vectors, where there are any
INSIGHTS_FILE = "insights.json"  # what the gate and the filter do, and examples
REPORT_FILE = "report.html"
WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"  # until the run is finished

logger = logging.getLogger(__name__)

_CHECKSUM_KEY = "checksum_sha256"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and move it into place, for good.

    Who may read it is as the umask says, also where `write` makes a file for its owner alone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with temporary.open("rb+") as file:  # Windows syncs no file that is only read
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have the folder's own entries on the disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda p: p.write_text(content, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
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
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
        raise ValueError(f"{path} is damaged: its content is not what was written")
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
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from None


def _hash_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def lock_path(path: Path, patience: float = inf) -> Iterator[None]:
    """Hold a file or folder against other processes that do the same, where the system can do that.

    Args:
        path: the file or folder.
        patience: seconds to wait for another one that holds it.

    Raises:
        BlockingIOError: it still does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle, end, waits = os.open(path, os.O_RDONLY), monotonic() + patience, False
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if monotonic() >= end:
                    raise
                if not waits:
                    logger.info("another process is at %s; waiting for it", path)
                waits = True
                sleep(0.05)
                continue
            except OSError as error:  # file systems that don't know locks
                logger.debug("%s can't be locked: %s", path, error)
            break
        try:
            yield
        finally:
            with suppress(OSError):  # data-loader workers have copies of the handle
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
