"""A checkpoint: the full training state in one safetensors file, and whether a run can be resumed from it.

With `shard_items` a file of each process lies beside it: its part of the ID embedding and of what belongs to
that, and its random state. The checkpoint names these files, and is written after them, so that a run which
is killed at any time has one checkpoint whose files are all there.

Nothing is pickled: what is not a tensor is a number, a text or a list of them in the file's metadata.
"""

import json
import logging
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from m2rec import distributed
from m2rec.errors import UserError, format_one_line
from m2rec.git import join_commits, split_commits
from m2rec.run_folder import RunFolder
from m2rec.tensor_files import read_metadata, read_tensors, write_tensors
from m2rec.training.ema import WeightEMA
from m2rec.training.lazy_adam import LazyAdam

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]
Values = dict[str, Any]
"""Plain JSON values by name."""

# names of tensors in the file begin with these
_MODEL = "model."
_OPTIMIZER = "optimizer."
_RANDOM = "random."
_AVERAGE = "average."
_TABLE = "table."
_LOADER = "loader"


class CannotResume(UserError):
    """A stopped run can't be resumed; only a new run can help."""

    exit_status = 3
    """Of run_mm.py; other mistakes have 2."""


class TrainingState(NamedTuple):
    """What training changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: torch.Generator
    """Shuffles the training rows; its state at the start of the interrupted epoch."""
    ema: WeightEMA | None
    """None if the weights are not averaged."""
    device: torch.device
    """Of the model."""
    table_optimizer: LazyAdam | None = None
    """With `sparse_updates`, of the ID embedding, which `optimizer` then leaves out."""
    own_names: frozenset[str] = frozenset()
    """With `shard_items`, of the model's tensors that each process has for itself."""

    def is_own(self, name: str) -> bool:
        """Whether a tensor of the checkpoint, by its name there, is one that each process has for itself."""
        if not self.own_names:
            return False
        plain = name.removeprefix(_MODEL).removeprefix(_AVERAGE)
        return name.startswith((_TABLE, _RANDOM)) or plain in self.own_names


def save_checkpoint(files: RunFolder, training: TrainingState, numbers: Values) -> None:
    """Write a checkpoint atomically over an earlier one; with `shard_items`, in all processes.

    Args:
        files: the run folder.
        training: the state; the settings of the optimizer's groups come from the run's config.
        numbers: the rest of the state, as plain JSON values; `notes` are the run's inputs.
    """
    random_tensors, random_numbers = get_random_state(training.device)
    tensors = {
        **_add_prefix(_MODEL, training.model.state_dict()),
        **_add_prefix(_OPTIMIZER, _flatten_optimizer_state(training.optimizer)),
        **_add_prefix(_RANDOM, random_tensors),
        _LOADER: training.loader.get_state(),
    }
    numbers = {**numbers, "random": random_numbers}
    if training.ema is not None:
        tensors |= _add_prefix(_AVERAGE, training.ema.averages)
        numbers["taken"] = training.ema.n_updates
    if training.table_optimizer is not None:
        tensors |= _add_prefix(_TABLE, training.table_optimizer.state_tensors())
    if not training.own_names:
        write_tensors(files.checkpoint_file, tensors, {"numbers": json.dumps(numbers)})
        return
    rank, n = distributed.process_rank(), distributed.world_size()
    moment = _name_moment(numbers)
    own = {name: tensor for name, tensor in tensors.items() if training.is_own(name)}
    shard_numbers = {"moment": moment, "random": numbers.pop("random")}
    path = files.name_shard(moment, rank, n)
    write_tensors(path, own, {"numbers": json.dumps(shard_numbers)})
    distributed.wait_for_all()
    if rank == 0:
        common = {name: tensor for name, tensor in tensors.items() if name not in own}
        write_tensors(files.checkpoint_file, common, {"numbers": json.dumps({**numbers, "shards": n})})
    distributed.wait_for_all()
    if rank == 0:  # those of earlier checkpoints
        current = {files.name_shard(moment, other, n) for other in range(n)}
        for old in set(files.list_shards()) - current:
            old.unlink(missing_ok=True)


def _name_moment(numbers: Values) -> str:
    """What no other checkpoint of the run has: the last whole epoch, and the steps after it."""
    return f"{numbers['epoch']}-{numbers['partial']['steps']}"


def check_shards(files: RunFolder, training: TrainingState) -> None:
    """Check that the ID embedding of a checkpoint has as many parts as there are processes now.

    Raises:
        UserError: it has another number.
    """
    try:
        saved = int(read_checkpoint_numbers(files.checkpoint_file).get("shards", 1))
    except (LookupError, ValueError):
        return  # `load_checkpoint` says what is wrong
    now = distributed.world_size() if training.own_names else 1
    if saved != now:
        raise UserError(
            f"resume: {files.path} has its ID embedding in {saved} part(s) and is resumed in {now}; start "
            f"{saved} process(es), as at first"
        )


