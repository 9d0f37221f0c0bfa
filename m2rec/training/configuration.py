"""From a command line to one checked RecBole Config.

Order of strength: command line, config files, properties of the data set and of the model
variant (`m2rec/properties/`), RecBole's own defaults.
"""

import logging
import re
import sys
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from m2rec import distributed
from m2rec.compat import RECBOLE_FOLDER, Config, argument_list, find_data_folder
from m2rec.data import shipped
from m2rec.data.dataset import EVAL_ARGS
from m2rec.data.inter_file import find_inter_file
from m2rec.errors import UserError
from m2rec.models.registry import Model, find_model_class
from m2rec.ops import Backend, resolve_backend
from m2rec.settings import (
    PROPERTIES_FOLDER,
    SCALE_FREE_KEYS,
    ModelSettings,
    Role,
    RunSettings,
    check_key_combination,
    collect_keys,
    get_defaults,
)
from m2rec.training.automatic_settings import RULE_KEYS, Choice
from m2rec.training.recbole_keys import (
    DataSettings,
    LoopSettings,
    check_machine,
    check_model_inputs,
)
from m2rec.yaml_values import describe_unknown, read_yaml

logger = logging.getLogger(__name__)

# RecBole's keys of before 1.0 or 1.2, with what replaces them
_OBSOLETE_KEYS = {
    "neg_sampling": "train_neg_sample_args",
    "training_neg_sample_num": "train_neg_sample_args",
    "min_user_inter_num": "user_inter_num_interval",
    "max_user_inter_num": "user_inter_num_interval",
    "min_item_inter_num": "item_inter_num_interval",
    "max_item_inter_num": "item_inter_num_interval",
    "lowest_val": "val_interval",
    "highest_val": "val_interval",
    "equal_val": "val_interval",
    "not_equal_val": "val_interval",
    "eval_setting": "split",
    "group_by_user": "split",
    "split_ratio": "split",
    "leave_one_num": "split",
    "fields_in_same_space": "alias_of_item_id, alias_of_user_id",
    "real_time_process": "",
    "drop_filter_field": "",
    "drop_preload_weight": "",
}

# RecBole's properties that hold for every sequential model
_SEQUENTIAL_PROPERTIES = ("overall.yaml", "dataset/sample.yaml", "quick_start_config/sequential.yaml")


# RunSettings whose default depends on other keys or on the terminal
_DERIVED_KEYS = ("rows", "show_progress")


class RunConfig(Config):
    """RecBole's Config from one mapping alone.

    It reads no sys.argv, evaluates no string, and leaves CUDA_VISIBLE_DEVICES alone.
    """

    run_settings: RunSettings
    model_settings: ModelSettings | None
    """None for a model that is not made of M2Rec's parts."""
    open_keys: frozenset[str]
    """The keys that the rule of `auto` chooses once the data is loaded."""
    recipe: dict[str, Choice]
    """What was taken of the recipe that is shipped for the data set, by key."""

    def settle(self, values: Mapping[str, Any]) -> None:
        """Replace what was left open; `resolve_settings` then gives the answer."""
        self.external_config_dict.update(values)
        for key, value in values.items():
            self[key] = value
        self.run_settings = self.run_settings.replace(values)
        if self.model_settings is not None:
            self.model_settings = self.model_settings.replace(values)

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _convert_config_dict(self, config_dict: dict[str, Any]) -> dict[str, Any]:
        return dict(config_dict)

    def _init_device(self) -> None:
        gpu = str(self.final_config_dict["gpu_id"]).strip()
        device = torch.device("cpu")
        if gpu and torch.cuda.is_available():
            distributed.check_gpus()
            rank = distributed.local_rank()  # under torchrun each process has its own GPU
            device = torch.device("cuda", int(gpu) if rank is None else rank)
        self.final_config_dict.update(gpu_id=gpu, device=device, single_spec=True, local_rank=0)

    def _set_default_parameters(self) -> None:
        requested_path = Path(self.final_config_dict["data_path"])
        super()._set_default_parameters()
        self.final_config_dict["data_path"] = str(find_data_folder(requested_path, self.dataset))


# that are all set in the config of a run, and hardly by hand
_NETWORK_KEYS = {"mixer", "d_state", "d_conv", "expand", "filter", "gate", "repeat_bias", "loss_type"}


