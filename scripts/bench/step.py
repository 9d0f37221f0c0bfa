"""One training step of the trainer's loop: time, and on a GPU the share of it in which the GPU computes.

    python scripts/bench/step.py                      # CPU or GPU, whichever is there
    python scripts/bench/step.py --width=128 --lengths 200 --models M2Rec "M2Rec, compile"

A step takes a batch from the CPU, and includes the transfer, loss, gradients and the optimiser (Adam); the
loader is left out. All histories have L items. Dense rows train L targets each, SASRec's rows one. On a GPU,
PyTorch's profiler then counts the kernels of the same steps and the time in which at least one of them runs:
"step / busy" is 1 where the GPU never waits, and the target is 1.3. `compile` is as in config.yaml. Two rows
have RecBole's own training loop around the same models. Losses are compared where models are the same.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from benchmarking import (
    Row,
    add_length_arguments,
    build_benchmark_parser,
    compute_batch_size,
    measure_median_seconds,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)
from model import MIXER_ONLY, repeat_rows, write_random_dataset
from torch.autograd import DeviceType

from m2rec.compat import Interaction, Trainer
from m2rec.training.configuration import build_config
from m2rec.training.run import prepare_run

RECBOLE_LOOP = "RecBole's loop"
TRITON = {"scan_backend": "triton"}
ATTENTION = {**MIXER_ONLY, "mixer": "attention"}
COMPILED = {"compile": True}
MODELS: dict[str, dict[str, Any]] = {
    "M2Rec": {},
    "M2Rec, compile": COMPILED,
    "M2Rec, SSD in Triton": TRITON,
    "M2Rec, SSD in Triton, compile": {**TRITON, **COMPILED},
    "M2Rec, mamba_ssm": {"scan_backend": "mamba_ssm"},
    "M2Rec, mamba_ssm, compile": {"scan_backend": "mamba_ssm", **COMPILED},
    "M2Rec, S6": {"mixer": "mamba"},
    "M2Rec, S6, compile": {"mixer": "mamba", **COMPILED},
    "M2Rec, S6, mamba_ssm": {"mixer": "mamba", "scan_backend": "mamba_ssm"},
    "M2Rec, attention alone (SDPA)": ATTENTION,
    "M2Rec, attention alone (SDPA), compile": {**ATTENTION, **COMPILED},
    f"M2Rec, {RECBOLE_LOOP}": {},
    "SASRec": {"model": "SASRec"},
    f"SASRec, {RECBOLE_LOOP}": {"model": "SASRec"},
}
# rows that compute the same function as another one, and by how much the loss of a step may differ
OTHER_FUNCTIONS = ("SASRec", "M2Rec, S6", "M2Rec, attention")
SAME_AS_M2REC = [name for name in MODELS if not name.startswith(OTHER_FUNCTIONS)]
TOLERANCE = 1e-3

Step = Callable[[], Any]


def build_step(name: str, folder: Path, args: argparse.Namespace, length: int, batch: int) -> Step:
    """What takes one step of the model that `name` stands for, and returns its loss, a tensor or a number."""
    values = {
        "dataset": "bench",
        "data_path": str(folder),
        "runs_dir": str(folder / "runs"),
        "MAX_ITEM_LIST_LENGTH": length,
        "gpu_id": (args.device.partition(":")[2] or "0") if args.device.startswith("cuda") else "",
        "train_batch_size": batch,
        "hidden_size": args.width,
        "show_progress": False,
        "report": False,
        **MODELS[name],
    }
    is_ours = "model" not in MODELS[name]
    for key in ("dropout_prob",) if is_ours else ("hidden_dropout_prob", "attn_dropout_prob"):
        values[key] = args.dropout
    prepared = prepare_run(build_config(values))
    trainer, train = prepared.trainer, prepared.loaders.train
    rows = repeat_rows(next(iter(train)), batch)
    trainer.model.train()
    if name.endswith(RECBOLE_LOOP):
        return build_recbole_step(trainer.config, trainer.model, rows)
    trainer._prepare_fit(train)
    return lambda: trainer._train_step(rows, train.dataset.is_dense)


def build_recbole_step(config: Any, model: Any, rows: Interaction) -> Step:
    """One step of RecBole's own trainer."""
    trainer = Trainer(config, model)
    return lambda: trainer._train_epoch([rows], 0)


def repeat_step(step: Step, steps: int) -> Callable[[], None]:
    """Several steps in a row."""

    def run() -> None:
        for _ in range(steps):
            step()

    return run


def measure_busy_time(run: Callable[[], None]) -> tuple[float, int]:
    """Seconds in which a kernel or a copy runs on the GPU, and their number."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    spans = []
    for event in profile.events():
        is_label = getattr(event, "is_user_annotation", False) or "Optimizer." in event.name
        if event.device_type == DeviceType.CUDA and not is_label:
            spans.append((event.time_range.start, event.time_range.end))
    return sum_spans(spans) / 1e6, len(spans)


def sum_spans(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def build_steps(args: argparse.Namespace, length: int, batch: int, folder: Path) -> dict[str, Step]:
    """The steps of `--models` that can run here."""
    write_random_dataset(folder, length, args.items)
    steps = {}
    for name in args.models:
        try:
            steps[name] = build_step(name, folder, args, length, batch)
        except (ValueError, ImportError) as error:
            print(f"without {name}: {error}")
    return steps


def check_first_losses(steps: dict[str, Step], dropout: float) -> None:
    """Stop unless models that are the same begin with the same loss; dropout draws different numbers."""
    losses = {name: float(step()) for name, step in steps.items()}
    found = [losses[name] for name in SAME_AS_M2REC if name in losses]
    tolerance = TOLERANCE if not dropout else 0.1
    for name, loss in losses.items():
        if name in SAME_AS_M2REC and abs(loss - fmean(found)) > tolerance * abs(loss):
            raise SystemExit(f"{name} begins with the loss {loss:.4f}, the others with {fmean(found):.4f}")


def measure_steps(args: argparse.Namespace, length: int) -> list[Row]:
    """All models at one length."""
    batch = compute_batch_size(args, length)
    with tempfile.TemporaryDirectory() as folder:
        steps = build_steps(args, length, batch, Path(folder))
        check_first_losses(steps, args.dropout)
        runs = {name: repeat_step(step, args.steps) for name, step in steps.items()}
        seconds = measure_median_seconds(runs, args.repeats, args.device)
        rows = []
        for name, total in seconds.items():
            row: Row = {"L": length, "B": batch, "model": name, "ms per step": total / args.steps * 1e3}
            if args.device.startswith("cuda"):
                busy, kernels = measure_busy_time(runs[name])
                row["GPU busy, ms"] = busy / args.steps * 1e3
                row["step / busy"] = total / busy
                row["kernels"] = round(kernels / args.steps)
            rows.append(print_row(row))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_step")
    add_length_arguments(parser)
    parser.set_defaults(lengths=[50, 200])
    parser.add_argument("--items", type=int, default=3_416, help="catalogue, that of ml-1m by default")
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=20, help="steps in a row")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parse_benchmark_arguments(parser)
    rows = []
    for length in args.lengths:
        rows += measure_steps(args, length)
    note = f"{args.items:,} items, D = {args.width}, float32, dropout {args.dropout}"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
