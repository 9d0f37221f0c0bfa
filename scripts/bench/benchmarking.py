"""What the benchmarks share: fair timing, peak memory, tables, JSON and pictures."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from m2rec.git import read_commit

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def build_benchmark_parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: device, threads, repeats and where results go."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on a CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; each figure is their median")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "bench", help="folder for JSON and picture"
    )
    parser.add_argument("--name", default=name, help="results are NAME-DEVICE.json and .svg")
    return parser


def set_threads_and_device(device: str, threads: int) -> None:
    """Use so many threads, and the GPU that `device` names, in this process."""
    torch.set_num_threads(threads)
    if ":" in device:
        torch.cuda.set_device(device)


def measure_median_seconds(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: str, at_least: float = 0.0
) -> dict[str, float]:
    """Median seconds of each function, all in turn in every round, so that noise meets them alike.

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
        calls[name] = max(1, round(at_least / max(_time_calls(function, 1, device), 1e-9)))
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


def run_in_child_process(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a fresh process, whose memory nothing else has touched."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process keeps, the other can't have
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure_peak_mib(work: Callable[[], object], device: str) -> float:
    """Most memory that `work` held above what was held before, in MiB; on a CPU in a fresh process only."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = _read_status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work()
    return (_read_status_kib("VmHWM") - before) / 2**10


def _read_status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}; peak memory needs Linux")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def write_benchmark_results(args: argparse.Namespace, rows: list[Row], note: str = "", **more: Any) -> None:
    """Print the table and write NAME-DEVICE.json with the command and the machine."""
    table = format_benchmark_table(rows)
    print(f"\n{table}\n{note}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = build_result_path(args).with_suffix(".json")
    record = {
        "command": _format_command_line(),
        **describe_benchmark_machine(args),
        "note": note,
        "rows": rows,
        **more,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


def build_result_path(args: argparse.Namespace) -> Path:
    """Path of the results without suffix."""
    return Path(args.out / f"{args.name}-{args.device.split(':')[0]}")


def _format_command_line() -> str:
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return " ".join(["python", str(shown), *sys.argv[1:]])


def describe_benchmark_machine(args: argparse.Namespace) -> dict[str, Any]:
    """Device, threads, versions and commit."""
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": read_commit(),
    }


def format_benchmark_table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table; numbers with three digits that count."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_format_table_value(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _format_table_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot_benchmark_series(
    args: argparse.Namespace, series: Mapping[str, tuple[list[float], list[float]]], x: str, y: str
) -> None:
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
    figure.savefig(build_result_path(args).with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
