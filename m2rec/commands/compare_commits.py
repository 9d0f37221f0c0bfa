"""Check that a change of the code changes no digit.

python scripts/compare_commits.py COMMIT makes the same runs with that commit and with the working tree and
compares them value by value: losses, metrics, the rank of each test target, what gate and filter do, weights.
The data are 200 users of ml-100k with their item text, or a data set of --data-path.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = "ml-100k-200-users"
RUNS = {
    "defaults": [],
    "mamba": ["--mixer=mamba"],
    "prefix": ["--rows=prefix"],
    "SASRec": ["--model=SASRec"],
    "sampled": ["--loss_type=sampled"],
}
MEASURED_ANEW = ["seconds", "peak_memory_mib"]  # differ between two equal runs


def main() -> int:
    options = parse_options()
    if options.dataset == SMALL:
        write_small_data(options.folder / "data" / SMALL)
        options.keys += " --text_encoder=lsa"
    differences = 0
    for run in options.runs:
        before = make_run(options, run, options.commit)
        after = make_run(options, run, None)
        changes = list(compare_values(read_values(before), read_values(after)))
        print(f"{run}: {len(changes)} values differ", *changes[:10], sep="\n  ", flush=True)
        differences += len(changes)
    return 1 if differences else 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commit", help="the commit to compare the working tree with")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="default: all")
    parser.add_argument("--dataset", default=SMALL, help="default: 200 users of ml-100k")
    parser.add_argument("--data-path", type=Path, help="where the data set lies")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--keys", default="", help="more keys of all runs, as --hidden_size=32")
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"), help="for data and runs")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    options.data_path = (options.data_path or options.folder / "data").resolve()
    return options


def write_small_data(folder: Path, users: int = 200) -> None:
    """Write the first users of the ml-100k that comes with RecBole, and all its items."""
    spec = find_spec("recbole")
    assert spec and spec.origin
    source = Path(spec.origin).parent / "dataset_example" / "ml-100k"
    rows = pd.read_csv(source / "ml-100k.inter", sep="\t", dtype=str)
    kept = rows["user_id:token"].unique()[:users]
    folder.mkdir(parents=True, exist_ok=True)
    rows[rows["user_id:token"].isin(kept)].to_csv(folder / f"{SMALL}.inter", sep="\t", index=False)
    (folder / f"{SMALL}.item").write_bytes((source / "ml-100k.item").read_bytes())


def make_run(options: argparse.Namespace, run: str, commit: str | None) -> Path:
    """A finished run's folder; runs of a commit are reused, runs of the working tree are made again."""
    runs: Path = options.folder / (commit or "working-tree") / f"{options.dataset}-{options.epochs}-{run}"
    if commit and (finished := list(runs.glob("*/metrics.json"))):
        return finished[0].parent
    if commit is None:
        return train_model(ROOT, options, run, runs)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, commit], cwd=ROOT, check=True)
        try:
            return train_model(tree, options, run, runs)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


def train_model(tree: Path, options: argparse.Namespace, run: str, runs: Path) -> Path:
    knows_auto = re.search(r"^# auto: ", (tree / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    command = [
        sys.executable,
        "run_mm.py",
        f"--dataset={options.dataset}",
        f"--data_path={options.data_path}",
        f"--epochs={options.epochs}",
        f"--runs_dir={runs}",
        "--show_progress=false",
        *(["--auto=false"] if knows_auto else []),
        *RUNS[run],
        *options.keys.split(),
    ]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)
    return max(runs.iterdir(), key=lambda folder: folder.stat().st_mtime)


def read_values(folder: Path) -> dict[str, Any]:
    """All numbers that a run leaves, by file and name."""
    values: dict[str, Any] = {}
    for name in ("metrics.json", "insights.json"):
        if (folder / name).exists():
            values |= flatten_numbers(name, json.loads((folder / name).read_text()))
    for name in ("history.csv", "test_ranks.csv"):
        rows = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        for column in rows.columns.difference(MEASURED_ANEW):
            values |= {f"{name} {number} {column}": value for number, value in rows[column].items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values[f"weights {name}"] = (tensor.shape, tensor.tobytes())
    return values


def flatten_numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value} if isinstance(value, int | float) else {}
    numbers: dict[str, float] = {}
    for key, part in value.items():
        if key not in MEASURED_ANEW:
            numbers |= flatten_numbers(f"{name} {key}", part)
    return numbers


def compare_values(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """A line for each value that is missing or different in one of them."""
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if old != new:
            yield name if name.startswith("weights") else f"{name}: {old} -> {new}"
