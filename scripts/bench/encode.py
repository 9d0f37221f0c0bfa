"""Texts per second of scripts/embed_items.py against encoding them one at a time, in the file's order.

    python scripts/bench/encode.py --dataset=NAME --text-encoder=MODEL

Same model, same texts, same limits; other rivals are batches of 64 in the file's order, and
bfloat16. Before anything is timed, all vectors are compared. Loading is not timed, tokenizing is.
CPU time is given beside, because others on the machine disturb it less.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
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

from m2rec.text.item_text import read_item_texts
from m2rec.text.language_model import TextEncoder
from m2rec.text.sentence_model import TextEncoderOptions

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
UNSORTED_BATCH_SIZE = 64  # texts of a batch in the file's order


def build_bench_text_encoder(
    args: argparse.Namespace, batch_tokens: int = 0, dtype: str = "float32"
) -> TextEncoder:
    kind = args.device.split(":")[0]
    return TextEncoder(
        TextEncoderOptions(args.text_encoder, batch_tokens=batch_tokens, device=kind, dtype=dtype)
    )


def encode_in_file_order(made: TextEncoder, texts: list[str], at_once: int) -> np.ndarray:
    """So many texts at once, as they come."""
    found = []
    for start in range(0, len(texts), at_once):
        some = texts[start : start + at_once]
        found.append(made.model.encode(some, batch_size=at_once, normalize_embeddings=True))
    return np.concatenate(found)


def build_encoding_variants(
    args: argparse.Namespace, texts: list[str]
) -> dict[str, Callable[[], np.ndarray]]:
    """Every way to encode the texts, by its name; all in float32 share one model."""
    made = {
        f"{tokens:,} tokens a batch": build_bench_text_encoder(args, tokens) for tokens in args.batch_tokens
    }
    first = next(iter(made.values()))
    for other in made.values():
        other.__dict__["model"] = first.model
    made["bfloat16"] = build_bench_text_encoder(args, dtype="bfloat16")
    found: dict[str, Callable[[], np.ndarray]] = {
        "one at a time": lambda: encode_in_file_order(first, texts, 1),
        f"{UNSORTED_BATCH_SIZE} as they come": lambda: encode_in_file_order(
            first, texts, UNSORTED_BATCH_SIZE
        ),
    }
    for name, one in made.items():
        found[name] = lambda one=one: one.encode(texts)
    return found


def compare_text_vectors(functions: dict[str, Callable[[], np.ndarray]]) -> dict[str, float]:
    """Largest difference from the first's vectors, as a share of their largest value; none may be large."""
    vectors = {name: torch.from_numpy(function()) for name, function in functions.items()}
    expected = next(iter(vectors.values()))
    errors = {name: relative_error(found, expected) for name, found in vectors.items()}
    for name, error in errors.items():
        if error > TOLERANCE.get(name, TOLERANCE["float32"]):
            raise SystemExit(f"{name} and {next(iter(vectors))} differ: {error:.1e}")
    return errors


def record_cpu_seconds(function: Callable[[], np.ndarray], spent: list[float]) -> Callable[[], None]:
    """The function, leaving the CPU seconds of each call in `spent`."""

    def call() -> None:
        start = process_time()
        function()
        spent.append(process_time() - start)

    return call


def main() -> None:
    """Measure, print, save."""
    parser = build_benchmark_parser(__doc__, "bench_encode")
    parser.add_argument("--dataset", required=True, help="its NAME.item has the texts")
    parser.add_argument("--data-path", default="dataset", help="folder that holds NAME/NAME.item")
    parser.add_argument("--text-encoder", required=True, help="folder or hub name of an encoder")
    parser.add_argument("--items", type=int, default=500, help="so many items, drawn at random")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[256, 512, 2048])
    args = parser.parse_args()
    set_threads_and_device(args.device, args.threads)
    texts = read_item_texts(
        Path(args.data_path) / args.dataset / f"{args.dataset}.item", "item_id", None
    ).texts
    rng = np.random.default_rng(0)
    texts = [texts[k] for k in rng.choice(len(texts), min(args.items, len(texts)), replace=False)]
    functions = build_encoding_variants(args, texts)
    errors = compare_text_vectors(functions)
    spent: dict[str, list[float]] = {name: [] for name in functions}
    timed = {name: record_cpu_seconds(function, spent[name]) for name, function in functions.items()}
    seconds = measure_median_seconds(timed, args.repeats, args.device)
    cpu = {name: median(spent[name][-args.repeats :]) for name in seconds}  # without the first call
    slowest = seconds["one at a time"]
    rows: list[Row] = [
        {
            "what": name,
            "texts per second": len(texts) / taken,
            "times as fast": slowest / taken,
            "times less CPU time": cpu["one at a time"] / cpu[name],
            "difference": errors[name],
        }
        for name, taken in seconds.items()
    ]
    lengths = build_bench_text_encoder(args).count_tokens(texts)
    write_benchmark_results(
        args,
        rows,
        f"{len(texts):,} texts of {np.mean(lengths):.0f} tokens on average, {max(lengths)} at most",
    )
    speeds = [len(texts) / seconds[f"{tokens:,} tokens a batch"] for tokens in args.batch_tokens]
    plot_benchmark_series(
        args,
        {
            "similar lengths together": (list(map(float, args.batch_tokens)), speeds),
            "one at a time": (list(map(float, args.batch_tokens)), [len(texts) / slowest] * len(speeds)),
        },
        "tokens a batch",
        "texts per second",
    )


if __name__ == "__main__":
    main()
