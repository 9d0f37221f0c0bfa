"""The whole state of a training in one safetensors file: tensors, and plain numbers as JSON.

Nothing is pickled: what is no tensor is a number or a list of numbers in the file's metadata.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m2rec.errors import UserError, format_one_line
from m2rec.tensor_files import read_metadata, read_tensors, write_tensors
from m2rec.training.ema import WeightEMA

_MODEL, _OPTIMIZER, _RANDOM, _AVERAGE = "model.", "optimizer.", "random.", "average."
_LOADER = "loader"


class TrainingState(NamedTuple):
    """What changes while a model is trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: torch.Generator
    """Shuffles the training rows; as it was when the epoch began that goes on."""
    average: WeightEMA | None
    """Of the weights, if the run takes one."""
    device: torch.device
    """Where the model is."""


def save_checkpoint(path: Path, training: TrainingState, numbers: Mapping[str, Any]) -> None:
    """Write a checkpoint as a whole, in the place of an earlier one.

    Args:
        path: the file.
        training: its state; the settings of the optimizer's groups come from the run's config.
        numbers: whatever else goes on, in plain JSON.
    """
    model, optimizer, loader, average, device = training
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        found = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in found.items()}
    generators, words = get_random_state(device)
    tensors |= {f"{_RANDOM}{name}": state for name, state in generators.items()}
    tensors[_LOADER] = loader.get_state()
    own: dict[str, Any] = {"random": words}
    if average is not None:
        tensors |= {f"{_AVERAGE}{name}": value for name, value in average.averages.items()}
        own["taken"] = average.taken
    write_tensors(path, tensors, {"numbers": json.dumps({**numbers, **own})})


def load_checkpoint(
    path: Path, training: TrainingState, check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Put a checkpoint's state back and return its numbers.

    Args:
        path: the file.
        training: what gets the state.
        check: looks at the numbers before anything is put back, and raises what stands against it.

    Raises:
        ValueError: the file can't be read, or is of another model or optimizer.
    """
    try:
        tensors, metadata = read_tensors(path)
        numbers = dict(json.loads(metadata["numbers"]))
    except (LookupError, TypeError, ValueError) as error:
        raise _invalid_checkpoint_error(path, error) from error
    check(numbers)
    model, optimizer, loader, average, device = training
    try:
        words = numbers.pop("random")
        model.load_state_dict(_select_prefix(tensors, _MODEL))
        _load_optimizer(optimizer, _select_prefix(tensors, _OPTIMIZER))
        if average is not None:
            average.load(_select_prefix(tensors, _AVERAGE), numbers.pop("taken"))
        loader.set_state(tensors[_LOADER])
        set_random_state(device, _select_prefix(tensors, _RANDOM), words)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _invalid_checkpoint_error(path, error) from error
    return numbers


def _invalid_checkpoint_error(path: Path, error: Exception) -> ValueError:
    reason = format_one_line(error)
    return ValueError(
        f"{path} is no checkpoint of this run ({type(error).__name__}: {reason}); start a new run"
    )


def read_checkpoint_numbers(path: Path) -> dict[str, Any]:
    """A checkpoint's numbers alone, unchecked.

    Raises:
        LookupError, ValueError: it is none.
    """
    return dict(json.loads(read_metadata(path)["numbers"]))


def _select_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        if tensor.dim() and tensor.shape != parameters[int(number)].shape:
            raise UserError(f"{key} of parameter {number} has shape {tuple(tensor.shape)}")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def get_random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of every generator that training draws from but the loader's, as tensors and numbers."""
    version, words, gauss = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = of_numpy
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    numbers = {"python": [version, gauss], "numpy": [name, int(position), int(has_gauss), float(cached)]}
    return tensors, numbers


def set_random_state(device: torch.device, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Put back what `get_random_state` gave."""
    torch.set_rng_state(tensors["torch"])
    name, position, has_gauss, cached = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
