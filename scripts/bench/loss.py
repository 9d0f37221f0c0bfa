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
    check_equal,
    collect_series,
    measure_median_seconds,
    measure_peak_mib,
    parse_benchmark_arguments,
    plot_benchmark_series,
    print_row,
    run_in_child_process,
    write_benchmark_results,
)
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.losses import NegativeSampler, cross_entropy, cross_entropy_ref, gbce, sampled_cross_entropy
from m2rec.settings import ModelSettings

TOLERANCE = 1e-5
# the whole matrix of scores and its gradient, above which it is not tried
MAX_SCORES = 500_000_000
# MiB of scores held by the whole softmax over the largest catalogue: with less, few positions at a time,
# the gradient of the whole table would be read and written for each few
LARGEST_CATALOGUE_MIB = 512
WINDOW = 200
POSITIONS_PER_NEGATIVE_SET = ModelSettings().negatives_shared
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TIME = "forward + backward ms"


def compute_sampled_loss(n: int, x: Tensor, targets: Tensor, table: Tensor, kind: str = "softmax") -> Tensor:
    """The sampled loss `kind` over n uniform negatives."""
    sampler = NegativeSampler(len(table)).to(x.device)
    ids, log_probability = sampler(-(-len(x) // POSITIONS_PER_NEGATIVE_SET), n)

    def embed(items: Tensor) -> Tensor:
        return table[items]

    if kind == "gbce":
        return gbce(x, targets, embed, ids, len(table), 0.75)
    return sampled_cross_entropy(x, targets, embed, ids, log_probability)


def build_losses(positions: int, n_items: int) -> dict[str, Loss]:
    """Every loss that fits in memory."""
    losses: dict[str, Loss] = {}
    if positions * n_items <= MAX_SCORES:
        losses["whole softmax, all scores at once"] = cross_entropy_ref
    for mib in (16, 512):
        losses[f"whole softmax, {mib} MiB of scores"] = partial(cross_entropy, memory=mib)
    for n in (256, 1024):
        losses[f"softmax over {n} negatives"] = partial(compute_sampled_loss, n)
    losses["gBCE over 256 negatives"] = partial(compute_sampled_loss, 256, kind="gbce")
    return losses


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


def measure_loss_memory(name: str, sizes: tuple[int, int, int], device: str) -> float:
    """Peak of forward and backward in MiB."""
    small = (64, 100, sizes[2])
    compute_loss_and_gradients(build_losses(*small[:2])[name], make_loss_inputs(*small, device))
    loss, given = build_losses(*sizes[:2])[name], make_loss_inputs(*sizes, device)
    return measure_peak_mib(lambda: compute_loss_and_gradients(loss, given), device)


def measure_step_memory(loss_type: str, n_items: int, batch: int, device: str) -> float:
    """Peak MiB of a training step of M2Rec, from an empty process on."""
    loss: Loss = partial(compute_sampled_loss, 512)
    if loss_type == "CE":
        loss = partial(cross_entropy, memory=LARGEST_CATALOGUE_MIB)

    def train() -> None:
        encoder = Encoder(ModelSettings(loss_type=loss_type), n_items, WINDOW).to(device)
        optimizer = torch.optim.Adam(encoder.parameters())
        for rows in (1, batch):  # the first creates the optimiser's state
            items = torch.randint(1, n_items, (rows, WINDOW), device=device)
            optimizer.zero_grad()
            x = encoder(items, torch.full((rows,), WINDOW, device=device)).flatten(0, 1)
            loss(x, items.flatten(), encoder.item_table()).backward()
            optimizer.step()

    return measure_peak_mib(train, device)


def measure_losses(args: argparse.Namespace, n_items: int) -> list[Row]:
    """All losses at one size of the catalogue."""
    small = make_loss_inputs(1000, n_items, args.width, args.device)
    expected = compute_loss_and_gradients(cross_entropy_ref, small)
    actual = compute_loss_and_gradients(cross_entropy, small)
    check_equal("chunked and whole cross-entropy", actual, expected, TOLERANCE)
    sizes = (args.positions, n_items, args.width)
    given = make_loss_inputs(*sizes, args.device)
    work = {}
    for name, loss in build_losses(args.positions, n_items).items():
        work[name] = partial(compute_loss_and_gradients, loss, given)
    rows = []
    for name, seconds in measure_median_seconds(work, args.repeats, args.device).items():
        peak = run_in_child_process(args, measure_loss_memory, name, sizes)
        rows.append(print_row({"items": n_items, "loss": name, TIME: seconds * 1e3, "peak MiB": peak}))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_loss")
    parser.add_argument("--catalogues", type=int, nargs="+", default=[3_417, 40_000])
    parser.add_argument("--positions", type=int, default=12_800, help="S, 64 windows of 200")
    parser.add_argument("--width", type=int, default=64, help="D")
    parser.add_argument("--largest", type=int, default=1_000_000, help="catalogue of the whole training step")
    args = parse_benchmark_arguments(parser)
    rows = []
    for n_items in args.catalogues:
        rows += measure_losses(args, n_items)
    steps = []
    batch = max(1, args.positions // WINDOW)
    for loss_type in ("CE", "sampled"):
        peak = run_in_child_process(args, measure_step_memory, loss_type, args.largest, batch)
        step = {"items": args.largest, "loss_type": loss_type, "windows": batch, "peak MiB": peak}
        steps.append(print_row(step))
    note = f"{args.positions:,} positions, D = {args.width}, float32"
    write_benchmark_results(args, rows, note, training_steps=steps)
    series = collect_series(rows, "{loss}", "items", TIME)
    plot_benchmark_series(args, series, "items in the catalogue", "ms, forward + backward")


if __name__ == "__main__":
    main()
