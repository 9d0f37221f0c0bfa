"""Two processes of torchrun end where one process ends, and every user counts once."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from m2rec import distributed
from m2rec.compat import Interaction
from m2rec.tensor_files import read_tensors, write_tensors
from m2rec.training import checkpoint
from m2rec.training.new_run import find_interrupted_run
from m2rec.training.trainer import RunTrainer
from run_mm import main
from tests.conftest import as_arguments, random_rows, small, write_inter
from tests.processes import run_together

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str, str]]


def launched(n: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """run_mm.py in n processes of torchrun."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    command = [sys.executable, *start, "run_mm.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def run_command(arguments: list[str], expected: int, errors: Path) -> None:
    """run_mm.py in one of several processes, whose stderr goes to a file for each."""
    path = errors.with_name(f"{errors.name}-{os.environ['RANK']}")
    with path.open("w") as file, redirect_stderr(file):
        os.dup2(file.fileno(), 2)  # what is written without Python, too
        assert main(arguments) == expected


def run_in_two(folder: Path, *arguments: str, expected: int = 0) -> list[str]:
    """run_mm.py in two processes, which find each other as under torchrun; the stderr of both.

    They are there at once. What is torchrun's own is left to `launched`.
    """
    errors = Path(tempfile.mkdtemp(dir=folder)) / "stderr"
    run_together(2, folder, run_command, list(arguments), expected, errors)
    return [errors.with_name(f"stderr-{rank}").read_text() for rank in range(2)]


def result(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[dict[str, str]]]:
    """Metrics, weights and ranks of the one run in a folder."""
    (run,) = folder.iterdir()
    with (run / "test_ranks.csv").open() as file:
        ranks = list(csv.DictReader(file))
    return json.loads((run / "metrics.json").read_text()), load_file(run / "model.safetensors"), ranks


