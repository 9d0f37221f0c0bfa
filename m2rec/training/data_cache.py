"""The data of one run, kept for the next one that differs in other keys only."""

from typing import Any

from m2rec.compat import Config, data_preparation, init_seed
from m2rec.data.dataset import HistoryDataset
from m2rec.settings import MACHINE_KEYS, Role, collect_keys
from m2rec.training.configuration import resolve_settings
from m2rec.training.run import Loaders, load_data
from m2rec.training.settling import settle_settings

# keys of training and model that do not change the rows
_OTHER_KEYS = collect_keys(Role.MODEL, Role.TRAINING, Role.LENGTH, Role.METRICS, Role.DEFINITION) | {
    "attn_dropout_prob", "embedding_size", "hidden_dropout_prob",
}  # fmt: skip
_ROW_KEYS = {"MAX_ITEM_LIST_LENGTH", "data_path", "model", "rows"}


class DataCache:
    """Loads data as `load_data` does, unless the last run had the same.

    A key such as MAX_ITEM_LIST_LENGTH changes the rows, so its values load the data anew.
    """

    def __init__(self) -> None:
        self._keys: dict[str, Any] | None = None
        self._dataset: HistoryDataset | None = None
        self._parts: list[HistoryDataset] = []
        self.n_loaded = 0
        """How often the files were read."""

    def load(self, config: Config) -> tuple[HistoryDataset, Loaders]:
        """The data set and its loaders, as `load_data` returns them."""
        ignored = (_OTHER_KEYS | MACHINE_KEYS) - _ROW_KEYS
        keys = {key: value for key, value in resolve_settings(config).items() if key not in ignored}
        if self._dataset is None or keys != self._keys:
            self._dataset, self._parts = None, []  # free it before the next one is there
            dataset, loaders = load_data(config)
            self._keys, self._dataset = keys, dataset
            self._parts = [loader.dataset for loader in loaders]
            self.n_loaded += 1
            return dataset, loaders
        init_seed(config["seed"], config["reproducibility"])
        for part in (self._dataset, *self._parts):
            part.config = config
        settle_settings(config, self._dataset, self._parts[0])
        return self._dataset, Loaders(*data_preparation(config, self._dataset))
