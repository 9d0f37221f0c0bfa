"""Raw data to RecBole's files: python scripts/prepare_data.py FORMAT --interactions=PATH --dataset=NAME.

Writes DIR/NAME/NAME.inter and, with --items, DIR/NAME/NAME.item with the text of the items that
occur, and prints the data set's statistics. Files may be gzipped. They are read line by line, and
what is written appears whole at the end, or not at all, and takes the place of earlier files of that
name; without --items an earlier NAME.item stays.

Times: unix time, or dates that have one meaning, with or without zone (without is UTC): the year first
(2021-03-04, 2021/3/4 5:06 PM, 2021-03-04 05:06:07 +0100) or the month by its name (Mar 4, 2021; Sun Jul
30 07:44:10 -0700 2017). Other dates need --time-format; whether the day or the month comes first is never
guessed. Times are written as seconds in full precision. Unix time may be in seconds, milliseconds,
microseconds or nanoseconds, one unit for the whole file: from 10^11 on numbers are taken for
milliseconds, from 10^14 for microseconds, from 10^17 for nanoseconds, and smaller ones stay as they
are. The log says what was found. Times of two units, or numbers among dates, are an error;
--time-unit says which unit numbers have whatever their size, and dates may stand between them then.
Without --time, in csv, parquet and jsonl, the order of the file is the time: 1, 2, 3, ...

Lists: a column may be a path. --item=events[].aid --time=events[].ts makes an interaction of each
element of the list events, and the other columns are repeated. --item=items[] --time=times[] takes two
lists apart together, which must have one length. Lists may be JSON's, Parquet's, or JSON in a cell of
CSV. --user=user.id is a value within an object.

Conditions: --keep 'event=purchase' 'rating>=4' 'type in a,b' keeps the rows that fulfil all of them,
before anything else; = and != compare numbers as numbers, <, <=, > and >= numbers only. What each of
them leaves out is counted and said.

Ids: blanks around an id are removed, which is counted and said.

Text: HTML entities are resolved, white space becomes single spaces, lists are joined. Items
without any text are left out of NAME.item; of several lines for one item the first with text counts.

Malformed lines (no user, item or time; an id with a tab or newline; broken JSON; too many columns;
not UTF-8) are counted and skipped, and the first are shown. Too many are an error, see --max-bad.

Quotation marks: between commas and semicolons a cell may be quoted and have several lines then; the
log says how many lines the longest such record has, and more than 1,000 are an error. Between tabs,
| and other separators quotation marks are text.

Exact repeats, the same user, item and time, are kept, because to know them takes memory for each
interaction and because Amazon's and Steam's times are days, within which a user may come back.
--drop-repeats keeps the first of each.
"""

import argparse
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import IO, TypeVar

from tqdm import tqdm

from m2rec.cli import Parser, run_command
from m2rec.data.dominant import describe_dominant_entity
from m2rec.data.raw.filters import RowCondition
from m2rec.data.raw.formats import (
    FORMATS,
    TABLE_KINDS,
    RawFormat,
    RawInteraction,
    build_table_format,
    find_movielens_files,
)
from m2rec.data.raw.readers import CsvLayout, Tally
from m2rec.data.raw.times import TIME_UNITS, check_time_format
from m2rec.data.raw.values import format_decimal
from m2rec.errors import UserError
from m2rec.storage import write_atomically

logger = logging.getLogger(__name__)

