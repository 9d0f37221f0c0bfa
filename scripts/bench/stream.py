"""Live users: time per event by `step()`, against encoding the whole history again.

    python scripts/bench/stream.py

One event is one item of each live user: the vectors that recommendations are made from are new
after it. The model is untrained, at its default sizes, with text; what is timed does not depend
on weights. Before anything is timed, the vectors after each history are compared with those of
the whole pass.
"""

import argparse
from itertools import product

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    check_equal,
    collect_series,
    measure_median_seconds,
    parse_benchmark_arguments,
    plot_benchmark_series,
    print_row,
    write_benchmark_results,
)
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.layer import LayerState
from m2rec.nn.states import map_tensors, name_tensors
from m2rec.settings import ModelSettings

TEXT_WIDTH = 384
# Positions that are encoded at most. Of more, encoding again is not timed, and users share histories:
# the time of an event does not depend on what a state holds.
MAX_POSITIONS = 200_000
TOLERANCE = 1e-4


def build_bench_encoder(mixer: str, n_items: int, device: str) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(ModelSettings(mixer=mixer), n_items, 200, torch.randn(n_items, TEXT_WIDTH))
    return encoder.to(device).eval()


def encode_to_states(encoder: Encoder, history: Tensor) -> list[LayerState]:
    """States after histories (B, L), taken in pieces so that memory stays small."""
    states = None
    for piece in history.split(256, dim=1):
        _, states = encoder.advance(piece, states)
    assert states is not None
    return states


def measure_state_kib(states: list[LayerState], users: int) -> float:
    """KiB of one user's state."""
    tensors = name_tensors(states).values()
    return sum(t.numel() * t.element_size() for t in tensors) / users / 1024


def measure_live_events(args: argparse.Namespace, users: int, mixer: str, length: int) -> Row:
    """One mixer, number of users and length of the histories."""
    encoder = build_bench_encoder(mixer, args.items, args.device)
    distinct = min(users, max(1, MAX_POSITIONS // length))
    history = torch.randint(1, args.items, (distinct, length), device=args.device)
    lengths = torch.full((distinct,), length, device=args.device)
    owner = torch.arange(users, device=args.device) % distinct
    states = map_tensors(lambda tensor: tensor[owner], encode_to_states(encoder, history[:, :-1]))
    item = history[owner, -1]
    functions = {"step": lambda: encoder.step(item, states)}
    if distinct == users:
        x, _ = encoder.step(item, states)
        check_equal("step() and the whole pass", [x], [encoder.last(history, lengths)], TOLERANCE)
        functions["again"] = lambda: encoder.last(history, lengths)
    seconds = measure_median_seconds(functions, args.repeats, args.device, at_least=0.2)
    again = seconds.get("again")
    return print_row(
        {
            "users": users,
            "mixer": mixer,
            "history": length,
            "ms per event": seconds["step"] * 1e3,
            "us per user": seconds["step"] / users * 1e6,
            "ms to encode again": again * 1e3 if again else "not run",
            "times faster": again / seconds["step"] if again else "",
            "KiB of state per user": measure_state_kib(states, users),
        }
    )


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_stream")
    parser.add_argument("--histories", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--items", type=int, default=3_417)
    args = parse_benchmark_arguments(parser)
    with torch.inference_mode():
        cases = product(args.users, ("mamba2", "mamba"), args.histories)
        rows = [measure_live_events(args, *case) for case in cases]
    note = f"D = 64, two layers, {args.items - 1:,} items with text; scores are not part of an event"
    write_benchmark_results(args, rows, note)
    who = "{mixer}, {users:,} users"
    series = collect_series(rows, f"{who}, step", "history", "ms per event")
    series |= collect_series(rows, f"{who}, whole history", "history", "ms to encode again")
    plot_benchmark_series(args, series, "items in the history", "ms per event")


if __name__ == "__main__":
    main()
