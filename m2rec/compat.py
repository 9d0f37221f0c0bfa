"""RecBole, patched: the only module that imports RecBole, so every other module gets the patched version.

Each work-around names its upstream issue and when it can go.
"""

import copy
import csv
import functools
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from m2rec.errors import UserError
from m2rec.tensor_files import load_state, save_state

INSTALL_RECBOLE = (
    "recbole is not installed; run: pip install --no-deps recbole==1.2.1 "
    "(this project installs its dependencies; RecBole's own list has a ray without wheels for Python 3.12)"
)

# RecBole 1.2.1 reads NumPy names that NumPy 2 removed (RUCAIBox/RecBole#2212, #2215); goes
# when RecBole supports NumPy 2.
for _old, _new in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
    if _old not in np.__dict__:
        setattr(np, _old, _new)

# RecBole imports these at once and calls a function or two of each, for GAUC, RMSE and graphs. They take as
# long to import as PyTorch. Permanent: they are imported when they are called.
_DEFERRED = ("sklearn.metrics", "scipy.sparse", "torch.utils.tensorboard")


class _DeferredModule(types.ModuleType):
    """A module whose names are functions that import the real module when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return call


@contextmanager
def _defer_imports() -> Iterator[None]:
    """While RecBole is imported, put a `_DeferredModule` in the place of each module not loaded yet."""
    absent = [name for name in _DEFERRED if name not in sys.modules]
    sys.modules.update({name: _DeferredModule(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


with _defer_imports():
    try:
        import recbole
    except ModuleNotFoundError as error:
        raise UserError(INSTALL_RECBOLE) from error

    import recbole.data.dataset.dataset as _dataset
    import recbole.data.utils as _data
    import recbole.model.sequential_recommender.s3rec as _s3rec
    import recbole.trainer.trainer as _trainer
    from recbole.config import Config
    from recbole.data import data_preparation
    from recbole.data.dataloader import TrainDataLoader
    from recbole.data.dataset import SequentialDataset
    from recbole.data.dataset.dataset import Dataset
    from recbole.data.interaction import Interaction
    from recbole.evaluator.collector import Collector, DataStruct
    from recbole.model import sequential_recommender
    from recbole.model.abstract_recommender import SequentialRecommender
    from recbole.sampler import RepeatableSampler, SeqSampler
    from recbole.trainer import Trainer
    from recbole.utils import FeatureSource, FeatureType, InputType, argument_list, init_seed
    from recbole.utils.url import extract_zip, rename_atomic_files

RECBOLE_FOLDER = Path(recbole.__file__).parent


def find_data_folder(data_path: Path, dataset: str) -> Path:
    """The folder of a data set: data_path/NAME, or if it has no ml-100k the copy inside RecBole.

    RecBole 1.2.1 always reads its own ml-100k, whatever the data path (config/configurator.py).
    """
    folder = data_path / dataset
    packaged = RECBOLE_FOLDER / "dataset_example" / dataset
    files = (folder / f"{dataset}.inter", folder / f"{dataset}.inter.parquet")
    if packaged.is_dir() and not any(file.is_file() for file in files):
        return packaged
    return folder


# RecBole reads these NumPy names at call time, and sets them at the first Config only.
Config.compatibility_settings(None)

# Importing RecBole's sequential models runs sine.py, which turns autograd's anomaly detection
# on for the whole process (no upstream issue found; seen in 1.2.1, sine.py line 25). Training
# is 1.6 times slower with it. Goes when sine.py no longer does that.
torch.autograd.set_detect_anomaly(False)


# Each run would print these warnings (no upstream issues found; they can go when RecBole supports today's
# torch and pandas): RecBole 1.2.1 makes tensors from pandas 3's read-only arrays (it copies them next),
# uses torch.cuda.amp.GradScaler, which torch renamed, and fills columns in a way that pandas 3 removed,
# after `_read_csv` filled them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
warnings.filterwarnings("ignore", message=".*torch.cuda.amp.GradScaler", category=FutureWarning)
warnings.filterwarnings("ignore", message="A value is being set on a copy", module="recbole.data.dataset")


class _NullTensorboard:
    """Drops what RecBole's trainer sends to TensorBoard."""

    def add_scalar(self, *args: object, **kwargs: object) -> None:
        """Drop a value."""

    def add_hparams(self, *args: object, **kwargs: object) -> None:
        """Drop a table."""


