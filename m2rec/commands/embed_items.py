"""Make a text-vector file: python scripts/embed_items.py --dataset=NAME [--text-encoder=MODEL].

Reads NAME.item, makes one text of each item, encodes the texts and writes NAME.text.safetensors
beside the data, where run_mm.py finds it. MODEL is `lsa`, which needs no download, or any sentence
encoder, BERT, T5 or decoder that `sentence-transformers` loads, from a folder or by its name on the
hub. With --vectors the vectors come from a file instead.

A killed run resumes when the same command is run again. If the file is there and nothing that decides
its vectors has changed, nothing is done.
"""

import m2rec.commands.own_process  # noqa: F401 - before PyTorch is loaded

# isort: split
import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m2rec.cli import Parser, run_command
from m2rec.errors import UserError
from m2rec.storage import lock_path
from m2rec.text.sentence_model import DEVICES, DTYPES, POOLINGS, TextEncoderOptions

if TYPE_CHECKING:
    from m2rec.text.imported import ImportedVectors
    from m2rec.text.language_model import TextEncoder
    from m2rec.text.lsa import LsaEncoder

logger = logging.getLogger(__name__)

ENCODER_OPTIONS = ("revision", "pooling", "instruction", "max_tokens", "batch_tokens", "device", "dtype")
TEXT_OPTIONS = ("text_encoder", "columns", "template", "instruction", "revision")  # not with --vectors
# the library's arguments that are flags here
ARGUMENTS = {*ENCODER_OPTIONS, *TEXT_OPTIONS, "vectors", "ids", "id_column", "force"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        "embed",
        lambda: make_vector_file(parse_options(arguments)),
        when_stopped="; run the same command again to resume",
        reword=replace_name_with_flag,
    )


def replace_name_with_flag(message: str) -> str:
    """A message of the library that begins with an argument's name, with the flag in its place."""
    name, colon, rest = message.partition(":")
    if name == "width":
        return f"--lsa-width:{rest}"
    return f"--{name.replace('_', '-')}:{rest}" if colon and name in ARGUMENTS else message


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("embed", __doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="name of the data set")
    add("--data-path", "--data_path", default="dataset", help="folder that holds NAME/NAME.item")
    add("--output", help="file to write; NAME.text.safetensors beside the data by default")
    add("--force", action="store_true", help="make the file again even if nothing changed")
    text = parser.add_argument_group("text")
    add = text.add_argument
    add("--id-column", default="item_id", help="column of the item token")
    add("--separator", default=r"\t", help=r"between columns, as field_separator; \t, a tab, by default")
    add("--columns", nargs="+", help="columns to join, in order; all but numbers (type float) by default")
    add("--template", default="", help="instead: 'title: {title}; genre: {genre}', without what is empty")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--text-encoder", help="lsa (default), a folder, or a name on the hub")
    add("--revision", default="", help="branch, tag or commit on the hub")
    add("--model-name", default="", help="name to record instead of the folder's")
    add("--pooling", choices=POOLINGS, default="auto", help="tokens -> vector; auto: as the model asks")
    add("--instruction", default="", help="put before every text, as some models ask")
    add("--max-tokens", type=int, default=0, help="of a text; a sentence encoder's own, else 256 or fewer")
    add(
        "--batch-tokens",
        type=int,
        default=0,
        help="of a batch with its padding; 512 on a CPU, 16384 on a GPU",
    )
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is a GPU")
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on a GPU that has it, else float32")
    add("--lsa-width", type=int, default=256, help="width of lsa at most")
    made = parser.add_argument_group("vectors made elsewhere")
    made.add_argument("--vectors", type=Path, help=".npy, .parquet or .csv")
    made.add_argument("--ids", type=Path, help="for .npy: item tokens, one per line, in its order")
    return parser.parse_args(arguments)


def make_vector_file(options: argparse.Namespace) -> None:
    """Make the file, or leave it if it is up to date.

    Raises:
        ValueError: an option or a file can't be used.
    """
    from m2rec.compat import find_data_folder
    from m2rec.data.inter_file import find_inter_file
    from m2rec.data.item_file import read_item_tokens
    from m2rec.text.build import build_text_vectors, import_text_vectors
    from m2rec.text.item_text import read_item_texts
    from m2rec.text.vector_file import VECTOR_FILE_SUFFIX

    name, data_path = options.dataset, Path(options.data_path)
    folder = find_data_folder(data_path, name)
    output = Path(options.output or data_path / name / f"{name}{VECTOR_FILE_SUFFIX}")
    if not options.separator:
        raise UserError("--separator: empty; give the characters between two columns")
    separator, id_column = options.separator.replace(r"\t", "\t"), options.id_column
    interaction_items = read_item_tokens(find_inter_file(folder, name), id_column, separator)
    output.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(output.parent):  # a run without vectors would make them, too
        if options.vectors or options.ids:
            source = open_imported_vectors(options)
            import_text_vectors(output, source, interaction_items, options.force)
            return
        items = read_item_texts(
            folder / f"{name}.item", id_column, options.columns, options.template, separator
        )
        if options.text_encoder is None:
            check_replaces_lsa(output, options.force)
        build_text_vectors(output, items, create_encoder(options), interaction_items, options.force)


def open_imported_vectors(options: argparse.Namespace) -> "ImportedVectors":
    """The file of --vectors.

    Raises:
        ValueError: an option does not go with it, or the file can't be used.
    """
    from m2rec.text.imported import ImportedVectors

    if options.vectors is None:
        raise UserError(f"--ids: {options.ids} needs --vectors, the file with the vectors")
    for key in TEXT_OPTIONS:
        if getattr(options, key):
            raise UserError(f"{key}: not together with --vectors; leave one out")
    return ImportedVectors(options.vectors, options.ids, options.id_column, options.model_name)


def create_encoder(options: argparse.Namespace) -> "TextEncoder | LsaEncoder":
    """The encoder of --text-encoder, lsa by default."""
    from m2rec.text.language_model import TextEncoder
    from m2rec.text.lsa import LsaEncoder
    from m2rec.text.vector_file import LSA_NAME

    if options.text_encoder in (None, LSA_NAME):
        return LsaEncoder(options.lsa_width)
    values = {key: getattr(options, key) for key in ENCODER_OPTIONS}
    return TextEncoder(TextEncoderOptions(options.text_encoder, name=options.model_name, **values))


def check_replaces_lsa(output: Path, force: bool) -> None:
    """Check that lsa, taken by default, does not replace the vectors of a language model.

    Raises:
        ValueError: it would.
    """
    from m2rec.text.vector_file import LSA_NAME, read_text_vectors

    logger.info(
        "no --text-encoder: lsa, from word counts; for a language model give its name, for example "
        "--text-encoder=sentence-transformers/all-MiniLM-L6-v2"
    )
    if force or not output.exists():
        return
    model = read_text_vectors(output).metadata.get("model", "another source")
    if model != LSA_NAME:
        raise UserError(
            f"--text-encoder: {output} has vectors of {model}; name an encoder to replace them, "
            "or give --force"
        )
