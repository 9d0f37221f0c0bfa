"""Validate the RecBole keys that RecBole itself does not check."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from m2rec.data.dataset import EVAL_ARGS
from m2rec.errors import UserError
from m2rec.evaluation.metrics import METRICS
from m2rec.settings import Settings, Text

# RecBole's sequential models that need item features, and those that are refused
_ITEM_FEATURE_MODELS = ("FDSA", "GRU4RecF", "SASRecF")
_UNSUPPORTED_MODELS = {
    "KSR": "needs a knowledge graph",
    "S3Rec": "is trained in two stages, between which RecBole keeps a pickle",
}
_NUMBER = r"[-+]?(?:\d+\.?\d*|inf)"
_INTERVAL = re.compile(rf"[\[(]\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]")


def _check_interval(interval: Any) -> Any:
    match = _INTERVAL.fullmatch(str(interval))
    if not match or float(match[1]) > float(match[2]):
        raise ValueError
    return interval


def _check_metrics(metrics: list[str]) -> list[str]:
    known = {metric.lower() for metric in METRICS}
    if not {metric.lower() for metric in metrics} <= known:
        raise ValueError
    return metrics


def _require(key: str) -> AfterValidator:
    """Refuse a dict without this key."""

    def check(values: dict[str, Any]) -> dict[str, Any]:
        if key not in values:
            raise ValueError
        return values

    return AfterValidator(check)


def _make_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


_INTERVAL_WORDS = "an interval from low to high, such as '[5,inf)'"
Interval = Annotated[Any, AfterValidator(_check_interval)]
Clipping = Annotated[
    dict[Literal["max_norm", "norm_type"], Annotated[float, Field(gt=0)]], _require("max_norm")
]
Columns = Annotated[dict[str, list[Any] | str | None], _require("inter")]


class LoopSettings(Settings):
    """RecBole's keys of training and evaluation; the defaults of the metrics are this project's."""

    topk: Annotated[list[Annotated[int, Field(ge=1)]], BeforeValidator(_make_list)] = Field(
        [5, 10, 20], min_length=1, description="whole numbers from 1"
    )
    metrics: Annotated[list[str], AfterValidator(_check_metrics), BeforeValidator(_make_list)] = Field(
        ["Hit", "NDCG", "MRR", "ItemCoverage"],
        min_length=1,
        description=f"some of {', '.join(METRICS)}",
    )
    valid_metric: Any = "NDCG@10"
    clip_grad_norm: Clipping | None = Field(None, description="{max_norm: 5} or ~")
    eval_args: Any = None
    pre_model_path: Any = None

    @field_validator("eval_args")
    @classmethod
    def _check_eval_args(cls, args: Any) -> Any:
        if args is None or (isinstance(args, dict) and {**EVAL_ARGS, **args} == EVAL_ARGS):
            return args
        raise UserError(f"{args} is not supported; leave it out and set split (the ranking is always full)")

    @field_validator("pre_model_path")
    @classmethod
    def _refuse_pickle(cls, path: Any) -> Any:
        if path:
            raise UserError(f"{path!r} would be unpickled, which is never done here; leave it out")
        return path

    @model_validator(mode="after")
    def _check_valid_metric(self) -> Self:
        """The metric that stops the training must be measured."""
        measured = [f"{metric}@{k}" for metric in self.metrics for k in self.topk]
        if str(self.valid_metric).lower() not in [name.lower() for name in measured]:
            raise UserError(
                f"valid_metric: {self.valid_metric!r} is not measured; choose one of {', '.join(measured)}"
            )
        return self


class DataSettings(Settings):
    """RecBole's keys of how the files of a data set are read and filtered, with RecBole's defaults."""

    USER_ID_FIELD: Text = "user_id"
    ITEM_ID_FIELD: Text = "item_id"
    TIME_FIELD: Text = "timestamp"
    LIST_SUFFIX: Text = "_list"
    field_separator: Text = "\t"
    seq_separator: Text = " "
    user_inter_num_interval: Interval | None = Field("[0,inf)", description=_INTERVAL_WORDS)
    item_inter_num_interval: Interval | None = Field("[0,inf)", description=_INTERVAL_WORDS)
    rm_dup_inter: Literal["first", "last"] | None = Field(None, description="first, last or ~ (keeps all)")
    load_col: Columns = Field(
        {"inter": ["user_id", "item_id", "timestamp"]}, description="{inter: [column, ...]}"
    )
    val_interval: dict[str, Interval | list[Any]] | None = Field(None, description="{column: '[low,high]'}")

    @model_validator(mode="after")
    def _check_filtered_columns(self) -> Self:
        """A column that `val_interval` filters must be loaded."""
        loaded: list[Any] = []
        for columns in self.load_col.values():
            if columns == "*":
                return self
            loaded += columns or ()
        for column in self.val_interval or ():
            if column not in loaded:
                enough = ", ".join([*map(str, self.load_col["inter"] or ()), column])
                raise UserError(
                    f"val_interval: column {column!r} is not loaded; add it to load_col, such as "
                    f'--load_col="{{inter: [{enough}]}}"'
                )
        return self


def check_model_inputs(name: str, values: Mapping[str, Any]) -> None:
    """Check that a RecBole model gets what it needs beside interactions.

    Args:
        name: the model's.
        values: all keys, RecBole's of the model among them.

    Raises:
        UserError: an input is missing, or the model can't be trained here at all.
    """
    load = values["load_col"]
    if name in _ITEM_FEATURE_MODELS:
        features, loaded = values["selected_features"], load.get("item", ())
        missing = [] if loaded == "*" else [column for column in features if column not in loaded]
        if missing:
            columns = ", ".join([str(values["ITEM_ID_FIELD"]), *features])
            raise UserError(
                f"model: {name} needs item features (selected_features: {features}), and {missing[0]!r} is "
                f"not loaded; add item: [{columns}] to load_col, for columns of the .item file"
            )
    elif name == "GRU4RecKG":
        is_loaded = "ent" in load and "ent_id" in (values.get("preload_weight") or ())
        if not is_loaded or "ent_id" not in (values.get("alias_of_item_id") or ()):
            raise UserError(
                "model: GRU4RecKG needs vectors of the items in a file .ent; add ent: [ent_id, ent_emb] to "
                "load_col, and set preload_weight: {ent_id: ent_emb} and alias_of_item_id: [ent_id]"
            )
    elif name in _UNSUPPORTED_MODELS:
        raise UserError(
            f"model: {name} {_UNSUPPORTED_MODELS[name]}, which is not supported; choose another, "
            f"or train it with RecBole itself"
        )


def check_reranker_size(values: Mapping[str, Any], n_items: int) -> None:
    """Raise a UserError if a model re-ranks more items than there are."""
    sizes = [int(size) for size in str(values["reranker_CAN_NUM"] or "0").split(",")]
    if max(sizes) > n_items:
        raise UserError(
            f"reranker_CAN_NUM: {max(sizes)} is more than the {n_items:,} items of the data set; lower it"
        )


def check_machine(values: dict[str, Any]) -> None:
    """Check that a requested GPU and package are there; by default RecBole uses any available GPU."""
    if values.get("log_wandb") and find_spec("wandb") is None:
        raise UserError("log_wandb: True needs the package wandb; pip install wandb, or leave log_wandb out")
    if values.get("use_gpu") is False or values.get("gpu_id", 0) is None:
        values["gpu_id"] = ""
    gpu = str(values.get("gpu_id", "")).strip()
    count = torch.cuda.device_count()
    if gpu and not (gpu.isdigit() and int(gpu) < count):
        raise UserError(
            f"gpu_id: there is no GPU {gpu!r}, PyTorch sees {count}; choose another, or leave gpu_id out"
        )
