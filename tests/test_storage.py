"""Contents are told apart; locks: by the file system, and by a file where it has none."""

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from m2rec.storage import hash_content, hash_file, lock_path

fcntl = pytest.importorskip("fcntl")

NO_FLOCK = """
import fcntl, sys
from pathlib import Path
from m2rec.storage import hash_content, hash_file, lock_path
def refuse(descriptor, operation):
    raise OSError(9, "no locks")
fcntl.flock = refuse
with lock_path(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def refuse_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.EBADF, "Bad file descriptor")  # what a network drive says


@pytest.fixture(params=["flock", "lock file"])
def has_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "lock file":
        monkeypatch.setattr(fcntl, "flock", refuse_flock)
    return bool(request.param == "flock")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse_flock)


def try_lock(path: Path) -> bool:
    with suppress(BlockingIOError), lock_path(path, timeout=0):
        return True
    return False


def test_a_lock_is_held_once_and_given_back(tmp_path: Path, has_flock: bool):
    for path in (tmp_path / "folder", tmp_path / "file"):
        path.mkdir() if path.name == "folder" else path.touch()
        with lock_path(path) as descriptor:
            assert descriptor is not None and not try_lock(path)
            assert (path.parent / f".{path.name}.lock").exists() is not has_flock
        with pytest.raises(KeyError), lock_path(path):
            raise KeyError
        assert try_lock(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_second_process_waits(tmp_path: Path, has_flock: bool, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    order = []
    with lock_path(tmp_path):
        waiting = threading.Thread(target=lambda: [order.append("second") for _ in hold(tmp_path)])
        waiting.start()
        waiting.join(timeout=0.3)
        order.append("first")
    waiting.join(timeout=10)
    assert order == ["first", "second"] and caplog.text.count("is locked by another process; waiting") == 1


def hold(path: Path) -> Iterator[None]:
    with lock_path(path, timeout=10):
        yield


@pytest.mark.parametrize("is_killed", [True, False])
def test_the_lock_file_of_a_killed_process_does_not_count(tmp_path: Path, no_flock: None, is_killed: bool):
    process = subprocess.Popen(
        [sys.executable, "-c", NO_FLOCK, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        assert not try_lock(tmp_path)
        if is_killed:
            process.kill()  # it is a zombie at first, and gone later
            for _ in range(2):
                assert lock_file_of(tmp_path).exists() or try_lock(tmp_path)
                process.wait()
        else:
            process.communicate("")
    assert lock_file_of(tmp_path).exists() is is_killed
    assert try_lock(tmp_path) and not lock_file_of(tmp_path).exists()


def lock_file_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def test_a_later_process_with_the_same_number_does_not_hold_it(tmp_path: Path, no_flock: None):
    """As after the restart of a container, where numbers begin again."""
    with lock_path(tmp_path):
        host, pid, start = lock_file_of(tmp_path).read_text().split()
    assert int(pid) == os.getpid()
    for owner, is_free in (
        (f"{host} {pid} {start}", False),
        (f"{host} {pid} {float(start) - 60}", True),
        (f"another {pid} {float(start) - 60}", False),  # whose processes nobody here can see
        ("", False),  # it is being written
    ):
        lock_file_of(tmp_path).write_text(owner)
        assert try_lock(tmp_path) is is_free, owner


def test_one_of_many_takes_over(tmp_path: Path, no_flock: None):
    """Of the threads that find a lock that was left behind."""
    with lock_path(tmp_path):
        host, pid, start = lock_file_of(tmp_path).read_text().split()
    inside, most, barrier = [], [], threading.Barrier(8)

    def work(number: int) -> None:
        barrier.wait()
        for _ in hold(tmp_path):
            inside.append(number)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.remove(number)

    for _ in range(5):
        lock_file_of(tmp_path).write_text(f"{host} {pid} {float(start) - 60}")
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert most == [1] * 40


def test_a_path_that_cant_be_locked_at_all_is_used_unlocked(
    tmp_path: Path, no_flock: None, monkeypatch: pytest.MonkeyPatch
):
    """A data folder that can only be read, on such a file system."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *mode: refuse() if flags & os.O_CREAT else real(path, flags)
    )
    assert try_lock(tmp_path)


def test_contents_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A flipped bit anywhere, blocks in another order, zeros more or less."""
    monkeypatch.setattr("m2rec.storage._HASHED_AT_ONCE", 100)
    content = bytes(range(256))
    contents = [content[:100] * 2, content[:200], content[100:200] + content[:100], b"", b"\0", bytes(100)]
    contents += [bytes(101), bytes(200), content]
    for place in range(256):
        contents.append(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
    assert len({hash_content(some) for some in contents}) == len(contents)
    for some in contents[:9]:
        file = tmp_path / "file"
        file.write_bytes(some)
        assert hash_file(file) == hash_content(some) == hash_content(memoryview(some))
        assert len(hash_file(file)) == 64
    monkeypatch.setattr("m2rec.storage.zlib.crc32", lambda block: 0)
    assert hash_content(bytes(10)) != hash_content(bytes(11))
