"""`m2rec.fit`: from DataFrames to a trained Recommender, by the same run as from files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2rec.data.frames import InteractionColumns, UserHistories, write_dataset
from m2rec.errors import UserError
from m2rec.serving.recommender import Recommender
from m2rec.settings import RunSettings
from m2rec.training.configuration import collect_user_values
from m2rec.training.continued_run import build_run_config
from m2rec.training.run import run_experiment

# keys of the files that `fit` writes itself
_FILE_KEYS = ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD", "field_separator", "benchmark_filename")


def fit(
    interactions: Any,
    items: Any = None,
    *,
    user: str = "user_id",
    item: str = "item_id",
    time: str | None = "timestamp",
    item_id: str | None = None,
    text: Sequence[str] | None = None,
    dataset: str | None = None,
    **settings: Any,
) -> Recommender:
    """Train on DataFrames of pandas or polars, evaluate, and return the trained model.

    The frames are written as the files of a data set into the folder `data_path`, and the run is that of
    these files, to the last digit. Its folder is `recommender.folder`.

    Args:
        interactions: a row for each click, purchase or rating.
        items: a row for each item, with its text; without it the model runs without text.
        user, item, time: columns of the interactions. Times are numbers of one unit or dates; `time=None` is
            for rows in chronological order.
        item_id: the column of the item in `items`; by default as in the interactions.
        text: columns of text in `items`; None for all others.
        dataset: a name for the data set; by default one that follows from the content.
        settings: any keys of config.yaml, such as `epochs=50` or `runs_dir="runs"`.

    Raises:
        ValueError: a frame or a setting can't be used, the data set is there with other content, training
            diverged, or RecBole is not installed.
        RunInterrupted: Ctrl-C or SIGTERM asked it to stop; `m2rec train --resume` continues it.
    """
    for key in _FILE_KEYS:
        if key in settings:
            raise UserError(f"{key}: fit writes the files itself; name columns with user=, item= and time=")
    if items is None and (item_id is not None or text is not None):
        raise UserError("items: missing, and item_id or text is given; give the frame of items")
    data_path = collect_user_values(settings, None).get("data_path", RunSettings.defaults()["data_path"])
    columns = InteractionColumns(user, item, time)
    name = write_dataset(Path(data_path), dataset, interactions, columns, items, item_id or item, text)
    config = build_run_config({**settings, "dataset": name})
    if config.model_settings is None:
        raise UserError(
            f"model: a Recommender needs M2Rec's parts, which {config['variant']} is not made of; "
            f"train it on the files of {name!r}, with --dataset={name}"
        )
    result = run_experiment(config)
    recommender = Recommender.load(result.folder)
    recommender.histories = UserHistories(interactions, columns, recommender.tokens[1:])
    return recommender
