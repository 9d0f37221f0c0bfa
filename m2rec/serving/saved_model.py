"""A trained model as a run folder holds it: read, written, and with more items.

The run folder alone is needed: no RecBole, no data set, and nothing in the folder is unpickled.

letter  meaning
V, D    items including padding, model width
T       width of the text vectors in the model
T0      width of the text vectors in their file
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from m2rec import __version__
from m2rec.errors import UserError, format_one_line
from m2rec.nn.encoder import Encoder
from m2rec.run_folder import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    COUNTS_FILE,
    HISTORY_FILE,
    ITEMS_FILE,
    METRICS_FILE,
    TEXT_FILE,
    TITLES_FILE,
    WEIGHTS_FILE,
    _parse_file,
    read_stored_titles,
)
from m2rec.settings import ModelSettings, RunSettings
from m2rec.storage import write_text
from m2rec.tensor_files import read_tensors, write_tensors

_ENCODER_PREFIX = "encoder."


@dataclass(frozen=True)
class SavedModel:
    """A trained network and what it knows of its items; never changed in place."""

    encoder: Encoder
    table: Tensor
    """(V, D), the item table."""
    tokens: tuple[str, ...]
    """Item tokens by internal id, that of padding first."""
    ids: Mapping[str, int]
    """Internal ids by item token, without padding's."""
    titles: Mapping[str, str]
    """By item token, of those that have one."""
    item_counts: tuple[int, ...]
    """How often training meets each item, by internal id; empty where that is unknown."""
    popularity_order: Tensor
    """Ids by how often training meets them, most often first; as many as `counts` without padding."""
    config: Mapping[str, Any]
    """The keys of the run."""
    max_length: int
    """Items of a history that training saw at most."""
    text_mean: Tensor | None
    """(T0,), taken from raw text vectors; None without text, as the next."""
    text_basis: Tensor | None
    """(T0, T), what they are multiplied with then."""
    text_source: Mapping[str, Any]
    """What made the run's text vectors."""

    @cached_property
    def inference_encoder(self) -> Encoder:
        """The network for use, with each item's text projected once; made when it is first asked for."""
        return self.encoder.make_inference_copy(self.table)

    @cached_property
    def n_layer_parameters(self) -> int:
        """Parameters of the layers, each of which meets each position of a history."""
        return sum(p.numel() for p in self.encoder.layers.parameters())

    @cached_property
    def fingerprint(self) -> bytes:
        """A hash of the layers' weights, which stay the same when items come in later."""
        digest, state = hashlib.sha256(), self.encoder.state_dict()
        for name in sorted(name for name in state if name.startswith(("layers.", "norm."))):
            digest.update(name.encode() + state[name].detach().cpu().contiguous().numpy().tobytes())
        return digest.digest()


def read_saved_model(folder: Path, device: torch.device) -> SavedModel:
    """The model of a run folder.

    Raises:
        ValueError: a file is missing, damaged, or of another model.
    """
    config = _parse_file(folder / CONFIG_FILE, yaml.safe_load, dict)
    tokens = _read_item_tokens(folder / ITEMS_FILE)
    weights, _ = read_tensors(folder / WEIGHTS_FILE, str(device))
    state = {k.removeprefix(_ENCODER_PREFIX): v for k, v in weights.items() if k.startswith(_ENCODER_PREFIX)}
    if "id_embedding.weight" not in state:
        raise UserError(f"{folder}: model: {config.get('model')!r} is not made of M2Rec's parts")
    settings = ModelSettings.read(config).model_copy(update={"scan_backend": "auto"})  # that of this machine
    length = RunSettings.read(config).MAX_ITEM_LIST_LENGTH
    encoder = Encoder(settings, len(tokens), length, state.get("vectors")).to(device)
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        said = format_one_line(error)
        raise UserError(
            f"{folder}: the weights don't fit config.yaml and items.json ({said})"
            f"{_describe_version_mismatch(folder)}"
        ) from None
    return build_saved_model(
        encoder,
        tokens,
        titles=read_stored_titles(folder),
        counts=_read_item_counts(folder / COUNTS_FILE, len(tokens)),
        config=config,
        text_mean=weights.get("text_mean"),
        text_basis=weights.get("text_basis"),
        text_source=_parse_file(path, json.loads, dict) if (path := folder / TEXT_FILE).exists() else {},
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
        max_length=RunSettings.read(config).MAX_ITEM_LIST_LENGTH,
        text_mean=text_mean,
        text_basis=text_basis,
        text_source=dict(text_source),
    )


