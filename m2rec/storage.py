"""Write files atomically, tell their contents apart, and lock files and folders against other processes."""

import errno
import hashlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from pathlib import Path
from socket import gethostname
from time import monotonic, sleep

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

Unlock = Callable[[], None]

_HASHED_AT_ONCE = 1 << 20  # bytes
_LOCK_PAUSE = 0.05  # seconds between two attempts
# seconds by which the start of one process may seem to differ, as after its machine's clock was set
_SAME_START = 10.0


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


def hash_file(path: Path) -> str:
    """`hash_content` of a file.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        return _join_checksums(iter(lambda: file.read(_HASHED_AT_ONCE), b""))


def hash_content(content: bytes | memoryview) -> str:
    """64 hexadecimal digits that tell contents apart: twice as fast as SHA-256, and no proof against forgery.

    They are the SHA-256 of the length and of the CRC-32 of each MiB.
    """
    view = memoryview(content)
    return _join_checksums(view[i : i + _HASHED_AT_ONCE] for i in range(0, len(view), _HASHED_AT_ONCE))


def _join_checksums(blocks: Iterable[bytes | memoryview]) -> str:
    digest, length = hashlib.sha256(), 0
    for block in blocks:
        digest.update(zlib.crc32(block).to_bytes(4, "little"))
        length += len(block)
    digest.update(length.to_bytes(8, "little"))
    return digest.hexdigest()


@contextmanager
def lock_path(path: Path, timeout: float = inf) -> Iterator[int | None]:
    """Exclusive advisory lock on a file or folder.

    Where the file system has no locks (Windows, some network drives), a file .NAME.lock beside the path is
    the lock. It names its process; that of a process of this machine that is gone does not count.

    Args:
        path: the file or folder.
        timeout: seconds to wait for a process that holds the lock.

    Yields:
        the descriptor that holds the lock; a child process that inherits it holds it, too. None on Windows.

    Raises:
        BlockingIOError: it still holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY) if fcntl is not None else None
    try:
        deadline, is_announced = monotonic() + timeout, False
        while (unlock := _try_lock(path, descriptor)) is None:
            if monotonic() >= deadline:
                raise BlockingIOError(errno.EWOULDBLOCK, "locked by another process", str(path))
            if not is_announced:
                logger.info("%s is locked by another process; waiting", path)
                is_announced = True
            sleep(_LOCK_PAUSE)
        try:
            yield descriptor
        finally:
            unlock()
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _try_lock(path: Path, descriptor: int | None) -> Unlock | None:
    """What removes the lock again; None while another process holds it."""
    if descriptor is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return partial(_unlock_descriptor, descriptor)
        except BlockingIOError:
            return None
        except OSError as error:
            logger.debug("%s can't be locked (%s); a lock file is tried", path, error)
    file = path.resolve()
    file = file.with_name(f".{file.name}.lock")
    try:
        return partial(file.unlink, missing_ok=True) if _create_lock_file(file) else None
    except OSError as error:
        logger.debug("%s can't be locked: %s", path, error)
        return lambda: None


def _unlock_descriptor(descriptor: int) -> None:
    with suppress(OSError):  # data-loader workers have copies of the descriptor
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _create_lock_file(file: Path) -> bool:
    """Create a lock file, in place of one that a dead process has left; False if another process has it.

    Raises:
        OSError: files can't be created there.
    """
    if _create_owned(file):
        return True
    if not _is_left_behind(file):
        return False
    # only who has this second file removes the first one, so that nobody removes a new one for the old
    takeover = file.with_name(f"{file.name}.takeover")
    if not _create_owned(takeover):
        return False
    try:
        if _is_left_behind(file):
            file.unlink()
        return _create_owned(file)
    finally:
        takeover.unlink()


def _create_owned(file: Path) -> bool:
    """Create a file that names this process: machine, number, start; False if there is one."""
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{gethostname()} {os.getpid()} {_find_start(os.getpid())}")
    except OSError:  # a full disk
        file.unlink()
        raise
    return True


def _is_left_behind(file: Path) -> bool:
    """Whether a lock file names a process of this machine that is gone."""
    try:
        host, pid, start = file.read_text(encoding="utf-8").split()
        if host != gethostname():
            return False
        now = _find_start(int(pid))
        return now is None or abs(now - float(start)) > _SAME_START
    except (FileNotFoundError, ValueError):  # removed meanwhile, or not written yet
        return False


def _find_start(pid: int) -> float | None:
    """When a process started, in seconds since 1970; None if it is gone."""
    import psutil  # here, since it is seldom needed

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
