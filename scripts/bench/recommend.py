"""Recommending by a trained run: one history, a live event, many histories, against RecBole's own way.

    python scripts/bench/recommend.py runs/NAME

The baseline is RecBole's full_sort_topk with the same model, which makes a test row of each user,
padded to the longest history, and ranks all items, those of the history too. Before anything is
timed, the best items of both are compared. The last rows are of the model with a million items: its
own, and copies of them with noise of half the table's spread. On a CPU they are ranked with
`precision="int8"` too, and where faiss is installed by an index, whose recall is of the test users'
best items.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from benchmarking import (
    Row,
    build_benchmark_parser,
    measure_median_seconds,
    parse_benchmark_arguments,
    write_benchmark_results,
)

from m2rec.models.m2rec import M2Rec
from m2rec.nn.text_projection import TextBranch
from m2rec.serving import saved_model
from m2rec.serving.recommender import Recommender
from m2rec.training.run import load_run_data

K = 10
MILLION = 1_000_000
PROBES = (32, 1000)  # besides the default


class RecBoleBaseline:
    """RecBole's full_sort_topk on the data of the run.

    Args:
        run: the run folder.
        users: how many of its test users.
    """

    def __init__(self, run: Path, users: int, device: str) -> None:
        config, dataset, (train, _, self.test) = load_run_data(run, use_gpu=device != "cpu")
        model = saved_model.read_saved_model(run, torch.device(device))
        self.model = M2Rec(config, train.dataset).to(device).eval()
        self.model.encoder = model.encoder
        rows = self.test.dataset.inter_feat[:users]
        self.users = rows[dataset.uid_field].numpy()
        self.device, tokens = device, dataset.item_tokens
        self.histories = []
        lengths = rows[dataset.item_list_length_field]
        for items, length in zip(rows[dataset.history_field].tolist(), lengths, strict=True):
            self.histories.append([tokens[item] for item in items[:length]])

    @torch.no_grad()
    def top_items(self, start: int, stop: int) -> torch.Tensor:
        """Internal ids of the best items of some users, (B, K)."""
        from recbole.utils.case_study import full_sort_topk  # once compat has mended what it needs

        _, items = full_sort_topk(self.users[start:stop], self.model, self.test, K, self.device)
        return items


def compare_top_items(recommender: Recommender, baseline: RecBoleBaseline, n: int) -> None:
    """Both must find the same items, but for ties."""
    expected = baseline.top_items(0, n).tolist()
    ranked = recommender.recommend_batch(baseline.histories[:n], K, exclude_seen=False)
    for row, found in zip(expected, ranked, strict=True):
        ids = recommender.to_ids(item.item for item in found)
        if len(set(row) & set(ids)) < K - 1:
            raise SystemExit(f"the best items differ: {row} and {ids}")


def build_live_event(recommender: Recommender, history: list[str]) -> Callable[[], object]:
    """An event and what to recommend after it, over and over."""
    session, next_items = recommender.session(history), cycle(history)

    def event() -> None:
        session.add(next(next_items))
        session.recommend(K)

    return event


def build_million_item_recommender(model: saved_model.SavedModel) -> Recommender:
    """The model with a million items: its own, then each of them many times with noise."""
    generator, n_items = torch.Generator().manual_seed(0), len(model.table)
    copied = torch.randint(1, n_items, (MILLION + 1 - n_items,), generator=generator)
    source = torch.cat([torch.arange(n_items), copied]).to(model.table.device)
    noise = torch.randn(len(copied), model.table.shape[1], generator=generator)
    table = model.table[source]
    table[n_items:] += noise.to(table) * model.table[1:].std() / 2
    encoder = model.encoder.make_inference_copy(table)
    for branch in encoder.iterate_branches():
        if isinstance(branch, TextBranch):
            encoder.available = encoder.available[source]
            branch.projected = branch.projected[source]
    tokens = [*model.tokens, *(f"copy {number}" for number in range(len(copied)))]
    nothing: dict[str, Any] = {"titles": {}, "text_mean": None, "text_basis": None, "text_source": {}}
    return Recommender(
        saved_model.build_saved_model(encoder, tokens, counts=[], config=model.config, **nothing)
    )


def make_row(what: str, seconds: float, queries: int = 1, **more: float) -> Row:
    """A row of the table: milliseconds for all queries, and how many a second."""
    return {"what": what, "ms": seconds * 1e3, "per second": queries / seconds, **more}


def measure_million_items(
    recommender: Recommender, histories: list[list[str]], args: argparse.Namespace
) -> Iterator[Row]:
    """Exactly and in int8 in turns, then by indices that search more and more lists."""
    past = (histories[0] * args.length)[: args.length]

    def measure(recommenders: dict[str, Recommender], **more: float) -> Iterator[Row]:
        some: dict[str, Callable[[], object]] = {}
        for kind, one in recommenders.items():
            some[f"recommend, {MILLION:,} items, {kind}"] = partial(one.recommend, past, K)
            some[f"live event and ranking, {MILLION:,} items, {kind}"] = build_live_event(one, past)
        for name, seconds in measure_median_seconds(some, args.repeats, args.device, at_least=0.3).items():
            yield make_row(name, seconds, **more)

    exact = {"exact": recommender}
    if args.device == "cpu":
        exact["int8"] = Recommender(recommender.model, precision="int8")
    yield from measure(exact)
    if not find_spec("faiss"):
        return
    for probes in (0, *PROBES):
        start = perf_counter()
        recommender.use_index(probes)
        built = perf_counter() - start
        kind = f"index, {probes} lists" if probes else f"index, one list in 16, built in {built:.0f} s"
        yield from measure({kind: recommender}, **{f"recall@{K}": recommender.recall(histories[:200], K)})


def measure_run(
    recommender: Recommender, baseline: RecBoleBaseline, history: list[str], args: argparse.Namespace
) -> Iterator[Row]:
    """One history, one live event and many histories, against RecBole."""
    short, long = f"{args.length:,} items", f"{50 * args.length:,} items"
    one = {
        f"recommend, {short}": lambda: recommender.recommend(history, K),
        f"live event and ranking, {short}": build_live_event(recommender, history),
        f"live event and ranking, {long}": build_live_event(recommender, 50 * history),
        "RecBole, one user": lambda: baseline.top_items(0, 1),
    }
    for name, seconds in measure_median_seconds(one, args.repeats, args.device, at_least=0.3).items():
        yield make_row(name, seconds)
    n = len(baseline.users)

    def rank_by_recbole() -> None:
        for start in range(0, n, args.batch):
            baseline.top_items(start, start + args.batch)

    many = {
        "recommend_batch": lambda: list(recommender.recommend_batch(baseline.histories, K)),
        "RecBole, batches": rank_by_recbole,
    }
    for name, seconds in measure_median_seconds(many, args.repeats, args.device).items():
        yield make_row(f"{name}, {n:,} users", seconds, queries=n)


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_recommend")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=2000, help="test users for the batch")
    parser.add_argument("--length", type=int, default=200, help="items of the one history")
    parser.add_argument("--batch", type=int, default=256, help="users that the baseline ranks together")
    parser.add_argument("--no-million", action="store_true", help="without the large catalogue")
    args = parse_benchmark_arguments(parser)
    recommender = Recommender.load(args.run, args.device)
    baseline = RecBoleBaseline(args.run, args.users, args.device)
    compare_top_items(recommender, baseline, min(len(baseline.users), args.batch))
    tokens = recommender.tokens[1:]
    history = [tokens[(37 * i) % len(tokens)] for i in range(args.length)]
    rows = list(measure_run(recommender, baseline, history, args))
    if not args.no_million:
        model = saved_model.read_saved_model(args.run, torch.device(args.device))
        rows += measure_million_items(build_million_item_recommender(model), baseline.histories, args)
    mean = sum(map(len, baseline.histories)) / len(baseline.histories)
    note = f"{len(tokens):,} items; the users' histories have {mean:.0f} items on average"
    write_benchmark_results(args, rows, note)


if __name__ == "__main__":
    main()
