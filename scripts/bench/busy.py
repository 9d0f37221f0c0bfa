"""What other processes on the same cores cost: the best items after one history, and a training step.

    python scripts/bench/busy.py

Beside none, one and two busy loops, each in a new process, with PyTorch's defaults (`plain`) and with the
project's (`ours`): one thread for a question, threads that spin briefly in training (m2rec/threads.py).
The model is untrained, at its default sizes; what is timed does not depend on weights.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import product
from statistics import median
from time import perf_counter

import torch
from benchmarking import ROOT, Row, build_benchmark_parser, print_row, write_benchmark_results

from m2rec.nn.encoder import Encoder
from m2rec.nn.losses import cross_entropy
from m2rec.settings import ModelSettings
from m2rec.threads import SPIN_COUNT, use_one_thread

LENGTH = 50
BATCH_ROWS = 64
THREAD_ENVIRONMENTS: dict[str, Mapping[str, str]] = {"plain": {}, "ours": {"GOMP_SPINCOUNT": SPIN_COUNT}}


@contextmanager
def run_busy_loops(loops: int) -> Iterator[None]:
    """So many processes that do nothing but compute."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def time_calls_in_child_process(args: argparse.Namespace, way: str, what: str) -> list[float]:
    """Milliseconds of each call, in a new process."""
    environment = {**os.environ, **THREAD_ENVIRONMENTS[way]}
    for name in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - set(THREAD_ENVIRONMENTS[way]):
        environment.pop(name, None)
    command = [sys.executable, __file__, f"--child={what}", f"--way={way}"]
    command += [f"--items={args.items}", f"--calls={args.calls}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    return [float(word) for word in done.stdout.split()]


def print_call_times(args: argparse.Namespace) -> None:
    """Print the milliseconds of each call."""
    torch.manual_seed(0)
    encoder = Encoder(ModelSettings(), args.items, LENGTH, torch.randn(args.items, 384) / 20)
    rows = BATCH_ROWS if args.child == "step" else 1
    items = torch.randint(1, args.items, (rows, LENGTH))
    lengths = torch.full((rows,), LENGTH)
    if args.child == "step":
        call = build_training_call(encoder, items, lengths)
    else:
        call = build_query_call(encoder, items, lengths, args.way)
    for number in range(args.calls + 3):
        start = perf_counter()
        call()
        if number >= 3:
            print(1e3 * (perf_counter() - start))


def build_query_call(
    encoder: Encoder, items: torch.Tensor, lengths: torch.Tensor, way: str
) -> Callable[[], None]:
    """A function that finds the ten best items after one history."""
    encoder.eval()
    with torch.no_grad():
        table = encoder.item_table()
        ready = encoder.make_inference_copy(table)

    @torch.no_grad()
    def call() -> None:
        with use_one_thread() if way == "ours" else nullcontext():
            (ready.last(items, lengths) @ table.T).topk(10)

    return call


def build_training_call(encoder: Encoder, items: torch.Tensor, lengths: torch.Tensor) -> Callable[[], None]:
    """A function that takes one step on a batch of dense rows."""
    optimizer = torch.optim.Adam(encoder.parameters())
    targets = items.roll(-1, dims=1)

    def call() -> None:
        optimizer.zero_grad()
        x, rows, times = encoder.encode_target_positions(items, lengths, targets)
        cross_entropy(x, targets[rows, times], encoder.item_table()).backward()
        optimizer.step()

    return call


def measure_beside_loops(args: argparse.Namespace, what: str, loops: int) -> Row:
    """One kind of call beside so many busy loops."""
    found: dict[str, list[float]] = {way: [] for way in THREAD_ENVIRONMENTS}
    with run_busy_loops(loops):
        for _ in range(args.repeats):
            for way, milliseconds in found.items():
                milliseconds += time_calls_in_child_process(args, way, what)
    row: Row = {"what": what, "busy loops": loops}
    for way, milliseconds in found.items():
        row[f"{way}: ms"] = median(milliseconds)
        row[f"{way}: 1 in 20 slower than"] = sorted(milliseconds)[int(0.95 * len(milliseconds))]
    return print_row(row)


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_busy")
    parser.add_argument("--items", type=int, default=1_683)
    parser.add_argument("--calls", type=int, default=30, help="in each process, after three")
    parser.add_argument("--loops", type=int, nargs="+", default=[0, 1, 2], help="busy processes")
    parser.add_argument("--child", choices=("question", "step"), help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=list(THREAD_ENVIRONMENTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print_call_times(args)
        return
    cases = product(("question", "step"), args.loops)
    rows = [measure_beside_loops(args, what, loops) for what, loops in cases]
    cores = len(os.sched_getaffinity(0))
    note = f"{cores} cores; L = {LENGTH}, {args.items - 1:,} items; a step has {BATCH_ROWS} dense rows"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
