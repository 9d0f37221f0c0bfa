"""Shared helpers: small data sets on disk, runs of the command, NaN in unwritten memory, Triton on a CPU."""

import csv
import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread for each command that they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA's matrix products, the same on each run
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

Rows = Sequence[tuple[object, object, object]]


def pytest_collection_finish() -> None:
    """Leave what is imported, a million objects, out of later garbage collections."""
    torch.use_deterministic_algorithms(True)  # the first call imports half of them: torch._inductor
    torch.use_deterministic_algorithms(False)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """What a command sets for its own process would stay: handlers for this test's stream, and levels."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    root.handlers[:] = before
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("m2rec.") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not forced to the disk: that took a quarter of a small run, and no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def _settled_torch() -> Iterator[None]:
    """Each test starts from the same seed, with NaN where memory is not written."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # on CUDA, a running sum has no such algorithm
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


def write_inter(
    folder: Path, name: str, rows: Rows, header: str = "user_id:token\titem_id:token\ttimestamp:float"
) -> Path:
    """Write folder/name/name.inter and return its path."""
    path = folder / name / f"{name}.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def random_rows(n_users: int = 30, n_items: int = 20, longest: int = 25, seed: int = 0) -> Rows:
    """Histories of 1 to `longest_record` items with tied times, in shuffled file order."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(n_users):
        n = 1 + user % longest
        items, times = rng.integers(n_items, size=n), rng.integers(0, 3 * n, size=n)
        rows += [(f"u{user}", f"i{i}", 978300000 + int(t)) for i, t in zip(items, times, strict=True)]
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the random data set `toy`; returns what data_path should be."""
    write_inter(tmp_path / "data", "toy", random_rows())
    return tmp_path / "data"


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call run_mm.main with arguments; returns exit status, stdout and stderr."""
    from run_mm import main

    def call(*arguments: str, runs_dir: bool = True) -> tuple[int, str, str]:
        own = [f"--runs_dir={tmp_path / 'runs'}"] if runs_dir else []
        status = main([*own, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def write_random_vectors(data_path: Path, dataset: str, tokens: list[str]) -> Path:
    """Write random text vectors (n, 8) for the given tokens beside a data set."""
    from m2rec.text import vector_file

    path = data_path / dataset / f"{dataset}{vector_file.VECTOR_FILE_SUFFIX}"
    vectors = np.random.default_rng(0).normal(size=(len(tokens), 8))
    vector_file.write_text_vectors(path, tokens, vectors, {"model": "random"})
    return path


@pytest.fixture
def write_vectors() -> Callable[..., Path]:
    """The function `write_random_vectors`."""
    return write_random_vectors


def copy_run(source: Path, target: Path) -> Path:
    """Copy a folder with `data` and one run in `runs`; the copy of the run is as if it was trained there.

    So the tests of a file share one training, and each may change its files.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    (folder,) = (target / "runs").iterdir()
    config = folder / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(source), str(target)), encoding="utf-8")
    return folder


def small(data_path: Path, dataset: str = "toy", **others: object) -> dict[str, object]:
    """Values for a quick run; all others are the fixed defaults."""
    return {
        "auto": False,
        "dataset": dataset,
        "data_path": str(data_path),
        "MAX_ITEM_LIST_LENGTH": 10,
        "epochs": 2,
        "hidden_size": 16,
        "inner_size": 16,
        "head_dim": 16,
        "d_state": 4,
        "n_layers": 2,
        "topk": [5, 10],
        "gpu_id": "",
        "baselines": False,  # they and the pictures of the report take longer than the run
        "report": False,
        **others,
    }


def as_arguments(values: dict[str, object]) -> list[str]:
    """The same values as command-line arguments."""
    return [f"--{key}={value}" for key, value in values.items()]


SWEEP = """
title: Toys
datasets: [toy]
seeds: [1, 2]
variants:
  M2Rec: {}
  SASRec: {model: SASRec}
  "no filter | gate": {filter: none}
tables:
  main: [M2Rec, SASRec]
  ablations: [M2Rec, "no filter | gate"]
reference: M2Rec
baselines: [SASRec]
"""
COMMON = {
    "dataset": "toy", "commit": "0123456789abcdef", "settings": "{}", "split": "leave_one_out",
    "time_order": "exact", "users": "2000", "items": "50", "interactions": "123456", "device": "cpu",
}  # fmt: skip


def answer(variant: str, seed: int, ndcg: float, **others: object) -> dict[str, object]:
    """A row of a sweep's CSV; every metric follows from one number."""
    metrics = {"test_unseen.ndcg@10": ndcg, "test_unseen.hit@10": 2 * ndcg, "test.ndcg@10": ndcg / 2,
               "test.hit@10": ndcg, "valid.ndcg@10": 0.6, "test_unseen.itemcoverage@10": 0.25}  # fmt: skip
    times = {"best_epoch": 3, "seconds_per_epoch": 1.234, "seconds_training": 60 + seed}
    buckets = {
        f"{column}|{kind}": value
        for kind in ("popularity=0", "popularity=1-5", "popularity=101+", "history=1-5", "history=201+")
        for column, value in (("test_unseen.ndcg@10", ndcg), ("test_users", 1000))
    }
    settings = {"SASRec": '{"model": "SASRec"}', "no filter | gate": '{"filter": "none"}'}
    others = {"settings": settings.get(variant, "{}"), **others}
    return {**COMMON, "variant": variant, "seed": seed, **metrics, **times, **buckets, **others}


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Write results/toys.yaml and results/toys.csv with the given rows; returns the YAML's path."""

    def write(*rows: dict[str, object], text: str = SWEEP) -> Path:
        path = tmp_path / "results" / "toys.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if rows:
            with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
                writer.writeheader()
                writer.writerows(rows)
        return path

    return write


def built(data_path: Path, stock: bool = False, **others: Any) -> list[Any]:
    """Training, validation and test data sets, of ours or of stock RecBole."""
    from m2rec.compat import SequentialDataset, data_preparation
    from m2rec.data.dataset import HistoryDataset
    from m2rec.training.configuration import build_config

    config = build_config(small(data_path, **others))
    dataset = (SequentialDataset if stock else HistoryDataset)(config)
    return [loader.dataset for loader in data_preparation(config, dataset)]
