"""Run what a sweep plans, each run in its own process, and keep the rows of NAME.csv."""

import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

from tqdm import tqdm

from m2rec.errors import UserError, format_one_line
from m2rec.experiments.ledger import (
    TABLE_METRICS,
    build_result_row,
    format_settings,
    list_run_keys,
    make_run_key,
    read_result_rows,
    write_result_row,
)
from m2rec.experiments.sweep_plan import PlannedRun, Sweep, find_finished_run, get_planned_run_folder
from m2rec.git import is_same_code, read_commit
from m2rec.run_folder import list_run_folders
from m2rec.storage import lock_path, write_text
from m2rec.yaml_values import format_argument, suggest_spelling

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
RUN_SETTINGS_FILE = "settings.json"
RUN_LOG_FILE = "log.txt"
CANNOT_RESUME_STATUS = 3  # of run_mm.py


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is run."""

    runs: Path
    """Folder of all sweeps' runs."""
    jobs: int
    """Runs at a time."""
    gpus: int
    threads: int
    """Threads that all runs share."""
    read_checkpoint_commit: Callable[[Path], str | None]
    """The commit of a stopped run by its checkpoint, an empty one if it can't be read."""
    data_path: str | None = None
    variants: Sequence[str] | None = None
    """Only these; None: all."""
    datasets: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    again: bool = False
    """Whether to repeat finished runs, and compare."""
    allow_dirty: bool = False


def check_committed_code() -> None:
    """Check that a commit names the code, so that results can be reproduced.

    Raises:
        ValueError: tracked files have changes that are not committed.
    """
    commit = read_commit()
    if commit is None or commit.endswith("+dirty"):
        raise UserError(
            "uncommitted changes: results could not be reproduced; commit them or give --allow-dirty"
        )


