"""The files of a run folder, and writing files so that a reader never meets half of one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"  # the last that a run writes
HISTORY_FILE = "history.csv"
RANKS_FILE = "test_ranks.csv"
ITEMS_FILE = "items.json"
TITLES_FILE = "titles.json"  # where the item file has titles
TEXT_FILE = "text.json"  # what made the text vectors, where there are any
WEIGHTS_FILE = "model.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"  # until the run is finished


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and move it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda p: p.write_text(content, encoding="utf-8"))


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; shared or strided tensors are copied first."""
    plain = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    try:
        write_atomically(path, lambda p: save_file(plain, p, metadata))
    except SafetensorError as error:  # a full disk, which it has its own words for
        raise OSError(f"{path} can't be written: {error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file or folder against other processes that do the same; they wait."""
    import fcntl  # there is none on Windows

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
