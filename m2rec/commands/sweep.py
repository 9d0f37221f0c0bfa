"""Run a sweep: python scripts/sweep.py results/NAME.yaml [--jobs=N] [--data-path=DIR].

The file plans every variant on every data set with every seed; each finished run becomes a row of
results/NAME.csv. Runs are made in parallel: one per GPU, or --jobs at a time, which share GPUs and cores.
A sweep can be stopped at any time: runs in the CSV are not made again, and a run that was cut off is
resumed from its last checkpoint. Several sweeps of one file may run side by side; each run is made by one
of them. A run whose settings in the file have changed is made again. If a default has changed in the code,
delete the rows that no longer hold and their run folders. What the file leaves open is as for run_mm.py
--auto=false.

--only, --datasets and --seeds choose among the runs. --again repeats runs that results/NAME.csv has, keeps
their rows in runs/sweeps/again/NAME.csv, and shows both results.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2rec.cli import Parser, run_command
from m2rec.git import join_commits
from m2rec.training.signals import StopRequest

if TYPE_CHECKING:
    from m2rec.experiments.sweep_runner import SweepOptions

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns 1 if a run failed, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with StopRequest(at_once=True):
        return run_command(
            "sweep.py",
            lambda: run_sweep(parse_options(arguments)),
            when_stopped="; run the same command to resume",
        )


def run_sweep(options: argparse.Namespace) -> int:
    """Run what the sweep plans; returns 1 if a run failed."""
    from m2rec.experiments.sweep_plan import Sweep
    from m2rec.experiments.sweep_runner import SweepRunner

    runner = SweepRunner(Sweep.read(options.sweep), build_sweep_options(options))
    failures = runner.run()
    print(runner.output_csv)
    return int(failures > 0)


def build_sweep_options(options: argparse.Namespace) -> "SweepOptions":
    """How the command line and this machine run a sweep."""
    import torch

    from m2rec.experiments.sweep_runner import SweepOptions

    gpus = torch.cuda.device_count()
    return SweepOptions(
        runs=options.runs,
        jobs=options.jobs or max(1, gpus),
        gpus=gpus,
        threads=torch.get_num_threads(),
        read_checkpoint_commit=read_checkpoint_commit,
        data_path=options.data_path,
        variants=options.only,
        datasets=options.datasets,
        seeds=options.seeds,
        again=options.again,
        allow_dirty=options.allow_dirty,
    )


def read_checkpoint_commit(path: Path) -> str | None:
    """The commit that a checkpoint notes; an empty one if it can't be read."""
    from m2rec.training import checkpoint  # loads PyTorch

    try:
        notes = checkpoint.read_checkpoint_numbers(path)["notes"]
        return join_commits(checkpoint.read_commits(notes))
    except (LookupError, TypeError, ValueError):
        return ""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser("sweep.py", __doc__)
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
    options = parser.parse_args(arguments)
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: expected a whole number from 1, got {options.jobs}")
    return options
