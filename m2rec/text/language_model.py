"""Texts -> vectors by sentence-transformers: sentence encoders, BERT and the like, T5, decoders.

`sentence_transformers` is imported when weights are read. Weights come from safetensors only, and no
code that comes with a model is run.

Letters: n texts, T the width of their vectors.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import torch
from tqdm import tqdm

from m2rec.errors import UserError
from m2rec.text.partial import PartialVectors

logger = logging.getLogger(__name__)

POOLINGS = ("auto", "mean", "cls", "last")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
DEFAULT_MAX_TOKENS = 256  # of a model that is no sentence encoder and so has no limit of its own
DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # a CPU is fastest while a batch stays in its caches
TOKENIZER_BATCH_SIZE = 1024  # texts tokenized in one call
# position tables of these start behind the padding's place
OFFSET_POSITION_MODELS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
HASH_SAMPLES, HASH_SAMPLE_BYTES = 64, 2**16  # how many pieces of a weight file are hashed, bytes of each


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


class TextEncoder:
    """A language model with everything that decides its vectors settled; `model` reads the weights.

    Attributes:
        decisive: what decides the vectors, by name, to compare with another time.

    Raises:
        ValueError: there is no such model, or an option can't be used.
    """

    def __init__(self, options: TextEncoderOptions) -> None:
        self.options = options
        if options.batch_tokens < 0:
            raise UserError(f"batch_tokens: {options.batch_tokens} is no limit; give a number from 1 on")
        self.device = _choose_device(options.device)
        self.batch_tokens = options.batch_tokens or DEFAULT_BATCH_TOKENS[self.device]
        self.dtype = _choose_dtype(options.dtype, self.device)
        self.is_folder = Path(options.encoder).is_dir()
        self.revision = options.revision if self.is_folder else self._resolve_commit()
        self.fingerprint_fields = {
            "encoder": "sentence-transformers",
            "model": options.name or options.encoder,
            "revision": self.revision,
            **(_hash_model_folder(Path(options.encoder)) if self.is_folder else {"model_sha256": ""}),
            "asked_pooling": options.pooling,
            "asked_max_tokens": str(options.max_tokens or "auto"),
            "instruction": options.instruction,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def describe(self) -> dict[str, str]:
        """What else is recorded: how the model made of `auto`, and the versions that made the vectors."""
        return {
            "pooling": _describe_pooling(self.model),
            "max_tokens": str(self.model.max_seq_length),
            **{name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
        }

    def encode(self, texts: Sequence[str], partial: PartialVectors | None = None) -> np.ndarray:
        """(n,) texts -> (n, T) vectors of unit length; zero where a text has no token.

        A vector does not depend on the other texts, but for rounding.

        Args:
            partial: where finished batches are kept, and those of an earlier run are taken from.

        Raises:
            ValueError: see `model`; the model gives no finite numbers.
        """
        vectors = np.zeros((len(texts), self.model.get_embedding_dimension()), dtype=np.float32)
        kept = partial.finished_batches if partial else []
        for rows, finished in kept:
            vectors[rows] = finished
        done = {int(row) for rows, _ in kept for row in rows}
        if done:
            logger.info("%s of %s texts are there from an earlier run", f"{len(done):,}", f"{len(texts):,}")
        lengths = self.count_tokens(texts)
        limit = self.model.max_seq_length
        if limit and (full := sum(length >= limit for length in lengths)):
            logger.info("%s texts reach %s tokens; what is longer is cut", f"{full:,}", limit)
        open_rows = [row for row, length in enumerate(lengths) if length and row not in done]
        batches = make_token_batches([lengths[row] for row in open_rows], self.batch_tokens)
        with tqdm(total=len(open_rows), desc="encoding", unit="text", disable=None) as bar:
            for places in batches:
                rows = np.array([open_rows[place] for place in places])
                vectors[rows] = self._encode_batch([texts[row] for row in rows])
                if partial:
                    partial.append(rows, vectors[rows])
                bar.update(len(rows))
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text behind the instruction, cut at the limit; 1 where a model has no tokens."""
        lengths: list[int] = []
        for start in range(0, len(texts), TOKENIZER_BATCH_SIZE):
            some = list(texts[start : start + TOKENIZER_BATCH_SIZE])
            mask = self.model.preprocess(some, prompt=self.prompt).get("attention_mask")
            lengths += [1] * len(some) if mask is None else mask.sum(1).long().tolist()
        return lengths

    def _encode_batch(self, texts: list[str]) -> np.ndarray:
        """B texts -> (B, T), float32."""
        try:
            found = self.model.encode(
                texts,
                prompt=self.prompt,
                batch_size=len(texts),
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_tokens: {self.batch_tokens} are too many for this GPU; "
                f"give scripts/embed_items.py half"
            ) from None
        if not torch.isfinite(found).all():
            raise UserError(
                f"dtype: {self.fingerprint_fields['model']} gives numbers that are not finite in "
                f"{self.fingerprint_fields['dtype']}; try float32"
            )
        return torch.nn.functional.normalize(found.float(), dim=1).cpu().numpy()

    @property
    def prompt(self) -> str:
        """What stands before each text: the instruction, else what the model puts there by itself."""
        found: str = self.options.instruction or self.model.prompts.get(self.model.default_prompt_name, "")
        return found

    @cached_property
    def model(self) -> Any:
        """The `SentenceTransformer`, with its weights, as the options want it.

        Raises:
            ValueError: it can't be loaded, or an option does not fit it.
        """
        name, options = self.options.encoder, self.options
        at = {"revision": self.revision or None, "local_files_only": self.is_folder}
        given = {**at, "trust_remote_code": False}
        weights = {"use_safetensors": True, "dtype": self.dtype}
        with self._wrap_load_errors(), _require_complete_safetensors():
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.util import is_sentence_transformer_model

            if is_sentence := is_sentence_transformer_model(name, **at):
                model = SentenceTransformer(name, device=self.device, model_kwargs=weights, **given)
            else:
                model = SentenceTransformer(
                    modules=_build_pooled_transformer(name, given, weights), device=self.device
                )
        if options.pooling != "auto":
            _set_pooling(model, options)
        if options.max_tokens or not is_sentence:
            _set_max_tokens(model, options)
        logger.info(
            "%s: pooling %s, at most %s tokens, %s on %s",
            self.fingerprint_fields["model"], _describe_pooling(model), model.max_seq_length,
            self.fingerprint_fields["dtype"], self.device,
        )  # fmt: skip
        return model

    def _resolve_commit(self) -> str:
        """The commit that the hub's name and revision stand for, from the cache where there is no network."""
        with self._wrap_load_errors():
            from huggingface_hub import resolve_revision

            found = resolve_revision(self.options.encoder, revision=self.options.revision or None)
            return str(found.resolved)

    @contextmanager
    def _wrap_load_errors(self) -> Iterator[None]:
        """Load without chatter; whatever goes wrong in a foreign model becomes one line."""
        if find_spec("sentence_transformers") is None:
            raise UserError(
                'text_encoder: needs sentence-transformers; pip install -e ".[text]", or give lsa'
            )
        from transformers import logging as chatter

        before = chatter.get_verbosity()
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        try:
            yield
        except Exception as error:  # a model's own code can raise anything
            at = f" at revision {self.options.revision!r}" if self.options.revision else ""
            raise UserError(
                f"text_encoder: can't load {self.options.encoder!r}{at}; give lsa, a name on the hub, or "
                f"a folder with config.json, the tokenizer's files and model.safetensors ({error})"
            ) from error
        finally:
            chatter.set_verbosity(before)
            chatter.enable_progress_bar()


