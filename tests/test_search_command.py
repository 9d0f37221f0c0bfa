"""run_mm.py --search on tiny data: real runs in real workers, from the command to the run of the best."""

import csv
import io
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import as_arguments, random_rows, small, write_inter

pytest.importorskip("optuna")

import optuna

import run_mm
from m2rec.commands import search as search_command
from m2rec.commands import search_setup
from m2rec.commands.search_setup import SearchSetup, plan_search
from m2rec.experiments.search import SearchTask, enqueue_profiles
from m2rec.experiments.search_budget import Budget
from m2rec.experiments.search_pool import SearchPool
from m2rec.experiments.search_space import SpaceAround
from m2rec.experiments.search_view import SearchView
from m2rec.experiments.study import PROGRESS_KEY, TRIAL_STATES, get_progress, make_halving_pruner, open_study
from m2rec.settings import SCALE_FREE_KEYS, Role, collect_keys, override_settings
from m2rec.storage import lock_path
from m2rec.training import automatic_settings
from m2rec.training.configuration import build_config, resolve_settings
from m2rec.training.data_cache import DataCache
from m2rec.training.run import load_data, prepare_run
from m2rec.yaml_values import format_value
from tests.test_search import PLAIN, RULES_HERE

ROOT = Path(__file__).parent.parent
KEYS = {"epochs": 4, "text_vectors": "none", "mixer": "attention", "filter": "none"}
Call = Callable[..., tuple[int, str, str]]


def arguments(folder: Path, search: object = 7, **others: object) -> list[str]:
    keys = small(folder / "data", **{**KEYS, "runs_dir": str(folder / "runs"), **others})
    return [*as_arguments(keys), f"--search={search}"]


def read_study(folder: Path) -> optuna.Study:
    (path,) = (folder / "runs" / "search").glob("*.log")
    return open_study(path.with_suffix(""), True, None)


def results(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (t.user_attrs["origin"], t.state.name, t.user_attrs["settings"], t.intermediate_values)
        for t in read_study(folder).trials
    ]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A folder with a search that has ended, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    write_inter(folder / "data", "toy", random_rows())
    root, out, err = logging.getLogger(), io.StringIO(), io.StringIO()
    handlers = list(root.handlers)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("OMP_NUM_THREADS", "1")
        status = run_mm.main(arguments(folder))
    root.handlers[:] = handlers  # that of the command writes to `err`
    assert status == 0, err.getvalue()
    return folder, out.getvalue().splitlines(), err.getvalue().splitlines()


