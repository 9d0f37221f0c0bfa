"""Threads on busy machines: what a command sets, what the library leaves alone, who computes alone."""

import ast
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec.nn.layer import Layer
from m2rec.nn.live import LiveEncoder
from m2rec.serving import ranker
from m2rec.threads import read_cpu_quota, use_one_thread
from tests.test_recommender import trained

ROOT = Path(__file__).parent.parent
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SHOW = f"print(*map(os.environ.get, {VARIABLES}))"


def said(code: str, **variables: str) -> list[str]:
    """What a Python process prints that has these variables of OpenMP and no others."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_command_spins_briefly():
    number, policy, spins = said(f"import m2rec.commands.own_process, os; {SHOW}")
    assert policy == "None" and 100 <= int(spins) <= 10_000
    assert number == "None" or read_cpu_quota() is not None


@pytest.mark.parametrize(
    "own", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "3"}]
)
def test_what_the_user_sets_stays(own: dict[str, str]):
    found = dict(zip(VARIABLES, said(f"import m2rec.commands.own_process, os; {SHOW}", **own), strict=True))
    assert found.items() >= own.items()
    assert "OMP_NUM_THREADS" in own or found["GOMP_SPINCOUNT"] == own.get("GOMP_SPINCOUNT", "None")


def test_the_library_sets_nothing():
    code = f"import os, torch; n = torch.get_num_threads(); from m2rec import Recommender; {SHOW}; "
    assert said(code + "print(n == torch.get_num_threads())") == ["None", "None", "None", "True"]


@pytest.mark.parametrize(
    "name", ["recommend", "evaluate", "embed_items", "new_items", "history_lengths", "search_worker", "tune"]
)
def test_a_command_prepares_its_threads_before_pytorch_is_loaded(name: str):
    body = ast.parse((ROOT / "m2rec" / "commands" / f"{name}.py").read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    first = next(node for node in imports if getattr(node, "module", "") != "__future__")
    assert isinstance(first, ast.Import) and first.names[0].name == "m2rec.commands.own_process"


def test_run_mm_prepares_its_threads_before_pytorch_is_loaded():
    """The log of a run that ends at once says so."""
    done = subprocess.run(
        [sys.executable, ROOT / "run_mm.py", "--dataset=none", "--data_path=/nowhere", "--model=SASRec"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and ", spinning briefly" in done.stderr, done.stderr


def write_cgroup(root: Path, folder: str, **files: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.mark.parametrize(
    ("memberships", "expected"),
    [
        ("0::/jobs/mine", 1.5),
        ("0::/jobs", 3.0),
        ("0::/free", None),
        ("0::/", None),
        ("0::/gone", None),
        ("3:cpu,cpuacct:/mine\n2:memory:/mine", 0.25),
        ("3:cpu,cpuacct:/free", None),
        ("4:cpuset:/mine", None),
        ("3:cpuacct,cpu:/mine", 0.5),
        ("0::/odd", None),
        ("0::/\udcff", None),
        ("", None),
    ],
)
def test_quotas(tmp_path: Path, memberships: str, expected: float | None):
    """The least of the cgroup's own and those above it; versions 2 and 1."""
    write_cgroup(tmp_path, "jobs/mine", cpu__max="150000 100000")
    write_cgroup(tmp_path, "jobs", cpu__max="300000 100000")
    write_cgroup(tmp_path, "free", cpu__max="max 100000")
    write_cgroup(tmp_path, "cpu,cpuacct/mine", cpu__cfs_quota_us="25000", cpu__cfs_period_us="100000")
    write_cgroup(tmp_path, "cpu,cpuacct/free", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write_cgroup(tmp_path, "cpu/mine", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    write_cgroup(tmp_path, "odd", cpu__max="² 100000")
    (tmp_path / "self").write_bytes(memberships.encode(errors="surrogateescape") + b"\n")
    assert read_cpu_quota(tmp_path, tmp_path / "self") == expected


def test_no_cgroups(tmp_path: Path):
    assert read_cpu_quota(tmp_path, tmp_path / "self") is None


def test_one_thread_leaves_all_as_it_was():
    """Where several compute at a time, in threads that are new to PyTorch, and others start meanwhile."""
    torch.set_num_threads(3)
    inside: list[int] = []
    after: list[int] = []
    others: list[int] = []

    def compute() -> None:
        with use_one_thread():
            inside.append(torch.get_num_threads())
            barrier.wait()
            other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
            other.start()
            other.join()
        barrier.wait()
        after.append(torch.get_num_threads())

    for _ in range(3):
        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=compute) for _ in range(3)]
        for thread in threads:
            thread.start()
        compute()
        for thread in threads:
            thread.join()
    with pytest.raises(KeyError), use_one_thread():
        raise KeyError
    assert set(inside) == {1} and set(after) == set(others) == {3} and torch.get_num_threads() == 3


