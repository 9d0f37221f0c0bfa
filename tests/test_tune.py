"""scripts/tune.py: small studies with real runs, and what can be wrong with their files."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import random_rows, small, write_inter

pytest.importorskip("optuna")

import optuna

import run_mm
from m2rec.commands import tune
from m2rec.commands.config_file import find_config_file
from m2rec.experiments import search
from m2rec.experiments import study as study_module
from m2rec.experiments.search_plan import SearchPlan
from m2rec.experiments.study import get_progress
from m2rec.training.configuration import build_config, collect_known_keys
from m2rec.training.run import PreparedRun
from m2rec.yaml_values import parse_arguments

ROOT = Path(__file__).parent.parent
PROGRESS = {"trained_epochs", "best_epoch", "seconds", "commit", "parameters", "worker", "paused"}
Study = Callable[..., tuple[int, str, str]]


def settings(toy: Path, **others: Any) -> dict[str, Any]:
    fixed = {**small(toy, epochs=2, text_vectors="none"), "runs_dir": str(toy.parent / "runs")}
    del fixed["n_layers"], fixed["auto"]  # a study leaves auto off unless its file says otherwise
    search = {"learning_rate": {"low": 0.001, "high": 0.1, "log": True}, "n_layers": [1, 2]}
    return {"study": "small", "trials": 3, "seed": 1, "fixed": fixed, "search": search, **others}


@pytest.fixture
def study(toy: Path, capsys: pytest.CaptureFixture[str]) -> Study:
    """Call tune.main with a file of these settings; returns exit status, stdout and stderr."""

    def call(*arguments: str, **others: Any) -> tuple[int, str, str]:
        path = toy.parent / "plan.yaml"
        path.write_text(yaml.safe_dump(settings(toy, **others)))
        status = tune.main([str(path), *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def rows(toy: Path) -> list[dict[str, str]]:
    with (toy.parent / "plan.csv").open() as file:
        return list(csv.DictReader(file))


def trials(toy: Path, name: str = "small") -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(toy.parent / "runs" / "tune" / f"{name}.log"))
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend)).trials


def test_a_study_from_file_to_table(study: Study, toy: Path):
    status, out, err = study()
    assert status == 0, err
    lines = out.splitlines()
    assert lines[1] == "small: 3 complete, 0 pruned, 0 failed; on validation:"
    assert lines[2].split() == "trial NDCG@10 trained_epochs best_epoch learning_rate n_layers".split()
    found = rows(toy)
    columns = "trial state value trained_epochs best_epoch seconds commit learning_rate n_layers"
    assert list(found[0]) == columns.split()
    assert [row["trial"] for row in found] == ["0", "1", "2"]
    best = max(found, key=lambda row: float(row["value"]))
    assert lines[3].split()[:2] == [best["trial"], f"{float(best['value']):.4f}"]
    assert [line.split()[1] for line in lines[3:6]] == sorted(
        (f"{t.value:.4f}" for t in trials(toy)), reverse=True
    )
    for trial in trials(toy):
        assert set(get_progress(trial)) == PROGRESS
        assert get_progress(trial)["trained_epochs"] == 2 and get_progress(trial)["parameters"] > 1000
        scores = trial.intermediate_values
        assert trial.value == max(scores.values()) == scores[get_progress(trial)["best_epoch"] + 1]
    assert get_progress(trials(toy)[0])["parameters"] != get_progress(trials(toy)[1])["parameters"]


def test_the_command_of_the_best_repeats_it(study: Study, toy: Path, capsys: pytest.CaptureFixture[str]):
    command = shlex.split(study()[1].splitlines()[-1])
    assert command[:2] == ["python", "run_mm.py"] and "--auto=false" in command
    assert run_mm.main(command[2:]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    metrics = json.loads((folder / "metrics.json").read_text())
    best = max(trials(toy), key=lambda trial: trial.value)
    assert metrics["valid"]["ndcg@10"] == best.value
    assert metrics["best_epoch"] == get_progress(best)["best_epoch"]
    assert metrics["parameters"] == get_progress(best)["parameters"]


def test_the_test_items_change_nothing(study: Study, toy: Path):
    """Each user's last item is another one: a test would see it."""
    short = {"u0", "u1", "u25", "u26"}  # with fewer than three other items the last is no test
    start = [row for row in random_rows() if row[0] not in short]
    values = []
    for name, shift in (("one", 0), ("two", 7)):
        users = sorted({str(row[0]) for row in start})
        last = [(user, f"i{(3 * k + shift) % 20}", 2_000_000_000) for k, user in enumerate(users)]
        write_inter(toy, "toy", [*start, *last])
        assert study(study=name)[0] == 0
        values.append([trial.intermediate_values for trial in trials(toy, name)])
        assert "test" not in "".join((toy.parent / "plan.csv").read_text())
        assert not list((toy.parent / "runs").rglob("metrics.json"))
    assert values[0] == values[1]


