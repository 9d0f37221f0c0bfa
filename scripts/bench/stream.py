"""Live users: time per event by `step()`, against encoding the whole history again.

    python scripts/bench/stream.py

One event is one item of each live user: the vectors that recommendations are made from are new
after it. The model is untrained, at its default sizes, with text; what is timed does not depend
on weights. Before anything is timed, the vectors after each history are compared with those of
the whole pass.
"""

import argparse

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    plot_benchmark_series,
    relative_error,
    set_threads_and_device,
    write_benchmark_results,
)
from torch import Tensor

from m2rec.nn.encoder import Encoder
from m2rec.nn.layer import LayerState
from m2rec.settings import ModelSettings

TEXT_WIDTH = 384
# Positions that are encoded at most. Of more, encoding again is not timed, and users share histories:
# the time of an event does not depend on what a state holds.
MAX_POSITIONS = 200_000
TOLERANCE = 1e-4


def build_bench_encoder(mixer: str, n_items: int, device: str) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(ModelSettings(mixer=mixer), n_items, 200, torch.randn(n_items, TEXT_WIDTH))
    return made.to(device).eval()


def encode_to_states(made: Encoder, history: Tensor) -> list[LayerState]:
    """States after histories (B, L), taken in pieces so that memory stays small."""
    states = None
    for piece in history.split(256, dim=1):
        _, states = made.advance(piece, states)
    assert states is not None
    return states


def select_user_states(state: LayerState, owner: Tensor) -> LayerState:
    """The states at the places `owner` (users,) of a batch."""
    memory = None if state.filter is None else state.filter[owner]
    return LayerState((state.mixer[0][owner], state.mixer[1][owner]), memory)


def measure_state_kib(states: list[LayerState], users: int) -> float:
    """What one user's state takes."""
    tensors = [t for state in states for t in (*state.mixer, state.filter) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors) / users / 1024


def measure_live_events(args: argparse.Namespace, mixer: str, users: int, length: int) -> Row:
    """One mixer, so many users, so long histories."""
    made = build_bench_encoder(mixer, args.items, args.device)
    distinct = min(users, max(1, MAX_POSITIONS // length))
    history = torch.randint(1, args.items, (distinct, length), device=args.device)
    lengths = torch.full((distinct,), length, device=args.device)
    owner = torch.arange(users, device=args.device) % distinct
    states = [select_user_states(state, owner) for state in encode_to_states(made, history[:, :-1])]
    item = history[owner, -1]

    row: Row = {"users": users, "mixer": mixer, "history": length}
    functions = {"step": lambda: made.step(item, states)}
    if distinct == users:
        worst = relative_error(made.step(item, states)[0], made.last(history, lengths))
        if worst > TOLERANCE:
            raise SystemExit(f"step() and the whole pass differ after {length} items: {worst:.1e}")
        functions["again"] = lambda: made.last(history, lengths)
    seconds = measure_median_seconds(functions, args.repeats, args.device, at_least=0.2)
    row["ms per event"] = seconds["step"] * 1e3
    row["us per user"] = seconds["step"] / users * 1e6
    row["ms to encode again"] = seconds["again"] * 1e3 if "again" in seconds else "not run"
    row["times faster"] = seconds["again"] / seconds["step"] if "again" in seconds else ""
    row["KiB of state per user"] = measure_state_kib(states, users)
    print(row, flush=True)
    return row


def main() -> None:
    """Measure, print, save."""
    parser = build_benchmark_parser(__doc__, "bench_stream")
    parser.add_argument("--histories", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--users", type=int, nargs="+", default=[1, 1000])
    parser.add_argument("--items", type=int, default=3_417)
    args = parser.parse_args()
    set_threads_and_device(args.device, args.threads)
    with torch.inference_mode():
        rows = [
            measure_live_events(args, mixer, users, length)
            for users in args.users
            for mixer in ("mamba2", "mamba")
            for length in args.histories
        ]
    write_benchmark_results(
        args, rows, f"D = 64, two layers, {args.items - 1:,} items with text; scores are not part of an event"
    )
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for column, what in (("ms per event", "step"), ("ms to encode again", "whole history")):
            if isinstance(row[column], float):
                label = f"{row['mixer']}, {row['users']:,} users, {what}"
                xs, ys = series.setdefault(label, ([], []))
                xs.append(row["history"])
                ys.append(row[column])
    plot_benchmark_series(args, series, "items in the history", "ms per event")


if __name__ == "__main__":
    main()
