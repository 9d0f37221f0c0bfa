"""What a run says of itself: its data, settings, protocol, machine, code and versions."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import psutil
import torch

from m2rec import __version__, distributed
from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.ops import resolve_backend
from m2rec.settings import MACHINE_KEYS, Role, collect_keys
from m2rec.threads import describe_threads
from m2rec.training.configuration import resolve_settings

# keys that may differ when a run is resumed
_RESUME_OVERRIDES = MACHINE_KEYS | collect_keys(Role.LENGTH, Role.DEFINITION, Role.TEXT_SOURCE)


_PACKAGES = ("torch", "recbole", "numpy", "pandas", "safetensors")


def list_item_tokens(dataset: HistoryDataset) -> list[str]:
    """Tokens by internal id, padding's first."""
    return [str(token) for token in dataset.field2id_token[dataset.iid_field]]


def hash_training_data(dataset: HistoryDataset, parts: Iterable[Any]) -> str:
    """A hash of what a run is trained and tested on: every user's items in order, all rows, item features."""
    digest = hashlib.sha256(json.dumps(list_item_tokens(dataset)).encode())
    arrays: list[Any] = []
    if dataset.histories is not None:
        arrays += [dataset.histories.owner, dataset.histories.items]
    for part in parts:
        rows = part.dataset.inter_feat
        names = (dataset.uid_field, dataset.iid_field, dataset.item_list_length_field)
        arrays += [rows[name].numpy() for name in names if name in rows]
    features = dataset.item_feat
    if features is not None:
        arrays += [features[name].numpy() for name in features.columns]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def collect_fixed_settings(config: Config) -> dict[str, str]:
    """The settings that a run keeps from its start to its end, as text."""
    return {
        key: json.dumps(value, default=str)
        for key, value in resolve_settings(config).items()
        if key not in _RESUME_OVERRIDES
    }


def describe_device(config: Config) -> str:
    """One line: device and why, scan backend and why."""
    device: torch.device = config["device"]
    if device.type == "cuda":
        where = f"{device} ({torch.cuda.get_device_name(device)})"
    else:
        why = "as asked" if torch.cuda.is_available() else "no CUDA device"
        where = f"cpu ({why}), {describe_threads()}"
    if config.model_settings is None:
        return f"device {where}"
    backend = resolve_backend(config.model_settings.scan_backend, device)
    return f"device {where}; scan backend {backend.name} ({backend.reason})"


def describe_data(dataset: HistoryDataset, train: Any, valid: Any, test: Any) -> dict[str, int]:
    """Counts after filtering, the rows and targets of each part, returning targets and tied times.

    Returns:
        `valid_returning` and `test_returning` count targets that their user had before, `tied`
        interactions that share their time with another one of the same user.
    """
    rows = {"train_rows": train, "valid_rows": valid, "test_rows": test}
    return {
        **dataset.counts,
        **{name: len(part.dataset) for name, part in rows.items()},
        "train_targets": train.dataset.n_targets,
        "valid_returning": valid.dataset.n_returning,
        "test_returning": test.dataset.n_returning,
        "tied": dataset.n_tied,
    }


def describe_caveats(data: Mapping[str, int], tie_order: str) -> dict[str, str]:
    """A sentence for what one should know before reading the metrics.

    Args:
        data: as `describe_data` counts it.
        tie_order: what decides the order of equal times.

    Returns:
        `ties` and `returning`, each only where there are such.
    """
    cautions = {}
    if tied := data["tied"]:
        share = f"{tied:,} of {data['interactions']:,} interactions ({tied / data['interactions']:.0%})"
        cautions["ties"] = f"{share} share their time with another one of the same user; {tie_order}"
    if returning := data["test_returning"]:
        share = f"{returning:,} of {data['test_rows']:,} test targets ({returning / data['test_rows']:.0%})"
        cautions["returning"] = (
            f"{share} are in their user's history: misses in test_unseen, left out of test_new"
        )
    return cautions


def describe_protocol(config: Config, dataset: HistoryDataset) -> dict[str, str]:
    split = {
        "leave_one_out": "a user's last item is the test, the one before it the validation target",
        "global_time": (
            f"trained on the first {config['valid_from']:.0%} of all interactions by time; the validation "
            f"target is a user's last item up to {config['test_from']:.0%}, the test target the last after"
        ),
        "files": "each row's target and history are those of the files that benchmark_filename names",
    }
    return {
        "split": dataset.split,
        "targets": split[dataset.split],
        "ranking": "full, over all items",
        "test": "RecBole's protocol: the user's history stays in the ranking",
        "test_unseen": "the user's history is removed from the ranking; a target that is in it is a miss",
        "test_new": "as test_unseen, over the users whose target is not in their history",
        "valid": "as test",
        "valid_unseen": "as test_unseen",
        "valid_new": "as test_new",
        "time_order": dataset.time_order,
        "rows": dataset.rows,
        "chosen_by": f"best {config['valid_metric']} on valid",
    }


def describe_machine(config: Config) -> dict[str, Any]:
    """Where it ran, on how much of it, and the largest memory that this process took, in MiB."""
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
    """The most bytes that this process has held at a time."""
    if sys.platform == "win32":
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
