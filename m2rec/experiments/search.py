"""Search settings with Optuna: workers take trials of a study, train them, and store how they end.

The engine of `run_mm.py --search` and of scripts/tune.py. It is handed the function that trains one run.
"""

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random
from time import perf_counter, sleep
from typing import Any

from m2rec.errors import UserError, format_one_line
from m2rec.experiments.race import Runner, Standing, judge_race
from m2rec.experiments.search_budget import (
    Deadline,
    RunLength,
    estimate_run_seconds,
    measure_epoch_seconds,
)
from m2rec.experiments.search_plan import SearchPlan
from m2rec.experiments.search_space import Range, Settings, Space
from m2rec.experiments.study import (
    PROGRESS_KEY,
    TRIAL_STATES,
    end_trial,
    find_best_trial,
    find_study_file,
    find_trial_folder,
    get_progress,
    is_maximized,
    log_trial,
    make_halving_pruner,
)
from m2rec.git import read_commit
from m2rec.settings import override_settings
from m2rec.storage import lock_path

try:
    import optuna
except ModuleNotFoundError:  # study.check_optuna says how to get it
    optuna = None

logger = logging.getLogger(__name__)

MAX_CONFIG_DRAWS = 20  # draws that are tried before the fixed settings are reported as invalid
MAX_FAILURES_IN_A_ROW = 20
MAX_DRAWS = 20  # of new settings that no trial has had
VARIED_SHARE = 1 / 3  # of the keys of the best settings that a new trial draws anew
_FIRST_ROUND_KEY = "first_round"  # of a study: how long its first round is, for which deadline
_FIRST_ROUND_SHARE = 0.25  # of the time that is left; all later rounds together take about as much
_WAIT_SECONDS = 0.3  # between two looks for a trial that another worker may leave

Watch = Callable[[int, float], bool]
"""Called after each epoch with its number, from 0, and its score; returns whether to stop the training."""
Train = Callable[[Settings, Path, Watch, dict[str, Any]], float | None]
"""Train with settings in a folder; its progress goes into the dict before each call of the watch.

If the folder has an unfinished run of these settings, it is resumed. Returns the best score, None if the
watch stopped it.
"""


@dataclass(frozen=True)
class SearchTask:
    """What a worker needs to know. It can be sent to another process."""

    folder: Path
    """Of the trials; the study itself is FOLDER.log."""
    fixed: Settings
    """Keys of every run."""
    space: Space
    plain: Settings = field(default_factory=dict)
    """All settings of the run as the user asked for it: what the ranges are made around at first."""
    trials: int | None = None
    """How many in all, over all workers; None: as many as the time allows."""
    deadline: Deadline = field(default_factory=Deadline)
    seed: int = 2020
    first_epochs: int = 1
    """Of the race of the profiles; fewer where the time is short (`find_first_epochs`)."""
    n_workers: int = 1
    """How many train at a time."""
    startup_trials: int = 10
    """Trials before the sampler learns from them."""
    is_maximized: bool = True
    """Whether a higher score is better."""
    carried: Settings = field(default_factory=dict)
    """Keys of every drawn trial, unless its origin has them: what they say stays, whatever else is drawn."""
    n_targets: int = 1
    """Training targets of an epoch."""


def list_example_settings(plan: SearchPlan) -> list[dict[str, Any]]:
    """Settings with the first value of each searched key, then with random values."""
    random = Random(0)
    examples = []
    for number in range(1 + MAX_CONFIG_DRAWS):
        example = dict(plan.fixed)
        for key, search_range in plan.search.items():
            values = search_range
            if isinstance(search_range, dict):
                values = [search_range["low"], search_range["high"]]
            example[key] = random.choice(values) if number else values[0]
        examples.append(example)
    return examples


def enqueue_profiles(study: "optuna.Study", profiles: Mapping[str, Settings], task: SearchTask) -> None:
    """Let the first trials be those of the profiles, unless they are there already."""
    known = {trial.user_attrs["origin"] for trial in study.get_trials(deepcopy=False) if is_profile(trial)}
    for name, settings in profiles.items():
        if name not in known:
            enqueue_settings(study, settings, {"origin": name, "profile": True}, task)