MOVIELENS = "movielens"
COLUMN_OPTIONS = ("user", "item", "time", "rating", "item_id", "text")
LAYOUT_OPTIONS = ("columns", "separator", "item_columns", "item_separator")
Record = TypeVar("Record")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from command-line arguments; returns the exit status, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        "prepare_data.py",
        lambda: print(DatasetPreparation(parse_options(arguments)).run()),
        when_stopped="; nothing was written",
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        description=__doc__, epilog=describe_formats(), formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "format", metavar="FORMAT", choices=[MOVIELENS, *FORMATS, *TABLE_KINDS], help="one of those below"
    )
    parser.add_argument("--interactions", type=Path, required=True, help="file, for movielens the folder")
    parser.add_argument("--items", type=Path, help="file with the items' text")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="name to give the data set")
    parser.add_argument(
        "--data-path", "--data_path", type=Path, default="dataset", metavar="DIR", help="default: dataset"
    )
    parser.add_argument("--min-rating", type=float, help="keep only interactions with at least this rating")
    parser.add_argument(
        "--time-unit",
        choices=list(TIME_UNITS),
        help="unit of times that are numbers; default: found, see above",
    )
    parser.add_argument(
        "--keep",
        action="extend",
        nargs="+",
        default=[],
        metavar="CONDITION",
        help="interactions to keep, such as 'event=purchase'; see above",
    )
    parser.add_argument("--drop-repeats", action="store_true", help="keep one of exact repeats")
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop with more malformed lines than this share of all,\n"
        "judged from 10,000 lines on and at the end; default: 0.01",
    )
    parser.add_argument(
        "--text-limit", type=int, default=2000, help="characters of a text column; default: 2000"
    )
    columns = parser.add_argument_group("columns, for csv, parquet and jsonl")
    columns.add_argument("--user", metavar="COL")
    columns.add_argument("--item", metavar="COL")
    columns.add_argument("--time", metavar="COL", help="unix time or dates; default: the order of the file")
    columns.add_argument(
        "--time-format",
        metavar="FORM",
        help="what dates look like, such as '%%m/%%d/%%Y %%I:%%M:%%S %%p', in strptime's codes",
    )
    columns.add_argument("--rating", metavar="COL")
    columns.add_argument("--item-id", metavar="COL", help="the item in the file of items")
    columns.add_argument("--text", nargs="+", metavar="COL", help="text in the file of items")
    layout = parser.add_argument_group("for csv: what its first line does not say")
    layout.add_argument(
        "--columns",
        metavar="NAME,...",
        help="names by position of a file without a header, - for a column that is not used;\n"
        "those called user, item, time and rating need not be named again",
    )
    layout.add_argument(
        "--separator",
        metavar="TEXT",
        help="one or two characters, \\t for a tab; default: , or tab or ; or |, whichever fits",
    )
    layout.add_argument("--item-columns", metavar="NAME,...", help="names of the file of items")
    layout.add_argument("--item-separator", metavar="TEXT", help="separator of the file of items")
    return parser.parse_args(arguments)


def describe_formats() -> str:
    """The formats, for the help."""
    known = {
        MOVIELENS: "the unpacked folder: ml-100k, ml-1m, ml-10m, ml-20m, ml-25m, ml-latest",
        **{name: entry.about for name, entry in FORMATS.items()},
        "csv": "any file with a header or --columns, separated by , or tab or ; or | or --separator;\n"
        f"{'':16}items in any of these three",
        "parquet": "any, with pyarrow (pip install pyarrow)",
        "jsonl": "any file with a JSON object in each line, or of one JSON array of objects",
    }
    return "formats:\n" + "\n".join(f"  {name:13} {about}" for name, about in known.items())


@dataclass
class DatasetStatistics:
    """A data set in numbers."""

    name: str
    users: Counter[str] = field(default_factory=Counter)
    items: Counter[str] = field(default_factory=Counter)
    """Interactions of each."""
    interactions: int = 0
    texts: int | None = None
    """Items with text; None without a file of items."""

    def __str__(self) -> str:
        users, items, n = len(self.users), len(self.items), self.interactions
        cells = {
            "data set": self.name,
            "users": f"{users:,}",
            "items": f"{items:,}",
            "interactions": f"{n:,}",
            "average length": f"{n / users:.2f}",
            "sparsity": f"{1 - n / (users * items):.2%}",
            "items with text": "-" if self.texts is None else f"{self.texts:,}",
        }
        widths = [max(len(name), len(cell)) for name, cell in cells.items()]
        return "\n".join(
            "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
            for line in (cells.keys(), cells.values())
        )


