"""From a command line to one checked RecBole Config.

Order of strength: command line, config files, properties of the data set and of the model
variant (`m2rec/properties/`), RecBole's own defaults.
"""

import logging
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from m2rec import distributed
from m2rec.compat import (
    RECBOLE_FOLDER,
    Config,
    SequentialRecommender,
    argument_list,
    find_data_folder,
)
from m2rec.data import shipped
from m2rec.errors import UserError
from m2rec.models.m2rec import M2Rec
from m2rec.models.popularity import Popularity
from m2rec.models.registry import _PROJECT_MODELS, find_model_class
from m2rec.ops import resolve_backend
from m2rec.settings import PROPERTIES_FOLDER, ModelSettings, RunSettings, check_key_combination
from m2rec.training.recbole_keys import (
    check_device,
    check_evaluation,
    check_model_inputs,
    check_no_pickles,
    check_optional_packages,
    check_recbole_keys,
)
from m2rec.yaml_values import read_yaml, suggest_spelling

logger = logging.getLogger(__name__)


# RecBole reads these without listing them anywhere
_UNLISTED_KEYS = {"dataset", "model"}

# how interactions are read, with RecBole's defaults
_COLUMN_DEFAULTS = {"field_separator": "\t", "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id"}

# RecBole's keys of before 1.0 or 1.2, with what does the same now
_OBSOLETE_KEYS = {
    **dict.fromkeys(("neg_sampling", "training_neg_sample_num"), "train_neg_sample_args"),
    **dict.fromkeys(("min_user_inter_num", "max_user_inter_num"), "user_inter_num_interval"),
    **dict.fromkeys(("min_item_inter_num", "max_item_inter_num"), "item_inter_num_interval"),
    **dict.fromkeys(("lowest_val", "highest_val", "equal_val", "not_equal_val"), "val_interval"),
    **dict.fromkeys(("eval_setting", "group_by_user", "split_ratio", "leave_one_num"), "split"),
    "fields_in_same_space": "alias_of_item_id, alias_of_user_id",
    "real_time_process": "",
    "drop_filter_field": "",
    "drop_preload_weight": "",
}

# RecBole's properties that hold for every sequential model
_SEQUENTIAL_PROPERTIES = ("overall.yaml", "dataset/sample.yaml", "quick_start_config/sequential.yaml")

# RecBole's keys that this project's runs don't follow: nothing is pickled, and a run has its folder
_IGNORED_KEYS = {
    "checkpoint_dir", "config_file", "dataloaders_save_path", "dataset_save_path", "enable_scaler",
    "save_dataloaders", "save_dataset",
}  # fmt: skip


class RunConfig(Config):
    """RecBole's Config from one mapping alone.

    It reads no sys.argv, evaluates no string, and leaves CUDA_VISIBLE_DEVICES alone.
    """

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        return dict(config_dict)

    def _init_device(self) -> None:
        gpu = str(self.final_config_dict["gpu_id"]).strip()
        cuda = gpu != "" and torch.cuda.is_available()
        if cuda:
            distributed.check_gpus()
        number = distributed.local_rank()  # under torchrun each process has its own GPU
        device = torch.device("cuda", int(gpu) if number is None else number) if cuda else torch.device("cpu")
        self.final_config_dict.update(gpu_id=gpu, device=device, single_spec=True, local_rank=0)

    def _set_default_parameters(self) -> None:
        asked = Path(self.final_config_dict["data_path"])
        super()._set_default_parameters()
        self.final_config_dict["data_path"] = str(find_data_folder(asked, self.dataset))


def build_config(given: Mapping[str, Any], default_file: Path | None = None) -> Config:
    """One checked Config from the given values and the files that they name.

    Args:
        given: the strongest values, those of the command line.
        default_file: the config file to read unless `config_files` names others.

    Raises:
        ValueError: a key is unknown, a value is wrong, or two don't go together.
    """
    chosen: dict[str, Any] = {}
    for path in _list_config_files(given.get("config_files"), default_file):
        chosen.update(read_yaml(path))
    chosen.update({k: v for k, v in given.items() if k != "config_files"})
    if type(chosen.get("dataset")) is int:  # a name such as 1234, which YAML reads as a number
        chosen["dataset"] = str(chosen["dataset"])
    if isinstance(separator := chosen.get("field_separator"), str):  # as a shell hands a tab over
        chosen["field_separator"] = separator.replace(r"\t", "\t")

    defaults = read_yaml(PROPERTIES_FOLDER / "overall.yaml")
    name = str(chosen.get("model", defaults["model"]))
    dataset = str(chosen.get("dataset", defaults["dataset"]))
    variant = _read_properties("model", name)
    model = find_model_class(str(variant.get("model", name)))
    own = {**ModelSettings.defaults(), **_read_properties("model", "M2Rec")} if model is M2Rec else {}
    values = {**defaults, **own, **variant, **chosen}
    values = {**defaults, **own, **_read_dataset_properties(dataset, values), **variant, **chosen}
    _check_known_keys(values)
    values.update(model=model.__name__, variant=name)
    _add_derived_defaults(values, model)
    run = RunSettings.read(values)
    check_evaluation(values)
    check_recbole_keys(values)
    check_device(values)
    check_optional_packages(values)
    check_no_pickles(values)
    if model is M2Rec:
        settings = ModelSettings.read(values)
        check_key_combination(settings, run)
    elif run.rows == "dense" and model not in _PROJECT_MODELS:
        raise UserError(
            f"rows: 'dense' is for M2Rec; {name} trains on its last position only, set rows: prefix"
        )
    else:
        check_model_inputs(name, {**_COLUMN_DEFAULTS, **_read_recbole_properties(model), **values})
    config = RunConfig(model=model, dataset=dataset, config_dict=values)
    if model is M2Rec:
        resolve_backend(config["scan_backend"], config["device"])
    unread = sorted(set(chosen) - collect_model_keys(model))
    if unread:
        logger.warning("%s does not read these keys, they change nothing: %s", name, ", ".join(unread))
    return config


