"""Which text-vector file a run reads, and making it from the item file where there is none."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path

import torch

from m2rec.compat import Config
from m2rec.data import shipped
from m2rec.errors import UserError
from m2rec.settings import get_model_settings
from m2rec.storage import lock_path
from m2rec.tensor_files import read_metadata
from m2rec.text import build, vector_file
from m2rec.text.item_text import read_item_texts
from m2rec.text.language_model import TextEncoder, TextEncoderOptions
from m2rec.text.lsa import LSA_NAME as LSA
from m2rec.text.lsa import LsaEncoder

logger = logging.getLogger(__name__)


def find_vector_file(config: Config) -> Path | None:
    """The text-vector file of a run, None if there is none.

    `auto` is NAME.text.safetensors beside the data, else the shipped one, if this is the data set it is of.

    Raises:
        ValueError: a file was named and does not exist, or the item file can't be read.
    """
    name, dataset = get_model_settings(config).text_vectors, config["dataset"]
    found = vector_file.resolve_vector_file(name, dataset, *get_dataset_folders(config))
    if found is None and name == "auto" and (own := shipped.find_shipped_vectors(dataset)) is not None:
        columns = shipped.InterColumns.from_config(config)
        return own if shipped.has_same_titles(dataset, _get_item_file(config), columns) else None
    return found


def get_dataset_folders(config: Config) -> tuple[Path, Path]:
    """Where the data is: as the user said, and where RecBole found it."""
    found = Path(config["data_path"])
    return Path(config.external_config_dict.get("data_path", found.parent)) / config["dataset"], found


def ensure_text_vectors(config: Config, tokens: Sequence[str]) -> None:
    """Make the text-vector file that `text_vectors: auto` looks for, as `text_encoder` says.

    Of several processes that need the same file the others wait for the first. What `text_encoder:
    auto` can't do is said in the log and leaves the run without text.

    Args:
        config: of a run of M2Rec.
        tokens: of the data set's items.

    Raises:
        ValueError: the encoder that was asked for, or the item file, can't be used, or the vectors that are
            there were made by another encoder.
        OSError: the file can't be written.
    """
    settings = get_model_settings(config)
    encoder, wanted = settings.text_encoder, settings.uses_text
    if not wanted or (encoder == "none" and settings.text_vectors == "auto"):
        return
    if (there := find_vector_file(config)) is not None:
        _check_encoder_name(there, encoder, config)
        _warn_if_texts_changed(there, config)
        return
    if settings.text_vectors == "auto" and shipped.find_shipped_vectors(config["dataset"]) is not None:
        items = _get_item_file(config)
        why = "has other items or titles" if items.is_file() else "is not there to compare titles with"
        logger.warning(
            "the text vectors that are shipped for %s are not taken: %s %s", config["dataset"], items, why
        )
    if encoder not in ("auto", "none"):
        _build_if_missing(config, encoder, tokens)
    elif _get_item_file(config).is_file():
        logger.info(
            "no text vectors yet: lsa makes them, from word counts; --text_encoder=MODEL, a model does"
        )
        try:
            _build_if_missing(config, LSA, tokens)
        except (ValueError, OSError) as error:
            logger.warning("text vectors can't be made: %s", error)


def _build_if_missing(config: Config, encoder: str, tokens: Sequence[str]) -> None:
    """Make the file, unless another process did so while this one waited."""
    folder, device = get_dataset_folders(config)[0], config["device"]
    folder.mkdir(parents=True, exist_ok=True)
    with lock_path(folder):
        if find_vector_file(config) is not None:
            return
        texts = read_item_texts(
            _get_item_file(config), config["ITEM_ID_FIELD"], None, separator=config["field_separator"]
        )
        output = folder / f"{config['dataset']}{vector_file.VECTOR_FILE_SUFFIX}"
        with (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
            _explain_option_error(encoder),
        ):
            made_by = (
                LsaEncoder()
                if encoder == LSA
                else TextEncoder(TextEncoderOptions(encoder, device=device.type))
            )
            build.build_text_vectors(output, texts, made_by, list(tokens))


@contextmanager
def _explain_option_error(encoder: str) -> Iterator[None]:
    """An option of the encoder that does not fit is the script's to set, not a key of a run."""
    try:
        yield
    except ValueError as error:
        option = str(error).partition(":")[0]
        if option in {field.name for field in fields(TextEncoderOptions)}:
            raise UserError(
                f"text_encoder: {encoder!r} can't be used as it is ({error}); make its vectors with "
                f"scripts/embed_items.py, which takes {option}"
            ) from error
        raise


def _get_item_file(config: Config) -> Path:
    return get_dataset_folders(config)[1] / f"{config['dataset']}.item"


def _check_encoder_name(file: Path, encoder: str, config: Config) -> None:
    """Vectors of one model must not stand for those of another.

    Raises:
        ValueError: the file names another encoder than the one asked for.
    """
    if encoder in ("auto", "none"):
        return
    model = read_metadata(file).get("model", "another source")
    if model != encoder:
        raise UserError(
            f"text_encoder: {encoder!r}, but {file} has vectors of {model}; run scripts/embed_items.py "
            f"--dataset={config['dataset']} --data-path={get_dataset_folders(config)[0].parent} "
            f"--text-encoder={encoder}, or leave text_encoder out"
        )


def _warn_if_texts_changed(file: Path, config: Config) -> None:
    """Vectors are only made again when that is asked for; but it is said when the texts have changed."""
    about, items = read_metadata(file), _get_item_file(config)
    if "texts_sha256" not in about or not items.is_file():
        return
    template = about.get("template", "")
    try:
        columns = None if template else shlex.split(about["columns"])
        id_column, separator = config["ITEM_ID_FIELD"], config["field_separator"]
        now = read_item_texts(items, id_column, columns, template, separator).sha256()
    except (ValueError, OSError, LookupError) as error:
        logger.warning("%s can't be compared with %s: %s", file, items, error)
        return
    if now != about["texts_sha256"]:
        logger.warning(
            "%s has changed since %s was made of it; scripts/embed_items.py makes it again", items, file
        )
