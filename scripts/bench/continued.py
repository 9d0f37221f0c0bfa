"""A model that is trained further on new interactions, against one that is trained anew on all of them.

    python scripts/bench/continued.py --dataset=amazon-toys-games --data-path=dataset
    python scripts/bench/continued.py --dataset=amazon-toys-games --seeds 1 2 3 --settings hidden_size=64

The data set is cut by time into --parts parts of equally many interactions; interactions at the same time
stay together. The first half of the parts trains the first model. Then each other part is added to the data.
One model is trained anew on all data so far, and one continues the last model (`continue_from`). Both are
tested on the same users: leave-one-out on the data so far. CPU time is that of all threads, which other
processes on the machine disturb less; total is from the data to the metrics, without the baselines.
"""

import argparse
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import pandas as pd
from benchmarking import (
    Row,
    build_benchmark_parser,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)

from m2rec.compat import find_data_folder
from m2rec.data.columns import filter_by_counts
from m2rec.training.continued_run import build_run_config
from m2rec.training.run import prepare_run
from m2rec.yaml_values import parse_arguments

METRIC = "ndcg@10"
QUALITY, ALONE = f"{METRIC} test_unseen", f"{METRIC} without neighbours"
TRAINING, TOTAL = "training, CPU s", "total, CPU s"
RATIOS = {METRIC: QUALITY, "without neighbours": ALONE, "training": TRAINING, "total": TOTAL}


def read_interactions(path: Path, min_user_count: int, min_item_count: int) -> pd.DataFrame:
    """The core of a file of interactions, as texts: each user and item has so many of them at least."""
    frame = pd.read_csv(path, sep="\t", dtype=str, quoting=3, keep_default_na=False)
    codes = [pd.factorize(frame[column])[0] for column in ("user_id:token", "item_id:token")]
    checks = [lambda counts: counts >= min_user_count, lambda counts: counts >= min_item_count]
    return frame[filter_by_counts(codes, checks).is_kept]


def write_first_parts(frame: pd.DataFrame, share: float, folder: Path) -> str:
    """Write the first share of the interactions by time as a data set; returns its name."""
    times = frame["timestamp:float"].astype(float)
    last = times.sort_values().iloc[round(share * len(times)) - 1]
    name = f"first-{100 * share:.0f}"
    (folder / name).mkdir()
    frame[times <= last].to_csv(folder / name / f"{name}.inter", sep="\t", index=False, quoting=3)
    return name


def measure_run(settings: dict[str, Any], **others: Any) -> tuple[Path, Row]:
    """Train and test; returns the run folder and a part of the table's row."""
    start = process_time()
    prepared = prepare_run(build_run_config({**settings, **others}))
    before = process_time()
    prepared.train()
    after = process_time()
    result = prepared.evaluate()
    metrics = result.metrics
    row: Row = {
        "items": metrics["data"]["items"],
        "users": metrics["data"]["users"],
        "epochs": metrics["epochs"],
        QUALITY: metrics["test_unseen"][METRIC],
        ALONE: (metrics["without_neighbors"] or metrics)["test_unseen"][METRIC],
        TRAINING: after - before,
        TOTAL: process_time() - start,
    }
    return result.folder, row


def measure_seed(args: argparse.Namespace, frame: pd.DataFrame, seed: int, folder: Path) -> list[Row]:
    """All runs with one seed."""
    own = parse_arguments(f"--{setting}" for setting in args.settings)
    shared = {"data_path": str(folder), "runs_dir": str(args.out / "runs"), "seed": seed, "baselines": False}
    shared |= {"report": False, "text_vectors": str(args.text_vectors or "none"), "show_progress": False}
    continued = parse_arguments(f"--{setting}" for setting in args.continued)
    rows, last = [], Path()
    for n_parts in range(args.parts // 2, args.parts + 1):
        share = n_parts / args.parts
        name = f"first-{100 * share:.0f}"
        if not (folder / name).exists():
            write_first_parts(frame, share, folder)
        anew, row = measure_run({**own, **shared}, dataset=name)
        start: Row = {"seed": seed, "data": f"{share:.0%}"}
        rows.append(print_row({**start, "model": "anew", **row}))
        if n_parts == args.parts // 2:
            last = anew
            continue
        taken = {key: shared[key] for key in ("data_path", "seed")}
        last, further = measure_run({**taken, **continued}, dataset=name, continue_from=str(last))
        ratios = {f"{name}: ratio": further[column] / row[column] for name, column in RATIOS.items()}
        rows.append(print_row({**start, "model": "continued", **further, **ratios}))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_continued")
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data-path", type=Path, default=Path("dataset"))
    parser.add_argument("--text-vectors", type=Path, help="file of text vectors; without it no text")
    parser.add_argument("--min-user-count", type=int, default=1, help="interactions of a user")
    parser.add_argument("--min-item-count", type=int, default=1, help="interactions of an item")
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--settings", nargs="*", default=[], help="KEY=VALUE of all models")
    parser.add_argument("--continued", nargs="*", default=[], help="KEY=VALUE of those that continue another")
    args = parse_benchmark_arguments(parser)
    path = find_data_folder(args.data_path, args.dataset) / f"{args.dataset}.inter"
    frame = read_interactions(path, args.min_user_count, args.min_item_count)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            rows += measure_seed(args, frame, seed, Path(folder))
    note = f"{len(frame):,} interactions of {args.dataset}; {' '.join(args.settings)}"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
