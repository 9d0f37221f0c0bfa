"""The engine of a search, with a training that is a formula: the race, the draws, the end, failures."""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from threading import Barrier, Thread
from time import sleep
from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna

from m2rec.errors import UserError
from m2rec.experiments import search, search_budget
from m2rec.experiments.race import Runner, judge_race
from m2rec.experiments.search import (
    SearchTask,
    Watch,
    enqueue_profiles,
    estimate_final_seconds,
    find_best_trial,
    find_first_epochs,
    judge_profiles,
    run_trials,
)
from m2rec.experiments.search_budget import (
    Budget,
    Deadline,
    RunLength,
    estimate_run_seconds,
    format_duration,
    parse_budget,
)
from m2rec.experiments.search_space import (
    GENERAL_RULES,
    RULES,
    Choices,
    Factor,
    SpaceAround,
    Steps,
    Width,
    build_space,
)
from m2rec.experiments.study import check_same_settings, get_progress, make_halving_pruner, open_study

Settings = dict[str, Any]
PLAIN: Settings = {"learning_rate": 0.001, "dropout_prob": 0.4, "mixer": "mamba2", "weight_decay": 0.0}
RULES_HERE = {
    "learning_rate": Factor(4, high=0.05),
    "dropout_prob": Steps(0.1, 2, low=0.0, high=0.8),
    "weight_decay": Factor(4, high=10.0),
    "mixer": Choices(("mamba2", "mamba")),
}
PROFILES = {
    "plain": {},
    "slow": {"learning_rate": 0.0001},
    "good": {"learning_rate": 0.004, "weight_decay": 1.0},
    "fast": {"learning_rate": 0.04},
}


