"""The models that are installed beside m2rec: M2Rec, and SASRec and GRU4Rec of RecBole on m2rec's loaders.

M2Rec trains all targets of a history at once, and ranks as `Recommender` does: from item tokens to
named items. RecBole's models train a row per target, as RecBole does, and rank from padded histories.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import K, Peer, Ranked, Task, pad_left, rank_scores, run_worker

from m2rec.compat import Interaction, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.data.histories import shift_targets
from m2rec.models.registry import find_model_class
from m2rec.serving.recommender import Recommender
from m2rec.serving.saved_model import build_saved_model
from m2rec.text import vector_file
from m2rec.training.configuration import build_config, resolve_settings

TEXT_WIDTH = 384

ATTENTION_ALONE = {"mixer": "attention", "filter": "none", "text_vectors": "none", "gate": "mean"}
MODELS: dict[str, dict[str, Any]] = {
    "m2rec": {"model": "M2Rec"},
    "attention": {"model": "M2Rec", **ATTENTION_ALONE},
    "sasrec": {"model": "SASRec"},
    "gru4rec": {"model": "GRU4Rec"},
}


def build_peer(task: Task) -> Peer:
    """The model, with the loader of a run."""
    with tempfile.TemporaryDirectory() as folder:
        _write_dataset(Path(folder), task)
        config = build_config({"data_path": folder, "auto": False, **_choose_settings(task)})
        init_seed(0, True)
        dataset = HistoryDataset(config)
        train, *_ = data_preparation(config, dataset)
        model = find_model_class(config["model"])(config, train.dataset)
    is_m2rec = config["model"] == "M2Rec"
    return Peer(
        rank=_build_recommender(model, task, config) if is_m2rec else _build_ranking(model, task),
        model=model,
        batches=lambda: train,
        compute_loss=model.calculate_loss,
        count_targets=lambda batch: _count_dense_targets(model, batch) if is_m2rec else len(batch),
        # all items but each user's first one, and those of validation and test
        epoch_targets=sum(len(history) - 3 for history in task.read_histories()),
    )


def _choose_settings(task: Task) -> dict[str, Any]:
    """Keys of config.yaml; SASRec, GRU4Rec and M2Rec have names of their own for the same sizes."""
    values = {
        "dataset": "bench",
        "MAX_ITEM_LIST_LENGTH": task.length,
        "train_batch_size": task.batch,
        "hidden_size": task.width,
        "use_gpu": False,
        "show_progress": False,
        **MODELS[task.model],
    }
    if values["model"] == "GRU4Rec":
        sizes = {"embedding_size": task.width, "num_layers": task.layers}
        return {**values, **sizes, "dropout_prob": task.dropout}
    values["n_layers"] = task.layers
    if values["model"] == "SASRec":
        dropout = {"hidden_dropout_prob": task.dropout, "attn_dropout_prob": task.dropout}
        return {**values, **dropout, "n_heads": task.heads}
    if task.model == "attention":
        values["n_heads"] = task.heads
    return {**values, "dropout_prob": task.dropout}


def _write_dataset(folder: Path, task: Task) -> None:
    """The interactions as RecBole's file, and random text vectors of its items."""
    columns = task.read_interactions()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    rows = zip(*(columns[name].tolist() for name in ("user", "item", "time")), strict=True)
    lines += [f"u{user}\ti{item}\t{time}" for user, item, time in rows]
    (folder / "bench").mkdir()
    (folder / "bench" / "bench.inter").write_text("\n".join(lines) + "\n")
    n_items = int(columns["item"].max()) + 1
    path = folder / "bench" / f"bench{vector_file.VECTOR_FILE_SUFFIX}"
    tokens = [f"i{item}" for item in range(n_items)]
    vector_file.write_text_vectors(
        path, tokens, torch.randn(n_items, TEXT_WIDTH).numpy(), {"model": "random"}
    )


def _count_dense_targets(model: Any, batch: Interaction) -> int:
    targets = shift_targets(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN], batch[model.ITEM_ID])
    return int((targets > 0).sum())


def _build_recommender(model: Any, task: Task, config: Any):  # noqa: ANN202
    """A function that ranks by `Recommender`, whose network does not change with training."""
    nothing: dict[str, Any] = {"titles": {}, "counts": [], "text_mean": None, "text_basis": None}
    n_items = model.n_items
    tokens = ["[PAD]", *(str(item) for item in range(n_items - 1))]
    encoder = copy.deepcopy(model.encoder)
    recommender = Recommender(
        build_saved_model(encoder, tokens, config=resolve_settings(config), text_source={}, **nothing)
    )
    queries = [list(map(str, history[:-1])) for history in task.read_histories()[: task.histories]]

    def rank() -> Ranked:
        ranked = list(recommender.recommend_batch(queries, K, exclude_seen=False))
        items = [[int(entry.item) for entry in row] for row in ranked]
        return Ranked(np.array(items), np.array([[entry.score for entry in row] for row in ranked]))

    return rank


def _build_ranking(model: Any, task: Task):  # noqa: ANN202
    """A function that ranks by RecBole's `full_sort_predict`, histories padded to L on the right."""
    histories = [1 + history[:-1] for history in task.read_histories()[: task.histories]]
    lengths = torch.tensor([min(len(history), task.length) for history in histories])
    shift = (torch.arange(task.length) + task.length - lengths[:, None]) % task.length
    items = pad_left(histories, task.length, 0).gather(1, shift)
    queries = Interaction({model.ITEM_SEQ: items, model.ITEM_SEQ_LEN: lengths})

    @torch.inference_mode()
    def rank() -> Ranked:
        model.eval()
        starts = range(0, task.histories, task.batch)
        return rank_scores([model.full_sort_predict(queries[start : start + task.batch]) for start in starts])

    return rank


if __name__ == "__main__":
    run_worker(build_peer, ["recbole", "torch", "numpy"])
