"""A run that continues a finished one on more data: what it takes over, and which rows it trains.

letter  meaning
V, D    items including padding, model width
T       width of the text vectors
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from m2rec.compat import Config
from m2rec.data.dataset import HistoryDataset
from m2rec.data.extent import TrainingExtent, count_trained_targets, find_new_rows
from m2rec.data.transitions import count_transitions
from m2rec.errors import UserError, format_one_line
from m2rec.models.m2rec import M2Rec
from m2rec.run_folder import RunFolder
from m2rec.settings import NO_RUN, SCALE_FREE_KEYS, Role, RunSettings, collect_keys, override_settings
from m2rec.text.continued import continue_text_vectors
from m2rec.text.vector_file import ANY_VECTORS, TextVectors
from m2rec.training.configuration import RunConfig, build_config, collect_user_values
from m2rec.training.replay import ReplayLoader
from m2rec.training.settling import find_scale_free_keys

logger = logging.getLogger(__name__)

KEY = "continue_from"
EPOCHS = 8
"""The default of `epochs` for a run that continues another one."""

# keys of the model that its weights do not depend on
_FREE_KEYS = {
    "dropout_prob", "gbce_t", "id_dropout", "loss_memory", "loss_type", "n_negatives", "negative_sampling",
    "negatives_shared", "neighbors",
}  # fmt: skip
_FIXED_KEYS = (collect_keys(Role.MODEL) - _FREE_KEYS) | {"MAX_ITEM_LIST_LENGTH"}

_NEIGHBORS = "encoder.neighbors."  # the names of weights that are made anew after training
_TABLE = "encoder.id_embedding.weight"
_LAYERS = "encoder.layers."
_ITEM_BUFFERS = ("encoder.vectors", "text_mean", "text_basis")

_N_NEIGHBORS = 16  # whose mean a new item starts from
_BLOCK_SCORES = 2**24  # similarities that are held at a time


def build_run_config(given: Mapping[str, Any], default_file: Path | None = None) -> RunConfig:
    """The config of a new run; of one that continues another run, with that run's settings.

    Args:
        given: as for `build_config`.
        default_file: as for `build_config`; not read where `given` names a run to continue.

    Raises:
        UserError: as `build_config`; the run can't be continued, or a key contradicts its model.
    """
    if KEY in given:
        default_file = None  # the run's settings are more than the shipped ones
    user_values = collect_user_values(given, default_file)
    name = user_values.get(KEY, NO_RUN)
    if name == NO_RUN:
        return build_config(given, default_file)
    files = _find_run(name)
    settings = files.read_config()
    _check_user_values(name, settings, user_values, has_text=bool(files.read_text_source()))
    if not files.read_text_source():
        settings["text_vectors"] = "none"
    settings["text_fingerprint"] = ANY_VECTORS  # those of new items come into the space of the run's
    inherited = scale_to_data(settings, files.read_metrics()["data"])
    for scale_free, plain in SCALE_FREE_KEYS.items():
        pair = {scale_free, plain}
        if pair & set(user_values) or (scale_free == "decay_per_epoch" and "learner" in user_values):
            inherited = {key: value for key, value in inherited.items() if key not in pair}
    return build_config({**inherited, "epochs": EPOCHS, **user_values, "auto": False})


def scale_to_data(settings: Mapping[str, Any], data: Mapping[str, int]) -> dict[str, Any]:
    """The settings of a run, with scale-free keys in place of the plain ones, so that they fit more data.

    Without it weight decay would be too strong: it is a share for each step, and more data has more steps.

    Args:
        settings: all keys of a finished run.
        data: its counts in metrics.json.
    """
    scaled = find_scale_free_keys(RunSettings.read(settings), data["train_rows"], data["train_targets"])
    scaled.pop("patience_targets", None)  # the patience stays in epochs, of which there are few
    return override_settings(settings, scaled)


def _find_run(name: Any) -> RunFolder:
    """The folder of a finished run that can be continued.

    Raises:
        UserError: it is none.
    """
    files = RunFolder(Path(str(name)))
    if not files.config_file.is_file():
        raise UserError(f"{KEY}: {str(name)!r} is not a run folder: it has no {files.config_file.name}")
    if not files.is_finished:
        raise UserError(f"{KEY}: {name} is not a finished run; finish it with --resume={name}")
    if not files.extent_file.is_file():
        raise UserError(
            f"{KEY}: {name} has no {files.extent_file.name}, which says what it was trained on: an older "
            f"version made it, or it had the files of benchmark_filename; train it anew on whole histories"
        )
    return files


def _check_user_values(
    name: str, settings: Mapping[str, Any], user: Mapping[str, Any], has_text: bool
) -> None:
    """Check that the user's keys leave the model as it is.

    Args:
        name: of the run to continue.
        settings: its keys.
        user: those of the user.
        has_text: whether the model has text.

    Raises:
        UserError: a key contradicts the run.
    """
    for key in sorted(_FIXED_KEYS & set(user)):
        if user[key] != settings.get(key):
            raise UserError(
                f"{key}: {user[key]!r}, but {name} was trained with {settings.get(key)!r}; leave {key} out, "
                f"or train anew"
            )
    if "text_vectors" in user and (user["text_vectors"] != "none") != has_text:
        has = "text" if has_text else "no text"
        raise UserError(
            f"text_vectors: {user['text_vectors']!r}, but {name} was trained with {has}; leave text_vectors "
            f"out, or train anew"
        )
    if user.get("benchmark_filename"):
        raise UserError(f"benchmark_filename: {KEY} needs whole histories; leave it out, or train anew")


@dataclass(frozen=True)
class SourceRun:
    """The run that another one continues."""

    name: str
    tokens: Sequence[str]
    """Item tokens by internal id, padding's first."""
    weights: dict[str, Tensor]
    """By name, without its neighbours."""
    extent: TrainingExtent

    @classmethod
    def read(cls, config: Config) -> "SourceRun | None":
        """That of the key `continue_from`; None without it.

        Raises:
            UserError: a file of the run is missing or damaged.
        """
        name = config[KEY]
        if name == NO_RUN:
            return None
        if config.model_settings is None:
            raise UserError(f"{KEY}: {config['variant']} is not made of M2Rec's parts; train it anew")
        files = _find_run(name)
        weights, _ = files.read_weights()
        weights = {key: value for key, value in weights.items() if not key.startswith(_NEIGHBORS)}
        tokens = files.read_tokens()
        try:
            extent = TrainingExtent.from_tensors(files.read_extent())
        except KeyError as error:
            raise UserError(f"{files.extent_file} is damaged: it has no {error}") from None
        if len(weights.get(_TABLE, ())) != len(tokens):
            raise UserError(f"{KEY}: {name}: weights and items do not fit each other; train anew")
        return cls(str(name), tokens, weights, extent)

    def map_items(self, tokens: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The items of this run that are in a catalogue: ids here and ids there, (n,) each.

        Raises:
            UserError: there is none.
        """
        ids = {token: i for i, token in enumerate(tokens) if i > 0}
        pairs = [(i, ids[token]) for i, token in enumerate(self.tokens) if i > 0 and token in ids]
        if not pairs:
            raise UserError(
                f"{KEY}: no item of {self.name} is in this data set (its first: {list(self.tokens[1:4])}, "
                f"the data set's: {list(tokens[1:4])}); name the data set that it was trained on"
            )
        here, there = np.array(pairs).T
        return here, there

    def load_text_vectors(self, path: Path | None, tokens: Sequence[str]) -> TextVectors | None:
        """Text vectors by the ids of a catalogue; None if the run has no text.

        Args:
            path: the text-vector file; None where there is none, and new items have no text.
            tokens: of the catalogue, by internal id.

        Raises:
            UserError: the file does not fit.
        """
        vectors = self.weights.get("encoder.vectors")
        if vectors is None:
            return None
        here, there = self.map_items(tokens)
        kept = vectors.new_zeros(len(tokens), vectors.shape[1])
        kept[there] = vectors[here]
        mean, basis = self.weights["text_mean"], self.weights["text_basis"]
        if path is None:
            logger.warning("no text vectors for new items; old ones keep those of %s", self.name)
            missing = tuple(token for token, row in zip(tokens[1:], kept[1:], strict=True) if not row.any())
            return TextVectors(kept, missing, mean, basis, {"file": "none", "sha256": "none"})
        return continue_text_vectors(path, tokens, kept, mean, basis)


@torch.no_grad()
def take_over_weights(
    model: M2Rec, source: SourceRun, dataset: HistoryDataset, layer_share: float
) -> dict[str, int]:
    """Give a model the weights of an earlier run; its new items start from their neighbours.

    The layers keep a share of their weights only; the rest is that of a new model. Trained layers go on to
    a worse end than new ones ("On Warm-Starting Neural Network Training", Ash & Adams 2020), item vectors do
    not.

    Args:
        model: a new one for `dataset`, with its text vectors.
        source: the earlier run.
        dataset: with histories.
        layer_share: how much the layers keep, from 0 to 1.

    Returns:
        How many items are kept, are new, and are gone.

    Raises:
        UserError: the weights are of another model.
    """
    here, there = source.map_items(dataset.item_tokens)
    own = model.state_dict()
    table = torch.zeros_like(own[_TABLE])
    table[there] = source.weights[_TABLE].to(table)[here]
    is_new = torch.ones(len(table), dtype=torch.bool)
    is_new[0] = is_new[there] = False
    table[is_new] = average_neighbors(table.cpu(), is_new, dataset, own.get("encoder.vectors")).to(table)
    weights = {**source.weights, _TABLE: table}
    weights |= {name: own[name] for name in _ITEM_BUFFERS if name in own}
    try:
        for name, value in own.items():
            if name.startswith(_LAYERS) and value.is_floating_point():
                weights[name] = value.lerp(weights[name].to(value), layer_share)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{KEY}: the weights of {source.name} do not fit the model ({format_one_line(error)}); train anew"
        ) from None
    return {
        "items_kept": len(there),
        "items_new": int(is_new.sum()),
        "items_gone": len(source.tokens) - 1 - len(here),
    }


def average_neighbors(
    table: Tensor, is_new: Tensor, dataset: HistoryDataset, vectors: Tensor | None
) -> Tensor:
    """A row for each new item, (n, D): the mean of the old items that users had near it in training.

    An item that training does not have takes the old items of similar text, and without text the mean of all.

    Args:
        table: (V, D), the rows of the old items.
        is_new: (V,), which items are new.
        dataset: with histories.
        vectors: (V, T), zero for an item without text; None without text.
    """
    is_old = ~is_new
    is_old[0] = False
    rows = table[is_old].mean(0).repeat(len(table), 1)
    if vectors is not None:
        unit = F.normalize(vectors.cpu(), dim=1)
        with_text = (is_new & unit.any(1)).nonzero()[:, 0]
        rows[with_text] = _average_similar(table[is_old], unit[is_old], unit[with_text])
    assert dataset.histories is not None
    graph = count_transitions(dataset.histories, len(table), _N_NEIGHBORS)
    sources = torch.arange(len(table)).repeat_interleave(torch.from_numpy(graph.offsets).diff())
    targets, strengths = torch.from_numpy(graph.targets), torch.from_numpy(graph.strengths).to(table)[:, None]
    used = is_new[sources] & is_old[targets]
    sums, weights = torch.zeros_like(table), torch.zeros(len(table), 1)
    sums.index_add_(0, sources[used], strengths[used] * table[targets[used]])
    weights.index_add_(0, sources[used], strengths[used])
    return torch.where(weights > 0, sums / weights, rows)[is_new]


def _average_similar(table: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The mean rows of the old items that are most similar to each new one, (n, D).

    Args:
        table: (o, D), the rows of the old items.
        old, new: (o, T) and (n, T), vectors of length 1, or 0 for an old item without text.
    """
    means = []
    for block in new.split(max(1, _BLOCK_SCORES // len(old))):
        nearest = (block @ old.T).topk(min(_N_NEIGHBORS, len(old)))
        means.append(table[nearest.indices].mean(1))
    return torch.cat(means) if means else table.new_zeros(0, table.shape[1])


@dataclass(frozen=True)
class ContinuedRun:
    """What a run took over, and its training rows."""

    loader: ReplayLoader
    facts: dict[str, Any]
    """For metrics.json."""


def continue_training(source: SourceRun, model: M2Rec, dataset: HistoryDataset, loader: Any) -> ContinuedRun:
    """Give a new model the weights of an earlier run, and choose its training rows.

    Args:
        source: the earlier run.
        model: as for `take_over_weights`.
        dataset: all data.
        loader: RecBole's, of all training rows.

    Raises:
        UserError: the data has nothing new, or the earlier run was trained on targets that are held out here.
    """
    n_trained = count_trained_targets(dataset, source.extent)
    if n_trained:
        raise UserError(
            f"{KEY}: {source.name} was trained on {n_trained:,} of the validation and test targets; split "
            f"and filter the data as it did, and append new interactions to all that it had"
        )
    is_new = find_new_rows(loader.dataset, source.extent)
    if not is_new.any():
        raise UserError(
            f"{KEY}: {source.name} was trained on all training targets of this data; append new interactions "
            f"to the data set first"
        )
    items = take_over_weights(model, source, dataset, layer_share=float((~is_new).mean()))
    facts: dict[str, Any] = {"run": source.name, **items}
    replaying = ReplayLoader(loader, is_new, loader.config["replay_share"])
    facts |= {
        "rows_new": len(replaying.new),
        "rows_old": len(is_new) - len(replaying.new),
        "rows_replayed": replaying.n_replayed,
    }
    logger.info(
        "continued from %s: %s items kept, %s new, %s gone; an epoch trains %s rows with something new and "
        "%s of %s others",
        source.name, *(f"{facts[key]:,}" for key in ("items_kept", "items_new", "items_gone", "rows_new")),
        f"{facts['rows_replayed']:,}", f"{facts['rows_old']:,}",
    )  # fmt: skip
    return ContinuedRun(replaying, facts)
