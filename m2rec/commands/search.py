"""Search settings, then train and test what won: m2rec search BUDGET [--key=value ...].

The same as python run_mm.py --search=BUDGET. BUDGET is a time, such as 30m or 2h, or a number of trials. The
shipped profiles are raced on validation, the best is searched around, and the run of the best settings is
made. Every key of config.yaml can be given, and stays as it is given. The same command resumes a search that
was stopped.
"""

import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import uuid4

from m2rec.cli import name_command, name_commands_in, name_program, run_command
from m2rec.errors import UserError, format_count
from m2rec.experiments.search_budget import (
    Budget,
    Deadline,
    format_duration,
    measure_epoch_seconds,
    parse_budget,
)

if TYPE_CHECKING:
    import optuna

    from m2rec.commands.search_setup import SearchSetup
    from m2rec.experiments.search import SearchTask
    from m2rec.training.run import RunResult

logger = logging.getLogger(__name__)

_DONE_KEY = "searched_for"  # the study's note of the longest time that is used up, in seconds
_DATA_KEY = "data"
_ID_KEY = "id"  # of the study, which tells it from a later one in the same folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments, BUDGET being the first; returns the exit status, as `run.main`."""
    from m2rec.commands import run

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "-h" in arguments or "--help" in arguments:
        print(name_commands_in(__doc__))
        return 0
    if not arguments or arguments[0].startswith("-"):
        return run_command("search", _refuse_without_budget)
    return run.main([f"--search={arguments[0]}", *arguments[1:]], "search")


def _refuse_without_budget() -> NoReturn:
    raise UserError("expected a time or a number of trials first, such as 30m, 2h or 40")


def run_search(
    arguments: Sequence[str], given: Mapping[str, Any], log_level: int | None = None
) -> "RunResult | int":
    """Search, and make the run of the best settings.

    Args:
        arguments: the command line, to be repeated in messages.
        given: its keys.
        log_level: stronger than the key `state`.

    Returns:
        the run, or the exit status after Ctrl-C or SIGTERM.

    Raises:
        ValueError: a key, the data or the time can't be used, or no trial succeeded.
    """
    started_at = time()
    budget = parse_budget(given["search"])
    from m2rec.experiments.study import check_optuna

    check_optuna()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("search: it starts its own processes; run it without torchrun")
    from m2rec.commands.own_process import pause_garbage_collection  # before PyTorch is loaded

    with pause_garbage_collection():
        from m2rec.commands.search_setup import plan_search
        from m2rec.training.signals import StopRequest

    command = f"{name_command('train')} {shlex.join(arguments)}"
    request = StopRequest(at_once=True)
    try:
        with request:
            setup = plan_search({key: given[key] for key in given if key != "search"}, budget)
            logging.getLogger().setLevel(log_level or setup.config["state"])
        with _lock_search(setup.task.folder):
            with request:
                study = _search(setup, budget, started_at)
            return _run_winner(study, setup, command)
    except KeyboardInterrupt as stop:
        number = getattr(stop, "signal", None) or request.signal or signal.SIGINT
        sys.stderr.write(f"{name_program('train')}: stopped; resume with: {command}\n")
        return int(128 + number)


def _search(setup: "SearchSetup", budget: Budget, started_at: float) -> "optuna.Study":
    """Run trials until the budget is used up; trials of earlier starts count."""
    from m2rec.commands.search_worker import start_worker
    from m2rec.experiments import search, search_pool, study
    from m2rec.experiments.search_view import SearchView

    opened = _open_study(setup)
    task = setup.task
    if budget.seconds is not None:
        used = float(opened.user_attrs.get(search_pool.SECONDS_KEY, 0.0))
        task = replace(task, deadline=Deadline(started_at + budget.seconds - used))
    logger.info("search: %s, %s; trials are in %s", _describe_start(opened), budget, task.folder)
    is_used_up = float(opened.user_attrs.get(_DONE_KEY, 0.0)) >= (budget.seconds or math.inf)
    if not is_used_up and not search.is_all_done(opened, task):
        is_live = bool(setup.config["show_progress"]) and sys.stderr.isatty()
        view = SearchView(sys.stderr, is_live, task, budget, setup.config["valid_metric"])

        def start(index: int) -> Any:
            return start_worker(task, index, setup.threads, setup.gpus[index])

        try:
            search_pool.SearchPool(opened, task, start, setup.n_workers, view).run()
        finally:
            _write_trials(opened, task)
        _check_outcome(opened, setup, budget)
        if budget.seconds is not None:
            opened.set_user_attr(_DONE_KEY, budget.seconds)
    _write_trials(opened, task)
    if study.find_best_trial(opened) is None:
        raise UserError(f"search: no trial has a score ({study.count_states(opened)}); see {task.folder}")
    return opened


def _write_trials(opened: "optuna.Study", task: "SearchTask") -> None:
    from m2rec.experiments.trial_tables import format_trials_csv
    from m2rec.storage import write_text

    table = format_trials_csv(opened.trials, task.space.make_ranges(task.plain), task.plain)
    write_text(task.folder / "trials.csv", table)


@contextmanager
def _lock_search(folder: Path) -> Iterator[None]:
    """Lock a search against a second command."""
    from m2rec.storage import lock_path

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_path(folder, timeout=0):
            yield
    except BlockingIOError:
        raise UserError(
            f"search: another process is at work in {folder}, with all cores; wait for it or stop it"
        ) from None