def _build_pooled_transformer(name: str, given: dict[str, Any], weights: dict[str, Any]) -> list[Any]:
    """Modules of a model that is no sentence encoder: a decoder's last token counts, else the mean."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(
        name,
        model_kwargs={**given, **weights},
        processor_kwargs=dict(given),
        config_kwargs=dict(given),
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    tokenizer = transformer.tokenizer
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:  # decoders often have none
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    how = "lasttoken" if is_causal_lm(transformer.config) else "mean"
    return [transformer, Pooling(transformer.get_embedding_dimension(), how)]


def _set_pooling(model: Any, options: TextEncoderOptions) -> None:
    """Pool tokens as asked; what stands behind stays."""
    modules = [module for module in model if isinstance(getattr(module, "pooling_mode", None), str)]
    if len(modules) != 1:
        raise UserError(
            f"pooling: {options.pooling!r}, but {options.encoder!r} has layers that need its own; give auto"
        )
    modules[0].pooling_mode = {"last": "lasttoken"}.get(options.pooling, options.pooling)


def _set_max_tokens(model: Any, options: TextEncoderOptions) -> None:
    """Cut texts as asked, never at more than the model has positions for; else at 256 or its own limit."""
    if model.transformers_model is None:
        raise UserError(f"max_tokens: {options.encoder!r} has no limit on tokens; leave it out")
    most = getattr(model.config, "max_position_embeddings", None) or model.max_seq_length
    if model.config.model_type in OFFSET_POSITION_MODELS:
        most -= model.config.pad_token_id + 1
    asked = options.max_tokens or min(DEFAULT_MAX_TOKENS, most, model.max_seq_length)
    least = model.tokenizer.num_special_tokens_to_add() + 1
    if not least <= asked <= most:
        raise UserError(
            f"max_tokens: {asked} is not from {least} to {most}, which is what {options.encoder!r} takes"
        )
    model.max_seq_length = asked


def _describe_pooling(model: Any) -> str:
    """How tokens become a vector: `mean, unit length`, or `mean + max, Dense, unit length`, ..."""
    names = []
    for module in list(model)[1:]:
        modes = getattr(module, "pooling_mode", type(module).__name__)
        modes = [modes] if isinstance(modes, str) else modes
        names.append(" + ".join(mode.removesuffix("token") for mode in modes))
    return ", ".join([*(name for name in names if name != "Normalize"), "unit length"])


@contextmanager
def _require_complete_safetensors() -> Iterator[None]:
    """What sentence-transformers has no switch for: no pickle is read, and no weight is left to chance.

    Its Dense and other layers fall back to pytorch_model.bin, and a weight that a file lacks is drawn at
    random.
    """
    from transformers import PreTrainedModel

    load = PreTrainedModel.from_pretrained.__func__

    def load_whole(kind: Any, *args: Any, **others: Any) -> Any:
        model, report = load(kind, *args, output_loading_info=True, **others)
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise UserError(f"it has no weights for {missing[0]} and {len(missing) - 1} more")
        return model

    def refuse(file: object, *_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{file} can hold a pickle; weights are read from safetensors only")

    whole = patch.object(PreTrainedModel, "from_pretrained", classmethod(load_whole))
    with whole, patch.object(torch, "load", refuse):
        yield


def is_causal_lm(config: Any) -> bool:
    """Whether only the last token has seen the whole text: a model made for writing on, not for gaps."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return False
    writes = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills_gaps = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or (writes and not fills_gaps)


