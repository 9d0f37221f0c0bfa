"""Make a text-vector file: python scripts/embed_items.py --dataset=NAME --text-encoder=MODEL.

Reads NAME.item, joins the chosen columns of each item into one text, encodes the texts with
a sentence encoder through `transformers` (mean over tokens, unit length), and writes
NAME.text.safetensors beside the data, where run_mm.py finds it.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from m2rec import atomic, text_vectors
from m2rec.compat import data_folder

logger = logging.getLogger(__name__)

BATCH = 64
MAX_TOKENS = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse_options(arguments)
    try:
        embed(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"embed_items.py: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--text-encoder", required=True, help="folder or hub name of the encoder")
    parser.add_argument(
        "--data-path", "--data_path", default="dataset", help="folder that holds NAME/NAME.item"
    )
    parser.add_argument("--id-column", default="item_id", help="column of the item token")
    parser.add_argument("--columns", nargs="+", help="columns to use, in order; all by default")
    parser.add_argument("--output", help="file to write; NAME.text.safetensors beside the data by default")
    parser.add_argument("--model-name", help="name to record instead of --text-encoder")
    return parser.parse_args(arguments)


def embed(options: argparse.Namespace) -> Path:
    """Read, encode, write; returns the file written.

    Raises:
        ValueError: items or encoder can't be read.
    """
    name = options.dataset
    folder = data_folder(Path(options.data_path), name)
    output = Path(options.output or Path(options.data_path) / name / f"{name}{text_vectors.SUFFIX}")
    tokens, texts, columns = read_texts(folder / f"{name}.item", options.id_column, options.columns)
    output.parent.mkdir(parents=True, exist_ok=True)
    vectors = encode(texts, options.text_encoder)
    provenance = {
        "model": options.model_name or options.text_encoder,
        "columns": " ".join(columns),
        "date": datetime.now(UTC).date().isoformat(),
        "pooling": "mean, unit length",
    }
    text_vectors.save(output, tokens, vectors, provenance)
    logger.info("%s: %s vectors, %s wide", output, f"{len(tokens):,}", vectors.shape[1])
    return output


def read_texts(
    path: Path, id_column: str, columns: list[str] | None
) -> tuple[list[str], list[str], list[str]]:
    """Item tokens, one text each, and the columns used. Items without any text are left out.

    Raises:
        ValueError: the file or a column is missing, a token comes twice, or nobody has text.
    """
    if not path.is_file():
        raise ValueError(f"no item file {path}; its first line must name columns, such as item_id:token")
    header = atomic.read_header(path, "\t")
    for column in (id_column, *(columns or [])):
        if column not in header:
            raise ValueError(f"{path}: column {column!r} is missing, the file has {', '.join(header)}")
    used = columns or [column for column in header if column != id_column]
    frame = atomic.read_table(path, "\t", header).dropna(subset=[id_column]).fillna("")
    twice = frame[id_column][frame[id_column].duplicated()]
    if len(twice):
        raise ValueError(f"{path}: item {twice.iloc[0]!r} comes twice, again in line {twice.index[0] + 2}")
    texts = [". ".join(filter(None, map(str.strip, row))) for row in frame[used].to_numpy()]
    pairs = [(token, text) for token, text in zip(frame[id_column], texts, strict=True) if text]
    if not pairs:
        raise ValueError(f"{path}: no item has text in {', '.join(used)}")
    return [token for token, _ in pairs], [text for _, text in pairs], used


def encode(texts: list[str], encoder: str) -> np.ndarray:
    """(n, T) unit vectors: mean over each text's tokens.

    Raises:
        ValueError: the encoder can't be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        model = AutoModel.from_pretrained(encoder).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--text-encoder: can't load {encoder!r}; give the name of an encoder on the hub, or a folder "
            f"with config.json, the tokenizer's files and model.safetensors ({error})"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    for start in tqdm(range(0, len(order), BATCH), desc="encoding", unit="batch"):
        rows = order[start : start + BATCH]
        chosen = [texts[i] for i in rows]
        batch = tokenizer(
            chosen, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        vectors[rows] = mean_over_tokens(hidden, batch["attention_mask"]).cpu().numpy()
    return vectors


def mean_over_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden: (B, L, T), mask: (B, L), 0 at padding -> (B, T) of unit length."""
    weights = mask[..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


if __name__ == "__main__":
    sys.exit(main())
