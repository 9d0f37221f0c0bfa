"""Sweeps run for real on the toy data: rows, resuming, failures, kills."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from m2rec.commands.sweep import build_sweep_options, main, parse_options
from m2rec.experiments.ledger import build_result_row, format_settings, read_finished_runs
from m2rec.experiments.sweep_plan import PlannedRun, Sweep, get_planned_run_folder
from m2rec.experiments.sweep_runner import SweepRunner, check_committed_code
from m2rec.git import is_same_code, read_commit
from m2rec.training.checkpoint import CannotResume
from tests.conftest import small

ROOT = Path(__file__).parent.parent


def asked(tmp_path: Path, toy: Path, **others: Any) -> Path:
    """A sweep of two small variants; returns its file."""
    common = {k: v for k, v in small(toy).items() if k not in ("auto", "dataset", "data_path", "gpu_id")}
    content = {
        "title": "Toy",
        "datasets": ["toy"],
        "seeds": [1, 2],
        "common": {**common, "epochs": 1, "text_vectors": "none", "topk": [5, 10]},
        "variants": {"M2Rec": {}, "Popularity": {"model": "Popularity"}},
        **others,
    }
    path = tmp_path / "results" / "toy.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def given(path: Path, toy: Path, *others: str) -> list[str]:
    runs = path.parent.parent / "runs"
    return [str(path), f"--data-path={toy}", f"--runs={runs}", "--allow-dirty", *others]


def rows(path: Path) -> list[dict[str, str]]:
    with path.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file))


def started(tmp_path: Path) -> dict[str, float]:
    """When each cell's run was started, by the cell's folder."""
    logs = (tmp_path / "runs" / "toy").rglob("log.txt")
    return {str(log.parent): log.stat().st_mtime for log in logs}


def test_a_sweep_end_to_end(tmp_path: Path, toy: Path):
    path = asked(tmp_path, toy)
    assert main(given(path, toy, "--jobs=2")) == 0
    found = rows(path)
    assert [(row["variant"], row["seed"]) for row in found] == [
        ("M2Rec", "1"), ("Popularity", "1"), ("M2Rec", "2"), ("Popularity", "2"),
    ]  # fmt: skip
    first = found[0]
    assert first["model"] == "M2Rec" and json.loads(first["settings"])["hidden_size"] == 16
    assert (first["split"], first["time_order"], first["ties"]) == ("leave_one_out", "exact", "file")
    assert (first["users"], first["items"]) == ("30", "20")
    assert (first["text"], first["text_sha256"]) == ("", "")
    assert "auto" not in first["settings"]
    (config,) = (tmp_path / "runs" / "toy" / "toy" / "m2rec" / "1").glob("*/config.yaml")
    left_open = yaml.safe_load(config.read_text())  # the fixed defaults, whatever a rule would choose
    assert (left_open["train_batch_size"], left_open["patience_targets"], left_open["stopping_step"]) == (
        64,
        0,
        10,
    )
    assert float(first["peak_memory_mib"]) > 50 and float(first["seconds_total"]) > 0
    folder = get_planned_run_folder(tmp_path / "runs" / "toy", "toy", "M2Rec", 1)
    (metrics,) = folder.glob("*/metrics.json")
    expected = json.loads(metrics.read_text())
    for part in ("valid", "valid_unseen", "test", "test_unseen"):
        for name, value in expected[part].items():
            assert float(first[f"{part}.{name}"]) == value
    of_bucket = expected["test_by"]["history"]["6-20"]
    assert float(first["test_unseen.ndcg@10|history=6-20"]) == of_bucket["test_unseen"]["ndcg@10"]
    assert int(first["test_users|history=6-20"]) == of_bucket["users"]
    answers = read_finished_runs(Sweep.read(path))
    assert (answers["variant"] == "M2Rec").sum() == 2

    before = started(tmp_path)
    found[1]["test.hit@10"] = "0.5"  # whatever is in the CSV stays
    rewrite(path, found[:3])
    assert main(given(path, toy)) == 0
    assert started(tmp_path) == before  # the fourth was finished, only its row was missing
    assert len(rows(path)) == 4 and rows(path)[1]["test.hit@10"] == "0.5"

    asked(tmp_path, toy, variants={"M2Rec": {"n_layers": 1}, "Popularity": {"model": "Popularity"}})
    assert main(given(path, toy, "--seeds", "1")) == 0
    changed = {folder for folder, time in started(tmp_path).items() if time != before[folder]}
    assert {Path(folder).parent.name for folder in changed} == {"m2rec"} and len(changed) == 1
    assert len(rows(path)) == 4 and json.loads(rows(path)[0]["settings"])["n_layers"] == 1


def rewrite(path: Path, found: Sequence[dict[str, str]]) -> None:
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def test_what_fails_is_said_and_the_rest_runs(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    variants = {"wrong": {"hidden_sise": 3}, "Popularity": {"model": "Popularity"}}
    path = asked(tmp_path, toy, seeds=[1], variants=variants)
    assert main(given(path, toy)) == 1
    assert [row["variant"] for row in rows(path)] == ["Popularity"]
    err = capsys.readouterr().err
    assert "toy, wrong, seed 1: failed: run_mm.py: error: unknown key 'hidden_sise'" in err


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "scripts/sweep.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, env={**os.environ, "PYTHONPATH": "."})


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_sweep_goes_on(tmp_path: Path, toy: Path):
    """Killed in the first run, which is long: it holds its cell until it ends, and then goes on."""
    long = {"M2Rec": {"epochs": 100_000, "stopping_step": 100_000}, "Popularity": {"model": "Popularity"}}
    path = asked(tmp_path, toy, seeds=[1], variants=long)
    process = start(given(path, toy))
    cell = get_planned_run_folder(tmp_path / "runs" / "toy", "toy", "M2Rec", 1)
    try:
        wait_for(lambda: list(cell.glob("*/checkpoint.safetensors")))
        process.kill()
        process.wait()
        assert main(given(path, toy)) == 1  # the run of the killed sweep lives on
        assert [row["variant"] for row in rows(path)] == ["Popularity"]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    time.sleep(0.5)
    process = start(given(path, toy))  # goes on, and is asked to stop
    try:
        wait_for(lambda: "resumed after epoch" in (cell / "log.txt").read_text())
        process.terminate()
        assert process.wait(60) == 130
        assert "run_mm.py: stopped; " in (cell / "log.txt").read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process = start(given(path, toy))  # goes on, and then the run is killed, as for want of memory
    try:
        wait_for(lambda: (cell / "log.txt").read_text().count("resumed after epoch") == 2)
        for child in psutil.Process(process.pid).children():
            child.kill()
        assert process.wait(60) == 1
    finally:
        with suppress(ProcessLookupError):  # it has ended, as it should
            os.killpg(process.pid, signal.SIGKILL)
    (checkpoint,) = cell.glob("*/checkpoint.safetensors")
    config = checkpoint.with_name("config.yaml")  # or it would go on for a day
    config.write_text(re.sub("(?m)^epochs: .*", "epochs: 1", config.read_text()))
    assert main(given(path, toy)) == 0
    assert [row["variant"] for row in rows(path)] == ["M2Rec", "Popularity"]
    assert (cell / "log.txt").read_text().count("resumed after epoch") == 3
    assert not list(cell.glob("*/checkpoint.safetensors"))

    asked(tmp_path, toy, seeds=[1])  # other settings: nothing of it is used
    assert main(given(path, toy)) == 0
    assert len(list(cell.glob("*/history.csv"))) == 1 and rows(path)[0]["epochs"] == "1"


@pytest.mark.parametrize("status", [CannotResume.exit_status, 2, 1, -signal.SIGKILL])
def test_only_a_run_that_can_not_go_on_is_started_anew(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch, status: int
):
    """Whatever else stops it, such as a full disk, may be gone next time."""
    path = asked(tmp_path, toy, seeds=[1], variants={"M2Rec": {}})
    (cell,) = Sweep.read(path).planned_runs()
    folder = get_planned_run_folder(tmp_path / "runs" / "toy", "toy", "M2Rec", 1)
    left = folder / "M2Rec-toy-1"
    left.mkdir(parents=True)
    (folder / "settings.json").write_text(format_settings(cell.keys))
    (folder / "log.txt").write_text("what went wrong")
    tried: list[object] = []

    def call(runner: SweepRunner, values: dict[str, object], *_: object) -> int:
        tried.append(values.get("resume"))
        return status if "resume" in values else 1

    monkeypatch.setattr(SweepRunner, "_find_resumable_run", lambda runner, folder: left)
    monkeypatch.setattr(SweepRunner, "_run_process", call)
    assert main(given(path, toy)) == 1
    anew = status == CannotResume.exit_status
    assert tried == ([str(left), None] if anew else [str(left)]) and left.exists() != anew


def test_mistakes(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    path = asked(tmp_path, toy)
    assert main(given(path, toy, "--only", "SASRec")) == 2
    assert f"{path} has no variant 'SASRec'" in capsys.readouterr().err
    assert main(given(path, toy, "--datasets", "toyy")) == 2
    assert "has no data set 'toyy'; did you mean 'toy'?" in capsys.readouterr().err
    assert main(given(path, toy, "--seeds", "3")) == 2
    assert "has no seed '3'; it has 1, 2" in capsys.readouterr().err
    assert main(given(path, toy, "--jobs=0")) == 2
    assert "--jobs: expected a whole number from 1, got 0" in capsys.readouterr().err
    assert main([str(tmp_path / "none.yaml"), "--allow-dirty"]) == 2
    assert "can't be read: No such file" in capsys.readouterr().err


def test_some_runs_alone(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    path = asked(tmp_path, toy)
    assert main(given(path, toy, "--only", "Popularity", "--seeds", "2", "--datasets", "toy")) == 0
    assert [(row["variant"], row["seed"]) for row in rows(path)] == [("Popularity", "2")]
    hit, ndcg = rows(path)[0]["test_unseen.hit@10"], rows(path)[0]["test_unseen.ndcg@10"]
    done = f"test_unseen hit@10 {float(hit):.4f}, ndcg@10 {float(ndcg):.4f}"
    assert f"toy, Popularity, seed 2: done, {done}" in capsys.readouterr().err


def test_finished_runs_again(tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]):
    """A row is repeated into a table of its own, and both are shown."""
    path = asked(tmp_path, toy)
    again = ["--again", "--only", "M2Rec", "--seeds", "1"]
    assert main(given(path, toy, *again)) == 2
    assert f"{path.with_suffix('.csv')} has no row of these runs" in capsys.readouterr().err
    assert main(given(path, toy, *again[1:])) == 0
    before = rows(path)
    before[0]["test_unseen.ndcg@10"] = "0.9876"
    rewrite(path, before)
    assert main(given(path, toy, *again)) == 0
    assert rows(path) == before
    with (tmp_path / "runs" / "again" / "toy.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["variant"], row["seed"]) == ("M2Rec", "1")
    hit = row["test_unseen.hit@10"]
    assert hit == before[0]["test_unseen.hit@10"]
    both = f"ndcg@10 {float(row['test_unseen.ndcg@10']):.4f}; {path.with_suffix('.csv')} has test_unseen "
    assert f"{both}hit@10 {float(hit):.4f}, ndcg@10 0.9876" in capsys.readouterr().err
    log = next((tmp_path / "runs" / "again").rglob("log.txt"))
    size = log.stat().st_size
    assert main(given(path, toy, *again)) == 0  # of the same code: shown, not trained
    assert both in capsys.readouterr().err and log.stat().st_size == size


def test_results_and_readme_are_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a sweep and its report write in the repository makes no result dirty; code does."""

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def committed(*names: str) -> str | None:
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(f"{names}")
        git("add", ".")
        git("commit", "-m", "some")
        return read_commit()

    git("init")
    monkeypatch.setattr("m2rec.git._REPOSITORY", tmp_path.resolve())
    first = committed("m2rec/experiment.py", "results/a.csv", "README.md", "config.yaml", "tests/test.py")
    (tmp_path / "results" / "a.csv").write_text("two")
    (tmp_path / "README.md").write_text("two")
    assert read_commit() == first and is_same_code(first, first)
    check_committed_code()
    with monkeypatch.context() as installed:  # into a folder of another project's repository
        installed.setattr("m2rec.git._REPOSITORY", tmp_path.resolve() / "m2rec")
        assert read_commit() is None
    second = committed("results/a.csv", "README.md", "tests/test.py")
    assert second != first and is_same_code(first, second)
    assert is_same_code(f"{first} and {second}", second)
    third = committed("config.yaml")
    assert not is_same_code(f"{first} and {third}", third) and not is_same_code("a and b+dirty", third)
    assert (
        not is_same_code(first, third) and not is_same_code(first, None) and not is_same_code("0" * 40, third)
    )
    (tmp_path / "config.yaml").write_text("two")
    assert (
        read_commit() == f"{third}+dirty"
        and not is_same_code(third, read_commit())
        and is_same_code(read_commit(), read_commit())
    )
    with pytest.raises(ValueError, match="commit them or give --allow-dirty"):
        check_committed_code()


