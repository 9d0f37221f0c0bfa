"""Texts -> vectors by any language model that `transformers` loads: encoders, T5, decoders.

Plain PyTorch; `transformers` is imported when an encoder is made. Weights are read from safetensors
only, and no code that comes with a model is run.

Letters: n texts, B of them in a batch, L tokens, T the width of the model.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from m2rec.partial import Partial

logger = logging.getLogger(__name__)

POOLINGS = ("auto", "mean", "cls", "last")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
MAX_TOKENS = 256
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # a CPU is fastest while a batch stays in its caches
AT_ONCE = 1024  # texts tokenized in one call

# position tables of these start behind the padding's place
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer")
# names in a sentence encoder's 1_Pooling/config.json, as switches or behind `pooling_mode`
SENTENCE_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}
SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")
PIECES, PIECE = 64, 2**16  # how many pieces of a weight file are hashed, bytes of each


@dataclass(frozen=True)
class EncoderOptions:
    """What a user can choose; see `scripts/embed_items.py --help`.

    Attributes:
        encoder: a folder, or a name on the hub.
        name: recorded instead of `encoder`, empty for `encoder` itself.
        max_tokens: of a text with its instruction, 0 for at most 256.
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
    """A language model with everything that decides its vectors settled; weights are read by `encode`.

    Attributes:
        decisive: what decides the vectors, by name, to compare with another time.

    Raises:
        ValueError: the model can't be loaded, or an option does not fit it.
    """

    def __init__(self, options: EncoderOptions) -> None:
        self.options = options
        if options.batch_tokens < 0:
            raise ValueError(f"batch_tokens: {options.batch_tokens} is no limit; give a number from 1 on")
        self.device = _device(options.device)
        self.batch_tokens = options.batch_tokens or BATCH_TOKENS[self.device]
        self.dtype = _dtype(options.dtype, self.device)
        self.config, self.tokenizer = self._load_config()
        self.pooling, why = self._pooling()
        self.max_tokens = self._max_tokens()
        self.decisive = {
            "model": options.name or options.encoder,
            "revision": self._commit() or options.revision,
            "model_sha256": self._fingerprint(),
            "pooling": f"{self.pooling}, unit length",
            "instruction": options.instruction,
            "max_tokens": str(self.max_tokens),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        logger.info(
            "%s: %s, pooling %s (%s), at most %s tokens, %s on %s",
            self.decisive["model"], self.config.model_type, self.pooling, why, self.max_tokens,
            self.decisive["dtype"], self.device,
        )  # fmt: skip

    def versions(self) -> dict[str, str]:
        """What makes the vectors."""
        import transformers

        return {"torch": torch.__version__, "transformers": transformers.__version__}

    def encode(self, texts: Sequence[str], partial: Partial | None = None) -> np.ndarray:
        """(n,) texts -> (n, T) vectors of unit length; zero where a text has no token.

        A vector does not depend on the other texts, but for rounding.

        Args:
            partial: where finished batches are kept, and those of an earlier run are taken from.

        Raises:
            ValueError: the weights can't be loaded, or the model gives no finite numbers.
        """
        vectors = np.zeros((len(texts), self.config.hidden_size), dtype=np.float32)
        kept = partial.kept if partial else []
        for rows, finished in kept:
            vectors[rows] = finished
        done = {int(row) for rows, _ in kept for row in rows}
        if done:
            logger.info("%s of %s texts are there from an earlier run", f"{len(done):,}", f"{len(texts):,}")
        ids = self.tokenize(texts)
        full = sum(len(tokens) >= self.max_tokens for tokens in ids)
        if full:
            logger.info("%s texts reach %s tokens; what is longer is cut", f"{full:,}", self.max_tokens)
        open_rows = [row for row, tokens in enumerate(ids) if tokens and row not in done]
        batches = batches_by_tokens([len(ids[row]) for row in open_rows], self.batch_tokens)
        with tqdm(total=len(open_rows), desc="encoding", unit="text", disable=None) as bar:
            for places in batches:
                rows = np.array([open_rows[place] for place in places])
                vectors[rows] = self._encode_batch([ids[row] for row in rows])
                if partial:
                    partial.append(rows, vectors[rows])
                bar.update(len(rows))
        return vectors

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text behind the instruction, cut at the limit, without padding."""
        prefixed = [self.options.instruction + text for text in texts]
        ids: list[list[int]] = []
        for start in range(0, len(prefixed), AT_ONCE):
            ids += self.tokenizer(
                prefixed[start : start + AT_ONCE],
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        return ids

    @torch.no_grad()
    def _encode_batch(self, ids: list[list[int]]) -> np.ndarray:
        """Token ids of B texts -> (B, T), float32."""
        batch, mask = (part.to(self.device) for part in pad_right(ids, self._padding))
        try:
            hidden = self.model(input_ids=batch, attention_mask=mask).last_hidden_state
            vectors = pool(hidden, mask, self.pooling)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"batch_tokens: {self.batch_tokens} are too many for this GPU; give half"
            ) from None
        if not torch.isfinite(vectors).all():
            raise ValueError(
                f"dtype: {self.decisive['model']} gives numbers that are not finite in "
                f"{self.decisive['dtype']}; try float32"
            )
        return vectors.cpu().numpy()

    @property
    def _padding(self) -> int:
        """The id that fills a row up; decoders often have none, and then use the end of a text."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in found if token is not None))

    @cached_property
    def model(self) -> Any:
        """The network, in evaluation mode; of T5 and the like the encoder alone."""
        from transformers import AutoModel, AutoModelForTextEncoding

        kind = AutoModelForTextEncoding if self.config.is_encoder_decoder else AutoModel
        with self._loading():
            model, report = kind.from_pretrained(
                self.options.encoder,
                revision=self.options.revision or None,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=self.dtype,
                output_loading_info=True,
            )
            model.config.use_cache = False
            model.eval().to(self.device)
        missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
        if missing:
            raise ValueError(
                f"text_encoder: {self.options.encoder!r} has no weights for {missing[0]} and "
                f"{len(missing) - 1} more; give a model whose weights fit its config.json"
            )
        return model

    def _load_config(self) -> tuple[Any, Any]:
        """The model's configuration and tokenizer."""
        try:
            from transformers import AutoConfig, AutoTokenizer
        except ImportError as error:
            raise ValueError(
                f'text_encoder: needs transformers ({error}); pip install -e ".[text]", or give lsa'
            ) from None
        given = {"revision": self.options.revision or None, "trust_remote_code": False}
        with self._loading():
            config = AutoConfig.from_pretrained(self.options.encoder, **given)
            tokenizer = AutoTokenizer.from_pretrained(self.options.encoder, **given)
        tokenizer.truncation_side = "right"
        return config, tokenizer

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Load without chatter; whatever goes wrong in a foreign model becomes one line."""
        from transformers import logging as chatter

        before = chatter.get_verbosity()
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
        try:
            yield
        except Exception as error:  # a model's own code can raise anything
            at = f" at revision {self.options.revision!r}" if self.options.revision else ""
            raise ValueError(
                f"text_encoder: can't load {self.options.encoder!r}{at}; give lsa, a name on the hub, or "
                f"a folder with config.json, the tokenizer's files and model.safetensors ({error})"
            ) from error
        finally:
            chatter.set_verbosity(before)
            chatter.enable_progress_bar()

    def _pooling(self) -> tuple[str, str]:
        """How tokens become one vector, and why."""
        if self.options.pooling != "auto":
            return self.options.pooling, "as asked for"
        said = self._json_beside("1_Pooling/config.json")
        if said is not None:
            self._warn_of_modules()
            on = [key for key, value in said.items() if key.startswith("pooling_mode") and value is True]
            if isinstance(said.get("pooling_mode"), str):
                on = [said["pooling_mode"]]
            if len(on) != 1 or on[0] not in SENTENCE_POOLINGS:
                raise ValueError(
                    f"pooling: auto can't follow 1_Pooling/config.json of {self.options.encoder!r}, which "
                    f"has {' + '.join(on) or 'none'}; choose mean, cls or last"
                )
            return SENTENCE_POOLINGS[on[0]], "1_Pooling/config.json"
        return ("last", "a decoder") if is_decoder(self.config) else ("mean", "an encoder")

    def _warn_of_modules(self) -> None:
        """A sentence encoder can have layers behind the pooling, which are not applied here."""
        modules = self._json_beside("modules.json") or []
        others = [m["type"].rsplit(".", 1)[-1] for m in modules]
        others = [name for name in others if name not in SENTENCE_MODULES]
        if others:
            logger.warning("%s: its %s is not applied", self.options.encoder, " and ".join(others))

    def _max_tokens(self) -> int:
        """The limit on a text's tokens; never more than the model has positions for."""
        most = int(min(self.tokenizer.model_max_length, 10**9))
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions:
            offset = self.config.model_type in OFFSET_POSITIONS
            most = min(most, positions - (self.config.pad_token_id + 1 if offset else 0))
        asked = self.options.max_tokens or min(MAX_TOKENS, most)
        least = self.tokenizer.num_special_tokens_to_add() + 1
        if not least <= asked <= most:
            raise ValueError(
                f"max_tokens: {asked} is not from {least} to {most}, which is what "
                f"{self.options.encoder!r} takes"
            )
        return asked

    def _fingerprint(self) -> str:
        """A hash of the model: of a folder its files, large ones by samples; of a hub name its configuration.

        Of that the commit, in `revision`, decides the weights.
        """
        digest, folder = hashlib.sha256(), Path(self.options.encoder)
        if not folder.is_dir():
            config = {k: v for k, v in self.config.to_dict().items() if k != "transformers_version"}
            return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".safetensors"):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                digest.update(_samples(path))
        return digest.hexdigest()

    def _commit(self) -> str:
        """The commit of a name on the hub, which its place in the cache tells; empty for a folder."""
        from transformers.utils import cached_file

        if Path(self.options.encoder).is_dir():
            return ""
        path = cached_file(self.options.encoder, "config.json", revision=self.options.revision or None)
        parts = Path(str(path)).parts
        return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""

    def _json_beside(self, name: str) -> Any:
        """A JSON file that comes with the model, None without one."""
        from transformers.utils import cached_file

        try:
            path = cached_file(self.options.encoder, name, revision=self.options.revision or None)
            return json.loads(Path(str(path)).read_text(encoding="utf-8"))
        except OSError:
            return None
        except ValueError as error:
            raise ValueError(f"{self.options.encoder}/{name}: is no JSON ({error}); repair it") from None


