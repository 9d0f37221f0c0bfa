"""Find the text-vector file of a run, make it from the item file where there is none, and load it."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch

from m2rec.cli import name_command
from m2rec.compat import Config
from m2rec.data import inter_file, item_file, shipped
from m2rec.errors import UserError
from m2rec.settings import get_model_settings
from m2rec.storage import lock_path
from m2rec.tensor_files import read_metadata
from m2rec.text import build, vector_file
from m2rec.text.item_text import list_text_columns, read_item_texts
from m2rec.text.language_model import TextEncoder
from m2rec.text.lsa import LsaEncoder
from m2rec.text.sentence_model import TextEncoderOptions
from m2rec.text.vector_file import LSA_NAME, TextVectors

logger = logging.getLogger(__name__)

_SHOWN_DIGITS = 12  # of a fingerprint


def find_vector_file(config: Config) -> Path | None:
    """The text-vector file of a run, None if there is none or the model uses no text.

    `auto` is NAME.text.safetensors beside the data, else the shipped one, if this is the data set it is of.

    Raises:
        ValueError: a file was named and does not exist, or the item file can't be read.
    """
    settings, dataset = get_model_settings(config), config["dataset"]
    if not settings.uses_text:
        return None
    path = vector_file.resolve_vector_file(settings.text_vectors, dataset, *get_dataset_folders(config))
    if path is not None:
        return path
    shipped_file = shipped.find_shipped_vectors(dataset)
    if shipped_file is None:
        return None
    columns = shipped.InterColumns.from_config(config)
    return shipped_file if shipped.has_same_titles(dataset, _get_item_file(config), columns) else None


def get_dataset_folders(config: Config) -> tuple[Path, Path]:
    """The folder of the data as the user gave it, and as RecBole found it."""
    found = Path(config["data_path"])
    return Path(config.external_config_dict.get("data_path", found.parent)) / config["dataset"], found


def load_text_vectors(config: Config, path: Path | None, id_tokens: Sequence[str]) -> TextVectors | None:
    """Load the vectors of a data set's items; log their file and how many items it matches.

    Args:
        config: of a run of M2Rec.
        path: the text-vector file; None if there is none.
        id_tokens: item tokens by internal id; id 0 is padding.

    Raises:
        ValueError: see `load_item_vectors`.
    """
    settings = get_model_settings(config)
    if not settings.uses_text:
        return None
    if path is None:
        logger.warning(
            "no text vectors for %s (looked for %s%s in %s and among the shipped ones): "
            "the model runs without text",
            config["dataset"],
            config["dataset"],
            vector_file.VECTOR_FILE_SUFFIX,
            get_dataset_folders(config)[0],
        )
        return None
    text = vector_file.load_item_vectors(path, id_tokens, settings.text_whitening, settings.text_width)
    logger.info(
        "text for %s of %s items, %s, %s wide, mean cosine in the file %.2f%s",
        f"{text.provenance['matched']:,}",
        f"{text.provenance['items']:,}",
        path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path,
        text.vectors.shape[1],
        text.provenance["mean_cosine"],
        vector_file.format_missing_items(text.missing),
    )
    return text


def check_fingerprint(config: Config, text: TextVectors | None) -> str:
    """Log if the vectors are not those that `text_fingerprint` names; return the value that names them.

    Args:
        config: of a run with `uses_text`.
        text: what `load_text_vectors` has given.
    """
    expected = get_model_settings(config).text_fingerprint
    found, where = vector_file.NO_VECTORS, "there are no text vectors"
    if text is not None:
        found = vector_file.get_fingerprint(text.provenance)
        where = f"{text.provenance['file']} has {found[:_SHOWN_DIGITS]}"
    if expected not in (vector_file.ANY_VECTORS, found):
        cure = "set text_vectors: none"
        if expected != vector_file.NO_VECTORS:
            cure = f"make its vectors again with {name_command('embed')} and the options in its text.json"
        logger.warning(
            "text_fingerprint: %s, but %s: this run will differ from the one that the config is of; "
            "%s, or set text_fingerprint: any",
            expected[:_SHOWN_DIGITS],
            where,
            cure,
        )
    return found


def has_item_text(config: Config) -> bool:
    """Whether a run has text vectors, or a text to make them from.

    Raises:
        ValueError: a file was named and does not exist, or the item file can't be read.
    """
    settings = get_model_settings(config)
    if find_vector_file(config) is not None:
        return True
    return settings.uses_text and settings.text_encoder != "none" and _has_text_column(config)


def _has_text_column(config: Config) -> bool:
    """Whether the item file has a column of text; a file that can't be read has none."""
    id_column = config["ITEM_ID_FIELD"]
    try:
        header = inter_file.read_header(_get_item_file(config), config["field_separator"])
    except (ValueError, OSError):  # it is said where the text is read
        return False
    return id_column in header and bool(list_text_columns(header, id_column))