def test_a_file_that_changed_meanwhile_starts_nothing(
    tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]
):
    """What another sweep of the new file has made is not taken away."""
    path = asked(tmp_path, toy, seeds=[1])
    work = SweepRunner(Sweep.read(path), build_sweep_options(parse_options(given(path, toy))))
    variants = {"M2Rec": {}, "Popularity": {"model": "Popularity", "topk": [10]}}
    asked(tmp_path, toy, seeds=[1], variants=variants)
    assert work.run() == 1
    said = capsys.readouterr().err
    assert f"toy, Popularity, seed 1: {path} has changed; start the sweep again" in said
    assert [row["variant"] for row in rows(path)] == ["M2Rec"]


def test_a_second_interrupt_is_no_traceback(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(work: SweepRunner) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(SweepRunner, "run", interrupted)
    assert main(given(asked(tmp_path, toy), toy)) == 130


def test_rows_say_what_made_their_text_vectors(tmp_path: Path, toy: Path):
    lines = [f"i{i}\tword{i % 7} word{i % 5} word{i % 3}" for i in range(20)]
    (toy / "toy" / "toy.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *lines]) + "\n")
    common = {k: v for k, v in small(toy).items() if k not in ("auto", "dataset", "data_path", "gpu_id")}
    variants = {"M2Rec": {"text_encoder": "lsa"}}
    path = asked(tmp_path, toy, seeds=[1], common={**common, "epochs": 1}, variants=variants)
    assert main(given(path, toy)) == 0
    (row,) = rows(path)
    assert row["text"] == "lsa: title" and len(row["text_sha256"]) == 64


def test_topk_without_10_is_refused(tmp_path: Path):
    (tmp_path / "metrics.json").write_text('{"test": {"hit@5": 0.5}}')
    (tmp_path / "history.csv").write_text("epoch,seconds\n0,1\n")
    with pytest.raises(ValueError, match=r"hit@10 was not measured, but tables and paired tests need it"):
        build_result_row(PlannedRun("toy", "M2Rec", 1, {}), tmp_path)


def test_uncommitted_code_is_refused(
    tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = asked(tmp_path, toy)
    arguments = [a for a in given(path, toy) if a != "--allow-dirty"]
    for found in (None, "0123abc+dirty"):
        monkeypatch.setattr("m2rec.experiments.sweep_runner.read_commit", lambda found=found: found)
        assert main(arguments) == 2
        assert "commit them or give --allow-dirty" in capsys.readouterr().err
    assert not path.with_suffix(".csv").exists()
