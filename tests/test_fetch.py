"""Fetching a file from a local server: whole, in parts, with every failure said in one line."""

import hashlib
import http.server
import io
import random
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from m2rec.data import download, fetch
from m2rec.data.fetch import RemoteFile, fetch_file
from m2rec.errors import UserError

CONTENT = random.Random(0).randbytes(700_000)
DATE = "Wed, 01 Oct 2014 10:00:00 GMT"


@dataclass
class Server:
    """What a local server has and does."""

    url: str = ""
    content: bytes = CONTENT
    date: str | None = DATE
    has_ranges: bool = True
    cut_after: list[int] = field(default_factory=list)
    """Bytes of the body after which the connection breaks, one for each of the next requests."""
    statuses: list[int] = field(default_factory=list)
    """Errors to answer the next requests with."""
    length: int | None = None
    """Content-Length, if it is not that of the content."""
    says_size: bool = True
    """Whether the answer to a Range has its own length, and that of the whole file."""
    longest_part: int = 10**9
    """Bytes of an answer to a Range, at most."""
    when_cut: Callable[[], object] = lambda: None
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()
    monkeypatch.setattr(fetch, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.ranges.append(asked := self.headers["Range"])
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = 0
            if asked and state.has_ranges and self.headers.get("If-Range", state.date) == state.date:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(state.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(state.content)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
            self.send_response(206 if start else 200)
            if start:
                last = min(len(state.content), start + state.longest_part) - 1
                size = len(state.content) if state.says_size else "*"
                self.send_header("Content-Range", f"bytes {start}-{last}/{size}")
            if state.date:
                self.send_header("Last-Modified", state.date)
            body = state.content[start : start + state.longest_part] if start else state.content
            if not start or state.says_size:
                self.send_header("Content-Length", str(len(body) if state.length is None else state.length))
            self.end_headers()
            if state.cut_after:
                self.wfile.write(body[: state.cut_after.pop(0)])
                self.wfile.flush()
                state.when_cut()
                return
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.block_on_close = False
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        state.url = f"http://127.0.0.1:{running.server_port}/a.bin"
        yield state
        running.shutdown()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole(tmp_path: Path, server: Server):
    checksums = {name: hashlib.new(name, CONTENT).hexdigest() for name in ("md5", "sha256")}
    fetch_file(RemoteFile(server.url, len(CONTENT), checksums), tmp_path / "raw" / "a.bin")
    assert (tmp_path / "raw" / "a.bin").read_bytes() == CONTENT and names(tmp_path / "raw") == ["a.bin"]
    fetch_file(RemoteFile(server.url, len(CONTENT), checksums), tmp_path / "raw" / "a.bin")
    assert server.ranges == [None], "a file that exists is not asked for again"


def test_a_broken_connection_continues(tmp_path: Path, server: Server):
    server.cut_after = [300_000, 100_000]
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_a_rest_that_is_shorter_than_it_says_has_broken_off(tmp_path: Path, server: Server):
    """Where neither the answer nor anybody else knows the size of the file."""
    server.cut_after, server.says_size = [300_000, 100_000], False
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=400000-"]


def test_a_server_may_send_the_rest_in_parts(tmp_path: Path, server: Server):
    server.cut_after, server.longest_part = [300_000], 250_000
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=550000-"]


@pytest.mark.parametrize("change", ["no ranges", "another version", "no date"])
def test_a_server_that_does_not_continue_sends_the_file_again(tmp_path: Path, server: Server, change: str):
    server.cut_after = [300_000]
    new = CONTENT[::-1] if change == "another version" else CONTENT

    def cut() -> None:
        server.content = new
        if change == "another version":
            server.date = "Thu, 02 Oct 2014 10:00:00 GMT"

    server.when_cut, server.has_ranges = cut, change != "no ranges"
    if change == "no date":
        server.date = None
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == new
    assert server.ranges == [None, "bytes=300000-"]


def test_a_server_that_always_breaks_is_given_up_on(tmp_path: Path, server: Server):
    server.cut_after = [1000, 1000, 1000]
    with pytest.raises(UserError, match=r"after 3,000 of 700,000 bytes; try later; .*part has 3,000 bytes"):
        fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert names(tmp_path) == ["a.bin.part"]
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.ranges[-1] == "bytes=3000-"


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals for a thread")
def test_a_stop_leaves_what_has_arrived(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture):
    def interrupt() -> None:
        part, deadline = tmp_path / "a.bin.part", time.monotonic() + 5
        while time.monotonic() < deadline and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.2)  # the connection stays open meanwhile

    main = threading.main_thread().ident
    assert main is not None and threading.get_ident() == main
    server.cut_after, server.when_cut = [600_000], interrupt
    # a process in the background may have inherited that SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    finally:
        signal.signal(signal.SIGINT, before)
    part = (tmp_path / "a.bin.part").read_bytes()
    assert 0 < len(part) < len(CONTENT) and CONTENT.startswith(part) and names(tmp_path) == ["a.bin.part"]
    assert f"a.bin.part has {len(part):,} bytes; the same command continues from there" in caplog.text
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and server.ranges[-1] == f"bytes={len(part)}-"


@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_stop_after_the_last_byte(tmp_path: Path, server: Server, size: int | None):
    server.cut_after = [len(CONTENT)]
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    (tmp_path / "a.bin").rename(tmp_path / "a.bin.part")
    fetch_file(RemoteFile(server.url, size), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.ranges == [None] if size else [None, f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_begins_again(tmp_path: Path, server: Server):
    server.cut_after = [300_000]
    server.when_cut = lambda: setattr(server, "content", CONTENT[:200_000])
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT[:200_000]
    assert server.ranges == [None, "bytes=300000-", None]


@pytest.mark.parametrize(
    ("size", "checksums", "message"),
    [
        (7, {}, "it has 700,000 bytes, not 7;"),
        (None, {"sha256": "0" * 64}, f"its sha256 is {hashlib.sha256(CONTENT).hexdigest()}, not 00"),
        (7, {"md5": "f" * 32}, "bytes, not 7, and its md5 is"),
    ],
)
def test_another_file_is_kept_aside(
    tmp_path: Path, server: Server, size: int | None, checksums: dict[str, str], message: str
):
    with pytest.raises(UserError) as error:
        fetch_file(RemoteFile(server.url, size, checksums), tmp_path / "a.bin")
    assert message in str(error.value)
    assert str(error.value).endswith(f"the file is kept as {tmp_path / 'a.bin.rejected'} and is not used")
    assert names(tmp_path) == ["a.bin.rejected"]


def test_an_address_that_is_gone(tmp_path: Path, server: Server):
    server.statuses = [404]
    with pytest.raises(UserError, match=r"a\.bin: 404 Not Found; is the address still right\?$"):
        fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert server.ranges == [None] and names(tmp_path) == []


def test_an_error_that_passes(tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture):
    server.statuses = [503, 429]
    fetch_file(RemoteFile(server.url), tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT and "503 Service Unavailable; trying" in caplog.text
    server.statuses = [503, 503, 503]
    with pytest.raises(UserError, match=r"503 Service Unavailable; try later$"):
        fetch_file(RemoteFile(server.url), tmp_path / "b.bin")


def test_no_connection(tmp_path: Path, server: Server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"no connection \(.*refused\); is there a network\?$"):
        fetch_file(RemoteFile(f"http://127.0.0.1:{port}/a.bin"), tmp_path / "a.bin")
    with pytest.raises(UserError, match=r"no connection \(.*\); is there a network\?$"):
        fetch_file(RemoteFile("http://name.invalid/a.bin"), tmp_path / "a.bin")
    assert time.perf_counter() - start < 5 and names(tmp_path) == []


def test_a_file_larger_than_the_disk(tmp_path: Path, server: Server):
    server.length = 10**18
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000,000,000 bytes, and the disk has .*room$"):
        fetch_file(RemoteFile(server.url), tmp_path / "a.bin")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_disk_that_fills_up(tmp_path: Path, server: Server):
    (tmp_path / "a.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"a\.bin\.part: the disk is full; make room, and the same command"):
        fetch_file(RemoteFile(server.url), tmp_path / "a.bin")


def test_a_download_that_breaks_is_resumed(tmp_path: Path, server: Server):
    """The archive's part is found again by the next command, and nothing stays of it at the end."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.inter", CONTENT)
    server.content, folder = buffer.getvalue(), tmp_path / "data" / "mine"
    server.cut_after = [20_000, 10_000, 10_000]
    part = tmp_path / "data" / ".mine.download" / "a.bin.part"
    with pytest.raises(UserError, match=r"a\.bin\.part has 40,000 bytes, and the same command continues"):
        download.download_dataset("mine", folder, server.url)
    assert part.read_bytes() == server.content[:40_000]
    download.download_dataset("mine", folder, server.url)
    assert server.ranges[-1] == "bytes=40000-"
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["mine", "mine.inter"]


def test_an_archive_of_no_use_is_fetched_again(tmp_path: Path, server: Server):
    for _ in range(2):
        with pytest.raises(UserError, match="failed"):
            download.download_dataset("mine", tmp_path / "data" / "mine", server.url)
        assert list((tmp_path / "data").iterdir()) == []
    assert server.ranges == [None, None]