def ensure_text_vectors(config: Config, tokens: Sequence[str]) -> Path | None:
    """Find the text-vector file of a run; if `text_vectors: auto` finds none, make it with `text_encoder`.

    Of several processes that need the same file one makes it while the rest wait. If `text_encoder: auto`
    fails, the log says why, and the run has no text.

    Args:
        config: of a run of M2Rec.
        tokens: of the data set's items.

    Raises:
        ValueError: the given encoder, or the item file, can't be used, or another encoder made the
            vectors.
        OSError: the file can't be written.
    """
    settings = get_model_settings(config)
    encoder = settings.text_encoder
    path = find_vector_file(config)
    if path is not None:
        _check_encoder_name(path, encoder, config)
        _warn_if_texts_changed(path, config)
        return path
    if encoder == "none" or not settings.uses_text:
        return None
    _warn_if_shipped_unused(config)
    if encoder != "auto":
        return _build_if_missing(config, encoder, tokens)
    if not _get_item_file(config).is_file():
        return None
    logger.info("no text vectors yet: lsa makes them, from word counts; --text_encoder=MODEL, a model does")
    try:
        return _build_if_missing(config, LSA_NAME, tokens)
    except (ValueError, OSError) as error:
        logger.warning("text vectors can't be made: %s", error)
        return None


def _build_if_missing(config: Config, encoder: str, tokens: Sequence[str]) -> Path:
    """Make the file, unless another process made it while this one waited."""
    folder, device = get_dataset_folders(config)[0], config["device"]
    folder.mkdir(parents=True, exist_ok=True)
    with lock_path(folder):
        path = find_vector_file(config)
        if path is not None:
            return path
        items = read_item_texts(
            _get_item_file(config), config["ITEM_ID_FIELD"], None, separator=config["field_separator"]
        )
        path = folder / f"{config['dataset']}{vector_file.VECTOR_FILE_SUFFIX}"
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, _explain_option_error(encoder):
            build.build_text_vectors(path, items, _create_encoder(encoder, device.type), list(tokens))
    return path


def _create_encoder(encoder: str, device: str) -> TextEncoder | LsaEncoder:
    """The encoder of this name, with automatic options."""
    if encoder == LSA_NAME:
        return LsaEncoder()
    return TextEncoder(TextEncoderOptions(encoder, device=device))


@contextmanager
def _explain_option_error(encoder: str) -> Iterator[None]:
    """Name the script that takes an encoder's options, which a run has no keys for."""
    try:
        yield
    except ValueError as error:
        option = str(error).partition(":")[0]
        if option in {field.name for field in fields(TextEncoderOptions)}:
            raise UserError(
                f"text_encoder: {encoder!r} can't be used with automatic options ({error}); make its vectors "
                f"with {name_command('embed')}, which takes {option}"
            ) from error
        raise


def _get_item_file(config: Config) -> Path:
    return get_dataset_folders(config)[1] / f"{config['dataset']}.item"


def _check_encoder_name(file: Path, encoder: str, config: Config) -> None:
    """Check that the encoder that the user named made the file.

    Raises:
        ValueError: the file names another encoder.
    """
    if encoder in ("auto", "none"):
        return
    model = read_metadata(file).get("model", "another source")
    if model != encoder:
        raise UserError(
            f"text_encoder: {encoder!r}, but {file} has vectors of {model}; run {name_command('embed')} "
            f"--dataset={config['dataset']} --data-path={get_dataset_folders(config)[0].parent} "
            f"--text-encoder={encoder}, or leave text_encoder out"
        )


def _warn_if_shipped_unused(config: Config) -> None:
    """Log why the vectors that are shipped for a data set of this name are not used."""
    dataset, items = config["dataset"], _get_item_file(config)
    if shipped.find_shipped_vectors(dataset) is None:
        return
    reason = "has different items or titles" if items.is_file() else "does not exist, to compare titles with"
    logger.warning("shipped text vectors for %s not used: %s %s", dataset, items, reason)


def _warn_if_texts_changed(file: Path, config: Config) -> None:
    """Log if the texts have changed since the vectors were made; they are rebuilt on request only."""
    metadata, items = read_metadata(file), _get_item_file(config)
    if "texts_sha256" not in metadata or not items.is_file():
        return
    if metadata.get(vector_file.ITEM_FILE_KEY) == item_file.format_file_stamp(items):
        return
    template = metadata.get("template", "")
    try:
        columns = None if template else shlex.split(metadata["columns"])
        texts = read_item_texts(items, config["ITEM_ID_FIELD"], columns, template, config["field_separator"])
    except (ValueError, OSError, LookupError) as error:
        logger.warning("%s can't be compared with %s: %s", file, items, error)
        return
    if texts.sha256() != metadata["texts_sha256"]:
        logger.warning(
            "%s has changed since %s was made of it; %s makes it again",
            items,
            file,
            name_command("embed"),
        )