def test_a_study_goes_on_as_if_it_had_not_ended(study: Study, toy: Path):
    study(study="whole", trials=4)
    study("--trials=2")
    assert len(rows(toy)) == 2
    status, out, _ = study("--trials=4")
    assert status == 0 and "4 complete" in out
    assert [t.params for t in trials(toy)] == [t.params for t in trials(toy, "whole")]
    assert len({str(t.params) for t in trials(toy)}) == 4
    before = [row for row in rows(toy)]
    assert study("--trials=4")[1] == out  # all are done
    assert rows(toy) == before


def test_another_machine_joins_a_study(study: Study, toy: Path):
    study("--trials=1")
    status, _, err = study("--trials=2", "--eval_batch_size=7", "--checkpoint_minutes=1")
    assert status == 0, err
    assert len(rows(toy)) == 2


def test_the_number_of_epochs_may_be_searched(study: Study, toy: Path):
    fixed = {key: value for key, value in settings(toy)["fixed"].items() if key != "epochs"}
    search = {"epochs": [50], "learning_rate": [0.05]}
    assert study(fixed={**fixed, "stopping_step": 0, "n_layers": 1}, search=search, trials=1)[0] == 0
    (row,) = rows(toy)
    assert row["epochs"] == "50" and 1 <= int(row["trained_epochs"]) < 50


def test_another_seed_draws_others(study: Study, toy: Path):
    study(study="a", trials=2)
    study(study="b", trials=2, seed=100)
    assert [t.params for t in trials(toy, "a")] != [t.params for t in trials(toy, "b")]


