"""Make a text-vector file: python scripts/embed_items.py --dataset=NAME [--text-encoder=MODEL].

Reads NAME.item, makes one text of each item, encodes the texts and writes NAME.text.safetensors
beside the data, where run_mm.py finds it. MODEL is `lsa`, which needs no download, or any sentence
encoder, BERT, T5 or decoder that `sentence-transformers` loads, from a folder or by its name on the
hub. With --vectors the vectors come from a file instead.

A run that was killed goes on when it is started again. When the file is there and nothing that
decides its vectors has changed, nothing is done.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from m2rec.cli import Parser, run_command
from m2rec.compat import find_data_folder
from m2rec.errors import UserError
from m2rec.storage import lock_path
from m2rec.text import build, lsa, vector_file
from m2rec.text.imported import ImportedVectors
from m2rec.text.item_text import read_item_texts, read_item_tokens
from m2rec.text.language_model import DEVICES, DTYPES, POOLINGS, TextEncoder, TextEncoderOptions

logger = logging.getLogger(__name__)

# of the library's arguments
ARGUMENT_FLAGS = {
    "text_encoder": "--text-encoder", "columns": "--columns", "template": "--template",
    "pooling": "--pooling", "max_tokens": "--max-tokens", "batch_tokens": "--batch-tokens",
    "device": "--device", "dtype": "--dtype", "width": "--lsa-width",
}  # fmt: skip
TEXT_OPTIONS = ("text_encoder", "columns", "template", "instruction", "revision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        "embed_items.py",
        lambda: make_vector_file(parse_options(arguments)),
        when_stopped="; run the same command again to resume",
        reword=replace_name_with_flag,
    )


def replace_name_with_flag(message: str) -> str:
    """A message of the library that begins with an argument's name, with the flag in its place."""
    name, colon, rest = message.partition(":")
    return f"{ARGUMENT_FLAGS[name]}{colon}{rest}" if name in ARGUMENT_FLAGS else message


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", required=True, help="name of the data set")
    add("--data-path", "--data_path", default="dataset", help="folder that holds NAME/NAME.item")
    add("--output", help="file to write; NAME.text.safetensors beside the data by default")
    add("--force", action="store_true", help="make the file again even if nothing changed")
    text = parser.add_argument_group("text")
    add = text.add_argument
    add("--id-column", default="item_id", help="column of the item token")
    add("--separator", default=r"\t", help=r"between columns, as field_separator; \t, a tab, by default")
    add("--columns", nargs="+", help="columns to join, in order; all by default")
    add("--template", default="", help="instead: 'title: {title}; genre: {genre}', without what is empty")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--text-encoder", help="lsa (default), a folder, or a name on the hub")
    add("--revision", default="", help="branch, tag or commit on the hub")
    add("--model-name", default="", help="name to record instead of the folder's")
    add("--pooling", choices=POOLINGS, default="auto", help="tokens -> vector; auto: as the model asks")
    add("--instruction", default="", help="put before every text, as some models ask")
    add("--max-tokens", type=int, default=0, help="of a text; as a sentence encoder says, else 256 or fewer")
    add(
        "--batch-tokens",
        type=int,
        default=0,
        help="of a batch with its padding; 512 on a CPU, 16384 on a GPU",
    )
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is a GPU")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU that has it, else float32")
    add("--lsa-width", type=int, default=256, help="width of lsa; fewer if the texts have fewer to tell")
    made = parser.add_argument_group("vectors made elsewhere")
    made.add_argument("--vectors", type=Path, help=".npy, .parquet or .csv")
    made.add_argument("--ids", type=Path, help="for .npy: item tokens, one per line, in its order")
    return parser.parse_args(arguments)


def make_vector_file(options: argparse.Namespace) -> None:
    """Make the file, or leave it if it is up to date.

    Raises:
        ValueError: an option or a file can't be used.
    """
    name = options.dataset
    folder = find_data_folder(Path(options.data_path), name)
    output = Path(
        options.output or Path(options.data_path) / name / f"{name}{vector_file.VECTOR_FILE_SUFFIX}"
    )
    if not options.separator:
        raise UserError("--separator: empty; give what stands between columns")
    separator = options.separator.replace(r"\t", "\t")
    known = read_item_tokens(folder / f"{name}.inter", options.id_column, separator)
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(output.parent):  # a run that finds none would make its own
        if options.vectors or options.ids:
            build.import_text_vectors(output, open_imported_vectors(options), known, options.force)
            return
        file, columns = folder / f"{name}.item", options.columns
        items = read_item_texts(file, options.id_column, columns, options.template, separator)
        build.build_text_vectors(output, items, choose_text_encoder(options, output), known, options.force)


def open_imported_vectors(options: argparse.Namespace) -> ImportedVectors:
    """What --vectors names.

    Raises:
        ValueError: an option does not go with it, or the file can't be used.
    """
    if options.vectors is None:
        raise UserError(f"--ids: {options.ids} needs --vectors, the file with the vectors")
    for key in TEXT_OPTIONS:
        if getattr(options, key):
            raise UserError(f"--{key.replace('_', '-')}: not together with --vectors; leave one out")
    return ImportedVectors(options.vectors, options.ids, options.id_column, options.model_name)


def choose_text_encoder(options: argparse.Namespace, output: Path) -> TextEncoder | lsa.LsaEncoder:
    """What --text-encoder names. By itself lsa, but not over the work of a language model.

    Raises:
        ValueError: `output` was made otherwise, and nobody said that it may go.
    """
    if options.text_encoder is None:
        logger.info(
            "no --text-encoder: lsa, from word counts; for a language model give its name, for example "
            "--text-encoder=sentence-transformers/all-MiniLM-L6-v2"
        )
        if output.exists() and not options.force:
            model = vector_file.read_text_vectors(output)[2].get("model", "another source")
            if model != lsa.LSA_NAME:
                raise UserError(
                    f"--text-encoder: {output} has vectors of {model}; name an encoder to replace them, "
                    "or give --force"
                )
    if options.text_encoder in (None, lsa.LSA_NAME):
        return lsa.LsaEncoder(options.lsa_width)
    keys = ("revision", "pooling", "instruction", "max_tokens", "batch_tokens", "device", "dtype")
    given = {key: getattr(options, key) for key in keys}
    return TextEncoder(TextEncoderOptions(options.text_encoder, name=options.model_name, **given))
