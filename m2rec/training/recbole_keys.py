"""The forms of the keys that RecBole takes without a look; each mistake is one line."""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from m2rec.data.dataset import EVAL_ARGS
from m2rec.errors import UserError
from m2rec.evaluation.metrics import METRICS

# RecBole's sequential models that need item features, and those that are refused
_ITEM_FEATURE_MODELS = ("FDSA", "GRU4RecF", "SASRecF")
_UNSUPPORTED_MODELS = {
    "KSR": "needs a knowledge graph",
    "S3Rec": "is trained in two stages, between which RecBole keeps a pickle",
}


def check_evaluation(values: dict[str, Any]) -> None:
    """Full ranking over all items, and a stopping metric that is measured."""
    args = values.get("eval_args")
    if args is not None and (not isinstance(args, dict) or {**EVAL_ARGS, **args} != EVAL_ARGS):
        raise UserError(
            f"eval_args: {args} is not supported; leave it out and set split (the ranking is always full)"
        )
    values["eval_args"] = dict(EVAL_ARGS)
    topk = values["topk"] if isinstance(values["topk"], list) else [values["topk"]]
    if not topk or not all(type(k) is int and k > 0 for k in topk):
        raise UserError(f"topk: expected whole numbers from 1, got {values['topk']!r}")
    metrics = values["metrics"] if isinstance(values["metrics"], list) else [values["metrics"]]
    known = {metric.lower() for metric in METRICS}
    if not metrics or not all(isinstance(m, str) and m.lower() in known for m in metrics):
        raise UserError(f"metrics: expected some of {', '.join(METRICS)}, got {values['metrics']!r}")
    measured = [f"{metric}@{k}" for metric in metrics for k in topk]
    if str(values["valid_metric"]).lower() not in [m.lower() for m in measured]:
        raise UserError(
            f"valid_metric: {values['valid_metric']!r} is not measured; choose one of {', '.join(measured)}"
        )


def check_recbole_keys(values: Mapping[str, Any]) -> None:
    """The forms of the keys that RecBole takes without a look."""
    for key in ("user_inter_num_interval", "item_inter_num_interval"):
        _check_interval(key, values.get(key))
    _check_column_filters(values)
    if (keep := values.get("rm_dup_inter")) not in (None, "first", "last"):
        raise UserError(f"rm_dup_inter: expected first, last or ~ (keeps all), got {keep!r}")
    clip = values.get("clip_grad_norm")
    right = isinstance(clip, dict) and set(clip) <= {"max_norm", "norm_type"} and "max_norm" in clip
    if clip is not None and not (right and all(type(v) in (int, float) and v > 0 for v in clip.values())):
        raise UserError(f"clip_grad_norm: expected {{max_norm: 5}} or ~, got {clip!r}")
    for key in ("field_separator", "seq_separator", "LIST_SUFFIX"):
        if key in values and not (isinstance(values[key], str) and values[key]):
            raise UserError(f"{key}: expected some text, got {values[key]!r}")


def _check_column_filters(values: Mapping[str, Any]) -> None:
    """val_interval, and load_col, which must have its columns."""
    ranges = values.get("val_interval") or {}
    if not isinstance(ranges, dict):
        raise UserError(f"val_interval: expected {{column: '[low,high]'}}, got {ranges!r}")
    for column, wanted in ranges.items():
        if not isinstance(wanted, list):  # a list names the tokens to keep
            _check_interval(f"val_interval of {column}", wanted)
    load = values.get("load_col")
    if not isinstance(load, dict) or not isinstance(load.get("inter"), list | str):
        raise UserError(f"load_col: expected {{inter: [column, ...]}}, got {load!r}")
    loaded = {column for columns in load.values() if isinstance(columns, list) for column in columns}
    if (missing := [column for column in ranges if column not in loaded]) and "*" not in load.values():
        raise UserError(
            f"val_interval: column {missing[0]!r} is not loaded; add it to load_col, such as "
            f'--load_col="{{inter: [{", ".join([*load["inter"], missing[0]])}]}}"'
        )


def _check_interval(key: str, interval: Any) -> None:
    """None, or text such as [5,inf)."""
    number = r"[-+]?(?:\d+\.?\d*|inf)"
    match = re.fullmatch(rf"[\[(]\s*({number})\s*,\s*({number})\s*[\])]", str(interval))
    if interval is not None and (not match or float(match[1]) > float(match[2])):
        raise UserError(f"{key}: {interval!r} is no interval from low to high; write it as '[5,inf)'")


def check_model_inputs(name: str, values: Mapping[str, Any]) -> None:
    """What a sequential model of RecBole needs beside interactions.

    Args:
        name: the model's.
        values: all keys, RecBole's of the model among them.

    Raises:
        ValueError: it is not there, or the model can't be trained here at all.
    """
    load = values["load_col"]
    if name in _ITEM_FEATURE_MODELS:
        wanted, there = values["selected_features"], load.get("item", ())
        if missing := [column for column in wanted if there != "*" and column not in there]:
            columns = ", ".join([str(values["ITEM_ID_FIELD"]), *wanted])
            raise UserError(
                f"model: {name} needs item features (selected_features: {wanted}), and {missing[0]!r} is not "
                f"loaded; add item: [{columns}] to load_col, for columns of the .item file"
            )
    elif name == "GRU4RecKG":
        loaded = "ent" in load and "ent_id" in (values.get("preload_weight") or ())
        if not (loaded and "ent_id" in (values.get("alias_of_item_id") or ())):
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
    """A model that ranks its best items again must have enough of them.

    Raises:
        ValueError: there are fewer.
    """
    wanted = [int(n) for n in str(values["reranker_CAN_NUM"] or "0").split(",")]
    if max(wanted) > n_items:
        raise UserError(
            f"reranker_CAN_NUM: {max(wanted)} is more than the {n_items:,} items of the data set; lower it"
        )


def check_no_pickles(values: Mapping[str, Any]) -> None:
    """No key of RecBole's that loads a pickle."""
    if values.get("pre_model_path"):
        raise UserError(
            f"pre_model_path: {values['pre_model_path']!r} would be unpickled, which is never done here; "
            f"leave it out"
        )


def check_optional_packages(values: Mapping[str, Any]) -> None:
    """A package that a key needs must be there."""
    if values.get("log_wandb") and find_spec("wandb") is None:
        raise UserError("log_wandb: True needs the package wandb; pip install wandb, or leave log_wandb out")


def check_device(values: dict[str, Any]) -> None:
    """A GPU that was asked for must exist; without the question RecBole takes what there is."""
    if values.get("use_gpu") is False or values.get("gpu_id", 0) is None:
        values["gpu_id"] = ""
    gpu = str(values.get("gpu_id", "")).strip()
    count = torch.cuda.device_count()
    if gpu and not (gpu.isdigit() and int(gpu) < count):
        raise UserError(
            f"gpu_id: there is no GPU {gpu!r}, PyTorch sees {count}; choose another, or leave gpu_id out"
        )