def test_two_workers_at_once(toy: Path):
    path = toy.parent / "plan.yaml"
    path.write_text(yaml.safe_dump(settings(toy, trials=5)))
    command = [sys.executable, str(ROOT / "scripts" / "tune.py"), str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
    done = trials(toy)
    assert 5 <= len(done) <= 6 and all(t.state.name == "COMPLETE" for t in done)
    assert len({t.params["learning_rate"] for t in done}) == len(done)
    assert len(rows(toy)) == len(done)


def test_the_trial_of_a_killed_worker_is_resumed(study: Study, toy: Path):
    study("--trials=1")
    backend = optuna.storages.journal.JournalFileBackend(str(toy.parent / "runs" / "tune" / "small.log"))
    optuna.load_study(study_name="small", storage=optuna.storages.JournalStorage(backend)).ask()
    status, out, _ = study("--trials=2")
    assert status == 0 and "2 complete, 0 pruned, 0 failed" in out
    assert [row["state"] for row in rows(toy)] == ["complete", "complete"]


def enqueue(toy: Path, drawn: list[dict[str, Any]], **others: Any) -> None:
    """Let the first trials of that study have these settings."""
    path = toy.parent / "enqueued.yaml"
    path.write_text(yaml.safe_dump(settings(toy, **others)))
    plan = SearchPlan.read(path, {}, {"learning_rate", "head_dim"})
    study = study_module.open_study(toy.parent / "runs" / "tune" / plan.study, True, None)
    for values in drawn:
        study.enqueue_trial(values)


def test_a_hopeless_trial_is_pruned(study: Study, toy: Path):
    """The second learns nothing; an epoch after the warm-up ends it."""
    fixed = {**settings(toy)["fixed"], "epochs": 6, "n_layers": 1}
    plan = {"fixed": fixed, "search": {"learning_rate": [0.05, 1e-9]}, "trials": 2}
    enqueue(toy, [{"learning_rate": 0.05}, {"learning_rate": 1e-9}], **plan)
    status, out, err = study(pruner={"warmup_epochs": 3, "startup_trials": 1}, **plan)
    assert status == 0, err
    first, second = trials(toy)
    assert (first.state.name, second.state.name) == ("COMPLETE", "PRUNED")
    assert get_progress(first)["trained_epochs"] == 6 and get_progress(second)["trained_epochs"] >= 4
    assert set(get_progress(second)) == PROGRESS
    assert "1 complete, 1 pruned, 0 failed" in out
    assert [row["state"] for row in rows(toy)] == ["complete", "pruned"]
    assert "--learning_rate=0.05" in out.splitlines()[-1]


def test_without_pruner_none_is_stopped(study: Study, toy: Path):
    fixed = {**settings(toy)["fixed"], "epochs": 6, "n_layers": 1}
    study(search={"learning_rate": [0.05, 1e-9]}, fixed=fixed, trials=6)
    assert {t.state.name for t in trials(toy)} == {"COMPLETE"}


def test_refused_and_diverging_settings_are_failed_trials(study: Study, toy: Path):
    """16 * 2 is no multiple of head_dim 5; a rate of 1e30 ends in infinity."""
    drawn = [{"head_dim": d, "learning_rate": r} for d in (5, 16) for r in (1e30, 0.01)]
    fixed = {k: v for k, v in settings(toy)["fixed"].items() if k != "head_dim"}
    search = {"head_dim": [5, 16], "learning_rate": [0.01, 1e30]}
    plan = {"fixed": {**fixed, "n_layers": 1}, "search": search, "trials": 4}
    enqueue(toy, drawn, **plan)
    status, out, err = study(**plan)
    assert status == 0, err
    assert [t.params for t in trials(toy)] == drawn
    assert [t.state.name for t in trials(toy)] == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert all({"seconds", "commit"} <= set(get_progress(t)) for t in trials(toy))
    assert "1 complete, 0 pruned, 3 failed" in out
    assert "trial 1 failed, --head_dim=5 --learning_rate=0.01: head_dim: 5 does not divide" in err
    assert "trial 2 failed, --head_dim=16 --learning_rate=1e+30: scores are NaN or infinite" in err
    assert "Traceback" not in err


def test_when_all_fail_there_is_no_best(study: Study, toy: Path):
    search = {"learning_rate": [1e30, 1e31]}
    status, out, err = study(fixed={**settings(toy)["fixed"], "n_layers": 1}, search=search, trials=2)
    assert status == 2 and out == ""
    last = "tune.py: error: study: no trial of 'small' is complete (0 complete, 0 pruned, 2 failed)"
    assert err.splitlines()[-1] == last
    assert [row["state"] for row in rows(toy)] == ["failed"] * 2


def test_settings_that_never_fit_end_the_study_before_it_begins(study: Study, toy: Path):
    fixed = {k: v for k, v in settings(toy)["fixed"].items() if k != "head_dim"}
    status, _, err = study(fixed=fixed, search={"head_dim": [5, 7]})
    assert status == 2 and "tune.py: error: head_dim: 5 does not divide" in err.splitlines()[-1]
    assert not (toy.parent / "runs").exists()


def test_a_metric_whose_best_is_the_smallest(study: Study, toy: Path):
    fixed = {**settings(toy)["fixed"], "metrics": ["GiniIndex"], "valid_metric": "GiniIndex@10"}
    status, out, err = study(fixed=fixed)
    assert status == 0, err
    values = [t.value for t in trials(toy)]
    assert values == [min(t.intermediate_values.values()) for t in trials(toy)]
    assert float(out.splitlines()[3].split()[1]) == pytest.approx(min(values), abs=1e-4)


def test_a_stopped_trial_is_resumed(study: Study, toy: Path, monkeypatch: pytest.MonkeyPatch):
    """SIGTERM in the second trial's first epoch; the study then ends as one that never stopped."""
    assert study(study="whole")[0] == 0
    report, calls = optuna.Trial.report, []

    def report_and_stop(trial: optuna.Trial, score: float, step: int) -> None:
        report(trial, score, step)
        calls.append(trial.number)
        if calls.count(1) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(optuna.Trial, "report", report_and_stop)
    status, out, err = study()
    assert status == 130 and out == ""
    assert err.splitlines()[-1] == "tune.py: stopped" and "Traceback" not in err
    assert [t.state.name for t in trials(toy)] == ["COMPLETE", "RUNNING"]
    monkeypatch.undo()
    assert study()[0] == 0
    assert [t.intermediate_values for t in trials(toy)] == [
        t.intermediate_values for t in trials(toy, "whole")
    ]
    assert [t.params for t in trials(toy)] == [t.params for t in trials(toy, "whole")]


def test_ctrl_c_between_two_epochs(study: Study, toy: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreparedRun, "train", interrupted)
    status, out, err = study()
    assert status == 130 and out == ""
    assert err.splitlines()[-1] == "tune.py: stopped" and "Traceback" not in err
    assert [t.state.name for t in trials(toy)] == ["RUNNING"]


def test_of_a_trial_settings_and_history_stay(study: Study, toy: Path):
    assert study(trials=1)[0] == 0
    (folder,) = (toy.parent / "runs" / "tune" / "small").glob("trial-*/*/")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "history.csv"]