def resolve_settings(config: Config) -> dict[str, Any]:
    """Every key that the run reads, with its value, such that `build_config` gives the same run.

    Left out is what belongs to the machine and the terminal: which GPU, and progress bars.
    """
    own = {"gpu_id", "show_progress", "checkpoint_dir", "variant"}
    values = {**config.internal_config_dict, **config.external_config_dict}
    read = collect_model_keys(config.model_class) - own
    kept = {key: value for key, value in values.items() if key in read and not key.startswith("MODEL_")}
    return {**kept, "model": config["variant"]}


def _list_config_files(named: Any, default_file: Path | None) -> list[Path]:
    """The files to read: those of `config_files`, separated by spaces or in a list, or the default.

    The text may also be the name of one file with spaces in it.
    """
    if named is None:
        return [default_file] if default_file else []
    files = named
    if isinstance(named, str):
        files = [named] if Path(named).is_file() else named.split()
    if not isinstance(files, list) or not files or not all(isinstance(f, str) for f in files):
        raise UserError(f"config_files: expected the names of files, got {named!r}")
    return [Path(f) for f in files]


def _read_properties(kind: str, name: str) -> dict[str, Any]:
    """The shipped properties of that data set or model, empty if there are none."""
    known = {path.stem: path for path in (PROPERTIES_FOLDER / kind).glob("*.yaml")}
    return read_yaml(known[name]) if name in known else {}


def _read_recbole_properties(model: type[SequentialRecommender]) -> dict[str, Any]:
    """RecBole's properties of that model, empty if there are none."""
    path = RECBOLE_FOLDER / "properties" / "model" / f"{model.__name__}.yaml"
    return read_yaml(path) if path.is_file() else {}


def _read_dataset_properties(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped properties of that data set; none where the data at hand is another one of that name.

    Args:
        name: the data set's.
        values: all other keys.
    """
    properties = _read_properties("dataset", name)
    properties.pop(shipped.ORIGIN_KEY, None)
    path = find_data_folder(Path(str(values["data_path"])), name) / f"{name}.inter"
    if not properties or not path.is_file():  # when it is downloaded, `HistoryDataset` compares
        return properties
    columns = shipped.InterColumns.from_config({**_COLUMN_DEFAULTS, **values})
    if difference := shipped.describe_difference(name, path, columns):
        logger.warning(
            "the settings that are shipped for %s are not taken: %s has %s", name, path, difference
        )
        return {}
    return properties


@cache
def collect_known_keys() -> frozenset[str]:
    """Every key that this project, RecBole, or any of its models and data sets reads."""
    listed = re.compile(r"^(\w+):", re.MULTILINE)
    files = (RECBOLE_FOLDER / "properties").rglob("*.yaml")
    stock = {key for path in files for key in listed.findall(path.read_text(encoding="utf-8"))}
    return frozenset(
        stock | _collect_recbole_keys() | set(ModelSettings.keys()) | set(RunSettings.keys()) | _UNLISTED_KEYS
    )


def collect_model_keys(model: type[SequentialRecommender]) -> frozenset[str]:
    """The keys that a run of this model reads: the general ones and the model's own."""
    general = {
        key for file in _SEQUENTIAL_PROPERTIES for key in read_yaml(RECBOLE_FOLDER / "properties" / file)
    }
    stock = general | set(_read_recbole_properties(model))
    own = ModelSettings.keys() if model is M2Rec else ("loss_type",)
    return frozenset({*stock, *_collect_recbole_keys(), *RunSettings.keys(), *own} - _IGNORED_KEYS)


def _collect_recbole_keys() -> set[str]:
    """The keys in RecBole's own lists of arguments."""
    lists = (keys for name, keys in vars(argument_list).items() if name.endswith("_arguments"))
    return {key for keys in lists for key in keys}


def _check_known_keys(values: Mapping[str, Any]) -> None:
    for key in values:
        if key in _OBSOLETE_KEYS:
            cure = (
                f"set {_OBSOLETE_KEYS[key]} in its place"
                if _OBSOLETE_KEYS[key]
                else "leave it out, nothing replaces it"
            )
            raise UserError(f"unknown key {key!r}: RecBole has renamed or dropped it; {cure}")
        if key not in collect_known_keys():
            raise UserError(f"unknown key {key!r}{suggest_spelling(str(key), collect_known_keys())}")


def _add_derived_defaults(values: dict[str, Any], model: type[SequentialRecommender]) -> None:
    """Keys whose default follows from others."""
    presplit = values.get("benchmark_filename")  # rows that are there already
    values.setdefault("rows", "dense" if model in _PROJECT_MODELS and not presplit else "prefix")
    if model is Popularity:  # it never gets better, and RecBole takes equally good for better
        values.update(epochs=1, loss_type="CE")
    fields = {**_COLUMN_DEFAULTS, "TIME_FIELD": "timestamp"}
    columns = [values.get(key, fields[key]) for key in ("USER_ID_FIELD", "ITEM_ID_FIELD", "TIME_FIELD")]
    if presplit:
        lists = f"{columns[1]}{values.get('LIST_SUFFIX', '_list')}"
        columns = [*columns[:2], lists]
        values.setdefault("alias_of_item_id", [lists])
    values.setdefault("load_col", {"inter": columns})
    if values.get("show_progress") is None:
        values["show_progress"] = sys.stderr.isatty()
    if model is M2Rec or values.get("loss_type", _read_recbole_properties(model).get("loss_type")) == "CE":
        values.setdefault("train_neg_sample_args", None)
