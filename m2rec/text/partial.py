"""Vectors of a long computation, kept batch by batch in a file, so that a killed one can go on.

The file is a first line with a fingerprint of what decides the vectors, then records: the number
of rows, the width, a CRC-32 of what follows, the row numbers (int64), the vectors (float32). A kill
can only spoil the last record, which is then cut off.
"""

import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from m2rec.errors import UserError
from m2rec.storage import lock_path

MAGIC = b"m2rec vectors 1 "
RECORD_HEADER = struct.Struct("<III")


class PartialVectors:
    """Open it with `with`; one process at a time.

    Attributes:
        kept: pairs of row numbers (k,) and vectors (k, T) that are there already.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.finished_batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._head = MAGIC + fingerprint.encode() + b"\n"
        self._file: BinaryIO

    def __enter__(self) -> "PartialVectors":
        """Read what is there; another fingerprint starts anew.

        Raises:
            ValueError: another process has it open.
        """
        with ExitStack() as held:
            self._file = held.enter_context(self.path.open("a+b"))
            try:
                held.enter_context(lock_path(self.path, timeout=0))
            except BlockingIOError:
                raise UserError(f"{self.path}: another process is at it; wait for it or stop it") from None
            self._read()
            self._held = held.pop_all()
        return self

    def _read(self) -> None:
        """Take what is kept, and cut off the rest."""
        self._file.seek(0)
        data = self._file.read()
        if not data.startswith(self._head):
            self._file.truncate(0)
            self._file.write(self._head)
            self._file.flush()
            return
        place = len(self._head)
        while (found := _parse_record(data, place)) is not None:
            rows, vectors, place = found
            self.finished_batches.append((rows, vectors))
        self._file.truncate(place)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def append(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        """Keep vectors (k, T) of the rows (k,); they are with the system when this returns."""
        content = rows.astype("<i8").tobytes() + vectors.astype("<f4").tobytes()
        self._file.write(RECORD_HEADER.pack(len(rows), vectors.shape[1], zlib.crc32(content)) + content)
        self._file.flush()

    def remove(self) -> None:
        """The result is written: the file is no longer needed."""
        self._file.close()  # Windows removes no open file
        self.path.unlink(missing_ok=True)


def _parse_record(data: bytes, place: int) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Rows and vectors of the record at `place`, and where the next begins; None when it is not whole."""
    start = place + RECORD_HEADER.size
    if start > len(data):
        return None
    count, width, checksum = RECORD_HEADER.unpack_from(data, place)
    middle, end = start + 8 * count, start + count * (8 + 4 * width)
    if end > len(data) or zlib.crc32(data[start:end]) != checksum:
        return None
    rows = np.frombuffer(data[start:middle], dtype="<i8")
    return rows, np.frombuffer(data[middle:end], dtype="<f4").reshape(count, width), end