class DatasetPreparation:
    """What the command line asks for.

    Raises:
        ValueError: options contradict each other or the format, or a file is missing.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        check_number_ranges(options)
        self.format, self.interactions, self.items = find_format_and_files(options)
        if options.min_rating is not None and not self.format.rating:
            cure = "name its column with --rating" if options.format in TABLE_KINDS else "leave it out"
            raise UserError(f"--min-rating: there is no rating in {options.format}; {cure}")
        name = options.dataset
        if not name or Path(name).name != name or name.startswith("."):
            raise UserError(
                f"--dataset: {name!r} is no name of a folder; the folder it lies in is --data-path"
            )
        self.inter = options.data_path / name / f"{name}.inter"
        self.item = self.inter.with_suffix(".item")
        for source in filter(None, (self.interactions, self.items)):
            for target in (self.inter, self.item):
                if target.exists() and source.samefile(target):
                    raise UserError(f"{source}: the result would replace it; give another --dataset")

    def run(self) -> DatasetStatistics:
        """Write the files; returns what is in them.

        Raises:
            ValueError: a file can't be read, or nothing of it is left.
        """
        found = DatasetStatistics(self.options.dataset)
        self.inter.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_atomically(self.inter, lambda temporary: self._write_files(temporary, found))
        finally:
            with suppress(OSError):  # it stays unless it is empty
                self.inter.parent.rmdir()
        return found

    def _write_files(self, inter: Path, found: DatasetStatistics) -> None:
        """Both files: the interactions take their place last, when the items have theirs."""
        with inter.open("w", encoding="utf-8", newline="\n") as file:
            self._write_interactions(file, found)
        if self.items is not None:
            write_atomically(self.item, lambda temporary: self._write_items(temporary, found))

    def _write_interactions(self, file: IO[str], found: DatasetStatistics) -> None:
        rated = bool(self.format.rating)
        columns = ["user_id:token", "item_id:token", *(["rating:float"] if rated else []), "timestamp:float"]
        file.write("\t".join(columns) + "\n")
        tally = Tally(self.interactions, self.options.max_bad)
        records = self.format.interactions(tally, self.options.time_unit)
        for record in self._filter_interactions(iterate_with_progress(records, tally)):
            user, item, time, rating = record
            cells = [user, item, format_decimal(time)]
            if rated:
                cells.insert(2, "" if rating is None else format_decimal(rating))
            file.write("\t".join(cells) + "\n")
            found.users[user] += 1
            found.items[item] += 1
            found.interactions += 1
        for kind, counts in (("user", found.users), ("item", found.items)):
            if said := describe_dominant_entity(kind, list(counts), list(counts.values())):
                tally.notes.append(said)
        log_remarks(tally)
        if not found.interactions:
            limits = [f"--keep '{text}'" for text in self.options.keep]
            if self.options.min_rating is not None:
                limits.append(f"--min-rating={self.options.min_rating:g}")
            left = f" with {' '.join(limits)}" if limits else ""
            raise UserError(f"{self.interactions}: no interactions in it{left}; is it the right file?")

    def _filter_interactions(self, records: Iterator[RawInteraction]) -> Iterator[RawInteraction]:
        """Those with enough rating, and each once with --drop-repeats."""
        least, seen, repeats = self.options.min_rating, set[bytes](), 0
        for record in records:
            if least is not None and (record.rating is None or float(record.rating) < least):
                continue
            if self.options.drop_repeats:
                text = "\t".join((record.user, record.item, format_decimal(record.time)))
                digest = blake2b(text.encode(), digest_size=12).digest()
                if digest in seen:
                    repeats += 1
                    continue
                seen.add(digest)
            yield record
        if repeats:
            logger.info("%s: exact repeats left out: %s", self.interactions, f"{repeats:,}")

    def _write_items(self, path: Path, found: DatasetStatistics) -> None:
        assert self.items is not None
        tally = Tally(self.items, self.options.max_bad)
        known, written = False, set[str]()
        with path.open("w", encoding="utf-8", newline="\n") as file:
            columns = (f"{text.column}:{text.kind}" for text in self.format.texts)
            file.write("\t".join(("item_id:token", *columns)) + "\n")
            for token, texts in iterate_with_progress(self.format.items(tally), tally):
                known |= token in found.items
                if token in found.items and token not in written and any(texts):
                    written.add(token)
                    cut = (text[: self.options.text_limit].rstrip() for text in texts)
                    file.write("\t".join((token, *cut)) + "\n")
        log_remarks(tally)
        if not known:
            raise UserError(
                f"{self.items}: none of its items occurs in {self.interactions}; do the two belong together?"
            )
        found.texts = len(written)


def check_number_ranges(options: argparse.Namespace) -> None:
    """Check the ranges of numbers.

    Raises:
        ValueError: one is out of its range.
    """
    if not 0 <= options.max_bad <= 1:
        raise UserError(f"--max-bad: expected a share from 0 to 1, got {options.max_bad:g}")
    if options.text_limit < 1:
        raise UserError(f"--text-limit: expected a whole number from 1, got {options.text_limit}")
    if options.min_rating is not None and not math.isfinite(options.min_rating):
        raise UserError(f"--min-rating: expected a number, got {options.min_rating}")


def find_format_and_files(options: argparse.Namespace) -> tuple[RawFormat, Path, Path | None]:
    """The format, and the files of interactions and of items.

    Raises:
        ValueError: a file is missing, or the columns don't fit the format.
    """
    path, items, keep = options.interactions, options.items, tuple(map(RowCondition.parse, options.keep))
    given = [
        f"--{name.replace('_', '-')}"
        for name in (*COLUMN_OPTIONS, "time_format", *LAYOUT_OPTIONS)
        if getattr(options, name)
    ]
    if options.format not in TABLE_KINDS and given:
        raise UserError(f"{given[0]}: {options.format} has columns of its own; leave it out")
    if options.format == MOVIELENS:
        if items is not None:
            raise UserError("--items: movielens takes the films from the folder; leave it out")
        found, path, items = find_movielens_files(path)
        return replace(found, keep=keep), path, items
    for option, file in (("--interactions", path), ("--items", items)):
        if file is not None and not file.is_file():
            raise UserError(f"{option}: there is no file {file}")
    if options.format in TABLE_KINDS:
        found = build_format_from_options(options, keep)
    else:
        found = replace(FORMATS[options.format], keep=keep)
        if items is not None and not found.token:
            raise UserError(f"--items: {options.format} has no file of items; leave it out")
    check_time_options(options, found)
    return found, path, items


def build_format_from_options(options: argparse.Namespace, keep: Sequence[RowCondition]) -> RawFormat:
    """The format of csv, parquet or jsonl with the given columns."""
    item_kind = infer_table_kind(options.items, options.format)
    layout = parse_layout_options(options, "", options.format)
    item_layout = parse_layout_options(options, "item_", item_kind if options.items else None)
    for name in ("user", "item", "time", "rating"):
        if getattr(options, name) is None and name in layout.names:
            setattr(options, name, name)
    for name in ("user", "item", *(["item_id", "text"] if options.items else [])):
        if not getattr(options, name):
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}: {options.format} needs it; name a column of the file")
    if options.items is None and (stray := [name for name in ("item_id", "text") if getattr(options, name)]):
        raise UserError(f"--{stray[0].replace('_', '-')}: there is no --items to read it from")
    texts = options.text or []
    if len({"_".join(text.split()) for text in texts} | {"item_id"}) <= len(texts):
        raise UserError(f"--text: {' '.join(texts)}: each column once, and none of the name item_id")
    return build_table_format(
        options.format,
        options.user,
        options.item,
        options.time,
        options.rating,
        item_kind,
        options.item_id or "",
        texts,
        layout,
        item_layout,
        options.time_format,
        keep,
    )


def check_time_options(options: argparse.Namespace, found: RawFormat) -> None:
    """Check that the options for times fit the times of the format.

    Raises:
        ValueError: there are none, or they are dates of one form and a unit is given, or that is no form.
    """
    for option in () if found.time else ("time_unit", "time_format", "drop_repeats"):
        if getattr(options, option):
            raise UserError(f"--{option.replace('_', '-')}: it needs a time, there is none; leave it out")
    if found.time_format is not None:
        if options.time_unit:
            raise UserError("--time-unit: the times are dates of one form, not numbers; leave it out")
        check_time_format(found.time_format)


def parse_layout_options(options: argparse.Namespace, prefix: str, kind: str | None) -> CsvLayout:
    """How a file of CSV is laid out: that of interactions, or with the prefix `item_` that of items.

    Raises:
        ValueError: its kind is another, or a name or separator is none.
    """
    names, separator = (getattr(options, f"{prefix}{name}") for name in ("columns", "separator"))
    columns, marks = (f"--{prefix.replace('_', '-')}{name}" for name in ("columns", "separator"))
    for option, value in ((columns, names), (marks, separator)):
        if value is not None and kind != "csv":
            why = f"{kind} names its columns itself" if kind else "there is no --items"
            raise UserError(f"{option}: {why}; leave it out")
    found = tuple("" if name.strip() == "-" else name.strip() for name in (names or "").split(","))
    used = [name for name in found if name]
    if names is not None and (not used or len(set(used)) < len(used)):
        raise UserError(f"{columns}: {names!r}: expected names with commas between, each of them once")
    mark = "\t" if separator == "\\t" else separator
    if mark is not None and (not 1 <= len(mark) <= 2 or set(mark) & set('"\r\n')):
        raise UserError(f"{marks}: expected one or two characters, or \\t, got {separator!r}")
    return CsvLayout(found if used else (), mark or "")


def infer_table_kind(path: Path | None, kind: str) -> str:
    """Which table a file of items is, by its name; `kind` if that says nothing."""
    suffixes = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "jsonl", ".jsonl": "jsonl"}
    return next((suffixes[s.lower()] for s in (path.suffixes if path else []) if s.lower() in suffixes), kind)


def iterate_with_progress(records: Iterator[Record], tally: Tally) -> Iterator[Record]:
    """The records, and on a terminal a bar over the file's bytes."""
    size = tally.path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, desc=tally.path.name, disable=None, leave=False) as bar:
        for count, record in enumerate(records):
            if count % 1000 == 0:
                bar.update(tally.position - bar.n)
            yield record


def log_remarks(tally: Tally) -> None:
    """Say what was left out of the file, and how the rest was read."""
    for remark in tally.remarks():
        logger.warning("%s: %s", tally.path, remark)
