"""From raw CSV to a data set: rows per second and peak memory, beside an earlier commit.

    git worktree add ../before COMMIT
    python scripts/bench/raw.py --before=../before                     # 2 million rows
    python scripts/bench/raw.py --before=../before --rows=20_000_000
    python scripts/bench/raw.py --rows=20_000_000 --options --core=5 --by-user

Each round runs `prepare_data.py csv` on the same random file in a new process, in turns; its time is from the
start of the process to its end, with all imports. CPU seconds, of all threads, say more than seconds on a
machine that others use. All must write the same bytes.
"""

import argparse
import filecmp
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
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
from pyarrow import csv

NOW, BEFORE = "now", "before"
_ROWS_AT_ONCE = 1_000_000
_FIRST_TIME, _LAST_TIME = 1_400_000_000_000, 1_700_000_000_000  # milliseconds


def write_random_csv(path: Path, rows: int, users: int, items: int) -> None:
    """Write clicks in the order of time: user, item, rating, time."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(_FIRST_TIME, _LAST_TIME, rows))
    names = ["user", "item", "rating", "time"]
    schema = pa.schema([(name, pa.string()) for name in names])
    with csv.CSVWriter(path, schema, write_options=csv.WriteOptions(quoting_style="none")) as writer:
        for start in range(0, rows, _ROWS_AT_ONCE):
            own_times = times[start : start + _ROWS_AT_ONCE]
            columns = [
                _name_codes("A", draw_long_tail(rng, users, len(own_times))),
                _name_codes("B", draw_long_tail(rng, items, len(own_times))),
                pa.array(rng.choice(["1.0", "2.0", "3.0", "4.0", "5.0"], len(own_times))),
                pa.array(own_times).cast(pa.string()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _name_codes(letter: str, codes: np.ndarray) -> pa.StringArray:
    """Ids of nine characters."""
    digits = pa.array(codes + 10**8).cast(pa.string())
    return pc.utf8_replace_slice(digits, 0, 1, letter)


def prepare(checkout: Path, path: Path, name: str, options: Sequence[str]) -> ProcessCost:
    """What a preparation by a checkout takes."""
    command = [str(checkout / "scripts" / "prepare_data.py"), "csv", f"--interactions={path}"]
    command += [f"--{column}={column}" for column in ("user", "item", "rating", "time")]
    command += [f"--dataset={name}", f"--data-path={path.parent}", *options]
    return measure_process(command, checkout)


def measure_checkouts(args: argparse.Namespace, path: Path) -> list[Row]:
    """A row for each checkout, medians over the rounds; they write the same."""
    checkouts = {NOW: ROOT} | ({BEFORE: args.before.resolve()} if args.before else {})
    tasks = {
        name: partial(prepare, checkout, path, name, args.options) for name, checkout in checkouts.items()
    }
    rows = measure_in_turns(tasks, args.repeats, "reader")
    written = [path.parent / name / f"{name}.inter" for name in checkouts]
    if not all(filecmp.cmp(written[0], other, shallow=False) for other in written):
        raise SystemExit(f"{written[0]} and {written[1]} differ")
    return [print_row({**row, "rows per CPU s": args.rows / row["CPU s"]}) for row in rows]


def build_parser() -> argparse.ArgumentParser:
    """The flags of this benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_raw")
    add_interaction_arguments(parser)
    parser.add_argument("--before", type=Path, help="folder of a checkout of an earlier commit")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further ones of the command")
    return parser


def main() -> None:
    """Run the benchmark."""
    args = parse_benchmark_arguments(build_parser())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clicks.csv"
        write_random_csv(path, args.rows, args.users, args.items)
        size = path.stat().st_size / 2**20
        rows = measure_checkouts(args, path)
    sizes = f"{args.rows:,} rows, up to {args.users:,} users, {args.items:,} items, {size:,.0f} MiB"
    write_benchmark_results(args, rows, f"{sizes}{', ' if args.options else ''}{' '.join(args.options)}")


if __name__ == "__main__":
    main()
