"""What the benchmarks share: fair timing, peak memory, tables, JSON and pictures."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from m2rec.git import read_commit
from m2rec.reports.markdown import format_markdown_table

ROOT = Path(__file__).resolve().parents[2]
# positions in a batch: enough to fill the machine, whatever the length of a sequence
POSITIONS = {"cpu": 64 * 200, "cuda": 2048 * 200}

Row = dict[str, Any]
Series = dict[str, tuple[list[float], list[float]]]


def build_benchmark_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark: device, threads, repeats and the results' folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; each figure is their median")
    folder = ROOT / "runs" / "bench"
    parser.add_argument("--out", type=Path, default=folder, help="folder for JSON and picture")
    parser.add_argument("--name", default=name, help="results are NAME-DEVICE.json and .svg")
    return parser


def parse_benchmark_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; this process then uses their device and threads."""
    args = parser.parse_args()
    _set_threads_and_device(args.device, args.threads)
    return args


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks over sequence lengths."""
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200, 1000, 4000])
    parser.add_argument("--positions", type=int, help="positions in a batch")


def compute_batch_size(args: argparse.Namespace, length: int) -> int:
    """Sequences of a batch that has about `--positions` positions."""
    positions = args.positions or POSITIONS[args.device.split(":")[0]]
    return max(1, round(positions / length))


def _set_threads_and_device(device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    if ":" in device:
        torch.cuda.set_device(device)


def measure_median_seconds(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: str, at_least: float = 0.0
) -> dict[str, float]:
    """Median seconds of each function, all in turn in every round, so that noise affects all alike.

    A function is called once before; one that runs out of a GPU's memory is left out. One that
    takes less than `at_least` seconds is called as often in a row as fills them.
    """
    calls = {}
    for name, function in functions.items():
        try:
            function()
        except torch.OutOfMemoryError:
            print(f"without {name}: out of memory")
            continue
        seconds = _time_calls(function, 1, device)
        calls[name] = max(1, round(at_least / max(seconds, 1e-9)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name in calls:
            rounds[name].append(_time_calls(functions[name], calls[name], device))
    return {name: median(seconds) for name, seconds in rounds.items()}


def _time_calls(function: Callable[[], object], calls: int, device: str) -> float:
    _synchronize_device(device)
    start = perf_counter()
    for _ in range(calls):
        function()
    _synchronize_device(device)
    return (perf_counter() - start) / calls


def _synchronize_device(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


_REPORT_PEAK = """
import atexit, runpy, sys
from pathlib import Path
sys.argv, peak = sys.argv[2:], Path(sys.argv[1])
sys.path[0] = str(Path(sys.argv[0]).parent)
atexit.register(lambda: peak.write_text(Path("/proc/self/status").read_text()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


ProcessCost = tuple[float, float, float]
"""Seconds, CPU seconds of all threads, peak memory in MiB."""


def add_interaction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of benchmarks on random interactions, of which three rounds are enough."""
    parser.set_defaults(repeats=3)
    parser.add_argument("--rows", type=int, default=2_000_000, help="interactions")
    parser.add_argument("--users", type=int, default=100_000)
    parser.add_argument("--items", type=int, default=26_900)


def measure_in_turns(tasks: Mapping[str, Callable[[], ProcessCost]], repeats: int, column: str) -> list[Row]:
    """A row for each task, named in this column: the medians of its costs; in each round all take turns."""
    rounds: dict[str, list[ProcessCost]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, measure in tasks.items():
            rounds[name].append(measure())
    rows = []
    for name, costs in rounds.items():
        seconds, cpu_seconds, peak = (median(values) for values in zip(*costs, strict=True))
        rows.append({column: name, "s": seconds, "CPU s": cpu_seconds, "peak MiB": peak})
    return rows


def measure_process(command: list[str], checkout: Path) -> ProcessCost:
    """Seconds, CPU seconds and peak memory in MiB of a Python script in a new process.

    The process reports its own peak: what the system says of a child counts the parent's memory, too.

    Args:
        command: the script and its arguments.
        checkout: of the package that it imports.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        start = perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", _REPORT_PEAK, str(status_file), *command], env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        peak = _find_status_kib(status_file.read_text(), "VmHWM")
    return seconds, usage.ru_utime + usage.ru_stime, peak / 2**10


def draw_long_tail(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Numbers below n, of which the first 20% are drawn in 54% of all cases."""
    return np.asarray((n * rng.random(size) ** 2.6).astype(np.int64))


def run_in_child_process(args: argparse.Namespace, function: Callable[..., float], *values: Any) -> float:
    """function(*values, device) in a new process, in whose memory there is nothing else."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # memory that this process caches is not free for the other
    with ProcessPoolExecutor(max_workers=1, mp_context=_get_start_context()) as pool:
        return pool.submit(_run_on_device, function, values, args.device, args.threads).result()


def _get_start_context() -> BaseContext:
    """New processes are forks of one that has PyTorch loaded and has done nothing; Windows has none."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _run_on_device(
    function: Callable[..., float], values: tuple[Any, ...], device: str, threads: int
) -> float:
    _set_threads_and_device(device, threads)
    return function(*values, device)


def measure_peak_mib(work: Callable[[], object], device: str) -> float:
    """Peak memory of `work` above what was held before, in MiB; on a CPU only in a new process."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _read_status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the recorded peak
    work()
    return (_read_status_kib("VmHWM") - before) / 2**10


def _read_status_kib(key: str) -> int:
    return _find_status_kib(Path("/proc/self/status").read_text(), key)


def _find_status_kib(status: str, key: str) -> int:
    for line in status.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}; peak memory needs Linux")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs().max().clamp(min=1e-30)
    return float((actual - expected).abs().max() / scale)


def check_equal(
    what: str, actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float
) -> None:
    """Stop the benchmark if tensors differ by more than `tolerance`, relative to the largest value."""
    worst = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    if worst > tolerance:
        raise SystemExit(f"{what} differ: relative error {worst:.1e}")


def print_row(row: Row) -> Row:
    """Print a row as soon as it is measured."""
    print(row, flush=True)
    return row


def write_benchmark_results(args: argparse.Namespace, rows: list[Row], note: str = "", **more: Any) -> None:
    """Print the table and write NAME-DEVICE.json with the command and the machine."""
    print(f"\n{format_benchmark_table(rows)}\n{note}")
    path = _build_result_path(args).with_suffix(".json")
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    record = {
        "command": " ".join(["python", str(shown), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else _read_cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": read_commit(),
        "note": note,
        "rows": rows,
        **more,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


def _build_result_path(args: argparse.Namespace) -> Path:
    """Path of the results without suffix, in a folder that exists."""
    args.out.mkdir(parents=True, exist_ok=True)
    return Path(args.out / f"{args.name}-{args.device.split(':')[0]}")


def _read_cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def format_benchmark_table(rows: list[Row]) -> str:
    """Rows as a Markdown table; numbers with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[_format_table_value(row.get(column, "")) for column in columns] for row in rows]
    return format_markdown_table(columns, lines)


def _format_table_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def collect_series(rows: list[Row], label: str, x: str, y: str) -> Series:
    """By label, the columns x and y of the rows that have a number in y."""
    series: Series = {}
    for row in rows:
        if isinstance(row[y], float):
            xs, ys = series.setdefault(label.format(**row), ([], []))
            xs.append(row[x])
            ys.append(row[y])
    return series


def plot_benchmark_series(args: argparse.Namespace, series: Series, x: str, y: str) -> None:
    """Lines over two logarithmic axes, as NAME-DEVICE.svg."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "m2rec"  # the same picture is the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for label, (xs, ys) in series.items():
        axes.plot(xs, ys, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    ticks = sorted({value for xs, _ in series.values() for value in xs})
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(_build_result_path(args).with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
