"""Faults for real: kill -9 at random moments, a full disk, a folder that can't be written, Ctrl-C.

A few of each in the ordinary suite; M2REC_KILLS=50 says how many.
"""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from m2rec.training.configuration import build_config
from m2rec.training.run import build_resumed_config, run_experiment
from tests.conftest import as_arguments, small
from tests.test_checkpoint import outcome

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("M2REC_KILLS", "4"))

# starts a process in a tenth of a second, with everything imported
context = get_context("forkserver")
context.set_forkserver_preload(["m2rec.training.run"])


def train(values: dict[str, Any], folder: Path | None) -> None:
    """In a process of its own: a new run, or one that goes on."""
    torch.set_num_threads(1)
    run_experiment(build_config(values) if folder is None else build_resumed_config(folder, {}), folder)


def started(values: dict[str, Any], folder: Path | None) -> BaseProcess:
    process = context.Process(target=train, args=(values, folder))
    process.start()
    return process


def wait_for(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


@pytest.fixture
def values(toy: Path, tmp_path: Path) -> dict[str, Any]:
    """A run of 24 steps, each with a checkpoint."""
    own = {"epochs": 4, "text_vectors": "none", "train_batch_size": 7, "checkpoint_minutes": 1e-9}
    return small(toy, **own, average_epochs=0.5, learning_rate=0.01, runs_dir=str(tmp_path / "runs"))


def test_killed_at_any_moment_it_goes_on_to_the_same_end(values: dict[str, Any], tmp_path: Path):
    """So many runs that had something to lose; one that was killed too early or too late is done again."""
    process = started(values, None)
    wait_for(lambda: list((tmp_path / "runs").glob("*/history.csv")))
    began = time.monotonic()
    wait_for(lambda: list((tmp_path / "runs").glob("*/metrics.json")))
    seconds = time.monotonic() - began
    process.join()
    (whole,) = (tmp_path / "runs").iterdir()
    expected = outcome(whole)
    draw, went_on, tries = random.Random(0), 0, 0
    while went_on < KILLS:
        tries += 1
        assert tries < 10 * KILLS
        runs = tmp_path / f"runs-{tries}"
        own = {**values, "runs_dir": str(runs)}
        folder: Path | None = None
        for _ in range(draw.randint(1, 3)):
            process = started(own, folder)
            wait_for(lambda runs=runs: list(runs.glob("*/history.csv")))
            time.sleep(draw.uniform(0, seconds))
            process.kill()
            process.join()
            (folder,) = runs.iterdir()
            if not (folder / "checkpoint.safetensors").exists() or (folder / "metrics.json").exists():
                break
        assert folder is not None
        if not (folder / "metrics.json").exists():
            if not (folder / "checkpoint.safetensors").exists():  # nothing to lose yet
                with pytest.raises(ValueError, match="start a new run"):
                    build_resumed_config(folder, {})
                continue
            went_on += 1
            train(own, folder)
            assert not [path for path in folder.iterdir() if path.suffix == ".tmp"], tries
        found = outcome(folder)
        assert found[:3] == expected[:3], tries
        assert all(torch.equal(found[3][name], value) for name, value in expected[3].items()), tries
        shutil.rmtree(runs)
    logging.getLogger(__name__).info("%s of %s runs went on, out of %s started", went_on, KILLS, tries)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_says_how_to_go_on(values: dict[str, Any], tmp_path: Path, number: int, status: int):
    command = [
        sys.executable,
        "run_mm.py",
        *as_arguments({**values, "epochs": 10_000, "stopping_step": 10_000}),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((tmp_path / "runs").glob("*/checkpoint.safetensors")))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    (folder,) = (tmp_path / "runs").iterdir()
    assert process.returncode == status
    assert f"run_mm.py: stopped; resume with: python run_mm.py --resume={folder}" in err
    assert (
        "stopping after this step; press Ctrl-C again to stop immediately" in err and "Traceback" not in err
    )
    build_resumed_config(folder, {})


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_workers_too(values: dict[str, Any], tmp_path: Path, number: int, status: int):
    """As schedulers and terminals send it, to the whole group."""
    own = {**values, "epochs": 10_000, "stopping_step": 10_000, "worker": 2, "checkpoint_minutes": 5}
    command = [sys.executable, "run_mm.py", *as_arguments(own)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: list((tmp_path / "runs").glob("*/checkpoint.safetensors")))
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert err.count("stopping after this step") == 1 and "--resume=" in err and "Traceback" not in err


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(
    values: dict[str, Any], tiny_disk: Path, command: Callable[..., tuple[int, str, str]]
):
    """The checkpoint before stays whole, and the run goes on once there is room."""
    runs = {**values, "runs_dir": str(tiny_disk)}
    process = started({**runs, "epochs": 1}, None)
    wait_for(lambda: list(tiny_disk.glob("*/checkpoint.safetensors")))
    process.kill()
    process.join()
    (folder,) = tiny_disk.iterdir()
    before = (folder / "checkpoint.safetensors").read_bytes()
    free = shutil.disk_usage(tiny_disk).free
    with (tiny_disk / "filler").open("wb") as file:
        file.write(b"0" * max(0, free - len(before) // 2))
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 2 and "No space left on device" in err and "Traceback" not in err
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))
    (tiny_disk / "filler").unlink()
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0


def test_a_run_folder_that_can_not_be_written(
    values: dict[str, Any], tiny_disk: Path, command: Callable[..., tuple[int, str, str]]
):
    process = started({**values, "runs_dir": str(tiny_disk)}, None)
    wait_for(lambda: list(tiny_disk.glob("*/checkpoint.safetensors")))
    process.kill()
    process.join()
    (folder,) = tiny_disk.iterdir()
    remount = ["mount", "-o", "remount,{}", str(tiny_disk)]
    subprocess.run([part.format("ro") for part in remount], check=True)
    try:
        status, _, err = command(f"--resume={folder}", runs_dir=False)
        assert status == 2 and "Read-only file system" in err and "Traceback" not in err
        status, _, err = command(*as_arguments({**values, "runs_dir": str(tiny_disk)}), runs_dir=False)
        assert status == 2 and "runs_dir: can't create" in err and "Traceback" not in err
    finally:
        subprocess.run([part.format("rw") for part in remount], check=True)
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0
