"""Fetch a public file over HTTP: resumed, checked, and there whole or not at all."""

import errno
import hashlib
import logging
import os
import re
import shutil
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from time import sleep
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from m2rec.errors import UserError
from m2rec.storage import lock_path

logger = logging.getLogger(__name__)

TIMEOUT = 15.0  # seconds without an answer from the server
PAUSES = (1.0, 3.0)  # seconds before the second and the third attempt
CHUNK_BYTES = 2**18
_TEMPORARY_STATUSES = {
    HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT,
}  # fmt: skip
# waiting does not help against these
_NO_NETWORK = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address."""

    url: str
    size: int | None = None
    """Bytes; None for unknown."""
    checksums: Mapping[str, str] = field(default_factory=dict)
    """Hexadecimal digests by the names of `hashlib`; those that are known."""


class _AttemptError(Exception):
    """An attempt failed in a way that may pass."""


def fetch_file(remote: RemoteFile, target: Path) -> None:
    """Download a file to `target`; does nothing if `target` exists.

    The bytes that have arrived are in TARGET.part. After a stop the next call asks for the rest of them. A
    file that has another size or checksum than `remote` says is kept as TARGET.rejected.

    Raises:
        UserError: there is no connection, the address is wrong, the disk is full, or the file is another.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(target.parent):  # another process may fetch the same file
        if target.exists():
            return
        part = target.with_name(f"{target.name}.part")
        try:
            _fetch_part(remote, part)
        except KeyboardInterrupt:
            if part.exists():
                size = part.stat().st_size
                logger.warning("%s has %s bytes; the same command continues from there", part, f"{size:,}")
            raise
        _check_part(remote, part, target)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)


def _fetch_part(remote: RemoteFile, part: Path) -> None:
    """Download the file to `part`, in several attempts."""
    for pause in (*PAUSES, None):
        try:
            _fetch_rest(remote, part)
            return
        except _AttemptError as error:
            if pause is None:
                received = part.stat().st_size if part.exists() else 0
                kept = f"; {part} has {received:,} bytes, and the same command continues" if received else ""
                raise UserError(f"{remote.url}: {error}; try later{kept}") from error
            logger.warning("%s: %s; trying again in %g s", remote.url, error, pause)
            sleep(pause)


def _fetch_rest(remote: RemoteFile, part: Path) -> None:
    """Download what `part` lacks.

    Raises:
        _AttemptError: the connection failed or broke.
        UserError: the server refuses, or the disk is full.
    """
    start = part.stat().st_size if part.exists() else 0
    if start and start == remote.size:
        return
    headers = {"User-Agent": "M2Rec"}
    if start:
        # a server that has another version of the file by now sends it whole
        headers |= {"Range": f"bytes={start}-", "If-Range": formatdate(part.stat().st_mtime, usegmt=True)}
    try:
        with urlopen(Request(remote.url, headers=headers), timeout=TIMEOUT) as response:
            _write_response(response, part, start)
    except HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return  # nothing was missing
            part.unlink(missing_ok=True)  # longer than the file: begin again
        elif error.code not in _TEMPORARY_STATUSES:
            cure = "is the address still right?" if error.code == HTTPStatus.NOT_FOUND else "try later"
            raise UserError(f"{remote.url}: {error.code} {error.reason}; {cure}") from error
        raise _AttemptError(f"{error.code} {error.reason}") from error
    except OSError as error:  # URLError and TimeoutError among them
        _raise_connection_error(error, remote, part)
    except HTTPException as error:
        raise _AttemptError(f"the connection broke ({type(error).__name__})") from error


def _raise_connection_error(error: OSError, remote: RemoteFile, part: Path) -> NoReturn:
    """Raise the error for a connection or a disk that failed: for good, or for this attempt."""
    if error.errno in _DISK_FULL:
        raise UserError(f"{part}: the disk is full; make room, and the same command continues") from error
    if error.filename is not None:
        raise UserError(f"{part}: can't be written ({error.strerror})") from error
    reason = error.reason if isinstance(error, URLError) else error
    message = f"no connection ({' '.join(str(reason).split())})"
    if isinstance(reason, _NO_NETWORK) or getattr(reason, "errno", None) in _UNREACHABLE:
        raise UserError(f"{remote.url}: {message}; is there a network?") from error
    raise _AttemptError(message) from error


def _write_response(response: HTTPResponse, part: Path, start: int) -> None:
    """Write the body of a response to `part`, behind its first `start` bytes or in place of them."""
    if response.status != HTTPStatus.PARTIAL_CONTENT:
        if start:
            logger.warning("%s: the server does not continue; downloading it from its beginning", part)
        start = 0
    total = _read_total(response, start)
    if total is not None and total - start > (free := shutil.disk_usage(part.parent).free):
        raise UserError(f"{part}: it needs {total - start:,} bytes, and the disk has {free:,}; make room")
    try:
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=None,
                leave=False,
            ) as bar,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    finally:
        _keep_date(response, part)
    received = part.stat().st_size
    if total is not None and received != total:
        raise _AttemptError(f"the connection broke after {received:,} of {total:,} bytes")


def _read_total(response: HTTPResponse, start: int) -> int | None:
    """The bytes of the whole file, or up to the end of this answer; None if the answer does not say.

    Args:
        response: a whole file, or the rest of one.
        start: the first byte that the answer must have.

    Raises:
        _AttemptError: it has other bytes.
    """
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(rf"bytes {start}-(\d+)/(\d+|\*)", content_range.strip())
        if match is None:
            raise _AttemptError(f"the server sent other bytes than those from {start:,} on")
        return int(match[1]) + 1 if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _keep_date(response: HTTPResponse, part: Path) -> None:
    """Give `part` the date of the file on the server: the next attempt asks for the rest of that version."""
    try:
        date = parsedate_to_datetime(response.headers["Last-Modified"]).timestamp()
        os.utime(part, (date, date))
    except (TypeError, ValueError, OSError):
        pass  # no date, or an invalid one: the next attempt begins again


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _check_part(remote: RemoteFile, part: Path, target: Path) -> None:
    """Compare size and checksums with those that are known.

    Raises:
        UserError: one differs; the file is kept under another name.
    """
    differences = []
    size = part.stat().st_size
    if remote.size is not None and size != remote.size:
        differences.append(f"it has {size:,} bytes, not {remote.size:,}")
    for algorithm, expected in remote.checksums.items():
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, algorithm).hexdigest()
        if digest != expected:
            differences.append(f"its {algorithm} is {digest}, not {expected}")
    if target.suffix == ".gz" and not _is_gzip(part):  # such as the log-in page of a network
        differences.append("it is not a gzip file")
    if differences:
        rejected = target.with_name(f"{target.name}.rejected")
        part.replace(rejected)
        raise UserError(
            f"{remote.url}: {', and '.join(differences)}; the file is kept as {rejected} and is not used"
        )
