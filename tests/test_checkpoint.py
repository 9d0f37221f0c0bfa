"""A run that was stopped and goes on ends as one that was not, to the last digit."""

import csv
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2rec.run_folder import RunFolder
from m2rec.storage import lock_path
from m2rec.tensor_files import _separate_tensors, read_tensors, write_tensors
from m2rec.training import checkpoint, run
from m2rec.training.configuration import build_config
from m2rec.training.run import TrainingStopped, build_resumed_config, prepare_run, run_experiment
from m2rec.training.signals import RunInterrupted
from m2rec.training.trainer import RunTrainer
from tests.conftest import as_arguments, small

Command = Callable[..., tuple[int, str, str]]


def stopped(values: dict[str, Any], after: int) -> Path:
    """A run that ended after that epoch; its folder."""

    def watch(epoch: int, score: float) -> None:
        if epoch == after:
            raise TrainingStopped

    prepared = prepare_run(build_config(values))
    with pytest.raises(TrainingStopped):
        prepared.train(watch)
    return prepared.trainer.folder


def outcome(folder: Path) -> tuple[Any, Any, Any, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "history.csv").open() as file:
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    kept = ("valid", "valid_unseen", "test", "test_unseen", "test_by", "best_epoch", "epochs")
    ranks = (folder / "test_ranks.csv").read_text()
    return {key: metrics[key] for key in kept}, history, ranks, load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"n_layers": 2}, id="dense"),
        pytest.param({"worker": 1, "enable_amp": True, "learner": "rmsprop"}, id="worker"),
        pytest.param({"average_epochs": 0.5, "epochs": 9}, id="average"),
        pytest.param({"rows": "prefix", "loss_type": "BPR"}, id="own negatives"),
        pytest.param({"model": "BERT4Rec"}, id="masks"),
        pytest.param({"eval_step": 2}, id="every second epoch"),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(
    command: Command, toy: Path, tmp_path: Path, others: dict[str, Any]
):
    values = {**small(toy, epochs=5, learning_rate=0.01, text_vectors="none", n_layers=1), **others}
    if "model" in values:
        values = {k: v for k, v in values.items() if k not in ("head_dim", "d_state", "text_vectors")}
    status, out, err = command(*as_arguments(values))
    assert status == 0, err
    whole = Path(out.splitlines()[-1])
    folder = stopped({**values, "runs_dir": str(tmp_path / "runs")}, after=1)
    with (folder / "history.csv").open("a") as file:
        file.write("2,9.9,1.0\n")  # of an epoch that was not kept
    status, out, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    assert Path(out.splitlines()[-1]) == folder and "resumed after epoch 1" in err
    one, other = outcome(whole), outcome(folder)
    assert len(one[1]) > 3  # epochs after the stop, whose losses and scores are compared
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name
    assert not (folder / "checkpoint.safetensors").exists()


