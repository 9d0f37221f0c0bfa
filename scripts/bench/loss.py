"""The losses: whole and in chunks, sampled; and a training step on a catalogue of a million items.

    python scripts/bench/loss.py

Time and peak memory of forward and backward over the scores alone, at ml-1m's sizes and at larger
catalogues; then one whole training step of M2Rec (64 windows of 200, Adam) with a million items.
Before anything is timed, chunked cross-entropy is compared with the whole, value and gradients.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    measure_peak_mib,
    plot_benchmark_series,
    relative_error,
    run_in_child_process,
    set_threads_and_device,
    write_benchmark_results,
)
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.losses import NegativeSampler, cross_entropy, cross_entropy_ref, gbce, sampled_cross_entropy
from m2rec.settings import ModelSettings

TOLERANCE = 1e-5
# the whole matrix of scores and its gradient, above which it is not tried
MAX_SCORES = 500_000_000
# MiB of scores held by the whole softmax over the largest catalogue: with the default of 16, two positions
# at a time, the gradient of the whole table would be gone through for every two
LARGEST_CATALOGUE_MIB = 512
POSITIONS_PER_NEGATIVE_SET = ModelSettings().negatives_shared
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def compute_sampled_loss(n: int, x: Tensor, targets: Tensor, table: Tensor, kind: str = "softmax") -> Tensor:
    """The sampled loss `kind` over n uniform negatives."""
    ids, log_probability = NegativeSampler(len(table)).to(x.device)(
        -(-len(x) // POSITIONS_PER_NEGATIVE_SET), n
    )
    if kind == "gbce":
        return gbce(x, targets, lambda i: table[i], ids, len(table), 0.75)
    return sampled_cross_entropy(x, targets, lambda i: table[i], ids, log_probability)


def build_losses(positions: int, n_items: int) -> dict[str, Loss]:
    """Every loss that fits."""
    found: dict[str, Loss] = {}
    if positions * n_items <= MAX_SCORES:
        found["whole softmax, all scores at once"] = cross_entropy_ref
    found |= {f"whole softmax, {mib} MiB of scores": partial(cross_entropy, memory=mib) for mib in (16, 512)}
    found |= {f"softmax over {n} negatives": partial(compute_sampled_loss, n) for n in (256, 1024)}
    found["gBCE over 256 negatives"] = partial(compute_sampled_loss, 256, kind="gbce")
    return found


def make_loss_inputs(positions: int, n_items: int, width: int, device: str) -> list[Tensor]:
    """x, targets, table."""
    torch.manual_seed(0)
    x = torch.randn(positions, width, device=device).requires_grad_()
    table = (torch.randn(n_items, width, device=device) * 0.1).requires_grad_()
    return [x, torch.randint(1, n_items, (positions,), device=device), table]


def compute_loss_and_gradients(loss: Loss, given: list[Tensor]) -> list[Tensor]:
    """Value and gradients."""
    value = loss(*given)
    return [value.detach(), *torch.autograd.grad(value, [given[0], given[2]])]


def measure_loss_memory(name: str, sizes: tuple[int, int, int], device: str, threads: int) -> float:
    """Peak of forward and backward in MiB."""
    set_threads_and_device(device, threads)
    compute_loss_and_gradients(build_losses(64, 100)[name], make_loss_inputs(64, 100, sizes[2], device))
    given = make_loss_inputs(*sizes, device)
    return measure_peak_mib(lambda: compute_loss_and_gradients(build_losses(*sizes[:2])[name], given), device)


def measure_step_memory(
    loss_type: str, n_items: int, batch: int, length: int, device: str, threads: int
) -> float:
    """Peak MiB of a training step of M2Rec, from an empty process on."""
    set_threads_and_device(device, threads)

    loss = (
        partial(cross_entropy, memory=LARGEST_CATALOGUE_MIB)
        if loss_type == "CE"
        else partial(compute_sampled_loss, 512)
    )

    def train() -> None:
        made = Encoder(ModelSettings(loss_type=loss_type), n_items, length).to(device)
        optimizer = torch.optim.Adam(made.parameters())
        for rows in (1, batch):  # the first makes the optimiser's state
            items = torch.randint(1, n_items, (rows, length), device=device)
            optimizer.zero_grad()
            x = made(items, torch.full((rows,), length, device=device)).flatten(0, 1)
            loss(x, items.flatten(), made.item_table()).backward()
            optimizer.step()

    return measure_peak_mib(train, device)


def measure_losses(args: argparse.Namespace, n_items: int) -> list[Row]:
    """All losses at one size of the catalogue."""
    given = make_loss_inputs(args.positions, n_items, args.width, args.device)
    found = build_losses(args.positions, n_items)
    small = make_loss_inputs(1000, n_items, args.width, args.device)
    expected, actual = (
        compute_loss_and_gradients(cross_entropy_ref, small),
        compute_loss_and_gradients(cross_entropy, small),
    )
    worst = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    if worst > TOLERANCE:
        raise SystemExit(f"chunked and whole cross-entropy differ: {worst:.1e}")
    work = {name: partial(compute_loss_and_gradients, loss, given) for name, loss in found.items()}
    seconds = measure_median_seconds(work, args.repeats, args.device)
    rows = []
    for name in seconds:  # what has no room is left out
        row: Row = {"items": n_items, "loss": name, "forward + backward ms": seconds[name] * 1e3}
        sizes = (args.positions, n_items, args.width)
        row["peak MiB"] = run_in_child_process(measure_loss_memory, name, sizes, args.device, args.threads)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Measure, print, save."""
    parser = build_benchmark_parser(__doc__, "bench_loss")
    parser.add_argument("--catalogues", type=int, nargs="+", default=[3_417, 40_000])
    parser.add_argument("--positions", type=int, default=12_800, help="S, 64 windows of 200")
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--largest", type=int, default=1_000_000, help="catalogue of the whole training step")
    args = parser.parse_args()
    set_threads_and_device(args.device, args.threads)
    rows = [row for n_items in args.catalogues for row in measure_losses(args, n_items)]
    steps = []
    for loss_type in ("CE", "sampled"):
        batch, length = max(1, args.positions // 200), 200
        mib = run_in_child_process(
            measure_step_memory, loss_type, args.largest, batch, length, args.device, args.threads
        )
        steps.append({"items": args.largest, "loss_type": loss_type, "windows": batch, "peak MiB": mib})
        print(f"training step with {args.largest:,} items, loss_type {loss_type}: {mib:,.0f} MiB", flush=True)
    write_benchmark_results(
        args, rows, f"{args.positions:,} positions, D = {args.width}, float32", training_steps=steps
    )
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        xs, ys = series.setdefault(row["loss"], ([], []))
        xs.append(row["items"])
        ys.append(row["forward + backward ms"])
    plot_benchmark_series(args, series, "items in the catalogue", "ms, forward + backward")


if __name__ == "__main__":
    main()
