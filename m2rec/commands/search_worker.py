"""A worker of run_mm.py --search: a process that trains trials until none is left."""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import logging
import multiprocessing
import os
import threading
from dataclasses import replace
from multiprocessing.process import BaseProcess

from m2rec.experiments.search import SearchTask, run_trials
from m2rec.experiments.search_pool import find_worker_log
from m2rec.experiments.study import check_optuna, make_halving_pruner, open_study


def start_worker(task: SearchTask, index: int, threads: int, gpu: str | None) -> BaseProcess:
    """Start a worker with its share of the threads, or its GPU."""
    process = multiprocessing.get_context("spawn").Process(target=run_worker, args=(task, index, gpu))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # it is read when PyTorch is loaded
    try:
        process.start()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return process


def run_worker(task: SearchTask, index: int, gpu: str | None) -> None:
    """Run trials; what is logged goes into the worker's file."""
    log = os.open(find_worker_log(task.folder, index), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    _end_with_parent()

    from m2rec.commands.trials import TrialTrainer
    from m2rec.training.signals import StopRequest

    if gpu is not None:
        task = replace(task, fixed={**task.fixed, "gpu_id": gpu})
    check_optuna()
    study = open_study(task.folder, task.is_maximized, make_halving_pruner(task.first_epochs))
    n_profiles = sum("profile" in trial.user_attrs for trial in study.trials)
    with StopRequest(at_once=True):
        try:
            run_trials(study, task, TrialTrainer(), may_wait=index < n_profiles)
        except KeyboardInterrupt:
            logging.getLogger(__name__).info("stopped; the trial can be resumed")


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, as after kill -9."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