def test_a_run_that_stopped_before_there_was_a_key(
    command: Command, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`metric_definitions` decides nothing about the weights."""
    lasting = run.collect_fixed_settings
    monkeypatch.setattr(
        run, "collect_fixed_settings",
        lambda config: {k: v for k, v in lasting(config).items() if k != "metric_definitions"},
    )  # fmt: skip
    folder = stopped({**small(toy, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}, after=0)
    monkeypatch.undo()
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err


@pytest.mark.parametrize("before", [1, 2])
def test_another_number_of_threads_is_said(
    command: Command, toy: Path, tmp_path: Path, before: int, caplog: pytest.LogCaptureFixture
):
    values = {**small(toy, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}
    torch.set_num_threads(before)
    folder = stopped(values, after=0)
    torch.set_num_threads(1)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    said = "threads: 2 before, 1 now; results may differ in the last digits (set OMP_NUM_THREADS=2 to keep"
    assert (said in err) == (before == 2)


def stopped_in_an_epoch(values: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run to which SIGTERM came in that step of all; its folder."""
    left, step = [steps], RunTrainer._train_step

    def counted(self: RunTrainer, *batch: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    monkeypatch.setattr(RunTrainer, "_train_step", counted)
    with pytest.raises(RunInterrupted) as stop:
        run_experiment(build_config(values))
    monkeypatch.undo()
    assert stop.value.signal == signal.SIGTERM and stop.value.folder is not None
    return stop.value.folder


@pytest.mark.parametrize(
    ("others", "steps", "where"),
    [
        pytest.param({"n_layers": 2}, 9, "after epoch 0, step 3", id="dense"),
        pytest.param({}, 1, "after epoch -1, step 1", id="first step"),
        pytest.param({"average_epochs": 0.5}, 11, "after epoch 0, step 5", id="last step but one"),
        pytest.param({}, 12, "after epoch 1;", id="last step"),
        pytest.param({"worker": 1}, 9, "after epoch 0, step 3", id="worker"),
        pytest.param(
            {
                "sparse_updates": True, "loss_type": "sampled", "n_negatives": 3, "negatives_shared": 30,
                "average_epochs": 0.5, "decay_per_epoch": 0.2,
            },
            9, "after epoch 0, step 3", id="sparse updates",
        ),
        pytest.param(
            {"rows": "prefix", "loss_type": "BPR", "train_batch_size": 50}, 9, "after epoch 0, step 3",
            id="own negatives",
        ),
        pytest.param(
            {"model": "BERT4Rec", "train_batch_size": 50}, 9, "after epoch 0, step 3", id="masks",
        ),
        pytest.param({"eval_step": 3}, 9, "after epoch 0, step 3", id="every third epoch"),
    ],
)  # fmt: skip
def test_stopped_within_an_epoch(
    command: Command, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    others: dict[str, Any], steps: int, where: str,
):  # fmt: skip
    """Six steps an epoch; goes on in the middle of one, to the same end."""
    values = small(toy, epochs=4, learning_rate=0.01, text_vectors="none", train_batch_size=7, n_layers=1)
    values |= others
    if "model" in values:
        values = {k: v for k, v in values.items() if k not in ("head_dim", "d_state", "text_vectors")}
    status, out, err = command(*as_arguments(values))
    assert status == 0, err
    whole = Path(out.splitlines()[-1])
    folder = stopped_in_an_epoch({**values, "runs_dir": str(tmp_path / "runs")}, steps, monkeypatch)
    status, out, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    assert f"resumed {where}" in err
    one, other = outcome(whole), outcome(folder)
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name


def test_a_checkpoint_every_few_minutes_within_an_epoch(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kept: list[int] = []
    write = RunTrainer._write_checkpoint

    def counted(self: RunTrainer) -> None:
        kept.append(self._progress.steps)
        write(self)

    monkeypatch.setattr(RunTrainer, "_write_checkpoint", counted)
    values = small(toy, epochs=1, text_vectors="none", train_batch_size=7, runs_dir=str(tmp_path / "runs"))
    run_experiment(build_config({**values, "checkpoint_minutes": 1e-9}))
    assert kept == [1, 2, 3, 4, 5, 0]
    kept.clear()
    run_experiment(build_config(values))
    assert kept == [0]


def test_a_table_is_written_without_a_copy_and_views_with_their_own_values(tmp_path: Path):
    table, many = torch.randn(4, 3), torch.arange(6.0)
    assert _separate_tensors({"table": table})["table"].data_ptr() == table.data_ptr()
    views = {"table": table, "again": table, "part": many[2:4], "rest": many[4:], "turned": table.T,
             "none": torch.zeros(0), "nothing": torch.zeros(0, 3), "number": torch.tensor(7)}  # fmt: skip
    write_tensors(tmp_path / "x", views, {"a": "b"})
    found, about = read_tensors(tmp_path / "x")
    assert about == {"a": "b"} and set(found) == set(views)
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())
    assert (tmp_path / "x").stat().st_size < 2_000  # a part takes no more than its own bytes


def test_a_run_is_never_trained_twice_at_a_time(
    command: Command, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("m2rec.training.new_run._LOCK_TIMEOUT", 0.5)
    folder = stopped({**small(toy, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}, after=0)
    with lock_path(folder):
        status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 2 and f"resume: another process is training in {folder}" in err
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("interactions", "resume: the data of "),
        ("order", "resume: the data of "),
        ("times", "resume: the data of "),
        ("text", "resume: the text vectors of "),
        ("text is gone", "text_vectors: no file"),
    ],
)
def test_data_that_changed_is_noticed(
    command: Command, toy: Path, tmp_path: Path, write_vectors: Callable[..., Path], what: str, message: str
):
    tokens = [f"i{k}" for k in range(20)]
    vectors = write_vectors(toy, "toy", tokens)
    folder = stopped({**small(toy), "runs_dir": str(tmp_path / "runs")}, after=0)
    path = toy / "toy" / "toy.inter"
    head, *lines = path.read_text().splitlines()
    if what == "interactions":
        lines.append(f"{lines[0].split()[0]}\ti3\t1e9")
    elif what == "order":
        lines.reverse()
    elif what == "times":  # the same histories, but the rows of training come in another order
        cells = [line.split("\t") for line in lines]
        lines = [f"{u}\t{i}\t{float(t) + 1e6 * (int(u[1:]) % 2)}" for u, i, t in cells]
    elif what == "text":
        write_vectors(toy, "toy", tokens[:-1])
    else:
        vectors.unlink()
    path.write_text("\n".join([head, *lines]) + "\n")
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == (2 if what == "text is gone" else 3) and message in err and "Traceback" not in err


def test_text_that_came_later_changes_nothing(
    command: Command, toy: Path, tmp_path: Path, write_vectors: Callable[..., Path]
):
    folder = stopped({**small(toy), "runs_dir": str(tmp_path / "runs")}, after=0)
    write_vectors(toy, "toy", [f"i{k}" for k in range(20)])
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 0, err
    assert json.loads((folder / "metrics.json").read_text())["text"] is None


def test_settings_that_changed_are_named(command: Command, toy: Path, tmp_path: Path):
    values = {**small(toy, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}
    folder = stopped(values, after=0)
    config = folder / "config.yaml"
    whole = config.read_text()
    for old, new, message in (
        ("learning_rate: 0.001", "learning_rate: 0.01", "resume: learning_rate was 0.001 and is 0.01 in"),
        ("seed: 2020", "seed: 2021", "resume: seed was 2020 and is 2021 in"),
        ("hidden_size: 16", "hidden_size: 32", "resume: hidden_size was 16 and is 32 in"),
    ):
        assert old in whole
        config.write_text(whole.replace(old, new))
        status, _, err = command(f"--resume={folder}", runs_dir=False)
        assert status == 3 and message in err
    config.write_text(whole.replace("epochs: 2", "epochs: 3"))
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0


def test_weights_of_an_epoch_whose_checkpoint_is_not_there(command: Command, toy: Path, tmp_path: Path):
    """They are the best then; others are refused."""
    values = {
        **small(toy, epochs=5, learning_rate=0.01, text_vectors="none"),
        "runs_dir": str(tmp_path / "runs"),
    }
    folder = stopped(values, after=1)
    path = folder / "model.safetensors"
    weights, about = read_tensors(path)
    for epoch in ("0", "-1"):
        write_tensors(path, weights, {**about, "epoch": epoch})
        if about["epoch"] == epoch:
            continue
        status, _, err = command(f"--resume={folder}", runs_dir=False)
        assert status == 3 and f"holds the weights of epoch {epoch}, expected {about['epoch']}" in err
    write_tensors(path, weights, {"epoch": "2", "score": "0.9"})  # of an attempt that did far better
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["best_epoch"] == 2
    assert all(torch.equal(load_file(path)[name], value) for name, value in weights.items())


@pytest.mark.parametrize("content", ["", "epoch,loss\n", "epoch\n1,2\n", "\0\n\n\n\n"])
def test_a_history_that_lost_lines(command: Command, toy: Path, tmp_path: Path, content: str):
    folder = stopped({**small(toy, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}, after=0)
    (folder / "history.csv").write_text(content)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 3 and "history.csv is incomplete before epoch 0" in err


def test_every_code_that_trained_is_named(
    command: Command, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = {**small(toy, epochs=3, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}
    monkeypatch.setattr("m2rec.training.run.read_commit", lambda: "a")
    folder = stopped(values, after=0)
    monkeypatch.setattr("m2rec.training.run.read_commit", lambda: "b")
    prepared = prepare_run(build_resumed_config(folder, {}), folder)

    def stop(epoch: int, score: float) -> None:
        raise TrainingStopped

    with pytest.raises(TrainingStopped):
        prepared.train(stop)
    monkeypatch.setattr("m2rec.training.run.read_commit", lambda: "a")
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0
    assert json.loads((folder / "metrics.json").read_text())["commit"] == "a and b"


def test_commits_of_older_checkpoints():
    assert checkpoint.read_commits({"commit": "a and b"}) == ["a", "b"]
    assert checkpoint.read_commits({"commit": None}) == [None]
    assert checkpoint.read_commits({"commits": ["a"]}) == ["a"]


def test_every_damage_is_noticed(command: Command, toy: Path, tmp_path: Path):
    """A flipped bit anywhere, M2REC_BITS of them, and every length but the whole one."""
    values = small(toy, text_vectors="none", n_layers=1, runs_dir=str(tmp_path / "runs"))
    folder = stopped(values, after=0)
    path = folder / "checkpoint.safetensors"
    content = path.read_bytes()
    read_tensors(path)
    draw = random.Random(0)
    for _ in range(int(os.environ.get("M2REC_BITS", "300"))):
        place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors (is corrupt|can't be read)"):
            read_tensors(path)
    for length in range(0, len(content), 1024):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="can't be read"):
            read_tensors(path)
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 3 and "is not a valid checkpoint of this run" in err and "Traceback" not in err


def test_a_run_that_early_stopping_ended_only_lacks_its_test(command: Command, toy: Path, tmp_path: Path):
    values = small(toy, epochs=50, learning_rate=0.05, stopping_step=1, text_vectors="none")
    whole = Path(command(*as_arguments(values))[1].splitlines()[-1])
    epochs = json.loads((whole / "metrics.json").read_text())["epochs"]
    assert epochs < 50
    folder = stopped({**values, "runs_dir": str(tmp_path / "runs")}, after=epochs - 1)
    assert command(f"--resume={folder}", runs_dir=False)[0] == 0
    one, other = outcome(whole), outcome(folder)
    assert other[:3] == one[:3]


def test_without_validation_rows_too(command: Command, tmp_path: Path):
    from tests.conftest import write_inter

    write_inter(tmp_path / "data", "toy", [(f"u{u}", f"i{k + u % 3}", k) for u in range(8) for k in range(3)])
    values = small(tmp_path / "data", epochs=4, learning_rate=0.01, text_vectors="none")
    whole = Path(command(*as_arguments(values))[1].splitlines()[-1])
    prepared = prepare_run(build_config({**values, "epochs": 2, "runs_dir": str(tmp_path / "runs")}))
    prepared.train()
    config = prepared.trainer.folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 4"))
    status, _, err = command(f"--resume={prepared.trainer.folder}", runs_dir=False)
    assert status == 0, err
    assert outcome(prepared.trainer.folder)[0] == outcome(whole)[0]


def test_what_can_not_go_on_is_named(command: Command, toy: Path, tmp_path: Path):
    values = {**small(toy, epochs=3, text_vectors="none"), "runs_dir": str(tmp_path / "runs")}
    folder = stopped(values, after=0)
    path = folder / "checkpoint.safetensors"
    content = path.read_bytes()
    mistakes: list[tuple[list[str], int, str]] = [
        ([f"--resume={tmp_path}"], 3, f"can't resume {tmp_path}: config.yaml is missing; start a new run"),
        ([f"--resume={folder}", "--epochs=9"], 2, "it takes its keys from the run, not --epochs"),
        (["--resume=5"], 2, "resume: 5: expected runs/NAME"),
    ]
    for arguments, expected, message in mistakes:
        status, _, err = command(*arguments, runs_dir=False)
        assert status == expected and message in err and "Traceback" not in err
    for broken in (b"", content[:1000], content[: len(content) // 2], b"\x80\x04" + content):
        path.write_bytes(broken)
        status, _, err = command(f"--resume={folder}", runs_dir=False)
        assert status == 3 and "is not a valid checkpoint of this run" in err and "Traceback" not in err
    path.unlink()
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 3 and "checkpoint.safetensors is missing; start a new run" in err


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    def made(width: int) -> checkpoint.TrainingState:
        model = torch.nn.Linear(width, 2)
        optimizer = torch.optim.Adam(model.parameters())
        return checkpoint.TrainingState(model, optimizer, torch.Generator(), None, torch.device("cpu"))

    files, numbers = RunFolder(tmp_path), {"epoch": 1, "notes": {}}
    checkpoint.save_checkpoint(files, made(3), numbers)
    with pytest.raises(
        ValueError, match=r"not a valid checkpoint of this run \(RuntimeError: .*size mismatch"
    ):
        checkpoint.load_checkpoint(files, made(4), {})
    assert checkpoint.load_checkpoint(files, made(3), {}) == numbers