def is_decoder(config: Any) -> bool:
    """Whether only the last token has seen the whole text: a model made for writing on, not for gaps."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return False
    writes = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fills_gaps = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or (writes and not fills_gaps)


def batches_by_tokens(lengths: Sequence[int], most: int) -> list[list[int]]:
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


def pad_right(ids: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> ids (B, L) and mask (B, L), 0 at padding."""
    longest = max(map(len, ids))
    batch = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    return batch, (torch.arange(longest) < lengths[:, None]).long()


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """hidden: (B, L, T), mask: (B, L), 0 at the padding on the right -> (B, T), float32, unit length."""
    hidden = hidden.float()
    if how == "cls":
        vectors = hidden[:, 0]
    elif how == "last":
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    else:
        weights = mask[..., None].to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(vectors, dim=1)


def _device(asked: str) -> str:
    """cpu or cuda."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise ValueError("device: cuda, but PyTorch finds no GPU here; give cpu")
    return ("cuda" if there else "cpu") if asked == "auto" else asked


def _dtype(asked: str, device: str) -> torch.dtype:
    """bfloat16 by itself only on a GPU that has it: on a CPU it is seldom faster."""
    if asked == "auto":
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        asked = "bfloat16" if native else "float32"
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def _samples(path: Path) -> bytes:
    """A file's content; of large weights many pieces, from everywhere."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= PIECES * PIECE or path.suffix != ".safetensors":
            return file.read()
        found = b""
        for place in np.linspace(0, size - PIECE, PIECES, dtype=np.int64):
            file.seek(int(place))
            found += file.read(PIECE)
        return found