def test_a_search_ends_with_the_run_of_the_best(searched: tuple[Path, list[str], list[str]]):
    folder, out, err = searched
    run = Path(out[-1])
    assert [path for path in (folder / "runs").iterdir() if path.name != "search"] == [run]
    metrics = json.loads((run / "metrics.json").read_text())
    study = read_study(folder)
    scores = {t.number: max(t.intermediate_values.values()) for t in study.trials}
    winner = study.trials[max(scores, key=lambda number: (scores[number], -number))]
    assert metrics["valid"]["ndcg@10"] == scores[winner.number]
    assert metrics["test"] and metrics["parameters"] == get_progress(winner)["parameters"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    settings = winner.user_attrs["settings"]
    assert {key: settings[key] for key in settings if key not in SCALE_FREE_KEYS}.items() <= config.items()
    assert config["auto"] is False and "search" not in config and not any(map(config.get, SCALE_FREE_KEYS))
    line = (run / "config.yaml").read_text().splitlines()[1]
    assert line.startswith(f"# settings of trial {winner.number} of {folder}/runs/search/M2Rec-toy-")
    assert "python run_mm.py" in line and "--search=7" in line
    assert out[1] == f"{sum(t.state.name == 'COMPLETE' for t in study.trials)} complete, " + ", ".join(
        [f"{sum(t.state.name == 'PRUNED' for t in study.trials)} pruned", "0 failed; on validation:"]
    )
    assert f"trial {winner.number} wins: " in "\n".join(out)
    assert len(study.trials) == 7 and any("race, round 1" in line for line in err)


def test_keys_of_the_user_stay(searched: tuple[Path, list[str], list[str]]):
    folder, _, err = searched
    for trial in read_study(folder).trials:
        assert not {*KEYS, "hidden_size", "n_layers", "inner_size"} & set(trial.user_attrs["settings"])
    (line,) = [line for line in err if "these keys stay as you set them: " in line]
    assert {"MAX_ITEM_LIST_LENGTH", "filter", "hidden_size"} <= set(line.rpartition(": ")[2].split(", "))


def test_the_table_of_trials_has_every_key_in_which_they_differ(searched: tuple[Path, list[str], list[str]]):
    """Those without a range, too, such as init; where a trial leaves a key, the plain run's value."""
    folder, _, _ = searched
    with next((folder / "runs" / "search").glob("*/trials.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    trials = read_study(folder).trials
    assert [row["state"] for row in rows] == [TRIAL_STATES[trial.state.name] for trial in trials]
    varied = {key for trial in trials for key in trial.user_attrs["settings"]}
    scaled = {"decay_per_epoch", "targets_per_step", "patience_targets"}
    assert {"learning_rate", "init", "learner", *scaled} <= varied <= set(rows[0])
    plain = {key for key in varied if key not in SCALE_FREE_KEYS}
    for row, trial in zip(rows, trials, strict=True):
        config = yaml.safe_load(
            next((folder / "runs" / "search").glob(f"*/trial-{trial.number:04}/*/config.yaml")).read_text()
        )
        assert {key: row[key] for key in plain} == {key: format_value(config[key]) for key in plain}
        settings = trial.user_attrs["settings"]
        for key in scaled & set(settings):
            assert row[key] == format_value(settings[key])
        assert int(row["patience_targets"]) > 0, "where a trial leaves the key, that of the plain run"


def test_no_test_row_is_scored_by_a_trial(searched: tuple[Path, list[str], list[str]]):
    folder, _, _ = searched
    left = {path.name for path in (folder / "runs" / "search").rglob("*") if path.is_file()}
    assert {"config.yaml", "history.csv", "trials.csv", "worker-1.log"} == left - {
        next((folder / "runs" / "search").glob("*.log")).name
    }
    header = next((folder / "runs" / "search").rglob("history.csv")).read_text().splitlines()[0]
    assert "valid.ndcg@10" in header and "test" not in header


def test_the_same_command_again_makes_nothing_anew(
    searched: tuple[Path, list[str], list[str]], capsys: pytest.CaptureFixture[str]
):
    folder, out, _ = searched
    before = results(folder)
    assert run_mm.main(arguments(folder)) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == out[-1] and f"its run was made before: {out[-1]}" in captured.out
    assert results(folder) == before


def test_a_second_command_at_the_same_time_is_refused(
    searched: tuple[Path, list[str], list[str]], capsys: pytest.CaptureFixture[str]
):
    folder, _, _ = searched
    (path,) = (folder / "runs" / "search").glob("M2Rec-toy-*/")
    with lock_path(path):
        assert run_mm.main(arguments(folder)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"run_mm.py: error: search: another process is at work in {path}")


def test_changed_data_are_refused(
    searched: tuple[Path, list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(searched[0] / "runs", tmp_path / "runs")
    write_inter(tmp_path / "data", "toy", random_rows(seed=1))
    assert run_mm.main(arguments(tmp_path)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "search: the data set has changed since this search was started; move " in last


def wait_for_trials(folder: Path, n_ended: int) -> None:
    deadline, size = time.monotonic() + 120, 0
    while time.monotonic() < deadline:
        time.sleep(0.05)
        sizes = [path.stat().st_size for path in (folder / "runs" / "search").glob("*.log")]
        if sizes and sizes[0] != size:  # else there is nothing new in it
            size = sizes[0]
            ended = [t for t in read_study(folder).trials if t.state.is_finished()]
            if len(ended) >= n_ended:
                return
    raise AssertionError("the search did not get on")


def test_a_stopped_and_killed_search_ends_as_one_that_was_not(
    searched: tuple[Path, list[str], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C, then kill -9, then to the end."""
    shutil.copytree(searched[0] / "data", tmp_path / "data")

    def interrupt() -> None:
        wait_for_trials(tmp_path, 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert run_mm.main(arguments(tmp_path)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("run_mm.py: stopped; resume with: python run_mm.py --")
    assert " --dataset=toy " in last and last.endswith("--search=7")
    process = get_context("fork").Process(target=run_mm.main, args=(arguments(tmp_path),))
    process.start()
    wait_for_trials(tmp_path, 4)
    process.kill()
    process.join()
    assert run_mm.main(arguments(tmp_path)) == 0
    assert "search: resumed with" in capsys.readouterr().err
    assert results(tmp_path) == results(searched[0])


def test_a_resumed_search_says_what_is_unfinished(tmp_path: Path):
    """A trial that was stopped on its way is none of the three ends."""
    study, _ = make_study(tmp_path)
    assert search_command._describe_start(study) == "new"
    for _ in range(2):
        study.ask().set_user_attr("progress", {"trained_epochs": 1, "seconds": 3.0, "paused": True})
    study.tell(1, state=optuna.trial.TrialState.PRUNED)
    expected = "resumed with 0 complete, 1 pruned, 0 failed, 1 unfinished"
    assert search_command._describe_start(study) == expected


def test_a_winner_that_never_met_the_end_of_the_plain_run_is_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("WARNING")
    task = SearchTask(tmp_path / "one", {}, SpaceAround(RULES_HERE), PLAIN)
    study = open_study(task.folder, True, None)
    enqueue_profiles(study, {"plain": {}, "fast": {"learning_rate": 0.04}}, task)
    plain, fast = study.ask(), study.ask()
    plain.set_user_attr(PROGRESS_KEY, {"trained_epochs": 3})
    study.tell(fast, 0.5)
    search_command._warn_of_plain_run(study, winner=plain.number)
    assert not caplog.messages
    search_command._warn_of_plain_run(study, winner=fast.number)
    (message,) = caplog.messages
    assert message.startswith("the plain run was trained for 3 epochs only")
    study.tell(plain, 0.4)
    search_command._warn_of_plain_run(study, winner=fast.number)
    assert len(caplog.messages) == 1


def test_too_short_a_time_says_what_it_managed(toy: Path, capsys: pytest.CaptureFixture[str]):
    assert run_mm.main(arguments(toy.parent, search="0.1s")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "search: 0s did not suffice to compare the " in last and "no epoch was finished" in last


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--search=0"], "search: expected a time such as 30m, 2h or 1h30m, or a number of trials"),
        (["--search=abc"], "got 'abc'"),
        (["--search=-3"], "got '-3'"),
        (["--search="], "got ''"),
        (["--search=2", "--resume=runs/x"], "resume: 'runs/x': it takes its keys from the run, not --"),
        (["--search=2", "--learning_rat=1"], "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (
            ["--search=2", "--model=Popularity"],
            "search: Popularity always has epochs: 1, nothing can be searched",
        ),
        (["--search=2", "--dataset=gone"], "dataset: 'gone' not found"),
        (
            [
                *("--search=2", "--model=GRU4Rec", "--learning_rate=0.1", "--train_batch_size=8"),
                *("--dropout_prob=0.1", "--hidden_size=8", "--embedding_size=8"),
            ],
            "search: GRU4Rec has no key to search that you have not set yourself",
        ),
    ],
)
def test_mistakes(toy: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    keys = {"dataset": "toy", "data_path": toy, "runs_dir": toy.parent / "runs", "gpu_id": ""}
    assert run_mm.main([*as_arguments(keys), *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1] and "Traceback" not in captured.err and not captured.out
    assert not (toy.parent / "runs").exists()


def test_not_under_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_mm.main(["--search=2"]) == 2
    assert "search: it starts its own processes; run it without torchrun" in capsys.readouterr().err


def test_without_optuna_the_install_line_comes_first():
    code = (
        "import sys\nsys.modules['optuna'] = None\nimport run_mm\n"
        "status = run_mm.main(['--search=2', '--dataset=gone'])\n"
        "print('torch' in sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr.splitlines() == [
        'run_mm.py: error: Optuna is missing: pip install -c constraints.txt -e ".[tune]"'
    ]


# what is tried


def plan(toy: Path, **others: object) -> Any:
    given = {"dataset": "toy", "data_path": str(toy), "runs_dir": str(toy.parent), "gpu_id": "", **others}
    return plan_search(given, Budget(trials=50))


def load_trial(setup: SearchSetup, settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """What a trial is trained with, and its number of rows."""
    config = build_config(override_settings(setup.base, settings))
    _, loaders = load_data(config)
    return resolve_settings(config), len(loaders.train.dataset)


def write_rare_items(toy: Path) -> None:
    write_inter(toy, "toy", random_rows(n_users=2_100, n_items=700, longest=6))


def test_profiles_are_scaled_as_the_rule_scales_them(toy: Path):
    """To steps of 500 targets, the fewest, and a patience of 260 of them."""
    setup = plan(toy, auto=False)
    names = ["plain", "rare items", "rare items with text", "much data", "small data", "S6", "no filter"]
    assert list(setup.profiles) == names, "defaults, learnable gate and long histories are as plain"
    assert setup.profiles["plain"] == {}
    rare, much = setup.profiles["rare items"], setup.profiles["much data"]
    assert (rare["hidden_size"], rare["learner"], rare["decay_per_epoch"]) == (128, "adamw", 0.16)
    assert (rare["targets_per_step"], rare["average_targets"]) == (500, 130 * 500)
    assert much["patience_targets"] == 260 * 500
    assert not {*SCALE_FREE_KEYS.values()} & {key for profile in setup.profiles.values() for key in profile}


def test_the_defaults_race_against_the_rule(toy: Path):
    """And the rule's own profile, which is the plain run, does not race again."""
    write_rare_items(toy)
    setup = plan(toy)
    assert setup.task.plain["hidden_size"] == 128 and "rare items" not in setup.profiles
    found, _ = load_trial(setup, setup.profiles["defaults"])
    fixed = build_config({"dataset": "toy", "data_path": str(toy), "auto": False, "gpu_id": ""})
    keys = collect_keys(Role.MODEL, Role.TRAINING, Role.LENGTH) - {"neighbors", "exclude_seen", "n_negatives"}
    assert {key: found[key] for key in keys & found.keys()} == {
        key: fixed[key] for key in keys & found.keys()
    }
    assert found["neighbors"] is True


@pytest.mark.parametrize("drawn", [{"learning_rate": 0.008}, {"targets_per_step": 2_000}])
def test_a_drawn_trial_keeps_the_share_of_the_weights(toy: Path, drawn: dict[str, Any]):
    """Whatever its learning rate and its steps."""
    write_rare_items(toy)
    setup = plan(toy)
    config, n_rows = load_trial(setup, {**setup.task.carried, **drawn})
    n_steps = math.ceil(n_rows / config["train_batch_size"])
    left = (1 - config["learning_rate"] * config["weight_decay"]) ** n_steps
    share = setup.task.carried["decay_per_epoch"]
    assert 1 - left == pytest.approx(share, rel=1e-3) and share > 0
    assert config["weight_decay"] != setup.base["weight_decay"]


def test_scale_free_keys_of_the_user_hold_in_all_trials(toy: Path):
    """The share and the targets, whatever a profile changes and whatever is drawn."""
    write_rare_items(toy)
    setup = plan(toy, decay_per_epoch=0.1, targets_per_step=300)
    searched = set(setup.task.space.make_ranges(setup.task.plain))
    assert not searched & {"decay_per_epoch", "weight_decay", "targets_per_step", "train_batch_size"}
    settings = [{**setup.task.carried, "learning_rate": 0.008}, *setup.profiles.values()]
    for changes in settings:
        config, n_rows = load_trial(setup, changes)
        n_steps = math.ceil(n_rows / config["train_batch_size"])
        left = (1 - config["learning_rate"] * config["weight_decay"]) ** n_steps
        assert 1 - left == pytest.approx(0.1, rel=1e-3)
        assert config["train_batch_size"] * 2_800 / n_rows == pytest.approx(300, rel=0.01)


@pytest.mark.parametrize(
    ("min_items", "max_scores", "given", "drawn", "plain"),
    [
        (21, 10**9, {}, None, ("CE", 512)),
        (20, 10**9, {}, ["CE", "sampled"], ("CE", 1_024)),
        (20, 10**9, {"n_negatives": 7}, ["CE", "sampled"], ("CE", 7)),
        (20, 10**9, {"loss_type": "CE"}, None, ("CE", 512)),
        (20, 10, {}, None, ("sampled", 1_024)),
        (20, 10, {"auto": False}, None, ("CE", 512)),
    ],
)
def test_the_loss_is_drawn_where_both_make_sense(
    toy: Path,
    monkeypatch: pytest.MonkeyPatch,
    min_items: int,
    max_scores: int,
    given: dict[str, Any],
    drawn: list[str] | None,
    plain: tuple[str, int],
):
    """Of 20 items."""
    monkeypatch.setattr(automatic_settings, "MIN_ITEMS_TO_SAMPLE", min_items)
    monkeypatch.setattr(automatic_settings, "MAX_SOFTMAX_SCORES", max_scores)
    setup = plan(toy, **given)
    assert setup.task.space.make_ranges(setup.task.plain).get("loss_type") == drawn
    assert (setup.task.fixed["loss_type"], setup.task.fixed["n_negatives"]) == plain
    assert not any({"loss_type", "n_negatives"} & set(profile) for profile in setup.profiles.values())


def test_longer_histories_are_tried_where_there_are_any(toy: Path):
    rows = [("u", f"i{k % 9}", k) for k in range(300)] + [("v", f"i{k % 9}", k) for k in range(300)]
    write_inter(toy, "long", rows)
    setup = plan(toy, dataset="long", auto=False)
    long = setup.profiles["long histories"]
    assert long == {"MAX_ITEM_LIST_LENGTH": 200, **setup.task.carried}
    config, n_rows = load_trial(setup, long)
    assert n_rows == 4 and config["train_batch_size"] == 4, "an epoch is one step, as with 12 rows"
    assert setup.task.space.make_ranges(setup.task.plain)["MAX_ITEM_LIST_LENGTH"] == [50, 200]


def test_the_plain_run_is_what_the_data_say(toy: Path):
    """`auto` is settled before the search, so that a trial differs from it in its own keys alone."""
    setup = plan(toy)
    assert setup.task.plain["train_batch_size"] != 64 and setup.base["auto"] is False
    for key in ("train_batch_size", "stopping_step", "MAX_ITEM_LIST_LENGTH"):
        assert setup.task.fixed[key] == setup.task.plain[key]
    assert setup.profiles["plain"] == {} and not any(map(setup.task.fixed.get, SCALE_FREE_KEYS))


def test_a_profile_gives_way_to_the_user(toy: Path):
    setup = plan(toy, learning_rate=0.1, train_batch_size=8, filter="causal", gate="softmax")
    profiles, decided = setup.profiles, {"learning_rate", "train_batch_size", "filter", "gate"}
    for profile in (*profiles.values(), setup.task.carried, setup.task.space.rules):
        assert not {*decided, "targets_per_step"} & set(profile)
    assert not {"no filter", "learnable gate"} & set(profiles)  # nothing is left of them


def test_a_profile_that_does_not_fit_is_left_out(
    toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    monkeypatch.setitem(search_setup.VARIATIONS, "wide", {"hidden_size": 70})
    assert "wide" not in plan(toy).profiles
    assert (
        "search: profile wide is left out: head_dim: 64 does not divide expand * hidden_size" in caplog.text
    )


def test_another_learner_has_no_decay(toy: Path):
    """As for the rule: it would be an L2 term."""
    for name, profile in plan(toy, auto=False, learner="sgd").profiles.items():
        assert not {"learner", "weight_decay", "decay_per_epoch"} & set(profile), name


def test_other_models_keep_what_the_user_set_in_targets(toy: Path):
    space = plan(toy, model="SASRec", targets_per_step=40).task.space
    assert "learning_rate" in space.rules and "train_batch_size" not in space.rules
    assert "train_batch_size" in plan(toy, model="SASRec").task.space.rules


def test_other_keys_are_another_search(toy: Path):
    folder = plan(toy).task.folder
    assert plan(toy, eval_batch_size=7).task.folder == folder != plan(toy, epochs=3).task.folder


def test_data_are_loaded_once(toy: Path):
    """A run on kept data gives the digits of one that loads them."""

    def train(cache: DataCache, **others: object) -> dict[int, float]:
        config = build_config(small(toy, runs_dir=str(toy.parent / "runs"), text_vectors="none", **others))
        run = prepare_run(config, load=cache.load)
        run.train()
        losses: dict[int, float] = run.trainer.train_loss_dict
        return losses

    kept, changes = DataCache(), ({}, {"hidden_size": 32, "train_batch_size": 7}, {"learning_rate": 0.01})
    losses = [train(kept, **change) for change in changes]
    assert kept.n_loaded == 1
    assert losses == [train(DataCache(), **change) for change in changes]
    train(kept, MAX_ITEM_LIST_LENGTH=5, epochs=1)
    assert kept.n_loaded == 2


# workers and what is shown


class Screen:
    """A terminal that understands what the view writes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        if text.startswith("\x1b["):
            n, rest = text.removeprefix("\x1b[").split("A", 1)
            assert rest == "\x1b[J"
            del self.lines[len(self.lines) - int(n) :]
        else:
            self.lines += text.splitlines()

    def flush(self) -> None:
        pass


def make_study(tmp_path: Path) -> tuple[optuna.Study, SearchTask]:
    task = SearchTask(tmp_path / "searches" / "one", {}, SpaceAround(RULES_HERE), PLAIN, 2)
    study = open_study(task.folder, True, make_halving_pruner(2))
    task.folder.mkdir(parents=True)
    enqueue_profiles(study, {"plain": {}, "quick": {"learning_rate": 0.01}}, task)
    return study, task


def test_the_live_table_is_drawn_in_place(tmp_path: Path):
    study, task = make_study(tmp_path)
    screen = Screen()
    view = SearchView(screen, True, task, Budget(seconds=600), "NDCG@10")  # type: ignore[arg-type]
    view.update(study, 1)
    first, second = study.ask(), study.ask()
    for trial, score in ((first, 0.125), (second, 0.25)):
        trial.set_user_attr("progress", {"trained_epochs": 1, "seconds": 3.0, "paused": trial is second})
        trial.report(score, 1)
    view.update(study, 75)
    study.tell(first, state=optuna.trial.TrialState.PRUNED)
    view.update(study, 80)
    assert [line.split() for line in screen.lines[:3]] == [
        ["trial", "state", "epochs", "NDCG@10", "seconds", "from", "settings"],
        ["1", "paused", "1", "0.2500", "3", "quick", "learning_rate", "0.01"],
        ["0", "pruned", "1", "0.1250", "3", "plain"],
    ]
    assert screen.lines[3:] == [
        "search, 1m 20s of 10m: best 0.2500; 0 complete, 1 pruned, 0 failed, 1 running"
    ]


@pytest.mark.parametrize(
    ("height", "n_shown"), [(24, 12), (15, 12), (14, 10), (9, 5), (5, 1), (4, 0), (3, 0), (1, 0)]
)
def test_the_live_table_fits_into_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, height: int, n_shown: int
):
    """With twelve workers; the last line is the status, and one is left for the cursor."""
    study, task = make_study(tmp_path)
    for _ in range(12):
        study.ask()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", str(height))
    screen = Screen()
    view = SearchView(screen, True, task, Budget(trials=2), "NDCG@10")  # type: ignore[arg-type]
    for seconds in (1, 2):
        view.update(study, seconds)
    shown = [line for line in screen.lines if line.split()[0].isdigit() and line.split()[1] == "running"]
    assert len(shown) == n_shown and len(screen.lines) <= max(1, height - 1)
    assert screen.lines[-1].startswith("search, 2s of 2 trials: ")
    note = f"{12 - n_shown} more trials, not shown: the terminal has {height - 1} lines"
    assert (note in screen.lines) == (n_shown < 12 and height > 2)


@pytest.fixture
def start_process() -> Iterator[Callable[[str], Any]]:
    """Start Python with this code; looks as multiprocessing's processes do."""
    processes = []

    class Process(subprocess.Popen):  # type: ignore[type-arg]
        @property
        def exitcode(self) -> int | None:
            return self.poll()

        def join(self, timeout: float | None = None) -> None:
            self.wait(timeout)

    def start(code: str) -> Any:
        processes.append(Process([sys.executable, "-c", code]))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("seconds", [0.1, 0.9])
def test_a_killed_worker_costs_its_trial_only(
    tmp_path: Path, start_process: Callable[[str], Any], caplog: pytest.LogCaptureFixture, seconds: float
):
    """As by the kernel when memory runs out; the trial of the other worker is not touched."""
    study, task = make_study(tmp_path)
    trials = [study.ask(), study.ask()]

    def start(index: int) -> Any:
        kill = f"import os, time\ntime.sleep({seconds})\nos.kill(os.getpid(), 9)"
        process = start_process(kill if index == 0 else "import time\ntime.sleep(2)")
        trials[index].set_user_attr("progress", {"worker": process.pid, "paused": False, "seconds": 0.0})
        return process

    view = SearchView(sys.stderr, False, task, Budget(trials=2), "NDCG@10")
    SearchPool(study, task, start, 2, view).run()
    assert [t.state.name for t in study.trials] == ["FAIL", "RUNNING"]
    reason = "its process was ended by signal 9 (the memory may have run out)"
    assert f"worker 1: {reason}; 1 left" in caplog.text
    assert caplog.text.count(f"trial 0 (plain) failed: {reason}") == 1


def test_a_worker_that_always_fails_ends_the_search(tmp_path: Path, start_process: Callable[[str], Any]):
    study, task = make_study(tmp_path)
    (task.folder / "worker-1.log").write_text("Traceback\nRuntimeError: no such thing\n")
    view = SearchView(sys.stderr, False, task, Budget(trials=2), "NDCG@10")
    with pytest.raises(ValueError, match="worker 1 ended 5 times: its process failed: RuntimeError: no such"):
        SearchPool(study, task, lambda index: start_process("import sys; sys.exit(1)"), 1, view).run()
