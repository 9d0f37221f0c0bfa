"""New items that arrive by HTTP: their vectors, what made them, and those that were stored."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from m2rec.errors import UserError
from m2rec.serving import saved_model
from m2rec.serving.http.errors import RequestError
from m2rec.serving.http.schemas import NewItem
from m2rec.serving.http.store import StoredItem
from m2rec.serving.recommender import Recommender
from m2rec.text.language_model import TextEncoder
from m2rec.text.sentence_model import DTYPES, TextEncoderOptions
from m2rec.text.vector_file import LSA_NAME, check_same_text_encoder

logger = logging.getLogger(__name__)

MAX_ADDED = 10_000
"""Items that one server takes in altogether."""
_ENCODER_KEYS = ("model", "revision", "model_sha256", "pooling", "instruction")


class Abilities(NamedTuple):
    """What `POST /items` can take; each is empty, or why not."""

    no_vectors: str
    no_texts: str


def open_text_encoder(name: str, recommender: Recommender) -> TextEncoder:
    """The language model of a run, loaded, with the options that made the run's vectors.

    Args:
        name: on the hub, or a folder.
        recommender: the run.

    Raises:
        ValueError: the model can't be loaded, or is not the run's.
    """
    run = {key: str(value) for key, value in recommender.text_source.items()}
    _check_source(run)
    is_folder = Path(name).is_dir()
    max_tokens = run.get("asked_max_tokens", "")
    options = TextEncoderOptions(
        name,
        revision="" if is_folder else run.get("revision", ""),
        name=run["model"] if is_folder else "",
        pooling=run.get("asked_pooling", "auto"),
        instruction=run.get("instruction", ""),
        max_tokens=int(max_tokens) if max_tokens.isdecimal() else 0,
        dtype=run["dtype"] if run.get("dtype") in DTYPES else "auto",
    )
    encoder = TextEncoder(options)
    check_text_encoder(encoder, recommender)
    return encoder


def check_text_encoder(encoder: TextEncoder, recommender: Recommender) -> None:
    """Check that a language model made a run's text vectors.

    Raises:
        ValueError: it did not.
    """
    made_by = {**encoder.fingerprint_fields, **encoder.describe()}
    check_same_text_encoder(Path(encoder.options.encoder), made_by, recommender.text_source)


def _check_source(run: Mapping[str, str]) -> None:
    if not run.get("model"):
        raise UserError(
            "--text-encoder: the run does not say which model made its text vectors; leave it out"
        )
    if run["model"] == LSA_NAME:
        raise UserError(
            "--text-encoder: the run's text vectors are of lsa, which is fitted to its own texts; "
            "leave it out, or train with vectors of a language model"
        )


def describe_abilities(recommender: Recommender, encoder: TextEncoder | None) -> Abilities:
    """What new items a model takes."""
    try:
        saved_model.require_table_text(recommender.model)
    except UserError as error:
        reason = str(error).removeprefix("add_items: ")
        return Abilities(reason, reason)
    made_by = recommender.text_source.get("model")
    if made_by == LSA_NAME:
        return Abilities(
            "", "the text vectors are of lsa, which is fitted to its own texts; train with a language model"
        )
    if encoder is None:
        return Abilities(
            "", f"the server has no language model; start it with --text-encoder={made_by or 'MODEL'}"
        )
    return Abilities("", "")


def make_stored_items(
    new: Sequence[NewItem], recommender: Recommender, encoder: TextEncoder | None
) -> list[StoredItem]:
    """New items with their raw text vectors; those without a vector are encoded.

    Raises:
        ValueError: a text, and no encoder for it.
    """
    abilities = describe_abilities(recommender, encoder)
    if abilities.no_vectors:
        raise RequestError(409, f"items: {abilities.no_vectors}")
    texts = [item.text for item in new if item.text is not None]
    encoded = iter(())
    if texts:
        if abilities.no_texts or encoder is None:
            raise RequestError(409, f"text: {abilities.no_texts}; or send vectors")
        encoded = iter(encoder.encode(texts))
    made_by = describe_source(recommender.text_source)
    stored = []
    for item in new:
        vector = next(encoded) if item.vector is None else np.array(item.vector, dtype=np.float32)
        stored.append(StoredItem(item.item, item.title, vector, made_by))
    return stored


def add_items(recommender: Recommender, items: Sequence[StoredItem]) -> None:
    """Take the items into the catalogue, all or none.

    Raises:
        ValueError: see `Recommender.add_items`.
    """
    widths = sorted({len(item.vector) for item in items})
    if len(widths) > 1:
        raise UserError(f"vector: {widths[0]} and {widths[-1]} numbers; send vectors of one width")
    vectors = np.stack([item.vector for item in items])
    titles = {item.item: item.title for item in items if item.title}
    recommender.add_items([item.item for item in items], vectors, titles)


def add_stored_items(recommender: Recommender, items: Sequence[StoredItem]) -> int:
    """Take in the stored items that the model does not have and that fit it; returns how many.

    The log says how many don't fit; they stay in the store.
    """
    source = describe_source(recommender.text_source)
    missing = [item for item in items if item.item not in recommender.model.ids]
    fitting = [item for item in missing if item.made_by == source]
    try:
        if fitting:
            add_items(recommender, fitting)
    except UserError as error:
        logger.warning("%s stored items can't be added: %s", f"{len(fitting):,}", error)
        return 0
    if len(fitting) < len(missing):
        n_other = f"{len(missing) - len(fitting):,}"
        logger.warning("%s stored items left out: this run's text vectors are of another model", n_other)
    return len(fitting)


def describe_source(source: Mapping[str, Any]) -> str:
    """What decides which vectors can stand beside a run's, as JSON."""
    keys = ("fingerprint", "sha256") if source.get("model") == LSA_NAME else _ENCODER_KEYS
    return json.dumps({key: str(source[key]) for key in keys if source.get(key)}, sort_keys=True)
