"""RePlay's SASRec with the whole softmax, and the older class of it that RePlay compiles for OpenVINO."""

from collections.abc import Iterator

import numpy as np
import torch
from replay.data import FeatureHint, FeatureSource, FeatureType
from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
from replay.nn.sequential import SasRec
from replay.nn.transform.template import make_default_sasrec_transforms
from worker import Peer, Ranked, Task, pad_left, rank_scores, run_worker

HELD_OUT = 2  # of each user: validation and test

Batch = dict[str, torch.Tensor]


def build_peer(task: Task) -> Peer:
    """`sasrec`, or `openvino`, which only ranks."""
    histories = task.read_histories()
    n_items = 1 + max(int(history.max()) for history in histories)
    queries = pad_left([history[:-1] for history in histories[: task.histories]], task.length, n_items)
    schema = _build_schema(n_items, task.width)
    if task.model == "openvino":
        return _build_compiled(task, schema, queries)
    model = SasRec.from_params(
        schema, task.width, task.heads, task.layers, max_sequence_length=task.length, dropout=task.dropout
    )

    def score(items: torch.Tensor) -> torch.Tensor:
        return model({"item": items}, items != n_items)["logits"]

    @torch.inference_mode()
    def rank() -> Ranked:
        model.eval()
        return rank_scores([score(items) for items in queries.split(task.batch)])

    # the model's own preparation of a batch, without the reading of its Parquet files
    sequences = [history[:-HELD_OUT] for history in histories]
    rows = pad_left(sequences, task.length + 1, n_items)
    transforms = torch.nn.Sequential(*make_default_sasrec_transforms(schema)["train"])

    def make_batches() -> Iterator[Batch]:
        for picked in torch.randperm(len(rows)).split(task.batch):
            items = rows[picked]
            yield transforms({"item": items, "item_mask": items != n_items})

    def compute_loss(batch: Batch) -> torch.Tensor:
        names = ("feature_tensors", "padding_mask", "positive_labels", "target_padding_mask")
        return model(**{name: batch[name] for name in names})["loss"]

    return Peer(
        rank=rank,
        model=model,
        batches=make_batches,
        compute_loss=compute_loss,
        count_targets=lambda batch: int(batch["target_padding_mask"].sum()),
        epoch_targets=sum(min(len(s), task.length) for s in sequences),  # a first item after padding too
    )


def _build_schema(n_items: int, width: int) -> TensorSchema:
    return TensorSchema(
        TensorFeatureInfo(
            "item",
            FeatureType.CATEGORICAL,
            is_seq=True,
            feature_hint=FeatureHint.ITEM_ID,
            feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item")],
            cardinality=n_items,
            padding_value=n_items,
            embedding_dim=width,
        )
    )


def _build_compiled(task: Task, schema: TensorSchema, queries: torch.Tensor) -> Peer:
    from replay.models.nn.sequential.compiled import SasRecCompiled
    from replay.models.nn.sequential.sasrec import SasRec as OlderSasRec

    model = OlderSasRec(
        schema,
        block_count=task.layers,
        head_count=task.heads,
        hidden_size=task.width,
        max_seq_len=task.length,
        dropout_rate=task.dropout,
    ).eval()
    compiled = SasRecCompiled.compile(model, "dynamic_batch_size", num_threads=task.threads)
    n_items = schema["item"].cardinality

    def score(items: torch.Tensor) -> torch.Tensor:
        return compiled.predict({"feature_tensor": {"item": items}, "padding_mask": items != n_items})

    some = queries[: task.batch]
    with torch.no_grad():
        expected = model.predict({"feature_tensor": {"item": some}, "padding_mask": some != n_items})
    np.testing.assert_allclose(score(some), expected, atol=1e-3 * float(expected.abs().max()))
    return Peer(rank=lambda: rank_scores([score(items) for items in queries.split(task.batch)]))


if __name__ == "__main__":
    run_worker(build_peer, ["replay-rec", "lightning", "openvino", "torch", "numpy"])