def load_checkpoint(files: RunFolder, training: TrainingState, run_inputs: Values) -> Values:
    """Restore a checkpoint's state and return its numbers.

    Args:
        files: the run folder.
        training: gets the state.
        run_inputs: the run's inputs now.

    Raises:
        CannotResume: the checkpoint can't be read, or belongs to another model or optimizer, or an input of
            the run has changed.
    """
    try:
        tensors, metadata = read_tensors(files.checkpoint_file)
        numbers: Values = json.loads(metadata["numbers"])
        if training.own_names:
            own, numbers["random"] = _read_shard(files, _name_moment(numbers))
            tensors |= own
        check_unchanged_inputs(numbers["notes"], run_inputs, files)
        training.model.load_state_dict(_select_prefix(tensors, _MODEL))
        _load_optimizer_state(training.optimizer, _select_prefix(tensors, _OPTIMIZER))
        if training.ema is not None:
            training.ema.load(_select_prefix(tensors, _AVERAGE), numbers.pop("taken"))
        if training.table_optimizer is not None:
            training.table_optimizer.load_state_tensors(_select_prefix(tensors, _TABLE))
        training.loader.set_state(tensors[_LOADER])
        set_random_state(training.device, _select_prefix(tensors, _RANDOM), numbers.pop("random"))
    except CannotResume:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {format_one_line(error)}"
        raise CannotResume(
            f"{files.checkpoint_file} is not a valid checkpoint of this run ({reason}); start a new run"
        ) from error
    return numbers


def _read_shard(files: RunFolder, moment: str) -> tuple[Tensors, Values]:
    """What only this process has of a checkpoint, and the numbers of its random state."""
    path = files.name_shard(moment, distributed.process_rank(), distributed.world_size())
    tensors, metadata = read_tensors(path)
    numbers = json.loads(metadata["numbers"])
    if numbers["moment"] != moment:
        raise CannotResume(f"{path} is of another checkpoint, {numbers['moment']}; start a new run")
    return tensors, numbers["random"]


def check_unchanged_inputs(saved: Values, current: Values, files: RunFolder) -> None:
    """Check that data, text vectors and settings are those that the run was started with.

    Args:
        saved: the run's inputs in the checkpoint.
        current: its inputs now.
        files: the run folder.

    Raises:
        CannotResume: one of them has changed.
    """
    cure = "put it back, or start a new run"
    for key, name in (("data", "data"), ("text", "text vectors")):
        if saved.get(key) != current.get(key):
            raise CannotResume(f"resume: the {name} of {files.path} have changed since it stopped; {cure}")
    saved_settings, settings = saved.get("settings", {}), current.get("settings", {})
    for key, before in saved_settings.items():  # a key that is newer than the run is not compared
        now = settings.get(key)
        if before != now:
            raise CannotResume(f"resume: {key} was {before} and is {now} in {files.config_file}; {cure}")


def merge_run_inputs(saved: Values, current: Values) -> Values:
    """The run's inputs in the checkpoint, with the commits of all code that trained it.

    Logs a warning if the commit or the number of threads differs.
    """
    before, now = saved.get("threads"), current["threads"]
    if before not in (None, now):
        cure = f"set OMP_NUM_THREADS={before} to keep them"
        logger.warning(
            "threads: %s before, %s now; results may differ in the last digits (%s)", before, now, cure
        )
    commits = read_commits(saved)
    (commit,) = current["commits"]
    if commit not in commits:
        logger.warning("resumed with other code: commits %s and %s", join_commits(commits), commit)
        commits.append(commit)
    return {**saved, "commits": commits}


def read_commits(run_inputs: Values) -> list[str | None]:
    """The commits that have trained a run; older checkpoints hold them in one text."""
    return list(run_inputs.get("commits") or split_commits(run_inputs["commit"]))


def check_best_weights(files: RunFolder, epoch: int, best_epoch: int | None) -> tuple[int, float] | None:
    """Check that the best weights so far are undamaged and those of the best epoch.

    Args:
        files: the run folder.
        epoch: the last whole epoch.
        best_epoch: the epoch of the best weights, None if there are none yet.

    Returns:
        Epoch and score of newer weights, whose checkpoint was not written; None without them.

    Raises:
        ValueError: the weights are damaged, or of another epoch.
    """
    if best_epoch is None and not files.weights_file.exists():
        return None
    with files.open_weights() as (_, metadata):
        pass
    weights_epoch = int(metadata.get("epoch", -1))
    if weights_epoch > epoch:
        return weights_epoch, float(metadata["score"])
    if weights_epoch != best_epoch:
        holds = f"holds the weights of epoch {weights_epoch}, expected {best_epoch}"
        raise UserError(f"resume: {files.weights_file} {holds}; start a new run")
    return None


def read_checkpoint_numbers(path: Path) -> Values:
    """A checkpoint's numbers alone, unchecked.

    Raises:
        LookupError, ValueError: the file is not a checkpoint.
    """
    return dict(json.loads(read_metadata(path)["numbers"]))


def _add_prefix(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _select_prefix(tensors: Tensors, prefix: str) -> Tensors:
    selected = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            selected[name.removeprefix(prefix)] = tensor
    return selected


def _flatten_optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's tensors as `NUMBER.KEY`, by the number of the parameter."""
    tensors = {}
    for number, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{key}"] = value
    return tensors


def _load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def get_random_state(device: torch.device) -> tuple[Tensors, Values]:
    """The states of all generators that training draws from but the loader's, as tensors and numbers."""
    version, python_state, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached_gauss = numpy_state
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(python_state),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    numpy_numbers = [name, int(position), int(has_gauss), float(cached_gauss)]
    return tensors, {"python": [version, gauss], "numpy": numpy_numbers}


def set_random_state(device: torch.device, tensors: Tensors, numbers: Values) -> None:
    """Restore what `get_random_state` returned."""
    torch.set_rng_state(tensors["torch"])
    name, *numpy_numbers = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *numpy_numbers))
    version, gauss = numbers["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