class SweepRunner:
    """Runs a sweep.

    Attributes:
        output_csv: where the rows go, NAME.csv or the one of repeated runs.
    """

    def __init__(self, sweep: Sweep, options: SweepOptions) -> None:
        self.sweep = sweep
        self.options = options
        self.results_csv = self.output_csv = sweep.path.with_suffix(".csv")
        self.folder = options.runs / sweep.name
        if options.again:
            self.folder = options.runs / "again" / sweep.name
            self.output_csv = self.folder.with_suffix(".csv")
        self._stopping = Event()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._gpu_slots: SimpleQueue[str | None] = SimpleQueue()
        for job in range(options.jobs):
            self._gpu_slots.put(str(job % options.gpus) if options.gpus else None)

    def run(self) -> int:
        """Run what is missing; returns how many runs failed or were left to another sweep."""
        if not self.options.allow_dirty:
            check_committed_code()
        pending = self._select_pending_runs()
        self.folder.mkdir(parents=True, exist_ok=True)
        failures = 0
        with ThreadPoolExecutor(self.options.jobs) as pool, tqdm(total=len(pending), unit="run") as bar:
            try:
                tasks = {pool.submit(self._run_with_lock, planned): planned for planned in pending}
                for task in as_completed(tasks):
                    planned = tasks[task]
                    try:
                        task.result()
                        outcome = self._describe_result(planned)
                    except (ValueError, OSError) as error:
                        outcome = format_one_line(error)
                        failures += 1
                    bar.update()
                    name = f"{planned.dataset}, {planned.variant}, seed {planned.seed}"
                    bar.write(f"{name}: {outcome}", file=sys.stderr)
            except KeyboardInterrupt:
                self._stopping.set()
                for process in list(self._processes):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
        return failures

    def _select_pending_runs(self) -> list[PlannedRun]:
        """The chosen runs that have no row with their settings; with `again`, those that have one."""
        finished = list_run_keys(read_result_rows(self.results_csv))
        pending = []
        for planned in self._select_chosen_runs():
            if (make_run_key(planned) in finished) == self.options.again:
                pending.append(planned)
        if self.options.again and not pending:
            raise UserError(f"{self.results_csv} has no row of these runs with today's settings to repeat")
        return pending

    def _select_chosen_runs(self) -> list[PlannedRun]:
        """The runs of the variants, data sets and seeds in the options.

        Raises:
            ValueError: the sweep does not have one of them.
        """
        sweep, options = self.sweep, self.options
        variants = _check_names(sweep, "variant", options.variants, tuple(sweep.variants))
        datasets = _check_names(sweep, "data set", options.datasets, sweep.datasets)
        seeds = _check_names(sweep, "seed", options.seeds, sweep.seeds)
        chosen = []
        for planned in sweep.planned_runs():
            if planned.variant in variants and planned.dataset in datasets and planned.seed in seeds:
                chosen.append(planned)
        return chosen

    def _describe_result(self, planned: PlannedRun) -> str:
        text = f"done, {_format_row_metrics(self.output_csv, planned)}"
        if self.options.again:
            text += f"; {self.results_csv} has {_format_row_metrics(self.results_csv, planned)}"
        return text

    def _run_with_lock(self, planned: PlannedRun) -> None:
        """Make a run and keep its row, unless another sweep makes it."""
        gpu = self._gpu_slots.get()
        try:
            folder = get_planned_run_folder(self.folder, planned.dataset, planned.variant, planned.seed)
            folder.mkdir(parents=True, exist_ok=True)
            with lock_path(folder, timeout=0) as lock:
                row = self._make_row(planned, folder, lock, gpu)
            with lock_path(self.sweep.path):
                write_result_row(self.output_csv, self.sweep, row)
        except BlockingIOError:
            raise UserError("in use by another process") from None
        finally:
            self._gpu_slots.put(gpu)

    def _make_row(
        self, planned: PlannedRun, folder: Path, lock: int | None, gpu: str | None
    ) -> dict[str, str]:
        """Reuse a finished run, resume a stopped one, or start afresh; its row."""
        if planned not in Sweep.read(self.sweep.path).planned_runs():
            raise UserError(f"{self.sweep.path} has changed; start the sweep again")
        settings, settings_file = format_settings(planned.keys), folder / RUN_SETTINGS_FILE
        stopped = None
        if settings_file.is_file() and settings_file.read_text(encoding="utf-8") == settings:
            if row := self._reuse_finished_run(planned, folder):
                return row
            stopped = self._find_resumable_run(folder)
        if not self.options.allow_dirty:
            check_committed_code()  # the code may have changed since the start
        status = CANNOT_RESUME_STATUS
        if stopped:
            status = self._run_process({"resume": str(stopped.resolve())}, folder, lock, gpu)
        if status == CANNOT_RESUME_STATUS:
            _remove_earlier_runs(folder)
            write_text(settings_file, settings)
            # rows are compared by their keys, so what they leave open must have one meaning: fixed defaults
            values = {"dataset": planned.dataset, "auto": False, **planned.keys, "seed": planned.seed}
            values["runs_dir"] = str(folder.resolve())
            if self.options.data_path:
                values["data_path"] = str(Path(self.options.data_path).resolve())
            status = self._run_process(values, folder, lock, gpu)
        finished = find_finished_run(folder)
        if status or finished is None:
            log = folder / RUN_LOG_FILE
            raise UserError(f"failed: {log.read_text(encoding='utf-8').strip().splitlines()[-1]} ({log})")
        return build_result_row(planned, finished)

    def _reuse_finished_run(self, planned: PlannedRun, folder: Path) -> dict[str, str] | None:
        """The row of a finished run that today's code can read; to repeat a run, it must be of this code."""
        finished = find_finished_run(folder)
        if finished is None:
            return None
        try:
            row = build_result_row(planned, finished)
        except ValueError as error:
            logger.warning("%s", error)
            return None
        if self.options.again and not is_same_code(row["commit"], read_commit()):
            return None
        logger.info("%s is reused, of commit %s", finished, row["commit"])
        return row

    def _find_resumable_run(self, folder: Path) -> Path | None:
        """The stopped run of today's code in a planned run's folder, if there is one."""
        stopped = [run for run in list_run_folders(folder) if run.checkpoint_file.exists()]
        if not stopped:
            return None
        newest = stopped[-1]
        commit = self.options.read_checkpoint_commit(newest.checkpoint_file)
        return newest.path if is_same_code(commit, read_commit()) else None

    def _run_process(self, values: dict[str, object], folder: Path, lock: int | None, gpu: str | None) -> int:
        """run_mm.py in its own process; its exit status."""
        if self._stopping.is_set():
            raise UserError("stopped")
        values = {**values, "show_progress": False}
        if gpu is not None:
            values["gpu_id"] = gpu
        arguments = [format_argument(key, value) for key, value in values.items()]
        command = [sys.executable, str(ROOT / "run_mm.py"), *arguments]
        threads = max(1, self.options.threads // self.options.jobs)
        with (folder / RUN_LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                # the run holds the lock, even if this process is killed
                pass_fds=() if lock is None else (lock,),
            )
            self._processes.add(process)
            if self._stopping.is_set():  # since the check above
                process.terminate()
            try:
                return process.wait()
            finally:
                self._processes.discard(process)


def _check_names(sweep: Sweep, what: str, names: Sequence[Any] | None, known: Sequence[Any]) -> Sequence[Any]:
    """The names, or all known ones.

    Raises:
        ValueError: one is unknown.
    """
    for name in names or ():
        if name not in known:
            texts = [str(one) for one in known]
            cure = suggest_spelling(str(name), texts) or f"; it has {', '.join(texts)}"
            raise UserError(f"{sweep.path} has no {what} {str(name)!r}{cure}")
    return names or known


def _format_row_metrics(path: Path, planned: PlannedRun) -> str:
    """test_unseen in the row of a run."""
    rows = read_result_rows(path)
    row = rows.iloc[list_run_keys(rows).index(make_run_key(planned))]
    values = [f"{metric} {float(row[f'test_unseen.{metric}']):.4f}" for metric in TABLE_METRICS]
    return f"test_unseen {', '.join(values)}"


def _remove_earlier_runs(folder: Path) -> None:
    """Remove what an earlier, unfinished or outdated run left."""
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
