"""RecTools' SASRec and HSTU: whole softmax, the library's default; each user's last L + 1 training items."""

import numpy as np
import pandas as pd
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import HSTUModel, SASRecModel
from worker import K, Peer, Ranked, Task, run_worker

HELD_OUT = 2  # of each user: validation and test

MODELS = {"sasrec": SASRecModel, "hstu": HSTUModel}


def build_peer(task: Task) -> Peer:
    """The model, with the library's loaders and its ranker."""
    frame = _read_frame(task)
    age = frame.groupby(Columns.User).cumcount(ascending=False)
    model = MODELS[task.model](
        n_factors=task.width,
        n_blocks=task.layers,
        n_heads=task.heads,
        dropout_rate=task.dropout,
        session_max_len=task.length,
        batch_size=task.batch,
        recommend_batch_size=task.batch,
        recommend_torch_device="cpu",
    )
    model._build_model_from_dataset(Dataset.construct(frame[age >= HELD_OUT]))
    model.lightning_model._xavier_normal_init()
    network, lightning = model.torch_model, model.lightning_model

    def compute_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return lightning.loss_calculator(lightning.get_batch_logits(batch), batch["y"], batch["yw"])

    loader = model.data_preparator.get_dataloader_train()
    return Peer(
        rank=_build_ranking(model, task, frame[age > 0]),
        model=network,
        batches=lambda: loader,
        compute_loss=compute_loss,
        count_targets=lambda batch: int((batch["y"] != 0).sum()),
        epoch_targets=sum(len(session) - 1 for session in loader.dataset.sessions),
    )


def _read_frame(task: Task) -> pd.DataFrame:
    columns = task.read_interactions()
    return pd.DataFrame(
        {
            Columns.User: columns["user"],
            Columns.Item: columns["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(columns["time"], unit="s"),
        }
    )


def _build_ranking(model: SASRecModel | HSTUModel, task: Task, frame: pd.DataFrame):  # noqa: ANN202
    """A function that ranks from the users' sessions; the data frames are done with before."""
    users = np.arange(task.histories)
    context = None
    if model.data_preparator.add_unix_ts:  # HSTU wants the time of the question too
        context = frame[frame[Columns.User].isin(users)].groupby(Columns.User, as_index=False).last()
    dataset = Dataset.construct(frame)
    sessions = model.data_preparator.transform_dataset_u2i(dataset, users, context)

    def rank() -> Ranked:
        _, items, scores = model._recommend_u2i(users, sessions, K, False, None)
        shape = (task.histories, K)
        return Ranked(np.asarray(items).reshape(shape), np.asarray(scores).reshape(shape))

    return rank


if __name__ == "__main__":
    run_worker(build_peer, ["rectools", "pytorch-lightning", "torch", "numpy"])
