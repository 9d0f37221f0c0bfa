"""Texts per second of scripts/embed_items.py against encoding them one at a time, in the file's order.

    python scripts/bench/encode.py --dataset=NAME --text-encoder=MODEL

Same model, same texts, same limits; other baselines are batches of 64 in the file's order, and
bfloat16. Before anything is timed, all vectors are compared. Loading is not timed, tokenizing is.
CPU time is given too, because other processes on the machine disturb it less.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time

import numpy as np
import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    parse_benchmark_arguments,
    plot_benchmark_series,
    relative_error,
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
    options = TextEncoderOptions(args.text_encoder, batch_tokens=batch_tokens, device=kind, dtype=dtype)
    return TextEncoder(options)


def encode_in_file_order(encoder: TextEncoder, texts: list[str], batch_size: int) -> np.ndarray:
    """All texts in batches of this size, in file order."""
    parts = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        parts.append(encoder.model.encode(some, batch_size=batch_size, normalize_embeddings=True))
    return np.concatenate(parts)


def build_encoding_variants(
    args: argparse.Namespace, texts: list[str]
) -> dict[str, Callable[[], np.ndarray]]:
    """Every way to encode the texts, by its name; all in float32 share one model."""
    first = build_bench_text_encoder(args)
    variants: dict[str, Callable[[], np.ndarray]] = {}
    for name, size in {
        "one at a time": 1,
        f"{UNSORTED_BATCH_SIZE} as they come": UNSORTED_BATCH_SIZE,
    }.items():
        variants[name] = partial(encode_in_file_order, first, texts, size)
    for tokens in args.batch_tokens:
        encoder = build_bench_text_encoder(args, tokens)
        encoder.__dict__["model"] = first.model
        variants[f"{tokens:,} tokens a batch"] = partial(encoder.encode, texts)
    variants["bfloat16"] = partial(build_bench_text_encoder(args, dtype="bfloat16").encode, texts)
    return variants


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


def read_sample_texts(args: argparse.Namespace) -> list[str]:
    """Texts of items drawn at random."""
    path = Path(args.data_path) / args.dataset / f"{args.dataset}.item"
    texts = read_item_texts(path, "item_id", None).texts
    chosen = np.random.default_rng(0).choice(len(texts), min(args.items, len(texts)), replace=False)
    return [texts[k] for k in chosen]


def measure_variants(args: argparse.Namespace, texts: list[str]) -> list[Row]:
    """All ways to encode the texts."""
    functions = build_encoding_variants(args, texts)
    errors = compare_text_vectors(functions)
    spent: dict[str, list[float]] = {name: [] for name in functions}
    timed = {name: record_cpu_seconds(function, spent[name]) for name, function in functions.items()}
    seconds = measure_median_seconds(timed, args.repeats, args.device)
    cpu = {name: median(spent[name][-args.repeats :]) for name in seconds}  # without the first call
    rows: list[Row] = []
    for name, taken in seconds.items():
        row: Row = {"what": name, "texts per second": len(texts) / taken}
        row["times as fast"] = seconds["one at a time"] / taken
        row["times less CPU time"] = cpu["one at a time"] / cpu[name]
        row["difference"] = errors[name]
        rows.append(row)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_encode")
    parser.add_argument("--dataset", required=True, help="its NAME.item has the texts")
    parser.add_argument("--data-path", default="dataset", help="folder that holds NAME/NAME.item")
    parser.add_argument("--text-encoder", required=True, help="folder or hub name of an encoder")
    parser.add_argument("--items", type=int, default=500, help="so many items, drawn at random")
    parser.add_argument("--batch-tokens", type=int, nargs="+", default=[256, 512, 2048])
    args = parse_benchmark_arguments(parser)
    texts = read_sample_texts(args)
    rows = measure_variants(args, texts)
    lengths = build_bench_text_encoder(args).count_tokens(texts)
    mean = np.mean(lengths)
    note = f"{len(texts):,} texts of {mean:.0f} tokens on average, {max(lengths)} at most"
    write_benchmark_results(args, rows, note)
    speeds = {row["what"]: row["texts per second"] for row in rows}
    sizes = [float(tokens) for tokens in args.batch_tokens]
    grouped = [speeds[f"{tokens:,} tokens a batch"] for tokens in args.batch_tokens]
    series = {
        "similar lengths together": (sizes, grouped),
        "one at a time": (sizes, [speeds["one at a time"]] * len(sizes)),
    }
    plot_benchmark_series(args, series, "tokens a batch", "texts per second")


if __name__ == "__main__":
    main()