def test_a_range_of_whole_numbers_draws_whole_numbers():
    drawn = optuna.create_study().ask()
    for key, how, kind in (
        ("a", {"low": 1, "high": 4}, int),
        ("b", {"low": 1, "high": 4.0}, float),
        ("c", {"low": 0, "high": 1, "step": 0.25}, float),
        ("d", {"low": 16, "high": 64, "step": 16}, int),
        ("e", {"low": 1, "high": 64, "log": True}, int),
    ):
        value = search.suggest_setting(drawn, key, how)
        assert type(value) is kind and how["low"] <= value <= how["high"]
        assert value % how.get("step", value) == 0


@pytest.mark.parametrize(
    "value", [1e-05, 0.1 + 0.2, "none", "no", "12", "a b", None, True, [1, "x"], {"a": 5}]
)
def test_an_argument_holds_its_value(value: object):
    assert parse_arguments(shlex.split(study_module.format_arguments({"key": value}))) == {"key": value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"serach": {}}, "plan.yaml: unknown key 'serach'; did you mean 'search'?"),
        ({"study": "a/b"}, "study: expected a name of letters, digits and any of ._+-, got 'a/b'"),
        ({"study": 7}, "study: expected a name"),
        ({"trials": 0}, "trials: expected a whole number from 1 to 2147483647, got 0"),
        ({"trials": True}, "trials: expected a whole number from 1 to 2147483647, got True"),
        ({"seed": -1}, "seed: expected a whole number from 0, got -1"),
        ({"fixed": ["epochs"]}, "fixed: expected lines of 'key: value', got ['epochs']"),
        ({"search": None}, "search: expected lines of 'key: value', got None"),
        ({"search": {}}, "search: expected lines of 'key: value', got {}; --help shows the format"),
        (
            {"search": {"droput_prob": [0.1]}},
            "search: unknown key 'droput_prob'; did you mean 'dropout_prob'?",
        ),
        ({"search": {"epochs": [1, 2]}}, "search: epochs is fixed too, to 2; remove one of them"),
        ({"search": {"time_order": ["exact"]}}, "search: time_order changes what is measured"),
        ({"search": {"worker": [0, 1]}}, "search: worker changes no result; fix it, or leave it out"),
        ({"search": {"n_layers": []}}, "search: n_layers: expected {low: ..., high: ...} or a list, got []"),
        ({"search": {"n_layers": 3}}, "search: n_layers: expected {low: ..., high: ...} or a list, got 3"),
        ({"search": {"n_layers": [[1]]}}, "search: n_layers: expected a list of numbers, words"),
        ({"search": {"n_layers": {"low": 1}}}, "search: n_layers: high is missing"),
        (
            {"search": {"n_layers": {"low": "a", "high": 2}}},
            "search: n_layers: low: expected a number, got 'a'",
        ),
        ({"search": {"n_layers": {"low": 4, "high": 1}}}, "search: n_layers: low 4 is above high 1"),
        ({"search": {"n_layers": {"low": 1, "high": float("inf")}}}, "high: expected a number, got inf"),
        (
            {"search": {"n_layers": {"low": 1, "high": 4, "steps": 1}}},
            "search: n_layers: unknown key 'steps'",
        ),
        (
            {"search": {"n_layers": {"low": 1, "high": 4, "step": 0}}},
            "step: expected a number above 0, got 0",
        ),
        (
            {"search": {"learning_rate": {"low": 0, "high": 1, "log": True}}},
            "search: learning_rate: log needs low above 0, got 0",
        ),
        (
            {"search": {"learning_rate": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}},
            "search: learning_rate: log: true and step exclude each other",
        ),
        (
            {"pruner": {"warmup": 1}},
            "pruner: unknown key 'warmup'; did you mean 'warmup_epochs'?",
        ),
        ({"pruner": {"warmup_epochs": -1}}, "pruner: warmup_epochs: expected a whole number from 0, got -1"),
        ({"fixed": {"learning_rat": 1}}, "unknown key 'learning_rat'; did you mean"),
        ({"fixed": {"dataset": "gone", "gpu_id": ""}}, "dataset: 'gone' not found: there is no "),
        ({"fixed": {"hidden_size": "x"}}, "hidden_size: expected a whole number from 1"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(study: Study, toy: Path, change: dict[str, Any], message: str):
    status, out, err = study(**change)
    assert status == 2 and out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("tune.py: error: ") and message in last
    assert not (toy.parent / "plan.csv").exists() and not (toy.parent / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one FILE.yaml, got none"),
        (["a.yaml", "b.yaml"], "expected one FILE.yaml, got a.yaml b.yaml"),
        (["a.csv"], "expected one FILE.yaml, got a.csv"),
        (["gone.yaml"], "config file 'gone.yaml' can't be read: No such file"),
        (["gone.yaml", "--trials"], "argument '--trials': expected --key=value"),
    ],
)
def test_a_mistake_on_the_command_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert tune.main(arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_file_lacks_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.yaml").write_text("")
    assert tune.main([str(tmp_path / "empty.yaml")]) == 2
    assert "empty.yaml: study is missing; --help shows the format" in capsys.readouterr().err


def test_the_command_line_is_stronger_than_fixed(study: Study, toy: Path):
    status, out, _ = study("--trials=1", "--epochs=1")
    assert status == 0 and get_progress(trials(toy)[0])["trained_epochs"] == 1
    assert "--epochs=1" in shlex.split(out.splitlines()[-1])
    assert "learning_rate is fixed too, to 1" in study("--learning_rate=1")[2]


def test_a_study_keeps_its_settings(study: Study, toy: Path):
    study(trials=1)
    status, _, err = study("--epochs=1", trials=2)
    assert status == 2
    assert "study: 'small' was started with epochs: 2, not 1; name another study" in err.splitlines()[-1]
    assert study(trials=2, search={"learning_rate": [0.1], "n_layers": [1]})[0] == 2
    assert len(trials(toy)) == 1


@pytest.mark.parametrize("content", ["hello\n", "[]\n", '{"a": 1}\n'])
def test_a_file_that_is_no_study(study: Study, toy: Path, content: str):
    path = toy.parent / "runs" / "tune" / "small.log"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    status, _, err = study()
    assert status == 2 and "Traceback" not in err
    assert f"{path} is not an Optuna study (" in err.splitlines()[-1]


def test_data_without_validation_rows(study: Study, toy: Path):
    write_inter(toy, "toy", [(f"u{u}", f"i{(u + k) % 12}", k) for u in range(12) for k in range(3)])
    status, _, err = study()
    assert status == 2 and "dataset: 'toy' has no validation rows" in err.splitlines()[-1]


def test_the_shipped_example_is_one(tmp_path: Path):
    plan = SearchPlan.read(ROOT / "results" / "tune" / "ml-100k.yaml", {}, collect_known_keys())
    assert plan.study == "m2rec-ml-100k" and plan.trials == 30
    config = build_config({**plan.fixed, "gpu_id": ""}, find_config_file())
    assert set(plan.search) <= set(config.final_config_dict)


def test_without_optuna_the_install_line_is_shown():
    code = (
        "import sys\n"
        "sys.modules['optuna'] = None\n"
        "from scripts import tune\n"
        "sys.exit(tune.main(['a.yaml']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert 'pip install -c constraints.txt -e ".[tune]"' in done.stderr


def test_help_shows_the_format(capsys: pytest.CaptureFixture[str]):
    assert tune.main(["--help"]) == 0
    assert "warmup_epochs" in capsys.readouterr().out