def test_a_threads_own_number_stays():
    """One that set its number itself has it afterwards, whatever another one has."""
    torch.set_num_threads(3)
    found = []

    def compute() -> None:
        torch.set_num_threads(2)
        with use_one_thread():
            found.append(torch.get_num_threads())
        found.append(torch.get_num_threads())

    with use_one_thread():
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    assert found == [1, 2] and torch.get_num_threads() == 3


def test_small_questions_take_one_thread(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from m2rec import Recommender

    recommender = Recommender.load(trained(toy, tmp_path, text_vectors="none", epochs=1))
    threads: list[int] = []
    methods = {"last": LiveEncoder, "advance": LiveEncoder, "step": LiveEncoder, "forward": Layer}
    for name, owner in methods.items():
        method = getattr(owner, name)

        def watched(*args: Any, method: Any = method, **kwargs: Any) -> Any:
            threads.append(torch.get_num_threads())
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
    torch.set_num_threads(2)
    recommender.recommend(["i1", "i2"])
    recommender.scores([["i1"], ["i2"]])
    recommender.explain(["i1", "i2"])
    live = recommender.session(["i1"])
    live.add("i2")
    recommender.add_events([live], ["i3"])
    live.recommend()
    assert set(threads) == {1} and len(threads) >= 6 and torch.get_num_threads() == 2
    threads.clear()
    monkeypatch.setattr(ranker, "_MAX_SINGLE_THREAD_WORK", 0)
    recommender.recommend(["i1", "i2"])
    assert set(threads) == {2}


def test_the_size_of_a_question(toy: Path, tmp_path: Path):
    """By the default model's sizes: a question is small, a thousand are not."""
    from m2rec import Recommender

    recommender = Recommender.load(trained(toy, tmp_path, epochs=1, hidden_size=64))
    torch.set_num_threads(2)
    found = []
    for positions, rows in ((50, 1), (50_000, 1000)):
        with recommender._ranker.limit_threads(positions, rows):
            found.append(torch.get_num_threads())
    assert found == [1, 2]


IS_GLIBC = platform.libc_ver()[0] == "glibc"
COUNT_FAULTS = """
import os, resource
import numpy as np
{first}
from m2rec.commands.own_process import keep_freed_memory
for _ in range(2):
    np.ones(2**22) + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**22) + 1
print(keep_freed_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not IS_GLIBC, reason="another C library")
@pytest.mark.parametrize("own", [{}, {"MALLOC_TOP_PAD_": "0"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}])
def test_a_command_keeps_freed_memory(own: dict[str, str]):
    """20 blocks of 32 MiB, of 8,192 pages each; what the user sets stays."""
    kept, faults = said(COUNT_FAULTS.format(first=""), **own)
    assert kept == str(not own) and (int(faults) < 1_000) == (not own)


def test_the_memory_of_another_c_library_stays():
    kept, _ = said(COUNT_FAULTS.format(first="os.confstr = lambda name: None"))
    assert kept == "False"