def _fill_nan(self: Dataset) -> None:
    """Dataset._fill_nan by assignment: under pandas 3 a chained inplace fillna does nothing.

    No upstream issue found; goes when RecBole supports pandas 3.
    """
    for name in self.feat_name_list:
        feat = getattr(self, name)
        for column in feat:
            feature_type = self.field2type[column]
            if feature_type == FeatureType.TOKEN:
                feat[column] = feat[column].fillna(0)
            elif feature_type == FeatureType.FLOAT:
                feat[column] = feat[column].fillna(feat[column].mean())
            else:
                dtype = np.int64 if feature_type == FeatureType.TOKEN_SEQ else np.float64
                empty = np.array([], dtype=dtype)
                feat[column] = [empty if isinstance(x, float) else x for x in feat[column]]


def _patch_list_lengths(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap a method of RecBole so that `column.agg(len)` is a length for each row, as before pandas 3.

    Under pandas 3 it is the number of rows. No upstream issue found; goes when RecBole supports pandas 3.
    """

    @functools.wraps(method)
    def call(*args: Any) -> None:
        pandas_agg = pd.Series.agg

        def agg(column: pd.Series, func: Any = None, *positional: Any, **named: Any) -> Any:
            return column.map(len) if func is len else pandas_agg(column, func, *positional, **named)

        pd.Series.agg = agg
        try:
            method(*args)
        finally:
            pd.Series.agg = pandas_agg

    return call


def _benchmark_presets(self: SequentialDataset) -> None:
    """SequentialDataset._benchmark_presets with one length per row, for any name of the item column.

    See `_patch_list_lengths`. No upstream issue found; goes when RecBole supports pandas 3.
    """
    for column in self.inter_feat:
        list_column = f"{column}{self.config['LIST_SUFFIX']}"
        if list_column in self.inter_feat:
            setattr(self, f"{column}_list_field", list_column)
    self.set_field_property(self.item_list_length_field, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
    histories = self.inter_feat[getattr(self, f"{self.iid_field}_list_field")]
    self.inter_feat[self.item_list_length_field] = [len(history) for history in histories]


# texts that pandas reads as a missing number by default
_MISSING_NUMBERS = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip


def _read_csv(path: str, dtype: dict[str, type], **options: Any) -> pd.DataFrame:
    """pandas.read_csv as RecBole 1.2.1 calls it (Dataset._load_feat), with four repairs.

    A quotation mark is text; by default it joins lines, whose rows are silently lost (no upstream issue
    found; goes when RecBole reads with quoting=3). An item that is called NA is a token; by default it is
    read as missing and loses its features (no upstream issue found; goes when RecBole reads tokens
    unchanged). An empty sequence is filled here: `fillna(inplace=True)` of a column does nothing under
    pandas 3, and NaN has no `split` (no upstream issue found; goes when RecBole supports pandas 3). A
    separator of several characters, such as ||, is not a pattern (no upstream issue found).
    """
    missing = {name: _MISSING_NUMBERS if type_ is np.float64 else [""] for name, type_ in dtype.items()}
    if len(options["delimiter"]) > 1:
        options["delimiter"] = re.escape(options["delimiter"])
    options |= {"quoting": csv.QUOTE_NONE, "keep_default_na": False, "na_values": missing}
    frame = pd.read_csv(path, dtype=dtype, **options)
    sequences = [column for column in frame if column.endswith("_seq")]
    return frame.assign(**{column: frame[column].fillna("") for column in sequences})


def _share_empty_set(self: RepeatableSampler) -> np.ndarray:
    """RepeatableSampler.get_used_ids with one empty set for all users; a million sets have 300 MB.

    No upstream issue found; goes when RecBole makes them where it reads them.
    """
    return np.full(self.user_num, frozenset(), dtype=object)


RepeatableSampler.get_used_ids = _share_empty_set
Dataset._fill_nan = _fill_nan
for _name in ("_remap", "_normalize", "_discretization"):
    setattr(Dataset, _name, _patch_list_lengths(getattr(Dataset, _name)))
SequentialDataset._benchmark_presets = _benchmark_presets
_dataset.pd = types.SimpleNamespace(**{**vars(pd), "read_csv": _read_csv})

# RecBole opens ./log_tensorboard for every trainer and gives no switch (RecBole 1.2.1,
# utils/logger.py; no upstream issue found); our trainer opens its own in the run folder.
_trainer.get_tensorboard = lambda logger: _NullTensorboard()


class _SafeTorch:
    """PyTorch for the modules of RecBole that save and load, without pickles (see `tensor_files`).

    RecBole 1.2.1 pickles its whole Config, which torch.load refuses since PyTorch 2.6 (no upstream issue
    found). Permanent: nothing is unpickled here, and nothing pickled.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def save(state: dict[str, Any], path: str, **_: object) -> None:
        """Write a checkpoint of RecBole, with the keys of its Config that are read again."""
        config = {key: state["config"][key] for key in ("model", "dataset")}
        save_state({**state, "config": config}, Path(path))

    @staticmethod
    def load(path: str, map_location: Any = "cpu", **_: object) -> Any:
        """Read what `save` wrote."""
        return load_state(Path(path), str(map_location))


_trainer.torch = _s3rec.torch = _SafeTorch()

_recbole_init_trainer = Trainer.__init__


def _init_with_safetensors(self: Trainer, config: Config, model: torch.nn.Module) -> None:
    """Trainer.__init__, with the suffix .safetensors for its file."""
    _recbole_init_trainer(self, config, model)
    self.saved_model_file = str(Path(self.saved_model_file).with_suffix(".safetensors"))


Trainer.__init__ = _init_with_safetensors


@functools.cache
def _bypass_dynamo(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer without its guards for torch.compile, which load all of torch._dynamo at the first call.

    That takes as long as `import torch`. Permanent: no optimizer is compiled here. Found in PyTorch 2.13,
    torch/_compile.py and torch/optim/optimizer.py; a method without a guard is left as it is.
    """
    guarded = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in guarded}
    step = torch.no_grad()(inspect.unwrap(optimizer.step))
    return type(optimizer.__name__, (optimizer,), {**methods, "step": step})


class _PlainOptimizers:
    """`torch.optim` for RecBole's trainer: see `_bypass_dynamo`."""

    def __getattr__(self, name: str) -> Any:
        return _bypass_dynamo(getattr(torch.optim, name))


_trainer.optim = _PlainOptimizers()

_build_optimizer = Trainer._build_optimizer


def _build_grouped_optimizer(self: Trainer, **kwargs: Any) -> torch.optim.Optimizer:
    """Trainer._build_optimizer, with the model's parameters in groups by how they are marked. Permanent.

    Adam takes its step in PyTorch's fused form on a CPU, and on CUDA with `compile: true`.
    """
    kwargs.setdefault("params", _group_parameters(self))
    optimizer: torch.optim.Optimizer = _build_optimizer(self, **kwargs)
    is_fused = self.device.type == "cpu" or (self.device.type == "cuda" and self.config["compile"] is True)
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and is_fused:
        for group in optimizer.param_groups:
            group["fused"] = True  # one pass over each parameter instead of ten
    return optimizer


def _group_parameters(trainer: Trainer) -> list[dict[str, Any]]:
    """A group for each way in which parameters are marked (`m2rec.nn.mamba.MarkedParameters`).

    `_no_weight_decay`: excluded from weight decay. `_lr_multiplier`: multiplies the learning rate, for
    optimizers whose steps have the size of the learning rate, whatever the gradient's; not for SGD.
    """
    marked: dict[tuple[bool, float], list[torch.nn.Parameter]] = {(False, 1.0): []}
    for p in trainer.model.parameters():
        if p.requires_grad:
            pace = 1.0 if trainer.learner.lower() == "sgd" else getattr(p, "_lr_multiplier", 1.0)
            marked.setdefault((getattr(p, "_no_weight_decay", False), pace), []).append(p)
    groups: list[dict[str, Any]] = []
    for (no_decay, pace), parameters in marked.items():
        group = {"params": parameters, "lr": pace * trainer.learning_rate}
        if no_decay:
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


Trainer._build_optimizer = _build_grouped_optimizer


def _get_data_struct(self: Collector) -> DataStruct:
    """Collector.get_data_struct, which in RecBole 1.2.1 fails on counts because it calls their `cpu`.

    ItemCoverage, GiniIndex, AveragePopularity and TailPercentage need counts. No upstream issue found; goes
    when RecBole moves only tensors.
    """
    for key, value in self.data_struct._data_dict.items():
        self.data_struct[key] = value.cpu() if isinstance(value, torch.Tensor) else value
    collected = copy.deepcopy(self.data_struct)
    for key in ("rec.topk", "rec.meanrank", "rec.score", "rec.items", "data.label"):
        if key in self.data_struct:
            del self.data_struct[key]
    return collected


Collector.get_data_struct = _get_data_struct

_recbole_set_negatives = Config._set_train_neg_sample_args


def _set_train_neg_sample_args(self: Config) -> None:
    """Config._set_train_neg_sample_args, with none by default for a model that `draws_negatives` itself.

    RecBole's default gives each row of a pointwise model a second row with a random item, marked by a
    label that no such model reads (data/dataloader/abstract_dataloader.py). Permanent.
    """
    if getattr(self.model_class, "draws_negatives", False):
        _set_own_negatives(self)
    _recbole_set_negatives(self)


def _set_own_negatives(config: Config) -> None:
    loss = config.external_config_dict.get("loss_type")
    if config.external_config_dict.get("train_neg_sample_args") in (None, "None"):
        config.final_config_dict["train_neg_sample_args"] = None
    elif loss == "BPR":
        config.final_config_dict["MODEL_INPUT_TYPE"] = InputType.PAIRWISE
    else:
        raise UserError(
            f"train_neg_sample_args: {config.model} draws the negatives of loss_type: {loss or 'CE'} "
            f"itself; leave it out, or set loss_type: BPR"
        )


Config._set_train_neg_sample_args = _set_train_neg_sample_args


def _refuse_pickle(*args: Any) -> None:
    """Replace pickle.load and pickle.dump in RecBole's data sets.

    Raises:
        ValueError: always.
    """
    names = [str(argument.name) for argument in args if hasattr(argument, "name")]
    file = names[0] if names else "the data set's file"
    raise UserError(f"{file}: pickles are neither loaded nor made; move it away, and leave save_dataset out")


# create_dataset unpickles checkpoint_dir/NAME-CLASS.pth if it exists, whatever save_dataset is.
_data.pickle = _dataset.pickle = types.SimpleNamespace(load=_refuse_pickle, dump=_refuse_pickle)

# RecBole's data_preparation first unpickles ./saved/NAME-for-MODEL-dataloader.pth if it exists, or
# the file that a key names (RecBole 1.2.1, data/utils.py, on purpose). Nothing is unpickled here,
# and nothing pickled.
_data.load_split_dataloaders = lambda config: None
_data.save_split_dataloaders = lambda config, dataloaders: None

__all__ = [
    "RECBOLE_FOLDER",
    "Config",
    "FeatureSource",
    "FeatureType",
    "InputType",
    "Interaction",
    "SeqSampler",
    "SequentialDataset",
    "SequentialRecommender",
    "TrainDataLoader",
    "Trainer",
    "argument_list",
    "data_preparation",
    "extract_zip",
    "find_data_folder",
    "init_seed",
    "rename_atomic_files",
    "sequential_recommender",
]
