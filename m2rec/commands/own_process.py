"""Imported first by a command, whose process is its own: threads and memory are prepared before PyTorch."""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from m2rec.threads import configure_threads

# parameters of glibc's mallopt, from malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4


def keep_freed_memory() -> bool:
    """Have glibc keep the blocks that tensors free, for the next tensors; returns whether it does.

    By default a large block goes back to the system when it is freed, and the next one is taken from there
    page by page: thousands of page faults in each training step. Blocks above 1 GiB still go back.
    Variables that the user has set win. Other C libraries are left as they are.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc" not in _get_c_library():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(_M_MMAP_THRESHOLD, 2**30):
        mallopt(_M_MMAP_MAX, 0)  # old versions refuse a threshold above 32 MiB
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, 2**26)
    return True


def _get_c_library() -> str:
    """Such as `glibc 2.36`; empty for another one, or where it is not known."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):
        return ""


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


configure_threads()
keep_freed_memory()
