"""Write files so that a reader never meets half of one, and lock them against other processes."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic, sleep

logger = logging.getLogger(__name__)


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


@contextmanager
def lock_path(path: Path, patience: float = inf) -> Iterator[int | None]:
    """Hold a file or folder against other processes that do the same, where the system can do that.

    Args:
        path: the file or folder.
        patience: seconds to wait for another one that holds it.

    Yields:
        the descriptor that holds the lock; a child process that inherits it holds it, too. None on Windows.

    Raises:
        BlockingIOError: it still does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
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
            yield handle
        finally:
            with suppress(OSError):  # data-loader workers have copies of the handle
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)
