"""Histories of the users of a run's data set."""

from pathlib import Path
from typing import Any

from m2rec.data.dataset import HistoryDataset
from m2rec.errors import UserError
from m2rec.training.run import load_run_data

_KEEP_ALL_USERS = {"user_inter_num_interval": "[0,inf)", "item_inter_num_interval": "[0,inf)"}


def read_user_histories(run: Path, **keys: Any) -> list[tuple[str, list[str]]]:
    """Read every user of a data set and their items, oldest first; no user is filtered out.

    Args:
        run: the run folder, whose keys hold, but for the intervals of numbers of interactions.
        keys: keys that override the run's, such as dataset and data_path.

    Raises:
        ValueError: the data can't be loaded.
    """
    keys = {**_KEEP_ALL_USERS, **keys}
    _, dataset, _ = load_run_data(run, **keys)
    return list_user_histories(dataset)


def list_user_histories(dataset: HistoryDataset) -> list[tuple[str, list[str]]]:
    """The users of a loaded data set and their items, as tokens.

    Raises:
        ValueError: its rows have histories of their own.
    """
    if dataset.owner_field != dataset.uid_field:
        raise UserError(
            "dataset: its rows bring a history each (benchmark_filename), not whole users; give another one"
        )
    histories = dataset.histories
    assert histories is not None
    tokens = dataset.item_tokens
    users = dataset.field2id_token[dataset.uid_field]
    found = []
    for user, start, end in zip(histories.users, histories.start, histories.end, strict=True):
        items = histories.items[start:end]
        history = [tokens[item] for item in items]
        found.append((str(users[user]), history))
    return found