def write_saved_model(trained: SavedModel, folder: Path) -> None:
    """Write what `read_saved_model` reads into a folder, which is made if need be.

    Raises:
        ValueError: it is the folder of a run, finished or not, which is of other weights.
    """
    if any((folder / name).exists() for name in (METRICS_FILE, CHECKPOINT_FILE, HISTORY_FILE)):
        raise UserError(f"save: {folder} is a run's own folder; give another")
    text = {"text_mean": trained.text_mean, "text_basis": trained.text_basis}
    state = {_ENCODER_PREFIX + name: value for name, value in trained.encoder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_FILE, state | {k: v for k, v in text.items() if v is not None})
    parts = {
        ITEMS_FILE: trained.tokens,
        TITLES_FILE: trained.titles,
        TEXT_FILE: trained.text_source,
        COUNTS_FILE: trained.item_counts,
    }
    for name, content in parts.items():
        write_text(folder / name, json.dumps(content, ensure_ascii=False) + "\n")
    write_text(folder / CONFIG_FILE, yaml.safe_dump(trained.config, sort_keys=False, allow_unicode=True))


def check_accepts_new_items(trained: SavedModel) -> None:
    """New items need text in the item table.

    Raises:
        ValueError: this run has none.
    """
    if trained.encoder.vectors is None or trained.text_mean is None or trained.text_basis is None:
        raise UserError("add_items: this run has no text; train with text_vectors")
    if trained.encoder.table_text is None:
        raise UserError("add_items: this run has no text in its item table; train with text_in_table: true")


@torch.no_grad()
def extend_catalogue(
    trained: SavedModel, new: Sequence[str], vectors: Any, titles: Mapping[str, str]
) -> SavedModel:
    """The model with items that training has never met; the ids of all others stay.

    Args:
        trained: the model.
        new: their tokens.
        vectors: (n, T0) tensor or array, their raw text vectors.
        titles: by token; those of other items are left out.

    Raises:
        ValueError: the model has no text in its item table, a token is there already or twice, or
            the vectors don't fit.
    """
    check_accepts_new_items(trained)
    old, mean, basis = trained.encoder.vectors, trained.text_mean, trained.text_basis
    assert old is not None and mean is not None and basis is not None
    _check_new_tokens(trained, new)
    named = {token: titles[token] for token in new if token in titles}
    for token, title in named.items():
        if not isinstance(title, str):
            raise UserError(f"add_items: the title of {token!r} is {title!r}, which is no text")
    raw = torch.as_tensor(vectors).to(old)
    if raw.shape != (len(new), len(mean)):
        raise UserError(
            f"add_items: vectors of shape {tuple(raw.shape)} for {len(new)} items; expected "
            f"({len(new)}, {len(mean)}), made as those of the run"
        )
    useless = ~(raw.isfinite().all(1) & raw.any(1))
    if useless.any():
        raise UserError(
            f"add_items: {new[int(useless.int().argmax())]!r} has no text vector: all zero, or not finite"
        )
    state = trained.encoder.state_dict()
    embedding = state["id_embedding.weight"]
    unknown = torch.zeros(len(new), embedding.shape[1]).to(embedding)
    state["id_embedding.weight"] = torch.cat([embedding, unknown])
    state["vectors"] = torch.cat([old, (raw - mean) @ basis])
    tokens = [*trained.tokens, *new]
    encoder = Encoder(trained.encoder.settings, len(tokens), trained.max_length, state["vectors"])
    encoder = encoder.to(old.device)
    encoder.load_state_dict(state)
    return build_saved_model(
        encoder,
        tokens,
        titles={**trained.titles, **named},
        counts=[*trained.item_counts, *[0] * len(new)] if trained.item_counts else [],
        config=trained.config,
        text_mean=mean,
        text_basis=basis,
        text_source=trained.text_source,
    )


def _check_new_tokens(trained: SavedModel, new: Sequence[str]) -> None:
    there = set(trained.ids)
    for token in new:
        if not isinstance(token, str) or token in there:
            why = "is there already" if isinstance(token, str) else "is no text"
            raise UserError(f"add_items: {token!r} {why}")
        there.add(token)


def _describe_version_mismatch(folder: Path) -> str:
    """What wrote the folder, if it was not this version, for an error to end with."""
    try:
        made_by = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))["versions"]["m2rec"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f"; m2rec {made_by} made it, this is {__version__}" if made_by != __version__ else ""


def _read_item_tokens(path: Path) -> list[str]:
    tokens = _parse_file(path, json.loads, list)
    own = tokens[1:]  # an item may be called as padding is
    if not own or not all(isinstance(token, str) for token in tokens) or len(set(own)) < len(own):
        raise UserError(f"{path} is no list of different texts")
    return tokens  # type: ignore[no-any-return]


def _read_item_counts(path: Path, n_items: int) -> list[int]:
    counts = _parse_file(path, json.loads, list) if path.exists() else []  # older runs have none
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or (counts and len(counts) != n_items):
        raise UserError(f"{path} is no list of {n_items} whole numbers from 0")
    return counts
