"""One training step with a sampled loss by the size of the catalogue: time and peak memory.

    python scripts/bench/sparse.py
    python scripts/bench/sparse.py --catalogues 100000 1000000 --dense 100000 1000000

A step is the trainer's: loss, gradients, their norm, AdamW with weight decay, and the average of the weights.
Its items are drawn anew for each step, uniformly from the whole catalogue. `sparse_updates: true` is timed at
the sizes of --catalogues, false at those of --dense. All models are in memory together and take turns. CPU
time is that of all threads. Peak memory is that of a process which builds one model and takes two steps.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    measure_peak_mib,
    parse_benchmark_arguments,
    print_row,
    run_in_child_process,
    write_benchmark_results,
)
from model import repeat_rows, write_random_dataset

from m2rec.models.m2rec import M2Rec
from m2rec.training.configuration import build_config
from m2rec.training.run import load_data
from m2rec.training.trainer import RunTrainer

SETTINGS: dict[str, Any] = {
    "dataset": "bench",
    "auto": False,
    "text_vectors": "none",
    "loss_type": "sampled",
    "learner": "adamw",
    "weight_decay": 0.1,
    "clip_grad_norm": {"max_norm": 5},
    "show_progress": False,
    "report": False,
}


def build_step(
    folder: str, n_items: int, is_sparse: bool, has_average: bool, windows: int, length: int, device: str
) -> Callable[[], object]:
    """What takes one step, whose items come from a catalogue of `n_items`."""
    place = Path(folder)
    values = {
        **SETTINGS,
        "data_path": folder,
        "MAX_ITEM_LIST_LENGTH": length,
        "train_batch_size": windows,
        "sparse_updates": is_sparse,
        "average_epochs": 100.0 if has_average else 0.0,
        "gpu_id": (device.partition(":")[2] or "0") if device.startswith("cuda") else "",
    }
    config = build_config(values)
    _, loaders = load_data(config)
    train = loaders.train
    items = config["ITEM_ID_FIELD"]
    train.dataset.field2id_token[items] = range(n_items)  # the file has far fewer, and would take minutes
    model = M2Rec(config, train.dataset).to(config["device"])
    trainer = RunTrainer(config, model, Path(tempfile.mkdtemp(dir=place)))
    trainer._prepare_fit(train)
    model.train()
    rows = repeat_rows(next(iter(train)), windows)
    sequence = rows[model.ITEM_SEQ]

    def step() -> object:
        drawn = torch.randint(1, n_items, sequence.shape, device=sequence.device)
        rows.interaction[model.ITEM_SEQ] = drawn.masked_fill(sequence == 0, 0)
        return trainer._train_step(rows, train.dataset.is_dense)

    return step


def measure_memory(*given: Any) -> float:
    """Peak MiB of a model and two of its steps; `given` as for `build_step`."""

    def work() -> None:
        step = build_step(*given)
        step()
        step()

    return measure_peak_mib(work, given[-1])


class _CountedStep:
    """A step that notes its CPU time, which other processes on the machine disturb less."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._seconds: list[float] = []

    def __call__(self) -> None:
        start = process_time()
        self._step()
        self._seconds.append(process_time() - start)

    def measure_cpu_seconds(self, calls: int) -> float:
        """The median of the last calls."""
        return median(self._seconds[-calls:])


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_sparse")
    catalogues = [100_000, 1_000_000, 10_000_000]
    parser.add_argument("--catalogues", type=int, nargs="+", default=catalogues, help="V with sparse updates")
    parser.add_argument(
        "--dense", type=int, nargs="*", default=catalogues[:2], help="V with updates of all rows"
    )
    parser.add_argument("--windows", type=int, default=64, help="rows of a step")
    parser.add_argument("--length", type=int, default=200, help="L")
    parser.add_argument("--no-average", action="store_true", help="leave out the average of the weights")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    args = parse_benchmark_arguments(parser)
    cases = {f"{n:,}, rows in use": (n, True) for n in args.catalogues}
    cases |= {f"{n:,}, all rows": (n, False) for n in args.dense}
    sizes = (not args.no_average, args.windows, args.length)
    with tempfile.TemporaryDirectory() as folder:
        write_random_dataset(Path(folder), args.length, args.windows * args.length)
        peaks: dict[str, float] = {}
        steps: dict[str, _CountedStep] = {}
        for name, (n_items, is_sparse) in cases.items():
            if not args.no_memory:
                peaks[name] = run_in_child_process(args, measure_memory, folder, n_items, is_sparse, *sizes)
                print(f"{name}: {peaks[name]:,.0f} MiB", flush=True)
        for name, (n_items, is_sparse) in cases.items():
            steps[name] = _CountedStep(build_step(folder, n_items, is_sparse, *sizes, args.device))
        seconds = measure_median_seconds(steps, args.repeats, args.device)
    cpu_seconds = {name: steps[name].measure_cpu_seconds(args.repeats) for name in seconds}
    rows = []
    for name, (n_items, is_sparse) in cases.items():
        if name not in seconds:
            continue
        row: Row = {"items": n_items, "updates": "rows in use" if is_sparse else "all rows"}
        for what, measured in (("step", seconds), ("CPU", cpu_seconds)):
            first = next(iter(measured.values()))
            row |= {f"{what}, ms": measured[name] * 1e3, f"{what}: ratio": measured[name] / first}
        if peaks:
            row["peak MiB"] = peaks[name]
        rows.append(print_row(row))
    note = f"{args.windows} x {args.length} positions, D = 64, AdamW with decay, clipped gradients"
    if not args.no_average:
        note += ", average of the weights"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
