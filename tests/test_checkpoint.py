"""A run that was stopped and goes on ends as one that was not, to the last digit."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2rec import checkpoint
from m2rec.configuration import build_config
from m2rec.experiment import Stopped, fit, prepare
from tests.conftest import as_arguments, small

Command = Callable[..., tuple[int, str, str]]


def stopped(values: dict[str, Any], after: int) -> Path:
    """A run that ended after that epoch; its folder."""

    def watch(epoch: int, score: float) -> None:
        if epoch == after:
            raise Stopped

    prepared = prepare(build_config(values))
    with pytest.raises(Stopped):
        fit(prepared, watch)
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
        pytest.param({}, id="dense"),
        pytest.param({"worker": 1, "enable_amp": True, "learner": "rmsprop"}, id="worker"),
        pytest.param({"average_epochs": 0.5, "epochs": 9}, id="average"),
        pytest.param({"rows": "prefix", "loss_type": "BPR"}, id="own negatives"),
        pytest.param({"model": "BERT4Rec", "n_layers": 1}, id="masks"),
        pytest.param({"eval_step": 2}, id="every second epoch"),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(
    command: Command, toy: Path, tmp_path: Path, others: dict[str, Any]
):
    values = {**small(toy, epochs=5, learning_rate=0.01, text_vectors="none"), **others}
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
    assert Path(out.splitlines()[-1]) == folder and "goes on after epoch 1" in err
    one, other = outcome(whole), outcome(folder)
    assert len(one[1]) > 3  # epochs after the stop, whose losses and scores are compared
    assert other[:3] == one[:3]
    for name, value in one[3].items():
        assert torch.equal(other[3][name], value), name
    assert not (folder / "checkpoint.safetensors").exists()


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
    prepared = prepare(build_config({**values, "epochs": 2, "runs_dir": str(tmp_path / "runs")}))
    fit(prepared)
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
    mistakes: list[tuple[list[str], str]] = [
        ([f"--resume={tmp_path}"], f"resume: {tmp_path} has no config.yaml to go on from"),
        ([f"--resume={folder}", "--epochs=9"], "it takes its keys from the run, not --epochs"),
        (["--resume=5"], "resume: 5: expected runs/NAME"),
    ]
    for arguments, message in mistakes:
        status, _, err = command(*arguments, runs_dir=False)
        assert status == 2 and message in err and "Traceback" not in err
    for broken in (b"", content[:1000], content[: len(content) // 2], b"\x80\x04" + content):
        path.write_bytes(broken)
        status, _, err = command(f"--resume={folder}", runs_dir=False)
        assert status == 2 and "is no checkpoint of this run" in err and "Traceback" not in err
    path.unlink()
    status, _, err = command(f"--resume={folder}", runs_dir=False)
    assert status == 2 and "has no checkpoint.safetensors to go on from" in err


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    def made(width: int) -> checkpoint.Training:
        model = torch.nn.Linear(width, 2)
        optimizer = torch.optim.Adam(model.parameters())
        return checkpoint.Training(model, optimizer, torch.Generator(), None, torch.device("cpu"))

    path = tmp_path / "c.safetensors"
    checkpoint.save(path, made(3), {"epoch": 1})
    with pytest.raises(ValueError, match=r"is no checkpoint of this run \(RuntimeError: .*size mismatch"):
        checkpoint.load(path, made(4))
    assert checkpoint.load(path, made(3)) == {"epoch": 1}