def _open_study(setup: "SearchSetup") -> "optuna.Study":
    """Create the study with its profiles, or open that of an earlier start.

    Raises:
        ValueError: the data or the settings have changed since then.
    """
    from m2rec.experiments import search, study

    task = setup.task
    opened = study.open_study(task.folder, task.is_maximized, study.make_halving_pruner(task.first_epochs))
    cure = f"move {task.folder} and {study.find_study_file(task.folder)} away to search anew"
    if opened.user_attrs.get(_DATA_KEY, setup.data_hash) != setup.data_hash:
        raise UserError(f"search: the data set has changed since this search was started; {cure}")
    opened.set_user_attr(_DATA_KEY, setup.data_hash)
    if _ID_KEY not in opened.user_attrs:
        opened.set_user_attr(_ID_KEY, uuid4().hex[:8])
    study.check_same_settings(opened, setup.fixed_settings, cure)
    search.enqueue_profiles(opened, setup.profiles, task)
    return opened


def _describe_start(opened: "optuna.Study") -> str:
    from m2rec.experiments.study import count_states, get_progress

    trials = opened.trials
    if not get_progress(trials[0]):
        return "new"
    n_unfinished = sum(trial.state.name == "RUNNING" for trial in trials)
    return f"resumed with {count_states(opened)}, {n_unfinished} unfinished"


def _check_outcome(opened: "optuna.Study", setup: "SearchSetup", budget: Budget) -> None:
    """Check that something was compared.

    Raises:
        ValueError: the time ended before the first round of the race; says what it managed.
    """
    from m2rec.experiments import search, study

    best = study.find_best_trial(opened)
    standing = search.judge_profiles(opened, setup.task)
    is_compared = standing.rounds > 0 or standing.is_decided
    if budget.seconds is None or (best is not None and (is_compared or best.state.name == "COMPLETE")):
        return
    text = f"search: {budget} did not suffice to compare the {len(setup.profiles)} profiles"
    if len(setup.profiles) == 1:
        text = f"search: {budget} did not suffice"
    if best is None:
        raise UserError(f"{text}: no epoch was finished; the same command with more time resumes")
    n_trained = sum(bool(trial.intermediate_values) for trial in opened.get_trials(deepcopy=False))
    epoch = measure_epoch_seconds(study.get_progress(best))
    rounds = epoch * search.find_first_epochs(opened, setup.task) * len(setup.profiles) / setup.n_workers
    total = 2 * (rounds + search.estimate_final_seconds(opened, setup.task))
    raise UserError(
        f"{text}: {n_trained} of them have trained an epoch, which takes {format_duration(epoch)}; the "
        f"same command with more time, such as --search={math.ceil(total / 60)}m, resumes"
    )


def _run_winner(opened: "optuna.Study", setup: "SearchSetup", command: str) -> "RunResult":
    """Print the best trials, and make the ordinary run of the best, or finish or reuse an earlier one."""
    from m2rec.commands.config_file import find_config_file
    from m2rec.commands.run import RESUME_KEYS
    from m2rec.experiments.study import find_best_trial, format_arguments
    from m2rec.experiments.trial_tables import format_search_summary
    from m2rec.settings import override_settings
    from m2rec.training.checkpoint import CannotResume
    from m2rec.training.configuration import build_config
    from m2rec.training.run import RunResult, build_resumed_config, run_experiment

    winner = find_best_trial(opened)
    assert winner is not None
    print(format_search_summary(opened, setup.config["valid_metric"]))
    settings = override_settings(setup.base, winner.user_attrs["settings"])
    changes = format_arguments(winner.user_attrs["settings"]) or "the plain run"
    print(f"trial {winner.number} wins: {changes}", flush=True)
    _warn_of_plain_run(opened, winner.number)
    origin = f"settings of trial {winner.number} of {setup.task.folder}, search {opened.user_attrs[_ID_KEY]}:"
    before = _find_run(Path(setup.config["runs_dir"]), origin)
    if before is None:
        return run_experiment(build_config(settings, find_config_file()), comment=f"{origin} {command}")
    if before.is_finished:
        print(f"\nits run was made before: {before.path}; more time or trials continue the search")
        return RunResult(before.path, before.read_metrics())
    machine = {key: setup.base[key] for key in RESUME_KEYS if key in setup.base}
    try:
        return run_experiment(build_resumed_config(before.path, machine), before.path)
    except CannotResume as error:
        logger.warning("%s; the run of the best settings starts anew", error)
        return run_experiment(build_config(settings, find_config_file()), comment=f"{origin} {command}")


def _warn_of_plain_run(opened: "optuna.Study", winner: int) -> None:
    """Say so if the winner was compared with a part of the plain run only."""
    from m2rec.experiments.search import is_plain
    from m2rec.experiments.study import get_progress

    for trial in opened.trials:
        if is_plain(trial) and trial.number != winner and trial.state.name == "RUNNING":
            logger.warning(
                "the plain run was trained for %s only, and may come to more than the winner; the same "
                "command with more time compares them at their ends",
                format_count(get_progress(trial).get("trained_epochs", 0), "epoch"),
            )


def _find_run(runs_dir: Path, comment: str) -> Any:
    """The run with this comment, which is finished or can be resumed; None without one."""
    from m2rec.run_folder import list_run_folders

    found = [files for files in list_run_folders(runs_dir) if files.read_comment().startswith(comment)]
    usable = [files for files in found if files.is_finished or files.checkpoint_file.exists()]
    return usable[-1] if usable else None
