"""Whole models: a training step and inference per sequence, and what an epoch of ml-1m costs.

    python scripts/bench/model.py               # CPU or GPU, whichever is there
    python scripts/bench/model.py --lengths 200 --models "M2Rec" SASRec

All models run through RecBole on the same random histories, padded to L items where they are
shorter, at their default sizes (D = 64, two layers). A dense row trains L targets, a prefix row
one (BERT4Rec's, its masked items): an epoch is the rows
of ml-1m (5-core, 981,491 training targets) times the time per row. Before anything is timed,
the dense vectors of M2Rec are compared with those of each prefix.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    Row,
    add_length_arguments,
    build_benchmark_parser,
    check_equal,
    collect_series,
    compute_batch_size,
    measure_median_seconds,
    measure_peak_mib,
    parse_benchmark_arguments,
    plot_benchmark_series,
    print_row,
    write_benchmark_results,
)
from torch import nn

from m2rec.compat import Interaction, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.models.registry import find_model_class
from m2rec.text import vector_file
from m2rec.training.configuration import build_config

TEXT_WIDTH = 384
# dense windows of at most L items that hold ml-1m's targets, and the targets themselves
ML_1M_WINDOWS, ML_1M_TARGETS = {50: 22_532, 200: 8_617}, 981_491
TOLERANCE = 1e-4
INFERENCE_SECONDS = 0.3  # of calls in a row: many users are ranked one batch after the other

MIXER_ONLY = {"filter": "none", "text_vectors": "none", "gate": "mean"}
MODELS: dict[str, dict[str, Any]] = {
    "M2Rec": {},
    "M2Rec, S6": {"mixer": "mamba"},
    "M2Rec without filter": {"filter": "none"},
    "M2Rec without text": {"text_vectors": "none"},
    "M2Rec without gate": {"gate": "mean"},
    "SSD alone": MIXER_ONLY,
    "S6 alone": {**MIXER_ONLY, "mixer": "mamba"},
    "attention alone (SDPA)": {**MIXER_ONLY, "mixer": "attention"},
    "M2Rec, prefix rows": {"rows": "prefix"},
    "Mamba4Rec": {"model": "Mamba4Rec"},
    "Mamba4Rec, mamba_ssm": {"model": "Mamba4Rec", "scan_backend": "mamba_ssm"},
    "SASRec": {"model": "SASRec"},
    "BERT4Rec": {"model": "BERT4Rec"},
    "GRU4Rec": {"model": "GRU4Rec"},
}


@dataclass
class TimedModel:
    """A model with the batches that it is timed on."""

    model: Any
    rows: str
    train_batch: Any
    test_batch: Any
    optimizer: torch.optim.Optimizer

    def train(self) -> None:
        """One training step."""
        self.model.train()
        self.optimizer.zero_grad()
        self.model.calculate_loss(self.train_batch).backward()
        self.optimizer.step()

    @torch.no_grad()
    def infer(self) -> None:
        """The scores of all items for each history; the model is in evaluation mode."""
        self.model.full_sort_predict(self.test_batch)


def write_random_dataset(folder: Path, length: int, n_items: int) -> None:
    """Users with `length` training targets each, in which every item occurs; random text vectors."""
    generator = torch.Generator().manual_seed(0)
    per_user = length + 3
    n_users = max(8, -(-n_items // per_user))
    items = torch.randint(n_items, (n_users * per_user,), generator=generator)
    items[:n_items] = torch.randperm(n_items, generator=generator)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for i, item in enumerate(items.tolist()):
        lines.append(f"u{i // per_user}\ti{item}\t{i}")
    (folder / "bench").mkdir()
    (folder / "bench" / "bench.inter").write_text("\n".join(lines) + "\n")
    vectors = torch.randn(n_items, TEXT_WIDTH, generator=generator)
    path = folder / "bench" / f"bench{vector_file.VECTOR_FILE_SUFFIX}"
    vector_file.write_text_vectors(path, [f"i{k}" for k in range(n_items)], vectors, {"model": "random"})


def build_timed_model(name: str, folder: Path, length: int, batch: int, device: str) -> TimedModel:
    """The model that `name` stands for, on the data in `folder`."""
    gpu = (device.partition(":")[2] or "0") if device.startswith("cuda") else ""
    values = {
        "dataset": "bench",
        "data_path": str(folder),
        "auto": False,
        "MAX_ITEM_LIST_LENGTH": length,
        "gpu_id": gpu,
        "train_batch_size": batch,  # BERT4Rec masks every row it loads, one item after the other
        "eval_batch_size": 2**20,
        "show_progress": False,
        **MODELS[name],
    }
    config = build_config(values)
    init_seed(0, True)
    train, _, test = data_preparation(config, HistoryDataset(config))
    model = find_model_class(config["model"])(config, train.dataset).to(config["device"])
    optimizer = torch.optim.Adam(model.parameters())
    test_batch, *_ = next(iter(test))
    batches = [repeat_rows(rows, batch).to(config["device"]) for rows in (next(iter(train)), test_batch)]
    rows = train.dataset.rows if config["model"] == "M2Rec" else "prefix"
    return TimedModel(model, rows, *batches, optimizer)


def repeat_rows(rows: Interaction, batch: int) -> Interaction:
    """As many rows as `batch`, the given ones over and over."""
    return rows[torch.arange(batch) % len(rows)]


@torch.no_grad()
def check_dense_against_prefixes(encoder: nn.Module, length: int, n_items: int, device: str) -> None:
    """Stop unless a dense pass gives at each position what the prefix that ends there gives."""
    encoder.eval()
    last = min(length, 40)
    items = torch.randint(1, n_items, (2, last), device=device)
    whole = encoder(items, torch.full((2,), last, device=device))
    for n in (1, (last + 1) // 2, last):
        prefix = encoder.last(items[:, :n], torch.full((2,), n, device=device))
        check_equal(f"dense and prefix rows at position {n}", [whole[:, n - 1]], [prefix], TOLERANCE)


def build_timed_models(args: argparse.Namespace, length: int, batch: int) -> dict[str, TimedModel]:
    """The models of `--models` that can run here."""
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        write_random_dataset(Path(folder), length, args.items)
        for name in args.models:
            try:
                models[name] = build_timed_model(name, Path(folder), length, batch, args.device)
            except ValueError as error:
                print(f"without {name}: {error}")
    return models


def measure_models(args: argparse.Namespace, length: int) -> list[Row]:
    """All models at one length."""
    batch = compute_batch_size(args, length)
    models = build_timed_models(args, length, batch)
    for timed in models.values():
        if hasattr(timed.model, "encoder"):
            check_dense_against_prefixes(timed.model.encoder, length, args.items, args.device)
    steps = {name: timed.train for name, timed in models.items()}
    train = measure_median_seconds(steps, args.repeats, args.device)
    for timed in models.values():
        timed.model.eval()
    queries = {name: models[name].infer for name in train}
    infer = measure_median_seconds(queries, args.repeats, args.device, at_least=INFERENCE_SECONDS)
    rows = []
    for name in infer:
        timed = models[name]
        row: Row = {"L": length, "B": batch, "model": name, "rows": timed.rows}
        row["training ms per row"] = train[name] / batch * 1e3
        row["inference ms per history"] = infer[name] / batch * 1e3
        if length in ML_1M_WINDOWS:
            epoch = ML_1M_WINDOWS[length] if timed.rows == "dense" else ML_1M_TARGETS
            row["minutes per epoch of ml-1m"] = train[name] / batch * epoch / 60
        if args.device.startswith("cuda"):
            row["peak MiB of a step"] = measure_peak_mib(timed.train, args.device)
        rows.append(print_row(row))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = build_benchmark_parser(__doc__, "bench_model")
    add_length_arguments(parser)
    parser.add_argument("--items", type=int, default=3_416, help="catalogue, that of ml-1m by default")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    args = parse_benchmark_arguments(parser)
    rows = []
    for length in args.lengths:
        rows += measure_models(args, length)
    note = f"{args.items:,} items, float32; epochs are rows times the time per row"
    write_benchmark_results(args, rows, note)
    series = collect_series(rows, "{model}", "L", "inference ms per history")
    plot_benchmark_series(args, series, "history length L", "inference, ms per history")


if __name__ == "__main__":
    main()
