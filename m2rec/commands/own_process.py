"""Imported first by a command, whose process is its own: PyTorch is loaded with its threads prepared."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from m2rec.threads import configure_threads

configure_threads()


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """For imports, which leave little garbage: each look at all that PyTorch loads takes a tenth of a second.

    What is alive at the end is not looked at again. Where PyTorch is loaded already nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