def build_config(given: Mapping[str, Any], default_file: Path | None = None) -> RunConfig:
    """One checked Config from the given values and the files that they name.

    Args:
        given: the strongest values, those of the command line.
        default_file: the config file to read unless `config_files` names others.

    Raises:
        UserError: a key is unknown, a value is wrong, or two don't go together.
    """
    user_values = collect_user_values(given, default_file)
    name = str({**RunSettings.defaults(), **user_values}["model"])
    variant = _read_properties("model", name)
    model = find_model_class(str(variant.get("model", name)))
    is_plain = name == model.__name__
    values, recipe, set_keys = _merge_values(model, {} if is_plain else variant, user_values)
    values.update(model=model.__name__, variant=name, **getattr(model, "fixed_settings", {}))
    _add_derived_defaults(values, model)
    _add_auto_values(values, model, set_keys)
    run, settings = _check_values(values, model)
    config = RunConfig(model=model, dataset=values["dataset"], config_dict=values)
    config.run_settings, config.model_settings = run, settings
    follows_rule = run.auto and is_plain and settings is not None and recipe is None
    config.open_keys = _list_open_keys(values, set_keys) if follows_rule else frozenset()
    if values.get("exclude_seen") == "auto":
        config.open_keys |= {"exclude_seen"}
    config.recipe = _list_recipe_choices(values["dataset"], recipe or {}, user_values)
    if settings:
        resolve_scan_backend(settings, config["device"])
    unused_keys = sorted(set(user_values) - collect_model_keys(model))
    if unused_keys:
        logger.warning("these keys are ignored by %s: %s", name, ", ".join(unused_keys))
    return config


def resolve_scan_backend(settings: ModelSettings, device: torch.device) -> Backend:
    """The backend of the mixer's scan; only that of S6 has C code.

    Raises:
        UserError: the backend that `scan_backend` names can't run here.
    """
    return resolve_backend(settings.scan_backend, device, has_native=settings.mixer == "mamba")


def _merge_values(
    model: Model, variant: Mapping[str, Any], user_values: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, frozenset[str]]:
    """All values: defaults, properties, and those of the model's variant and of the user.

    Returns:
        The values; the recipe that is shipped for the data set, whole, None without one or if it is not used;
        and the keys that the data set, the variant or the user has set.

    Raises:
        UserError: a key is unknown.
    """
    defaults = {**RunSettings.defaults(), **LoopSettings.defaults()}
    for key in _DERIVED_KEYS:
        del defaults[key]
    if settings_class := getattr(model, "settings_class", None):
        defaults |= settings_class.defaults()
    elif getattr(model, "uses_text", False):
        defaults |= get_defaults(Role.TEXT_SOURCE)
    weak = _merge_layers(defaults, _read_properties("model", model.__name__))
    strong = _merge_layers(variant, user_values)
    properties = _read_dataset_properties({**weak, **strong})
    recipe = properties.pop(shipped.RECIPE_KEY, None)
    if variant or settings_class is None or not {**weak, **strong}["auto"]:
        recipe = None
    decided = list_decided_keys(strong)
    taken = {key: value for key, value in (recipe or {}).items() if key not in decided}
    chosen = _merge_layers(properties, taken, strong)
    values = _merge_layers(weak, chosen)
    for key in values:
        _check_known_key(key)
    return values, recipe, frozenset(chosen)


def _list_recipe_choices(
    name: str, recipe: Mapping[str, Any], user_values: Mapping[str, Any]
) -> dict[str, Choice]:
    """What the user leaves of a recipe, for a reason such as `the recipe of ml-1m without epochs`.

    Args:
        name: of the data set.
        recipe: as it is shipped.
        user_values: keys that are stronger.
    """
    overridden = list_decided_keys(user_values)
    left_out = [key for key in recipe if key in overridden]
    reason = f"the recipe of {name}{' without ' if left_out else ''}{', '.join(left_out)}"
    return {key: Choice(value, reason) for key, value in recipe.items() if key not in left_out}


def list_decided_keys(values: Mapping[str, Any]) -> frozenset[str]:
    """The keys that are set, and those that they decide."""
    decided = set(values)
    for scale_free, plain in SCALE_FREE_KEYS.items():
        if plain in values:
            decided.add(scale_free)
        if values.get(scale_free):
            decided.add(plain)
    if values.get("learner", "adamw") != "adamw":  # for any other, weight_decay is an L2 term
        decided |= {"weight_decay", "decay_per_epoch"}
    if "loss_type" in values:
        decided.add("n_negatives")
    if _NETWORK_KEYS <= set(values):  # the config of an earlier run, which lacks this key
        decided.add("neighbors")
    if values.get("shard_items") and distributed.world_size() > 1:  # neighbors compare whole tables
        decided.add("neighbors")
    return frozenset(decided)


