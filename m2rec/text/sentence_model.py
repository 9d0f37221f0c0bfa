"""Load a language model with sentence-transformers, from safetensors only and without code of the model.

`torch` and `sentence_transformers` are imported when a model is loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from unittest.mock import patch

from m2rec.errors import UserError

if TYPE_CHECKING:
    import torch

POOLINGS = ("auto", "mean", "cls", "last")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
DEFAULT_MAX_TOKENS = 256  # of a model that is not a sentence encoder
# their position tables begin with rows up to the padding's
OFFSET_POSITION_MODELS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")


@dataclass(frozen=True)
class TextEncoderOptions:
    """What a user can choose; see `scripts/embed_items.py --help`.

    Attributes:
        encoder: a folder, or a name on the hub.
        name: recorded instead of `encoder`, empty for `encoder` itself.
        max_tokens: of a text with its instruction; 0 for a sentence encoder's own limit, else at most 256.
        batch_tokens: of a batch, padding included; 0 for what suits the device.
    """

    encoder: str
    revision: str = ""
    name: str = ""
    pooling: str = "auto"
    instruction: str = ""
    max_tokens: int = 0
    batch_tokens: int = 0
    device: str = "auto"
    dtype: str = "auto"

    @property
    def is_folder(self) -> bool:
        """Whether the encoder is on this machine, not on the hub."""
        return Path(self.encoder).is_dir()


def resolve_commit(options: TextEncoderOptions) -> str:
    """The commit of a name and revision on the hub, from the cache where there is no network."""
    with _explain_load_errors(options):
        from huggingface_hub import resolve_revision

        return str(resolve_revision(options.encoder, revision=options.revision or None).resolved)


def load_sentence_model(options: TextEncoderOptions, revision: str, device: str, dtype: "torch.dtype") -> Any:
    """Load the `SentenceTransformer` with the pooling and token limit of the options.

    Raises:
        ValueError: it can't be loaded, or an option does not fit it.
    """
    name = options.encoder
    source = {"revision": revision or None, "local_files_only": options.is_folder}
    with _explain_load_errors(options), _require_complete_safetensors():
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.util import is_sentence_transformer_model

        is_sentence_encoder = is_sentence_transformer_model(name, **source)
        model = SentenceTransformer(
            name,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True, "dtype": dtype},
            **source,
        )
        if not is_sentence_encoder:
            _set_text_defaults(model)
    if options.pooling != "auto":
        _set_pooling(model, options)
    if options.max_tokens or not is_sentence_encoder:
        _set_max_tokens(model, options)
    return model


def _set_text_defaults(model: Any) -> None:
    """Pad and cut on the right; pool a decoder's last token also if it was saved without its head."""
    tokenizer = model.tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:  # decoders often have none
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model[1].pooling_mode = "lasttoken" if is_causal_lm(model.config) else "mean"


def is_causal_lm(config: Any) -> bool:
    """Whether only the last token depends on the whole text: a causal rather than a masked language model."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return False
    if getattr(config, "is_decoder", False):
        return True
    is_masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_masked


def _set_pooling(model: Any, options: TextEncoderOptions) -> None:
    """Pool tokens as requested; the layers behind the pooling stay."""
    modules = [module for module in model if isinstance(getattr(module, "pooling_mode", None), str)]
    if len(modules) != 1:
        raise UserError(
            f"pooling: {options.pooling!r} can't be set for {options.encoder!r}; leave it at auto"
        )
    modules[0].pooling_mode = "lasttoken" if options.pooling == "last" else options.pooling


def _set_max_tokens(model: Any, options: TextEncoderOptions) -> None:
    """Cut texts as requested, by default at 256 tokens or at the model's own limit."""
    if model.transformers_model is None:
        raise UserError(f"max_tokens: {options.encoder!r} has no limit on tokens; leave it out")
    config, own_limit = model.config, model.max_seq_length
    maximum = getattr(config, "max_position_embeddings", None) or own_limit
    if config.model_type in OFFSET_POSITION_MODELS:
        maximum -= config.pad_token_id + 1
    minimum = model.tokenizer.num_special_tokens_to_add() + 1
    requested = options.max_tokens or min(DEFAULT_MAX_TOKENS, maximum, own_limit)
    if not minimum <= requested <= maximum:
        raise UserError(
            f"max_tokens: expected a number from {minimum} to {maximum} for {options.encoder!r}, "
            f"got {requested}"
        )
    model.max_seq_length = requested


def describe_pooling(model: Any) -> str:
    """How tokens become a vector: `mean, unit length`, or `mean + max, Dense, unit length`, ..."""
    names = []
    for module in list(model)[1:]:
        modes = getattr(module, "pooling_mode", type(module).__name__)
        if isinstance(modes, str):
            modes = [modes]
        name = " + ".join(mode.removesuffix("token") for mode in modes)
        if name != "Normalize":
            names.append(name)
    return ", ".join([*names, "unit length"])


@contextmanager
def _explain_load_errors(options: TextEncoderOptions) -> Iterator[None]:
    """Silence transformers while a model is loaded, and turn any error into one line."""
    if find_spec("sentence_transformers") is None:
        raise UserError('text_encoder: needs sentence-transformers; pip install -e ".[text]", or give lsa')
    from transformers import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # a model can fail in any way
        revision = f" at revision {options.revision!r}" if options.revision else ""
        raise UserError(
            f"text_encoder: can't load {options.encoder!r}{revision}; give lsa, a name on the hub, or "
            f"a folder with config.json, the tokenizer's files and model.safetensors ({error})"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


@contextmanager
def _require_complete_safetensors() -> Iterator[None]:
    """Load safetensors only, and fail if a weight is missing.

    sentence-transformers has no switch for it: its Dense and other layers fall back to
    pytorch_model.bin, and missing weights are drawn at random.
    """
    import torch
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    def load_complete(kind: Any, *args: Any, **options: Any) -> Any:
        model, report = load(kind, *args, output_loading_info=True, **options)
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise UserError(f"it has no weights for {missing[0]} and {len(missing) - 1} more")
        return model

    def refuse_pickle(file: object, *_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{file} can hold a pickle; weights are read from safetensors only")

    with (
        patch.object(PreTrainedModel, "from_pretrained", classmethod(load_complete)),
        patch.object(torch, "load", refuse_pickle),
    ):
        yield
