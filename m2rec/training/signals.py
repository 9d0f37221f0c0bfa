"""Ctrl-C and SIGTERM as a request to stop after the training step; a second one stops immediately."""

import os
import signal
import threading
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any, Self

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_SECONDS = 1.0  # a terminal and a parent process may both send the same Ctrl-C


class StopRequest:
    """Context manager that catches the signals; it has no effect outside the main thread.

    Args:
        at_once: whether already the first signal raises KeyboardInterrupt.

    Attributes:
        signal: number of the signal, None before it.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal: int | None = None
        self._at_once = at_once
        self._owner = os.getpid()
        self._received_at = 0.0
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                self._previous_handlers[number] = signal.signal(number, self._handle_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal.

        Raises:
            KeyboardInterrupt: it is the second one, or the first one suffices.
        """
        if os.getpid() != self._owner:  # a data-loader worker, which its parent ends
            return
        if self._at_once:
            self.signal = number
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            self._received_at = monotonic()
            # a signal handler must not log
            os.write(2, b"stopping after this step; press Ctrl-C again to stop immediately\n")
        elif monotonic() - self._received_at > _REPEAT_SECONDS:
            raise KeyboardInterrupt


class RunInterrupted(KeyboardInterrupt):
    """A run was asked to stop.

    Attributes:
        signal: number of the signal.
        folder: the run folder, None if the run can't be resumed.
    """

    def __init__(self, number: int, folder: Path | None = None) -> None:
        super().__init__(f"signal {number}")
        self.signal = number
        self.folder = folder