def enqueue_settings(
    study: "optuna.Study", settings: Settings, notes: Mapping[str, Any], task: SearchTask
) -> None:
    """Let a trial to come have these settings."""
    values = {**task.plain, **settings}
    searched = {key: values[key] for key in task.space.make_ranges(values)}
    study.enqueue_trial(searched, {"settings": settings, **notes})


def run_trials(study: "optuna.Study", task: SearchTask, train: Train, may_wait: bool = True) -> None:
    """Run trials until all have ended, or the time is over.

    Args:
        study: from `open_study`.
        task: of the search.
        train: trains one run.
        may_wait: whether to wait for the end of the race of the profiles; else try other settings meanwhile.

    Raises:
        ValueError: too many trials in a row have failed.
    """
    _Worker(study, task, train, may_wait).run()


@dataclass
class _Claim:
    """A trial that this worker has locked."""

    trial: Any
    limit: int | None
    """The epoch at which it pauses."""
    locks: ExitStack


class _Worker:
    """Takes trials of a study, new ones or those that were left, one after the other."""

    def __init__(self, study: "optuna.Study", task: SearchTask, train: Train, may_wait: bool) -> None:
        self.study = study
        self.task = task
        self.train = train
        self.may_wait = may_wait
        self.commit = read_commit()  # as it was imported, whatever is committed meanwhile

    def run(self) -> None:
        self._forget_first_round()
        while not self.is_time_over(find_best_trial(self.study)):
            with lock_path(find_study_file(self.task.folder)):
                claim = self.claim_trial()
            if claim is not None:
                with claim.locks:
                    self.run_trial(claim)
                gc.collect()
            elif is_all_done(self.study, self.task):
                return
            else:
                sleep(_WAIT_SECONDS)

    def is_time_over(self, trial: Any) -> bool:
        """Whether another epoch, as those of this trial, would leave too little for the final run."""
        epoch = 0.0 if trial is None else measure_epoch_seconds(get_progress(trial))
        return self.task.deadline.is_over(estimate_final_seconds(self.study, self.task) + epoch)

    def claim_trial(self) -> _Claim | None:
        """Lock a trial that was left, or a new one; None if there is none now.

        Raises:
            ValueError: too many trials in a row have failed.
        """
        trials = self.study.get_trials(deepcopy=False)
        check_failures(trials, self.task.folder)
        standing = judge_profiles(self.study, self.task)
        for number in standing.dropped:
            if (claim := self._lock_trial(trials[number])) is not None:
                with claim.locks:
                    self._end_trial(number, "PRUNED")
        for trial in trials:
            if trial.number in standing.limits or not is_profile(trial):
                limit = standing.limits.get(trial.number)
                if (claim := self._lock_trial(trial, limit)) is not None:
                    return claim
        if has_all_trials(trials, self.task):
            return None
        is_profile_next = any(trial.state.name == "WAITING" for trial in trials)
        if self.may_wait and not standing.is_decided and not is_profile_next:
            return None
        return self._start_trial(trials, standing)

    def _lock_trial(self, trial: Any, limit: int | None = None) -> _Claim | None:
        """A trial that was started and that no process is training; None if one is."""
        if trial.state.name != "RUNNING":
            return None
        folder = find_trial_folder(self.task.folder, trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        locks = ExitStack()
        try:
            locks.enter_context(lock_path(folder, timeout=0))
        except BlockingIOError:
            return None
        now = self.study.get_trials(deepcopy=False)[trial.number]
        if now.state.name != "RUNNING" or now.intermediate_values != trial.intermediate_values:
            locks.close()  # another worker had it since `trial` was read
            return None
        self._set_sampler(trial.number)
        return _Claim(optuna.Trial(self.study, trial._trial_id), limit, locks)

    def _start_trial(self, trials: Sequence["optuna.trial.FrozenTrial"], standing: Standing) -> _Claim | None:
        """The next profile, or a new trial."""
        self._set_sampler(len(trials))
        if self.task.space.is_moving and not any(trial.state.name == "WAITING" for trial in trials):
            self._enqueue_draw(len(trials))
        number = self.study.ask().number
        return self._lock_trial(self.study.get_trials(deepcopy=False)[number], standing.limits.get(number))

    def _set_sampler(self, number: int) -> None:
        """Take a seed per trial: two workers draw differently, and a resumed study as if it never stopped."""
        options: dict[str, Any] = {}
        if self.task.space.is_moving:  # TPE can't sample jointly from ranges that change
            options = {"n_startup_trials": self.task.startup_trials, "multivariate": False}
        self.study.sampler = optuna.samplers.TPESampler(seed=self.task.seed + number, **options)

    def _enqueue_draw(self, number: int) -> None:
        """Let the next trial have the best settings with some keys drawn anew, as no trial had them yet."""
        best = find_best_trial(self.study)
        base = best.user_attrs["settings"] if best else {}
        known = [trial.user_attrs["settings"] for trial in self.study.get_trials(deepcopy=False)]
        random = Random(self.task.seed + number)
        for _ in range(MAX_DRAWS):
            settings = self._draw_around(base, random)
            if not any({**self.task.plain, **settings} == {**self.task.plain, **other} for other in known):
                break
        origin = f"trial {best.number}" if best else "plain"
        enqueue_settings(self.study, settings, {"origin": origin}, self.task)

    def _draw_around(self, base: Settings, random: Random) -> Settings:
        ranges = self.task.space.make_ranges({**self.task.plain, **base})
        keys = list(ranges)
        varied = [key for key in keys if random.random() < VARIED_SHARE] or [random.choice(keys)]
        scratch = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
        settings = {**self.task.carried, **base}
        for key in varied:
            value = self.study.sampler.sample_independent(
                self.study, scratch, key, make_distribution(ranges[key])
            )
            settings[key] = round_setting(value)
        return settings

    def _draw_settings(self, trial: "optuna.Trial") -> Settings:
        """The trial's settings, with the values of the searched keys as Optuna's parameters."""
        notes = trial.user_attrs
        if "settings" not in notes:
            ranges = self.task.space.make_ranges(self.task.plain)
            drawn = {key: round_setting(suggest_setting(trial, key, ranges[key])) for key in ranges}
            trial.set_user_attr("settings", drawn)
            return drawn
        if self.task.space.is_moving:
            values = {**self.task.plain, **notes["settings"]}
            for key, search_range in self.task.space.make_ranges(values).items():
                suggest_setting(trial, key, _narrow_range(search_range, values[key]))
        return dict(notes["settings"])

    def run_trial(self, claim: _Claim) -> None:
        """Train until the end of the trial, its pause, or the end of the time; store the outcome."""
        trial = claim.trial
        limit = claim.limit
        if limit is not None and limit >= get_run_length(trial, self.task).epochs:
            limit = None  # the last epoch ends the trial, it need not pause there
        choose_best = max if is_maximized(self.study) else min
        scores = list(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values.values())
        progress = {**get_progress(trial), "worker": os.getpid(), "paused": False, "commit": self.commit}
        before, start = progress.get("seconds", 0.0), perf_counter()
        is_pruned, n_before = False, progress.get("trained_epochs", 0)
        epoch_ends: list[float] = []
        self._fit_pruner()

        def store_progress(**others: Any) -> None:
            progress.update(others, seconds=round(before + perf_counter() - start, 1))
            trial.set_user_attr(PROGRESS_KEY, dict(progress))

        def watch(epoch: int, score: float) -> bool:
            nonlocal is_pruned
            scores.append(score)
            trial.report(choose_best(scores), epoch + 1)  # the best, so that a dip does not end it
            store_progress()
            is_hopeless = bool(trial.should_prune())
            is_pruned = is_hopeless and not is_profile(trial)  # profiles are judged by their race
            ended_at = perf_counter()
            if is_profile(trial) and len(epoch_ends) > 0:  # the time of the first includes the start
                self._fit_first_round(ended_at - epoch_ends[-1])
            epoch_ends.append(ended_at)
            first = find_first_epochs(self.study, self.task)  # it may have become smaller than the limit
            is_at_limit = limit is not None and epoch + 1 >= (first if n_before < first else limit)
            return is_pruned or is_at_limit or self.is_time_over(trial)

        def end(state: str, score: float | None = None, reason: str = "") -> None:
            store_progress()
            self._end_trial(trial.number, state, score, reason)

        settings = override_settings(self.task.fixed, self._draw_settings(trial))
        store_progress()
        try:
            best = self.train(settings, find_trial_folder(self.task.folder, trial.number), watch, progress)
        except KeyboardInterrupt:
            store_progress(paused=True)
            raise
        except ValueError as error:
            end("FAIL", reason=format_one_line(error))
            return
        if best is not None:
            end("COMPLETE", best)
        elif is_pruned:
            end("PRUNED")
        else:
            store_progress(paused=True)

    def _fit_pruner(self) -> None:
        """Compare drawn trials as early as the profiles were."""
        if self.study.user_attrs.get(_FIRST_ROUND_KEY):
            self.study.pruner = make_halving_pruner(find_first_epochs(self.study, self.task))

    def _forget_first_round(self) -> None:
        """With another deadline a race that is in its first round is fitted to the time anew."""
        fitted = self.study.user_attrs.get(_FIRST_ROUND_KEY, {})
        if fitted and fitted["ends_at"] != self.task.deadline.ends_at:
            standing = judge_profiles(self.study, self.task)
            if not standing.rounds and not standing.is_decided:
                self.study.set_user_attr(_FIRST_ROUND_KEY, {})

    def _fit_first_round(self, epoch_seconds: float) -> None:
        """Shorten the first round of the race, once an epoch was timed, so that all profiles are compared."""
        task = self.task
        if not task.deadline.is_set or self.study.user_attrs.get(_FIRST_ROUND_KEY):
            return
        n_profiles = sum(map(is_profile, self.study.get_trials(deepcopy=False)))
        seconds = _FIRST_ROUND_SHARE * task.deadline.measure_seconds_left() * task.n_workers / n_profiles
        fitting = int(seconds / epoch_seconds) if epoch_seconds else task.first_epochs
        first_epochs = min(task.first_epochs, max(fitting, task.plain.get("eval_step", 1)))
        fitted = {"epochs": first_epochs, "ends_at": task.deadline.ends_at}
        self.study.set_user_attr(_FIRST_ROUND_KEY, fitted)
        if first_epochs < task.first_epochs:
            logger.info(
                "an epoch takes %.1f s: the profiles are first compared after %d epochs, not %d",
                epoch_seconds, first_epochs, task.first_epochs,
            )  # fmt: skip

    def _end_trial(self, number: int, state: str, score: float | None = None, reason: str = "") -> None:
        """Store and log how a trial ended."""
        end_trial(self.study, self.task.folder, number, state, score, reason)
        log_trial(self.study.get_trials(deepcopy=False)[number])


def has_all_trials(trials: Sequence["optuna.trial.FrozenTrial"], task: SearchTask) -> bool:
    """Whether as many trials have begun as there should be."""
    n_begun = sum(trial.state.name != "WAITING" for trial in trials)
    return task.trials is not None and n_begun >= task.trials


def is_all_done(study: "optuna.Study", task: SearchTask) -> bool:
    """Whether all trials have ended."""
    trials = study.get_trials(deepcopy=False)
    return has_all_trials(trials, task) and all(trial.state.name != "RUNNING" for trial in trials)


def judge_profiles(study: "optuna.Study", task: SearchTask) -> Standing:
    """How the race of the profiles stands."""
    sign = 1 if is_maximized(study) else -1
    runners = []
    for trial in study.get_trials(deepcopy=False):
        never_starts = trial.state.name == "WAITING" and trial.number >= (task.trials or inf)
        if not is_profile(trial) or never_starts or trial.state.name == "FAIL":
            continue
        scores = {epochs: sign * score for epochs, score in trial.intermediate_values.items()}
        is_ended = trial.state.name in TRIAL_STATES
        runners.append(Runner(trial.number, scores, is_ended, stays=is_plain(trial)))
    return judge_race(runners, find_first_epochs(study, task))


def find_first_epochs(study: "optuna.Study", task: SearchTask) -> int:
    """After how many epochs the profiles are first compared."""
    fitted = study.user_attrs.get(_FIRST_ROUND_KEY, {})
    return int(fitted.get("epochs", task.first_epochs))


def estimate_final_seconds(study: "optuna.Study", task: SearchTask) -> float:
    """How long the run of the best settings will take, as `estimate_run_seconds` says; 0 before any score."""
    best = find_best_trial(study)
    if best is None:
        return 0.0
    return estimate_run_seconds(get_progress(best), best.state.name == "COMPLETE", get_run_length(best, task))


def get_run_length(trial: Any, task: SearchTask) -> RunLength:
    """What decides how long a run of a trial's settings is trained."""
    values = {"epochs": 2**31, "stopping_step": 0, "eval_step": 1, **task.plain}
    values.update(trial.user_attrs.get("settings", {}))
    patience = values["stopping_step"] * values["eval_step"]
    if values.get("patience_targets"):
        patience = round(values["patience_targets"] / task.n_targets)
    return RunLength(values["epochs"], patience)


def is_profile(trial: Any) -> bool:
    """Whether a trial is in the race."""
    return "profile" in trial.user_attrs


def is_plain(trial: Any) -> bool:
    """Whether a trial is the profile that changes nothing."""
    return is_profile(trial) and not trial.user_attrs["settings"]


def check_failures(trials: Sequence["optuna.trial.FrozenTrial"], folder: Path) -> None:
    """Stop a search of which nothing but failures can be expected.

    Args:
        trials: all of the study.
        folder: of the trials.

    Raises:
        ValueError: all profiles have failed, or many trials in a row.
    """
    ended = [trial for trial in trials if trial.state.name in TRIAL_STATES]
    failed = [trial for trial in ended if trial.state.name == "FAIL"]
    profiles = [trial for trial in trials if is_profile(trial)]
    all_profiles_failed = profiles and all(trial.state.name == "FAIL" for trial in profiles)
    last = ended[-MAX_FAILURES_IN_A_ROW:]
    if not all_profiles_failed and not (
        len(last) == MAX_FAILURES_IN_A_ROW and all(trial.state.name == "FAIL" for trial in last)
    ):
        return
    reason = failed[-1].user_attrs.get("reason", "")
    cure = "narrow the ranges or fix the key that it is about"
    if all_profiles_failed:
        cure = "find keys that train, with the same command without --search, and search with them"
    raise UserError(
        f"study: {len(failed)} of {len(ended)} trials failed, the last one: {reason}; settings and logs are "
        f"in {folder}; {cure}, or move {folder} and {find_study_file(folder)} away to try the same again"
    )


def make_distribution(search_range: Range) -> Any:
    """Optuna's distribution of a list or of a range; of whole numbers if all of the range are."""
    if isinstance(search_range, list):
        return optuna.distributions.CategoricalDistribution(search_range)
    for name in ("low", "high", "step"):
        if type(search_range.get(name, 1)) is not int:
            return optuna.distributions.FloatDistribution(**search_range)
    return optuna.distributions.IntDistribution(**search_range)


def suggest_setting(trial: "optuna.Trial", key: str, search_range: Range) -> Any:
    """A value of a list, or a number of a range; a whole number if all of the range are."""
    distribution = make_distribution(search_range)
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    is_whole = isinstance(distribution, optuna.distributions.IntDistribution)
    suggest = trial.suggest_int if is_whole else trial.suggest_float
    return suggest(key, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _narrow_range(search_range: Range, value: Any) -> Range:
    """The range with this value alone; a choice is fixed by Optuna's queue."""
    if isinstance(search_range, list):
        return search_range
    number = type(search_range["low"])(value)
    return {**search_range, "low": number, "high": number}


def round_setting(value: Any) -> Any:
    """A drawn number as it is trained with: four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
