"""Raw data to RecBole's files: python scripts/prepare_data.py FORMAT --interactions=PATH --dataset=NAME.

Writes DIR/NAME/NAME.inter and, with --items, DIR/NAME/NAME.item with the texts of the items that occur,
and prints the data set's statistics. Both files appear at the end, or none; without --items an earlier
NAME.item stays. Raw files may be gzipped. What is dropped, changed or reinterpreted is counted in the log.
docs/data.md explains the rest.

Times: Unix time in one unit (seconds, milliseconds, ..., inferred from the first) or dates with one
meaning, in UTC unless they have an offset. Without --time file order is used: 1, 2, 3, ...

Paths: --item=events[].aid --time=events[].ts takes the list events apart, one interaction per element;
--user=user.id is a value within an object.

Conditions: --keep 'event=purchase' 'rating>=4' 'type in a,b' keeps the rows that fulfil all of them.

Malformed lines (no user, item or time; broken JSON; too many columns; not UTF-8) are skipped and counted;
more than --max-bad of all are an error.

Exact duplicates, the same user, item and time, are kept unless --drop-repeats is given: finding them takes
memory for each interaction, and Amazon's and Steam's times are days, within which a user may come back.
"""

import argparse
import logging
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from m2rec.cli import Parser, run_command
from m2rec.data.raw.formats import FORMATS
from m2rec.data.raw.options import FORMAT_NAMES, MOVIELENS, PreparationOptions
from m2rec.data.raw.prepare import prepare_dataset
from m2rec.data.raw.times import TIME_UNITS

logger = logging.getLogger(__name__)

_ARGUMENT_NAMES = "|".join(field.name for field in fields(PreparationOptions) if field.name != "format")
# an argument in a message: `name: ...` or `name=...`, not within a path or a quoted text
_ARGUMENT = re.compile(rf"(?<![\w./\\'\"-])({_ARGUMENT_NAMES})(?=[:=])")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        "prepare_data.py",
        lambda: prepare(arguments),
        when_stopped="; nothing was written",
        reword=replace_names_with_flags,
    )


def prepare(arguments: Sequence[str] | None) -> None:
    """Prepare the data set that the command line describes, and print its statistics."""
    options = PreparationOptions(**vars(parse_options(arguments)))
    print(prepare_dataset(options, log=lambda text: logger.warning("%s", replace_names_with_flags(text))))


def replace_names_with_flags(message: str) -> str:
    """A message of the library, with flags in place of its arguments' names."""
    return _ARGUMENT.sub(lambda match: f"--{match[1].replace('_', '-')}", message)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; an option that is not given is absent."""
    parser = Parser(
        description=__doc__,
        epilog=describe_formats(),
        formatter_class=argparse.RawTextHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("format", metavar="FORMAT", choices=FORMAT_NAMES, help="one of those below")
    add("--interactions", type=Path, required=True, help="file, for movielens the folder")
    add("--items", type=Path, help="file with the items' text")
    add("--dataset", required=True, metavar="NAME", help="name to give the data set")
    add("--data-path", "--data_path", type=Path, metavar="DIR", help="default: dataset")
    add("--min-rating", type=float, help="keep only interactions with at least this rating")
    add("--time-unit", choices=list(TIME_UNITS), help="unit of times that are numbers; default: inferred")
    add("--keep", action="extend", nargs="+", metavar="CONDITION", help="conditions on interactions")
    add("--drop-repeats", action="store_true", default=False, help="keep one of exact duplicates")
    add("--max-bad", type=float, metavar="SHARE", help="largest share of malformed lines; default: 0.01")
    add("--text-limit", type=int, help="characters of a text column; default: 2000")
    add = parser.add_argument_group("columns, for csv, parquet and jsonl").add_argument
    add("--user", metavar="COL")
    add("--item", metavar="COL")
    add("--time", metavar="COL", help="Unix time or dates; default: file order")
    add("--time-format", metavar="FORM", help="format of dates, such as '%%d.%%m.%%Y', in strptime's codes")
    add("--rating", metavar="COL")
    add("--item-id", metavar="COL", help="the item in the file of items")
    add("--text", nargs="+", metavar="COL", help="text in the file of items")
    add = parser.add_argument_group("for csv: what its first line does not say").add_argument
    add(
        "--columns",
        type=split_names,
        metavar="NAME,...",
        help="names by position of a file without a header, - for an unused column;\n"
        "user, item, time and rating need not be named again",
    )
    add("--separator", type=decode_tab, metavar="TEXT", help=r"one or two characters, \t for a tab")
    add("--item-columns", type=split_names, metavar="NAME,...", help="names of the file of items")
    add("--item-separator", type=decode_tab, metavar="TEXT", help="separator of the file of items")
    return parser.parse_args(arguments)


def split_names(text: str) -> list[str]:
    """Names that are separated by commas."""
    return text.split(",")


def decode_tab(text: str) -> str:
    r"""A separator, where \t is a tab."""
    return "\t" if text == r"\t" else text


def describe_formats() -> str:
    """The formats, for the help."""
    formats = {
        MOVIELENS: "the unpacked folder: ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-latest",
        **{name: raw_format.about for name, raw_format in FORMATS.items()},
        "csv": "any file with a header or --columns, separated by , or tab or ; or | or --separator;\n"
        f"{'':16}items in csv, parquet or jsonl, by the file's name",
        "parquet": "any, with pyarrow (pip install pyarrow)",
        "jsonl": "any file with a JSON object in each line, or of one JSON array of objects",
    }
    return "formats:\n" + "\n".join(f"  {name:13} {about}" for name, about in formats.items())