@dataclass
class Formula:
    """A training whose score rises towards a height that its settings decide."""

    epochs: int = 12
    trained: list[tuple[Settings, int]] = field(default_factory=list)
    """Settings and epoch, in order."""
    before_epoch: Callable[[Settings, int], None] = lambda settings, epoch: None

    def __call__(self, settings: Settings, folder: Path, watch: Watch, notes: Settings) -> float | None:
        state = folder / "run" / "checkpoint.safetensors"
        state.parent.mkdir(exist_ok=True)
        start = int(state.read_text()) if state.exists() else 0
        best = 0.0
        for epoch in range(self.epochs):
            best = self.height(settings) * (1 - 0.5 ** (epoch + 1))
            if epoch < start:
                continue
            self.before_epoch(settings, epoch)
            self.trained.append((settings, epoch))
            state.write_text(str(epoch + 1))
            notes.update(trained_epochs=epoch + 1, best_epoch=epoch, parameters=1)
            if watch(epoch, best):
                return None
        return best

    @staticmethod
    def height(settings: Settings) -> float:
        """Highest at learning_rate 0.006, dropout_prob 0.2 and mixer mamba."""
        values = {**PLAIN, **settings}
        ratio = max(values["learning_rate"] / 0.006, 0.006 / values["learning_rate"])
        height = 1 / ratio - abs(values["dropout_prob"] - 0.2) / 4
        return height + 0.1 * (values["mixer"] == "mamba") + 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The only number is the time that a search sees, in seconds."""
    clock = [0.0]
    monkeypatch.setattr(search_budget, "time", lambda: clock[0])
    monkeypatch.setattr(search, "perf_counter", lambda: clock[0])
    return clock


def make_task(tmp_path: Path, trials: int | None = 12, **others: Any) -> SearchTask:
    folder = tmp_path / "searches" / "one"
    task = SearchTask(folder, {"epochs": 12}, SpaceAround(RULES_HERE), PLAIN, trials, startup_trials=4)
    return replace(task, first_epochs=2, plain={**PLAIN, "epochs": 12, "stopping_step": 3}, **others)


def start(task: SearchTask, profiles: Mapping[str, Settings] = PROFILES) -> optuna.Study:
    study = open_study(task.folder, True, make_halving_pruner(task.first_epochs))
    enqueue_profiles(study, profiles, task)
    return study


def results(study: optuna.Study) -> list[tuple[str, str, Settings]]:
    return [(t.user_attrs["origin"], t.state.name, t.user_attrs["settings"]) for t in study.trials]


def test_the_race_is_won_by_the_best_profile(tmp_path: Path):
    task, train = make_task(tmp_path, trials=4), Formula()
    study = start(task)
    run_trials(study, task, train)
    states = {origin: state for origin, state, _ in results(study)}
    assert states == {"plain": "COMPLETE", "slow": "PRUNED", "good": "COMPLETE", "fast": "PRUNED"}
    assert find_best_trial(study).user_attrs["origin"] == "good"
    # all have two epochs before any has three, the better two four before one has five, and none is repeated;
    # the plain run, which is one of them, is trained to its end, too
    epochs = [
        (settings["learning_rate"] if "learning_rate" in settings else 0.001, epoch)
        for settings, epoch in train.trained
    ]
    assert len(set(epochs)) == len(epochs) == 4 * 2 + 2 * 2 + 2 * 8
    assert max(epoch for _, epoch in epochs[:8]) == 1 and max(epoch for _, epoch in epochs[:12]) == 3
    assert {rate for rate, _ in epochs[12:20]} == {0.001} and {rate for rate, _ in epochs[20:]} == {0.004}


def test_a_plain_run_that_learns_slowly_is_not_overlooked(tmp_path: Path):
    """It is the last after each round, and the best at its end."""

    class SlowPlain(Formula):
        def __call__(self, settings: Settings, folder: Path, watch: Watch, notes: Settings) -> float | None:
            if set(settings) - {"epochs"}:
                return super().__call__(settings, folder, watch, notes)
            scores = [0.1] * (self.epochs - 1) + [9.0]
            best = super().__call__(settings, folder, lambda epoch, _: watch(epoch, scores[epoch]), notes)
            return None if best is None else scores[-1]

    task = make_task(tmp_path, trials=4)
    study = start(task)
    run_trials(study, task, SlowPlain())
    assert find_best_trial(study).user_attrs["origin"] == "plain"
    assert [state for _, state, _ in results(study)].count("COMPLETE") == 2


def test_a_search_goes_around_the_best(tmp_path: Path):
    task = make_task(tmp_path, trials=30)
    study = start(task)
    run_trials(study, task, Formula())
    assert len(study.trials) == 30
    drawn = study.trials[4:]
    assert all(
        t.user_attrs["settings"].get("weight_decay", 0) > 0 for t in drawn
    )  # of the winner, not of plain
    full = [{**PLAIN, **t.user_attrs["settings"]} for t in study.trials]
    assert all(full.count(one) == 1 for one in full)
    best = find_best_trial(study)
    assert best.number >= 4 and best.value > max(t.value for t in study.trials[:4]) + 0.1
    assert best.user_attrs["settings"]["mixer"] == "mamba"
    pruned = [t for t in drawn if t.state.name == "PRUNED"]
    assert len(pruned) > 5 and all(get_progress(t)["trained_epochs"] < 12 for t in pruned)
    for trial in drawn:  # a third of the keys change, and each value is in the range around its origin
        origin = study.trials[int(trial.user_attrs["origin"].split()[1])]
        before = {**PLAIN, **origin.user_attrs["settings"]}
        after = {**PLAIN, **trial.user_attrs["settings"]}
        assert before != after
        assert before["learning_rate"] / 4.01 < after["learning_rate"] < before["learning_rate"] * 4.01
        assert abs(before["dropout_prob"] - after["dropout_prob"]) < 0.21


def test_a_drawn_trial_carries_what_must_not_change(tmp_path: Path):
    """Unless its origin says otherwise, or it is drawn itself."""
    task = make_task(tmp_path, trials=5, carried={"weight_decay": 0.5, "n_layers": 3})
    study = start(task)
    run_trials(study, task, Formula())
    assert [set(t.user_attrs["settings"]) for t in study.trials[:4]] == [set(p) for p in PROFILES.values()]
    settings = study.trials[4].user_attrs["settings"]
    assert settings["n_layers"] == 3 and settings["weight_decay"] != 0.5, "its origin has 1.0"


class Killed(BaseException):
    """As kill -9: nothing of the worker runs any more."""


def test_a_killed_search_ends_as_one_that_was_not(tmp_path: Path):
    whole = make_task(tmp_path / "a")
    train = Formula()
    run_trials(start(whole), whole, train)
    task = make_task(tmp_path / "b")
    n_trained = []
    for stop in (3, 10, 20, 31):

        def kill(settings: Settings, epoch: int, stop: int = stop) -> None:
            n_trained.append(epoch)
            if len(n_trained) == stop:
                n_trained.append(-1)
                raise Killed

        with pytest.raises(Killed):
            run_trials(start(task), task, Formula(before_epoch=kill))
    run_trials(start(task), task, Formula())
    assert results(start(task)) == results(start(whole))
    assert [t.intermediate_values for t in start(task).trials] == [
        t.intermediate_values for t in start(whole).trials
    ]


def test_more_trials_continue_a_search(tmp_path: Path):
    task = make_task(tmp_path, trials=2)
    study = start(task)
    run_trials(study, task, Formula())
    assert [t.state.name for t in study.trials].count("WAITING") == 2  # two profiles are yet to come
    task = make_task(tmp_path, trials=6)
    run_trials(start(task), task, Formula())
    assert len(study.trials) == 6 and find_best_trial(study).user_attrs["settings"]["learning_rate"] > 0.001


def test_two_workers_share_a_search(tmp_path: Path):
    """Threads, each with its own study object on the same file, as processes have."""
    task = make_task(tmp_path, trials=10)
    start(task)
    trained = Formula()
    workers = []
    for _ in range(2):
        workers.append(
            Thread(
                target=lambda: run_trials(
                    open_study(task.folder, True, make_halving_pruner(2)), task, trained
                )
            )
        )
        workers[-1].start()
    for worker in workers:
        worker.join(timeout=60)
    study = start(task)
    assert len(study.trials) == 10 and not [t for t in study.trials if t.state.name in ("RUNNING", "WAITING")]
    keys = [(tuple(sorted(settings.items())), epoch) for settings, epoch in trained.trained]
    assert len(set(keys)) == len(keys)  # no epoch was trained twice


def test_the_end_of_the_time_leaves_the_final_run_its_share(tmp_path: Path, clock: list[float]):
    """An epoch takes 1 s, a run 12 s: of 60 s about 48 are for the trials."""

    def tick(settings: Settings, epoch: int) -> None:
        clock[0] += 1.0

    task = make_task(tmp_path, trials=None, deadline=Deadline(60.0))
    study = start(task)
    run_trials(study, task, Formula(before_epoch=tick))
    stopped_at = clock[0]
    assert 59 <= stopped_at + estimate_final_seconds(study, task) <= 60
    (paused,) = (t for t in study.trials if t.state.name == "RUNNING")
    assert get_progress(paused)["paused"] and get_progress(paused)["trained_epochs"] >= 1
    run_trials(study, task, Formula(before_epoch=tick))  # the time is over
    assert clock[0] == stopped_at
    run_trials(study, replace(task, deadline=Deadline(90.0)), Formula(before_epoch=tick))
    assert study.trials[paused.number].state.name != "RUNNING"  # more time continues with that trial
    assert 89 <= clock[0] + estimate_final_seconds(study, task) <= 90


@pytest.mark.parametrize("seconds", [100.0, 103.0, 109.0])
def test_no_epoch_is_begun_that_would_end_too_late(tmp_path: Path, clock: list[float], seconds: float):
    """An epoch takes 9 s, and the final run three of them."""

    def tick(settings: Settings, epoch: int) -> None:
        clock[0] += 9.0

    task = make_task(tmp_path, trials=None, deadline=Deadline(seconds))
    task = replace(task, plain={**task.plain, "epochs": 3})
    study = start(task)
    run_trials(study, task, Formula(epochs=3, before_epoch=tick))
    assert seconds - 9 <= clock[0] + estimate_final_seconds(study, task) <= seconds


@pytest.mark.parametrize(("epoch", "first"), [(1.0, 8), (4.0, 3), (12.0, 1)])
def test_the_first_round_is_as_short_as_the_time_asks_for(
    tmp_path: Path, clock: list[float], epoch: float, first: int
):
    """Four profiles in 240 s: a quarter of the time that is left is for the first round.

    The start of a trial, which takes 10 s, is no part of an epoch.
    """

    def tick(settings: Settings, number: int) -> None:
        clock[0] += epoch + 10.0 * (number == 0)

    task = make_task(tmp_path, trials=None, deadline=Deadline(240.0))
    task = replace(task, first_epochs=8, plain={**task.plain, "epochs": 32})
    study = start(task)
    train = Formula(epochs=32, before_epoch=tick)
    run_trials(study, task, train)
    assert find_first_epochs(study, task) == first
    assert judge_profiles(study, task).rounds > 0 and clock[0] <= 240
    trained = [len(list(group)) for _, group in groupby(train.trained, lambda pair: str(pair[0]))]
    assert trained[:4] == [max(first, 2), first, first, first]  # an epoch is timed in the second


def test_more_time_makes_the_first_round_longer_again(tmp_path: Path, clock: list[float]):
    def tick(settings: Settings, _: int) -> None:
        clock[0] += 10.0

    task = make_task(tmp_path, trials=None, deadline=Deadline(90.0))
    task = replace(task, first_epochs=8, plain={**task.plain, "epochs": 4})
    study = start(task)
    run_trials(study, task, Formula(epochs=32, before_epoch=tick))
    assert find_first_epochs(study, task) == 1 and not judge_profiles(study, task).rounds
    run_trials(study, replace(task, deadline=Deadline(3_000.0)), Formula(epochs=32, before_epoch=tick))
    assert find_first_epochs(study, task) == 8 and judge_profiles(study, task).rounds


def test_a_scale_free_key_replaces_its_plain_key(tmp_path: Path):
    """And the patience in targets counts for the time of a run."""
    task = make_task(tmp_path, trials=2, n_targets=100)
    task = replace(task, fixed={**task.fixed, "weight_decay": 0.7}, space=SpaceAround({}))
    profiles = {"plain": {}, "scaled": {"decay_per_epoch": 0.2, "patience_targets": 700}}
    study, train = start(task, profiles), Formula()
    run_trials(study, task, train)
    decays = {tuple(settings.get(key) for key in ("weight_decay", "decay_per_epoch"))
              for settings, _ in train.trained}  # fmt: skip
    assert decays == {(0.7, None), (None, 0.2)}
    assert [search.get_run_length(t, task) for t in study.trials] == [RunLength(12, 3), RunLength(12, 7)]


def test_failures_are_counted_and_the_search_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def fail(settings: Settings, epoch: int) -> None:
        if settings.get("learning_rate", 0.001) > 0.01:
            raise UserError("training loss became nan")

    task = make_task(tmp_path, trials=10)
    study = start(task)
    run_trials(study, task, Formula(before_epoch=fail))
    failed = [t for t in study.trials if t.state.name == "FAIL"]
    assert len(study.trials) == 10 and "fast" in {t.user_attrs["origin"] for t in failed}
    assert "trial 3 (fast) failed, --learning_rate=0.04: training loss became nan" in caplog.text
    assert find_best_trial(study).user_attrs["settings"]["learning_rate"] <= 0.01


def test_where_all_fail_the_search_ends(tmp_path: Path):
    def fail(settings: Settings, epoch: int) -> None:
        raise UserError("out of memory")

    task = make_task(tmp_path, trials=None)
    with pytest.raises(UserError, match="4 of 4 trials failed, the last one: out of memory") as caught:
        run_trials(start(task), task, Formula(before_epoch=fail))
    cure = str(caught.value).partition("out of memory; ")[2]
    assert cure == (
        f"settings and logs are in {task.folder}; find keys that train, with the same command without "
        f"--search, and search with them, or move {task.folder} and {task.folder}.log away to try the same "
        "again"
    )


def test_where_twenty_fail_the_search_ends(tmp_path: Path):
    """All but the plain run, which a search file does not have."""

    def fail(settings: Settings, epoch: int) -> None:
        raise UserError("heads do not divide")

    task = make_task(tmp_path, trials=None)
    with pytest.raises(
        UserError, match=r"20 of 20 trials failed, the last one: heads do not .*; narrow the ra"
    ):
        run_trials(start(task, {}), task, Formula(before_epoch=fail))


def test_a_trial_that_fails_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def fail(settings: Settings, epoch: int) -> None:
        raise UserError("no such thing")

    task = make_task(tmp_path, trials=1)
    with pytest.raises(UserError):
        run_trials(start(task, {"plain": {}}), task, Formula(before_epoch=fail))
    assert caplog.text.count("trial 0 (plain) failed: no such thing") == 1


def has_no_flock(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_workers_share_a_search_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A trial is left running and unclaimed: only one of the workers that find it resumes it."""
    monkeypatch.setattr("fcntl.flock", has_no_flock)
    task, trained = make_task(tmp_path, trials=1), Formula(before_epoch=lambda settings, epoch: sleep(0.05))
    study = start(task, {"plain": {}})
    study.ask()
    begun = Barrier(4)

    def work() -> None:
        opened = open_study(task.folder, True, make_halving_pruner(2))
        begun.wait()
        run_trials(opened, task, trained)

    workers = [Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [epoch for _, epoch in trained.trained] == list(range(12))
    assert start(task, {"plain": {}}).trials[0].state.name == "COMPLETE"
    left = sorted(path.name for path in task.folder.parent.rglob("*lock*"))
    assert left == [], "each lock is removed"


def test_a_smaller_score_may_be_the_better_one(tmp_path: Path):
    class Cost(Formula):
        def height(self, settings: Settings) -> float:  # type: ignore[override]
            return -Formula.height(settings)

    task = make_task(tmp_path, trials=12, is_maximized=False)
    study = open_study(task.folder, False, make_halving_pruner(2))
    enqueue_profiles(study, PROFILES, task)
    run_trials(study, task, Cost())
    assert study.trials[2].user_attrs["origin"] == "good" and study.trials[2].state.name == "COMPLETE"
    assert find_best_trial(study).value == min(t.value for t in study.trials)


def test_a_study_of_other_settings_is_refused(tmp_path: Path):
    study = start(make_task(tmp_path))
    check_same_settings(study, {"epochs": 5}, "start anew")
    check_same_settings(study, {"epochs": 5}, "start anew")
    with pytest.raises(UserError, match="started with epochs: 5, not 6; start anew"):
        check_same_settings(study, {"epochs": 6}, "start anew")


# the race


def runner(number: int, *scores: float, is_ended: bool = False) -> Runner:
    return Runner(number, dict(enumerate(scores, start=1)), is_ended)


def test_a_race_waits_for_the_last():
    standing = judge_race([runner(0, 0.1, 0.2), runner(1, 0.3), runner(2)], 2)
    assert standing.limits == {1: 2, 2: 2} and not standing.dropped and not standing.is_decided


def test_a_round_is_judged_at_its_epoch():
    """0 was best in the first round and is overtaken later: it stays out of what it has lost, and no more."""
    first = [runner(0, 0.5), runner(1, 0.4), runner(2, 0.1)]
    assert judge_race(first, 1).dropped == [2] and judge_race(first, 1).limits == {0: 2, 1: 2}
    second = [runner(0, 0.5, 0.5), runner(1, 0.4, 0.6), runner(2, 0.1, is_ended=True)]
    standing = judge_race(second, 1)
    assert standing.dropped == [0] and standing.limits == {1: None} and standing.is_decided
    later = [second[0], runner(1, 0.4, 0.6, 0.0, 0.0), second[2]]
    assert judge_race(later, 1).limits == {1: None}


def test_a_profile_that_ended_early_stays_in_with_its_best():
    standing = judge_race([runner(0, 0.9, is_ended=True), runner(1, 0.1, 0.2), runner(2, 0.3, 0.4)], 2)
    assert standing.alive == [0, 2] and standing.limits == {2: 4} and standing.dropped == [1]


def test_the_one_that_stays_takes_the_last_place_of_the_better_half():
    """Five, then three, then two, which go on to their ends; where it is ahead of the other, alone."""
    runners = [replace(runner(0, 0.1, 0.1, 0.1, 0.1), stays=True)]
    runners += [runner(number, *[number / 10] * 4) for number in range(2, 6)]
    assert judge_race(runners, 4).alive == [5, 4, 0]
    assert judge_race(runners, 2).alive == [5, 0] and not judge_race(runners, 2).is_decided
    last = judge_race(runners, 1)
    assert last.alive == [5, 0] and last.rounds == 3 and last.is_decided
    assert last.limits == {5: None, 0: None} and last.dropped == [2, 3, 4]
    ahead = [replace(runners[0], scores={**runners[0].scores, 4: 0.9}), *runners[1:]]
    assert judge_race(ahead, 1).alive == [0] and judge_race(ahead, 1).is_decided


def test_a_race_of_one_is_decided():
    assert judge_race([runner(0)], 3).limits == {0: None}
    assert judge_race([], 3).is_decided


# the space


@pytest.mark.parametrize(
    ("rule", "value", "expected"),
    [
        (Factor(4, high=0.05), 0.001, {"low": 0.00025, "high": 0.004, "log": True}),
        (Factor(4, high=0.05), 0.03, {"low": 0.0075, "high": 0.05, "log": True}),
        (Factor(4, high=0.05), 0.2, {"low": 0.05, "high": 0.2, "log": True}),  # the user's own value is in it
        (Factor(4, high=0.05), 0.0, None),
        (Factor(4, high=8192, is_whole=True), 64, {"low": 16, "high": 256, "log": True}),
        (Factor(4, high=8192, is_whole=True), 1, {"low": 1, "high": 4, "log": True}),
        (Steps(0.1, 2, 0.0, 0.8), 0.4, {"low": 0.2, "high": 0.6, "step": 0.1}),
        (Steps(0.1, 2, 0.0, 0.8), 0.05, {"low": 0.05, "high": 0.25, "step": 0.1}),
        (Steps(0.1, 2, 0.0, 0.8), 0.9, None),
        (Steps(1, 1, 1, 4), 1, {"low": 1, "high": 2, "step": 1}),
        (Width(), 64, {"low": 32, "high": 128, "step": 32}),
        (Width(), 96, {"low": 32, "high": 192, "step": 32}),
        (Width(), 16, {"low": 8, "high": 32, "step": 8}),
        (Choices(("a",)), "a", None),
        (Choices(("a", "b")), "b", ["a", "b"]),
    ],
)
def test_ranges_around_a_value(rule: Any, value: Any, expected: Any):
    found = rule.make_range(value)
    assert found == (pytest.approx(expected) if isinstance(expected, dict) else expected)


def test_keys_of_the_user_are_not_searched():
    plain = {key: 1 for key in {**RULES, **GENERAL_RULES}} | {"learning_rate": 0.001}
    assert set(build_space(True, plain, [{}], {"mixer", "n_layers"}).rules) == set(RULES) - {
        "mixer",
        "n_layers",
    }
    assert build_space(False, plain, [{}], {"n_layers"}).rules.keys() == GENERAL_RULES.keys() - {"n_layers"}


def test_choices_hold_the_values_of_the_profiles():
    space = build_space(True, {"MAX_ITEM_LIST_LENGTH": 50}, [{}, {"MAX_ITEM_LIST_LENGTH": 200}], set())
    assert space.make_ranges({"MAX_ITEM_LIST_LENGTH": 200}) == {"MAX_ITEM_LIST_LENGTH": [50, 200]}
    assert build_space(True, {"MAX_ITEM_LIST_LENGTH": 50}, [{}], set()).make_ranges({}) == {}


# the budget


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (40, Budget(trials=40)),
        ("30m", Budget(seconds=1800)),
        ("2h", Budget(seconds=7200)),
        ("1h30m", Budget(seconds=5400)),
        ("90s", Budget(seconds=90)),
        ("1.5h", Budget(seconds=5400)),
    ],
)
def test_a_budget(value: Any, expected: Budget):
    assert parse_budget(value) == expected


@pytest.mark.parametrize(
    "value", [0, -5, "abc", "-30m", "0m", "30", "m", True, 1.5, None, "30 m", [1], 10**9, "9999999h"]
)
def test_what_is_no_budget(value: Any):
    with pytest.raises(UserError, match="search: expected a time such as 30m"):
        parse_budget(value)


def test_how_long_a_run_will_take():
    notes = {"seconds": 20.0, "trained_epochs": 10, "best_epoch": 9}
    assert estimate_run_seconds(notes, True, RunLength(200, 10)) == 20
    assert estimate_run_seconds(notes, False, RunLength(200, 10)) == 2 * (10 + 10 + 1)
    assert estimate_run_seconds(notes, False, RunLength(15, 10)) == 2 * 15
    assert estimate_run_seconds({**notes, "best_epoch": 2}, False, RunLength(200, 10)) == 2 * (3 + 10 + 1)
    assert estimate_run_seconds({}, False, RunLength(200, 10)) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59, "59s"), (845, "14m 5s"), (5400, "1h 30m"), (7200, "2h")]
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text
