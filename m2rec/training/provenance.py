"""The facts that are stored with a run: its data, settings, protocol, machine and versions."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from m2rec import __version__, distributed
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.evaluation.protocols import Protocol
from m2rec.settings import MACHINE_KEYS, Role, collect_keys
from m2rec.threads import describe_threads
from m2rec.training.configuration import resolve_scan_backend, resolve_settings

# keys that may differ when a run is resumed
_RESUME_OVERRIDES = MACHINE_KEYS | collect_keys(Role.LENGTH, Role.DEFINITION, Role.TEXT_SOURCE, Role.SERVING)

# the share of tied neighbours in the order of item ids from which a file counts as sorted by them
_SORTED_SHARE = 0.95

_PACKAGES = ("torch", "recbole", "numpy", "pandas", "safetensors")

_HASHED_AT_ONCE = 1 << 20  # rows, of which a copy may be made

# the parts of a run's protocol that do not depend on its settings
_FIXED_PROTOCOL = {
    "ranking": "full, over all items",
    "test": "RecBole's protocol: the user's history stays in the ranking",
    "test_unseen": "the user's history is removed from the ranking; a target that is in it is a miss",
    "test_new": "as test_unseen, over the users whose target is not in their history",
    "valid": "as test",
    "valid_unseen": "as test_unseen",
    "valid_new": "as test_new",
}
_TARGETS = {
    "leave_one_out": "a user's last item is the test, the one before it the validation target",
    "global_time": (
        "trained on the first {valid_from:.0%} of all interactions by time; the validation target is "
        "a user's last item up to {test_from:.0%}, the test target the last after"
    ),
    "files": "each row's target and history are those of the files that benchmark_filename names",
}


def hash_training_data(dataset: HistoryDataset, loaders: Iterable[Any]) -> str:
    """A hash of what a run is trained and tested on: the histories, all rows and the item features."""
    digest = hashlib.sha256(json.dumps(dataset.item_tokens).encode())
    arrays: list[Any] = []
    if dataset.histories is not None:
        arrays += [dataset.histories.owner, dataset.histories.items]
    columns = (dataset.uid_field, dataset.iid_field, dataset.item_list_length_field)
    for loader in loaders:
        rows = loader.dataset.inter_feat
        arrays += [rows[column].numpy() for column in columns if column in rows]
    features = dataset.item_feat
    if features is not None:
        arrays += [features[column].numpy() for column in features.columns]
    for array in arrays:
        for start in range(0, len(array), _HASHED_AT_ONCE):
            some = array[start : start + _HASHED_AT_ONCE]
            if some.dtype == np.int32:  # the hash says nothing of how ids are held
                some = some.astype(np.int64)
            digest.update(np.ascontiguousarray(some).data)
    return digest.hexdigest()


def collect_fixed_settings(config: Config) -> dict[str, str]:
    """The settings that must not change while a run is resumed, as text."""
    return {
        key: json.dumps(value, default=str)
        for key, value in resolve_settings(config).items()
        if key not in _RESUME_OVERRIDES
    }


def describe_device(config: Config) -> str:
    """One line: the device and the scan backend, with reasons."""
    device: torch.device = config["device"]
    if device.type == "cuda":
        where = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        why = "as configured" if torch.cuda.is_available() else "no CUDA device"
        where = f"cpu ({why}), {describe_threads()}"
    if config.model_settings is None:
        return f"device {where}"
    backend = resolve_scan_backend(config.model_settings, device)
    return f"device {where}; scan backend {backend.name} ({backend.reason})"


def describe_data(dataset: HistoryDataset, train: Any, valid: Any, test: Any) -> dict[str, int]:
    """Counts after filtering, from the data set and its loaders.

    Returns:
        `valid_returning` and `test_returning` count targets that their user had before, `tied`
        interactions that share their time with another one of the same user, `test_tied` test targets that
        share it with the item before.
    """
    return {
        **dataset.counts,
        "train_rows": len(train.dataset),
        "valid_rows": len(valid.dataset),
        "test_rows": len(test.dataset),
        "train_targets": train.dataset.n_targets,
        "valid_returning": valid.dataset.n_returning,
        "test_returning": test.dataset.n_returning,
        "tied": dataset.n_tied,
        "test_tied": test.dataset.n_tied_targets,
    }


def describe_caveats(data: Mapping[str, int], dataset: HistoryDataset) -> dict[str, str]:
    """Sentences that a reader of the metrics needs.

    Args:
        data: the counts of `describe_data`.
        dataset: says in which order ties are.

    Returns:
        `ties`, `tied_targets` and `returning`, each only if the data has any.
    """
    caveats = {}
    if data["tied"]:
        share = _format_share(data["tied"], data["interactions"], "interactions")
        order, consequence = _describe_tie_order(dataset)
        caveats["ties"] = f"{share} share their time with another one of the same user; {order}"
        share = _format_share(data["test_tied"], data["test_rows"], "test targets")
        caveats["tied_targets"] = f"{share} share their time with the item before{consequence}"
    if data["test_returning"]:
        share = _format_share(data["test_returning"], data["test_rows"], "test targets")
        caveats["returning"] = (
            f"{share} are in their user's history: misses in test_unseen, left out of test_new"
        )
    return caveats


def _describe_tie_order(dataset: HistoryDataset) -> tuple[str, str]:
    """What decides the order of ties, and what that means for a tied target: two ends of sentences."""
    if dataset.tie_order == "shuffled":
        return "their order is random, the same in every run (ties: shuffled)", ""
    if dataset.time_order == "recbole" and dataset.config["rm_dup_inter"]:
        return "their order is left to RecBole, which drops repeats by a sort that is not stable", ""
    order = "their order is that of the file"
    ascending = dataset.ascending_ties
    if ascending is None:
        return order, ""
    order = f"{order}, and {ascending:.0%} of tied neighbours ascend by item id"
    for end, share in (("largest", ascending), ("smallest", 1 - ascending)):
        if share >= _SORTED_SHARE:
            mostly = "" if share == 1 else "mostly "
            return order, (
                f"; such a target is {mostly}the {end} item id of its time, which models learn; "
                f"ties: shuffled takes this order away"
            )
    return order, ""


def _format_share(count: int, total: int, noun: str) -> str:
    return f"{count:,} of {total:,} {noun} ({count / total:.0%})"


def describe_protocol(config: Config, dataset: HistoryDataset) -> dict[str, str]:
    """How the data is split and how items are ranked, in the metrics and by `Recommender.recommend`."""
    shares = {"valid_from": config["valid_from"], "test_from": config["test_from"]}
    settings, recommends = config.model_settings, {}
    if settings is not None:
        served = Protocol.UNSEEN if settings.exclude_seen else Protocol.ALL
        recommends = {"recommends_as": served.get_name("test")}
    sample = f", {config['valid_users']:,} users of it at most" if config["valid_users"] else ""
    return {
        "split": dataset.split,
        "targets": _TARGETS[dataset.split].format(**shares),
        **_FIXED_PROTOCOL,
        **recommends,
        "time_order": dataset.time_order,
        "tie_order": dataset.tie_order,
        "rows": dataset.rows,
        "chosen_by": f"best {config['valid_metric']} on valid{sample}",
    }


def describe_machine(config: Config) -> dict[str, Any]:
    """Device, processes, threads, and the peak memory of this process in MiB."""
    device: torch.device = config["device"]
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else read_peak_memory()
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"cpu ({platform.machine()})",
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": round(peak / 2**20, 1),
    }


def read_peak_memory() -> int:
    """Peak memory of this process in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10


def read_versions() -> dict[str, str]:
    found = {"m2rec": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
