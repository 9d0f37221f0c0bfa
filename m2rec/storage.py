"""Write files atomically, and lock files and folders against other processes."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic, sleep

logger = logging.getLogger(__name__)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it and move it into place.

    The file's permissions follow the umask, even where `write` makes a file for its owner only.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with temporary.open("rb+") as file:  # Windows can't sync a file that is open for reading
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync the folder's entries."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda p: p.write_text(content, encoding="utf-8"))


@contextmanager
def lock_path(path: Path, timeout: float = inf) -> Iterator[int | None]:
    """Exclusive advisory lock on a file or folder; a no-op on Windows.

    Args:
        path: the file or folder; no lock file is made.
        timeout: seconds to wait for a process that holds the lock.

    Yields:
        the descriptor that holds the lock; a child process that inherits it holds it, too. None on Windows.

    Raises:
        BlockingIOError: it still holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        deadline, is_announced = monotonic() + timeout, False
        while not _try_lock(descriptor, path, is_last=monotonic() >= deadline):
            if not is_announced:
                logger.info("%s is locked by another process; waiting", path)
                is_announced = True
            sleep(0.05)
        try:
            yield descriptor
        finally:
            with suppress(OSError):  # data-loader workers have copies of the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path, is_last: bool) -> bool:
    """Whether to proceed: the lock is held, or the file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if is_last:
            raise
        return False
    except OSError as error:
        logger.debug("%s can't be locked: %s", path, error)
    return True
