"""Raw data to RecBole's files: python scripts/prepare_data.py FORMAT --interactions=PATH --dataset=NAME,
or the public data of the results tables: python scripts/prepare_data.py --preset=NAME [--download].

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

Exact duplicates, the same user, item and time, are kept unless --drop-repeats is given: Amazon's and Steam's
times are days, within which a user may come back.

--drop-repeats, --core, --by-user and --relative-times hold all interactions in memory, some 20 bytes each.

A preset makes the data of a table in docs/results.md, and compares counts and checksums with the tables'
data; the exit status is 1 if something differs. Its raw files are in --raw; --download fetches those that are
missing. A download that was stopped resumes. m2rec/properties/public_data.yaml has all addresses and options.
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
from m2rec.data.raw.presets import RawFolder, prepare_preset
from m2rec.data.raw.public_data import read_presets
from m2rec.data.raw.times import TIME_UNITS

logger = logging.getLogger(__name__)

_PRESET_FLAGS = ("preset", "source", "raw", "download")
_FLAGS_WITH_PRESET = {*_PRESET_FLAGS, "dataset", "data_path", "interactions", "items"}
_ARGUMENT_NAMES = "|".join(
    [*(field.name for field in fields(PreparationOptions) if field.name != "format"), *_PRESET_FLAGS]
)
# an argument in a message: `name: ...` or `name=...`, not within a path or a quoted text
_ARGUMENT = re.compile(rf"(?<![\w./\\'\"-])({_ARGUMENT_NAMES})(?=[:=]| fetches )")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        "prepare",
        lambda: prepare(arguments),
        when_stopped="; no data set was written",
        reword=replace_names_with_flags,
    )


def prepare(arguments: Sequence[str] | None) -> int:
    """Prepare the data set that the command line describes, print its statistics, return the exit status."""
    options = vars(parse_options(arguments))
    preset = options.pop("preset", None)
    if preset is None:
        print(prepare_dataset(PreparationOptions(**options), log))
        return 0
    folder = options.pop("raw", options.get("data_path", PreparationOptions.data_path) / "raw")
    raw = RawFolder(folder, options.pop("download", False))
    prepared = prepare_preset(preset, options, raw, options.pop("source", None), log)
    print(prepared.statistics, *prepared.comparisons, sep="\n")
    if prepared.note:
        print(f"note: {prepared.note}")
    return 0 if prepared.is_same else 1


def log(text: str) -> None:
    """Log a remark of the library, with flags in place of its arguments' names."""
    logger.warning("%s", replace_names_with_flags(text))


def replace_names_with_flags(message: str) -> str:
    """A message of the library, with flags in place of its arguments' names."""
    return _ARGUMENT.sub(lambda match: f"--{match[1].replace('_', '-')}", message)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; an option that is not given is absent."""
    parser = Parser(
        "prepare",
        __doc__,
        epilog=f"{describe_formats()}\n\n{describe_presets()}",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("format", nargs="?", default=None, metavar="FORMAT", choices=FORMAT_NAMES, help="one of those below")
    add("--interactions", type=Path, help="file; for movielens the folder, for parquet a file or a folder")
    add("--items", type=Path, help="file with the items' text")
    add("--dataset", metavar="NAME", help="name to give the data set")
    add("--data-path", "--data_path", type=Path, metavar="DIR", help="default: dataset")
    add("--min-rating", type=float, help="keep only interactions with at least this rating")
    add("--time-unit", choices=list(TIME_UNITS), help="unit of times that are numbers; default: inferred")
    add("--keep", action="extend", nargs="+", metavar="CONDITION", help="conditions on interactions")
    add("--drop-repeats", action="store_true", help="keep one of exact duplicates")
    add(
        "--core", type=int, metavar="K", help="k-core: keep users and items with at least K interactions each"
    )
    add(
        "--by-user", action="store_true", help="write user by user in chronological order, ties in file order"
    )
    add("--relative-times", action="store_true", help="write times as the distance from a user's first one")
    add("--no-rating", action="store_true", help="write no ratings")
    add("--max-bad", type=float, metavar="SHARE", help="largest share of malformed lines; default: 0.01")
    add("--text-limit", type=int, help="characters of a text column; default: 2000")
    add = parser.add_argument_group("the data of a results table").add_argument
    add("--preset", metavar="NAME", help="one of those below; sets FORMAT and all other options")
    add("--source", metavar="NAME", help="one of the preset's; default: its first")
    add("--raw", type=Path, metavar="DIR", help="folder of raw files; default: the folder raw in --data-path")
    add("--download", action="store_true", help="fetch raw files that are missing")
    add = parser.add_argument_group("columns, for csv, parquet and jsonl").add_argument
    add("--user", metavar="COL")
    add("--item", metavar="COL")
    add("--time", metavar="COL", help="Unix time or dates; default: file order")
    add("--time-format", metavar="FORM", help="format of dates, such as '%%d.%%m.%%Y', in strptime's codes")
    add("--rating", metavar="COL")
    add("--item-id", metavar="COL", help="the item in the file of items")
    add("--text", nargs="+", metavar="COL", help="text in the file of items, of published formats too")
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
    options = parser.parse_args(arguments)
    _check_preset(parser, options)
    return options


def _check_preset(parser: Parser, options: argparse.Namespace) -> None:
    """Check that the options are those of a preset, or those without one."""
    given = set(vars(options))
    if "preset" not in given:
        for name in _PRESET_FLAGS:
            if name in given:
                parser.error(f"--{name}: needs a preset; add --preset=NAME")
        missing = [flag for flag in ("interactions", "dataset") if flag not in given]
        if options.format is None or missing:
            names = [*(["FORMAT"] if options.format is None else []), *(f"--{flag}" for flag in missing)]
            parser.error(f"the following arguments are required: {', '.join(names)}")
        return
    if options.format is not None:
        parser.error(f"FORMAT: the preset sets it; leave out {options.format!r}")
    del options.format
    for name in sorted(given - _FLAGS_WITH_PRESET - {"format"}):
        parser.error(f"--{name.replace('_', '-')}: the preset sets it; leave it out")


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
        "parquet": "any file, or a folder of parts as Spark writes it",
        "jsonl": "any file with a JSON object in each line, or of one JSON array of objects",
    }
    return "formats:\n" + "\n".join(f"  {name:13} {about}" for name, about in formats.items())


def describe_presets() -> str:
    """The presets and their sources, for the help."""
    lines = [
        f"  {name:22} {preset.about}; sources: {', '.join(preset.sources)}"
        for name, preset in read_presets().items()
    ]
    return "presets:\n" + "\n".join(lines)
