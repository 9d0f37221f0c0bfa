"""PyTorch's threads on a machine whose cores are partly busy: thread count and wait policy.

OpenMP's threads share each operation and wait for each other in a busy loop. Where another process uses
one of the cores, the thread on it is late and the others burn their time: an operation of microseconds
takes milliseconds. So small operations are computed by one thread, a command's threads spin briefly before
they sleep, and there are no more threads than cores that the process may use.
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

SPIN_COUNT = "4000"  # turns of the loop, some microseconds: docs/performance.md, "Busy machines"
_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_COUNT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def configure_threads() -> None:
    """Set OpenMP's thread count and spin count; must run before PyTorch is imported.

    Variables that the user has set win. GNU's OpenMP, which PyTorch's wheels contain, reads these variables.
    """
    if "torch" in sys.modules:
        return
    if _find_variable(_WAIT_VARIABLES) is None:
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    quota = read_cpu_quota()
    if quota is None or quota >= _count_cores() or _find_variable(_COUNT_VARIABLES) is not None:
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, int(quota)))  # a throttled thread would delay the others


def _find_variable(names: tuple[str, ...]) -> str | None:
    """The first of these environment variables that is set."""
    return next((name for name in names if name in os.environ), None)


def _count_cores() -> int:
    """Cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu_quota(root: Path = _CGROUP_ROOT, memberships: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores that the process's cgroups allow, None for no limit.

    Args:
        root: the folder of all cgroups.
        memberships: the file that names those of the process.
    """
    limits = []
    for line in _read_text(memberships).splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for folder in _list_cgroup_folders(root, path):
                limits.append(_parse_quota(_read_text(folder / "cpu.max")))
        elif "cpu" in controllers.split(","):  # version 1
            for name in {controllers, "cpu"}:  # one is a link to the other, or absent
                for folder in _list_cgroup_folders(root / name, path):
                    quota = _read_text(folder / "cpu.cfs_quota_us")
                    limits.append(_parse_quota(f"{quota} {_read_text(folder / 'cpu.cfs_period_us')}"))
    return min((limit for limit in limits if limit is not None), default=None)


def _list_cgroup_folders(root: Path, path: str) -> list[Path]:
    """The cgroup's folder and its parents up to root; in a container its own may be the root."""
    folder = root / path.strip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parse_quota(text: str) -> float | None:
    """Cores of `max 100000` or `150000 100000`; version 1 has -1 for no limit."""
    match = re.fullmatch(r"\s*([0-9]+)\s+([0-9]+)\s*", text)
    if match is None or not int(match[2]):
        return None
    return int(match[1]) / int(match[2])


def describe_threads() -> str:
    """Such as `2 threads on 2 cores, spinning briefly`."""
    import torch

    threads, cores, quota = torch.get_num_threads(), _count_cores(), read_cpu_quota()
    set_by = _find_variable(_COUNT_VARIABLES)
    text = f"{threads} thread{'s' if threads != 1 else ''}"
    if set_by is not None:
        text += f" ({set_by})"
    text += f" on {cores} core{'s' if cores != 1 else ''}"
    if quota is not None and quota < cores:
        text += f" of which the cgroup allows {quota:g}"
    wait_variable = _find_variable(_WAIT_VARIABLES)
    if os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        text += ", spinning briefly"
    elif wait_variable is not None:
        text += f", {wait_variable}={os.environ[wait_variable]}"
    return text


@cache
def _find_thread_setters() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """Functions that set the thread count of OpenMP and of MKL for the calling thread only.

    `torch.set_num_threads` would also change the count of all threads that use PyTorch later. None where
    PyTorch's OpenMP can't be found.
    """
    import torch

    folder = Path(torch.__file__).parent / "lib"
    count = torch.get_num_threads()  # fixes this thread's count
    for library in (*map(str, sorted(folder.glob("lib*omp*"))), None):  # None: what the process has loaded
        try:
            set_openmp = ctypes.CDLL(library).omp_set_num_threads
        except (OSError, AttributeError):
            continue
        set_openmp(count + 1)
        is_torchs = torch.get_num_threads() == count + 1
        set_openmp(count)
        if is_torchs:
            return set_openmp, _find_mkl_setter(folder)
    return None


def _find_mkl_setter(folder: Path) -> Callable[[int], int]:
    """MKL's setter, which returns the earlier count; without MKL a function that does nothing."""
    for path in (*map(str, folder.glob("libtorch_cpu.*")), None):
        try:
            return ctypes.CDLL(path).MKL_Set_Num_Threads_Local
        except (OSError, AttributeError):
            continue
    return lambda number: 0


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Compute on the calling thread only, then restore the thread count.

    Other threads keep their counts. Where PyTorch's OpenMP is not found nothing changes.
    """
    import torch

    before, setters = torch.get_num_threads(), _find_thread_setters()
    if setters is None:
        yield
        return
    set_openmp, set_mkl = setters
    set_openmp(1)
    mkl_before = set_mkl(1)
    try:
        yield
    finally:
        set_openmp(before)
        set_mkl(mkl_before)
