"""PyTorch's threads on a machine whose cores are not all free: how many there are, and how they wait.

OpenMP's threads share each operation and wait for each other in a busy loop. Where another process has
one of the cores, the thread on it comes late and the others burn their time: an operation of microseconds
takes milliseconds. So what is small is computed by one thread, a command's threads spin briefly before
they sleep, and there are no more of them than the process may use cores.
"""

import ctypes
import os
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
    """Set the threads of a process that is ours, before it loads PyTorch; what the user has set stays.

    GNU's OpenMP, that of PyTorch's wheels, reads these variables; others have their own.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
    quota = read_cpu_quota()
    if (
        quota is not None
        and quota < _count_cores()
        and not any(name in os.environ for name in _COUNT_VARIABLES)
    ):
        os.environ["OMP_NUM_THREADS"] = str(max(1, int(quota)))  # one that is throttled holds up all others


def _count_cores() -> int:
    """Cores that the process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cpu_quota(root: Path = _CGROUP_ROOT, memberships: Path = Path("/proc/self/cgroup")) -> float | None:
    """How many cores' time the process's cgroups let it have, None for no limit.

    Args:
        root: where the cgroups are.
        memberships: names the process's own.
    """
    try:
        lines = memberships.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        return None
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            found += [_read_quota_v2(folder) for folder in _list_cgroup_folders(root, path)]
        elif "cpu" in controllers.split(","):
            for name in (controllers, "cpu"):  # one is a link to the other, or not there
                found += [_read_quota_v1(folder) for folder in _list_cgroup_folders(root / name, path)]
    limits = [quota for quota in found if quota is not None]
    return min(limits) if limits else None


def _list_cgroup_folders(root: Path, path: str) -> list[Path]:
    """The folder of a cgroup and those above it; in a container its own may be the root."""
    folder = root / path.strip("/")
    return [folder, *(above for above in folder.parents if above.is_relative_to(root))]


def _read_quota_v2(folder: Path) -> float | None:
    words = _read_words(folder / "cpu.max")
    return _parse_quota(*words) if len(words) == 2 else None


def _read_quota_v1(folder: Path) -> float | None:
    words = [*_read_words(folder / "cpu.cfs_quota_us"), *_read_words(folder / "cpu.cfs_period_us")]
    return _parse_quota(*words) if len(words) == 2 else None


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _parse_quota(quota: str, period: str) -> float | None:
    """Cores' time of `max 100000` or `150000 100000`; version 1 has -1 for no limit."""
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def describe_threads() -> str:
    """Such as `2 threads on 2 cores, spinning briefly`."""
    import torch

    n, quota = torch.get_num_threads(), read_cpu_quota()
    cores = _count_cores()
    limit = f" of which the cgroup allows {quota:g}" if quota is not None and quota < cores else ""
    set_by = next((f" ({name})" for name in _COUNT_VARIABLES if name in os.environ), "")
    waiting = "spinning briefly" if os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT else ""
    waiting = waiting or next(
        (f"{name}={os.environ[name]}" for name in _WAIT_VARIABLES if name in os.environ), ""
    )
    text = f"{n} thread{'s' if n != 1 else ''}{set_by} on {cores} core{'s' if cores != 1 else ''}{limit}"
    return f"{text}, {waiting}" if waiting else text


@cache
def _find_thread_setters() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """What sets the number of threads of OpenMP and of MKL for the calling thread alone.

    `torch.set_num_threads` would also change the number of all threads that use PyTorch later. None where
    PyTorch's OpenMP can't be found.
    """
    import torch

    folder = Path(torch.__file__).parent / "lib"
    own = torch.get_num_threads()  # settles this thread's number
    for path in (*map(str, sorted(folder.glob("lib*omp*"))), None):  # None: what is loaded for all
        try:
            set_openmp = ctypes.CDLL(path).omp_set_num_threads
        except (OSError, AttributeError):
            continue
        set_openmp(own + 1)
        found = torch.get_num_threads() == own + 1
        set_openmp(own)
        if found:
            return set_openmp, _find_mkl_setter(folder)
    return None


def _find_mkl_setter(folder: Path) -> Callable[[int], int]:
    """MKL's setter, which returns what held before; without MKL one that does nothing."""
    for path in (*map(str, folder.glob("libtorch_cpu.*")), None):
        try:
            return ctypes.CDLL(path).MKL_Set_Num_Threads_Local
        except (OSError, AttributeError):
            continue
    return lambda number: 0


@contextmanager
def use_one_thread() -> Iterator[None]:
    """Compute on the calling thread alone, which waits for no other one; afterwards all is as before.

    Other threads keep their numbers. Where PyTorch's OpenMP is not found nothing is changed.
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
