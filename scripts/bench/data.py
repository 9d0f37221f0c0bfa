"""From the command to the model: seconds and peak memory of loading interactions, beside a plain reader.

    python scripts/bench/data.py                                    # 2 million rows
    python scripts/bench/data.py --rows=20_000_000 --users=1_000_000 --items=269_000
    python scripts/bench/data.py --file=dataset/ml-1m/ml-1m.inter --length=200 --training-rows=prefix

The yardstick is what no loader can do without: pyarrow reads the same file and sorts it once by user and
time. A second start takes the interactions from `data_cache`, if the file is large enough. Each task runs in
its own process, in turns; its time is from the start of the process to its end, with all imports. CPU
seconds, of all threads, say more than seconds on a machine that others use. The data are random: users and
items have long tails, and the lines are in the order of time.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from benchmarking import (
    ROOT,
    ProcessCost,
    Row,
    add_interaction_arguments,
    build_benchmark_parser,
    draw_long_tail,
    measure_in_turns,
    measure_process,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)

NAME = "bench"
YARDSTICK = "pyarrow reads, one sort"
LOAD = "command to model built"
LOAD_AGAIN = "second start"
_LINES_AT_ONCE = 1_000_000
_FIRST_TIME, _LAST_TIME = 1_400_000_000, 1_700_000_000  # seconds


def write_random_interactions(folder: Path, rows: int, users: int, items: int) -> Path:
    """Write folder/bench/bench.inter in the order of time and return its path."""
    rng = np.random.default_rng(0)
    path = folder / NAME / f"{NAME}.inter"
    path.parent.mkdir(parents=True)
    user_names, item_names = rng.permutation(users), rng.permutation(items)
    times = np.sort(rng.integers(_FIRST_TIME, _LAST_TIME, rows))
    with path.open("w", encoding="utf-8") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for start in range(0, rows, _LINES_AT_ONCE):
            own_times = times[start : start + _LINES_AT_ONCE].tolist()
            own_users = user_names[draw_long_tail(rng, users, len(own_times))].tolist()
            own_items = item_names[draw_long_tail(rng, items, len(own_times))].tolist()
            lines = zip(own_users, own_items, own_times, strict=True)
            file.writelines(f"u{user}\ti{item}\t{time}\n" for user, item, time in lines)
    return path


def read_and_sort(path: Path) -> None:
    """The yardstick: columns with dictionaries, sorted by user and time."""
    import pyarrow as pa
    from pyarrow import csv

    tokens = pa.dictionary(pa.int32(), pa.string())
    types = {"user_id:token": tokens, "item_id:token": tokens, "timestamp:float": pa.float64()}
    convert = csv.ConvertOptions(column_types=types)
    table = csv.read_csv(path, None, csv.ParseOptions(delimiter="\t"), convert).unify_dictionaries()
    users, times = table["user_id:token"].combine_chunks(), table["timestamp:float"].to_numpy()
    order = np.lexsort((times, users.indices.to_numpy()))
    table.take(order)


def load_run(path: Path, length: int, training_rows: str) -> None:
    """All that a run without text does before its first step."""
    from m2rec.training.configuration import build_config
    from m2rec.training.run import prepare_run

    values = {
        "auto": False,
        "baselines": False,
        "dataset": path.stem,
        "data_path": str(path.parent.parent),
        "gpu_id": "",
        "MAX_ITEM_LIST_LENGTH": length,
        "report": False,
        "rows": training_rows,
        "text_vectors": "none",
    }
    with tempfile.TemporaryDirectory() as runs:
        prepare_run(build_config({**values, "runs_dir": runs}))


def measure_task(task: str, path: Path, args: argparse.Namespace) -> ProcessCost:
    """Seconds, CPU seconds and peak memory in MiB of this script with `--task`, in a new process."""
    if task == LOAD:
        for kept in path.parent.glob("*.cache-*.arrow"):
            kept.unlink()
    options = [f"--file={path}", f"--length={args.length}", f"--training-rows={args.training_rows}"]
    return measure_process([str(Path(__file__).resolve()), f"--task={task}", *options], ROOT)


def measure_tasks(path: Path, args: argparse.Namespace) -> list[Row]:
    """A row for each task, medians over the rounds; and how they compare."""
    tasks = {task: partial(measure_task, task, path, args) for task in (YARDSTICK, LOAD, LOAD_AGAIN)}
    yardstick, *starts = measure_in_turns(tasks, args.repeats, "task")
    rows = []
    for row in (yardstick, *starts):
        ratio = row["CPU s"] / yardstick["CPU s"]
        rows.append(print_row({**row, "times the yardstick's CPU s": ratio}))
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark; `--task` is for the processes that it starts."""
    parser = build_benchmark_parser(__doc__, "bench_data")
    add_interaction_arguments(parser)
    parser.add_argument("--length", type=int, default=50, help="L")
    parser.add_argument("--training-rows", choices=["dense", "prefix"], default="dense")
    parser.add_argument("--task", choices=[YARDSTICK, LOAD, LOAD_AGAIN], help=argparse.SUPPRESS)
    file_help = "a NAME/NAME.inter in place of random interactions; its caches are removed"
    parser.add_argument("--file", type=Path, help=file_help)
    return parser


def main() -> None:
    """Run the benchmark."""
    args = parse_benchmark_arguments(build_parser())
    if args.task == YARDSTICK:
        read_and_sort(args.file)
    elif args.task:
        load_run(args.file, args.length, args.training_rows)
    elif args.file:
        path = args.file.resolve()
        write_benchmark_results(args, measure_tasks(path, args), f"{path.name}, L = {args.length}")
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = write_random_interactions(Path(folder), args.rows, args.users, args.items)
            size = path.stat().st_size / 2**20
            rows = measure_tasks(path, args)
        note = f"{args.rows:,} interactions, {args.users:,} users, {args.items:,} items, {size:,.0f} MiB"
        write_benchmark_results(args, rows, f"{note}, L = {args.length}")


if __name__ == "__main__":
    main()
