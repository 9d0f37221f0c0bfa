"""Texts -> vectors by sentence-transformers: sentence encoders, BERT and similar models, T5, decoders.

Letters: n texts, T the width of their vectors.
"""

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from m2rec.errors import UserError
from m2rec.text.partial import PartialVectors
from m2rec.text.sentence_model import (
    TextEncoderOptions,
    describe_pooling,
    load_sentence_model,
    resolve_commit,
)

logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # a CPU is fastest while a batch stays in its caches
TOKENIZER_BATCH_SIZE = 1024  # texts tokenized in one call
BATCHES_PER_FILE = 8  # of encoded batches that are kept for a run that resumes
HASH_SAMPLES, HASH_SAMPLE_BYTES = 64, 2**16  # how many pieces of a weight file are hashed, bytes of each


class TextEncoder:
    """A sentence encoder with all options resolved; `model` loads the weights on first use.

    Attributes:
        fingerprint_fields: what decides the vectors; equal fields mean equal vectors.

    Raises:
        ValueError: there is no such model, or an option can't be used.
    """

    def __init__(self, options: TextEncoderOptions) -> None:
        self.options = options
        if options.batch_tokens < 0:
            raise UserError(
                f"batch_tokens: expected a positive integer (0 = automatic), got {options.batch_tokens}"
            )
        self.device = _choose_device(options.device)
        self.batch_tokens = options.batch_tokens or DEFAULT_BATCH_TOKENS[self.device]
        self.dtype = _choose_dtype(options.dtype, self.device)
        if options.is_folder:
            self.revision, hashes = options.revision, _hash_model_folder(Path(options.encoder))
        else:
            self.revision, hashes = resolve_commit(options), {"model_sha256": ""}
        self.fingerprint_fields = {
            "encoder": "sentence-transformers",
            "model": options.name or options.encoder,
            "revision": self.revision,
            **hashes,
            "asked_pooling": options.pooling,
            "asked_max_tokens": str(options.max_tokens or "auto"),
            "instruction": options.instruction,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def describe(self) -> dict[str, str]:
        """What `auto` became, and the versions that made the vectors."""
        description = {"pooling": describe_pooling(self.model), "max_tokens": str(self.model.max_seq_length)}
        for package in ("torch", "transformers", "sentence-transformers"):
            description[package] = version(package)
        return description

    def encode(self, texts: Sequence[str], partial: PartialVectors | None = None) -> np.ndarray:
        """(n,) texts -> (n, T) vectors of unit length; zero where a text has no token.

        A vector does not depend on the other texts, but for rounding.

        Args:
            partial: where finished batches are kept, and those of an earlier run are taken from.

        Raises:
            ValueError: see `model`; the model gives no finite numbers.
        """
        vectors = np.zeros((len(texts), self.model.get_embedding_dimension()), dtype=np.float32)
        lengths = np.array(self.count_tokens(texts), dtype=np.int64)
        is_open = lengths > 0
        if partial:
            finished = partial.restore(vectors)
            is_open[finished] = False
            if finished:
                n_finished, n_texts = f"{len(finished):,}", f"{len(texts):,}"
                logger.info("resumed: %s of %s texts already encoded", n_finished, n_texts)
        open_rows = np.flatnonzero(is_open)
        batches = make_token_batches(lengths[open_rows].tolist(), self.batch_tokens)
        with tqdm(total=len(open_rows), desc="encoding", unit="text", disable=None) as bar:
            for start in range(0, len(batches), BATCHES_PER_FILE):
                rows: list[int] = []
                for batch in batches[start : start + BATCHES_PER_FILE]:
                    batch_rows = open_rows[batch].tolist()
                    vectors[batch_rows] = self._encode_batch([texts[row] for row in batch_rows])
                    rows += batch_rows
                    bar.update(len(batch_rows))
                if partial:
                    partial.append(rows, vectors[rows])
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with its prompt, cut at the limit, and log how many texts reach it.

        A text counts as one token where a model has no tokens.
        """
        lengths: list[int] = []
        for start in range(0, len(texts), TOKENIZER_BATCH_SIZE):
            batch = list(texts[start : start + TOKENIZER_BATCH_SIZE])
            mask = self.model.preprocess(batch, prompt=self.prompt).get("attention_mask")
            if mask is None:
                lengths += [1] * len(batch)
            else:
                lengths += mask.sum(1).long().tolist()
        limit = self.model.max_seq_length
        n_cut = sum(length >= limit for length in lengths) if limit else 0
        if n_cut:
            logger.info("%s texts reach max_tokens=%s; longer ones are truncated", f"{n_cut:,}", limit)
        return lengths

    def _encode_batch(self, texts: list[str]) -> np.ndarray:
        """B texts -> (B, T), float32."""
        try:
            vectors = self.model.encode(
                texts,
                prompt=self.prompt,
                batch_size=len(texts),
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"batch_tokens: {self.batch_tokens} do not fit into this GPU's memory; give half"
            ) from None
        if not torch.isfinite(vectors).all():
            raise UserError(
                f"dtype: {self.fingerprint_fields['model']} gives NaN or infinite values in "
                f"{self.fingerprint_fields['dtype']}; give float32"
            )
        return torch.nn.functional.normalize(vectors.float(), dim=1).cpu().numpy()

    @property
    def prompt(self) -> str:
        """The text before each text: the instruction, else the model's default prompt."""
        return self.options.instruction or str(self.model.prompts.get(self.model.default_prompt_name, ""))

    @cached_property
    def model(self) -> Any:
        """The `SentenceTransformer` with its weights.

        Raises:
            ValueError: it can't be loaded, or an option does not fit it.
        """
        model = load_sentence_model(self.options, self.revision, self.device, self.dtype)
        logger.info(
            "%s: pooling %s, at most %s tokens, %s on %s",
            self.fingerprint_fields["model"],
            describe_pooling(model),
            model.max_seq_length,
            self.fingerprint_fields["dtype"],
            self.device,
        )
        return model


def make_token_batches(lengths: Sequence[int], maximum: int) -> list[list[int]]:
    """Indexes of texts, in batches of similar length with at most `maximum` tokens, padding included.

    The longest come first: what does not fit into memory fails at once. A text that is longer
    than `maximum` is alone in its batch.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * longest > maximum:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def _choose_device(device: str) -> str:
    """cpu or cuda."""
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("device: cuda, but PyTorch finds no GPU here; give cpu")
    if device == "auto":
        return "cuda" if has_gpu else "cpu"
    return device


def _choose_dtype(dtype: str, device: str) -> torch.dtype:
    """Choose bfloat16 for `auto` only on a GPU that has it: on a CPU it is seldom faster."""
    if dtype == "auto":
        is_native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_native else torch.float32
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def _hash_model_folder(folder: Path) -> dict[str, str]:
    """Hash the files beside the weights, and apart from them those that configure the other layers."""
    weight_folders = {path.parent for path in folder.rglob("*.safetensors")} | {folder}
    digests = {"model_sha256": hashlib.sha256(), "layers_sha256": hashlib.sha256()}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".txt", ".model", ".safetensors") or not path.is_file():
            continue
        digest = digests["model_sha256" if path.parent in weight_folders else "layers_sha256"]
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        digest.update(_read_hash_samples(path))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _read_hash_samples(path: Path) -> bytes:
    """A file's content; of large weights evenly spaced pieces."""
    size = path.stat().st_size
    if size <= HASH_SAMPLES * HASH_SAMPLE_BYTES or path.suffix != ".safetensors":
        return path.read_bytes()
    samples = []
    with path.open("rb") as file:
        for offset in np.linspace(0, size - HASH_SAMPLE_BYTES, HASH_SAMPLES, dtype=np.int64):
            file.seek(int(offset))
            samples.append(file.read(HASH_SAMPLE_BYTES))
    return b"".join(samples)