def make_token_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of texts, in batches of similar length with at most `most` tokens, padding included.

    The longest come first: what does not fit into memory fails at once. A text that is longer
    than `most` is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > most:
            batches.append([])
            longest = lengths[place]
        batches[-1].append(place)
    return batches


def _choose_device(asked: str) -> str:
    """cpu or cuda."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("device: cuda, but PyTorch finds no GPU here; give cpu")
    return ("cuda" if there else "cpu") if asked == "auto" else asked


def _choose_dtype(asked: str, device: str) -> torch.dtype:
    """bfloat16 by itself only on a GPU that has it: on a CPU it is seldom faster."""
    if asked == "auto":
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bfloat16" if native else "float32"
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def _hash_model_folder(folder: Path) -> dict[str, str]:
    """A hash of the model's files that are beside weights, and of what its other layers say of themselves."""
    beside = {path.parent for path in folder.rglob("*.safetensors")} | {folder}
    kinds = (".json", ".txt", ".model", ".safetensors")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in kinds]
    found = {"model_sha256": hashlib.sha256(), "layers_sha256": hashlib.sha256()}
    for path in files:
        digest = found["model_sha256" if path.parent in beside else "layers_sha256"]
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(_read_hash_samples(path))
    return {name: digest.hexdigest() for name, digest in found.items()}


def _read_hash_samples(path: Path) -> bytes:
    """A file's content; of large weights many pieces, from everywhere."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASH_SAMPLES * HASH_SAMPLE_BYTES or path.suffix != ".safetensors":
            return file.read()
        found = b""
        for place in np.linspace(0, size - HASH_SAMPLE_BYTES, HASH_SAMPLES, dtype=np.int64):
            file.seek(int(place))
            found += file.read(HASH_SAMPLE_BYTES)
        return found
