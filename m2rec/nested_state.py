"""A nested state of tensors and plain values, as RecBole's checkpoints are, in a file without a pickle."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2rec.files import read_tensors, write_tensors

_STATE_KEY = "state"


def save_state(state: Any, path: Path) -> None:
    """Write dicts, lists, tensors, arrays and plain values to a safetensors file, as a whole or not at all.

    Raises:
        ValueError: something else is among them, which only a pickle could hold.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode_value(state, tensors, "")
    write_tensors(path, tensors, {_STATE_KEY: json.dumps(tree)})


def load_state(path: Path, device: str) -> Any:
    """What `save_state` wrote, with tensors on `device`; a tuple comes back as a list.

    Raises:
        ValueError: the file is no such file.
    """
    try:
        tensors, metadata = read_tensors(path, device)
        tree = json.loads(metadata[_STATE_KEY])
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint of M2Rec's kind, and pickles are never loaded; train the model again "
            f"({' '.join(str(error).split())})"
        ) from error
    return _decode_value(tree, tensors)


def _encode_value(value: Any, tensors: dict[str, Tensor], place: str) -> Any:
    """The value as JSON, its tensors put into `tensors`."""
    if isinstance(value, Tensor | np.ndarray):
        tensors[place] = torch.as_tensor(value)
        return {"tensor" if isinstance(value, Tensor) else "array": place}
    if isinstance(value, dict):  # its keys may be numbers, which JSON's are not
        return {
            "dict": [[key, _encode_value(item, tensors, f"{place}.{key}")] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        return {
            "list": [_encode_value(item, tensors, f"{place}.{number}") for number, item in enumerate(value)]
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{place.lstrip('.')}: {type(value).__name__} can only be pickled, which is never done")


def _decode_value(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: _decode_value(item, tensors) for key, item in content}
    if kind == "list":
        return [_decode_value(item, tensors) for item in content]
    return tensors[content].cpu().numpy() if kind == "array" else tensors[content]
