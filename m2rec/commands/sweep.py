"""Run a sweep: python scripts/sweep.py results/NAME.yaml [--jobs=N] [--data-path=DIR].

The file asks for every variant on every data set with every seed; each finished run becomes a
row of results/NAME.csv. Runs go in parallel: one per GPU, or as many as --jobs says, which share
GPUs and cores. Stop it whenever you like: what is in the CSV is not run again, and a run that was
cut off goes on where it was last kept. Several sweeps of one file may run side by side; each run is
taken by one of them. A run whose settings in the file have changed is run again; if a default has
changed in the code, only you know whether a row still holds: of those that don't, delete the row and the
run's folder.

--only, --datasets and --seeds choose among the runs. --again runs those that results/NAME.csv has once
more, keeps their rows in runs/sweeps/again/NAME.csv, and shows what both say.
"""

import argparse
import fcntl
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch
from tqdm import tqdm

from m2rec.cli import Parser, run_command
from m2rec.errors import UserError
from m2rec.experiments.ledger import (
    TABLE_METRICS,
    build_result_row,
    format_settings,
    make_run_key,
    read_result_rows,
    read_run_key,
    write_result_rows,
)
from m2rec.experiments.sweep_plan import PlannedRun, Sweep, find_finished_run, get_planned_run_folder
from m2rec.git import is_same_code, join_commits, read_commit
from m2rec.run_folder import list_run_folders
from m2rec.storage import lock_path, write_text
from m2rec.training import checkpoint
from m2rec.training.checkpoint import CannotResume
from m2rec.yaml_values import format_argument, suggest_spelling

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
RUN_SETTINGS_FILE = "settings.json"
RUN_LOG_FILE = "log.txt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns 1 if a run failed, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command("sweep.py", lambda: run_sweep(parse_options(arguments)))


def run_sweep(options: argparse.Namespace) -> int:
    """Run what the sweep plans; returns 1 if a run failed."""
    sweep = Sweep.read(options.sweep)
    if not options.allow_dirty:
        check_committed_code()
    return SweepRunner(sweep, options).run()


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="FILE.yaml")
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at a time; by default one per GPU, which several can share, on a CPU one",
    )
    parser.add_argument("--data-path", "--data_path", help="folder that holds the data sets' folders")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="only these variants")
    parser.add_argument("--datasets", nargs="+", metavar="NAME", help="only these data sets")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="only these seeds")
    parser.add_argument("--again", action="store_true", help="repeat finished runs, and compare")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "sweeps", help="folder for the runs")
    parser.add_argument("--allow-dirty", action="store_true", help="run code that is not committed")
    return parser.parse_args(arguments)


def check_committed_code() -> None:
    """Results must name the code they are of.

    Raises:
        ValueError: tracked files have changes that are not committed.
    """
    found = read_commit()
    if found is None or found.endswith("+dirty"):
        raise UserError(
            "the code is not what a commit says, so its results could not be repeated; "
            "commit it, or say --allow-dirty"
        )