def _merge_layers(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge keys and values, the strongest last; of a scale-free key and its plain key the stronger holds."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
        for scale_free, plain in SCALE_FREE_KEYS.items():
            if plain in layer and scale_free not in layer and merged.get(scale_free):
                merged[scale_free] = 0
    return merged


def _add_auto_values(values: dict[str, Any], model: Model, set_keys: Collection[str]) -> None:
    """Add what follows from `auto` and from the scale-free keys.

    Args:
        values: all values.
        set_keys: those that are no defaults.
    """
    if values["auto"] is True:
        auto_keys = {"MAX_ITEM_LIST_LENGTH"}
        if hasattr(model, "settings_class"):
            auto_keys.add("exclude_seen")
        values.update(dict.fromkeys(auto_keys - set(set_keys), "auto"))
    if values["decay_per_epoch"]:
        if "learner" in set_keys and values["learner"] != "adamw":
            raise UserError(
                f"decay_per_epoch: {values['decay_per_epoch']} needs learner: adamw, not "
                f"{values['learner']}; set that, or use weight_decay"
            )
        values["learner"] = "adamw"


def _list_open_keys(values: Mapping[str, Any], set_keys: Collection[str]) -> frozenset[str]:
    """The keys that the rule may choose: none that is set, nor one that a key which is set decides."""
    return RULE_KEYS - list_decided_keys({key: values[key] for key in set_keys})


def _check_values(values: dict[str, Any], model: Model) -> tuple[RunSettings, ModelSettings | None]:
    """The typed settings, after all checks that need no data."""
    run = RunSettings.read(values)
    LoopSettings.read(values)
    DataSettings.read(values)
    values["eval_args"] = dict(EVAL_ARGS)
    check_machine(values)
    name = values["variant"]
    if run.rows == "dense" and not getattr(model, "supports_dense_rows", False):
        raise UserError(
            f"rows: 'dense' is for M2Rec; {name} trains on its last position only, set rows: prefix"
        )
    check_model_inputs(name, {**DataSettings.defaults(), **_read_recbole_properties(model), **values})
    settings_class = getattr(model, "settings_class", None)
    if settings_class is None:
        return run, None
    settings = settings_class.read(values)
    check_key_combination(settings, run)
    return run, settings


def resolve_settings(config: Config) -> dict[str, Any]:
    """Every key that the run reads, with its value, such that `build_config` gives the same run.

    Keys that belong to the GPU or the terminal at hand are left out.
    """
    values = {**config.internal_config_dict, **config.external_config_dict}
    stored = collect_model_keys(config.model_class) - collect_keys(Role.LOCAL)
    resolved = {key: value for key, value in values.items() if key in stored}
    return {**resolved, "model": config["variant"]}


def collect_user_values(given: Mapping[str, Any], default_file: Path | None) -> dict[str, Any]:
    """The keys of the config files and the command line, the latter being stronger."""
    sources = [read_yaml(path) for path in _list_config_files(given.get("config_files"), default_file)]
    sources.append(dict(given))
    for source in sources:
        _check_pairs(source)
    values = _merge_layers(*sources)
    values.pop("config_files", None)
    if type(values.get("dataset")) is int:  # a name such as 1234, which YAML reads as a number
        values["dataset"] = str(values["dataset"])
    separator = values.get("field_separator")
    if isinstance(separator, str):  # a shell does not turn \\t into a tab
        values["field_separator"] = separator.replace(r"\t", "\t")
    return values


def _check_pairs(source: Mapping[str, Any]) -> None:
    """Refuse a scale-free key beside the plain key that it stands for, in one file or command line."""
    for scale_free, plain in SCALE_FREE_KEYS.items():
        if source.get(scale_free) and plain in source:
            raise UserError(
                f"{scale_free}: {source[scale_free]} and {plain}: {source[plain]} exclude each other; "
                f"leave one out"
            )


def _list_config_files(named: Any, default_file: Path | None) -> list[Path]:
    """The files to read: those of `config_files`, separated by spaces or in a list, or the default.

    The text may also be the name of one file with spaces in it.
    """
    if named is None:
        return [default_file] if default_file else []
    files = named
    if isinstance(named, str):
        files = [named] if Path(named).is_file() else named.split()
    if not isinstance(files, list) or not files or not all(isinstance(file, str) for file in files):
        raise UserError(f"config_files: expected the names of files, got {named!r}")
    return [Path(file) for file in files]


def _read_properties(kind: str, name: str) -> dict[str, Any]:
    """The shipped properties of that data set or model, empty if there are none."""
    known = {path.stem: path for path in (PROPERTIES_FOLDER / kind).glob("*.yaml")}
    return read_yaml(known[name]) if name in known else {}


def _read_recbole_properties(model: Model) -> dict[str, Any]:
    """RecBole's properties of that model, empty if there are none."""
    path = RECBOLE_FOLDER / "properties" / "model" / f"{model.__name__}.yaml"
    return read_yaml(path) if path.is_file() else {}


def _read_dataset_properties(values: Mapping[str, Any]) -> dict[str, Any]:
    """The shipped properties of the data set; none if the data at hand is another one of that name.

    Args:
        values: all other keys.
    """
    name = str(values["dataset"])
    properties = _read_properties("dataset", name)
    properties.pop(shipped.ORIGIN_KEY, None)
    path = find_inter_file(find_data_folder(Path(str(values["data_path"])), name), name)
    if not properties or path.is_relative_to(RECBOLE_FOLDER):
        return properties
    if not path.is_file():  # when it is downloaded, `HistoryDataset` compares
        return properties
    columns = shipped.InterColumns.from_config(DataSettings.read(values).model_dump())
    if difference := shipped.describe_difference(name, path, columns):
        logger.warning("the settings shipped for %s are not used: %s has %s", name, path, difference)
        return {}
    return properties


@cache
def collect_known_keys() -> frozenset[str]:
    """Every key that this project, RecBole, or any of its models and data sets reads."""
    keys = {*ModelSettings.keys(), *RunSettings.keys(), *_collect_recbole_keys()}
    for path in (RECBOLE_FOLDER / "properties").rglob("*.yaml"):
        keys.update(re.findall(r"^(\w+):", path.read_text(encoding="utf-8"), re.MULTILINE))
    return frozenset(keys)


def collect_model_keys(model: Model) -> frozenset[str]:
    """The keys that a run of this model reads: the general ones and the model's own."""
    settings_class = getattr(model, "settings_class", None)
    keys = {*RunSettings.keys(), *_collect_recbole_keys(), *_read_recbole_properties(model)}
    keys.update(settings_class.keys() if settings_class else ["loss_type"])
    if getattr(model, "uses_text", False):
        keys |= collect_keys(Role.TEXT_SOURCE)
    return frozenset((keys | _collect_sequential_keys()) - collect_keys(Role.IGNORED))


@cache
def _collect_sequential_keys() -> frozenset[str]:
    """The keys in RecBole's properties of every sequential model; its files are long."""
    files = [read_yaml(RECBOLE_FOLDER / "properties" / file) for file in _SEQUENTIAL_PROPERTIES]
    return frozenset().union(*files)


def _collect_recbole_keys() -> set[str]:
    """The keys in RecBole's own lists of arguments."""
    keys: set[str] = set()
    for name, listed in vars(argument_list).items():
        if name.endswith("_arguments"):
            keys.update(listed)
    return keys


def _check_known_key(key: str) -> None:
    if key in _OBSOLETE_KEYS:
        successor = _OBSOLETE_KEYS[key]
        cure = f"set {successor} in its place" if successor else "leave it out, nothing replaces it"
        raise UserError(f"unknown key {key!r}: RecBole has renamed or dropped it; {cure}")
    if key not in collect_known_keys():
        raise UserError(describe_unknown(key, collect_known_keys()))


def _add_derived_defaults(values: dict[str, Any], model: Model) -> None:
    """Add the defaults that depend on other keys or on the terminal."""
    presplit = values.get("benchmark_filename")
    supports_dense_rows = getattr(model, "supports_dense_rows", False)
    values.setdefault("rows", "dense" if supports_dense_rows and not presplit else "prefix")
    names = {**DataSettings.defaults(), **values}
    columns = [names["USER_ID_FIELD"], names["ITEM_ID_FIELD"], names["TIME_FIELD"]]
    if presplit:
        columns[2] = f"{names['ITEM_ID_FIELD']}{names['LIST_SUFFIX']}"
        values.setdefault("alias_of_item_id", columns[2:])
    values.setdefault("load_col", {"inter": columns})
    if values.get("show_progress") is None:
        values["show_progress"] = sys.stderr.isatty()
    loss_type = {**_read_recbole_properties(model), **values}.get("loss_type")
    if getattr(model, "draws_negatives", False) or loss_type == "CE":
        values.setdefault("train_neg_sample_args", None)
