"""C code of ours, compiled at its first use by the C compiler of the machine.

The compiler runs once per machine: the library is kept in the user's cache folder, under a name made of all
that it depends on. Its threads are PyTorch's own: it is not linked with an OpenMP of its own but finds the
one that PyTorch has loaded, so thread counts hold for both and no second group of threads takes the cores.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from threading import Lock

import torch

from m2rec.storage import write_atomically

SCAN = Path(__file__).with_name("selective_scan_native.c")
# vectors are written out in the code; NaN stays NaN
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-std=gnu11", "-w")
_SECONDS = 120
_lock = Lock()


def load_library(source: Path) -> ctypes.CDLL:
    """The compiled library of a C file, from the cache folder where it is there.

    Raises:
        OSError: it can't be compiled or loaded here; the message names what is needed, with the cure.
    """
    with _lock:
        found = _try_library(source)
    if isinstance(found, str):
        raise OSError(found)
    return found


def find_obstacle(source: Path) -> str:
    """What is missing to run a C file here, with the cure; empty if nothing."""
    try:
        load_library(source)
    except OSError as error:
        return str(error)
    return ""


@cache
def _try_library(source: Path) -> ctypes.CDLL | str:
    """The library, or what is missing: a compiler is not asked twice."""
    if sys.platform != "linux":
        return f"Linux and this is {sys.platform}: choose torch"
    try:
        compiler = _find_compiler()
    except ValueError as error:
        return f"a C compiler, and CC is not a command ({error}): set CC=gcc"
    if compiler is None:
        return "a C compiler: install gcc, or set CC"
    path = _get_cache_folder() / f"{source.stem}-{_compute_key(source, compiler)}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there, or damaged
        pass
    try:
        return _build_library(source, compiler, path)
    except (OSError, subprocess.SubprocessError) as error:
        return (
            f"a C compiler that works, and {compiler[0]} does not: {_describe(error)}: install gcc, or set CC"
        )


def _build_library(source: Path, compiler: list[str], path: Path) -> ctypes.CDLL:
    """Compile, keep in the cache folder if that can be, load."""
    with TemporaryDirectory(prefix="m2rec-") as folder:
        objects, library = Path(folder, "code.o"), Path(folder, "code.so")
        _run_compiler([*compiler, *_FLAGS, "-c", str(source), "-o", str(objects)])
        # without -fopenmp, which would link another OpenMP than PyTorch's
        _run_compiler([*compiler, "-shared", str(objects), "-o", str(library)])
        loaded = ctypes.CDLL(str(library))  # only what can be loaded is kept
        with suppress(OSError):  # a folder that can't be written: the next process compiles again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: temporary.write_bytes(library.read_bytes()))
        return loaded


def _run_compiler(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)


def _describe(error: Exception) -> str:
    """One line: the compiler's first complaint, or what went wrong."""
    complaint = getattr(error, "stderr", None) or str(error)
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)


def _find_compiler() -> list[str] | None:
    """The command of CC, else gcc or clang."""
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    found = which("gcc") or which("clang")
    return [found] if found else None


def _compute_key(source: Path, compiler: list[str]) -> str:
    """A name for what the library depends on: code, compiler, CPU, PyTorch and its OpenMP."""
    path = Path(which(compiler[0]) or compiler[0]).resolve()
    stat = path.stat() if path.exists() else None
    version = stat and (str(path), stat.st_size, stat.st_mtime_ns)
    machine = platform.machine(), platform.libc_ver(), _read_cpu_flags()
    parts = [source.read_text(encoding="utf-8"), _FLAGS, compiler, version, machine, torch.__version__]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _read_cpu_flags() -> list[str]:
    """The CPU's model and instruction sets, as the kernel names them."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    names = ("model", "flags", "Features", "CPU implementer", "CPU part", "isa")
    return sorted({line for line in text.splitlines() if line.startswith(names)})


def _get_cache_folder() -> Path:
    """The user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME")
    # os.path leaves ~ as it is where there is no home; such a folder is not written
    return Path(folder or os.path.expanduser("~/.cache")) / "m2rec"
