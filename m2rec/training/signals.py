"""Ctrl-C and SIGTERM as a request to stop where nothing is lost; a second one stops at once."""

import os
import signal
import threading
from pathlib import Path
from time import monotonic
from types import FrameType, TracebackType
from typing import Any, Self

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# a terminal and a parent process may both pass on the same Ctrl-C
_REPEAT_SECONDS = 1.0  # seconds


class StopRequest:
    """Use it with `with`, in the main thread; in another thread it never asks.

    Args:
        at_once: whether already the first signal raises KeyboardInterrupt.

    Attributes:
        signal: the number of the signal that came, None as long as none did.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal: int | None = None
        self._at_once = at_once
        self._owner = os.getpid()
        self._came = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle_signal) for number in _STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first one; raise KeyboardInterrupt at the second.

        Raises:
            KeyboardInterrupt: it is not the first, or one is enough.
        """
        if os.getpid() != self._owner:  # a data-loader worker, which its parent ends
            return
        if self._at_once:
            self.signal = number
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._came = number, monotonic()
            os.write(2, b"stopping after this step; once more stops at once\n")  # a handler must not log
        elif monotonic() - self._came > _REPEAT_SECONDS:
            raise KeyboardInterrupt


class RunInterrupted(KeyboardInterrupt):
    """A run was asked to stop, and has kept what it takes to go on if it could.

    Attributes:
        signal: the number of the signal.
        folder: that of the run, None if there is nothing in it to go on from.
    """

    def __init__(self, number: int, folder: Path | None = None) -> None:
        super().__init__(f"signal {number}")
        self.signal = number
        self.folder = folder
