"""A trained model as a run folder holds it: read, written, and with more items.

The run folder alone is needed: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
V, D    items including padding, model width
T       width of the text vectors in the model
T0      width of the text vectors in their file
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from m2rec import __version__
from m2rec.errors import UserError, format_one_line
from m2rec.nn.encoder import Encoder
from m2rec.nn.inference.encoder import PreparedEncoder
from m2rec.nn.live import prepare_encoder
from m2rec.run_folder import RunFolder
from m2rec.serving.title_search import TitleSearch
from m2rec.settings import ModelSettings, RunSettings
from m2rec.text import vector_file

_ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class SavedModel:
    """A trained network and its catalogue; never changed in place."""

    encoder: Encoder
    table: Tensor
    """(V, D), the item table."""
    tokens: tuple[str, ...]
    """Item tokens by internal id, padding's first."""
    ids: Mapping[str, int]
    """Internal ids by item token, without padding's."""
    titles: Mapping[str, str]
    """By item token, of the items that have one."""
    item_counts: tuple[int, ...]
    """Occurrences in training by internal id; empty where unknown."""
    popularity_order: Tensor
    """Ids without padding, by `item_counts`, the greatest first; empty where they are."""
    config: Mapping[str, Any]
    """The keys of the run."""
    max_length: int
    """Items of a history that training saw at most."""
    text_mean: Tensor | None
    """(T0,), subtracted from raw text vectors; None without text."""
    text_basis: Tensor | None
    """(T0, T), which the difference is multiplied with; None without text."""
    text_source: Mapping[str, Any]
    """What made the run's text vectors."""

    @cached_property
    def inference_encoder(self) -> Encoder | PreparedEncoder:
        """The network for inference, with tables of what depends on an item alone; made at first use."""
        return prepare_encoder(self.encoder, self.table)

    @cached_property
    def names(self) -> NDArray[np.object_]:
        """(2, V), tokens and titles by internal id, empty where an item has no title; made at first use."""
        titles = [self.titles.get(token, "") for token in self.tokens]
        return np.array([self.tokens, titles], dtype=object)

    @cached_property
    def title_search(self) -> TitleSearch:
        """Finds items by what a person types; made at first use."""
        return TitleSearch(self.tokens[1:], self.titles)

    @cached_property
    def n_layer_parameters(self) -> int:
        """Parameters of the layers, each used once per position of a history."""
        return sum(p.numel() for p in self.encoder.layers.parameters())

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of the layers' weights, which adding items does not change."""
        digest, state = hashlib.sha256(), self.encoder.state_dict()
        for name in sorted(name for name in state if name.startswith(("layers.", "norm."))):
            digest.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()


def read_saved_model(folder: Path, device: torch.device) -> SavedModel:
    """The model of a run folder.

    Raises:
        ValueError: a file is missing, damaged, or of another model.
    """
    files = RunFolder(folder)
    config = files.read_config()
    tokens = files.read_tokens()
    weights, _ = files.read_weights(str(device))
    state = {k.removeprefix(_ENCODER_PREFIX): v for k, v in weights.items() if k.startswith(_ENCODER_PREFIX)}
    if "id_embedding.weight" not in state:
        raise UserError(f"{folder}: model: {config.get('model')!r} is not made of M2Rec's parts")
    settings = ModelSettings.read(config).model_copy(update={"scan_backend": "auto"})  # that of this machine
    length = RunSettings.read(config).max_length
    try:
        if len(state["id_embedding.weight"]) != len(tokens):
            raise RuntimeError(f"{len(state['id_embedding.weight'])} rows for {len(tokens)} items")
        encoder = Encoder.from_state(settings, length, state).to(device)
    except RuntimeError as error:
        said = format_one_line(error)
        raise UserError(
            f"{folder}: the weights don't fit config.yaml and items.json ({said})"
            f"{_describe_version_mismatch(files)}"
        ) from None
    return build_saved_model(
        encoder,
        tokens,
        titles=files.read_titles(),
        counts=files.read_counts(len(tokens)),
        config=config,
        text_mean=weights.get("text_mean"),
        text_basis=weights.get("text_basis"),
        text_source=files.read_text_source(),
    )


@torch.no_grad()
def build_saved_model(
    encoder: Encoder,
    tokens: Sequence[str],
    *,
    titles: Mapping[str, str],
    counts: Sequence[int],
    config: Mapping[str, Any],
    text_mean: Tensor | None,
    text_basis: Tensor | None,
    text_source: Mapping[str, Any],
) -> SavedModel:
    """A `SavedModel` from what it is made of; the rest of its fields follow."""
    encoder = encoder.eval()
    return SavedModel(
        encoder=encoder,
        table=encoder.item_table().detach(),
        tokens=tuple(tokens),
        ids={token: i for i, token in enumerate(tokens) if i > 0},
        titles=dict(titles),
        item_counts=tuple(counts),
        popularity_order=1 + torch.tensor(counts[1:]).argsort(descending=True, stable=True),
        config=config,
        max_length=RunSettings.read(config).max_length,
        text_mean=text_mean,
        text_basis=text_basis,
        text_source=dict(text_source),
    )


