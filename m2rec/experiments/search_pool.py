"""The workers of a search: processes that take trials side by side, watched by the one that started them."""

import logging
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Protocol

from m2rec.errors import UserError
from m2rec.experiments.search import SearchTask, check_failures
from m2rec.experiments.search_view import SearchView
from m2rec.experiments.study import end_trial, find_study_file, get_progress
from m2rec.storage import lock_path

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

MAX_RESTARTS = 5
_LOOK_SECONDS = 0.5
_STORE_SECONDS = 5.0
SECONDS_KEY = "seconds"
"""The study's note of how long it was searched, over all starts."""


class WorkerProcess(Protocol):
    """What the pool needs of a process; `multiprocessing.Process` has it."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


StartWorker = Callable[[int], WorkerProcess]
"""Start the worker of this number, from 0."""


def find_worker_log(folder: Path, index: int) -> Path:
    """Where a worker's log goes."""
    return folder / f"worker-{index + 1}.log"


class SearchPool:
    """Runs the workers of a search until all have ended, or the time is over.

    A worker ends by itself after its epoch, where another one would take the time of the final run. Where no
    epoch ends before the whole time is over, the workers are stopped.

    A worker whose process was killed costs its trial, and the search goes on with the others; it is started
    again if it was the last.

    Args:
        study: from `open_study`.
        task: of the search.
        start: starts a worker.
        n_workers: how many at a time.
        view: what the user sees.
    """

    def __init__(
        self, study: "optuna.Study", task: SearchTask, start: StartWorker, n_workers: int, view: SearchView
    ) -> None:
        self.study = study
        self.task = task
        self.view = view
        self._start = start
        self._n_workers = n_workers
        self._workers: dict[int, WorkerProcess] = {}
        self._n_restarts = 0
        self._seconds_before = float(study.user_attrs.get(SECONDS_KEY, 0.0))
        self._started_at = self._stored_at = monotonic()

    def run(self) -> None:
        """Run until all workers have ended.

        Raises:
            ValueError: nothing but failures can be expected of the search.
        """
        self.view.update(self.study, self._count_seconds())  # what ends from now on is news
        try:
            for index in range(self._n_workers):
                self._workers[index] = self._start(index)
            while self._workers and not self.task.deadline.is_over(0):
                sleep(_LOOK_SECONDS)
                self._look_at_workers()
                check_failures(self.study.get_trials(deepcopy=False), self.task.folder)
                self.view.update(self.study, self._count_seconds())
                self._store_seconds(at_least=_STORE_SECONDS)
        finally:
            self._stop_workers()
            self._store_seconds()
            self.view.update(self.study, self._count_seconds())
            self.view.close()

    def _count_seconds(self) -> float:
        return self._seconds_before + monotonic() - self._started_at

    def _store_seconds(self, at_least: float = 0.0) -> None:
        if monotonic() - self._stored_at >= at_least:
            self._stored_at = monotonic()
            self.study.set_user_attr(SECONDS_KEY, round(self._count_seconds(), 1))

    def _look_at_workers(self) -> None:
        for index, worker in list(self._workers.items()):
            if worker.exitcode is None:
                continue
            del self._workers[index]
            if worker.exitcode != 0:
                self._handle_death(index, worker)

    def _handle_death(self, index: int, worker: WorkerProcess) -> None:
        """Mark the trial of a dead worker as failed; start the worker again unless memory was too small."""
        reason = _describe_death(self.task.folder, index, worker)
        self._fail_trial_of(worker, reason)
        is_killed = (worker.exitcode or 0) < 0
        if is_killed and self._workers:
            self.view.say(f"worker {index + 1}: {reason}; {len(self._workers)} left")
            return
        self._n_restarts += 1
        if self._n_restarts > MAX_RESTARTS:
            raise UserError(f"search: worker {index + 1} ended {MAX_RESTARTS} times: {reason}")
        self.view.say(f"worker {index + 1}: {reason}; it starts again")
        self._workers[index] = self._start(index)

    def _fail_trial_of(self, worker: WorkerProcess, reason: str) -> None:
        """Store that the trial of a worker failed; the view tells it."""
        with lock_path(find_study_file(self.task.folder)):
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state.name == "RUNNING" and _is_in_work(trial, worker):
                    end_trial(self.study, self.task.folder, trial.number, "FAIL", reason=reason)

    def _stop_workers(self) -> None:
        """Ask the workers to stop after their step, and wait for it; a second Ctrl-C kills them."""
        try:
            for worker in self._workers.values():
                worker.terminate()
            for worker in self._workers.values():
                worker.join()
        except BaseException:
            for worker in self._workers.values():
                worker.kill()
            raise


def _is_in_work(trial: Any, worker: WorkerProcess) -> bool:
    progress = get_progress(trial)
    return bool(progress.get("worker") == worker.pid and not progress["paused"])


def _describe_death(folder: Path, index: int, worker: WorkerProcess) -> str:
    code = worker.exitcode or 0
    if code < 0:
        cause = "the memory may have run out" if code == -9 else "from outside"
        return f"its process was ended by signal {-code} ({cause})"
    log = find_worker_log(folder, index)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return f"its process failed: {lines[-1] if lines else f'status {code}'} ({log})"