@dataclass
class SweepRunner:
    """A sweep while it runs."""

    sweep: Sweep
    options: argparse.Namespace
    stop: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.csv = self.known = self.sweep.path.with_suffix(".csv")
        self.folder = self.options.runs / self.sweep.name
        if self.options.again:
            self.folder = self.options.runs / "again" / self.sweep.name
            self.csv = self.folder.with_name(self.known.name)
        gpus = torch.cuda.device_count()
        self.jobs = max(1, gpus) if self.options.jobs is None else self.options.jobs
        if self.jobs < 1:
            raise UserError(f"--jobs: expected a whole number from 1, got {self.jobs}")
        self.running: set[subprocess.Popen[bytes]] = set()
        self.slots: SimpleQueue[str | None] = SimpleQueue()
        for job in range(self.jobs):
            self.slots.put(str(job % gpus) if gpus else None)

    def run(self) -> int:
        """Run what is missing; returns 1 if anything failed or was left to another sweep."""
        cells = self._select_pending_runs()
        self.folder.mkdir(parents=True, exist_ok=True)
        failures: list[str] = []
        with ThreadPoolExecutor(self.jobs) as pool, tqdm(total=len(cells), unit="run") as bar:
            try:
                under_way = {pool.submit(self._run_with_lock, cell): cell for cell in cells}
                for done in as_completed(under_way):
                    cell, problem = under_way[done], done.result()
                    bar.update()
                    name = f"{cell.dataset}, {cell.variant}, seed {cell.seed}"
                    bar.write(f"{name}: {problem or self._describe_result(cell)}", file=sys.stderr)
                    failures += [name] if problem else []
            except KeyboardInterrupt:
                self.stop.set()
                for process in list(self.running):
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                sys.stderr.write(
                    f"sweep.py: stopped; the same command goes on, {self.csv} has what is done\n"
                )
                return 130
        print(self.csv)
        return int(bool(failures))

    def _select_pending_runs(self) -> list[PlannedRun]:
        """The chosen cells without a row of their settings, or with --again those with one."""
        known = {read_run_key(row) for row in read_result_rows(self.known)}
        cells = [
            cell
            for cell in self._select_planned_runs()
            if (make_run_key(cell) in known) == self.options.again
        ]
        if self.options.again and not cells:
            raise UserError(f"--again: {self.known} has no row of these runs with today's settings")
        return cells

    def _select_planned_runs(self) -> list[PlannedRun]:
        """The cells of the variants, data sets and seeds that the command line names, all by default.

        Raises:
            ValueError: the sweep does not have one of them.
        """
        sweep, options = self.sweep, self.options
        choices = (
            ("--only", "variant", options.only, tuple(sweep.variants)),
            ("--datasets", "data set", options.datasets, sweep.datasets),
            ("--seeds", "seed", options.seeds, sweep.seeds),
        )
        for option, what, names, known in choices:
            has = [str(name) for name in known]
            for name in map(str, names or ()):
                if name not in has:
                    cure = suggest_spelling(name, has) or f"; it has {', '.join(has)}"
                    raise UserError(f"{option}: {sweep.path} has no {what} {name!r}{cure}")
        variants, datasets, seeds = (names or known for _, _, names, known in choices)
        return [
            cell
            for cell in sweep.planned_runs()
            if cell.variant in variants and cell.dataset in datasets and cell.seed in seeds
        ]

    def _describe_result(self, cell: PlannedRun) -> str:
        """What a finished run came to, for the screen; with --again, what the first one did."""
        found = f"done, {_format_row_metrics(self.csv, cell)}"
        return (
            f"{found}; {self.known} has {_format_row_metrics(self.known, cell)}"
            if self.options.again
            else found
        )

    def _run_with_lock(self, cell: PlannedRun) -> str | None:
        """Run a cell unless another sweep is at it; what went wrong, or None."""
        if self.stop.is_set():
            return "stopped"
        slot = self.slots.get()
        try:
            folder = get_planned_run_folder(self.folder, cell.dataset, cell.variant, cell.seed)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return "another process is at it"
                return self._run_planned(cell, folder, lock.fileno(), slot)
        except (ValueError, OSError) as error:
            return str(error)
        finally:
            self.slots.put(slot)

    def _run_planned(self, cell: PlannedRun, folder: Path, lock: int, gpu: str | None) -> str | None:
        """Run a cell and keep its row; a finished run that is only missing in the CSV is taken as it is."""
        if cell not in Sweep.read(self.sweep.path).planned_runs():
            return f"{self.sweep.path} has changed; start the sweep again"
        settings = format_settings(cell.keys)
        known = folder / RUN_SETTINGS_FILE
        current = known.is_file() and known.read_text(encoding="utf-8") == settings
        row = self._reuse_finished_run(cell, folder) if current else None
        if row is None:
            if not self.options.allow_dirty:
                check_committed_code()  # somebody may have gone on working
            stopped = find_resumable_run(folder) if current else None
            status = self._run_training_process(cell, folder, gpu, stopped, lock) if stopped else None
            if status in (None, CannotResume.exit_status) and not self.stop.is_set():
                _remove_earlier_runs(folder)
                write_text(known, settings)
                status = self._run_training_process(cell, folder, gpu, None, lock)
            if status:
                last = (folder / RUN_LOG_FILE).read_text(encoding="utf-8").strip().splitlines()[-1]
                return f"failed: {last} ({folder / RUN_LOG_FILE})"
            finished = find_finished_run(folder)
            if finished is None:
                return f"failed: no run in {folder}"
            row = build_result_row(cell, finished)
        self._save_result_row(cell, row)
        return None

    def _reuse_finished_run(self, cell: PlannedRun, folder: Path) -> dict[str, Any] | None:
        """The row of a run that is finished, if there is one that today's code can read.

        What is run again must be of today's code, too.
        """
        finished = find_finished_run(folder)
        try:
            row = build_result_row(cell, finished) if finished else None
        except ValueError as error:
            logger.warning("%s", error)
            return None
        if row is None or (self.options.again and not is_same_code(row["commit"], read_commit())):
            return None
        logger.info("%s is taken as it is, of commit %s", finished, row["commit"])
        return row

    def _run_training_process(
        self, cell: PlannedRun, folder: Path, gpu: str | None, resumes: Path | None, lock: int
    ) -> int:
        """run_mm.py in a process of its own; its exit status."""
        command = [
            sys.executable,
            str(ROOT / "run_mm.py"),
            *self._build_arguments(cell, folder, gpu, resumes),
        ]
        with (folder / RUN_LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(f"{shlex.join(command)}\n")
            file.flush()
            # the lock lives as long as the run does, whatever becomes of this process
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=file, env=self._build_environment(), pass_fds=(lock,)
            )
            self.running.add(process)
            if self.stop.is_set():  # between the look at it and now
                process.terminate()
            try:
                return process.wait()
            finally:
                self.running.discard(process)

    def _build_arguments(
        self, cell: PlannedRun, folder: Path, gpu: str | None, resumes: Path | None
    ) -> list[str]:
        path = self.options.data_path
        values = {"dataset": cell.dataset, **cell.keys, "seed": cell.seed, "runs_dir": str(folder.resolve())}
        values |= {"data_path": str(Path(path).resolve())} if path else {}
        if resumes is not None:
            values = {"resume": str(resumes.resolve())}
        values |= {"show_progress": False, **({"gpu_id": gpu} if gpu else {})}
        return [format_argument(key, value) for key, value in values.items()]

    def _build_environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}

    def _save_result_row(self, cell: PlannedRun, row: dict[str, Any]) -> None:
        """Put a row into the CSV, in the sweep's order, in the place of an earlier one of its cell."""
        with lock_path(self.sweep.path):
            rows = {read_run_key(row)[:3]: row for row in read_result_rows(self.csv)}
            rows[make_run_key(cell)[:3]] = row
            order = [key for one in self.sweep.planned_runs() if (key := make_run_key(one)[:3]) in rows]
            order += [key for key in rows if key not in order]
            write_result_rows(self.csv, [rows[key] for key in order])


def _format_row_metrics(path: Path, cell: PlannedRun) -> str:
    """What the row of a cell says of test_unseen."""
    row = [row for row in read_result_rows(path) if read_run_key(row) == make_run_key(cell)][-1]
    return "test_unseen " + ", ".join(
        f"{name} {float(row[f'test_unseen.{name}']):.4f}" for name in TABLE_METRICS
    )


def find_resumable_run(folder: Path) -> Path | None:
    """The run of today's code in a cell's folder that can go on, if there is one."""
    unfinished = [run for run in list_run_folders(folder) if run.checkpoint_file.exists()]
    if not unfinished:
        return None
    newest = unfinished[-1]
    try:
        numbers = checkpoint.read_checkpoint_numbers(newest.checkpoint_file)
        commits = join_commits(checkpoint.read_commits(numbers["notes"]))
    except (LookupError, TypeError, ValueError):
        return None
    return newest.path if is_same_code(commits, read_commit()) else None


def _remove_earlier_runs(folder: Path) -> None:
    """Take away what an earlier, unfinished or outdated run left."""
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        shutil.rmtree(path)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has its background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    sys.exit(main())
