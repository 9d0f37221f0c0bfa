"""An exported graph in onnxruntime against the model's own `recommend_batch`.

    python scripts/bench/onnx_graph.py --threads=2

The model is untrained, at its default sizes, of as many items as ml-100k has; what is timed does not
depend on weights. Before anything is timed, the best items of both are compared. The best
items of the graph's scores are found by NumPy.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    parse_benchmark_arguments,
    print_row,
    write_benchmark_results,
)

from m2rec.nn.encoder import Encoder
from m2rec.serving import saved_model
from m2rec.serving.recommender import Recommender
from m2rec.settings import ModelSettings

K = 10
TEXT_WIDTH = 384


def build_recommender(n_items: int, length: int, layers: int) -> Recommender:
    """An untrained network with text."""
    torch.manual_seed(0)
    encoder = Encoder(ModelSettings(n_layers=layers), n_items, length, torch.randn(n_items, TEXT_WIDTH))
    tokens = ["[PAD]", *(f"i{item}" for item in range(1, n_items))]
    about: dict[str, Any] = {"titles": {}, "text_mean": None, "text_basis": None, "text_source": {}}
    config = {"MAX_ITEM_LIST_LENGTH": length}
    return Recommender(saved_model.build_saved_model(encoder, tokens, counts=[], config=config, **about))


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """The graph, on a CPU with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def build_graph_ranking(
    session: onnxruntime.InferenceSession, recommender: Recommender, histories: list[list[str]]
) -> Callable[[], list[list[str]]]:
    """The best K items after each history, those of the history left out, by a graph."""
    tokens, ids = np.array(recommender.tokens), recommender.model.ids

    def rank() -> list[list[str]]:
        lengths = np.array([len(history) for history in histories])
        items = np.zeros((len(histories), lengths.max()), np.int64)
        for row, history in zip(items, histories, strict=True):
            row[: len(history)] = [ids[token] for token in history]
        (scores,) = session.run(None, {"items": items, "lengths": lengths})
        np.put_along_axis(scores, items, -np.inf, axis=1)
        best = np.argpartition(scores, -K, axis=1)[:, -K:]
        order = np.take_along_axis(scores, best, 1).argsort(1)[:, ::-1]
        return [tokens[row].tolist() for row in np.take_along_axis(best, order, 1)]

    return rank


def measure_rankings(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Batches of histories of random lengths, by the model and by its graph."""
    recommender = build_recommender(args.items, args.length, args.layers)
    recommender.export(folder / "model.onnx")
    session = open_session(folder / "model.onnx", args.threads)
    random = np.random.default_rng(0)
    for batch_size in args.batches:
        histories = []
        for length in random.integers(1, args.length + 1, batch_size):
            histories.append([recommender.tokens[item] for item in random.integers(1, args.items, length)])
        rank = build_graph_ranking(session, recommender, histories)
        own = [[found.item for found in ranking] for ranking in recommender.recommend_batch(histories, K)]
        for found, expected in zip(rank(), own, strict=True):
            if len(set(found) & set(expected)) < K - 1:
                raise SystemExit(f"the best items differ: {found} and {expected}")

        def rank_by_model(histories: list[list[str]] = histories) -> object:
            return list(recommender.recommend_batch(histories, K))

        some = {"recommend_batch": rank_by_model, "onnxruntime": rank}
        seconds = measure_median_seconds(some, args.repeats, "cpu", at_least=0.2)
        yield print_row(
            {
                "histories": batch_size,
                "recommend_batch ms": seconds["recommend_batch"] * 1e3,
                "onnxruntime ms": seconds["onnxruntime"] * 1e3,
                "times faster": seconds["recommend_batch"] / seconds["onnxruntime"],
            }
        )


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_onnx_graph")
    parser.add_argument("--items", type=int, default=1_683)
    parser.add_argument("--length", type=int, default=50, help="items of the longest history")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    args = parse_benchmark_arguments(parser)
    if args.device != "cpu":
        raise SystemExit(f"--device: {args.device} is not measured; give cpu")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(measure_rankings(args, Path(folder)))
    sizes = f"D = 64, {args.layers} layers, {args.items - 1:,} items with text"
    note = f"{sizes}, histories of 1 to {args.length} items"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