@pytest.mark.parametrize("rows", ["dense", pytest.param("prefix", marks=pytest.mark.slow)])
def test_two_processes_equal_one(command: Command, toy: Path, tmp_path: Path, rows: str):
    """30 users do not divide by the batches, nor rows by two; the last batch has a single row."""
    arguments = as_arguments(
        small(toy, rows=rows, dropout_prob=0.0, text_vectors="none", train_batch_size=7, learner="sgd",
              learning_rate=0.5, clip_grad_norm="{max_norm: 0.5}", eval_batch_size=4,
              metrics="[NDCG,ItemCoverage]",
              average_epochs=0.5)
    )  # fmt: skip
    status, out, err = command(*arguments, f"--runs_dir={tmp_path / 'one'}", runs_dir=False)
    assert status == 0, err
    done = launched(2, *arguments, f"--runs_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("M2Rec on toy") == out.count("M2Rec on toy") == 1
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert two[0]["processes"] == 2
    for part in ("valid", "test", "test_unseen"):
        assert two[0][part] == pytest.approx(one[0][part], abs=1e-5)
    for name, value in one[1].items():
        torch.testing.assert_close(two[1][name], value, atol=1e-5, rtol=1e-4)
    assert two[2] == one[2] and len(two[2]) == one[0]["data"]["test_rows"]


def test_sparse_updates_of_two_processes_equal_those_of_all_rows(toy: Path, tmp_path: Path):
    """The last batch has a single row, so that one process has no gradient at all."""
    arguments = as_arguments(
        small(toy, text_vectors="none", loss_type="sampled", n_negatives=5, negatives_shared=30,
              train_batch_size=29, learning_rate=0.003, decay_per_epoch=0.2, average_epochs=0.5,
              clip_grad_norm="{max_norm: 0.5}")
    )  # fmt: skip
    outcomes = []
    for is_sparse in ("false", "true"):
        runs = tmp_path / is_sparse
        err, _ = run_in_two(tmp_path, *arguments, f"--sparse_updates={is_sparse}", f"--runs_dir={runs}")
        assert ("sparse updates of the ID embedding" in err) == (is_sparse == "true")
        outcomes.append(result(runs)[1])
    torch.testing.assert_close(outcomes[1], outcomes[0], atol=1e-3, rtol=1e-3)


def test_more_processes_than_rows(tmp_path: Path):
    """One user has enough for validation and test; two processes have one row of each between them."""
    rows = [("u", f"i{k}", k) for k in range(12)] + [("v", f"i{k}", k) for k in range(2)]
    write_inter(tmp_path / "data", "toy", rows)
    run_in_two(tmp_path, *as_arguments(small(tmp_path / "data")), f"--runs_dir={tmp_path / 'runs'}")
    metrics, _, ranks = result(tmp_path / "runs")
    assert metrics["processes"] == 2 and len(ranks) == 1 and ranks[0]["user"] == "u"


def test_a_loss_that_is_not_finite_in_one_process_ends_all(toy: Path, tmp_path: Path):
    arguments = as_arguments(small(toy, learning_rate=1e30, learner="sgd", epochs=20))
    both = "".join(run_in_two(tmp_path, *arguments, f"--runs_dir={tmp_path / 'runs'}", expected=2))
    assert re.search("run_mm.py: error: (training loss became|scores are) ", both)
    assert "GLHF" not in both


def meet_at_a_port() -> list[str]:
    """Options of torchrun for one process on each of two machines, which meet at a port of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=job"]
    return [*meeting, "--nproc_per_node=1"]


class Machines:
    """torchrun commands that run at once, as on as many machines."""

    def __init__(self, arguments: list[list[str]], options: list[str], script: str = "run_mm.py") -> None:
        start = [sys.executable, "-m", "torch.distributed.run", *options, script]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        environment["PYTHONPATH"] = str(ROOT)
        self.commands = []
        for own in arguments:
            process = subprocess.Popen(
                [*start, *own], cwd=ROOT, env=environment,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            self.commands.append(process)

    def find_worker(self, rank: str) -> psutil.Process:
        """The process of this rank, once it is there."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for command in self.commands:
                for child in psutil.Process(command.pid).children():
                    with suppress(psutil.Error):
                        if child.environ().get("RANK") == rank:
                            return child
            time.sleep(0.1)
        raise TimeoutError

    def wait(self) -> list[tuple[int, str]]:
        """Exit status and stderr of both."""
        try:
            errors = [command.communicate(timeout=400)[1] for command in self.commands]
        finally:
            for command in self.commands:
                if command.poll() is None:  # its processes would go on without it
                    for process in psutil.Process(command.pid).children(recursive=True):
                        process.kill()
                command.kill()
        return [(command.returncode, err) for command, err in zip(self.commands, errors, strict=True)]


def check_that_it_went_on(runs: Path, err: str, n_epochs: int) -> None:
    """A process was killed, torchrun started all again, and each epoch is there once."""
    assert "run_mm.py: error: torchrun: another process is gone" in err
    resumed = re.search(r"resumed after epoch (\d+)", err)
    assert resumed and int(resumed[1]) < n_epochs - 1
    (folder,) = runs.iterdir()
    lines = (folder / "history.csv").read_text().splitlines()[1:]
    assert [int(line.split(",")[0]) for line in lines] == list(range(n_epochs))
    assert not (folder / "launch.txt").exists() and (folder / "metrics.json").exists()


def wait_for_checkpoint(runs: Path) -> None:
    end = time.monotonic() + 100
    while not list(runs.glob("*/checkpoint.safetensors")):
        assert time.monotonic() < end
        time.sleep(0.05)


def long_run(toy: Path, runs: Path, n_epochs: int) -> list[str]:
    return as_arguments(
        small(toy, epochs=n_epochs, stopping_step=9999, text_vectors="none", train_batch_size=7,
              runs_dir=runs, baselines=False, report=False)
    )  # fmt: skip


# run_mm.py; in the first try the second process ends by kill -9 in its ninth step, in the second epoch
KILLED = """
import os, runpy, signal, sys
from m2rec.training.trainer import RunTrainer

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    step, done = RunTrainer._train_step, []
    def count_step(self, *batch):
        done.append(batch)
        if len(done) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *batch)
    RunTrainer._train_step = count_step
runpy.run_path("run_mm.py", run_name="__main__")
"""


def test_torchrun_goes_on_after_one_process_was_killed(toy: Path, tmp_path: Path):
    runs, script = tmp_path / "runs", tmp_path / "killed.py"
    script.write_text(KILLED)
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    ((status, err),) = Machines([long_run(toy, runs, 4)], options, str(script)).wait()
    assert status == 0, err
    check_that_it_went_on(runs, err, 4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_run_on_two_machines_goes_on_after_one_process_was_killed(toy: Path, tmp_path: Path, rank: str):
    """torchrun on both machines starts its process again once both have met again."""
    runs = tmp_path / "runs"
    machines = Machines([long_run(toy, runs, 250)] * 2, [*meet_at_a_port(), "--max-restarts=3"])
    wait_for_checkpoint(runs)
    machines.find_worker(rank).kill()
    outcomes = machines.wait()
    err = "".join(text for _, text in outcomes)
    assert [status for status, _ in outcomes] == [0, 0], err
    check_that_it_went_on(runs, err, 250)


@pytest.mark.slow  # torchrun waits for the other machine
def test_other_data_on_one_machine_is_one_line_on_each(toy: Path, tmp_path: Path):
    rows = [*random_rows(), ("u1", "i1", 10_000)]
    write_inter(tmp_path / "other", "toy", rows)
    own = [as_arguments(small(path, runs_dir=tmp_path / "runs")) for path in (toy, tmp_path / "other")]
    outcomes = Machines(own, meet_at_a_port()).wait()
    for status, err in outcomes:
        assert status == 1
        assert err.count("run_mm.py: error: data_path: process 1 has other interactions or text vectors") == 1


def test_a_restart_finds_its_own_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert find_interrupted_run(tmp_path) is None  # without torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    for name, launch, files in (
        ("other", "another job", ("checkpoint.safetensors",)),
        ("finished", "job", ("checkpoint.safetensors", "metrics.json")),
        ("begun", "job", ()),
        ("ours", "job", ("checkpoint.safetensors",)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in {"launch.txt": launch, **dict.fromkeys(files, "")}.items():
            (folder / file).write_text(content)
    assert find_interrupted_run(tmp_path) == tmp_path / "ours"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # then it is the process that started this one
    assert find_interrupted_run(tmp_path) is None
    (tmp_path / "other" / "launch.txt").write_text(distributed.name_launch() or "")
    assert find_interrupted_run(tmp_path) == tmp_path / "other"
    os.utime(tmp_path / "other" / "launch.txt", (0, 0))  # the id of an earlier command
    assert find_interrupted_run(tmp_path) is None


def test_a_restart_that_may_hang_is_said(monkeypatch: pytest.MonkeyPatch):
    assert distributed.describe_unsafe_restart() is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in (distributed.describe_unsafe_restart() or "")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert distributed.describe_unsafe_restart() is None


def test_processes_that_nothing_tells_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="RANK is set, but not LOCAL_RANK"):
        distributed.local_rank()
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="torchrun: more processes than GPUs"):
        distributed.check_gpus()


def test_a_mistake_is_one_line(toy: Path, tmp_path: Path):
    own = [*as_arguments(small(toy, hidden_sise=3)), f"--runs_dir={tmp_path / 'runs'}"]
    both = "".join(run_in_two(tmp_path, *own, expected=2))
    assert both.count("run_mm.py: error: unknown key 'hidden_sise'") == 1


def test_alone_nothing_happens():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert (distributed.process_rank(), distributed.world_size(), distributed.is_main_process()) == (
        0,
        1,
        True,
    )
    assert distributed.gather_rows(parameter) is parameter
    assert distributed.broadcast_value("x") == "x"
    loss = torch.tensor(3.0)
    assert distributed.sum_gradients([parameter], loss) is loss and parameter.grad is None


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_each_row_of_a_batch_is_in_one_process(monkeypatch: pytest.MonkeyPatch, n_rows: int):
    """Also where two and more processes have none."""
    batch = Interaction({"item_length": torch.arange(1, n_rows + 1)})
    trainer = RunTrainer.__new__(RunTrainer)
    trainer.config = {"ITEM_LIST_LENGTH_FIELD": "item_length"}
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    found, total = [], 0.0
    for rank in range(4):
        monkeypatch.setattr(distributed, "process_rank", lambda rank=rank: rank)
        shard, weight = trainer._shard_batch(batch, is_dense=True)
        found += shard["item_length"].tolist()
        total += weight
    assert sorted(found) == list(range(1, n_rows + 1)) and total == pytest.approx(1)


def test_one_process_that_is_asked_to_stop_stops_all(toy: Path, tmp_path: Path):
    """None waits for another, the run is kept, and both go on with it."""
    runs = tmp_path / "runs"
    arguments = as_arguments(
        small(toy, epochs=9999, stopping_step=9999, text_vectors="none", train_batch_size=7, runs_dir=runs)
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*start, "run_mm.py", *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 100
    while not list(runs.glob("*/checkpoint.safetensors")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    second = next(c for c in psutil.Process(process.pid).children() if c.environ().get("RANK") == "1")
    second.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    (folder,) = runs.iterdir()
    weights = folder / "model.safetensors"
    assert err.count(f"run_mm.py: stopped; resume with: python run_mm.py --resume={folder}") == 1
    kept, config = (
        checkpoint.read_checkpoint_numbers(folder / "checkpoint.safetensors"),
        folder / "config.yaml",
    )
    config.write_text(config.read_text().replace("epochs: 9999", f"epochs: {kept['epoch'] + 9}"))
    # the first process finds newer weights, better than any to come, and the checkpoint's best is worse than
    # any: all have to know when to stop early
    tensors, about = read_tensors(folder / "checkpoint.safetensors")
    numbers = json.dumps({**kept, "best_valid_score": -1.0})
    write_tensors(folder / "checkpoint.safetensors", tensors, {**about, "numbers": numbers})
    write_tensors(weights, load_file(weights), {"epoch": str(kept["epoch"] + 1), "score": "9.9"})
    patience = f"stopping_step: {kept['cur_step'] + 2}"
    config.write_text(config.read_text().replace("stopping_step: 9999", patience))
    run_in_two(tmp_path, f"--resume={folder}")
    assert result(runs)[0]["epochs"] == kept["epoch"] + 4