def write_saved_model(trained: SavedModel, folder: Path) -> None:
    """Write what `read_saved_model` reads; the folder is created if it does not exist.

    The weights come last, so that the folder of an interrupted save can't be loaded.

    Raises:
        ValueError: a run was trained in this folder.
    """
    files = RunFolder(folder)
    if files.has_training:
        raise UserError(f"save: {folder} is a run's own folder; give another")
    weights = {_ENCODER_PREFIX + name: value for name, value in trained.encoder.state_dict().items()}
    if trained.text_mean is not None and trained.text_basis is not None:
        weights |= {"text_mean": trained.text_mean, "text_basis": trained.text_basis}
    folder.mkdir(parents=True, exist_ok=True)
    files.weights_file.unlink(missing_ok=True)
    files.write_inputs(
        trained.config,
        tokens=trained.tokens,
        counts=trained.item_counts,
        titles=trained.titles,
        text_source=trained.text_source,
        is_run=False,
    )
    files.write_weights(weights)


def require_table_text(model: SavedModel) -> tuple[Tensor, Tensor, Tensor]:
    """The item text that new items need: its vectors (V, T), and the mean and basis that whiten raw ones.

    Raises:
        ValueError: the model has no text, or none in its item table.
    """
    vectors, mean, basis = model.encoder.vectors, model.text_mean, model.text_basis
    if vectors is None or mean is None or basis is None:
        raise UserError("add_items: the model has no item text; train with text_vectors")
    if model.encoder.table_text is None:
        raise UserError("add_items: the model has no text in its item table; train with text_in_table: true")
    return vectors, mean, basis


def read_new_items(model: SavedModel, path: Path) -> tuple[list[str], Tensor]:
    """The items of a text-vector file that a model lacks, with a text, and their raw vectors (n, T0).

    Raises:
        ValueError: the model takes no new items; the file is unusable, or was not made as the model's.
    """
    require_table_text(model)
    tokens, vectors, made_by = vector_file.read_text_vectors(path)
    vector_file.check_same_text_encoder(path, made_by, model.text_source)
    known = set(model.tokens)
    rows = {}
    for row, token in enumerate(tokens):
        if token not in known and vectors[row].any():
            rows[token] = row
    return list(rows), vectors[list(rows.values())]


@torch.no_grad()
def extend_catalogue(
    model: SavedModel, new: Sequence[str], vectors: Any, titles: Mapping[str, str]
) -> SavedModel:
    """The model with items that are unknown to training; the ids of all other items stay.

    Args:
        model: the model.
        new: tokens of the new items.
        vectors: (n, T0) tensor or array, their raw text vectors.
        titles: by token; titles of other items are ignored.

    Raises:
        ValueError: the model has no text in its item table, a token is already in the catalogue or a
            duplicate, or the vectors don't fit.
    """
    text, mean, basis = require_table_text(model)
    _check_new_items(model, new, titles)
    raw = torch.as_tensor(vectors).to(text)
    _check_new_vectors(new, raw, len(mean))
    state = model.encoder.state_dict()
    state["id_embedding.weight"] = F.pad(state["id_embedding.weight"], (0, 0, 0, len(new)))
    state["vectors"] = torch.cat([text, (raw - mean) @ basis])
    tokens = [*model.tokens, *new]
    neighbors = model.encoder.neighbors
    if neighbors is not None:
        longer = neighbors.with_more_items(state["vectors"])
        state |= {f"neighbors.{name}": value for name, value in longer.state_dict().items()}
    encoder = Encoder.from_state(model.encoder.settings, model.max_length, state).to(text.device)
    _check_finite_rows(new, encoder.item_table()[len(model.tokens) :])
    return build_saved_model(
        encoder,
        tokens,
        titles={**model.titles, **{token: titles[token] for token in new if token in titles}},
        counts=[*model.item_counts, *[0] * len(new)] if model.item_counts else [],
        config=model.config,
        text_mean=mean,
        text_basis=basis,
        text_source=model.text_source,
    )


def _check_new_items(model: SavedModel, new: Sequence[str], titles: Mapping[str, str]) -> None:
    known = set(model.ids)
    for token in new:
        if not isinstance(token, str):
            raise UserError(f"add_items: {token!r} is not a string")
        if token in known:
            raise UserError(f"add_items: {token!r} is already in the catalogue, or a duplicate")
        title = titles.get(token, "")
        if not isinstance(title, str):
            raise UserError(f"add_items: the title of {token!r} is {title!r}, not a string")
        known.add(token)


def _check_new_vectors(new: Sequence[str], raw: Tensor, width: int) -> None:
    if raw.shape != (len(new), width):
        raise UserError(
            f"add_items: vectors of shape {tuple(raw.shape)} for {len(new)} items; expected "
            f"({len(new)}, {width}), made as the run's text vectors"
        )
    is_usable = raw.isfinite().all(1) & raw.any(1)
    for token, usable in zip(new, is_usable.tolist(), strict=True):
        if not usable:
            raise UserError(f"add_items: {token!r} has no text vector: all zero, or not finite")


def _check_finite_rows(new: Sequence[str], rows: Tensor) -> None:
    for token, is_finite in zip(new, rows.isfinite().all(1).tolist(), strict=True):
        if not is_finite:
            raise UserError(
                f"add_items: the text vector of {token!r} is too large; scale it as the run's are"
            )


def _describe_version_mismatch(files: RunFolder) -> str:
    """The version that wrote the folder, if it is not this one, as the end of an error message."""
    try:
        writer = files.read_metrics()["versions"]["m2rec"]
    except (UserError, LookupError, TypeError):
        return ""
    return f"; m2rec {writer} made it, this is {__version__}" if writer != __version__ else ""
